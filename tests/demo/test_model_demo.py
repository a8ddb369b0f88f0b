"""Laws of `demo --model`: the sizes fit the time, the chain makes everything it promises, and what is no chat model is
refused before anything is made."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise import cli
from rankwise.demo import command as demo
from rankwise.demo.chat_model import LEAST, MOST, ROWS, RUNS, MeasuredCosts, sizes_for
from rankwise.demo.restaurants import guide
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.tiny import random_llama, save_vision_tokenizer
from rankwise.options.commands import DemoConfig

TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
SECONDS = st.floats(1e-3, 1e3)


@given(SECONDS, SECONDS, st.floats(0.1, 600))
def test_sizes_fit_the_time_and_never_grow_with_the_costs(step: float, answer: float, minutes: float) -> None:
    sizes, slower = (sizes_for(MeasuredCosts(factor * step, factor * answer), minutes) for factor in (1, 2))
    counts, fewer = ({name: getattr(one, name) for name in LEAST} for one in (sizes, slower))
    assert all(LEAST[name] <= fewer[name] <= counts[name] <= MOST[name] for name in LEAST)
    spent = (RUNS * sizes.advise_steps + sizes.train_steps) * step + (2 * sizes.scored + 4 * sizes.validated) * answer
    assert sizes.seconds == pytest.approx(spent)
    if all(counts[name] > LEAST[name] for name in LEAST):
        assert sizes.seconds <= 60 * minutes * 0.75, "a quarter is left to load, merge and export"


def test_the_real_run_has_as_many_steps_as_were_chosen() -> None:
    sizes = sizes_for(MeasuredCosts(1.0, 1.0), 15)
    (epochs,) = (change.split("=")[1] for change in sizes.changes(15, 1100) if change.startswith("advise.num_epochs"))
    assert float(epochs) * 1100 / ROWS == pytest.approx(sizes.train_steps, abs=0.1)


def chat_model(folder: Path) -> Path:
    """A random Llama with a chat template of its own."""
    tokenizer = save_vision_tokenizer(folder, guide(random.Random(0), 200), 400)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    random_llama(tokenizer, 0).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_chat_model_of_ones_own_goes_the_whole_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, folder = chat_model(tmp_path / "chat"), tmp_path / "demo"
    line = ["demo", "--model", str(model), "--minutes", "0.1", "-o", str(folder)]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "a step of 4 rows takes" in printed and str(folder / "report.html") in printed.splitlines()[-1]
    wanted = ("data/trainset.csv", "advise/advice.yaml", "train/adapter_config.json", "report.html")
    assert not [name for name in wanted if not (folder / name).exists()] and not (folder / "base").exists()
    sizes = json.loads((folder / "sizes.json").read_text())["sizes"]
    assert EvaluationResult.load(folder / "after").n == EvaluationResult.load(folder / "before").n == sizes["scored"]
    assert json.loads((folder / "train" / "input.json").read_text())["prompt"] == "chat"
    steps = json.loads((folder / "train" / "manifest.json").read_text())["stages"]["train"]["steps"]
    assert 0.9 * sizes["train_steps"] <= steps <= sizes["train_steps"] + 1, "a twentieth of the rows is held out"
    assert cli.main(line) == 0
    assert capsys.readouterr().out.count("done already") == (5 if demo.lacking_parts() else 8), "nothing again"


def test_what_is_no_chat_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = chat_model(tmp_path / "plain")
    (model / "chat_template.jinja").unlink()
    for words, said in (
        (["--model", str(model)], "no chat template"),
        (["--model", str(model), "--vision"], "leave them out, or --model"),
        (["--minutes", "3"], "--minutes is for --model"),
        (["--model", str(model), "--minutes", "3", "--quick"], "leave out --minutes"),
    ):
        assert cli.main(["demo", *words, "-o", str(tmp_path / "demo")]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "demo").exists()


def test_a_folder_is_named_after_its_model() -> None:
    names = {"org/Model-1B": "demo-Model-1B", "m/SmolLM2.Q4_1.gguf": "demo-SmolLM2.Q4_1"}
    assert {name: str(demo.run_folder(DemoConfig(model=name))) for name in names} == {
        name: f"runs/{folder}" for name, folder in names.items()
    }
