"""rankwise validate: what it refuses, what it writes, what it says; and the whole command on real files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from exported import once
from parity_models import SIZES, TARGET, draw, exported_pair

from rankwise.cli import main, resolve
from rankwise.data.example import Example, Turn
from rankwise.data.label_task import LabelClass, LabelTask
from rankwise.device import validate
from rankwise.device.llama.generator import Answered, GGUFGenerator, answered
from rankwise.device.llama.runtime import Completion
from rankwise.device.scores import DOCUMENT, items, scores
from rankwise.device.sides import shipment
from rankwise.device.validation_page import draw as draw_validation
from rankwise.device.validation_page import summary
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.classify import score_labels
from rankwise.evaluate.predictions import EvaluationResult, Prediction
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import ScoredData
from rankwise.report.report import build_report

LABELS = ("water", "land", "fire")


def config(**how: Any) -> ValidateConfig:
    data = ScoredData(task="labels", data_path="dataset")
    return replace(ValidateConfig(export="exported", data=data), **how)


# --- refused before anything is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"data": ScoredData()}, "--task labels --data_path"),
        ({"data": ScoredData(task="lm_eval:arc_easy", data_path="x")}, "can be validated"),
        ({"num_samples": 0}, "--num_samples is 0; give a number of at least 1"),
        ({"top": 1}, "--top is 1; give a number of at least 2"),
        ({"min_accuracy": 85}, "--min_accuracy is 85; give a number above 0 and at most 1"),
        ({"min_agreement": 0.9, "parity_samples": 0}, "--parity_samples 0"),
        ({"tolerance": 0}, "--tolerance"),
        ({"sweep": ["q4_0"], "server": "http://phone:8080"}, "--sweep"),
        ({"sweep": ["q4_0"], "adapter_gguf": ["a.gguf"]}, "without --adapter_gguf"),
    ],
)
def test_what_cannot_work_is_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said.replace("(", r"\(")):
        validate.check(config(**how))


def test_it_must_be_clear_what_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="EXPORT_FOLDER"):
        shipment(config(export=None))
    with pytest.raises(UsageError, match="--outtype"):
        shipment(config(export=None, server="http://phone:8080"))
    with pytest.raises(DataError, match=r"export\.json"):
        shipment(config(export=str(tmp_path)))
    remote = shipment(config(export=None, server="http://phone:8080", outtype=["q8_0"], reference="merged"))
    assert (remote.forms[-1].url, remote.forms[-1].form, remote.reference) == ("http://phone:8080", "q8_0", "merged")


def test_dry_run_says_what_would_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["validate", "exported", "--task", "labels", "--data_path", "dataset", "--sweep", "q4_0"]
    said = "\n".join(validate.describe(resolve("validate", line[1:])[0]))
    assert main([*line, "--dry-run"]) == 3
    assert "exported: no such file or folder" in capsys.readouterr().err
    assert "parity ladder on up to 32 items" in said
    assert "q4_0" in said


# --- numbers ---------------------------------------------------------------------------------------------------------


def labelled(answers: list[tuple[str, str]]) -> tuple[list[Prediction], list[Example]]:
    """(true label, text) pairs as predictions with their examples."""
    examples = [
        Example(
            f"{number:05d}",
            str(number),
            (Turn("user", "<image>\nElement:"), Turn("assistant", label)),
            references=(label,),
            images=(f"{number}.png",),
            facts={"label": label, "labels": LABELS},
        )
        for number, (label, _) in enumerate(answers)
    ]
    predictions = [
        Prediction(one.id, "…", said, one.references, None, one.images)
        for one, (_, said) in zip(examples, answers, strict=True)
    ]
    return predictions, examples


ANSWERS = [("water", "water"), ("water", "Water."), ("land", "fire"), ("fire", "it is fire"), ("fire", "metal?")]


@pytest.fixture
def content() -> dict[str, Any]:
    """A validation of five items, as the stage writes it."""
    predictions, examples = labelled(ANSWERS)
    found = score_labels(predictions, examples, labels=LABELS)
    result = EvaluationResult("labels", found.metrics, found.intervals, found.n, {"scoring": found.details})
    facts = scores(result, predictions, examples) | {"latency": {"median": 0.2, "p95": 0.3}, "memory": 2**30}
    rung = {"name": "pixels", "status": "broken", "measured": {"pictures": 5}, "threshold": {}, "why": "white | margin"}
    return {
        "format": DOCUMENT.format,
        "outtype": "q8_0",
        **facts,
        "reference": scores(result, predictions, examples),
        "base": None,
        "by_outtype": {"f16": facts, "q8_0": facts},
        "against_reference": None,
        "gain": {"q8_0": {"gain": {}, "kept": None, "why": "too little"}},
        "parity": {form: {"first_broken": "pixels", "rungs": [rung]} for form in ("f16", "q8_0")},
        "verdict": ["Conversion error: f16."],
        "failures": ["f16: the rung `pixels` is broken"],
        "predictions": items("labels", predictions, examples, {"00000": Answered(0.2, 0.9, 2, 50)}),
    }


def test_numbers_of_labels_are_shares_counted_by_hand(content: dict[str, Any]) -> None:
    assert content["accuracy"] == pytest.approx(3 / 5)
    assert content["interval"][0] < 0.6 < content["interval"][1]
    assert content["majority_baseline"] == {"label": "water", "accuracy": 0.4}
    assert content["confusion_matrix"] == [[2, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert content["confusion_columns"] == ["water", "land", "fire", "unparsed"]
    assert content["unparsed"] == 1
    assert content["per_class"]["fire"] == {"precision": 0.5, "recall": 0.5, "f1_score": 0.5, "support": 2}
    assert content["macro_f1"] == pytest.approx((1 + 0 + 0.5) / 3)
    first, *_, last = content["predictions"]
    assert first == {
        "image_id": "00000",
        "images": ["0.png"],
        "true_label": "water",
        "predicted_label": "water",
        "raw_output": "water",
        "correct": True,
        "confidence": 0.9,
        "latency": 0.2,
    }
    assert (last["predicted_label"], last["correct"], last["confidence"]) == ("unparsed", False, None)


def test_confidence_is_the_probability_of_the_whole_answer(tmp_path: Path) -> None:
    def completion(logprobs: tuple[float, ...]) -> Completion:
        return Completion("a b", (1, 2), 9, "…", 0.5, True, logprobs)

    assert answered(completion((-0.5, -0.25))).confidence == pytest.approx(2.718281828**-0.75)
    assert answered(completion(())).confidence is None  # not told is not certain

    class Asked:
        def complete(self, prompt: str, images: Any = (), **how: Any) -> Completion:
            assert how["top"] == 1, "log-probabilities are told where they are asked for"
            return completion((-0.5,))

    class Renders:
        def prompt(self, example: Example) -> Any:
            return SimpleNamespace(input_ids=[1] * 9, images=())

        text = answer = staticmethod(lambda ids: "a b")

    engine = GGUFGenerator(Asked(), Renders(), record=tmp_path / "answers.jsonl")  # type: ignore[arg-type]
    for found in engine.generate(labelled(ANSWERS)[1]):
        kept = engine.answers()
        assert len(kept) == found.position + 1, "on the disk before the answer is handed on"
    assert kept["00000"] == Answered(0.5, pytest.approx(2.718281828**-0.5), 2, 9)


def test_limits_that_are_missed_are_failures(content: dict[str, Any]) -> None:
    class Missed:
        accuracy, ladder = 0.6, None

    assert validate.failures(config(min_accuracy=0.5), {"q8_0": Missed()}) == []  # type: ignore[dict-item]
    lines = validate.failures(config(min_accuracy=0.7), {"q8_0": Missed()})  # type: ignore[dict-item]
    assert lines == ["q8_0: accuracy 0.600 is below --min_accuracy 0.7"]


# --- shown -----------------------------------------------------------------------------------------------------------


def test_summary_and_report_tell_the_verdict_and_the_classes(tmp_path: Path, content: dict[str, Any]) -> None:
    lines = "\n".join(summary(content))
    assert lines.startswith("Conversion error: f16.")
    assert re.search(r"accuracy +60\.0 % \[", lines)
    assert lines.count("5 by generation") == 3, "beside every score"
    assert "gain kept by q8_0 is undefined: too little" in lines
    (tmp_path / "validation.json").write_text(json.dumps(content))
    drawn = draw_validation(content, tmp_path)
    assert drawn["confusion_matrix"].read_bytes()[:4] == b"\x89PNG"
    page = build_report(tmp_path).read_text()
    assert "Conversion error: f16." in page
    assert "white | margin" in page
    assert page.count("What was taken for what") >= 1
    assert "Always water: accuracy 0.400." in page
    (tmp_path / "validation.json").write_text(json.dumps({"format": DOCUMENT.format}))
    with pytest.raises(DataError, match="incomplete: outtype, by_outtype"):
        DOCUMENT.read(tmp_path / "validation.json")


# --- the whole command -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tuned/ and base/ of `exported_pair`, and dataset/: four pictures in three classes."""
    pytest.importorskip("xllamacpp")
    folder = exported_pair(tmp_path_factory)
    once(folder / "dataset", labelled_pictures)
    return folder


