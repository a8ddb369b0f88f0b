"""Towers trained in full beside an adapter: saved and loaded whole, frozen and thawed by phases, merged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rows import Watch
from safetensors.torch import load_file, save_file
from test_train_vision import words
from torch import nn
from towered import ALL, TOWERS, Bases, adapted, loaded, pictures, seen, trainer_of, values

from rankwise import cli
from rankwise.core.phase import bind
from rankwise.core.schedule import parse_schedule
from rankwise.errors import DataError, UsageError, VerificationError
from rankwise.files.adapter import read_adapter
from rankwise.merge.plan import plan_merge
from rankwise.merge.write import write_merged
from rankwise.models.adapt import adapt, full_copies, lora_layers, quiet_peft
from rankwise.models.adapters import load_adapter, save_adapter, write_sites
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import full_sites, model_sites, tower_of, tower_parameters, tower_prefixes
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.phases import PhaseKeeper


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory)


@pytest.fixture(scope="module")
def data(bases: Bases) -> Path:
    return bases.rows


@pytest.mark.parametrize(
    ("family", "full"),
    [*((family, ("projector",)) for family in ALL), ("qwen25vl", ("vision", "projector")), ("isaac", ("vision",))],
)
def test_a_tower_in_full_is_saved_and_loaded_whole(
    family: str, full: tuple[str, ...], bases: Bases, tmp_path: Path
) -> None:
    base = bases(family)
    model = adapted(base, tuple(tower for tower in TOWERS if tower not in full), full)
    expected = seen(model, base)
    assert not torch.allclose(expected, seen(loaded(base), base), atol=1e-3)
    save_adapter(model, tmp_path, str(base))
    plan = uniform_plan({path: model_sites(loaded(base))[path] for path in lora_layers(model)}, 2, None, False, "")
    towers = tower_prefixes(loaded(base))
    write_sites(tmp_path, plan, [], {path: tower_of(path, towers) for path in full_copies(model)})
    assert torch.equal(seen(load_adapter(loaded(base), tmp_path), base), expected)
    with quiet_peft():
        plain = PeftModel.from_pretrained(loaded(base), str(tmp_path))
    assert torch.equal(seen(plain, base), expected)
    merged = load_adapter(loaded(base), tmp_path).merge_and_unload()
    torch.testing.assert_close(seen(merged, base), expected, atol=1e-4, rtol=1e-4)
    assert not [name for name, _ in merged.named_modules() if "modules_to_save" in name]
    file = tmp_path / "adapter_model.safetensors"
    held = {key.removeprefix("base_model.model.") for key in load_file(file) if "lora_" not in key}
    assert held == set(tower_parameters(loaded(base), full)), "one copy of each parameter, and of nothing else"


def test_what_is_missing_or_added_is_an_error(bases: Bases, tmp_path: Path) -> None:
    base = bases("smolvlm")
    model = adapted(base, ("language",), ("projector",))
    save_adapter(model, tmp_path, str(base))
    sites = {path: site for path, site in model_sites(loaded(base)).items() if path in lora_layers(model)}
    plan = uniform_plan(sites, 2, None, False, "")
    write_sites(tmp_path, plan, [], {})
    with pytest.raises(DataError, match=r"trained in full differ from sites\.json \(model\.connector"):
        load_adapter(loaded(base), tmp_path)
    write_sites(tmp_path, plan, [], {"model.connector": "projector"})
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    state.pop("base_model.model.model.connector.modality_projection.proj.weight")
    save_file(state, file)
    with pytest.raises(DataError, match=r"1 weights are missing .*connector"):
        load_adapter(loaded(base), tmp_path)


def test_a_path_that_ends_like_another_is_caught(bases: Bases) -> None:
    model = loaded(bases("smolvlm"))
    plan = uniform_plan(choose_sites(model_sites(model)), 2, None, False, "")
    with pytest.raises(
        VerificationError, match=r"modules to train in full: embeddings; PEFT copied model\.vision_model\.embeddings"
    ):
        adapt(model, plan, LoraSection(), ("embeddings",))


def test_copies_train_in_float32_beside_a_base_in_bfloat16(bases: Bases) -> None:
    model = load_model(str(bases("smolvlm")), torch.bfloat16)
    plan = uniform_plan(choose_sites(model_sites(model)), 2, None, False, "")
    found = adapt(model, plan, LoraSection(), ("model.connector",))
    assert {p.dtype for p in found.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in found.parameters() if not p.requires_grad} == {torch.bfloat16}


def gradients(model: Any, base: Path) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(**pictures(base), labels=pictures(base)["input_ids"]).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen25vl", "smolvlm", "isaac"])
def test_checkpointed_activations_change_no_gradient(family: str, bases: Bases) -> None:
    """In a copy that trains in full, as in what is adapted, below frozen embeddings."""
    base = bases(family)
    model = adapted(base, ("language", "projector"), ("vision",))
    expected = gradients(model, base)
    assert any(path in name for name in expected for path in full_copies(model))
    model.activation_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, base)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_starts_that_move_the_base_keep_their_whole_modules(bases: Bases, data: Path, tmp_path: Path) -> None:
    base = bases("smolvlm")
    more = ("--init_lora_weights", "pissa", "--full", "projector", "--max_steps", "2", "--lora_r", "2")
    assert cli.main(words(base, data, tmp_path, *more)) == 0
    extra = read_adapter(tmp_path).extra
    assert set(extra) == set(tower_parameters(loaded(base), ["projector"]))
    found = load_adapter(loaded(base), tmp_path)
    for path, copy in full_copies(found).items():
        for name, value in copy.named_parameters():
            assert torch.equal(value, extra[f"{path}.{name}"])
            assert not torch.equal(value, loaded(base).get_parameter(f"{path}.{name}"))


# --- phases ---


class WatchAll(Watch):
    """Which parameters moved in each step, whatever trains them."""

    def on_step_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        self.before = values(model)

    def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
        now = values(model)
        self.moved.append(frozenset(name for name in now if not torch.equal(now[name], self.before[name])))


class Pictures(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows for `trainer_of` with a picture in each."""

    def __init__(self, base: Path) -> None:
        self.batch = pictures(base)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index}


