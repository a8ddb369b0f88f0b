"""Configs for other trainers: what each would train, by PEFT's own matching, is the plan; or it is refused.

What a trainer makes of its file is written down here as it was read in its package, with the names that it knows.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import experts
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from tiny_vision import tiny_qwen25vl
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rankwise.cli import main
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.errors import UsageError
from rankwise.files.plan import read_plan
from rankwise.models.adapt import lora_layers, quiet_peft
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import scales
from rankwise.ranks.emit import TRAINERS, emit

# --- the trainers ----------------------------------------------------------------------------------------------------

# ms-swift 4.6.0: swift/arguments/tuner_args.py, base_args/model_args.py, base_args/base_args.py. Others raise.
SWIFT = frozenset(
    """model tuner_type freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters
    trainable_parameters_regex freeze_llm freeze_vit freeze_aligner target_modules target_regex target_parameters
    modules_to_save lora_rank lora_alpha lora_dropout lora_bias lora_dtype lorap_lr_ratio use_rslora use_dora
    init_weights""".split()
)
# axolotl 0.19.0: axolotl/utils/schemas/peft.py (LoraConfig), model.py.
AXOLOTL = frozenset(
    """base_model load_in_8bit load_in_4bit adapter lora_model_dir lora_r lora_alpha lora_fan_in_fan_out
    lora_target_modules lora_target_parameters lora_target_linear lora_modules_to_save lora_rank_pattern
    lora_alpha_pattern lora_dropout peft_layers_to_transform peft_layers_pattern peft peft_use_dora peft_use_rslora
    peft_layer_replication peft_init_lora_weights peft_trainable_token_indices peft_ensure_weight_tying""".split()
)
# unsloth 2026.10.9: FastLlamaModel.get_peft_model in unsloth/models/llama.py; **kwargs go to PEFT's LoraConfig.
UNSLOTH = frozenset(
    """r target_modules lora_alpha lora_dropout bias layers_to_transform layers_pattern finetune_last_n_layers
    use_gradient_checkpointing random_state max_seq_length use_rslora modules_to_save init_lora_weights loftq_config
    temporary_location qat_scheme target_parameters ensure_weight_tying offload_layers checkpoint_skip_layers""".split()
)
# LLaMA-Factory 0.9.5: LoraArguments in llamafactory/hparams/finetuning_args.py, model_args.py.
LLAMAFACTORY = frozenset(
    """model_name_or_path finetuning_type additional_target lora_alpha lora_dropout lora_rank lora_target
    loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init pissa_iter pissa_convert
    create_new_adapter""".split()
)
# llamafactory/model/model_utils/visual.py: modules of a family that no LoRA reaches with its default freezing.
FORBIDDEN = {"qwen2_5_vl": ("visual.patch_embed", "visual.blocks", "visual.merger", "patch_embed")}


def known(fields: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
    assert set(fields) <= names, f"unknown to the trainer: {sorted(set(fields) - names)}"
    return fields


def of_peft(fields: dict[str, Any], _: PreTrainedModel) -> dict[str, Any]:
    return fields


def of_unsloth(fields: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A text stays one regex; a list of paths would be taken for leaf names where a tower is left out."""
    peft_names = frozenset(LoraConfig.__dataclass_fields__)
    assert type(fields["r"]) is int and fields["r"] > 0
    assert type(fields.get("use_rslora", False)) is bool
    assert isinstance(fields["target_modules"], str)
    return {**known(fields, UNSLOTH | peft_names), "task_type": "CAUSAL_LM"}


def of_axolotl(fields: dict[str, Any], _: PreTrainedModel) -> dict[str, Any]:
    """axolotl/loaders/adapter.py, after pydantic's int fields."""
    known(fields, AXOLOTL)
    patterns = {name: fields[f"lora_{name}"] for name in ("rank_pattern", "alpha_pattern") if f"lora_{name}" in fields}
    numbers = [fields["lora_r"], fields["lora_alpha"], *(n for found in patterns.values() for n in found.values())]
    assert all(type(number) is int and number > 0 for number in numbers)
    assert fields["adapter"] == "lora"
    return {
        "r": fields["lora_r"],
        "lora_alpha": fields["lora_alpha"],
        "target_modules": fields["lora_target_modules"],
        "target_parameters": fields.get("lora_target_parameters"),
        "lora_dropout": fields.get("lora_dropout", 0.0),
        "fan_in_fan_out": fields.get("lora_fan_in_fan_out"),
        "use_rslora": fields.get("peft_use_rslora", False),
        **patterns,
    }


def of_swift(fields: dict[str, Any], _: PreTrainedModel) -> dict[str, Any]:
    """swift/pipelines/train/tuner.py: `target_regex` stands for `target_modules`."""
    known(fields, SWIFT)
    assert fields["tuner_type"] == "lora"
    return {
        "r": fields["lora_rank"],
        "lora_alpha": fields["lora_alpha"],
        "target_modules": fields["target_regex"] if "target_regex" in fields else fields["target_modules"],
        "target_parameters": fields.get("target_parameters"),
        "lora_dropout": fields.get("lora_dropout", 0.05),
        "use_rslora": fields.get("use_rslora", False),
    }


