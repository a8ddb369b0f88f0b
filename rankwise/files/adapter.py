"""LoRA adapters in PEFT's format: read strictly, written atomically. PEFT itself is not needed.

adapter = read_adapter("runs/train")                 # a run folder, an adapter folder or a weight file
smaller = {path: LoraPair.of(pair.factors().compress(8), pair.scale) for path, pair in adapter.pairs.items()}
write_adapter("runs/compressed", replace(adapter, pairs=smaller))
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.core.experts import ExpertPlace, expert_places, join_experts, nested_keys, split_experts, targeted
from rankwise.core.factors import Factors
from rankwise.core.site import PEFT_PREFIX, Site
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter_config import (
    EXPERTS,
    AdaptedSite,
    complete_config,
    config_name,
    peft_name,
    place_rows,
    rank_of,
    recorded_places,
    require_plain,
    scale_of,
)
from rankwise.files.atomic import atomic_files, read_object, write_json
from rankwise.files.checkpoint import ADAPTER_NAMES, SAFETENSORS, open_checkpoint, resolve
from rankwise.files.gguf import is_gguf
from rankwise.files.pickled import SUFFIXES

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

    `fan_in_fan_out`: the base stores the weight as (n, m), as Conv1D and embeddings do; of experts no file tells, and
    whoever knows the model says so. `embedding`: the pair adapts an embedding table, which has key names of its own.
    `peft`, `swapped`, `order`: as a site's.
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    fan_in_fan_out: bool = False
    embedding: bool = False
    peft: str = "pattern"
    swapped: bool = False
    order: int = 0

    @classmethod
    def of(cls, factors: Factors, scale: float = 2.0, fan_in_fan_out: bool = False, peft: str = "pattern") -> Self:
        """The pair whose scale·B·A is the factors' product."""
        return cls(*factors.lora(scale), scale, fan_in_fan_out, peft=peft)

    @classmethod
    def of_experts(cls, pairs: Sequence[LoraPair], site: Site) -> Self:
        """The pair of a site's experts, by the pair of each, which are of one rank and scale."""
        a, b = torch.stack([one.lora_A for one in pairs]), torch.stack([one.lora_B for one in pairs])
        return cls(a, b, pairs[0].scale, site.transposed, False, site.peft, site.swapped, site.order)

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

    def matrices(self) -> Iterator[LoraPair]:
        """The pair of each expert, or this one of one matrix."""
        yield from (self.expert(index) for index in range(self.experts)) if self.experts else (self,)

    def expert(self, index: int) -> LoraPair:
        """The pair of one expert's matrix."""
        return replace(self, lora_A=self.lora_A[index], lora_B=self.lora_B[index])

    def factors(self) -> Factors:
        """The delta of one matrix as float32 factors, the scale within the left one; of experts see `expert`."""
        if self.experts:
            raise ValueError(f"a pair of {self.experts} experts has no one product")
        return Factors(self.lora_B.float() * self.scale, self.lora_A.float())

    def change(self) -> Tensor:
        """scale·B·A of one matrix, float32, as the base stores that: (n, m) with `fan_in_fan_out`, else (m, n)."""
        product = self.factors().product()
        return product.T if self.fan_in_fan_out else product


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


def read_adapter(
    path: Path | str, scale: float | None = None, places: Mapping[str, ExpertPlace] | None = None
) -> LoraAdapter:
    """Read a plain LoRA adapter: PEFT's folder or file, a run folder that holds one, or a loralib state dict.

    `scale` (alpha / r) is for files without an adapter_config.json, and needed there: the tensors do not tell.
    `places`: key in the file → what a pair of experts adapts, for adapters without an experts.json (of other programs;
    `models.adapters.known_places` finds them). DataError, naming file and tensor, for other methods, for NaN and
    infinity, for halves that do not fit, and for pairs of experts of which neither tells the parameter.
    """
    weights, config_file = adapter_files(Path(path))
    places = recorded_places(weights.parent) if places is None else places
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
        place = places.get(site)
        name = place.parameter if place else site
        if config_file and not place:
            _refuse_unplaced(config, site, lora_A.shape[0], config_file)
        if place:
            lora_A, lora_B = split_experts(lora_A, lora_B, place.experts, place.swapped)
        if config_file:
            _check_rank(config, name, lora_A.shape[-2], config_file)
        factor = scale_of(config, name, config_file) if config_file else float(scale or 0)
        transposed = not place and (embedding or bool(config.get("fan_in_fan_out")))
        told = ("parameter", place.swapped, place.order) if place else (peft_name(config, site), False, 0)
        pairs[name] = LoraPair(lora_A, lora_B, factor, transposed, embedding, *told)
    return LoraAdapter(config, pairs, extra)


