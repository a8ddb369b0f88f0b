"""What stands between us and llama.cpp goes wrong: its converter, its files, its quantizer, its processes. Exit 6, and
what is at fault is named."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_merge import adapter_on
from test_quantize import CUTS, FAILS, binary

from rankwise.cli import main
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity import embed
from rankwise.device.parity.ladder import Embedder
from rankwise.errors import VerificationError
from rankwise.gguf.converter import PIN, Converter
from rankwise.models import tiny

gguf = pytest.importorskip("gguf")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shipbench_gguf import Draft, altered  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Validate = Callable[..., tuple[int, str]]


# --- the converter ---------------------------------------------------------------------------------------------------


def test_a_converter_that_somebody_edited(
    converter: Converter,
    text_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not (converter.folder / "converter.json").is_file():
        pytest.skip("a checkout of one's own may be edited")
    copy = Path(shutil.copytree(converter.folder, tmp_path / "llama.cpp" / PIN.version))
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP_DIR", raising=False)
    with (copy / "convert_hf_to_gguf.py").open("a") as file:
        file.write("# one more line\n")
    assert main(["export", str(text_export.parent / "model"), "-o", str(tmp_path / "out")]) == 6
    assert "convert_hf_to_gguf.py has changed since it was installed" in capsys.readouterr().err


def nothing_written(job: Any) -> None:
    job.outfile.unlink()


def unreadable_name(job: Any) -> None:
    content = job.outfile.read_bytes()
    assert b"general.name" in content
    start = content.index(b"general.name") + len(b"general.name") + 4 + 8
    job.outfile.write_bytes(content[:start] + b"\xff" + content[start + 1 :])


def counted_in_whole_numbers(job: Any) -> None:
    """A type that stands for no weight, under a name that the checkpoint does not have."""
    draft = Draft(job.outfile)
    draft.tensors["blk.0.strange.weight"] = (np.ones((4, 4), dtype=np.int32), gguf.GGMLQuantizationType.I32)
    draft.write(job.outfile)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (nothing_written, "cannot be read: No such file"),
        (unreadable_name, "its metadata cannot be read"),
        (counted_in_whole_numbers, "blk.0.strange.weight has an unsupported type, I32"),
    ],
)
def test_files_that_cannot_be_read_back(
    fault: Callable[[Any], None],
    said: str,
    text_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def convert_all(self: Converter, model: Path, jobs: Any, name: str) -> None:
        for job in jobs:
            job.outfile.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(text_export / job.outfile.name, job.outfile)
            fault(job)

    monkeypatch.setattr(Converter, "convert_all", convert_all)
    model = str(text_export.parent / "model")
    assert main(["export", model, "--outtype", "f32", "-o", str(tmp_path / "out")]) == 6
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_a_lora_that_lacks_a_half(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_on(text_export.parent / "model", tmp_path / "adapter", ["v_proj"])

    def convert_adapter(self: Converter, folder: Path, base: Path, outfile: Path) -> Path:
        writer = gguf.GGUFWriter(outfile, "llama")
        writer.add_float32("adapter.lora.alpha", 4.0)
        for layer in range(3):
            writer.add_tensor(f"blk.{layer}.attn_v.weight.lora_a", np.ones((4, 128), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return outfile

    monkeypatch.setattr(Converter, "convert_adapter", convert_adapter)
    assert main(["export", "--adapter_gguf", str(adapter), "-o", str(tmp_path / "out")]) == 6
    assert "has no tensor blk.0.attn_v.weight.lora_b" in capsys.readouterr().err


def test_a_home_made_tokenizer_in_two_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`rankwise tiny` writes both; the one for transformers gets two pieces in each other's places."""
    own = tiny.vocabulary_and_merges

    def swapped(pieces: Any) -> dict[str, Any]:
        found = own(pieces)
        words = [word for word in found["vocab"] if word.startswith("▁") and len(word) > 2]
        found["vocab"][words[0]], found["vocab"][words[1]] = found["vocab"][words[1]], found["vocab"][words[0]]
        return found

    monkeypatch.setattr(tiny, "vocabulary_and_merges", swapped)
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 6
    assert "tokenizer.json and tokenizer.model disagree on" in capsys.readouterr().err


# --- the runtime and the quantizer -----------------------------------------------------------------------------------