def of_llamafactory(fields: dict[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """llamafactory/model/adapter.py: names by comma; of a known family, every module whose name holds one."""
    known(fields, LLAMAFACTORY)
    assert (fields["finetuning_type"], type(fields["lora_alpha"])) == ("lora", int)
    names = fields["lora_target"].split(",")
    forbidden = FORBIDDEN.get(model.config.model_type)
    if forbidden:
        found = [name for name, _ in model.named_modules() if any(target in name for target in names)]
        names = [name for name in found if not any(part in name for part in forbidden)]
    return {
        "r": fields["lora_rank"],
        "lora_alpha": fields["lora_alpha"],
        "target_modules": names,
        "use_rslora": fields.get("use_rslora", False),
    }


READERS: dict[str, Callable[[dict[str, Any], PreTrainedModel], dict[str, Any]]] = {
    "peft": of_peft,
    "unsloth": of_unsloth,
    "axolotl": of_axolotl,
    "swift": of_swift,
    "llamafactory": of_llamafactory,
}


def trained(model: PreTrainedModel, trainer: str, text: str) -> dict[str, tuple[int, float]]:
    """Path → rank and scale of what the trainer would train."""
    fields = json.loads(text) if TRAINERS[trainer][2] == "json" else yaml.safe_load(text)
    with quiet_peft():
        adapted = get_peft_model(model, LoraConfig(**READERS[trainer](fields, model)))
    layers = lora_layers(adapted)
    return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers.items()}


def wanted(plan: RankPlan) -> dict[str, tuple[int, Any]]:
    return {path: (rank, pytest.approx(scales(plan)[path])) for path, rank in plan.ranks.items()}


# --- the models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=12)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen25vl(tmp_path_factory.mktemp("qwen"))


@cache
def on_meta(folder: Path) -> PreTrainedModel:
    return meta_model(str(folder))


def fresh(folder: Path) -> PreTrainedModel:
    return copy.deepcopy(on_meta(folder))


def plan_of(sites: dict[str, Site], rank: Callable[[Site], int], **more: Any) -> RankPlan:
    return RankPlan(tuple(PlannedSite(site, rank(site)) for site in sites.values()), "org/model", **more)


UNEVEN = {"swift": "one rank for all matrices", "llamafactory": "one rank for all matrices"}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize(
    ("kind", "rank", "refused"),
    [
        ("every layer", lambda site: 8, {}),
        ("some layers", lambda site: 8 * (site.layer in (1, 11)), {}),
        ("queries of some layers", lambda site: 4 * (site.layer in (0, 1) and site.projection == "q_proj"), {}),
        ("uneven ranks", lambda site: 1 + (site.layer or 0) % 3, UNEVEN),
        ("uneven ranks and zeros", lambda site: (site.layer or 0) % 3, UNEVEN),
    ],
)
def test_a_plan_of_a_text_model_is_trained_exactly(
    llama: Path, trainer: str, kind: str, rank: Callable[[Site], int], refused: dict[str, str]
) -> None:
    plan = plan_of(model_sites(on_meta(llama)), rank)
    if trainer in refused:
        with pytest.raises(UsageError, match=rf"--emit {trainer}.*{refused[trainer]}.*emit peft, axolotl or unsloth"):
            emit(plan, trainer)
    else:
        assert trained(fresh(llama), trainer, emit(plan, trainer)[0]) == wanted(plan), kind


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("tower", ["language", "vision", "projector"])
def test_a_plan_of_one_tower_is_trained_exactly(qwen: Path, trainer: str, tower: str) -> None:
    """Both towers have `gate_proj`, `up_proj` and `down_proj`."""
    plan = plan_of(model_sites(on_meta(qwen)), lambda site: 4 * (site.tower == tower))
    assert plan.ranks
    if (trainer, tower == "language") == ("llamafactory", False):
        with pytest.raises(UsageError, match=rf"what trains of a {tower} tower is decided by its own table"):
            emit(plan, trainer)
    else:
        assert trained(fresh(qwen), trainer, emit(plan, trainer)[0]) == wanted(plan)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_plan_is_trained_exactly_or_refused(llama: Path, qwen: Path, data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from([llama, qwen]))
    sites = model_sites(on_meta(folder))
    layers = data.draw(st.sets(st.integers(0, 3), min_size=1))
    names = data.draw(st.sets(st.sampled_from(sorted({site.projection for site in sites.values()})), min_size=1))
    ranks_of = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    chosen = {path: place for place, path in enumerate(sites) if sites[path].layer in layers}
    plan = plan_of(
        sites,
        lambda site: (
            ranks_of[chosen[site.path] % len(ranks_of)] * (site.projection in names) if site.path in chosen else 0
        ),
        use_rslora=data.draw(st.booleans()),
        alpha_over_rank=data.draw(st.sampled_from([1.0, 2.0, 3.3])),
    )
    for trainer in TRAINERS:
        try:
            text, _ = emit(plan, trainer)
        except UsageError:
            assert trainer not in ("peft", "unsloth") or not plan.ranks, "PEFT says every plan"
        else:
            assert trained(fresh(folder), trainer, text) == wanted(plan)


def test_matrices_stored_transposed_are_trained_exactly() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=64, n_positions=32))
    plan = plan_of(model_sites(model), lambda site: 2 if site.layer == 1 else 0)
    for trainer in ("peft", "unsloth", "axolotl"):
        assert trained(copy.deepcopy(model), trainer, emit(plan, trainer)[0]) == wanted(plan)


