"""What a GGUF must state of the experts' scores is what the class in transformers computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from rankwise.gguf.mixture import GATING, IMPLIED, SIGMOID, SOFTMAX, expert_numbers

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 32,
    "vocab_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "n_group": 1,
    "first_k_dense_replace": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
FILE = SimpleNamespace(architecture="deepseek2", of_architecture=lambda key: None)


@pytest.mark.parametrize("family", GATING)
def test_scores_are_stated_as_the_class_computes_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two functions is called on (tokens, E) scores while the model runs."""
    config = AutoConfig.for_model(family, **SIZES)
    model = AutoModel.from_config(config).eval()
    seen = set()
    for name, number in (("softmax", SOFTMAX), ("sigmoid", SIGMOID)):
        own = getattr(torch.Tensor, name)

        def told(scores: torch.Tensor, *args: object, own=own, number=number, **kwargs: object) -> torch.Tensor:
            if scores.dim() >= 2 and scores.shape[-1] == 8:
                seen.add(number)
            return own(scores, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, told)
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert {expert_numbers(FILE, config)["expert_gating_func"]} == seen
    assert (IMPLIED.get(family, {}).get("scoring_func") == "sigmoid") is (seen == {SIGMOID})


def test_of_other_classes_nothing_is_demanded() -> None:
    config = AutoConfig.for_model("deepseek_v3", **SIZES)
    config.model_type = "kimi_linear"
    assert "expert_gating_func" not in expert_numbers(FILE, config)
