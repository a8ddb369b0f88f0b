"""An importance matrix: the mean square of every input of every weight, over calibration text.

    imatrix.gguf (llama-imatrix, or `write`) ── read ──▶ Imatrix ── require_fit(m-f16.gguf) ── quantize(…, imatrix)

llama-quantize weighs rounding errors with it. A tensor that the matrix lacks it quantizes without, and says so only
in its log; so a matrix is compared with the file before.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rankwise.errors import DataError, VerificationError, need
from rankwise.files.atomic import atomic_write, sha256
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.reading import first_few

TYPE = "imatrix"  # general.type
DATASETS, CHUNKS, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MADE_FROM = "rankwise.made_from"
SUMS, COUNTS = ".in_sum2", ".counts"
NEVER = ("_norm.weight", "ffn_gate_inp.weight")  # of a layer's matrices, what llama-quantize leaves as it is
MAKE = "llama-imatrix -m MODEL-f16.gguf -f TEXT -o imatrix.gguf, or --calibration_samples N"


@dataclass(frozen=True)
class Imatrix:
    """inputs: number of inputs of each tensor, by its name in llama.cpp. datasets: what it was computed on, in its
    maker's words; chunks: in how many parts. made_from: of a matrix of ours, a digest of model and rows."""

    path: Path
    inputs: Mapping[str, int]
    datasets: tuple[str, ...]
    chunks: int
    sha256: str
    made_from: str = ""

    @classmethod
    def read(cls, path: Path | str) -> Imatrix:
        """DataError for a file that is missing or no matrix."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"{path}: no such file; an importance matrix is made by {MAKE}")
        try:
            file = GGUFFile(path)
        except VerificationError as error:
            raise DataError(
                f"{path}: not an importance matrix in GGUF; one of an older llama.cpp is rewritten by "
                f"llama-imatrix --in-file {path.name} -o imatrix.gguf ({error})"
            ) from error
        missing = [key for key in (DATASETS, CHUNKS, CHUNK_SIZE) if key not in file.metadata]
        inputs = {name.removesuffix(SUMS): one.shape[-1] for name, one in file.tensors.items() if name.endswith(SUMS)}
        if file.metadata.get("general.type") != TYPE or missing or not inputs:
            raise DataError(f"{path}: a GGUF, but not an importance matrix; one is made by {MAKE}")
        return cls(
            path.resolve(),
            inputs,
            tuple(file.metadata[DATASETS]),
            int(file.metadata[CHUNKS]),
            sha256(path),
            str(file.metadata.get(MADE_FROM, "")),
        )

    def require_fit(self, model: GGUFFile) -> list[str]:
        """The matrices of the model's layers that this matrix lacks: they are quantized without.

        DataError where it has tensors or sizes that the model does not have, or nothing of a whole layer: it is of
        another model.
        """
        shapes = {name: tensor.shape[-1] for name, tensor in model.tensors.items()}
        strange = [name for name in self.inputs if name not in shapes]
        strange += [
            f"{name} ({count} inputs, not {shapes[name]})"
            for name, count in self.inputs.items()
            if shapes.get(name, count) != count
        ]
        wanted = weighed(model)
        covered = {layer_of(name) for name in self.inputs}
        strange += sorted({f"nothing of {layer_of(name)}" for name in wanted if layer_of(name) not in covered})
        if strange:
            raise DataError(
                f"{self.path}: the importance matrix of another model than {model.path}: {first_few(strange)}; make "
                f"one of this model by {MAKE}"
            )
        return [name for name in wanted if name not in self.inputs]


def weighed(model: GGUFFile) -> list[str]:
    """The matrices that a matrix weighs: those of the layers, less the ones that predict further tokens. Without it:
    embeddings and output, as llama-imatrix leaves them."""
    blocks, more = (int(model.of_architecture(key) or 0) for key in ("block_count", "nextn_predict_layers"))
    layers = {f"blk.{number}" for number in range(blocks - more)}
    return [
        name
        for name, tensor in model.tensors.items()
        if layer_of(name) in layers and name.endswith(".weight") and len(tensor.shape) > 1 and not name.endswith(NEVER)
    ]


def layer_of(name: str) -> str:
    """blk.3.attn_q.weight → blk.3"""
    return ".".join(name.split(".")[:2])


def write(
    path: Path, sums: Mapping[str, Tensor], tokens: int, parts: int, dataset: str, made_from: str, architecture: str
) -> Imatrix:
    """As llama-imatrix writes it. sums: of each input's squares over all tokens, (inputs,) by tensor name."""
    gguf: Any = need("gguf", extra="device")
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(TYPE)
        writer.add_array(DATASETS, [dataset])
        writer.add_uint32(CHUNKS, parts)
        writer.add_uint32(CHUNK_SIZE, max(1, tokens // parts))
        writer.add_string(MADE_FROM, made_from)
        for name, values in sorted(sums.items()):
            writer.add_tensor(name + SUMS, values.float().numpy()[None])
            writer.add_tensor(name + COUNTS, np.full((1, 1), tokens, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return Imatrix.read(path)


def require_used(made: GGUFFile, imatrix: Imatrix) -> None:
    """VerificationError unless llama-quantize states in the file that it weighed with this matrix."""
    stated = [made.metadata.get(f"quantize.imatrix.{key}") for key in ("file", "entries_count", "chunks_count")]
    if stated != [imatrix.path.name, len(imatrix.inputs), imatrix.chunks]:
        raise VerificationError(
            f"{imatrix.path} did not reach the quantized file: its quantize.imatrix metadata is {stated}; give a newer "
            "llama-quantize (--llama_cpp_dir)"
        )
