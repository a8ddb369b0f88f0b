"""A LoRA adapter as GGUF, for llama.cpp to put on the base model's GGUF at run time (`--lora`).

    scale·B·A, one scale per site ── B' = B · scale · r / R ──▶ R/r · B'·A, with llama.cpp's one alpha = R

llama.cpp multiplies B·A by alpha / r with one alpha for all sites (R, the largest rank), so the rest of every site's
own scale goes into its B. That is exact up to float32's rounding, and rank-pattern and rsLoRA adapters come out right.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from rankwise.errors import DataError, VerificationError
from rankwise.ship.gguf.converter import Converter
from rankwise.ship.gguf.origin import shown
from rankwise.ship.gguf.reading import GGUFFile
from rankwise.ship.gguf.relation import divisors, relation
from rankwise.ship.gguf.view import changes_for
from rankwise.ship.gguf.view import shown as shown_to_converter
from rankwise.ship.gguf.vocabulary import Vocabulary
from rankwise.store.adapter import CONFIG_NAME, LoraAdapter, LoraPair, peft_tensors, read_adapter
from rankwise.store.adapter_config import lora_config
from rankwise.store.checkpoint import ADAPTER_NAMES
from rankwise.store.files import write_json

HALVES = (".lora_a", ".lora_b")
"""How llama.cpp's converter ends the names of A and B."""


def read_plain(adapter: Path) -> LoraAdapter:
    """DataError, by name, for what is not plain LoRA, and for tensors that llama.cpp's LoRA has no place for."""
    found = read_adapter(adapter)
    if found.extra:
        raise DataError(
            f"{adapter}: carries {shown(sorted(found.extra))} whole; a LoRA for llama.cpp holds only low-rank factors. "
            "Merge it and export the merged model"
        )
    return found


def write_adapter_gguf(adapter: Path, base: Path, outfile: Path, converter: Converter, outtype: str = "f32") -> Path:
    """Convert, then compare what was written with the adapter, factor by factor.

    Of `base`, a model folder, config and tokenizer are read. DataError for an adapter that is not plain LoRA;
    VerificationError where the converter fails, or leaves sites out (those of a vision tower: llama.cpp's LoRA acts on
    the text model).
    """
    folded = fold_scales(read_plain(adapter))
    vocabulary = Vocabulary.of(base)
    changes = changes_for(base, converter, vocabulary, target=None, mmproj=False)
    with TemporaryDirectory() as folder, shown_to_converter(base, changes) as view:
        converter.convert_adapter(write_folded(folded, Path(folder)), view, outfile, outtype)
    try:
        check_adapter(GGUFFile(outfile), folded, exact=outtype == "f32")
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


def check_adapter(file: GGUFFile, adapter: LoraAdapter, exact: bool) -> None:
    """VerificationError where a site is missing or its factors are not the adapter's (up to the order of B's rows)."""
    names = sorted({name.removesuffix(HALVES[0]) for name in file.tensors if name.endswith(HALVES[0])})
    largest = largest_rank(adapter)
    if file.metadata.get("adapter.lora.alpha") != largest:
        raise VerificationError(f"{file.path}: alpha is {file.metadata.get('adapter.lora.alpha')}, not {largest}")
    if len(names) != len(adapter.pairs):
        raise VerificationError(
            f"{file.path}: {len(names)} of the adapter's {len(adapter.pairs)} sites were written; llama.cpp's LoRA "
            "acts on the text model only. Merge the adapter and export the merged model"
        )
    if exact:
        wanted = list(adapter.pairs.values())
        strange = [name for name in names if not any(is_site(file, name, pair) for pair in wanted)]
        if strange:
            raise VerificationError(f"{file.path}: {shown(strange)}: not the adapter's factors")


def is_site(file: GGUFFile, name: str, pair: LoraPair) -> bool:
    lora_a, lora_b = (file.tensor(name + half) for half in HALVES)
    if lora_b.shape != pair.lora_B.shape or lora_a.numel() != pair.lora_A.numel():
        return False
    same_a = torch.equal(lora_a.reshape(-1), pair.lora_A.reshape(-1)) or torch.equal(lora_a, pair.lora_A.T)
    # An adapter's file does not state head counts: the rope order of any will do.
    return same_a and relation(lora_b, pair.lora_B, divisors(len(lora_b))) is not None
