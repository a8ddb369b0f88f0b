"""A LoRA adapter as GGUF, for llama.cpp to put on the base model's GGUF at run time (`--lora`).

    scale·B·A, one scale per site ── B' = B · scale · r / R ──▶ R/r · B'·A, with llama.cpp's one alpha = R

llama.cpp multiplies B·A by alpha / r with one alpha for all sites (R, the largest rank), so the rest of every site's
own scale goes into its B. That is exact up to float32's rounding, and rank-pattern and rsLoRA adapters come out right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.core.experts import single_experts
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.adapter import (
    CONFIG_NAME,
    LoraAdapter,
    LoraPair,
    adapter_files,
    peft_tensors,
    read_adapter,
)
from rankwise.files.adapter_config import lora_config
from rankwise.files.atomic import named, read_object, write_json
from rankwise.files.checkpoint import ADAPTER_NAMES, open_checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.converter import Converter
from rankwise.gguf.metadata import Vocabulary, config_of
from rankwise.gguf.provenance import as_converted, divisors, relation, rotary_heads
from rankwise.gguf.reading import SUFFIXES, first_few, forms, name_table
from rankwise.gguf.view import changes_for
from rankwise.gguf.view import model_view as shown_to_converter
from rankwise.models.load import meta_model
from rankwise.models.sites import tower_of, tower_prefixes
from rankwise.page.text import plural

ROUNDING = 1e-6  # relative: of one product in float32
CLOSE, SAME_SCALE = 2e-2, 1e-2  # relative: of a file whose factors another converter rounded, to Q8_0 at worst
SHOWN = 3  # sites with their scales in a message
HALVES = (".lora_a", ".lora_b")
"""How llama.cpp's converter ends the names of A and B."""


def read_plain(adapter: Path) -> LoraAdapter:
    """DataError, by name, for what is not plain LoRA, and for tensors that llama.cpp's LoRA has no place for."""
    found = read_adapter(adapter)
    if found.extra:
        raise DataError(
            f"{adapter}: contains {first_few(sorted(found.extra))} in full; a LoRA for llama.cpp holds only low-rank "
            "factors. Merge it and export the merged model"
        )
    return found


def refuse_experts(adapter: Path) -> None:
    """UsageError for an adapter of a mixture's experts: llama.cpp's converter takes one matrix a pair."""
    file = adapter_files(adapter)[1]
    targets = (read_object(file).get("target_parameters") or []) if file else []
    stacked = [name for name in targets if not str(name).endswith(".weight")]
    if not stacked and targets:
        stacked = [path for path, pair in read_adapter(adapter).pairs.items() if pair.experts]
    single = [] if stacked else single_experts(open_checkpoint(adapter_files(adapter)[0]))
    what, stacked = ("module", single) if single else ("parameter", stacked)
    if stacked:
        raise UsageError(
            f"{adapter}: it adapts the experts of {plural(len(stacked), what)} ({first_few(sorted(stacked))}), "
            f"which llama.cpp's converter of LoRAs cannot write; merge it (rankwise merge {adapter} -o merged_model) "
            "and export the merged model"
        )


def require_text_sites(adapter: LoraAdapter, base: Path, where: Path) -> None:
    """UsageError, naming them, for sites outside the language tower of `base`: llama.cpp's LoRA acts on that alone."""
    if config_of(base) is None:
        return
    towers = tower_prefixes(meta_model(str(base)))
    outside = sorted(site for site in adapter.pairs if tower_of(site, towers) != "language")
    if outside:
        raise UsageError(
            f"{where}: {len(outside)} of its {len(adapter.pairs)} sites lie outside the text model "
            f"({first_few(outside)}), and a LoRA of llama.cpp acts on the text model only; merge it (rankwise merge "
            f"{where} -o merged_model) and export the merged model"
        )


