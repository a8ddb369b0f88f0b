"""LoRA adapters in PEFT's format: read strictly, written atomically. PEFT itself is not needed.

adapter = read_adapter("runs/train")                 # a run folder, an adapter folder or a weight file
smaller = {path: LoraPair.of(pair.factors().compress(8), pair.scale) for path, pair in adapter.pairs.items()}
write_adapter("runs/compressed", replace(adapter, pairs=smaller))
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.core.factors import Factors
from rankwise.core.site import PEFT_PREFIX, pattern
from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import atomic_files, read_object, write_json
from rankwise.files.checkpoint import ADAPTER_NAMES, SAFETENSORS, open_checkpoint, resolve
from rankwise.files.pickled import SUFFIXES

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
    "target_parameters": "LoRA on parameters (fused experts)",
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
        if not _is_number(config.get(key)):
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
    """The value of the first pattern that matches: a regex with a free prefix that ends at a dot."""
    for key, value in (config.get(field) or {}).items():
        try:
            found = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            raise DataError(f"{file}: {field}: {key!r} is not a regular expression ({error})") from error
        if found:
            if not _is_number(value):
                raise DataError(f"{file}: {field}: {key!r} has the value {value!r}; a number is needed")
            return float(value)
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def target_regex(paths: Iterable[str]) -> str:
    """One anchored regex for exactly these paths. PEFT would shorten a list of 20 or more to bare suffixes."""
    return f"^(?:{'|'.join(re.escape(path) for path in paths)})$"


def complete_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], scales: Mapping[str, float], fan_in_fan_out: bool
) -> dict[str, Any]:
    """The whole adapter_config.json for these sites.

    The global r is the largest rank and lora_alpha belongs to it, so that a reader that ignores patterns scales
    right where the scale is one; patterns name the sites that differ, by anchored full path.
    """
    use_rslora = bool(config.get("use_rslora"))
    alphas = {path: _tidy(scales[path] * _divisor(rank, use_rslora)) for path, rank in ranks.items()}
    largest = max(ranks, key=lambda path: ranks[path])
    tensors = {
        "r": ranks[largest],
        "lora_alpha": alphas[largest],
        "rank_pattern": {pattern(p): rank for p, rank in ranks.items() if rank != ranks[largest]},
        "alpha_pattern": {pattern(p): alpha for p, alpha in alphas.items() if alpha != alphas[largest]},
        "target_modules": target_regex(ranks),
        "fan_in_fan_out": fan_in_fan_out,
    }
    whole = dict(config) | RESET | tensors
    whole.pop("peft_version", None)
    return dict(sorted(whole.items()))


def _tidy(alpha: float) -> int | float:
    """An integer where rounding alone made it a fraction."""
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


CONFIG_NAME = "adapter_config.json"
FOLDERS = ("", "final_model", "lora_adapter")
CHECKPOINT = "checkpoint-"
# PEFT: <path>.lora_A.weight, <path>.lora_embedding_A; loralib: <path>.lora_A
PAIR_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<half>[AB])(\.weight)?")
# PEFT's untrained and trained copy of a whole module; with bias="all" and resized embeddings it saves both.
ORIGINAL, COPY = ".original_module.", ".modules_to_save."
# Tensors of other methods, which belong to a pair but are not halves of it.
FOREIGN = {
    "lora_magnitude_vector": "DoRA",
    "lora_E": "AdaLoRA",
    "ranknum": "AdaLoRA",
    "lora_B.bias": "LoRA with a bias on B",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lora_down": "the kohya format (convert it to PEFT's first)",
}


@dataclass(frozen=True)
class LoraPair:
    """One adapted matrix: the delta is scale·B·A, (m, n), with A (r, n) and B (m, r) in the stored dtype. Of a layer's
    experts: A (E, r, n) and B (E, m, r), the delta of each is the product of its own two (`core.experts`: as files hold
    them).

    `fan_in_fan_out`: the base stores the weight as (n, m), as Conv1D and embeddings do. `embedding`: the pair
    adapts an embedding table, which has key names of its own. `peft`, `swapped`: as a site's.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    fan_in_fan_out: bool = False
    embedding: bool = False
    peft: str = "pattern"
    swapped: bool = False

    @classmethod
    def of(cls, factors: Factors, scale: float = 2.0, fan_in_fan_out: bool = False) -> Self:
        """The pair whose scale·B·A is the factors' product."""
        return cls(*factors.lora(scale), scale, fan_in_fan_out)

    @property
    def rank(self) -> int:
        """Rank of the matrix, or of each expert's."""
        return self.lora_A.shape[-2]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n): (out_features, in_features) of the adapted layer, or of each expert."""
        return self.lora_B.shape[-2], self.lora_A.shape[-1]

    @property
    def experts(self) -> int:
        """Their number; 0 for one matrix."""
        return self.lora_A.shape[0] if self.lora_A.dim() == 3 else 0

    def expert(self, index: int) -> LoraPair:
        """The pair of one expert's matrix."""
        return replace(self, lora_A=self.lora_A[index], lora_B=self.lora_B[index])

    def factors(self) -> Factors:
        """The delta of one matrix as float32 factors, the scale within the left one; of experts see `expert`."""
        if self.experts:
            raise ValueError(f"a pair of {self.experts} experts has no one product")
        return Factors(self.lora_B.float() * self.scale, self.lora_A.float())


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter's config, its pairs by module path, and the tensors that it carries besides (module path.name)."""

    config: Mapping[str, Any]
    pairs: Mapping[str, LoraPair]
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def base_model(self) -> str | None:
        """The base as the config names it; may be a path on its author's machine."""
        return self.config.get("base_model_name_or_path")


