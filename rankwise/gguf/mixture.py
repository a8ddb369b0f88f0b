"""How a mixture of experts routes, in a GGUF and in llama.cpp: all that no tensor shows.

    deepseek2.expert_gating_func = 2 (sigmoid)   ◀── the class DeepseekV3TopkRouter; its config need not say so
    qwen3moe.expert_weights_norm                 ◀── norm_topk_prob; llama.cpp's qwen3moe normalizes whatever is stated

Every tensor can be right and the experts weighted otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.files.gguf import GGUFFile

SOFTMAX, SIGMOID = 1, 2  # gguf.ExpertGatingFuncType
# What the router's class does and the converter reads from the config, by model_type.
IMPLIED: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid"},
    "glm4_moe_lite": {"scoring_func": "sigmoid"},
}
# What scores the experts in transformers, by model_type; of others it is not known.
GATING = {"deepseek_v2": SOFTMAX, "mistral4": SOFTMAX, "deepseek_v3": SIGMOID, "glm4_moe_lite": SIGMOID}
# What llama.cpp does whatever a file states, by model_type.
FIXED: Mapping[str, Mapping[str, Any]] = {
    "qwen2_moe": {"norm_topk_prob": False},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"norm_topk_prob": False},
    "llama4_text": {"attention_chunk_size": 8192},
}
COUNTS = {  # in every family: key without architecture → names in configs
    "expert_count": ("num_local_experts", "num_experts", "n_routed_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
SIZES = {  # in the families below, where the file states them
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "expert_shared_count": ("n_shared_experts",),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_weights_scale": ("routed_scaling_factor",),
    "leading_dense_block_count": ("first_k_dense_replace",),
    "interleave_moe_layer_step": ("interleave_moe_layer_step",),
}
FAMILIES = frozenset(["llama", "qwen2moe", "qwen3moe", "olmoe", "gpt-oss", "deepseek2", "granitemoe", "llama4"])
STATED = frozenset(["deepseek2"])  # families whose file says how experts are weighted


def expert_numbers(file: GGUFFile, text: Any) -> dict[str, Any]:
    """What the file must state of the experts, by key without the architecture; {} for a model that has none.

    text: the config of the text model.
    """
    wanted = valued(text, COUNTS)
    if len(wanted) < len(COUNTS):
        return {}
    if file.architecture in FAMILIES:
        wanted |= {key: value for key, value in valued(text, SIZES).items() if file.of_architecture(key) is not None}
    if file.architecture in STATED:
        if text.model_type in GATING:
            wanted["expert_gating_func"] = GATING[text.model_type]
        wanted["expert_weights_norm"] = bool(text.norm_topk_prob)
    return wanted


def valued(config: Any, names: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    found = {
        key: next((getattr(config, one) for one in each if hasattr(config, one)), None) for key, each in names.items()
    }
    return {key: value for key, value in found.items() if isinstance(value, int | float) and value}


def unlike_llama_cpp(config: Any) -> str:
    """How llama.cpp would run another model than this config's, whatever is converted; "" where it would not."""
    text = config.get_text_config()
    for name, fixed in FIXED.get(text.model_type, {}).items():
        if getattr(text, name) != fixed:
            return f"its {name} is {getattr(text, name)}, and llama.cpp computes as if it were {fixed}"
    layers, step = getattr(text, "moe_layers", None), getattr(text, "interleave_moe_layer_step", 0)
    if layers is not None and step and list(layers) != list(range(step - 1, text.num_hidden_layers, step)):
        return f"its experts are in the layers {list(layers)}, and llama.cpp expects them in every {step}. one"
    return ""
