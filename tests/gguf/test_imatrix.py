"""Importance matrices: written as llama-imatrix writes them, compared with the model, and really used."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from served import text_gguf
from test_quantize import COPIES, binary

from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.gguf import GGUFFile
from rankwise.gguf import quantize as module
from rankwise.gguf.imatrix import COUNTS, SUMS, Imatrix, weighed, write
from rankwise.gguf.quantize import FORMS, MATRIX_KEY, WEIGHED, check_form, quantize, quantizer

gguf = pytest.importorskip("gguf")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from shipbench_gguf import altered  # noqa: E402

TOKENS = 12
# What llama-quantize does with a matrix, without the quantizing: read it, state it in the file.
TAKES = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(BENCHMARKS)!r})
import gguf
from shipbench_gguf import altered
given = dict(zip(sys.argv[1:5:2], sys.argv[2:6:2]))
matrix = gguf.GGUFReader(given["--imatrix"])
key, _, value = given["--override-kv"].partition("=str:")
with altered(Path(sys.argv[5]), Path(sys.argv[6])) as draft:
    draft["quantize.imatrix.file"] = given["--imatrix"]
    draft["quantize.imatrix.entries_count"] = len(matrix.tensors) // 2
    draft["quantize.imatrix.chunks_count"] = int(matrix.fields["imatrix.chunk_count"].contents())
    draft[key] = value
"""
LEAVES_OUT = "import shutil, sys; shutil.copy(sys.argv[-3], sys.argv[-2])"


def matrix_of(model: GGUFFile, path: Path) -> Imatrix:
    sums = {name: torch.arange(1.0, model.tensors[name].shape[-1] + 1) for name in weighed(model)}
    return write(path, sums, TOKENS, 3, "labels: 3 rows, 3 pictures", "made", model.architecture)


@pytest.fixture
def model() -> GGUFFile:
    return GGUFFile(text_gguf("f16"))


@pytest.fixture
def imatrix(model: GGUFFile, tmp_path: Path) -> Imatrix:
    return matrix_of(model, tmp_path / "made" / "imatrix.gguf")


def test_a_matrix_is_of_every_matrix_of_the_layers(model: GGUFFile, imatrix: Imatrix) -> None:
    kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(imatrix.inputs) == {f"blk.{layer}.{kind}.weight" for layer in range(3) for kind in kinds}
    assert (imatrix.chunks, imatrix.datasets) == (3, ("labels: 3 rows, 3 pictures",))
    assert imatrix.require_fit(model) == []
    stored = GGUFFile(imatrix.path)
    name = "blk.1.ffn_down.weight"
    assert stored.tensor(name + SUMS).flatten().tolist() == list(range(1, model.tensors[name].shape[-1] + 1))
    assert stored.tensor(name + COUNTS).tolist() == [[TOKENS]]


def test_what_is_no_matrix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; an importance matrix is made by llama-imatrix"):
        Imatrix.read(tmp_path / "no.gguf")
    with pytest.raises(DataError, match="not an importance matrix"):
        Imatrix.read(text_gguf("f16"))
    (tmp_path / "imatrix.dat").write_bytes(b"\x15\x00\x00\x00" * 9)
    with pytest.raises(DataError, match=r"llama-imatrix --in-file imatrix\.dat -o imatrix\.gguf"):
        Imatrix.read(tmp_path / "imatrix.dat")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda inputs: inputs | {"blk.0.attn_q.weight": 96}, r"blk\.0\.attn_q\.weight \(96 inputs, not 128\)"),
        (lambda inputs: inputs | {"blk.3.attn_q.weight": 128}, r"blk\.3\.attn_q\.weight"),
        (lambda inputs: {name: n for name, n in inputs.items() if "blk.2." not in name}, r"nothing of blk\.2"),
    ],
)
def test_a_matrix_of_another_model_is_refused(change, said: str, model: GGUFFile, imatrix: Imatrix) -> None:
    with pytest.raises(DataError, match=f"of another model than .*{said}"):
        replace(imatrix, inputs=change(imatrix.inputs)).require_fit(model)


def test_single_tensors_that_a_matrix_lacks_are_named(model: GGUFFile, imatrix: Imatrix) -> None:
    fewer = {name: count for name, count in imatrix.inputs.items() if name != "blk.2.attn_v.weight"}
    assert replace(imatrix, inputs=fewer).require_fit(model) == ["blk.2.attn_v.weight"]