def read_adapter(path: Path | str, scale: float | None = None) -> LoraAdapter:
    """Read a plain LoRA adapter: PEFT's folder or file, a run folder that holds one, or a loralib state dict.

    `scale` (alpha / r) is for files without an adapter_config.json, and needed there: the tensors do not tell.
    DataError, naming file and tensor, for other methods, for NaN and infinity, and for halves that do not fit.
    """
    weights, config_file = adapter_files(Path(path))
    config = read_object(config_file) if config_file else {}
    if config_file:
        require_plain(config, config_file)
    _check_scale(weights, config_file, scale)
    halves, extra = _sort_out(adapter_tensors(weights), weights)
    if not config_file and any(".base_layer." in name for name in extra):
        raise DataError(f"{weights}: the state dict of a whole PEFT model: put its {CONFIG_NAME} next to it")
    pairs = {}
    for (site, embedding), found in halves.items():
        lora_A, lora_B = _matching(site, found, weights)
        if config_file:
            _check_rank(config, site, lora_A.shape[0], config_file)
        factor = scale_of(config, site, config_file) if config_file else float(scale or 0)
        pairs[site] = LoraPair(lora_A, lora_B, factor, embedding or bool(config.get("fan_in_fan_out")), embedding)
    return LoraAdapter(config, pairs, extra)


def is_adapter(path: Path) -> bool:
    """Whether an adapter folder, or a run folder with one in it, stands here."""
    return any((path / name / CONFIG_NAME).is_file() for name in FOLDERS)


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """(weight file, config or None) of an adapter folder, a run folder or a weight file."""
    if path.is_file():
        config = path.parent / CONFIG_NAME
        return path, config if config.is_file() else None
    if not path.is_dir():
        raise DataError(f"{path}: no such adapter file or folder")
    for folder in (path / name for name in FOLDERS):
        for name in ADAPTER_NAMES:
            if (folder / name).is_file():
                return adapter_files(folder / name)
        if (folder / CONFIG_NAME).is_file():
            raise DataError(f"{folder}: has {CONFIG_NAME} but neither of {', '.join(ADAPTER_NAMES)}")
    alone = [file for file in sorted(path.iterdir()) if file.suffix in (SAFETENSORS, *SUFFIXES)]
    if len(alone) == 1:
        return alone[0], None
    raise DataError(f"{path}: no adapter here, nor in {' or '.join(FOLDERS[1:])} below it ({ADAPTER_NAMES[0]})")


