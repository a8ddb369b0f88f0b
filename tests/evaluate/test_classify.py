"""Labels by likelihood: the numbers of a plain forward pass over training's own tokens; and what guesses are worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rankwise.data.example import Example, Turn
from rankwise.data.label_answer import found_label
from rankwise.data.render import Renderer
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.classify import UNPARSED, ByLikelihood, class_table, confusion_table, score_labels
from rankwise.evaluate.classify import _resampled as resampled
from rankwise.evaluate.generate import GenerationSettings, HFGenerator, LabelScores
from rankwise.evaluate.likelihood import render_answers
from rankwise.evaluate.predictions import EvaluationResult, Prediction, predict
from rankwise.evaluate.tasks import evaluate, task

LABELS = ("entailment", "neutral", "contradiction")


def example(name: str, label: str = "neutral", premise: str = "A man sleeps.") -> Example:
    turns = (
        Turn("user", "Say how the hypothesis relates to the premise.", "Instruction"),
        Turn("user", premise, "Premise"),
        Turn("user", "A person rests.", "Hypothesis"),
        Turn("assistant", label, "Classification"),
    )
    return Example(name, name, turns, references=(label,), facts={"label": label, "labels": LABELS})


MIXED = [
    example(f"m{n}", label, "It rains. " * n) for n, label in zip((3, 1, 9, 2, 5), (*LABELS, *LABELS), strict=False)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tiny_llama(
        tmp_path_factory.mktemp("model"), initializer_range=0.3, tokenizer={"chat_template": CHAT_TEMPLATE}
    )
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(params=["sections", "chat"])
def renderer(model: PreTrainedModel, request: pytest.FixtureRequest) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(model.name_or_path), style=request.param, reserve=30)


def scored(model: PreTrainedModel, renderer: Renderer, batch_size: int = 7, **how: Any) -> list[LabelScores]:
    generator = HFGenerator(model, renderer, GenerationSettings(batch_size=batch_size, **how))
    found = {each.position: each for each in generator.label_scores(MIXED, LABELS)}
    return [found[position] for position in range(len(MIXED))]


# --- log-likelihoods ---------------------------------------------------------------------------------------------


def test_a_label_is_judged_on_the_tokens_that_training_sees(renderer: Renderer) -> None:
    for row, group in zip(MIXED, render_answers(renderer, MIXED, LABELS), strict=True):
        prompt = renderer.prompt_ids(row)
        for label, rendered in zip(LABELS, group, strict=True):
            trained = renderer.training(
                replace(row, turns=(*row.turns[:-1], Turn("assistant", label, "Classification")))
            )
            assert rendered.input_ids[: len(prompt)] == prompt
            assert rendered.input_ids == trained.input_ids
            assert rendered.labels == trained.labels
            assert rendered.input_ids[-1] in renderer.end_ids


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_log_likelihoods_are_sums_over_a_plain_forward_pass(
    model: PreTrainedModel, renderer: Renderer, batch_size: int
) -> None:
    groups = render_answers(renderer, MIXED, LABELS)
    for row, found, group in zip(MIXED, scored(model, renderer, batch_size), groups, strict=True):
        for label, rendered in zip(LABELS, group, strict=True):
            ids = rendered.input_ids
            start = len(renderer.prompt_ids(row))
            with torch.no_grad():
                steps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            expected = sum(float(steps[place - 1, ids[place]]) for place in range(start, len(ids)))
            assert found.log_likelihoods[label] == pytest.approx(expected, abs=1e-4)
        assert found.prompt == renderer.text(renderer.prompt_ids(row))


def test_labels_with_their_end_are_disjoint_events(model: PreTrainedModel, renderer: Renderer) -> None:
    totals = [sum(math.exp(value) for value in found.log_likelihoods.values()) for found in scored(model, renderer)]
    assert all(0 < total <= 1 for total in totals)


def test_order_of_work_changes_nothing(model: PreTrainedModel, renderer: Renderer) -> None:
    for first, second in zip(scored(model, renderer), scored(model, renderer, length_sorted=False), strict=True):
        assert first.log_likelihoods == pytest.approx(second.log_likelihoods, abs=1e-4)


def test_a_cut_source_is_cut_alike_for_all_labels(model: PreTrainedModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    renderer = Renderer(tokenizer, max_length=200, overlong="truncate_source", reserve=30)
    long = example("long", premise="It rains. " * 60)
    [rows] = render_answers(renderer, [long], LABELS)
    prompt = renderer.prompt_ids(long)
    assert renderer.prompt(long).truncated
    assert all(row.input_ids[: len(prompt)] == prompt and len(row.input_ids) <= 200 for row in rows)


def test_likelihood_finds_what_a_model_was_trained_to_say(tmp_path: Path) -> None:
    """A model that is taught one label per premise by plain gradient steps is right on every one of them."""
    folder = tiny_llama(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    renderer = Renderer(AutoTokenizer.from_pretrained(folder), reserve=30)
    rows = [
        example(f"t{n}", label, text)
        for n, (label, text) in enumerate(zip(LABELS, ("aaaa", "bbbb", "cccc"), strict=True))
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        for row in rows:
            rendered = renderer.training(row)
            model(input_ids=torch.tensor([rendered.input_ids]), labels=torch.tensor([rendered.labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    result = evaluate(task("multi_nli"), HFGenerator(model, renderer), rows, tmp_path / "out")
    assert isinstance(result, EvaluationResult)
    assert result["accuracy"] == 100


# --- the file of predictions -------------------------------------------------------------------------------------


@dataclass
class Fixed:
    """An engine with given scores that counts what it is asked."""

    values: Sequence[float] = (-3.0, -1.0, -2.0)
    settings: dict[str, Any] = field(default_factory=lambda: {"engine": "fixed", "max_new_tokens": 128, "seed": 1})
    asked: list[str] = field(default_factory=list)

    def generate(self, examples: Sequence[Example]) -> Iterator[Any]:
        raise AssertionError("labels are not generated")

    def label_scores(self, examples: Sequence[Example], labels: Sequence[str]) -> Iterator[LabelScores]:
        for number, row in enumerate(examples):
            self.asked.append(row.id)
            yield LabelScores(number, f"prompt of {row.id}", dict(zip(labels, self.values, strict=True)))


def test_scores_are_recorded_and_resume_whatever_the_decoding(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    predict(ByLikelihood(Fixed(), LABELS), MIXED[:2], path)
    other = Fixed(settings={"engine": "fixed", "max_new_tokens": 5, "seed": 9})
    found = predict(ByLikelihood(other, LABELS), MIXED, path)
    assert other.asked == [row.id for row in MIXED[2:]]
    assert {each.prediction for each in found} == {"neutral"}
    row = json.loads(path.read_text().splitlines()[0])
    assert row["scores"] == dict(zip(LABELS, (-3.0, -1.0, -2.0), strict=True))
    with pytest.raises(UsageError, match="labels"):
        predict(ByLikelihood(other, LABELS[:2]), MIXED, path)


def test_a_tie_goes_to_the_first_label_and_is_counted(tmp_path: Path) -> None:
    predictions = predict(ByLikelihood(Fixed((-2.0, -1.0, -1.0)), LABELS), MIXED, tmp_path / "p.jsonl")
    assert {each.prediction for each in predictions} == {"neutral"}
    assert score_labels(predictions, MIXED, labels=LABELS).details["ties"] == 5


# --- what guesses are worth --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("neutral", "neutral"),
        ("The answer is Contradiction, not neutral.", None),
        ("The answer is Contradiction.", "contradiction"),
        ("ENTAILMENT", "entailment"),
        ("not_entailment", None),
        ("neutrality", None),
        ("I cannot say.", None),
        ("", None),
    ],
)
def test_the_only_label_named_counts(text: str, label: str | None) -> None:
    assert found_label(text, LABELS) == label


def predictions_of(texts: Sequence[str]) -> list[Prediction]:
    return [Prediction(f"x{n}", "prompt", text, ("",)) for n, text in enumerate(texts)]


GOLD = ["entailment"] * 4 + ["neutral"] * 2 + ["contradiction"] * 2
TEXTS = ["entailment", "Entailment.", "neutral", "no idea", "neutral", "contradiction", "contradiction", "entailment"]


def test_numbers_are_those_of_a_hand_calculation() -> None:
    examples = [example(f"x{n}", label) for n, label in enumerate(GOLD)]
    scores = score_labels(predictions_of(TEXTS), examples, labels=LABELS)
    assert scores.n == 8
    assert scores.metrics["accuracy"] == pytest.approx(100 * 4 / 8)
    assert scores.metrics["precision_entailment"] == pytest.approx(100 * 2 / 3)
    assert scores.metrics["recall_entailment"] == pytest.approx(100 * 2 / 4)
    f1 = [2 * 2 / 3 * 1 / 2 / (2 / 3 + 1 / 2), 0.5, 0.5]
    assert [scores.metrics[f"f1_{label}"] for label in LABELS] == pytest.approx([100 * value for value in f1])
    assert scores.metrics["macro_f1"] == pytest.approx(100 * sum(f1) / 3)
    assert scores.details["confusion"] == [[2, 1, 0, 1], [0, 1, 1, 0], [1, 0, 1, 0]]
    assert scores.details["unparsed"] == 1
    assert scores.details["majority_baseline"] == {"label": "entailment", "accuracy": 50.0}
    assert confusion_table(scores.details)[0] == ["true \\ guessed", *LABELS, UNPARSED]
    assert "1 texts name no label" in class_table(scores.details).note


def test_resampling_all_items_once_gives_the_score_itself() -> None:
    """The vectorised formula behind the bootstrap is scikit-learn's."""
    rng = np.random.default_rng(0)
    gold = rng.choice(LABELS, 200).tolist()
    guesses = rng.choice([*LABELS, UNPARSED], 200).tolist()
    examples = [example(f"x{n}", label) for n, label in enumerate(gold)]
    scores = score_labels(predictions_of(guesses), examples, labels=LABELS)
    again = resampled(gold, guesses, LABELS)(np.arange(200)[None])[:, 0]
    assert [scores.metrics["macro_f1"]] == pytest.approx(again.tolist())
    assert set(scores.intervals) == set(scores.metrics)
    assert all(low < scores.metrics[name] < high for name, (low, high) in scores.intervals.items())


