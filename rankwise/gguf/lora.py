"""A LoRA adapter as GGUF, for llama.cpp to put on the base model's GGUF at run time (`--lora`).

    scale·B·A, one scale per site ── B' = B · scale · r / R ──▶ R/r · B'·A, with llama.cpp's one alpha = R

llama.cpp multiplies B·A by alpha / r with one alpha for all sites (R, the largest rank), so the rest of every site's
own scale goes into its B. That is exact up to float32's rounding, and rank-pattern and rsLoRA adapters come out right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file

from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.adapter import CONFIG_NAME, LoraAdapter, LoraPair, lora_config, peft_tensors, read_adapter
from rankwise.files.atomic import named, write_json
from rankwise.files.checkpoint import ADAPTER_NAMES
from rankwise.gguf.converter import Converter
from rankwise.gguf.metadata import Vocabulary, config_of
from rankwise.gguf.provenance import as_converted, divisors, first_few, relation, rotary_heads
from rankwise.gguf.reading import SUFFIXES, GGUFFile, forms, name_table
from rankwise.gguf.view import changes_for
from rankwise.gguf.view import model_view as shown_to_converter
from rankwise.models.load import meta_model
from rankwise.models.sites import tower_of, tower_prefixes

ROUNDING = 1e-6  # relative: of one product in float32
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
    names = sorted({name.removesuffix(HALVES[0]) for name in file.tensors if name.endswith(HALVES[0])})
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
