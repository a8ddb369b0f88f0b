"""What may answer in place of a tuned model: parts of its tuning, other scales, other prompts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from handed_off import SYSTEM, TEMPLATE
from tiny import CHAT_TEMPLATE, TEXTS, tiny_tokenizer
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.device.handoff.prompts import other_prompts
from rankwise.device.handoff.variants import Tuning, in_bits, rows_of, wrong_scales
from rankwise.errors import DataError

TUNED = ("q_proj", "experts")


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A mixture of experts, tuned in its attention and its fused experts; its base."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    base = MixtralForCausalLM(MixtralConfig(**sizes, **heads))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if any(part in TUNED for part in name.split(".")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return tuned, base


def test_parts_of_a_tuning(pair: tuple[nn.Module, nn.Module]) -> None:
    tuned, base = pair
    before = {name: one.clone() for name, one in tuned.named_parameters()}
    own = dict(base.named_parameters())
    tuning = Tuning.of(tuned, base, {0.5: "half"}, "here")
    assert all(any(part in TUNED for part in name.split(".")) for name in tuning.base)
    kept = {}
    for hypothesis, share in tuning.variants():
        assert not hypothesis.words.endswith(","), "it stands in tables, too"
        with tuning.weighted(share):
            now = dict(tuned.named_parameters())
            kept[hypothesis.name] = {name for name in tuning.base if torch.equal(now[name], before[name])}
            lost = {name for name in tuning.base if torch.equal(now[name], own[name])}
        whole = hypothesis.name.startswith("scale")
        assert whole or kept[hypothesis.name] | lost == set(tuning.base)
    assert all(torch.equal(one, before[name]) for name, one in tuned.named_parameters())
    assert set(kept) == {"base", "first half", "second half", "attention", "mlp", "experts", "no experts", "scale 0.5"}
    assert not kept["base"] and not kept["scale 0.5"]
    assert kept["experts"] == {name for name in tuning.base if "experts" in name}
    assert kept["no experts"] == kept["attention"] == set(tuning.base) - kept["experts"]
    assert kept["first half"] == {name for name in tuning.base if ".0." in name or ".1." in name}


def test_two_models_that_are_no_pair(pair: tuple[nn.Module, nn.Module]) -> None:
    tuned, base = pair
    with pytest.raises(DataError, match="equals its base in every weight"):
        Tuning.of(base, copy.deepcopy(base), {}, "here")
    with pytest.raises(DataError, match=r"the base has no \S+ of this size"):
        Tuning.of(tuned, nn.Linear(2, 2), {}, "here")


def test_rows_of_new_tokens_are_the_tuned_ones() -> None:
    base, tuned = torch.zeros(3, 2), torch.ones(5, 2)
    assert rows_of(base, tuned).tolist() == [[0, 0]] * 3 + [[1, 1]] * 2
    assert rows_of(torch.zeros(6, 2), tuned).shape == tuned.shape


@pytest.mark.parametrize(
    ("settings", "factors"),
    [
        ({}, {0.5, 2.0}),
        ({"r": 8, "lora_alpha": 16}, {0.5, 2.0}),
        ({"r": 8, "lora_alpha": 8}, {0.5, 2.0}),
        ({"r": 8, "lora_alpha": 32}, {0.5, 2.0, 0.25}),
        ({"r": 16, "lora_alpha": 16, "use_rslora": True}, {0.5, 2.0, 0.25}),
        ({"r": 8, "lora_alpha": 32, "rank_pattern": {"q_proj": 4}}, {0.5, 2.0}),
    ],
)
def test_scales_that_may_be_wrong(settings: dict[str, object], factors: set[float]) -> None:
    assert set(wrong_scales(settings)) == factors


def test_few_bits_have_few_levels() -> None:
    values = in_bits(torch.randn(4, 64), 2).reshape(-1, 32)
    assert all(len(set(row.abs().tolist()) - {0.0}) == 1 for row in values)
    assert torch.equal(in_bits(vector := torch.randn(5), 2), vector)


def prompts_of(folder: Path, template: str | None, turns: tuple[Turn, ...], add_bos: bool = True) -> dict[str, str]:
    """Hypothesis → the text of its prompt."""
    tokenizer = tiny_tokenizer(folder, (*TEXTS, SYSTEM), chat_template=template, add_bos=add_bos)
    renderer = Renderer(tokenizer, style="chat" if template else "sections")
    example = Example("a", "a", (*turns, Turn("assistant", "Yes.")))
    own = tuple(renderer.prompt_ids(example))
    return {one.name: tokenizer.decode(ids[0]) for one, ids in other_prompts(renderer, [example], [own])}


def test_prompts_of_a_template_with_a_system_text_of_its_own(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, TEMPLATE, (Turn("user", "Is it?"),), add_bos=False)
    user, system = "<|user|>\nIs it?</s>\n", f"<|system|>\n{SYSTEM}</s>\n"
    assert found["no system text"] == f"<s>{user}<|assistant|>\n"
    assert found["no generation prompt"] == f"<s>{system}{user}"
    assert found["no template"] == "Is it?"
    assert found["BOS twice"] == f"<s><s>{system}{user}<|assistant|>\n"
    assert found["no BOS"] == f"{system}{user}<|assistant|>\n"
    assert f"<s>{system}{user}<|assistant|>\n".endswith(found["last half"]) and "template around it" not in found


def test_prompts_of_a_row_with_a_system_text(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, CHAT_TEMPLATE, (Turn("system", "Be brief."), Turn("user", "Is it?")), add_bos=False)
    assert found["no system text"] == "<s><|user|>\nIs it?</s>\n<|assistant|>\n"


def test_prompts_without_a_template(tmp_path: Path) -> None:
    found = prompts_of(tmp_path, None, (Turn("user", "Is it?"),))
    assert set(found) == {"no template", "last half", "BOS twice", "no BOS"}
    assert found["no template"] == "<s>Is it?"
