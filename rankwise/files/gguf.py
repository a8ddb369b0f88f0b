"""GGUF files: read with every byte checked that the header promises, and models unpacked to plain folders.

    file = GGUFFile("model-q8_0.gguf")
    file.metadata["general.architecture"]     # "llama"
    file.tensors["blk.0.attn_q.weight"]       # shape, type, place in the file
    file.tensor("blk.0.attn_q.weight")        # dequantized, float32

    unpacked("SmolLM2-135M-Instruct.Q4_1.gguf")    # a Hugging Face folder in the cache: weights, tokenizer, gguf.json

llama.cpp itself ends the process on a bad file, so this is asked first. Reading is the gguf package's own, and for
models transformers'. What that leaves out is restored (Llama 3's rope scaling) or refused, never dropped.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from rankwise.errors import DataError, VerificationError, need
from rankwise.files.atomic import about_to_write, atomic_folder, sha256, write_json
from rankwise.files.atomic import cache as cache_folder
from rankwise.files.processes import announce

# What the gguf package raises about a file that is cut off, altered or something else.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError, AssertionError)


@cache
def reader_class() -> Any:
    """The package's reader over a plain array: a vocabulary is a hundred thousand slices, and numpy takes several times
    as long for each slice of a memmap. The file stays mapped all the same."""
    gguf = need("gguf", extra="device")

    class PlainReader(gguf.GGUFReader):  # type: ignore[name-defined]
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = np.asarray(mapped)

    return PlainReader


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it. shape: row-major, as PyTorch has it. type: F32, F16, BF16, Q8_0 …"""

    name: str
    shape: tuple[int, ...]
    type: str
    bytes: int


class GGUFFile:
    """An opened file (memory-mapped: opening a large one is quick).

    VerificationError, naming the file, where it is not a GGUF, is truncated, or names one tensor twice.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._gguf = need("gguf", extra="device")
        try:
            self._reader = reader_class()(self.path)
            self._check_places()
        except OSError as error:
            raise VerificationError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        except BROKEN as error:
            size = self.path.stat().st_size
            raise VerificationError(
                f"{self.path}: not a whole GGUF file ({size:,} bytes; {error or type(error).__name__}); was it cut "
                "off? Write or fetch it again"
            ) from error
        self._by_name = {tensor.name: tensor for tensor in self._reader.tensors}

    def _check_places(self) -> None:
        """Every tensor lies within the file, after the header; numpy would cut a short one silently."""
        size = self.path.stat().st_size
        for tensor in self._reader.tensors:
            end = int(tensor.data_offset) + int(tensor.n_bytes)
            if end > size:
                raise ValueError(f"the tensor {tensor.name} should end at byte {end:,}")

    @cached_property
    def metadata(self) -> Mapping[str, Any]:
        """Keys and values: strings, numbers, lists of them."""
        try:
            return {name: field.contents() for name, field in self._reader.fields.items()}
        except BROKEN as error:
            raise VerificationError(f"{self.path}: its metadata cannot be read ({error})") from error

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """What the header lists, in its order."""
        return {
            name: TensorInfo(
                name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, int(tensor.n_bytes)
            )
            for name, tensor in self._by_name.items()
        }

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, dequantized, in its row-major shape. VerificationError where it is absent."""
        return self._values(name, self._stored(name).data).reshape(self.tensors[name].shape)

    def part(self, name: str, number: int) -> Tensor:
        """One of the matrices that a stack holds along its first axis, likewise: of a layer's experts, say."""
        return self._values(name, self._stored(name).data[number]).reshape(self.tensors[name].shape[1:])

    def parts(self, name: str) -> Iterator[Tensor]:
        """The tensor's matrices one by one: all of a stack, or the tensor itself."""
        shape = self.tensors[name].shape
        return (self.part(name, number) for number in range(shape[0])) if len(shape) == 3 else iter([self.tensor(name)])

    def _stored(self, name: str) -> Any:
        if name not in self._by_name:
            raise VerificationError(f"{self.path}: has no tensor {name}")
        return self._by_name[name]

    def _values(self, name: str, data: Any) -> Tensor:
        kind = self._by_name[name].tensor_type
        try:
            values = self._gguf.quants.dequantize(data, kind)
        except NotImplementedError as error:
            raise VerificationError(f"{self.path}: {name} has an unsupported type, {kind.name}") from error
        values = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(values.copy() if not values.flags.writeable else values)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def of_architecture(self, key: str) -> Any:
        """`attention.head_count` → the value of `llama.attention.head_count`; None where it is not stated."""
        return self.metadata.get(f"{self.architecture}.{key}")


