"""Packed samples are the samples: the same losses, the same gradients, none of them seen by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import Rows, equal, make_trainer, resumed, weights
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rankwise.data.dataset import Collator, PackedDataset, RenderedDataset, pack, unpacked_difference
from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.errors import VerificationError
from rankwise.evaluate.likelihood import answer_losses
from rankwise.models.load import load_model, load_tokenizer
from rankwise.train.launch import check_packing
from rankwise.train.rows import LengthGrouped

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=384)),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(base: Path) -> RenderedDataset:
    examples = [
        Example(
            f"row-{n}",
            f"row-{n}",
            (Turn("user", f"area[{'x' * (7 * n % 23)}]"), Turn("assistant", "pub " * (1 + n % 5))),
        )
        for n in range(12)
    ]
    return RenderedDataset(examples, Renderer(load_tokenizer(str(base)), max_length=128))


@given(lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60))
def test_bins_hold_everything_once_and_never_too_much(lengths: list[int]) -> None:
    bins = pack(lengths, 64)
    assert sorted(position for one in bins for position in one) == list(range(len(lengths)))
    loads = [sum(lengths[position] for position in one) for one in bins]
    assert max(loads) <= 64
    least = -(-sum(lengths) // 64)
    assert len(bins) <= 2 * least, "no two bins are both at most half full"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_packed_row_is_its_samples(rows: RenderedDataset, name: str, kernel: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.set_attn_implementation(kernel)
    packed, collate = PackedDataset(rows, 128), Collator(0)
    assert len(packed) < len(rows) / 2
    assert unpacked_difference(model, packed, collate) < 1e-5
    batch = collate([packed[index] for index in range(len(packed))])
    order = batch.pop("sample_index").tolist()
    packed_loss = model(**batch, use_cache=False).loss
    losses, tokens = answer_losses(model, [collate([rows[index] for index in order])])
    torch.testing.assert_close(packed_loss.item(), float(losses.sum() / tokens.sum()), rtol=1e-5, atol=1e-6)


def test_a_model_that_mixes_samples_is_refused(base: Path, rows: RenderedDataset) -> None:
    model = load_model(str(base), torch.float32)
    forward = model.forward

    def blind(*args: Any, position_ids: Any = None, **rest: Any) -> Any:
        return forward(*args, **rest)

    check_packing(model, PackedDataset(rows, 128), Collator(0))
    model.forward = blind
    with pytest.raises(VerificationError, match="does not keep samples"):
        check_packing(model, PackedDataset(rows, 128), Collator(0))


def test_the_trainer_learns_from_packed_rows_what_it_learns_from_padded_ones(
    base: Path, tmp_path: Path, rows: RenderedDataset
) -> None:
    """One step over all samples, once padded and once packed: the same weights to rounding."""
    results = []
    for name, data in (("padded", rows), ("packed", PackedDataset(rows, 128))):
        settings = {"per_device_train_batch_size": len(data), "gradient_accumulation_steps": 1, "max_steps": 1}
        trainer = make_trainer(
            base, tmp_path / name, rows=data, dropout=0.0, optim="sgd", learning_rate=1.0, **settings
        )
        trainer.train()
        results.append(weights(trainer))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], rtol=1e-4, atol=1e-6)


def test_the_first_token_of_a_sample_is_not_learnt_from_the_one_before(rows: RenderedDataset) -> None:
    packed = PackedDataset(rows, 128)
    for index in range(len(packed)):
        item = packed[index]
        starts = [place for place, position in enumerate(item["position_ids"]) if position == 0]
        assert len(starts) == len(item["sample_index"])
        assert all(item["labels"][start] == -100 for start in starts)
        assert item["input_ids"] == [token for one in item["sample_index"] for token in rows[one]["input_ids"]]


class Uneven(Rows):
    """Rows of many lengths, which are known."""

    @property
    def lengths(self) -> list[int]:
        return [3 + index * 7 % 11 for index in range(self.count)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        size = self.lengths[index]
        return row | {"input_ids": row["input_ids"][:1] * size, "labels": row["labels"][:1] * size}


def test_rows_of_like_length_come_together_and_all_come_once() -> None:
    lengths = [3 + index * 37 % 101 for index in range(400)]
    sampler = LengthGrouped(lengths, 8, 1)
    first = list(sampler)
    assert sorted(first) == list(range(400))
    assert lengths[first[0]] == max(lengths), "what does not fit the memory shows at once"
    grouped = [[lengths[position] for position in first[start : start + 8]] for start in range(0, 400, 8)]
    assert sum(max(one) * 8 for one in grouped) < 1.1 * sum(lengths)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_resume_in_a_later_epoch_keeps_the_order(base: Path, tmp_path: Path) -> None:
    given = {"train_sampling_strategy": "group_by_length", "rows": Uneven(), "lr_scheduler_type": "constant"}
    whole = make_trainer(base, tmp_path / "whole", max_steps=12, **given)
    whole.train()
    part = make_trainer(base, tmp_path / "part", max_steps=9, save_strategy="steps", save_steps=9, **given)
    part.train()
    assert equal(weights(resumed(make_trainer(base, tmp_path / "part", max_steps=12, **given))), weights(whole))
