"""Of every architecture that transformers builds as a causal or image-text model: how much of it can `train` adapt?

    python benchmarks/coverage.py [TYPE …] [--again]        # nothing is downloaded; goes on where it was stopped

A parameter counts as seen if it is a site, PEFT builds the pair of the site's shapes for it in a small model of the
type (few layers, narrow, random weights), the pair's B gets a gradient that is not zero in a backward pass, and the
saved adapter is the same when plain PEFT loads it. The small model is made from the type's default config; shares are
of the matrices of the default model, by the names that both have. Not counted: embeddings, the output head, vectors,
convolutions, tables of positions, routers (`--lora router` adapts them).
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import logging
import math
import multiprocessing
import re
import signal
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable, Iterator
from datetime import date
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from rankwise.errors import RankwiseError
from rankwise.models import sites
from rankwise.models.adapt import adapt, lora_layers
from rankwise.models.cut_down import UNFIT
from rankwise.models.sites import flat_experts, model_sites, router_paths
from rankwise.models.targets import uniform_plan
from rankwise.options.sections import LoraSection

# Of what measures a row: this file above the pages, and the sites.
MEASURES = Path(__file__).read_text().partition("\ndef table(")[0] + inspect.getsource(sites)
SCRIPT = hashlib.sha256(MEASURES.encode()).hexdigest()[:10]
RESULTS = Path(__file__).parent / "results" / "coverage.json"
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
TASKS = {"causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "image-text": MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
ENOUGH, GOAL = 0.98, 0.95
PATIENCE = 40  # seconds of a processor for a type
SIZES = [*product((4, 8), (16, 4, 1)), (None, 16)]  # layers of a tower (None: all), what widths are divided by
LARGEST = 600_000_000  # parameters of a small model
RANK, TOKENS, WORDS = 2, 12, 1024

DEPTHS = re.compile(r"(num_(hidden_|encoder_|decoder_|global_)?layers|n_layers?|depth|(en|de)coder_layers|num_blocks)$")
HEADS = re.compile(r"(heads|n_head|head_num|n_groups)$")
WIDTHS = re.compile(
    r"(hidden_size|intermediate_size\w*|d_model|n_embd|n_inner|embed_dim|d_ff|ffn_dim|ffn_hidden_size|dim|width|rank"
    r"|out_channel|inner_dim|lru_width|mamba_d_ssm|projection_dim|hidden_dim|out_hidden_size|\w+_ffn_dim|mlp_dim)$"
)
TOKEN = re.compile(r"_token_(id|index)$|_token$")
CROSS = re.compile(r"encoder_attn|cross_?attn|crossattention|cross_attention")
KEPT = re.compile(r"head_dim|rope|patch|conv|kernel|temporal|state|vocab|window")
EXPERTS = {
    re.compile(r"(num|n)_(local_|routed_|moe_)?experts$|moe_num_experts$"): 8,
    re.compile(r"experts_per_tok|top_?k|moe_k$"): 2,
    re.compile(r"zero_expert_num"): 1,
    re.compile(r"n_group$|topk_group$|num_expert_groups?$"): 1,
    re.compile(r"first_k_dense_replace|moe_layer_start_index"): 1,
}
Content = dict[str, Any]


class Unbuilt(Exception):
    """Why a type has no small model."""


FAULTS = (
    *UNFIT,
    AssertionError,
    ArithmeticError,
    Unbuilt,
    RankwiseError,
)  # of configs, models and inputs that do not fit


def default_model(kind: str, task: str) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(kind, task)(CONFIG_MAPPING[kind]())


def model_class(kind: str, task: str) -> Any:
    name = TASKS[task][kind]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def small_config(kind: str, depth: int | None, factor: int) -> Any:
    config = CONFIG_MAPPING[kind]()
    content = config.to_dict()
    for part in parts(content):
        shrink(part, depth, factor)
    return type(config).from_dict(content)


def parts(content: Content) -> Iterator[Content]:
    yield content
    for value in content.values():
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            yield from parts(value)


def shrink(part: Content, depth: int | None, factor: int) -> None:
    """Fewer layers (of each kind the first), fewer heads and experts of the same head size, narrower by the factor."""
    for name in [name for name in part if DEPTHS.search(name)]:
        whole = part[name]
        if depth is not None and isinstance(whole, int) and whole > depth:
            kept = kept_layers(part, whole, depth)
            for key, value in part.items():
                if isinstance(value, list) and len(value) == whole:
                    part[key] = [value[place] for place in kept]
                elif isinstance(value, list) and key.endswith("layers_indices"):  # whose states are handed on
                    part[key] = [min(at, depth - 1) for at in value]
                elif numbered(value) and "label" not in key:
                    part[key] = {kept.index(int(at)): one for at, one in value.items() if int(at) in kept}
            part[name] = depth
    vocabulary = part.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary > WORDS:
        part["vocab_size"] = WORDS
        special = [
            name for name, value in part.items() if TOKEN.search(name) and isinstance(value, int) and value >= WORDS
        ]
        part.update({name: WORDS - 1 - place for place, name in enumerate(special)})
    for name, value in part.items():
        if value is None and "experts_per_tok" in name:
            part[name] = 2
        for pattern, most in EXPERTS.items():
            if pattern.search(name) and isinstance(value, int) and not isinstance(value, bool):
                part[name] = min(value, most)
        if KEPT.search(name) or isinstance(value, bool):
            continue
        if HEADS.search(name) and isinstance(value, int):
            part[name] = max(1, value // factor)
        elif WIDTHS.search(name):
            part[name] = narrower(value, factor)


def numbered(value: Any) -> bool:
    """Whether this is a table of layers by their number."""
    return isinstance(value, dict) and bool(value) and all(str(key).isdigit() for key in value)


def kept_layers(part: Content, whole: int, depth: int) -> list[int]:
    """The first layer of each kind that the lists and tables of layers tell apart, and as many others as there are."""
    lists = [list(map(str, value)) for value in part.values() if isinstance(value, list) and len(value) == whole]
    firsts = [one.index(kind) for one in lists for kind in dict.fromkeys(one)]
    firsts += [int(next(iter(value))) for key, value in part.items() if numbered(value) and "label" not in key]
    firsts = list(dict.fromkeys(place for place in firsts if place < whole))[:depth]
    return sorted([*firsts, *[place for place in range(whole) if place not in firsts][: depth - len(firsts)]])


def narrower(value: Any, factor: int) -> Any:
    if isinstance(value, list):
        return [narrower(one, factor) for one in value]
    return value // factor if isinstance(value, int) and value >= 64 and value % factor == 0 else value


def small_model(kind: str, task: str, config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        if (size := model_class(kind, task)(config).num_parameters()) > LARGEST:
            raise Unbuilt(f"{size / 1e6:.0f} million parameters")
    with init_empty_weights(include_buffers=False):
        model = model_class(kind, task)(config)
    model.set_experts_implementation("eager")  # grouped kernels take certain widths only
    return randomised(model).float().eval()


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """With weights of which none is at zero, so that whatever is part of the result shows."""
    generator = torch.Generator().manual_seed(0)
    made: dict[int, nn.Parameter] = {}
    for name, one in list(model.named_parameters(remove_duplicate=False)):
        inner, _, leaf = name.rpartition(".")
        if id(one) not in made:
            value = torch.rand(one.shape, generator=generator) * 2 - 1
            if one.dim() > 1:
                value *= math.sqrt(3 / math.prod(one.shape[1:]))
            else:
                value = value / 10 + (leaf == "weight")
            made[id(one)] = nn.Parameter(value, requires_grad=False)
        setattr(model.get_submodule(inner), leaf, made[id(one)])
    return model


def type_path(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def counted(model: PreTrainedModel) -> dict[str, int]:
    """Type path of every matrix that counts → its entries, of all layers together."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tables = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    heads = {head, *(module for path, module in model.named_modules() if path.endswith("lm_head"))}
    ends = (module for module in model.modules() if isinstance(module, tables) or module in heads)
    left = {id(module.weight) for module in ends if hasattr(module, "weight")}  # RoBERTa's head is a block
    routing, found = router_paths(model), {}
    for name, one in model.named_parameters():
        path, _, leaf = name.rpartition(".")
        if one.dim() < 2 or id(one) in left or path in routing or "pos" in leaf or "bias" in leaf:
            continue
        found[type_path(name)] = found.get(type_path(name), 0) + one.numel()
    return found


