"""Smaller forms by llama.cpp's quantizer: the package's or a binary, checked before the final name is given."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from served import text_gguf

from rankwise.errors import UsageError, VerificationError
from rankwise.files.gguf import GGUFFile
from rankwise.gguf import quantize as module
from rankwise.gguf.quantize import FORMS, check_form, quantize, quantizer

HAS_PACKAGE = importlib.util.find_spec("llama_cpp") is not None
COPIES = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2]); print(sys.argv[3:])"
CUTS = "import sys; open(sys.argv[2], 'wb').write(open(sys.argv[1], 'rb').read()[:-5000])"
FAILS = "import sys; open(sys.argv[2], 'wb').write(b'half'); sys.exit('unsupported tensor shape')"


def binary(folder: Path, script: str) -> Path:
    """A llama.cpp folder whose llama-quantize does what `script` says."""
    place = folder / "build" / "bin"
    place.mkdir(parents=True)
    file = place / "llama-quantize"
    file.write_text(f"#!{sys.executable}\n{script}\n")
    file.chmod(0o755)
    return folder


@pytest.mark.skipif(not HAS_PACKAGE, reason="llama-cpp-python is not installed (it is built from source)")
@pytest.mark.parametrize("form", ["q8_0", "q4_0"])
def test_the_package_quantizes(form: str, tmp_path: Path) -> None:
    source = GGUFFile(text_gguf("f16"))
    made = quantize(source.path, tmp_path / "small.gguf", form, threads=1)
    small = GGUFFile(made.path)
    assert made.bytes == made.path.stat().st_size < source.path.stat().st_size
    assert sum(made.types.values()) == sum(tensor.bytes for tensor in small.tensors.values())
    name = "blk.0.ffn_up.weight"
    assert small.tensors[name].type == form.upper()
    own = source.tensor(name)
    steps = 127 if form == "q8_0" else 8
    blocks = own.reshape(-1, 32).abs().amax(1, keepdim=True) / steps
    error = (small.tensor(name) - own).reshape(-1, 32).abs()
    assert bool((error <= blocks * 1.01 + 1e-3).all()) and float(error.max()) > 0


def test_a_binary_in_the_folder_goes_first(tmp_path: Path) -> None:
    folder = binary(tmp_path / "llama.cpp", COPIES)
    assert quantizer(folder) == [str(folder / "build/bin/llama-quantize")]
    made = quantize(text_gguf("f16"), tmp_path / "q.gguf", "q4_0", folder, threads=3)
    assert made.path.read_bytes() == text_gguf("f16").read_bytes() and made.form == "q4_0"
    assert set(made.types) == {"F16", "F32"}


@pytest.mark.parametrize(("script", "said"), [(FAILS, "unsupported tensor shape"), (CUTS, "not a whole GGUF")])
def test_what_fails_is_told_and_leaves_no_file(script: str, said: str, tmp_path: Path) -> None:
    folder = binary(tmp_path / "llama.cpp", script)
    with pytest.raises(VerificationError, match=said):
        quantize(text_gguf("f16"), tmp_path / "out" / "q.gguf", "q4_0", folder)
    assert not list((tmp_path / "out").iterdir())


def test_the_form_is_checked_first(tmp_path: Path) -> None:
    for form in FORMS:
        check_form(form)
    with pytest.raises(UsageError, match=r"export --outtype f16"):
        check_form("f16")
    with pytest.raises(UsageError, match="q5_k_m"):
        quantize(tmp_path / "no.gguf", tmp_path / "out.gguf", "q5")


def test_a_quantized_source_would_lose_twice(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    source = tmp_path / "q8.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_file_type(7)
    writer.add_tensor("output_norm.weight", torch.ones(4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UsageError, match="already quantized"):
        quantize(source, tmp_path / "out.gguf", "q4_0", binary(tmp_path / "llama.cpp", COPIES))


def test_without_a_quantizer_both_ways_to_get_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"llama-cpp-python.*--llama_cpp_dir"):
        quantizer(tmp_path)
    on_path = binary(tmp_path / "llama.cpp", COPIES) / "build/bin"
    monkeypatch.setenv("PATH", str(on_path))
    assert quantizer() == [str(on_path / "llama-quantize")]
