"""The evaluation harness on a model of ours: its numbers are those of a plain forward pass, mapped into our file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from rows import adapted_base
from tiny import tiny_llama
from transformers import AutoTokenizer

from rankwise import cli
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.harness import evaluate_harness, read_metrics
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.adapters import save_adapter
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import is_harness

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval.models.huggingface", reason="extra: harness")

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness and `datasets` have their own

QUESTIONS = ["The pub is", "Prices are", "Near the river it is", "The food is", "Its name is", "A star is"]
CHOICES = ("good", "not so good")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), initializer_range=0.3)


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """An adapter that matters: what runs is base and adapter together."""
    adapted = adapted_base(base)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    return adapted.eval()


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": text, "label": number % 2} for number, text in enumerate(QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(
        f"task: tiny_choice\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/rows.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        f"doc_to_choice: {json.dumps(CHOICES)}\ndoc_to_target: label\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\nmetadata:\n  version: 3\n"
    )
    (folder / "broken.yaml").write_text(
        f"task: tiny_broken\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/none.jsonl\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        f"doc_to_choice: {json.dumps(CHOICES)}\ndoc_to_target: label\nmetric_list:\n  - metric: acc\n"
    )
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask:\n  - tiny_choice\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    )
    (folder / "bare.yaml").write_text("group: tiny_bare\ntask:\n  - tiny_choice\n")
    return folder


def likelier(model: Any, tokenizer: Any, question: str) -> int:
    """Which choice has the larger log-likelihood behind the question."""
    start = len(tokenizer(question)["input_ids"])
    values = []
    for choice in CHOICES:
        ids = tokenizer(f"{question} {choice}")["input_ids"]
        with torch.no_grad():
            steps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        values.append(sum(float(steps[place - 1, ids[place]]) for place in range(start, len(ids))))
    return values.index(max(values))


def test_accuracy_is_that_of_a_plain_forward_pass(model: Any, base: Path, tasks: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    right = [likelier(model, tokenizer, text) == number % 2 for number, text in enumerate(QUESTIONS)]
    result = evaluate_harness("lm_eval:tiny_choice", model, tokenizer, EvaluateConfig(lm_eval_tasks_path=str(tasks)))
    accuracy = sum(right) / 6
    assert (result.task, result.n) == ("lm_eval:tiny_choice", 6)
    assert result["acc"] == pytest.approx(accuracy)
    assert result.intervals["acc"] == pytest.approx(bootstrap.wilson(sum(right), 6))
    assert result.settings["task_versions"] == {"tiny_choice": 3}
    assert result.versions["lm_eval"]


def test_limit_and_worked_examples_reach_the_harness(model: Any, base: Path, tasks: Path) -> None:
    settings = EvaluateConfig(lm_eval_tasks_path=str(tasks), num_samples=4, num_fewshot=0)
    result = evaluate_harness("lm_eval:tiny_choice", model, AutoTokenizer.from_pretrained(base), settings)
    assert (result.n, result.settings["n_shot"]) == (4, {"tiny_choice": 0})


def test_a_group_gives_its_own_number_and_those_of_its_parts(model: Any, base: Path, tasks: Path) -> None:
    tokenizer, settings = AutoTokenizer.from_pretrained(base), EvaluateConfig(lm_eval_tasks_path=str(tasks))
    result = evaluate_harness("lm_eval:tiny_group", model, tokenizer, settings)
    alone = evaluate_harness("lm_eval:tiny_choice", model, tokenizer, settings)
    assert (result["acc"], result.n) == (alone["acc"], 6)
    assert result.settings["by_task"] == {"tiny_choice": {"acc": alone["acc"]}}
    with pytest.raises(UsageError, match="choose one of its tasks: tiny_choice"):
        evaluate_harness("lm_eval:tiny_bare", model, tokenizer, settings)


@pytest.mark.slow  # the harness reads its thousands of task files to say what is near
def test_unknown_tasks_and_missing_data_are_named(model: Any, base: Path, tasks: Path) -> None:
    tokenizer, settings = AutoTokenizer.from_pretrained(base), EvaluateConfig(lm_eval_tasks_path=str(tasks))
    with pytest.raises(UsageError, match="did you mean tiny_choice"):
        evaluate_harness("lm_eval:tiny_choise", model, tokenizer, settings)
    with pytest.raises(DataError, match="tiny_broken: the harness cannot load its data"):
        evaluate_harness("lm_eval:tiny_broken", model, tokenizer, settings)


def test_the_command_scores_an_adapter_and_writes_the_file(
    model: Any, base: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(base))
    words = ["evaluate", str(tmp_path / "adapter"), "--task", "lm_eval:tiny_choice", "-o", str(tmp_path / "out")]
    assert cli.main([*words, "--lm_eval_tasks_path", str(tasks), "--device", "cpu"]) == 0
    result = EvaluationResult.load(tmp_path / "out")
    assert f"lm_eval:tiny_choice, n = 6: acc {result['acc']:.4f} [" in capsys.readouterr().out
    assert set(result.settings["made_from"]) == {"model", "adapter"}


def test_names_of_filters_and_missing_errors() -> None:
    row = {
        "alias": "gsm8k",
        "exact_match,strict-match": 0.25,
        "exact_match_stderr,strict-match": 0.01,
        "exact_match,none": 0.5,
        "exact_match_stderr,none": "N/A",
        "sample_len": 7,
    }
    assert read_metrics(row) == (
        {"exact_match_strict-match": 0.25, "exact_match": 0.5},
        {"exact_match_strict-match": 0.01},
    )
    assert is_harness("lm_eval:arc_easy") and not is_harness("e2e_nlg") and not is_harness(None)