def write_adapter_gguf(adapter: Path, base: Path, outfile: Path, converter: Converter) -> Path:
    """Convert, then compare what was written with the adapter, factor by factor.

    Of `base`, a model folder, config and tokenizer are read. DataError for an adapter that is not plain LoRA;
    VerificationError where the converter fails, or leaves sites out.
    """
    plain = read_plain(adapter)
    vocabulary = Vocabulary.of(base)
    changes = changes_for(base, converter, vocabulary, target=None, mmproj=False)
    with TemporaryDirectory() as folder, shown_to_converter(base, changes, base.resolve().name) as view:
        place = Path(folder) / adapter.resolve().name
        place.mkdir()
        with named(adapter, place):
            converter.convert_adapter(write_folded(fold_scales(plain), place), view, outfile)
    try:
        check_adapter(GGUFFile(outfile), plain, config_of(base))
    except VerificationError:
        outfile.unlink()
        raise
    return outfile


def fold_scales(adapter: LoraAdapter) -> LoraAdapter:
    """Every site with B' = B · scale · r / R in float32 and the scale R / r, which one alpha = R gives."""
    largest = largest_rank(adapter)
    return replace(adapter, pairs={site: folded(pair, largest) for site, pair in adapter.pairs.items()})


def folded(pair: LoraPair, largest: int) -> LoraPair:
    factor = pair.scale * pair.rank / largest
    return replace(pair, lora_A=pair.lora_A.float(), lora_B=pair.lora_B.float() * factor, scale=largest / pair.rank)


def largest_rank(adapter: LoraAdapter) -> int:
    return max(pair.rank for pair in adapter.pairs.values())


def write_folded(adapter: LoraAdapter, folder: Path) -> Path:
    """As the converter reads it: the tensors under PEFT's names, and the one alpha."""
    largest = largest_rank(adapter)
    save_file(peft_tensors(adapter), folder / ADAPTER_NAMES[0], metadata={"format": "pt"})
    write_json(folder / CONFIG_NAME, lora_config(adapter.base_model) | {"r": largest, "lora_alpha": largest})
    return folder


def check_adapter(file: GGUFFile, adapter: LoraAdapter, config: Any) -> None:
    """VerificationError where a site is missing or its factors are not the adapter's, B times what llama.cpp multiplies
    it by (up to the order of its rows).

    config: the base's, which says how many layers and heads there are; None where transformers has no class for it.
    """
    names = sites_in(file)
    largest = largest_rank(adapter)
    if file.metadata.get("adapter.lora.alpha") != largest:
        raise VerificationError(f"{file.path}: alpha is {file.metadata.get('adapter.lora.alpha')}, not {largest}")
    if len(names) != len(adapter.pairs):
        raise VerificationError(
            f"{file.path.name}: {len(names)} of the adapter's {len(adapter.pairs)} sites were written by llama.cpp's "
            "converter; merge the adapter and export the merged model"
        )
    text = config and config.get_text_config()
    folded = fold_scales(adapter)
    own = {site_name(file, site, text): pair for site, pair in folded.pairs.items()}
    every = list(folded.pairs.values())
    strange = [
        name
        for name in names
        if not any(is_site(file, name, pair, text) for pair in ([own[name]] if name in own else every))
    ]
    strange += [site for site, pair in adapter.pairs.items() if not same_product(pair, folded.pairs[site], largest)]
    if strange:
        raise VerificationError(f"{file.path}: {first_few(strange)}: not the adapter's factors")


def sites_in(file: GGUFFile) -> list[str]:
    """llama.cpp's names of the sites that a LoRA's file holds."""
    return sorted({name.removesuffix(HALVES[0]) for name in file.tensors if name.endswith(HALVES[0])})


def same_product(pair: LoraPair, written: LoraPair, alpha: int) -> bool:
    """Whether llama.cpp's alpha / r times what is written is the adapter's own scale times its B."""
    here, there = written.lora_B.double() * alpha / written.rank, pair.lora_B.double() * pair.scale
    return torch.allclose(here, there, rtol=ROUNDING, atol=0)


def site_name(file: GGUFFile, site: str, text: Any) -> str | None:
    """What llama.cpp calls a site; None where its table of names does not have it."""
    table = name_table(file, getattr(text, "num_hidden_layers", None))
    return next((name for form in forms(f"{site}.weight") if table and (name := table.get_name(form, SUFFIXES))), None)