def base_and_adapter(path: str, base_model: str | None) -> tuple[str, Path | None]:
    """(base model, adapter folder or None). Whatever takes an adapter accepts the run folder."""
    folder = resolve(path)
    if not is_adapter(folder):
        return path, None
    base = base_model or read_adapter(folder).base_model
    if not base:
        raise DataError(
            f"{folder}: the adapter doesn't say what its base model is; give it with --base_model_id (validate: "
            "--base_model)"
        )
    return base, adapter_files(folder)[0].parent


def beside(folder: Path | str, name: str) -> Path | None:
    """The file of this name in an artefact's folder (of a checkpoint also: in its run folder); None without one."""
    folder = Path(folder)
    places = [folder, folder.resolve().parent] if folder.resolve().name.startswith(CHECKPOINT) else [folder]
    return next((place / name for place in places if (place / name).is_file()), None)


INPUT, DEVICE, TASK = CONTRACTS = ("input.json", "device.json", "task.json")  # of data/: they travel with a model


def contracts(folder: Path) -> dict[str, Path]:
    """File name → file, of those that an artefact (of a checkpoint also: its run) has."""
    found = {name: beside(folder, name) for name in CONTRACTS}
    return {name: file for name, file in found.items() if file is not None}


def carry(source: Path, folder: Path) -> dict[str, Path]:
    """Copy them into another artefact's folder; name → the copy."""
    return {name: Path(shutil.copyfile(file, folder / name)) for name, file in contracts(source).items()}


def _check_scale(weights: Path, config_file: Path | None, scale: float | None) -> None:
    if config_file and scale is not None:
        raise UsageError(f"{config_file} gives the scale: leave the explicit scale ({scale:g}) out")
    if not config_file and scale is None:
        raise DataError(
            f"{weights}: scale unknown (there is no {CONFIG_NAME} next to it): give the scale explicitly "
            "(lora_alpha / r of the training, 1 for B·A as it is)"
        )


def adapter_tensors(weights: Path) -> dict[str, Tensor]:
    """Every tensor of an adapter's file by PEFT's name for it, without wrappers and prefix (`core.site`); of modules
    trained in full the trained copy. DataError for NaN and infinity, and for a file that cannot be read."""
    checkpoint = open_checkpoint(weights)
    tensors = {name.replace(COPY, "."): checkpoint.tensor(name) for name in checkpoint if ORIGINAL not in name}
    tensors |= {name.replace(COPY, "."): checkpoint.tensor(name) for name in checkpoint if COPY in name}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{weights}: tensor {name} has NaN or infinite values: the run it comes from diverged")
    return tensors


Halves = dict[tuple[str, bool], dict[str, Tensor]]


def _sort_out(tensors: Mapping[str, Tensor], weights: Path) -> tuple[Halves, dict[str, Tensor]]:
    """{(path, is embedding): {"A": …, "B": …}} and the rest; tensors of other methods are refused."""
    halves: Halves = {}
    extra = {}
    for key, tensor in tensors.items():
        for part, method in FOREIGN.items():
            if f".{part}" in key:
                raise DataError(f"{weights}: {key} belongs to {method}; only plain LoRA adapters can be read")
        match = PAIR_KEY.fullmatch(key)
        if match is None:
            extra[key] = tensor
            continue
        pair = halves.setdefault((match["path"], bool(match["embedding"])), {})
        pair[match["half"]] = tensor
    if not halves:
        raise DataError(f"{weights}: no lora_A and lora_B tensors ({len(extra)} other tensors)")
    return halves, extra