@pytest.fixture
def validate(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Validate:
    """Run the command on one item of the shipped model; its exit code and what it says went wrong."""

    def run(*more: str, export: Path | None = None, parity: int = 0) -> tuple[int, str]:
        words = ["validate", str(export or shipped / "export"), "--task", "labels", "--threads", "1"]
        words += ["--data_path", str(shipped / "dataset"), "-o", str(tmp_path / "validation"), "--num_samples", "1"]
        code = main([*words, "--max_new_tokens", "2", "--parity_samples", str(parity), *more])
        return code, capsys.readouterr().err

    return run


@pytest.mark.slow
def test_a_file_that_llama_cpp_cannot_load(shipped: Path, tmp_path: Path, validate: Validate) -> None:
    """Whole, and of an architecture that it does not have."""
    copy = Path(shutil.copytree(shipped / "export", tmp_path / "export"))
    with altered(shipped / "export" / "model-q8_0.gguf", copy / "model-q8_0.gguf") as draft:
        draft["general.architecture"] = "lama"
    code, said = validate("--outtype", "q8_0", export=copy)
    assert code == 6 and "llama.cpp can't load" in said and "model-q8_0.gguf" in said


@pytest.mark.slow
def test_a_runtime_that_dies_while_it_answers(validate: Validate, monkeypatch: pytest.MonkeyPatch) -> None:
    enter = LlamaServer.__enter__

    def doomed(self: LlamaServer) -> Any:
        runtime = enter(self)
        assert runtime.info and self._child is not None
        os.kill(self._child.pid, signal.SIGKILL)
        self._child.wait()
        return runtime

    monkeypatch.setattr(LlamaServer, "__enter__", doomed)
    code, said = validate("--outtype", "q8_0")
    assert code == 6 and "llama.cpp crashed while answering" in said and "SIGKILL" in said


OTHER = "import shutil, sys; shutil.copy(sys.argv[1].replace('model-f16', 'mmproj-model-f16'), sys.argv[2])"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"),
    [
        (FAILS, "failed (exit status 1)"),
        (CUTS, "not a whole GGUF file"),
        (OTHER, "its tensors differ from the source's"),
        ("import sys; sys.exit('got ' + ' '.join(sys.argv[3:]))", "got Q4_0 1"),
    ],
)
def test_a_quantizer_that_goes_wrong(script: str, said: str, shipped: Path, tmp_path: Path, validate: Validate) -> None:
    copy = Path(shutil.copytree(shipped / "export", tmp_path / "export"))
    folder = binary(tmp_path / "llama.cpp", script)
    code, error = validate("--outtype", "f16", "--sweep", "q4_0", "--llama_cpp_dir", str(folder), export=copy)
    assert code == 6 and said in error
    assert not (copy / "model-q4_0.gguf").exists()


# --- the vision side alone -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_vision_side_that_ends_on_a_file(validate: Validate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bindings are there, and end the process as they do on a broken file."""
    (tmp_path / "llama_cpp.py").write_text("import sys\nraise SystemExit(f'GGML_ASSERT {sys.argv[1:]}')")
    monkeypatch.setattr(Embedder, "available", staticmethod(lambda: True))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])]))
    code, said = validate("--outtype", "f16", parity=1)
    assert code == 6 and "llama.cpp crashed on" in said and "GGML_ASSERT" in said
    assert "'--threads', '1'" in said, "as the command was told"


def bindings(**wrong: int) -> tuple[Any, Any]:
    """llama-cpp-python as far as it is used, with the results of some calls changed."""
    done = {"load": 1, "init": 1, "tokenize": 0, "encode": 0} | wrong
    llama = SimpleNamespace(
        llama_backend_init=lambda: None,
        llama_model_default_params=lambda: None,
        llama_model_load_from_file=lambda *_: done["load"],
        llama_model_n_embd=lambda _: 4,
    )
    vision = SimpleNamespace(
        MTMD_INPUT_CHUNK_TYPE_IMAGE=1,
        mtmd_context_params_default=lambda: SimpleNamespace(),
        mtmd_init_from_file=lambda *_: done["init"],
        mtmd_bitmap_init=lambda *_: 1,
        mtmd_bitmap_free=lambda _: None,
        mtmd_bitmap_p_ctypes=embed.ctypes.c_void_p,
        mtmd_input_chunks_init=lambda: 1,
        mtmd_input_chunks_free=lambda _: None,
        mtmd_input_chunks_size=lambda _: 1,
        mtmd_input_chunks_get=lambda *_: 1,
        mtmd_input_chunk_get_type=lambda _: 1,
        mtmd_default_marker=lambda: b"<__media__>",
        mtmd_input_text=lambda *_: embed.ctypes.c_int(0),
        mtmd_tokenize=lambda *_: done["tokenize"],
        mtmd_encode_chunk=lambda *_: done["encode"],
    )
    return llama, vision


@pytest.mark.parametrize(("given", "set_to"), [(["--threads", "3"], 3), (["--threads", "0"], None), ([], None)])
def test_the_vision_side_takes_as_many_threads_as_it_is_told(
    given: list[str], set_to: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, vision = bindings()
    settings = vision.mtmd_context_params_default()
    vision.mtmd_context_params_default = lambda: settings
    monkeypatch.setattr(embed, "_bindings", lambda: (llama, vision))
    embed.main(["--model", "t.gguf", "--mmproj", "m.gguf", *given, str(tmp_path)])
    assert vars(settings).get("n_threads") == set_to


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"load": 0}, "can't load t.gguf with m.gguf"),
        ({"init": 0}, "can't load t.gguf with m.gguf"),
        ({"tokenize": 1}, "could not tokenize the image"),
        ({"encode": 1}, "could not encode the image"),
    ],
)
def test_what_the_bindings_refuse(
    wrong: dict[str, int], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child's own errors; the bindings are rarely installed, so theirs is played."""
    monkeypatch.setattr(embed, "_bindings", lambda: bindings(**wrong))
    Image.new("RGB", (8, 8)).save(tmp_path / "000000.png")
    with pytest.raises(VerificationError, match=said):
        embed.main(["--model", "t.gguf", "--mmproj", "m.gguf", str(tmp_path)])