def known_places(sites: Mapping[str, Site], path: Path | str) -> dict[str, ExpertPlace] | None:
    """Key in an adapter's file → what the pair adapts, by the model's sites and the adapter's target_parameters. None
    where the adapter adapts no experts. DataError where its folder's record says otherwise."""
    weights, config_file = adapter_files(Path(path))
    if config_file is None:
        return None
    experts = {name: site for name, site in sites.items() if site.experts}
    named = targeted(experts, read_object(config_file).get("target_parameters") or ())
    found = expert_places({name: experts[name] for name in named})
    recorded = recorded_places(weights.parent)
    if recorded and recorded != found:
        wrong = min(key for key in {**found, **recorded} if found.get(key) != recorded.get(key))
        raise DataError(
            f"{weights.parent / EXPERTS.name}: {wrong} is {recorded.get(wrong)}, in the model "
            f"{found.get(wrong)}: another base, or a changed file"
        )
    return found or None


def _refuse_unplaced(config: Mapping[str, Any], site: str, rows: int, config_file: Path) -> None:
    """DataError for the pair of a parameter of experts: keys in the file do not tell which."""
    if not config.get("target_parameters") or peft_name(config, site) == "parameter":
        return
    if ".base_layer" in site or rows != rank_of(config, site, config_file):
        raise DataError(
            f"{config_file}: LoRA on parameters of experts (target_parameters), and there is no {EXPERTS.name} to tell "
            f"which one {site}.lora_A adapts; name the base model"
        )


def is_adapter(path: Path) -> bool:
    """Whether an adapter folder, or a run folder with one in it, stands here."""
    return any((path / name / CONFIG_NAME).is_file() for name in FOLDERS)


def adapter_files(path: Path) -> tuple[Path, Path | None]:
    """(weight file, config or None) of an adapter folder, a run folder or a weight file."""
    if is_gguf(path):
        raise DataError(f"{path}: a GGUF file; adapters are read as PEFT saves them: give the folder it was made of")
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


def recorded_base(path: Path) -> str | None:
    """The base model that an adapter's config names; None where there is no config, or it names none."""
    config_file = adapter_files(path)[1]
    return (read_object(config_file).get("base_model_name_or_path") or None) if config_file else None


def base_and_adapter(path: str, base_model: str | None) -> tuple[str, Path | None]:
    """(base model, adapter folder or None). Whatever takes an adapter accepts the run folder."""
    folder = resolve(path)
    if not is_adapter(folder):
        return path, None
    base = base_model or recorded_base(folder)
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
        raise DataError(f"{weights}: {site}: {shapes}: not matrices (convolutions are not supported)")
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
    places = expert_places({path: pair for path, pair in adapter.pairs.items() if pair.experts})
    config = complete_config(
        adapter.config,
        [
            AdaptedSite(pair.rank, pair.scale, config_name(path, pair.peft, pair.experts), pair.peft)
            for path, pair in adapter.pairs.items()
        ],
        any(pair.fan_in_fan_out and not pair.embedding and not pair.experts for pair in adapter.pairs.values()),
    )
    names = (ADAPTER_NAMES[0], CONFIG_NAME, *([EXPERTS.name] if places else []))
    with atomic_files(*(folder / name for name in names)) as (weights_file, config_file, *record):
        save_file(peft_tensors(adapter), weights_file, metadata={"format": "pt"})
        write_json(config_file, config)
        for file in record:
            file.write_text(EXPERTS.text(place_rows(places)), encoding="utf-8")
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
    keys = nested_keys({path: pair for path, pair in adapter.pairs.items() if pair.experts})
    for path, pair in adapter.pairs.items():
        flat = join_experts(pair.lora_A, pair.lora_B, pair.swapped) if pair.experts else (pair.lora_A, pair.lora_B)
        for half, tensor in zip("AB", flat, strict=True):
            path = keys.get(path, path)
            tensors[f"{path}.lora_embedding_{half}" if pair.embedding else f"{path}.lora_{half}.weight"] = tensor
    return {PEFT_PREFIX + key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
