"""Short answers: what counts as equal, words shared, types counted apart, and what the predictions file keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.example import Example, Turn
from rankwise.device.scores import rights
from rankwise.errors import DataError
from rankwise.evaluate.answers import exact_match, is_right, normalised, score_answers, token_f1
from rankwise.evaluate.predictions import Prediction
from rankwise.evaluate.tasks import task


@pytest.mark.parametrize(
    ("said", "wanted", "same"),
    [
        ("Red.", "red", True),
        ("  the red\n circle ", "The red circle.", True),
        ("red!?", "red", True),
        ("ＲＥＤ", "red", True),
        ("reddish", "red", False),
        ("the red circle", "red circle", False),
        ("3.5", "35", False),
        ("", "red", False),
        ("no", "No。", True),
    ],
)
def test_case_spacing_and_final_punctuation_do_not_count(said: str, wanted: str, same: bool) -> None:
    assert exact_match(said, wanted) == same == exact_match(wanted, said)


@given(st.text())
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


@given(st.text(), st.text())
def test_f1_is_symmetric_between_0_and_1_and_1_for_equal_texts(first: str, second: str) -> None:
    assert 0 <= token_f1(first, second) == token_f1(second, first) <= 1
    assert token_f1(first, first) == 1


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    precision, recall = 2 / 3, 2 / 4
    f1 = 2 * precision * recall / (precision + recall)
    assert token_f1("a red circle", "Circle, red and large") == pytest.approx(f1)
    assert token_f1("red red red", "red") == pytest.approx(2 / 4), "a word counts as often as it is shared"


def item(number: int, kind: str | None) -> Example:
    turns = (Turn("user", "What?"), Turn("assistant", "red"))
    return Example(str(number), str(number), turns, references=("red",), stratum=kind)


def predicted(texts: list[str], references: tuple[str, ...] = ("red",)) -> list[Prediction]:
    return [Prediction(str(number), "What?", text, references) for number, text in enumerate(texts)]


def test_scores_have_intervals_and_types() -> None:
    texts, kinds = ["Red.", "blue", "red", "a red one"], ["colour", "colour", "shape", None]
    scores = score_answers(predicted(texts), [item(n, kind) for n, kind in enumerate(kinds)])
    assert scores.metrics["exact_match"] == 50
    assert scores.metrics["token_f1"] == pytest.approx(100 * (1 + 0 + 1 + 2 / 4) / 4)
    assert scores.details["by_type"] == {"colour": {"n": 2, "exact_match": 50}, "shape": {"n": 1, "exact_match": 100}}
    low, high = scores.intervals["exact_match"]
    assert low < 50 < high
    assert "by_type" not in score_answers(predicted(texts), [item(n, None) for n in range(4)]).details


def test_of_cota_the_final_answer_counts_and_no_thoughts(tmp_path: Path) -> None:
    """Through the task's own table, as `evaluate` and `validate` have it."""
    row = {"question": "How many?", "chain_of_thought": ["Answer: unclear", "I count."], "answer": "Two"}
    (tmp_path / "rows.json").write_text(json.dumps([row | {"id": str(n)} for n in range(4)]))
    examples = task("cota").examples(tmp_path / "rows.json").items
    assert examples[0].answer.endswith("Thought: I count.\nAnswer: Two")
    said = ["Answer: two.", "Thought: Answer: three\nAnswer: Two", "two", "Answer: two\nAnswer: three"]
    given = [Prediction(one.id, "…", text, one.references) for one, text in zip(examples, said, strict=True)]
    scores = task("cota").score(given, examples)
    assert scores.metrics["exact_match"] == 75
    assert [is_right("cota", one.prediction, one.references) for one in given] == [True, True, True, False]
    assert rights("cota", given, examples) == [True, True, True, False]
    assert not is_right("conversations", "Answer: two", ["two"])


def test_the_best_reference_counts() -> None:
    scores = score_answers(predicted(["scarlet"], ("red", "scarlet")), [item(0, None)])
    assert scores.metrics["exact_match"] == 100
    assert scores.intervals == {"exact_match": pytest.approx((20.65, 100), abs=0.01)}, "one item's mean has no spread"
    with pytest.raises(DataError, match="nothing to score"):
        score_answers([], [])


def test_lines_carry_images_only_where_there_are_some(tmp_path: Path) -> None:
    plain = Prediction("a", "p", "t", ("r",)).record()
    assert set(plain) == {"id", "prompt", "prediction", "references"}
    seen = Prediction("a", "p", "t", ("r",), None, ("x.png",), "What?").record()
    assert (seen["images"], seen["question"]) == (("x.png",), "What?")
