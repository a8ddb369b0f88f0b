"""The numbers that a GGUF states about its model, against the config and the processor in transformers.

    llama.rope.freq_base = 10000          ◀── config.json, text_config.rope_parameters.rope_theta
    clip.vision.image_mean = [0.5 …]      ◀── processor_config.json, image_processor.image_mean

Tensors can all be right and the model another one: theta, epsilons and the pixels' mean stand beside them. Only keys
whose meaning is certain are compared; of families that the tables don't know, those that mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from rankwise.data.device import DeviceTarget, tiles
from rankwise.errors import VerificationError
from rankwise.files.atomic import read_object
from rankwise.gguf.reading import GGUFFile
from rankwise.models.load import load_processor

SAME = 1e-5  # relative; float32 in the file, float64 in the config
PLAIN = frozenset(["llama", "qwen2", "qwen2vl", "qwen3", "qwen3vl"])  # one kind of layer, whole rotary heads
IDEFICS, QWEN_MERGER = "idefics3", "qwen2.5vl_merger"
UNSCALED = frozenset(["default", "llama3"])  # llama3's factors are a tensor
EVERYWHERE = {"embedding_length": "hidden_size", "attention.layer_norm_rms_epsilon": "rms_norm_eps"}
OF_PLAIN = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}
OF_TOWERS = {  # by the file's clip.projector_type
    IDEFICS: {
        "vision.block_count": "num_hidden_layers",
        "vision.embedding_length": "hidden_size",
        "vision.feed_forward_length": "intermediate_size",
        "vision.attention.head_count": "num_attention_heads",
        "vision.patch_size": "patch_size",
        "vision.image_size": "image_size",
        "vision.attention.layer_norm_epsilon": "layer_norm_eps",
    },
    QWEN_MERGER: {
        "vision.block_count": "depth",
        "vision.embedding_length": "hidden_size",
        "vision.feed_forward_length": "intermediate_size",
        "vision.attention.head_count": "num_heads",
        "vision.patch_size": "patch_size",
    },
}
# llama.cpp's GELU is the tanh approximation, for both of transformers' names; with neither flag it is QuickGELU.
ACTIVATIONS = {
    "gelu_pytorch_tanh": (True, False),
    "gelu": (True, False),
    "gelu_new": (True, False),
    "silu": (False, True),
    "quick_gelu": (False, False),
}


def check_numbers(file: GGUFFile, wanted: Mapping[str, Any]) -> None:
    """VerificationError, listing every key of the file that says otherwise. wanted: by key without architecture."""
    wrong = []
    for key, value in wanted.items():
        stated = file.of_architecture(key)
        if not agree(silent(file, key) if stated is None else stated, value):
            told = "is not stated" if stated is None else f"is {shorter(stated)}"
            wrong.append(f"{file.architecture}.{key} {told}, and {shorter(value)} in the model")
    if wrong:
        raise VerificationError(f"{file.path}: not the model's config: {'; '.join(wrong)}")


def silent(file: GGUFFile, key: str) -> Any:
    """What llama.cpp takes where a file does not state the key; None where it has nothing of its own."""
    return {"rope.freq_base": 10000.0, "attention.head_count_kv": file.of_architecture("attention.head_count")}.get(key)


def agree(stated: Any, wanted: Any) -> bool:
    if wanted is None or isinstance(wanted, bool):
        return bool(stated) is bool(wanted)
    if isinstance(wanted, list):
        return isinstance(stated, list) and len(stated) == len(wanted) and all(map(agree, stated, wanted))
    return isinstance(stated, int | float) and isclose(stated, wanted, rel_tol=SAME)


def shorter(value: Any) -> str:
    if isinstance(value, list):
        return str([float(f"{one:.6g}") for one in value])
    return str(value) if value is None or isinstance(value, bool | str) else f"{value:.6g}"


def config_of(model: Path) -> Any:
    """The config with its class's defaults; None where transformers has no class for it."""
    content = read_object(model / "config.json")
    kind = content.get("model_type")
    return CONFIG_MAPPING[kind].from_dict(content) if kind in CONFIG_MAPPING else None


# --- the text model --------------------------------------------------------------------------------------------------


def text_numbers(file: GGUFFile, model: Path) -> dict[str, Any]:
    """What the file of the text model must state, by key without the architecture."""
    config = config_of(model)
    if config is None:
        return {}
    text = config.get_text_config()
    plain = file.architecture in PLAIN
    wanted = from_config(text, EVERYWHERE | (OF_PLAIN if plain else {}))
    # A key that other families leave out on purpose (another kind of norm, say) says nothing.
    known = {key: value for key, value in wanted.items() if plain or file.of_architecture(key) is not None}
    return known | (dict(rope_numbers(text)) if plain else {})


def from_config(config: Any, keys: Mapping[str, str]) -> dict[str, Any]:
    values = {key: getattr(config, name, None) for key, name in keys.items()}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def rope_numbers(text: Any) -> Iterator[tuple[str, Any]]:
    rope = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" in rope:
        yield "rope.freq_base", rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    if kind in UNSCALED or "mrope_section" in rope:
        yield "rope.scaling.factor", None
    elif kind in ("linear", "yarn"):
        yield "rope.scaling.factor", rope.get("factor")


# --- the vision tower ------------------------------------------------------------------------------------------------


def vision_numbers(file: GGUFFile, model: Path, target: DeviceTarget | None) -> dict[str, Any]:
    """The same for the mmproj file. target: what the device scales images to, before what the processor says."""
    config, processor = config_of(model), load_processor(str(model))
    wanted: dict[str, Any] = dict(pixel_numbers(processor.image_processor))
    family = str(file.metadata.get("clip.projector_type"))
    if config is None or family not in OF_TOWERS:
        return wanted
    tower = config.vision_config
    wanted |= from_config(tower, OF_TOWERS[family])
    if tower.hidden_act in ACTIVATIONS:
        wanted |= dict(zip(("use_gelu", "use_silu"), ACTIVATIONS[tower.hidden_act], strict=True))
    if family == IDEFICS:
        wanted["vision.projector.scale_factor"] = config.scale_factor
    if tiles(processor):
        edge = target.longest_edge if target else None
        wanted["vision.preproc_image_size"] = edge or int(processor.image_processor.size["longest_edge"])
    return wanted


def pixel_numbers(images: Any) -> Iterator[tuple[str, list[float]]]:
    if getattr(images, "do_normalize", False):
        yield "vision.image_mean", [float(value) for value in images.image_mean]
        yield "vision.image_std", [float(value) for value in images.image_std]