# --- a model in a GGUF file, as a Hugging Face folder -----------------------------------------------------------------

ENDING, SOURCE = ".gguf", "gguf.json"
HEADER = ("llm", "model", "")  # general.type of a whole model; older converters wrote none
PIECES = "llama"  # tokenizer.ggml.model of a SentencePiece vocabulary
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TRAINED_TO = 8192  # original_max_position_embeddings of every Llama 3 with scaled frequencies
UNREADABLE = (OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, NotImplementedError)


def is_gguf(path: Path) -> bool:
    return path.suffix.lower() == ENDING and path.is_file()


@dataclass(frozen=True)
class GGUFModel:
    """A file that holds a whole model. type: of most of its weights, as llama.cpp names it: Q4_1, Q4_K_M, F16."""

    path: Path
    sha256: str
    type: str
    architecture: str

    @property
    def folder(self) -> Path:
        """Where it is unpacked: by content, by the version that read it, and under its own name."""
        import transformers

        return cache_folder() / "gguf" / f"{self.sha256[:16]}-transformers-{transformers.__version__}" / self.path.stem

    def record(self) -> dict[str, str]:
        return {"file": self.path.name, "sha256": self.sha256, "type": self.type}


def unpacked(path: Path) -> Path:
    """The model of a GGUF file as a Hugging Face folder with tokenizer and chat template; made once, then kept.

    Weights that the file holds as F16 or BF16 stay so, all others become float32. Raises UsageError without the gguf
    package, DataError for what is not one whole model that transformers can read.
    """
    model = model_in(path)
    if not model.folder.is_dir():
        about_to_write()
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{model.folder}.lock"):
            if not model.folder.is_dir():
                with atomic_folder(model.folder) as made:
                    unpack(model, made)
    say(f"{path}: weights dequantized from {model.type}, in {model.folder}")
    return model.folder


say = cache(announce)  # once, whoever asks for the folder