def pairs_of(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Path of a site → its A and B, as PEFT has them."""
    layers = lora_layers(model).items()
    return {path: (layer.lora_A["default"].weight, layer.lora_B["default"].weight) for path, layer in layers}


def examined(kind: str, task: str) -> Content:
    """The row of a type. script: the version of what measured it."""
    row: Content = {"task": task, "type": kind, "script": SCRIPT}
    try:
        whole = default_model(kind, task)
    except FAULTS as error:  # what a default config lacks is not our matter
        return row | {"unbuilt": said(error)}
    if flat := flat_experts(whole):
        row["refused"] = f"experts below one another in one matrix ({type_path(flat[0])})"
    wanted = counted(whole)
    best: Content = {}
    reasons: list[tuple[int | None, str]] = []
    for depth, factor in SIZES:
        if any(one == depth and reasons.count((one, why)) > 1 for one, why in reasons):
            continue  # the same fault at two widths: it is the depth's
        try:
            found = tried(kind, task, depth, factor, wanted)
        except FAULTS as error:
            reasons.append((depth, said(error)))
            continue
        same_again = found["missed"] == best.get("missed")
        best = max(best, found, key=lambda one: one.get("share", -1.0))
        if best["share"] >= ENOUGH or not found["larger"] or same_again:
            break
    best.pop("larger", None)
    return row | (best or {"unshrunk": reasons[0][1] if reasons else "no size fits"})


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:160]


def tried(kind: str, task: str, depth: int | None, factor: int, wanted: dict[str, int]) -> Content:
    """What a small model of this size shows."""
    config = small_config(kind, depth, factor)
    model = small_model(kind, task, config)
    there = set(counted(model))
    found = model_sites(model)
    wrapped = adapt(model, uniform_plan(found, RANK, None, False, kind), LoraSection(lora_dropout=0.0))
    complete = backward(wrapped)
    still = {path for path, (_, b) in pairs_of(wrapped).items() if b.grad is None or not bool(b.grad.abs().max() > 0)}
    unlike = reloaded(wrapped)
    bad = {type_path(found[path].weight): "no gradient" for path in still}
    bad |= {type_path(found[path].weight): "loaded otherwise" for path in unlike}
    proven = {type_path(site.weight) for site in found.values()} - set(bad)
    seen = sum(size for name, size in wanted.items() if name in proven)
    missed = sorted((name for name in wanted if name not in proven), key=wanted.__getitem__, reverse=True)
    if not complete and seen < ENOUGH * sum(wanted.values()):
        raise Unbuilt(f"no usual input fits its tower; {seen / sum(wanted.values()):.1%} without it")
    return {
        "share": seen / max(1, sum(wanted.values())),
        "layers": depth,
        "divided": factor,
        "missed": [f"{name} ({bad.get(name, 'no site')})" for name in missed[:4]],
        "larger": bool(still) or not set(missed) <= there,  # may show more
        "experts": sum(1 for site in found.values() if site.experts),
        "names": sorted({site.peft for site in found.values()}),
    }


def run_text(model: PreTrainedModel) -> Any:
    """What the model makes of two rows of text."""
    text, known = model.config.get_text_config(), inspect.signature(model.forward).parameters
    vocabulary = min(int(getattr(text, "vocab_size", 0) or 64), 1000)
    ids = torch.randint(5, vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    inputs: Content = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in known:
        inputs["decoder_input_ids"] = ids
    elif any(CROSS.search(path) for path, _ in model.named_modules()):  # a decoder that reads another's states
        states = torch.rand(2, TOKENS, text.hidden_size)
        ways = {"encoder_hidden_states": states, "encoder_outputs": (states,), "cross_attention_states": states}
        inputs |= {name: value for name, value in ways.items() if name in known}
    if "moe_mm_token_type_ids" in known:  # Ernie: an image's tokens have experts of their own
        inputs["moe_mm_token_type_ids"] = torch.arange(TOKENS).expand(2, TOKENS) % 2
    if "pixel_values" in known and known["pixel_values"].default is inspect.Parameter.empty:
        inputs["pixel_values"] = torch.rand(2, 3, *[model.config.vision_config.image_size] * 2)
    if "protein_input_ids" in known:
        inputs |= {"protein_input_ids": ids % 20, "protein_attention_mask": torch.ones_like(ids)}
    if "bbox" in known:
        inputs["bbox"] = torch.arange(4).expand(2, TOKENS, 4) * 0.1
    return model(**inputs, **({"use_cache": False} if "use_cache" in known else {}))


def backward(model: PeftModel) -> bool:
    """The gradients of a pass over text, and one image where the model takes one; whether all it has took part."""
    base = model.get_base_model()
    total, makers = loss_of(run_text(base)), feature_makers(base)
    found = [loss_of(features) for features in features_of(makers)]
    sum(found, total).backward()
    return bool(found) or not makers


def loss_of(output: Any) -> Tensor:
    """A sum over all that came out, with weights that tell the entries apart."""
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else [output]
    found = torch.zeros(())
    for value in values:
        if isinstance(value, Tensor):
            if value.is_floating_point() and value.requires_grad:
                weights = torch.rand(value.shape, generator=torch.Generator().manual_seed(1))
                found = found + (value.float() * weights).sum()
        elif isinstance(value, dict | tuple | list):
            found = found + loss_of(value)
    return found


def feature_makers(model: PreTrainedModel) -> list[tuple[Any, Iterable[Content]]]:
    """What makes features of images or sound, or is a tower of them, and the usual forms of its inputs."""
    towers = [one for one in model.modules() if isinstance(one, PreTrainedModel)]
    made = [(one.get_image_features, one.config) for one in towers if hasattr(one, "get_image_features")]
    made += [(one, one.config) for one in towers if "pixel_values" in takes(one) and "input_ids" not in takes(one)]
    made += [(one, one.config) for one in towers if "flattened_patches" in takes(one) and one is not model]
    heard = [(one.get_audio_features, AUDIO) for one in towers if hasattr(one, "get_audio_features")]
    heard += [(one, AUDIO) for one in towers if {"hidden_states", "mask"} <= set(takes(one))]  # Phi-4's encoder
    return [
        *((maker, image_inputs(getattr(config, "vision_config", None) or config)) for maker, config in made),
        *heard,
    ]


def features_of(makers: list[tuple[Any, Iterable[Content]]]) -> Iterator[Any]:
    """What each makes of the first form that fits it."""
    for maker, forms in makers:
        for inputs in forms:
            try:
                yield maker(**inputs)
                break
            except FAULTS:
                continue


def takes(module: nn.Module) -> Collection[str]:
    return inspect.signature(module.forward).parameters


AUDIO: list[Content] = [
    *({"input_features": torch.rand(1, bands, 3000)} for bands in (80, 128)),
    {"hidden_states": torch.rand(1, 64, 80), "mask": torch.ones(1, 64, dtype=torch.bool)},
]


def image_inputs(vision: Any) -> Iterator[Content]:
    patch = getattr(vision, "patch_size", None) or 14
    patch = patch if isinstance(patch, int) else patch[0]
    whole = getattr(vision, "image_size", None) or 8 * patch
    frames, merge = getattr(vision, "temporal_patch_size", 1) or 1, getattr(vision, "spatial_merge_size", 2) or 2
    grid = torch.tensor([[1, 2 * merge, 2 * merge]])
    count = int(grid.prod())
    rows = torch.rand(count, 3 * frames * patch * patch)
    flat = {"pixel_values": rows[None], "pixel_attention_mask": torch.ones(1, rows.shape[0], dtype=torch.long)}
    yield flat | {"spatial_shapes": grid[:, 1:]}
    yield {"pixel_values": rows, "image_grid_hw": grid[:, 1:]}
    for side in dict.fromkeys((patch, 16)):
        yield {"flattened_patches": torch.rand(1, 9, 2 + 3 * side * side)}
    for name in ("image_grid_thw", "grid_thw", "image_grid_hws"):
        yield {"pixel_values": rows, name: grid}
        yield {"pixel_values": torch.rand(count, 3, patch, patch), name: grid}
        yield {"pixel_values": torch.rand(count, 3 * 2 * patch * patch), name: grid}
    yield {"pixel_values": torch.rand(1, 3, patch, count * patch), "target_sizes": grid[:, 1:].int()}
    for side in (whole if isinstance(whole, int) else whole[0], 8 * patch, 16 * patch):
        picture, sizes = torch.rand(1, 3, side, side), torch.tensor([[side, side]])
        yield {"pixel_values": picture}
        yield {"pixel_values": picture, "image_sizes": sizes}
        yield {"pixel_values": picture[None], "image_sizes": sizes}
        yield {"pixel_values": picture[None]}
        yield {"pixel_values": picture[None], "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.bool)}
        yield {"pixel_values": picture[None], "pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
        tiles, one = getattr(vision, "max_num_tiles", 1), torch.ones(1, 1, dtype=torch.long)
        ratios = {"aspect_ratio_ids": one, "aspect_ratio_mask": one[..., None].expand(1, 1, tiles)}
        yield {"pixel_values": picture.expand(1, 1, tiles, 3, side, side)} | ratios


def reloaded(model: PeftModel) -> set[str]:
    """Sites whose pair plain PEFT does not load as it was saved, with random B."""
    for _, b in pairs_of(model).values():
        b.data.normal_()
    before = {path: (a.detach().clone(), b.detach().clone()) for path, (a, b) in pairs_of(model).items()}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        after = pairs_of(PeftModel.from_pretrained(model.unload(), folder))
    return {path for path in {*before, *after} if not same(before.get(path), after.get(path))}


def same(one: tuple[Tensor, Tensor] | None, other: tuple[Tensor, Tensor] | None) -> bool:
    return one is not None and other is not None and all(map(torch.equal, one, other))


def child(kind: str, task: str, place: str) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    Path(place).write_text(json.dumps(examined(kind, task)))


def in_own_process(kind: str, task: str) -> Content:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "row.json"
        process = multiprocessing.get_context("fork").Process(target=child, args=(kind, task, str(place)))
        process.start()
        process.join()
        if place.is_file():
            return json.loads(place.read_text())
        return {
            "task": task,
            "type": kind,
            "script": SCRIPT,
            "unshrunk": f"no small model within {PATIENCE} s or the memory",
        }


def table(header: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    rule = tuple("---" for _ in header)
    return [f"| {' | '.join(line)} |" for line in (header, rule, *lines)]


def families_page(content: Content) -> str:
    """docs/families.md of a run."""
    rows = content["rows"]
    measured = [row for row in rows if "share" in row]
    good = [row for row in measured if row["share"] >= ENOUGH]
    less = sorted((row for row in measured if row["share"] < ENOUGH), key=lambda row: row["share"])
    unshrunk = [row for row in rows if "unshrunk" in row]
    unbuilt = [row for row in rows if "unbuilt" in row]
    experts = sorted({row["type"] for row in good if row["experts"]})
    others = sorted({row["type"] for row in good} - set(experts))
    libraries = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    text = [
        "# Model families",
        "",
        "Generated by `python benchmarks/coverage.py` from `benchmarks/results/coverage.json`; change neither by hand.",
        "",
        "Of every architecture that transformers builds from its default config as a causal or an image-text model, "
        f"how much can `rankwise train` adapt? {libraries}, {content['date']}.",
        "",
        "A parameter counts where, in a small model of the type, PEFT builds the pair of its site, the pair's B gets a "
        "gradient that is not zero, and plain PEFT loads the saved pair as it was. Embeddings, the output head, "
        "vectors, convolutions, tables of positions and routers (`--lora router`) do not count.",
        "",
        f"**{len(good)} of {len(measured)} ({len(good) / max(1, len(measured)):.1%}) are adapted to at least "
        f"{ENOUGH:.0%}.** {len(unshrunk)} more were not tried at a small size; {len(unbuilt)} cannot be made from "
        f"their default config; {sum(map(len, TASKS.values())) - len(rows)} are not run yet. {said_of_scripts(rows)}",
        "",
        "## Mixtures of experts",
        "",
        f"{len(experts)} types; every layer's experts are sites ([experts](experts.md)): "
        + ", ".join(f"`{name}`" for name in experts)
        + ".",
        "",
        "DBRX keeps the experts of a layer below one another in one matrix, for which PEFT has no adapters: "
        "`--target attention_only` adapts the rest, anything else is refused by name.",
        "",
        "## Others",
        "",
        f"{len(others)} types: " + ", ".join(f"`{name}`" for name in others) + ".",
        "",
        "## Less than that",
        "",
        "PEFT refuses `out_proj` of Mamba, Falcon-Mamba, Falcon-H1 and Nemotron-H, whose fused kernels read its weight "
        "past any adapter; in a fused kernel `dt_proj` of a Mamba mixer is read so everywhere.",
        "",
        *table(
            ("type", "adapted", "largest matrices that are not"),
            [(f"`{row['type']}`", f"{row['share']:.1%}", "; ".join(row["missed"][:3])) for row in less],
        ),
        "",
        "## Not tried at a small size",
        "",
        *table(("type", "why"), [(f"`{row['type']}`", row["unshrunk"].replace("|", "/")) for row in unshrunk]),
        "",
        "## Not made from their default config",
        "",
        ", ".join(f"`{name}`" for name in sorted({row["type"] for row in unbuilt})) + ".",
        "",
    ]
    return "\n".join(text)


def said_of_scripts(rows: list[Content]) -> str:
    """How many rows which version of what measures them made."""
    made = [row["script"] for row in rows]
    told = ", ".join(f"{made.count(script)} by {script}" for script in sorted(set(made), key=made.count, reverse=True))
    return f"Rows by the version of the script: {told}."


def measured_table(content: Content) -> str:
    """results/coverage.md: every type."""
    lines = []
    for row in content["rows"]:
        said_of = row.get("unbuilt") or row.get("unshrunk") or "; ".join(row["missed"][:3])
        share = f"{row['share']:.2%}" if "share" in row else ""
        stacks = str(row["experts"]) if row.get("experts") else ""
        lines.append((row["task"], f"`{row['type']}`", share, stacks, said_of.replace("|", "/")))
    header = ("task", "type", "adapted", "stacks of experts in the small model", "not adapted, or why not tried")
    libraries = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    head = (
        f"# What can be adapted, type by type\n\n`python benchmarks/coverage.py`; {libraries}; {content['date']}.\n\n"
    )
    return head + "\n".join(table(header, lines)) + "\n"


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("transformers", "peft", "torch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument(
        "--again", action="store_true", help="measure again what another version of this script measured"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    kept = json.loads(options.out.read_text()) if options.out.is_file() else {}
    before = kept.get("rows", []) if kept.get("versions") == versions() else []
    rows = {(row["task"], row["type"]): {"script": "an earlier one", **row} for row in before}
    get_checkpoint_conversion_mapping("mixtral")  # transformers' table, made once for all processes
    for task, names in TASKS.items():
        for kind in names:
            if options.types and kind not in options.types:
                continue
            if (task, kind) in rows and not (options.again and rows[task, kind].get("script") != SCRIPT):
                continue
            started = time.monotonic()
            row = in_own_process(kind, task)
            rows[task, kind] = row
            found = row.get("share", row.get("unbuilt", row.get("unshrunk")))
            print(f"{time.monotonic() - started:5.1f} s {task} {kind}: {found}", flush=True)
            ordered = [rows[each, one] for each, names_ in TASKS.items() for one in names_ if (each, one) in rows]
            content = {"versions": versions(), "date": str(date.today()), "rows": ordered}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
    if options.out == RESULTS:
        content = json.loads(RESULTS.read_text())
        RESULTS.with_suffix(".md").write_text(measured_table(content))
        PAGE.write_text(families_page(content))


if __name__ == "__main__":
    main()
