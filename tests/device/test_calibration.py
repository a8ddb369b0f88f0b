"""An importance matrix of the task's own rows: the sums are those of llama-imatrix, pictures are in them, scored items
are not."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from bundled import dataset
from PIL import Image
from served import text_gguf, text_model
from test_imatrix import TAKES, matrix_of
from test_quantize import binary
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.cli import main
from rankwise.data.renderer_for import renderer_for
from rankwise.device.calibration import linear_layers, ran, summed
from rankwise.device.parity.reference import inputs_of
from rankwise.errors import DataError
from rankwise.evaluate.tasks import task
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.imatrix import COUNTS, SUMS
from rankwise.gguf.quantize import MATRIX_KEY
from rankwise.gguf.reading import read_export
from rankwise.models.load import load_config, load_model
from rankwise.options.sections import DataSection, ModelSection

pytest.importorskip("xllamacpp")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shipbench_gguf import altered

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Run = Callable[..., int]
LOGS = "\nopen(Path(__file__).with_name('calls'), 'a').write(sys.argv[7] + '\\n')\n"


# --- the sums ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_sums_are_of_what_every_layer_is_given_pictures_included(shipped: Path) -> None:
    export = read_export(shipped / "export")
    name = str(export.content["model"]["path"])
    model = load_model(name, torch.float32).eval()
    section = DataSection(task="labels", data_path=str(shipped / "dataset"), device_target=str(shipped / "export"))
    renderer = renderer_for(section, ModelSection(), name, load_config(name))
    [row, *_] = task("labels").examples(section.data_path, "train", section)
    layers = linear_layers(model, GGUFFile(export.text("f16")))
    assert len(layers) == 3 * 7 and not any("vision" in path for path in layers)
    with summed(layers) as sums:
        tokens = ran(model, renderer, row)
    rendered = renderer.training(row)
    assert tokens == len(rendered.input_ids)
    placeholder = renderer.sight.placeholder_id
    assert rendered.input_ids.count(placeholder) >= 16
    states = model(**inputs_of(model, renderer, rendered), output_hidden_states=True).hidden_states
    for number, layer in enumerate(model.get_decoder().layers):
        given = layer.input_layernorm(states[number])[0].double().square().sum(0)
        for kind in ("attn_q", "attn_k", "attn_v"):
            torch.testing.assert_close(sums[f"blk.{number}.{kind}.weight"], given, rtol=1e-4, atol=1e-6)


def test_a_file_of_another_model_is_not_calibrated(shipped: Path) -> None:
    """Same names, same shapes; the columns of the weights tell."""
    export = read_export(shipped / "export")
    base = load_model(str(Path(export.content["model"]["path"]).parent / "base"), torch.float32)
    with pytest.raises(DataError, match="other inputs there"):
        linear_layers(base, GGUFFile(export.text("f16")))


@pytest.mark.skipif(not shutil.which("llama-imatrix"), reason="llama-imatrix is not on the PATH (llama.cpp-tools)")
@torch.inference_mode()
def test_sums_are_those_of_llama_imatrix(tmp_path: Path) -> None:
    size, text = 32, "The Vaults pub near Café Adriatic has a 5 star rating. Prices start at £30. " * 6
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    options = ["-c", str(size), "-b", str(size), "-ub", str(size), "--no-ppl", "-t", "1"]
    command = ["llama-imatrix", "-m", str(text_gguf("f32")), "-f", "text.txt", "-o", "imatrix.gguf", *options]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    made = GGUFFile(tmp_path / "imatrix.gguf")
    model = AutoModelForCausalLM.from_pretrained(text_model(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(text_model())
    ids = tokenizer(text)["input_ids"]
    chunks = [[tokenizer.bos_token_id, *ids[at + 1 : at + size]] for at in range(0, len(ids) - size + 1, size)]
    layers = linear_layers(model, GGUFFile(text_gguf("f32")))
    with summed(layers) as sums:
        for chunk in chunks:
            model(input_ids=torch.tensor([chunk]))
    assert {name.removesuffix(SUMS) for name in made.tensors if name.endswith(SUMS)} == set(sums)
    for name, found in sums.items():
        assert made.tensor(name + COUNTS).flatten().tolist() == [size * len(chunks)]
        torch.testing.assert_close(made.tensor(name + SUMS).flatten().double(), found, rtol=5e-3, atol=1e-4)


# --- rankwise validate --sweep ----------------------------------------------------------------------------------------


@pytest.fixture
def run(shipped: Path, tmp_path: Path) -> Run:
    """The command on two items of a copy of the export, with a llama-quantize that only states its matrix."""
    export = Path(shutil.copytree(shipped / "export", tmp_path / "export"))
    tool = binary(tmp_path / "llama.cpp", TAKES + LOGS)

    def validate(data: Path, *more: str) -> int:
        words = ["validate", str(export), "--task", "labels", "--data_path", str(data), "--threads", "1"]
        words += ["--outtype", "f16", "--num_samples", "2", "--max_new_tokens", "2", "--parity_samples", "0"]
        return main([*words, "-o", str(tmp_path / "out"), "--llama_cpp_dir", str(tool), *more])

    return validate


def with_other_rows(folder: Path, count: int = 4) -> Path:
    """The labelled pictures, with training rows of their own."""
    dataset(folder)
    noise, rows = np.random.default_rng(9), []
    for number in range(count):
        name = f"images/train-{number}.png"
        Image.fromarray(noise.integers(1, 256, (50, 70, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"image_id": f"t{number}", "image_path": name, "element": ("water", "fire")[number % 2]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_rows_that_are_scored_are_not_calibrated_on(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """train.jsonl and val.jsonl are the same here. Nothing is answered, nothing is made."""
    data = dataset(tmp_path / "dataset")
    assert run(data, "--sweep", "iq2_xs", "--calibration_samples", "6") == 3
    said = capsys.readouterr().err
    assert "2 of the 6 calibration rows are among the items that are scored (0, 1)" in said
    assert "--calibration_data" in said
    assert not list((tmp_path / "out").rglob("*.jsonl")) and not list(tmp_path.rglob("imatrix*"))
    other = with_other_rows(tmp_path / "other") / "val.jsonl"
    assert run(data, "--sweep", "iq2_xs", "--calibration_samples", "6", "--calibration_data", str(other)) == 3
    assert "2 of the 6 calibration rows are among" in capsys.readouterr().err, "the same pictures, elsewhere"


@pytest.mark.slow
def test_the_sweep_is_made_with_the_matrix_of_its_own_rows(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_other_rows(tmp_path / "dataset")
    arguments = ("--sweep", "iq2_xs,q4_0", "--calibration_samples", "3")
    assert run(data, *arguments) == 0
    swept = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert {row["form"] for row in swept["forms"]} == {"f16", "iq2_xs", "q4_0"}
    assert (swept["imatrix"]["rows"], swept["imatrix"]["pictures"]) == (3, 3)
    assert "importance matrix (labels: 3 rows, 3 pictures)" in capsys.readouterr().out
    for form in ("iq2_xs", "q4_0"):
        stated = GGUFFile(tmp_path / "export" / f"model-imatrix-{form}.gguf").metadata
        assert stated[MATRIX_KEY] == swept["imatrix"]["sha256"]
        assert (stated["quantize.imatrix.entries_count"], stated["quantize.imatrix.chunks_count"]) == (21, 3)
    calls = tmp_path / "llama.cpp" / "build" / "bin" / "calls"
    assert calls.read_text().split() == ["IQ2_XS", "Q4_0"]
    assert run(data, *arguments) == 0, "what is there is taken"
    assert calls.read_text().split() == ["IQ2_XS", "Q4_0"]
    assert run(data, *arguments, "--seed", "1", "-o", str(tmp_path / "again")) == 0, "of other rows it is made again"
    assert calls.read_text().split() == ["IQ2_XS", "Q4_0"] * 2


def test_a_matrix_that_does_not_fit_is_refused_before_anything_is_answered(
    run: Run, text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = dataset(tmp_path / "dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        assert run(data, "--sweep", "iq2_xs", "--imatrix", str(tmp_path), "--llama_cpp_dir", str(tmp_path)) == 2
    assert "llama-quantize, which takes an importance matrix, is not installed" in capsys.readouterr().err
    other = matrix_of(GGUFFile(text_export / "model-f16.gguf"), tmp_path / "imatrix.gguf")
    fewer = tmp_path / "fewer.gguf"
    cut(other.path, fewer)
    assert run(data, "--sweep", "iq2_xs", "--imatrix", str(fewer)) == 3
    assert "the importance matrix of another model than" in capsys.readouterr().err
    assert run(data, "--sweep", "iq2_xs") == 2
    assert "iq2_xs needs an importance matrix" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.jsonl"))


def cut(matrix: Path, out: Path) -> None:
    """The matrix without the last layer's."""
    with altered(matrix, out) as draft:
        draft.tensors = {name: value for name, value in draft.tensors.items() if not name.startswith("blk.2.")}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "granitemoe"])
def test_a_mixtures_experts_are_refused_by_name(family: str, mixtures: Path) -> None:
    """Fused experts are no linear layers in transformers: llama-imatrix has to make their matrix."""
    model = load_model(str(mixtures / family / "model"), torch.float32)
    with pytest.raises(DataError, match=r"_exps\.weight.*: no linear layer of its own in transformers.*--imatrix"):
        linear_layers(model, GGUFFile(mixtures / family / "export" / "model-f16.gguf"))