def test_interval_of_accuracy_has_the_width_that_theory_gives() -> None:
    gold = ["neutral"] * 400
    guesses = ["neutral"] * 280 + ["entailment"] * 120
    examples = [example(f"x{n}", label) for n, label in enumerate(gold)]
    low, high = score_labels(predictions_of(guesses), examples, labels=LABELS).intervals["accuracy"]
    assert high - low == pytest.approx(100 * 2 * 1.96 * math.sqrt(0.7 * 0.3 / 400), rel=0.1)


@pytest.mark.parametrize(("right", "low", "high"), [(5, 56.55, 100), (0, 0, 43.45), (4, 37.55, 96.38)])
def test_shares_at_the_ends_have_wilsons_interval(right: int, low: float, high: float) -> None:
    """Five of five are no proof of 100 %: a bootstrap would say [100, 100]."""
    guesses = ["neutral"] * right + ["entailment"] * (5 - right)
    scores = score_labels(predictions_of(guesses), [example(f"x{n}") for n in range(5)], labels=LABELS)
    assert scores.intervals["accuracy"] == pytest.approx((low, high), abs=0.01)
    assert scores.intervals["recall_neutral"] == pytest.approx((low, high), abs=0.01)
    assert ("macro_f1" in scores.intervals) == (right == 4), "where all items score alike a bootstrap knows nothing"
    assert "precision_contradiction" not in scores.intervals, "a share of nothing"
    assert all(low < high for low, high in scores.intervals.values())