def _matching(site: str, found: Mapping[str, Tensor], weights: Path) -> tuple[Tensor, Tensor]:
    """A and B of one site, checked against each other."""
    if len(found) < 2:
        present = next(iter(found))
        absent = "A" if present == "B" else "B"
        raise DataError(f"{weights}: {site} has lora_{present} but no lora_{absent}")
    lora_A, lora_B = found["A"], found["B"]
    shapes = f"lora_A {tuple(lora_A.shape)}, lora_B {tuple(lora_B.shape)}"
    if is_merged_linear(lora_A, lora_B):
        raise DataError(
            f"{weights}: {site}: {shapes}: loralib's MergedLinear (parts of a fused q, k, v adapted, each with factors "
            "of its own), which is not one low-rank product; merge it with the program that trained it"
        )
    if lora_A.dim() != 2 or lora_B.dim() != 2:
        raise DataError(f"{weights}: {site}: {shapes}: not matrices (convolutions and experts are not supported)")
    if lora_A.shape[0] != lora_B.shape[1]:
        raise DataError(f"{weights}: {site}: {shapes}: the ranks differ")
    if lora_A.shape[0] == 0:
        raise DataError(f"{weights}: {site}: {shapes}: empty (saved from a sharded model without gathering it?)")
    return lora_A, lora_B


def is_merged_linear(lora_A: Tensor, lora_B: Tensor) -> bool:
    """A (k·r, n) with B (m, r) or (m, r, 1): a grouped convolution over k blocks of rank r."""
    grouped = lora_B.dim() == 2 or (lora_B.dim() == 3 and lora_B.shape[2] == 1)
    if lora_A.dim() != 2 or not grouped or not lora_B.shape[1]:
        return False
    return lora_A.shape[0] > lora_B.shape[1] and lora_A.shape[0] % lora_B.shape[1] == 0


def _check_rank(config: Mapping[str, Any], site: str, rank: int, config_file: Path) -> None:
    expected = rank_of(config, site, config_file)
    if expected != rank:
        raise DataError(f"{config_file}: gives {site} the rank {expected}, but its tensors have rank {rank}")


def write_adapter(folder: Path | str, adapter: LoraAdapter) -> Path:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does; both or neither. Returns the folder.

    The config keeps what the tensors do not determine; rank, alpha, patterns and targets are written anew.
    """
    folder = Path(folder)
    for path, pair in adapter.pairs.items():
        if pair.rank == 0:
            raise DataError(f"{path}: rank 0 cannot be written as an adapter; leave the site out")
    if not adapter.pairs:
        raise DataError(f"{folder}: no sites to write; an adapter needs at least one")
    config = complete_config(
        adapter.config,
        {path: pair.rank for path, pair in adapter.pairs.items()},
        {path: pair.scale for path, pair in adapter.pairs.items()},
        any(pair.fan_in_fan_out and not pair.embedding for pair in adapter.pairs.values()),
    )
    with atomic_files(folder / ADAPTER_NAMES[0], folder / CONFIG_NAME) as (weights_file, config_file):
        save_file(peft_tensors(adapter), weights_file, metadata={"format": "pt"})
        write_json(config_file, config)
    return folder


def peft_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """The state dict under PEFT's key names; every tensor on the CPU with a storage of its own.

    What an adapted layer holds of the base (a bias, resized embeddings) is named so for adapted layers only.
    """
    tensors = {}
    for name, tensor in adapter.extra.items():
        path, _, leaf = name.partition(".base_layer.")
        held = not leaf or path in adapter.pairs or path.endswith(".token_adapter")
        tensors[name if held else f"{path}.{leaf}"] = tensor
    for path, pair in adapter.pairs.items():
        for half, tensor in (("A", pair.lora_A), ("B", pair.lora_B)):
            tensors[f"{path}.lora_embedding_{half}" if pair.embedding else f"{path}.lora_{half}.weight"] = tensor
    return {PEFT_PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