def run_phases(base: Path, folder: Path, text: str) -> list[set[str]]:
    """Towers that moved in each of four steps; the language is adapted, vision and projector train in full."""
    model = adapted(base, ("language",), ("vision", "projector"))
    skeleton = meta_model(str(base))
    sites = {path: site for path, site in model_sites(skeleton).items() if path in lora_layers(model)}
    full = full_sites(skeleton, list(full_copies(model)))
    form = parse_schedule(text)
    part = {path: site for path, site in full.items() if site.tower in form.towers}
    watch, rows = WatchAll(), Pictures(base)
    keeper = PhaseKeeper(bind(form, {**sites, **part}, 0), folder, full=part, verbose=False)
    trainer = trainer_of(model, folder, phases=keeper, callbacks=[watch], learning_rate=1e-3)
    trainer.train_dataset = rows
    trainer.data_collator = lambda _: {**rows.batch, "labels": rows.batch["input_ids"]}
    trainer.train()
    towers = tower_prefixes(skeleton)
    return [
        {tower_of(name.removeprefix("base_model.model.").split(".lora_")[0], towers) for name in step}
        for step in ([n.replace(".modules_to_save.default", "") for n in step] for step in watch.moved)
    ]


def test_schedules_by_tower_freeze_and_thaw_whole_modules(bases: Bases, tmp_path: Path) -> None:
    """Unnamed ones train in every phase; frozen ones do not move by a bit, decay and momentum included."""
    base = bases("smolvlm")
    assert run_phases(base, tmp_path / "a", "vision:1 > language:2 > vision + language") == [
        {"vision", "projector"},
        {"language", "projector"},
        {"language", "projector"},
        {"vision", "language", "projector"},
    ]
    assert run_phases(base, tmp_path / "b", "both:2 > mlp") == [set(TOWERS)] * 4
    assert run_phases(base, tmp_path / "c", "projector:2 > language") == [
        {"projector", "vision"},
        {"projector", "vision"},
        {"language", "vision"},
        {"language", "vision"},
    ]


