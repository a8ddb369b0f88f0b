"""Forgetting: an adapter that changes nothing forgets nothing, and every number equals one computed token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rows import adapted_base
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from rankwise.errors import DataError
from rankwise.evaluate.forgetting import (
    ForgettingSettings,
    forgetting,
    in_words,
    logits_of,
    logits_without_adapter,
    read_documents,
)
from rankwise.evaluate.predictions import FORGETTING, EvaluationResult
from rankwise.models.load import load_model

TEXTS = [
    "The Vaults pub near Café Adriatic has a 5 star rating.",
    "Alimentum is a family-friendly restaurant.",
    "Prices start at £30. " * 3,
    "near",
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), initializer_range=0.3)


@pytest.fixture
def tokenizer(base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(base)


def adapted(base: Path, size: float) -> Any:
    """The base with a random adapter whose B has entries of this size; in evaluation mode."""
    model = adapted_base(base)
    generator = torch.Generator().manual_seed(5)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data = size * torch.randn(value.shape, generator=generator)
    return model.eval()


def measured(model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str] = TEXTS, **how: Any) -> EvaluationResult:
    settings = ForgettingSettings(**how)
    return forgetting(logits_without_adapter(model), logits_of(model), tokenizer, texts, CPU, settings)


def by_token(
    base: Path, model: Any, tokenizer: PreTrainedTokenizerBase, texts: list[str], window: int = 1024
) -> dict[str, float]:
    """The same numbers, one token at a time in float64, with the base loaded from its own files."""
    alone = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    kl, first, second = [], [], []
    for text in texts:
        whole = tokenizer(text)["input_ids"]
        for start in range(0, len(whole), window):
            ids = whole[start : start + window]
            with torch.no_grad():
                p, q = (m(torch.tensor([ids])).logits[0].double().log_softmax(-1) for m in (alone, model))
            for place in range(1, len(ids)):
                kl.append(float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum()))
                first.append(-float(p[place - 1, ids[place]]))
                second.append(-float(q[place - 1, ids[place]]))
    return {
        "kl": float(np.mean(kl)),
        "perplexity_base": math.exp(np.mean(first)),
        "perplexity_adapted": math.exp(np.mean(second)),
        "perplexity_ratio": math.exp(np.mean(second) - np.mean(first)),
    }


def test_an_adapter_that_changes_nothing_forgets_nothing(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    result = measured(adapted(base, 0.0), tokenizer)
    assert result["kl"] == 0
    assert result["perplexity_ratio"] == 1
    assert "kl" not in result.intervals, "documents that all score alike say nothing of how sure that is"


@pytest.mark.parametrize(
    "how", [{}, {"rows": 3}, {"tokens_per_pass": 1}, {"tokens_per_pass": 60}, {"window": 16}, {"window": 7, "rows": 2}]
)
def test_numbers_are_those_of_a_computation_by_token(
    base: Path, tokenizer: PreTrainedTokenizerBase, how: dict[str, int]
) -> None:
    model = adapted(base, 0.1)
    expected = by_token(base, model, tokenizer, TEXTS, how.get("window", 1024))
    result = measured(model, tokenizer, **how)
    assert result.metrics == pytest.approx(expected, rel=1e-4)
    assert result["kl"] > 1e-3
    assert result.n == 4


def test_a_larger_change_forgets_more(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = [measured(adapted(base, size), tokenizer)["kl"] for size in (0.02, 0.05, 0.2)]
    assert found == sorted(found)
    assert found[0] < found[-1] / 2


def test_two_models_compare_as_base_and_adapter_do(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """The form for merged models: the base is loaded beside the tuned one."""
    model = adapted(base, 0.1)
    beside = load_model(str(base), torch.float32).eval()
    result = forgetting(logits_of(beside), logits_of(model), tokenizer, TEXTS, CPU)
    assert result.metrics == pytest.approx(measured(model, tokenizer).metrics, rel=1e-5)


def test_intervals_are_over_documents(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(base, 0.1)
    result = measured(model, tokenizer, TEXTS * 5)
    for name, (low, high) in result.intervals.items():
        assert low <= result[name] <= high
    assert result.intervals["kl"][0] < result.intervals["kl"][1]
    same = measured(model, tokenizer, TEXTS[:1] * 20)
    low, high = same.intervals.get("kl", (0, 0))
    assert high - low < 1e-6  # equal documents have no spread
    assert measured(model, tokenizer, TEXTS[:1]).intervals == {}


def test_documents_of_one_token_are_left_out_and_counted(base: Path) -> None:
    bare = AutoTokenizer.from_pretrained(base, add_bos_token=False)
    bare.backend_tokenizer.post_processor = None
    model = adapted(base, 0.1)
    result = measured(model, bare, [TEXTS[0], "a"])
    assert (result.n, result.settings["left_out"]) == (1, 1)
    with pytest.raises(DataError, match="every document is shorter than two tokens"):
        measured(model, bare, ["a"])


def test_other_vocabularies_are_refused(base: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = adapted(base, 0.1)

    def shorter(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return logits_of(model)(ids, mask)[..., :-1]

    with pytest.raises(DataError, match="a vocabulary of 383, the tuned model one of 384"):
        forgetting(shorter, logits_of(model), tokenizer, TEXTS, CPU)


def test_adapters_that_moved_the_base_s_biases_are_refused(base: Path) -> None:
    model = adapted(base, 0.1)
    model.peft_config["default"].bias = "all"
    with pytest.raises(DataError, match="biases of the base"):
        logits_without_adapter(model)


def test_the_result_is_a_file_that_reads_back(base: Path, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    result = measured(adapted(base, 0.1), tokenizer)
    assert EvaluationResult.load(result.save(tmp_path, FORGETTING)) == result
    assert f"{result['kl']:.4f} nats per token" in in_words(result)
    assert in_words(measured(adapted(base, 0.1), tokenizer, TEXTS[:1])).count("[") == 0


# --- documents ---------------------------------------------------------------------------------------------------


def test_paragraphs_and_json_lines(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("One\nline more.\n\n  \nTwo £.\n\n\n\nThree\n", encoding="utf-8")
    assert read_documents(plain) == ["One\nline more.", "Two £.", "Three"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n\n" for text in ("One\n\nstill one", "Two")))
    assert read_documents(lines) == ["One\n\nstill one", "Two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "the file has no text"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2: expected"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: text must be a string"),
        ("a.jsonl", b"plain\n", "line 1: expected"),
    ],
)
def test_files_that_hold_no_documents_say_so(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_a_missing_file_says_what_is_taken(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="plain text"):
        read_documents(tmp_path / "none.txt")
