"""Laws of towers: every parameter has one, what was asked for trains, and nothing else moves by a bit."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from test_train_vision import words
from tiny import tiny_llama
from torch import nn
from towered import ALL, TOWERS, Bases, loaded, values
from transformers import PreTrainedModel

from rankwise import cli
from rankwise.errors import UsageError
from rankwise.files.adapter import read_adapter
from rankwise.files.plan import read_plan
from rankwise.models.adapt import adapt, lora_layers
from rankwise.models.load import meta_model
from rankwise.models.sites import (
    full_modules,
    full_sites,
    model_sites,
    outside_language,
    tower_of,
    tower_parameters,
    tower_prefixes,
    towers_of,
)
from rankwise.models.targets import check_plan, choose_sites, uniform_plan
from rankwise.options.sections import LoraSection, TowersSection
from rankwise.ranks.deltas import open_deltas
from rankwise.train.towers import finetune_use, train_use

# What a parameter's name begins with, read off the models' own code: (vision, projector); the rest is language.
BEGINNINGS = {
    "qwen25vl": ("model.visual.", "model.visual.merger."),
    "qwen2vl": ("model.visual.", "model.visual.merger."),
    "smolvlm": ("model.vision_model.", "model.connector."),
    "idefics3": ("model.vision_model.", "model.connector."),
    "llava": ("model.vision_tower.", "model.multi_modal_projector."),
    "gemma3": ("model.vision_tower.", "model.multi_modal_projector."),
    "isaac": ("model.vision_embedding.0.", "model.vision_embedding."),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory)


@pytest.fixture(scope="module")
def data(bases: Bases) -> Path:
    return bases.rows


def tiny_gemma3() -> PreTrainedModel:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64}
    vision = small | {"image_size": 32, "patch_size": 8, "vision_use_head": True}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("family", BEGINNINGS)
def test_every_parameter_of_every_family_has_its_tower(family: str, bases: Bases) -> None:
    model = tiny_gemma3() if family == "gemma3" else meta_model(str(bases(family)))
    vision, projector = BEGINNINGS[family]
    first, second = (vision, projector) if len(vision) > len(projector) else (projector, vision)
    named = {vision: "vision", projector: "projector"}
    found = {name: tower for tower in TOWERS for name in tower_parameters(model, [tower])}
    for name, _ in model.named_parameters():
        expected = next((named[start] for start in (first, second) if name.startswith(start)), "language")
        assert found[name] == expected, name
    linear = {"language", "vision"} if family == "gemma3" else set(TOWERS)  # Gemma's projector is a bare parameter
    assert {site.tower for site in model_sites(model).values()} == linear
    assert all(site.tower == found[f"{path}.weight"] for path, site in model_sites(model).items())


def test_the_real_isaac(shared_data: Path) -> None:
    sites = model_sites(meta_model(str(shared_data / "model_configs" / "Isaac-0.1")))
    assert Counter(site.tower for site in sites.values()) == {"language": 28 * 7, "vision": 27 * 6 + 1, "projector": 2}
    layers = {site.layer for site in sites.values() if site.tower == "vision" and "encoder" in site.path}
    assert layers == set(range(27)), "the number of the layer, not that of the list around it"


def test_what_a_depth_encoder_adds_is_its_own_tower() -> None:
    for towers in ({}, {"model": "language"}, {"model.visual": "vision", "model.language_model": "language"}):
        for path in ("depth_model.backbone.encoder.layer.0.mlp.fc1", "depth_preproc", "model.depth_preproc.gate"):
            assert tower_of(path, towers) == "depth"


@pytest.mark.parametrize("family", BEGINNINGS)
def test_whole_modules_hold_a_tower_and_nothing_else(family: str, bases: Bases) -> None:
    model = tiny_gemma3() if family == "gemma3" else meta_model(str(bases(family)))
    for tower in TOWERS:
        found = full_modules(model, [tower])
        assert not found.loose
        held = [f"{path}.{name}" for path in found.paths for name, _ in model.get_submodule(path).named_parameters()]
        assert sorted(held) == sorted(tower_parameters(model, [tower]))
        sites = full_sites(model, found.paths)
        assert {site.tower for site in sites.values()} == {tower}
        assert {name.rpartition(".")[0] for name in held} == set(sites)
    outside = [
        f"{path}.{n}" for path in outside_language(model) for n, _ in model.get_submodule(path).named_parameters()
    ]
    assert set(outside) == set(tower_parameters(model, ["vision", "projector"]))


def test_a_parameter_that_no_module_can_carry_is_named() -> None:
    model = tiny_gemma3()
    model.model.image_newline = nn.Parameter(torch.zeros(4))
    assert full_modules(model, ["projector"]).loose == ("model.image_newline",)


def test_attention_that_reads_past_an_adapter_is_no_site() -> None:
    assert not [path for path in model_sites(tiny_gemma3()) if "head.attention" in path]


# --- what is asked for ---


def test_a_tower_that_is_not_named_keeps_its_default() -> None:
    assert train_use(TowersSection()).lora == ("language",)
    use = train_use(TowersSection(lora=["projector"], full=["vision"], vision_lr=0.0))
    assert (use.lora, use.full, use.rates) == (("language", "projector"), ("vision",), {"vision": 0.0})
    assert train_use(TowersSection(freeze=["language"], lora=["vision"])).lora == ("vision",)
    assert finetune_use(TowersSection(), "full").full == ("language",)
    assert finetune_use(TowersSection(full=["vision"]), "full").full == ("language", "vision")
    assert finetune_use(TowersSection(lora=["vision"]), "lora").lora == ("language", "vision")


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        (TowersSection(lora=["vision"], full=["vision"]), "--lora vision and --full vision exclude"),
        (TowersSection(freeze=["vision"], lora=["vision"]), "--freeze vision and --lora vision exclude"),
        (TowersSection(freeze=["language"]), "every tower is frozen"),
        (TowersSection(full=["language"]), "rankwise finetune --full language"),
        (TowersSection(freeze=["language"], full=["projector"]), "no tower gets an adapter"),
        (TowersSection(vision_lr=1e-5), "the vision tower is frozen"),
    ],
)
def test_towers_that_cannot_be(section: TowersSection, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        train_use(section)


def test_a_learning_rate_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"--language_lr is -1\.0; give a number of at least 0"):
        TowersSection(language_lr=-1.0)


def test_finetune_takes_one_way_at_a_time() -> None:
    with pytest.raises(UsageError, match="--method full"):
        finetune_use(TowersSection(full=["vision"]), "lora")
    with pytest.raises(UsageError, match="--method lora"):
        finetune_use(TowersSection(lora=["vision"]), "full")


@pytest.mark.parametrize("family", ALL)
def test_no_name_reaches_a_tower_that_was_not_asked_for(family: str, bases: Bases) -> None:
    """`q_proj`, `fc1`, `gate_proj`, `mlp` are names of several towers; PEFT alone would adapt all of them."""
    model = loaded(bases(family))
    sites = model_sites(model)
    language = {path for path, site in sites.items() if site.tower == "language"}
    assert set(choose_sites(sites)) == language, "every linear layer of the language tower but the head"
    names = ["q_proj", "down_proj"]
    found = adapt(model, uniform_plan(choose_sites(sites, names=names), 2, None, False, ""), LoraSection())
    assert set(lora_layers(found)) == {path for path in language if path.endswith(tuple(names))}
    towers = tower_prefixes(meta_model(str(bases(family))))
    trained = [name.removeprefix("base_model.model.") for name, p in found.named_parameters() if p.requires_grad]
    assert {tower_of(name.split(".lora_")[0], towers) for name in trained} == {"language"}


def test_asked_towers_must_get_something(bases: Bases) -> None:
    sites = model_sites(meta_model(str(bases("smolvlm"))))
    assert {site.tower for site in choose_sites(sites, towers=TOWERS).values()} == set(TOWERS)
    with pytest.raises(
        UsageError, match=r"--target both matches no matrix of the projector tower; it has proj \(other\)"
    ):
        choose_sites(sites, "both", towers=("language", "projector"))
    with pytest.raises(UsageError, match="only the vision tower has it"):
        choose_sites(sites, names=["fc1"])
    plan = uniform_plan(choose_sites(sites, towers=("language", "vision")), 2, None, False, "")
    check_plan(plan, ("vision", "language"))
    with pytest.raises(UsageError, match="--towers language,projector"):
        check_plan(plan, ("language", "projector"))


# --- the command line ---


def test_the_list_is_printed_saved_and_recorded(
    bases: Bases, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = bases("llava")
    assert cli.main(words(base, data, tmp_path, "--full", "projector", "--max_steps", "1", "--lora_r", "2")) == 0
    printed = capsys.readouterr().out
    assert "adapting 14 sites of the language tower: q_proj ×2" in printed
    assert "training the projector tower in full: model.multi_modal_projector (2,112 parameters)" in printed
    assert "frozen: vision" in printed
    sites = json.loads((tmp_path / "sites.json").read_text())
    assert {row["tower"] for row in sites["sites"]} == {"language"}
    assert sites["full"] == [{"path": "model.multi_modal_projector", "tower": "projector"}]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--lora", "vision", "--full", "vision"), "exclude each other"),
        (("--lora", "visoin"), "did you mean vision"),
        (("--projector_lr", "1e-3"), "the projector tower is frozen"),
        (("--target", "both", "--lora", "projector"), "no matrix of the projector tower"),
    ],
)
def test_refusals(
    bases: Bases,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    reason: str,
) -> None:
    assert cli.main(words(bases("smolvlm"), data, tmp_path, *more)) == 2
    assert reason in capsys.readouterr().err


def test_a_text_model_has_one_tower(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    assert towers_of(meta_model(str(base))) == ("language",)
    line = ["train", "--model_name", str(base), "--task", "conversations", "--data_path", str(data), "--full", "vision"]
    assert cli.main([*line, "-o", str(tmp_path / "out"), "--use_cpu"]) == 2
    assert "has no vision tower; it has: language" in capsys.readouterr().err


def finetune_words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = (
        f"finetune --model_name {base} --task conversations --data_path {data} --image_folder {data.parent / 'images'}"
    )
    fixed = f"-o {out} --subset_ratio 1 --gradient_accumulation 4 --lr 1e-3 --use_cpu"
    return [*own.split(), *fixed.split(), *more]


@pytest.mark.parametrize(
    ("family", "flags", "towers"),
    [
        ("smolvlm", ("--full", "language,vision,projector"), TOWERS),
        ("qwen25vl", ("--full", "vision,projector", "--freeze", "language"), ("vision", "projector")),
        ("llava", ("--full", "projector", "--projector_lr", "1e-2"), ("language", "projector")),
        ("isaac", ("--freeze", "language", "--full", "vision"), ("vision",)),
    ],
)
def test_from_a_finetune_of_towers_to_a_plan_for_them(
    family: str,
    flags: tuple[str, ...],
    towers: tuple[str, ...],
    bases: Bases,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The named towers train and the rest stays, bit for bit; their sites have deltas, ranks and, trained, adapters."""
    base, probe, run = bases(family), tmp_path / "probe", tmp_path / "run"
    assert cli.main(finetune_words(base, data, probe, "--save", "both", *flags)) == 0
    printed = capsys.readouterr().out
    before, after = values(loaded(base)), values(loaded(probe / "finetuned"))
    wanted = set(tower_parameters(loaded(base), towers))
    entry = json.loads((probe / "manifest.json").read_text())["stages"]["finetune"]
    assert set(entry["trained"]) == wanted
    for name, value in after.items():
        assert name in wanted or torch.equal(value, before[name]), name
    assert any(not torch.equal(after[name], before[name]) for name in wanted)
    assert {site.tower for site in open_deltas(probe).sites.values()} == set(towers)
    assert f"rankwise ranks --deltas {probe} --towers {','.join(towers)}" in printed

    line = f"ranks --deltas {probe} --towers {','.join(towers)} --out {run} --budget uniform:2 --min_rank 1 --no_plots"
    assert cli.main(line.split()) == 0
    sites = model_sites(loaded(base))
    plan = read_plan(run / "configs" / "lora_rank_config.json", sites)
    assert {sites[path].tower for path in plan.ranks} == set(towers)
    more = ["--lora", ",".join(towers), "--plan", str(run / "configs" / "lora_rank_config.json"), "--max_steps", "1"]
    more += [] if "language" in towers else ["--freeze", "language"]
    assert cli.main(words(base, data, run, *more)) == 0
    pairs = read_adapter(run).pairs
    assert {sites[path].tower for path in pairs} == set(towers)


def test_a_lora_probe_of_towers(bases: Bases, data: Path, tmp_path: Path) -> None:
    base = bases("smolvlm")
    more = ("--method", "lora", "--lora", "vision", "--freeze", "language", "--lora_r", "4")
    assert cli.main(finetune_words(base, data, tmp_path, *more)) == 0
    sites = model_sites(loaded(base))
    assert {sites[path].tower for path in read_adapter(tmp_path).pairs} == {"vision"}
