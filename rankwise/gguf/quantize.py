"""Quantize a full-precision GGUF with llama.cpp's own quantizer, in a subprocess.

    model-f16.gguf ── quantize(…, "q4_0") ──▶ model-q4_0.gguf + what became of every tensor

Where from: `llama-quantize` in --llama_cpp_dir, else the llama-cpp-python package, else `llama-quantize` on the PATH.
f32, f16, bf16 and q8_0 come from the converter (`rankwise export --outtype`).
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import atomic_write
from rankwise.gguf.reading import GGUFFile

# What needs no importance matrix; smaller i-quants do, and their makers say so.
FORMS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
CONVERTED = ("f32", "f16", "bf16")
FULL = {0: "f32", 1: "f16", 32: "bf16"}  # llama.cpp's general.file_type of what may be quantized
BINARY = "llama-quantize"
PLACES = ("", "bin", "build/bin")
LAST_LINES = 15
# The package's own call; a broken source may end the process that makes it.
DRIVER = """
import ctypes, sys
import llama_cpp
source, out, kind, threads = sys.argv[1:]
settings = llama_cpp.llama_model_quantize_default_params()
settings.ftype = getattr(llama_cpp, kind)
settings.nthread = int(threads)
sys.exit(llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(settings)))
"""


@dataclass(frozen=True)
class Quantized:
    """A file that was made. types: bytes of its tensors by type; a tensor whose rows don't divide into the form's
    blocks (256 values for K-quants) gets a larger type, and small models have many such."""

    path: Path
    form: str
    bytes: int
    types: Mapping[str, int]


def quantize(
    source: Path | str, out: Path | str, form: str, llama_cpp_dir: Path | str | None = None, threads: int = 0
) -> Quantized:
    """Write `source` (f32, f16 or bf16) in a form of `FORMS`; threads: 0 for as many as there are cores.

    UsageError for another form or source, or where no quantizer is found; VerificationError, with the end of its
    output, where it fails. A file that is cut off never has the final name.
    """
    source, out = Path(source), Path(out)
    check_form(form)
    whole = GGUFFile(source)
    kind = whole.metadata.get("general.file_type")
    if kind not in FULL:
        raise UsageError(f"{source} is already quantized (file type {kind}); give the f16 or f32 file")
    command = quantizer(llama_cpp_dir)
    with atomic_write(out) as temporary:
        if len(command) > 1:
            how = [f"LLAMA_FTYPE_MOSTLY_{form.upper()}", str(threads)]
        else:
            how = [form.upper(), *([str(threads)] if threads else [])]
        _run([*command, str(source), str(temporary), *how], source, form)
        made = GGUFFile(temporary)
        here, there = ({one.name: one.shape for one in file.tensors.values()} for file in (made, whole))
        if here != there:
            raise VerificationError(f"{source} as {form}: its tensors differ from the source's; nothing was written")
        types: Counter[str] = Counter()
        for tensor in made.tensors.values():
            types[tensor.type] += tensor.bytes
    return Quantized(out, form, out.stat().st_size, dict(types))


def check_form(form: str) -> None:
    """UsageError, with the known types, for an unknown quantization type."""
    if form in CONVERTED:
        raise UsageError(f"quantization type {form} is made by the converter: rankwise export --outtype {form}")
    if form not in FORMS:
        raise UsageError(f"unknown quantization type {form!r}; known are {', '.join(FORMS)}")


def quantizer(llama_cpp_dir: Path | str | None = None) -> list[str]:
    """The command that quantizes, without its arguments; UsageError that names both ways to get one."""
    found = [Path(llama_cpp_dir) / place / BINARY for place in PLACES] if llama_cpp_dir is not None else []
    if binary := next((one for one in found if one.is_file()), None):
        return [str(binary)]
    if importlib.util.find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", DRIVER]
    on_path = shutil.which(BINARY)
    if on_path is not None:
        return [on_path]
    raise UsageError(
        "llama.cpp's quantizer is not installed: pip install llama-cpp-python (it is built from source, which takes "
        f"some minutes), or build llama.cpp and name its folder with --llama_cpp_dir (or put {BINARY} on the PATH)"
    )


def _run(command: Sequence[str], source: Path, form: str) -> None:
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        said = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
        raise VerificationError(f"{source}: quantization to {form} failed (exit status {done.returncode})\n{said}")