def test_an_f1s_interval_is_that_of_its_share_and_covers_it() -> None:
    """F1 = 2J / (1 + J) of the share J of right ones among those of the class or taken for it."""
    low, high = bootstrap.f1_percent(8, 10)
    share_low, share_high = bootstrap.wilson(8, 10)
    assert (low, high) == pytest.approx((200 * share_low / (1 + share_low), 200 * share_high / (1 + share_high)))
    rng, covered = np.random.default_rng(0), 0
    for _ in range(300):
        right = int(rng.binomial(30, 0.8))
        low, high = bootstrap.f1_percent(right, 30)
        covered += low <= 100 * 2 * 0.8 / 1.8 <= high
    assert covered / 300 == pytest.approx(0.95, abs=0.03)


def test_a_class_that_nobody_names_has_zeros_not_warnings() -> None:
    scores = score_labels(predictions_of(["neutral", "neutral"]), [example("x0"), example("x1")], labels=LABELS)
    assert scores.metrics["accuracy"] == 100
    assert scores.metrics["precision_entailment"] == 0


def test_rows_without_a_label_are_named() -> None:
    with pytest.raises(DataError, match=r"x0.*'-' is not one of entailment"):
        score_labels(predictions_of(["neutral"]), [example("x0", "-")], labels=LABELS)
    with pytest.raises(DataError, match="no predictions"):
        score_labels([], [], labels=LABELS)