def test_types_that_need_a_matrix_say_so() -> None:
    for form in WEIGHED:
        with pytest.raises(UsageError, match=f"{form} needs an importance matrix: --imatrix .* --calibration_samples"):
            check_form(form)
    for form in (*FORMS, *WEIGHED):
        check_form(form, weighed=True)


def test_the_matrix_reaches_the_file_and_no_folder_does(imatrix: Imatrix, tmp_path: Path) -> None:
    folder = binary(tmp_path / "llama.cpp", TAKES)
    made = quantize(text_gguf("f16"), tmp_path / "small.gguf", "iq2_xs", folder, imatrix=imatrix)
    stated = GGUFFile(made.path).metadata
    assert stated["quantize.imatrix.file"] == "imatrix.gguf"
    assert stated["quantize.imatrix.entries_count"] == 21
    assert stated[MATRIX_KEY] == imatrix.sha256
    assert not any(str(tmp_path) in value for value in stated.values() if isinstance(value, str))


def test_a_quantizer_that_leaves_the_matrix_out_is_found_out(imatrix: Imatrix, tmp_path: Path) -> None:
    folder = binary(tmp_path / "llama.cpp", LEAVES_OUT)
    with pytest.raises(VerificationError, match="did not reach the quantized file"):
        quantize(text_gguf("f16"), tmp_path / "small.gguf", "q4_0", folder, imatrix=imatrix)
    assert not (tmp_path / "small.gguf").exists()


def test_the_package_is_not_asked_with_a_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    assert quantizer()[:2] == [sys.executable, "-c"]
    with pytest.raises(UsageError, match=r"llama-quantize, which takes .*--llama_cpp_dir.*apt-get install") as error:
        quantizer(weighed=True)
    assert "pip install" not in str(error.value)
    folder = binary(tmp_path / "llama.cpp", COPIES)
    monkeypatch.setenv("LLAMA_CPP_DIR", str(folder))
    assert quantizer(weighed=True) == [str(folder / "build/bin/llama-quantize")]


@pytest.mark.skipif(not shutil.which("llama-quantize"), reason="llama-quantize is not on the PATH (llama.cpp-tools)")
@pytest.mark.parametrize("form", ["iq2_xs", "iq4_nl", "q4_k_m"])
def test_llama_quantize_weighs_with_it(form: str, model: GGUFFile, imatrix: Imatrix, tmp_path: Path) -> None:
    """Inputs of a weight of 1 to n: the later columns come out nearer than without."""
    made = quantize(model.path, tmp_path / "weighed.gguf", form, threads=1, imatrix=imatrix)
    stated = GGUFFile(made.path)
    assert stated.metadata[MATRIX_KEY] == imatrix.sha256
    assert stated.metadata["quantize.imatrix.dataset"] == "labels: 3 rows, 3 pictures"
    if form == "iq2_xs":  # not made without
        return
    plain = GGUFFile(quantize(model.path, tmp_path / "plain.gguf", form, threads=1).path)
    name = "blk.0.ffn_up.weight"
    weights = torch.arange(1.0, model.tensors[name].shape[-1] + 1)
    errors = [float(((file.tensor(name) - model.tensor(name)).square() * weights).sum()) for file in (stated, plain)]
    assert errors[0] < errors[1]


def test_a_matrix_of_experts_has_a_row_for_each(mixtures: Path, tmp_path: Path) -> None:
    """As llama-imatrix writes them: sums (E, inputs) and counts (E, 1) of a stack."""
    file = GGUFFile(mixtures / "mixtral" / "export" / "model-f16.gguf")
    stacks = [name for name in weighed(file) if "_exps" in name]
    assert len(stacks) == 6, "three projections in each of two layers"

    def written(name: str, widths: dict[str, int]) -> Imatrix:
        sums = {one: torch.ones(file.tensors[one].shape[-1]) for one in weighed(file)}
        matrix = write(tmp_path / name, sums, TOKENS, 3, "labels", "", file.architecture)
        with altered(matrix.path, tmp_path / name) as draft:
            for one in stacks:
                for what, width in ((SUMS, widths.get(one, file.tensors[one].shape[-1])), (COUNTS, 1)):
                    draft.tensors[one + what] = (np.ones((4, width), np.float32), gguf.GGMLQuantizationType.F32)
        return Imatrix.read(tmp_path / name)

    assert written("sound.gguf", {}).require_fit(file) == []
    with pytest.raises(DataError, match=rf"{stacks[0]} \(40 inputs, not 64\)"):
        written("other.gguf", {stacks[0]: 40}).require_fit(file)
