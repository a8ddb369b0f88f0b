"""The content of PEFT's adapter_config.json: what of it makes a plain LoRA, the rank and scale of a site, and the whole
config of an adapter with these sites. And `experts.json` beside it: what each pair of experts adapts, which its
key does not tell."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rankwise.core.experts import ExpertPlace, nested_keys, targeted
from rankwise.core.site import PEFT_NAMES, pattern
from rankwise.errors import DataError, UsageError
from rankwise.files.document import Document, build

EXPERTS = Document(
    "experts.json", "rankwise-experts/1", "a record of the experts that an adapter adapts", "", ("pairs",)
)
# Options under which B·A is not, or not all of, the change of the weight.
NOT_PLAIN = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "lora_bias": "LoRA with a bias on B",
    "megatron_config": "Megatron LoRA",
    "enable_lora": "MergedLinear, an early PEFT's LoRA on some of a fused q, k, v",
}
# Initialisations that move part of the base weight into the adapter: B·A is then no change of the base.
MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What the written regex and the plain delta make void.
RESET: dict[str, Any] = {
    "init_lora_weights": True,
    "inference_mode": True,
    "layers_to_transform": None,
    "layers_pattern": None,
    "exclude_modules": None,
    "loftq_config": {},
    "eva_config": None,
    "corda_config": None,
    "lora_ga_config": None,
}


def lora_config(
    base_model: str | None,
    task_type: str | None = "CAUSAL_LM",
    dropout: float = 0.0,
    modules_to_save: list[str] | None = None,
) -> dict[str, Any]:
    """The fields of a plain LoRA that do not follow from its tensors (`write_adapter` adds those)."""
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": dropout,
        "modules_to_save": modules_to_save,
        "peft_type": "LORA",
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def require_plain(config: Mapping[str, Any], file: Path) -> None:
    """DataError, naming the variant, for every adapter that is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise DataError(f"{file}: peft_type is {kind or 'missing'}; only plain LoRA adapters can be read")
    for option, name in NOT_PLAIN.items():
        if config.get(option):
            raise DataError(f"{file}: {name} ({option} is set); only plain LoRA adapters can be read")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(MOVES_BASE):
        raise DataError(
            f"{file}: init_lora_weights is {start!r}, which changes the base weights, so B·A is not the change of "
            "the base; convert it first (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for key in ("r", "lora_alpha"):
        if not is_number(config.get(key)):
            raise DataError(f"{file}: {key} is {config.get(key)!r}; a number is needed")


def rank_of(config: Mapping[str, Any], path: str, file: Path) -> int:
    """The rank that the config gives a site."""
    return int(_matched(config, "rank_pattern", path, config["r"], file))


def scale_of(config: Mapping[str, Any], path: str, file: Path) -> float:
    """alpha / r, or alpha / √r with rsLoRA (Kalajdzievski 2023), of a site."""
    alpha = _matched(config, "alpha_pattern", path, config["lora_alpha"], file)
    return alpha / _divisor(rank_of(config, path, file), bool(config.get("use_rslora")))


def _divisor(rank: int, use_rslora: bool) -> float:
    return math.sqrt(rank) if use_rslora else rank


def _matched(config: Mapping[str, Any], field: str, path: str, default: float, file: Path) -> float:
    """The value of the first pattern that matches: a regex with a free prefix that ends at a dot. A linear layer that
    PEFT adapts by its parameter has that one's name there."""
    named = f"{path}.weight" if peft_name(config, path) == "parameter" else path
    for key, value in (config.get(field) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", named)
        except re.error as error:
            raise DataError(f"{file}: {field}: {key!r} is not a regular expression ({error})") from error
        if found:
            if not is_number(value):
                raise DataError(f"{file}: {field}: {key!r} has the value {value!r}; a number is needed")
            return float(value)
    return default


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def target_regex(paths: Iterable[str]) -> str:
    """One anchored regex for exactly these paths. PEFT would shorten a list of 20 or more to bare suffixes."""
    return f"^(?:{'|'.join(re.escape(path) for path in paths)})$"


def peft_name(config: Mapping[str, Any], path: str) -> str:
    """How the config names a linear layer (`core.site.PEFT_NAMES`)."""
    parameters = config.get("target_parameters") or ()
    if targeted([f"{path}.weight"], parameters):
        return "parameter"
    return "path" if parameters or not isinstance(config.get("target_modules"), str | None) else "pattern"


def config_name(path: str, peft: str, experts: int) -> str:
    """A site's name in the config: its path, or its parameter's."""
    return f"{path}.weight" if peft == "parameter" and not experts else path


@dataclass(frozen=True)
class AdaptedSite:
    """What the config says of one site. name: as PEFT's patterns and lists have it; peft: a site's."""

    rank: int
    scale: float
    name: str
    peft: str = "pattern"


def complete_config(config: Mapping[str, Any], sites: Iterable[AdaptedSite], fan_in_fan_out: bool) -> dict[str, Any]:
    """The whole adapter_config.json for these sites.

    The global r is the largest rank and lora_alpha belongs to it, so that a reader that ignores patterns scales
    right where the scale is one; patterns name the sites that differ, by anchored full path. One regex names the sites,
    or lists of modules and parameters where a site asks for that.
    """
    sites, use_rslora = list(sites), bool(config.get("use_rslora"))
    alphas = {site.name: _tidy(site.scale * _divisor(site.rank, use_rslora)) for site in sites}
    largest = max(sites, key=lambda site: site.rank)
    tensors = {
        "r": largest.rank,
        "lora_alpha": alphas[largest.name],
        "rank_pattern": {pattern(site.name): site.rank for site in sites if site.rank != largest.rank},
        "alpha_pattern": {pattern(name): alpha for name, alpha in alphas.items() if alpha != alphas[largest.name]},
        "fan_in_fan_out": fan_in_fan_out,
        **_targets(sites),
    }
    whole = dict(config) | RESET | tensors
    if tensors["target_parameters"]:
        whole |= {"lora_dropout": 0.0}  # PEFT has none for parameters, and refuses the config
    whole.pop("peft_version", None)
    return dict(sorted(whole.items()))


def _targets(sites: Sequence[AdaptedSite]) -> dict[str, Any]:
    """target_modules and target_parameters. A list of modules may be empty: without one PEFT chooses some itself."""
    named = {kind: [site.name for site in sites if site.peft == kind] for kind in PEFT_NAMES}
    if not named["path"] and not named["parameter"]:
        return {"target_modules": target_regex(named["pattern"]), "target_parameters": None}
    return {"target_modules": named["pattern"] + named["path"], "target_parameters": named["parameter"] or None}


def _tidy(alpha: float) -> int | float:
    """An integer where rounding alone made it a fraction."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def recorded_places(folder: Path) -> dict[str, ExpertPlace]:
    """Key in the adapter's file → what the pair adapts, of a folder's `experts.json`; empty without one. DataError
    where a key is not the one under which PEFT saves the pair of its parameter."""
    file = folder / EXPERTS.name
    if not file.is_file():
        return {}
    try:
        found = {row.pop("key"): build(ExpertPlace, row) for row in EXPERTS.read(folder)["pairs"]}
    except (KeyError, TypeError, AttributeError, UsageError, DataError) as error:
        raise DataError(f"{file}: not {EXPERTS.what} ({error})") from error
    keys = nested_keys({place.parameter: place for place in found.values()})
    for key, place in found.items():
        if keys[place.parameter] != key:
            raise DataError(
                f"{file}: {key} cannot be the pair of {place.parameter}, which PEFT saves as {keys[place.parameter]}"
            )
    return found


def place_rows(places: Mapping[str, ExpertPlace]) -> dict[str, Any]:
    """The content of `experts.json`."""
    return {"pairs": [{"key": key, **asdict(place)} for key, place in places.items()]}