def test_early_is_half_of_each_towers_layers(bases: Bases) -> None:
    sites = model_sites(meta_model(str(bases("qwen25vl"))))  # 3 layers of vision, 2 of language
    for text, first, second in (
        ("early:1 > late", {("vision", 0), ("language", 0)}, {("vision", 1), ("vision", 2), ("language", 1)}),
        ("vision early:1 > language late", {("vision", 0)}, {("language", 1)}),
    ):
        bound = bind(parse_schedule(text), {p: s for p, s in sites.items() if s.tower != "projector"}, 0)
        assert [{(sites[path].tower, sites[path].layer) for path in bound.active(step)} for step in (0, 1)] == [
            first,
            second,
        ]
    with pytest.raises(UsageError, match="names layer 2"):
        bind(parse_schedule("language layers 0-2"), sites, 0)


def test_gradient_tables_name_whole_modules(bases: Bases, data: Path, tmp_path: Path) -> None:
    more = ("--full", "projector", "--max_steps", "2", "--lora_r", "2")
    assert cli.main(words(bases("llava"), data, tmp_path, *more)) == 0
    table = (tmp_path / "gradient_norms.csv").read_text()
    for name in ("model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"):
        assert f",{name},projector," in table


# --- quantized bases and merging ---


def test_a_quantized_base_keeps_every_other_tower(bases: Bases, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    for family in ("qwen25vl", "smolvlm", "llava", "isaac"):
        model = load_model(str(bases(family)), torch.float32, quantization="4bit")
        kinds = {path: type(model.get_submodule(path)) for path in model_sites(model)}
        towers = {path: site.tower for path, site in model_sites(meta_model(str(bases(family)))).items()}
        for path, tower in towers.items():
            assert (kinds[path] is nn.Linear) == (tower != "language"), path
    more = ("--load_in_4bit", "--lora", "vision", "--full", "projector", "--max_steps", "1", "--lora_r", "2")
    assert cli.main(words(bases("smolvlm"), data, tmp_path, *more)) == 0
    load_adapter(loaded(bases("smolvlm")), tmp_path)


@pytest.mark.parametrize("family", ["qwen25vl", "smolvlm", "llava", "isaac"])
def test_a_merge_sees_what_the_adapter_sees(family: str, bases: Bases, tmp_path: Path) -> None:
    """Adapters in two towers and a projector in full, in small shards: the same logits of pictures, the same keys."""
    base = bases(family)
    model = adapted(base, ("language", "vision"), ("projector",))
    expected = seen(model, base)
    (tmp_path / "adapter").mkdir()
    save_adapter(model, tmp_path / "adapter", str(base))
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tmp_path / "adapter"), "-o", str(out), "--max_shard_size", "100KB"]) == 0
    assert len(list(out.glob("*.safetensors"))) > 1
    torch.testing.assert_close(seen(loaded(out), base), expected, atol=1e-4, rtol=1e-4)
    projector = tower_parameters(loaded(out), ["projector"])
    for path, copy in full_copies(model).items():
        for name, value in copy.named_parameters():
            assert torch.equal(projector[f"{path}.{name}"], value)


def test_a_projector_alone_is_verified_on_pictures(
    bases: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On text alone it would have no effect, and a wrong merge of it none either."""
    base = bases("smolvlm")
    model = adapted(base, ("language",), ("projector",))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B["default"].weight.zero_()
    save_adapter(model, tmp_path, str(base))
    assert plan_merge(str(base), tmp_path).sees
    assert cli.main(["merge", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    assert "verified" in capsys.readouterr().out
    plan = plan_merge(str(base), tmp_path)
    monkeypatch.setattr(
        "rankwise.merge.command.plan_merge", lambda *_: replace(plan, change=replace(plan.change, whole={}))
    )
    assert cli.main(["merge", str(tmp_path), "-o", str(tmp_path / "other")]) == 6
    assert "logits differ" in capsys.readouterr().err
    assert not (tmp_path / "other" / "config.json").exists()


def test_language_alone_is_merged_without_a_processor(bases: Bases, tmp_path: Path) -> None:
    base = bases("smolvlm")
    save_adapter(adapted(base, ("language",)), tmp_path, str(base))
    plan = plan_merge(str(base), tmp_path)
    assert not plan.sees
    assert write_merged(plan, tmp_path, "5GB")