MIXTURES = sorted(experts.FAMILIES)
OF_MIXTURES = ("peft", "axolotl", "swift")


@cache
def mixture(family: str) -> PreTrainedModel:
    return experts.built(family)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("trainer", OF_MIXTURES)
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("everything", lambda site: 2),
        ("the last layer", lambda site: 2 * (site.layer == 1)),
        ("experts' down projections", lambda site: 2 * (site.projection == "down_proj" and bool(site.experts))),
        ("the attention of one layer", lambda site: 2 * (site.layer == 0 and site.kind == "attention")),
        ("what is dense or shared", lambda site: 2 * (site.kind == "mlp" and not site.experts)),
        ("uneven ranks", lambda site: 1 + (site.layer or 0) + bool(site.experts)),
    ],
)
def test_a_plan_of_a_mixture_is_trained_exactly(
    family: str, trainer: str, kind: str, rank: Callable[[Site], int]
) -> None:
    """PEFT keeps the bare names of a regex there, and takes a dense layer's matrices for the experts."""
    plan = plan_of(model_sites(mixture(family)), rank)
    if not plan.ranks:
        assert kind != "everything"
        return
    if (trainer, kind) == ("swift", "uneven ranks"):
        with pytest.raises(UsageError, match="one rank for all matrices"):
            emit(plan, trainer)
    else:
        assert trained(copy.deepcopy(mixture(family)), trainer, emit(plan, trainer)[0]) == wanted(plan)


@pytest.mark.parametrize("family", MIXTURES)
def test_trainers_that_cannot_take_experts_say_so(family: str) -> None:
    plan = plan_of(model_sites(mixture(family)), lambda site: 2)
    with pytest.raises(UsageError, match="--emit unsloth: it adds a model's fused experts to what trains"):
        emit(plan, "unsloth")
    with pytest.raises(UsageError, match=r"--emit llamafactory: .*by parameter; .* emit peft, axolotl or swift"):
        emit(plan, "llamafactory")
    attention = plan_of(model_sites(mixture(family)), lambda site: 2 * (site.kind == "attention"))
    built = trained(copy.deepcopy(mixture(family)), "llamafactory", emit(attention, "llamafactory")[0])
    assert built == wanted(attention)


def test_names_that_end_another_sites_path_are_refused() -> None:
    sites = {path: Site(path, (4, 4), "language", "attention") for path in ("layers.0.q", "draft.layers.0.q")}
    plan = plan_of(sites, lambda site: 2 * site.path.startswith("layers"))
    with pytest.raises(UsageError, match=r"layers\.0\.q also matches draft\.layers\.0\.q"):
        emit(plan, "llamafactory")


def test_a_plan_that_trains_nothing_and_another_trainer_are_refused(llama: Path) -> None:
    plan = plan_of(model_sites(on_meta(llama)), lambda site: 0)
    for trainer in TRAINERS:
        with pytest.raises(UsageError, match="nothing would train"):
            emit(plan, trainer)
    with pytest.raises(UsageError, match="known trainers"):
        emit(plan, "other")


# --- the command -----------------------------------------------------------------------------------------------------


def test_what_a_trainer_cannot_take_ends_the_command_with_2_and_leaves_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [str(tiny_llama(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    words = ["ranks", *pair, "--energy", "0.8", "--min-rank", "1", "-o", str(tmp_path / "out"), "--no-plots"]
    assert main([*words, "--emit", "peft,swift,unsloth"]) == 2
    said = capsys.readouterr().err
    assert "--emit swift: it takes one rank for all matrices" in said
    files = {file.stem for file in (tmp_path / "out" / "configs").iterdir()}
    assert files == {"lora_rank_config", "peft", "unsloth"}
    assert "ranks" in json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]


def test_the_command_sees_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("base", "tuned")):
        experts.built("mixtral", seed=seed).save_pretrained(tmp_path / name)
    words = ["ranks", str(tmp_path / "base"), str(tmp_path / "tuned"), "-o", str(tmp_path / "out"), "--no-plots"]
    assert main([*words, "--min-rank", "1", "--include", r"layers\.0\.self_attn", "--emit", "peft,unsloth"]) == 2
    assert "--emit unsloth: it adds a model's fused experts to what trains" in capsys.readouterr().err
    plan = read_plan(tmp_path / "out", None)
    text = (tmp_path / "out" / "configs" / "peft.json").read_text()
    assert trained(copy.deepcopy(mixture("mixtral")), "peft", text) == wanted(plan)
    assert {path.split(".")[2] for path in plan.ranks} == {"0"}
