"""Text scores: they equal independent computations, say what is missing, and carry intervals."""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
from nltk.corpus.reader.wordnet import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader

from rankwise.data.example import one_per_prompt
from rankwise.data.sources.load import load
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import bootstrap
from rankwise.evaluate import text as text_module
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.evaluate.text import score_text

# Output of the baseline for the first ten MRs of the development set, from github.com/tuetschek/e2e-metrics,
# example-inputs/baseline-output.txt; the references there are those of devset.csv. The official script gives 72.0293.
BASELINE = [
    "Alimentum is located in the city centre. It is not family-friendly.",
    "Alimentum is a non family-friendly restaurant near Burger King in the city centre.",
    "Alimentum is a family-friendly restaurant in the city centre.",
    "Alimentum is a family-friendly restaurant in the city centre near Burger King.",
    "Alimentum is located in the city centre. It is not family-friendly.",
    "Alimentum is near Burger King in the riverside area. It is not family-friendly.",
    "In the riverside area there is a family friendly place called Alimentum.",
    "Alimentum is a family friendly restaurant in the riverside area near Burger King.",
    "Aromi is a kid friendly coffee shop serving chinese food in the riverside area "
    "with a customer rating of 1 out of 5.",
    "Aromi is a kid friendly coffee shop serving chinese food in the riverside area "
    "with a customer rating of 3 out of 5.",
]

HYPOTHESES = ["the cat sat on the mat", "There is a dog", "a bird"]
REFERENCES = [["the cat is on the mat", "a cat sat on a mat"], ["there is a big dog"], ["the fish swims far", "A bird"]]


