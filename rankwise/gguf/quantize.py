"""Quantize a full-precision GGUF with llama.cpp's own quantizer, in a subprocess.

    model-f16.gguf ── quantize(…, "q4_0") ──▶ model-q4_0.gguf + what became of every tensor

Where from: `llama-quantize` in --llama_cpp_dir (else $LLAMA_CPP_DIR), else the llama-cpp-python package, else
`llama-quantize` on the PATH; with an importance matrix never the package, whose call is given none.
f32, f16, bf16 and q8_0 come from the converter (`rankwise export --outtype`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import atomic_write
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.imatrix import Imatrix, require_used
from rankwise.gguf.reading import first_few

FORMS = (
    *("q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "iq4_nl", "iq4_xs"),
    *("q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
# With an importance matrix only: llama-quantize refuses most of them without, and makes the others unusable.
WEIGHED = (
    *("iq3_m", "iq3_s", "iq3_xs", "iq3_xxs", "q2_k_s"),
    *("iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
)
CONVERTED = ("f32", "f16", "bf16")
FULL = {0: "f32", 1: "f16", 32: "bf16"}  # llama.cpp's general.file_type of what may be quantized
MANTISSA = {"F32": 23, "F16": 10, "BF16": 7}
UNLIKE = 0.9  # relative error of a matrix that says nothing of the other
VARIABLE = "LLAMA_CPP_DIR"
BINARY = "llama-quantize"
MATRIX_KEY = "quantize.imatrix.sha256"  # which matrix a file was made with; the other keys are llama-quantize's own
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
    source: Path | str,
    out: Path | str,
    form: str,
    llama_cpp_dir: Path | str | None = None,
    threads: int = 0,
    imatrix: Imatrix | None = None,
) -> Quantized:
    """Write `source` (f32, f16 or bf16) in a form of `FORMS`, or with an importance matrix of `WEIGHED`; threads: 0 for
    as many as there are cores.

    UsageError for another form or source, or where no quantizer is found; VerificationError, with the end of its
    output, where it fails or leaves the matrix out. A file that is cut off never has the final name.
    """
    source, out = Path(source).resolve(), Path(out)
    check_form(form, imatrix is not None)
    whole = GGUFFile(source)
    kind = whole.metadata.get("general.file_type")
    if kind not in FULL:
        raise UsageError(f"{source} is already quantized (file type {kind}); give the f16 or f32 file")
    command = quantizer(llama_cpp_dir, imatrix is not None)
    if imatrix is not None:  # by its name alone: the file that is shipped says nothing of this machine's folders
        command += ["--imatrix", imatrix.path.name, "--override-kv", f"{MATRIX_KEY}=str:{imatrix.sha256}"]
    with atomic_write(out) as temporary:
        if command[0] == sys.executable:
            how = [f"LLAMA_FTYPE_MOSTLY_{form.upper()}", str(threads)]
        else:
            how = [form.upper(), *([str(threads)] if threads else [])]
        words = [*command, str(source), str(temporary.resolve()), *how]
        _run(words, source, form, imatrix.path.parent if imatrix else None)
        made = GGUFFile(temporary)
        if imatrix is not None:
            require_used(made, imatrix)
        here, there = ({one.name: one.shape for one in file.tensors.values()} for file in (made, whole))
        if here != there:
            raise VerificationError(f"{source} as {form}: its tensors differ from the source's; nothing was written")
        require_close(made, whole, form)
        types: Counter[str] = Counter()
        for tensor in made.tensors.values():
            types[tensor.type] += tensor.bytes
    return Quantized(out, form, out.stat().st_size, dict(types))


def require_close(made: GGUFFile, whole: GGUFFile, form: str) -> None:
    """VerificationError, naming them, for matrices, of a stack one by one, that are not those of the source within what
    their types round: a root mean square of `rounding_of` the matrix's own."""
    wrong = []
    for name, tensor in made.tensors.items():
        limit = rounding_of(tensor.type)
        for number, (before, after) in enumerate(zip(whole.parts(name), made.parts(name), strict=True)):
            if not float((after - before).norm()) <= limit * float(before.norm()):
                wrong.append(f"{name}, matrix {number}" if len(tensor.shape) == 3 else name)
    if wrong:
        raise VerificationError(
            f"{whole.path} as {form}: {first_few(wrong)}: not the source's values within the type's rounding; nothing "
            "was written"
        )


def rounding_of(kind: str) -> float:
    """Relative error that a type may have, by its bits: three to four times that of normally distributed weights (q2_k
    0.30, q3_k 0.15, q4_0 0.09, q5_k 0.04, q6_k 0.02, q8_0 0.005). Another matrix of the same size has 1.4."""
    if kind in MANTISSA:
        return 2.0 ** (1 - MANTISSA[kind])
    bits = re.search(r"\d+", kind)
    return min(UNLIKE, 2.0 ** (2 - int(bits[0]))) if bits else UNLIKE


def check_form(form: str, weighed: bool = False) -> None:
    """UsageError, with the known types, for an unknown quantization type, and for one that needs an importance matrix.

    weighed: there is a matrix.
    """
    if form in CONVERTED:
        raise UsageError(f"quantization type {form} is made by the converter: rankwise export --outtype {form}")
    if form not in (*FORMS, *WEIGHED):
        raise UsageError(f"unknown quantization type {form!r}; known are {', '.join((*FORMS, *WEIGHED))}")
    if form in WEIGHED and not weighed:
        raise UsageError(
            f"quantization type {form} needs an importance matrix: --imatrix FILE, or --calibration_samples N rows of "
            "the training part to compute one from"
        )


def quantizer(llama_cpp_dir: Path | str | None = None, weighed: bool = False) -> list[str]:
    """The command that quantizes, without its arguments; UsageError that names the ways to get one.

    weighed: it shall take an importance matrix.
    """
    given = llama_cpp_dir or os.environ.get(VARIABLE)
    found = [Path(given).expanduser().resolve() / place / BINARY for place in PLACES] if given else []
    if binary := next((one for one in found if one.is_file()), None):
        return [str(binary)]
    if importlib.util.find_spec("llama_cpp") is not None and not weighed:
        return [sys.executable, "-c", DRIVER]
    on_path = shutil.which(BINARY)
    if on_path is not None:
        return [on_path]
    package = "" if weighed else "pip install llama-cpp-python (it is built from source, which takes some minutes), or "
    raise UsageError(
        f"llama.cpp's {'quantizer is' if not weighed else f'{BINARY}, which takes an importance matrix, is'} not "
        f"installed: {package}build llama.cpp and name its folder with --llama_cpp_dir, or put {BINARY} on the PATH "
        "(Debian unstable: apt-get install llama.cpp-tools)"
    )


def _run(command: Sequence[str], source: Path, form: str, folder: Path | None = None) -> None:
    done = subprocess.run(
        command,
        cwd=folder,
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