def labelled_pictures(dataset: Path) -> None:
    draw(dataset / "images")
    TARGET.save(dataset)
    classes = tuple(LabelClass(name) for name in LABELS)
    question = f"{', '.join(LABELS)}: which one is it?"
    LabelTask("elements", "element", classes, question, f"{question} Element:").save(dataset)
    rows = [
        {"image_id": f"{n:05d}_{name}", "image_path": f"images/{name}.png", "element": LABELS[n % 3], "reason": "so"}
        for n, name in enumerate(SIZES)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train.jsonl", "val.jsonl"):
        (dataset / name).write_text(lines)


@pytest.mark.slow
def test_another_build_than_the_devices_is_said(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """device.json names what the phone has; the answers are another build's."""
    export = Path(shutil.copytree(shipped / "tuned" / "export", tmp_path / "export"))
    replace(TARGET, runtime_build="b10257-22dc605c4").save(export)
    arguments = ["validate", str(export), "--task", "labels", "--data_path", str(shipped / "dataset")]
    arguments += ["--outtype", "f16", "--parity_samples", "0", "--num_samples", "1", "--threads", "1"]
    assert main([*arguments, "-o", str(tmp_path / "validation")]) == 0
    said = capsys.readouterr().out
    assert "note: f16: answered by xllamacpp " in said and "validated on b10257-22dc605c4" in said


@pytest.mark.slow
def test_the_whole_command(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "validation"
    arguments = [
        *("validate", str(shipped / "tuned" / "export"), "--task", "labels", "--data_path", str(shipped / "dataset")),
        *("--base_model", str(shipped / "base" / "model"), "--threads", "1", "-o", str(out)),
        *("--sweep", "q8_0"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "What runs in llama.cpp is what was trained (f16, q8_0)" in said
    content = json.loads((out / "validation.json").read_text())
    assert content["outtype"] == "q8_0"
    assert content["n"] == 4
    assert content["accuracy"] == sum(row["correct"] for row in content["predictions"]) / 4
    assert all(row["latency"] > 0 for row in content["predictions"])
    assert all(row["confidence"] is None or 0 <= row["confidence"] <= 1 for row in content["predictions"])
    assert set(content["parity"]) == {"f16", "q8_0"}
    assert content["parity"]["f16"]["first_broken"] is None
    assert set(content["floor"]) >= {"attention", "padded", "float16", "bfloat16", "q8_0"}
    assert content["gain"]["q8_0"]["kept"] is None  # a random model gains nothing
    assert content["memory"] > 2**20
    assert [form["form"] for form in content["sweep"]["forms"]] == ["f16", "q8_0"]
    assert json.loads((out / "sweep.json").read_text()) == content["sweep"]
    assert "against the largest" in build_report(out).read_text()
    assert (out / "plots" / "confusion_matrix.png").is_file()
    assert (out / "q8_0" / "predictions.jsonl").is_file()
    before = (out / "q8_0" / "answers.jsonl").read_text()
    assert main([*arguments, "--min_accuracy", "1.0"]) == 6  # nothing is answered again, and the limit is looked at
    assert (out / "q8_0" / "answers.jsonl").read_text() == before
    assert json.loads((out / "validation.json").read_text())["failures"]
    assert "--min_accuracy" in capsys.readouterr().err


@pytest.mark.slow
def test_a_file_of_the_base_is_found_out(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The reference is not the model that the file was made from: exit 6 after everything is written."""
    arguments = [
        *("validate", str(shipped / "tuned" / "export" / "model-f16.gguf")),
        *(
            "--mmproj",
            str(shipped / "tuned" / "export" / "mmproj-model-f16.gguf"),
            "--reference",
            str(shipped / "base" / "model"),
        ),
        *("--task", "labels", "--data_path", str(shipped / "dataset"), "-o", str(tmp_path / "out")),
        *("--threads", "1"),
    ]
    assert main(arguments) == 6
    content = json.loads((tmp_path / "out" / "validation.json").read_text())
    assert content["outtype"] == "f16"
    assert content["parity"]["f16"]["first_broken"] in ("embeddings", "logprobs")  # the first where they are told
    assert "Conversion error" in capsys.readouterr().out


@pytest.mark.slow
def test_in_a_recipe_another_model_is_validated_anew(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the same folder; answers there that the recipe has not made are refused, and stay."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out" / "validation"
    stage = f"command: validate, task: labels, data_path: {shipped / 'dataset'}, outtype: f16, parity_samples: 0"
    exported = {name: shutil.copytree(shipped / name / "export", tmp_path / name) for name in ("tuned", "base")}
    recipe.write_text(
        f"stages: [{{{stage}, threads: 1, max_new_tokens: 4, export: {exported['tuned']}, "
        "output_dir: '${run}/validation'}]\n"
    )

    def run(*flags: str) -> tuple[int, str]:
        code = main(["run", str(recipe), "-o", str(tmp_path / "out"), *flags])
        return code, capsys.readouterr().err

    def answers(folder: Path) -> dict[str, str]:
        return {str(file.relative_to(folder)): file.read_text() for file in sorted(folder.rglob("*.jsonl"))}

    sweep = ("--set", "validate.sweep=q8_0")
    assert run(*sweep)[0] == 0
    first = answers(out)
    assert {"trained/predictions.jsonl", "f16/answers.jsonl", "sweep/q8_0/answers.jsonl"} <= first.keys()
    assert run(*sweep, "--set", "validate.max_new_tokens=5")[0] == 0
    assert run("--set", f"validate.export={exported['base']}")[0] == 0
    second = answers(out)
    assert second.keys() == first.keys()
    assert second["trained/predictions.jsonl"] != first["trained/predictions.jsonl"]
    own = tmp_path / "own"
    shutil.copytree(out, own)
    for more in (("--set", "validate.max_new_tokens=3"), ("--set", "validate.seed=1")):
        code, error = run("--set", f"validate.output_dir={own}", *more)
        assert code == 2 and "choose another output folder" in error
        assert answers(own) == second


@pytest.mark.parametrize("how", [{"write_cases": "cases"}, {"cases": "cases", "answers": "got.jsonl"}])
def test_a_hand_off_has_nothing_to_start_over_from(how: dict[str, str]) -> None:
    """A recipe asks every stage what an earlier run has left: this one has no export to look into."""
    assert validate.earlier(ValidateConfig(**how)) == []
    assert validate.earlier(ValidateConfig(server="http://phone:8080/v1", reference="tuned")) == []