def model_in(path: Path) -> GGUFModel:
    """The model of a file, which is read once."""
    status = path.stat()
    return _model_in(path.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _model_in(path: Path, size: int, changed: int) -> GGUFModel:
    """What the file is. DataError for parts, adapters, projectors, damaged files, and what transformers cannot read."""
    try:
        file = GGUFFile(path)
        kind, parts = str(file.metadata.get("general.type", "")), int(file.metadata.get("split.count", 1))
    except VerificationError as error:
        raise DataError(str(error)) from error
    if file.architecture == "clip" or kind == "mmproj":
        raise DataError(f"{path}: a vision part (mmproj), not a model; give the text model's file")
    if kind not in HEADER:
        raise DataError(f"{path}: holds {kind!r}, not a model; give the base model's file")
    if parts > 1:
        raise DataError(
            f"{path}: one of {parts} parts; join them first: llama-gguf-split --merge FIRST-OF-THE-PARTS OUTPUT"
        )
    require_known(file)
    return GGUFModel(path, sha256(path), type_of(file), file.architecture)


def require_known(file: GGUFFile) -> None:
    """DataError for an architecture that transformers does not read, and for scaled positions that it leaves out."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {name.replace("_", "").replace("-", "") for name in (*GGUF_CONFIG_ARCHS, *GGUF_SUPPORTED_ARCHITECTURES)}
    if file.architecture.replace("_", "").replace("-", "") not in known:
        raise DataError(
            f"{file.path}: transformers reads no GGUF of the architecture {file.architecture!r}; give the model's "
            "Hugging Face folder or hub id"
        )
    scaled = file.of_architecture("rope.scaling.type")
    if scaled not in (None, "none") and file.architecture != "gpt-oss":
        raise DataError(
            f"{file.path}: scales its positions ({scaled}), which transformers leaves out of a GGUF; give the model's "
            "Hugging Face folder or hub id"
        )


def type_of(file: GGUFFile) -> str:
    """As the file states it, else the type of most bytes."""
    types = need("gguf", extra="device").LlamaFileType
    with contextlib.suppress(ValueError, KeyError):
        return str(types(file.metadata["general.file_type"]).name).removeprefix("MOSTLY_").removeprefix("ALL_")
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type] += tensor.bytes
    return sizes.most_common(1)[0][0]


def unpack(model: GGUFModel, folder: Path) -> None:
    """Read by transformers, which cannot save what it has read from a GGUF: its weights go into a plain model."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = GGUFFile(model.path)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as place:
        (Path(place) / model.path.name).symlink_to(model.path)  # alone: its neighbours are none of its files
        try:
            given: dict[str, Any] = {"gguf_file": model.path.name}
            given["config"] = AutoConfig.from_pretrained(place, **given)  # minutes, were each to read it for itself
            tokenizer = AutoTokenizer.from_pretrained(place, **given)
            read, info = AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **given
            )
        except UNREADABLE as error:
            raise DataError(f"{model.path}: transformers cannot read it: {error}") from error
    if info["missing_keys"]:
        raise DataError(f"{model.path}: lacks weights of the model: {', '.join(sorted(info['missing_keys'])[:5])} …")
    config = plain_config(read.config, file)
    with torch.device("meta"):
        plain = type(read)(config)
    kept = stored_type(model.type)
    plain.load_state_dict({name: narrowed(value, kept) for name, value in read.state_dict().items()}, assign=True)
    plain.tie_weights()
    require_all(file, plain)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_json(folder / SOURCE, model.record())


def plain_config(config: Any, file: GGUFFile) -> Any:
    """The config without its origin; numbers as they were before they became float32: 1e-05, not 9.999…e-06."""
    content = {key: shortest(value) for key, value in config.to_dict().items()}
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        content.pop(key, None)
    if ROPE in file.tensors:
        content["rope_parameters"] = {**content["rope_parameters"], **llama3_scaling(file, content)}
    return type(config)(**content)


def shortest(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shortest(each) for key, each in value.items()}
    return float(str(np.float32(value))) if isinstance(value, float) and float(np.float32(value)) == value else value


ROPE = "rope_freqs.weight"


def llama3_scaling(file: GGUFFile, content: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's rope scaling, from the factors that the file holds in its place; DataError where they are others."""
    factors = file.tensor(ROPE).double()
    theta, factor = float(content["rope_parameters"]["rope_theta"]), float(factors.max())
    lengths = 2 * math.pi * theta ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    share = ((TRAINED_TO / lengths - low) / (high - low)).clamp(0, 1)  # type: ignore[operator]
    if not torch.allclose(1 / (share + (1 - share) / factor), factors, rtol=1e-4):
        raise DataError(
            f"{file.path}: {ROPE} scales positions, and not as Llama 3 does; give the model's Hugging Face folder"
        )
    return {**LLAMA3, "factor": factor, "original_max_position_embeddings": TRAINED_TO}


def stored_type(kind: str) -> torch.dtype:
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)


def narrowed(value: Tensor, kept: torch.dtype) -> Tensor:
    """In the narrower type where it holds the same values."""
    narrow = value.to(kept)
    return narrow if torch.equal(narrow.to(value.dtype), value) else value


def require_all(file: GGUFFile, model: Any) -> None:
    """DataError where the model has not as many weights as the file: transformers drops what it does not know."""
    held = sum(math.prod(tensor.shape) for name, tensor in file.tensors.items() if name != ROPE)
    if (taken := model.num_parameters()) != held:
        raise DataError(
            f"{file.path}: transformers takes {taken:,} of its {held:,} weights, so this would be another model; give "
            "the model's Hugging Face folder or hub id"
        )