def is_site(file: GGUFFile, name: str, pair: LoraPair, text: Any) -> bool:
    lora_a, lora_b = (file.tensor(name + half) for half in HALVES)
    if lora_b.shape != pair.lora_B.shape or lora_a.numel() != pair.lora_A.numel():
        return False
    same_a = torch.equal(lora_a.reshape(-1), pair.lora_A.reshape(-1)) or torch.equal(lora_a, pair.lora_A.T)
    counts = [getattr(text, key, None) for key in ("num_attention_heads", "num_key_value_heads")]
    heads = rotary_heads(file.architecture, name, *counts)
    # Without a config the head counts are not known: the rope order of any will do.
    how = relation(lora_b, pair.lora_B, [heads] if heads else divisors(len(lora_b)))
    return same_a and how is not None and as_converted(file.architecture, lora_b, pair.lora_B, how[0], heads)


@dataclass(frozen=True)
class HeldFactors:
    """What a LoRA's file holds of an adapter, whichever converter wrote it.

    sites: of the adapter. missing: those that the file lacks. other: those with other factors. scales: site → what the
    file multiplies the adapter's own product by, where its factors are right and that is not 1. extra: names in the
    file that are no site of the adapter.
    """

    sites: int
    missing: tuple[str, ...]
    other: tuple[str, ...]
    scales: Mapping[str, float]
    extra: tuple[str, ...]

    @property
    def why(self) -> str:
        """What is wrong, in words; "" where nothing is."""
        off = ", ".join(f"{site} ×{scale:.3g}" for site, scale in list(self.scales.items())[:SHOWN])
        parts = (
            (self.missing, f"it lacks {len(self.missing)} of {plural(self.sites, 'site')} ({first_few(self.missing)})"),
            (self.other, f"other factors than the adapter's at {len(self.other)} ({first_few(self.other)})"),
            (self.scales, f"another scale than the adapter's at {len(self.scales)} ({off})"),
            (self.extra, f"{plural(len(self.extra), 'site')} that the adapter does not have ({first_few(self.extra)})"),
        )
        return "; ".join(words for wrong, words in parts if wrong)


def held_factors(file: GGUFFile, adapter: LoraAdapter, config: Any) -> HeldFactors:
    """Compare a LoRA's file with the adapter that it should be, up to the order of B's rows and to rounding.

    config: as for `check_adapter`.
    """
    names, text = sites_in(file), config and config.get_text_config()
    own = {site: site_name(file, site, text) for site in adapter.pairs}
    free = set(names) - set(own.values())
    places = {
        site: own[site] if own[site] in names else next((one for one in free if times(file, one, pair)), None)
        for site, pair in adapter.pairs.items()
    }
    found = {site: times(file, name, adapter.pairs[site]) for site, name in places.items() if name}
    return HeldFactors(
        sites=len(adapter.pairs),
        missing=tuple(site for site, name in places.items() if not name),
        other=tuple(site for site, scale in found.items() if scale is None),
        scales={site: scale for site, scale in found.items() if scale is not None and abs(scale - 1) > SAME_SCALE},
        extra=tuple(sorted(free - set(places.values()))),
    )


def times(file: GGUFFile, name: str, pair: LoraPair) -> float | None:
    """What llama.cpp's product of a site is a multiple of a pair's by; None where it is no multiple."""
    lora_a, lora_b = (file.tensor(name + half).double() for half in HALVES)
    if lora_b.shape != pair.lora_B.shape or lora_a.numel() != pair.lora_A.numel():
        return None
    wanted_a, wanted_b = pair.lora_A.double(), pair.lora_B.double()
    turned = lora_a if lora_a.shape == wanted_a.shape else lora_a.T
    rows, wanted_rows = (factor.norm(dim=1).sort().values for factor in (lora_b, wanted_b))
    pairs = ((turned, wanted_a), (rows, wanted_rows))
    if not any(float(one.norm() * other.norm()) for one, other in (pairs[1], pairs[1][::-1])):
        return 1.0  # B is zero on both sides
    if any(float((one / one.norm() - other / other.norm()).norm()) > CLOSE for one, other in pairs):
        return None
    alpha = float(file.metadata.get("adapter.lora.alpha") or pair.rank)
    size = alpha / pair.rank * turned.norm() * rows.norm()
    return float(size / (pair.scale * wanted_a.norm() * wanted_rows.norm()))
