"""Tiny mixtures of experts of the real architectures: H ≠ I ≠ 2I, and every token has its experts by a clear margin.

    folder = experts.saved("mixtral", tmp_path / "base")          # with a tokenizer, as `tiny.tiny_llama`
    model = experts.built("gpt_oss", inner=32)                     # in memory; 2I = H
    experts.routed(model, ids)["model.layers.1.mlp"]              # (tokens, k): the experts of each token

Every token's embedding says which experts it goes to: E coordinates of the residual stream are +c for its k experts and
-c for the others, and each router reads those. So routing stays as it is under small changes, and `margin` is the
smallest distance between a chosen and an unchosen expert's logit.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tiny import TEXTS, tiny_tokenizer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

HIDDEN, INNER, LAYERS = 64, 48, 2  # 2I = 96 ≠ H; `inner=32` makes 2I = H
ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
} | ATTENTION
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 16}


def mixtral(inner: int) -> dict[str, Any]:
    return COMMON | {"intermediate_size": inner, "num_local_experts": 4, "num_experts_per_tok": 2}


def qwen3_moe(inner: int) -> dict[str, Any]:
    return COMMON | {
        "intermediate_size": 80,
        "moe_intermediate_size": inner,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }


def olmoe(inner: int) -> dict[str, Any]:
    return COMMON | {"intermediate_size": inner, "num_experts": 8, "num_experts_per_tok": 3}


def gpt_oss(inner: int) -> dict[str, Any]:
    return COMMON | {
        "intermediate_size": inner,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }


def deepseek_v3(inner: int) -> dict[str, Any]:
    """A dense first layer, two of experts, each with a shared expert."""
    return COMMON | LATENT | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 80,
        "moe_intermediate_size": inner,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 8,  # of the rotary part
    }  # fmt: skip


def granitemoe(inner: int) -> dict[str, Any]:
    sizes = {"intermediate_size": inner, "num_local_experts": 4, "num_experts_per_tok": 2}
    return {name: value for name, value in COMMON.items() if name != "head_dim"} | sizes


def llama4_text(inner: int) -> dict[str, Any]:
    """A dense first layer, then one of experts with a shared expert; one expert a token. Stored (E, in, out)."""
    return COMMON | {
        "intermediate_size": inner,
        "intermediate_size_mlp": 80,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "attention_chunk_size": 128,
    }


FAMILIES = {
    family.__name__: family for family in (mixtral, qwen3_moe, olmoe, gpt_oss, deepseek_v3, granitemoe, llama4_text)
}
CHOSEN, READING, WRITING = 3.0, 0.15, 0.05  # where a token goes; spread of weights that read, and write, its stream


def built(
    family: str, *, inner: int = INNER, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any
) -> PreTrainedModel:
    """The model in memory, in evaluation mode; `config` replaces single values of its config."""
    settings = {"vocab_size": 96} | FAMILIES[family](inner) | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=WRITING if "down_proj" in name or "o_proj" in name else READING)
                elif name.endswith("bias"):
                    parameter.normal_(std=0.02)
            decided(model)
    return model.to(dtype).eval()


def saved(
    family: str,
    folder: Path,
    texts: Iterable[str] = TEXTS,
    *,
    tokenizer: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """`built` and a tokenizer, saved in `folder` as transformers writes them; `tokenizer`: of `tiny.tiny_tokenizer`."""
    vocabulary = tiny_tokenizer(folder, texts, **(tokenizer or {}))
    built(family, **{"vocab_size": len(vocabulary)} | settings).save_pretrained(folder)
    return folder


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """Path of each layer's mixture → its router."""
    found = {}
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in ("gate", "router") and getattr(module, "weight", None) is not None:
            found[parent] = module
    return found


def top_k(model: PreTrainedModel) -> int:
    return int(model.config.num_experts_per_tok)


def decided(model: PreTrainedModel) -> None:
    """Each token's embedding says where it goes, and the routers read it."""
    table = model.get_input_embeddings().weight
    for router in routers(model).values():
        experts = router.weight.shape[0]
        router.weight *= 0.1
        router.weight[:, :experts] += torch.eye(experts)
    chosen = torch.rand(table.shape[0], experts).argsort(dim=1)[:, : top_k(model)]
    table.normal_(std=1.0)
    table[:, :experts] *= 0.1
    table[:, :experts] += torch.full_like(table[:, :experts], -CHOSEN).scatter_(1, chosen, CHOSEN)


def router_logits(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Path of each layer's mixture → its router's logits (tokens, E), before biases that only choose."""
    found: dict[str, Tensor] = {}
    hooks = [
        router.register_forward_pre_hook(
            lambda module, inputs, path=path: found.update(
                {path: nn.functional.linear(inputs[0].flatten(0, -2), module.weight, getattr(module, "bias", None))}
            )
        )
        for path, router in routers(model).items()
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def routed(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Path of each layer's mixture → the experts (tokens, k) of each token."""
    return {path: logits.topk(top_k(model)).indices for path, logits in router_logits(model, ids).items()}


def margin(model: PreTrainedModel, ids: Tensor) -> float:
    """The smallest distance, over layers and tokens, of the last expert that is chosen to the first that is not."""
    k = top_k(model)
    ordered = [logits.sort(descending=True).values for logits in router_logits(model, ids).values()]
    return min(float((logits[:, k - 1] - logits[:, k]).min()) for logits in ordered)