def ngrams(words: list[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def plain_bleu(hypotheses: list[str], references: list[list[str]], order: int) -> float:
    """Papineni et al. 2002 with NIST smoothing, for lowercase texts that are tokenised by blanks."""
    matched, total, length, reference_length = [0] * order, [0] * order, 0, 0
    for hypothesis, group in zip(hypotheses, references, strict=True):
        words, others = hypothesis.lower().split(), [reference.lower().split() for reference in group]
        length += len(words)
        reference_length += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        for n in range(1, order + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for other in others:
                most |= ngrams(other, n)
            matched[n - 1] += (ngrams(words, n) & most).total()
            total[n - 1] += ngrams(words, n).total()
    logarithms, smooth = 0.0, 1.0
    for hits, all_ in zip(matched, total, strict=True):
        smooth *= 1 if hits else 2
        logarithms += math.log(hits / all_ if hits else 1 / (smooth * all_))
    return 100 * min(1.0, math.exp(1 - reference_length / length)) * math.exp(logarithms / order)


def test_bleu_equals_the_official_e2e_script(shared_data: Path) -> None:
    rows = one_per_prompt(load("e2e_nlg", shared_data / "e2e_nlg", "dev"))[:10]
    scores = score_text(BASELINE, [row.references for row in rows])
    assert scores.metrics["bleu"] == pytest.approx(72.0293, abs=1e-4)
    assert "case:lc" in scores.details["bleu"]
    assert "tok:13a" in scores.details["bleu"]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_bleu_equals_a_plain_computation(order: int) -> None:
    scores = score_text(HYPOTHESES, REFERENCES)
    assert scores.metrics[f"bleu_{order}"] == pytest.approx(plain_bleu(HYPOTHESES, REFERENCES, order))
    assert scores.metrics["precision_1"] == pytest.approx(100 * 12 / 12)
    assert scores.metrics["bleu"] == scores.metrics["bleu_4"]


def test_rouge_takes_the_best_reference_of_each_item() -> None:
    metrics = score_text(HYPOTHESES, REFERENCES).metrics
    unigram_f1 = [5 / 6, 2 * (1 * 4 / 5) / (1 + 4 / 5), 1.0]
    bigram_f1 = [3 / 5, 2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4), 1.0]
    assert metrics["rouge_1"] == pytest.approx(100 * np.mean(unigram_f1))
    assert metrics["rouge_2"] == pytest.approx(100 * np.mean(bigram_f1))
    assert metrics["rouge_l"] == pytest.approx(100 * np.mean(unigram_f1))


def test_stems_and_case_count_as_asked_and_are_recorded() -> None:
    """The settings of dialogue summaries: stemmed ROUGE, cased BLEU."""
    plain = score_text(["The dogs barked"], [["the dog barks"]])
    other = score_text(["The dogs barked"], [["the dog barks"]], lowercase=False, stem=True)
    assert plain.metrics["rouge_1"] == pytest.approx(100 / 3)
    assert other.metrics["rouge_1"] == pytest.approx(100)
    assert (plain.metrics["precision_1"], other.metrics["precision_1"]) == (pytest.approx(100 / 3), 0)
    assert "case:lc" in plain.details["bleu"] and "tok:13a" in plain.details["bleu"]
    assert "case:mixed" in other.details["bleu"] and "stems" in other.details["rouge"]


def test_perfect_and_hopeless_texts() -> None:
    perfect = score_text([group[0] for group in REFERENCES], REFERENCES).metrics
    assert [perfect[name] for name in ("bleu_1", "rouge_1", "rouge_l")] == pytest.approx([100] * 3)
    for texts in (["", "", ""], ["x", "y", "z"]):
        metrics = score_text(texts, REFERENCES).metrics
        assert max(metrics.values()) == 0


@pytest.fixture
def no_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def connect(*_: Any) -> None:
        pytest.fail("a metric tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr("nltk.data.path", [str(tmp_path)])
    monkeypatch.setattr(text_module, "SYSTEM", str(tmp_path / "none"))
    for name in ("WNSEARCHDIR", "WNHOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nltk.corpus.wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))


@pytest.mark.usefixtures("no_wordnet")
def test_meteor_without_wordnet_is_named_so_and_is_not_zero() -> None:
    # the example of nltk's own documentation, where no synonym takes part
    hypothesis = "It is a guide to action which ensures that the military always obeys the commands of the party"
    reference = "It is a guide to action that ensures that the military will forever heed Party commands"
    scores = score_text([hypothesis], [[reference]])
    assert scores.metrics["meteor_exact_stem"] == pytest.approx(69.44, abs=0.005)
    assert "meteor" not in scores.metrics
    assert "WordNet is not installed" in scores.unavailable["meteor"]
    assert score_text(["cats running"], [["cat runs"]]).metrics["meteor_exact_stem"] > 40  # stems match


def test_meteor_with_wordnet_uses_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lemma:
        def name(self) -> str:
            return "pub"

    class Synset:
        def lemmas(self) -> list[Lemma]:
            return [Lemma()]

    class WordNet:
        def synsets(self, word: str) -> list[Synset]:
            return [Synset()] if word == "bar" else []

    monkeypatch.setattr(text_module, "installed_wordnet", WordNet)
    scores = score_text(["the bar"], [["the pub"]])
    assert scores.metrics["meteor"] > 90
    assert scores.unavailable == {}


NOUN = "{offset} 04 n {words} 000 | a place\n"


def small_wordnet(folder: Path) -> Path:
    """WordNet's own format: one set of nouns, bar and pub."""
    folder.mkdir(parents=True)
    head = "  1 This software and database is being provided to you WordNet 3.0\n"
    for part in ("adj", "adv", "noun", "verb"):
        for kind in ("data", "index"):
            (folder / f"{kind}.{part}").write_text(head)
        (folder / f"{part}.exc").write_text("")
    offset = f"{len(head):08d}"
    (folder / "data.noun").write_text(head + NOUN.format(offset=offset, words="02 bar 0 pub 0"))
    rows = "".join(f"{word} n 1 0 1 0 {offset}  \n" for word in ("bar", "pub"))
    (folder / "index.noun").write_text(head + rows)
    return folder


@pytest.mark.usefixtures("no_wordnet")
@pytest.mark.parametrize("where", ["WNSEARCHDIR", "WNHOME", "Debian"])
def test_wordnet_needs_no_hub(where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = small_wordnet(tmp_path / "dict")
    if where == "Debian":
        monkeypatch.setattr(text_module, "SYSTEM", str(folder))
    else:
        monkeypatch.setenv(where, str(folder if where == "WNSEARCHDIR" else tmp_path))
    scores = score_text(["the bar"], [["the pub"]])
    assert scores.metrics["meteor"] > 90 and scores.unavailable == {}
    assert score_text(["the bar"], [["the cat"]]).metrics["meteor"] < 60
    assert str(folder) in nltk.data.path, "nltk opens files only there, and in temporary folders as this one"


@pytest.mark.usefixtures("no_wordnet")
def test_a_folder_that_is_no_wordnet_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    for read in (text_module.check_installed, lambda: score_text(["the bar"], [["the pub"]])):
        with pytest.raises(DataError, match=r"WNSEARCHDIR: .* holds no WordNet \(data\.adj is missing\)"):
            read()


def test_intervals_contain_the_score_and_are_the_seed_s_doing() -> None:
    many = 30
    first, again = (score_text(HYPOTHESES * many, REFERENCES * many, seed=1) for _ in range(2))
    assert first.intervals == again.intervals
    assert {"bleu", "rouge_1", "rouge_2"} <= set(first.intervals) <= set(first.metrics)
    for name, (low, high) in first.intervals.items():
        assert low <= first.metrics[name] <= high
    low, high = first.intervals["rouge_2"]
    assert low < high


def test_interval_of_a_mean_has_the_width_that_theory_gives() -> None:
    values = np.random.default_rng(0).normal(size=(1, 400))
    [(low, high)] = bootstrap.means(values) or []
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_one_item_has_no_interval() -> None:
    assert score_text(["a b"], [["a b"]]).intervals == {}


def test_items_that_all_score_alike_have_none_either() -> None:
    """Every resample is the same: no width is no certainty."""
    assert score_text(["a b c d"] * 5, [["a b c d"]] * 5).intervals == {}


def test_a_thousand_resamples_of_a_test_set_take_no_time() -> None:
    hypotheses, references = HYPOTHESES * 210, REFERENCES * 210  # 630 items, as E2E's test set
    started = time.perf_counter()
    score_text(hypotheses, references)
    assert time.perf_counter() - started < 10  # about one second; a metric recomputed per resample takes minutes


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(DataError, match="no predictions"):
        score_text([], [])


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("rankwise.errors.importlib.import_module", missing)
    with pytest.raises(UsageError, match=r"rankwise\[eval\]"):
        text_module.check_installed()


def test_a_result_reads_like_a_mapping_and_round_trips(tmp_path: Path) -> None:
    result = EvaluationResult(
        "e2e_nlg", {"bleu": 50.0}, {"bleu": (40.0, 60.0)}, 3, unavailable={"meteor": "no WordNet"}
    )
    assert dict(result) == {"bleu": 50.0, "num_samples": 3}
    assert result.get("rouge") is None
    with pytest.raises(KeyError, match="no WordNet"):
        result["meteor"]
    assert EvaluationResult.load(result.save(tmp_path)) == result == EvaluationResult.load(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="not an evaluation result"):
        EvaluationResult.load(tmp_path / "other.json")
