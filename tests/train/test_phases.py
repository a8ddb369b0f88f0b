"""Schedules say what trains, and exactly that trains: frozen is bit-equal, active has moved, resume is exact."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import Watch, equal, factors, make_trainer, resumed, weights
from tiny import tiny_llama
from torch import nn
from transformers import TrainerCallback

from rankwise.core.phase import BoundNorm, BoundPhases, Lisa, Phases, bind, boundaries, returns
from rankwise.core.schedule import STRATEGIES, parse_schedule, strategy
from rankwise.core.site import Site, describe
from rankwise.errors import DataError, UsageError
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.train.phases import PHASES_STATE, PhaseKeeper, phase_of
from rankwise.train.trainer import RankwiseTrainer

LAYERS = 4
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
STRATEGY_SETS = {
    "both-mlp-attn": (ATTENTION + MLP, MLP, ATTENTION),
    "attn-mlp-both": (ATTENTION, MLP, ATTENTION + MLP),
    "both-mlp-both": (ATTENTION + MLP, MLP, ATTENTION + MLP),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def sites(base: Path) -> dict[str, Site]:
    return model_sites(meta_model(str(base)))


def bound(text: str, sites: dict[str, Site], seed: int = 1) -> Any:
    return bind(parse_schedule(text), sites, seed)


def phased(
    base: Path, folder: Path, schedule: Any, *, reset: bool = False, several: bool = False, **given: Any
) -> RankwiseTrainer:
    """A trainer with a schedule; `several` takes the way of several processes, which drops gradients."""
    folder.mkdir(parents=True, exist_ok=True)
    keeper = PhaseKeeper(schedule, folder, reset=reset)
    trainer = make_trainer(base, folder, phases=keeper, **given)
    if several:
        begin = keeper.on_train_begin

        def as_one_of_several(*args: Any, **rest: Any) -> None:
            begin(*args, **rest)
            keeper._toggles = False

        keeper.on_train_begin = as_one_of_several  # type: ignore[method-assign]
    return trainer


# --- what a schedule says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGY_SETS)
def test_the_order_in_a_strategy_s_name_is_the_order_that_runs(name: str, sites: dict[str, Site]) -> None:
    schedule = bound(strategy(name, 300, 600), sites)
    for first, last, projections in zip((0, 300, 600), (299, 599, 100_000), STRATEGY_SETS[name], strict=True):
        wanted = {path for path in sites if path.rsplit(".", 1)[1] in projections}
        assert schedule.active(first) == schedule.active(last) == wanted


@pytest.mark.parametrize(("name", "cut"), [("early->late", 2), ("early-late@1", 1)])
def test_early_late_parts_the_layers_and_runs_to_the_end(name: str, cut: int, sites: dict[str, Site]) -> None:
    schedule = bound(strategy(name, 10, 20), sites)
    assert {sites[path].layer for path in schedule.active(9)} == set(range(cut))
    for step in (10, 20, 5000):
        assert {sites[path].layer for path in schedule.active(step)} == set(range(cut, LAYERS))


def test_an_odd_number_of_layers_leaves_none_out() -> None:
    sites = {path: describe(path, (4, 4), "language") for path in (f"layers.{layer}.attn.q_proj" for layer in range(5))}
    schedule = bound("early:1 > late", sites)
    assert sorted(schedule.active(0) | schedule.active(1)) == sorted(sites)
    assert not schedule.active(0) & schedule.active(1)


def test_kinds_layers_and_parts_combine(sites: dict[str, Site]) -> None:
    active = bound("mlp layers 0-1 + attention layers 3", sites).active(0)
    assert {(sites[path].kind, sites[path].layer) for path in active} == {("mlp", 0), ("mlp", 1), ("attention", 3)}


def test_a_projection_and_experts_are_words_too(sites: dict[str, Site]) -> None:
    active = bound("down_proj layers 0-1 + q_proj", sites).active(0)
    assert {(sites[path].projection, sites[path].layer) for path in active} == {
        *(("down_proj", layer) for layer in (0, 1)),
        *(("q_proj", layer) for layer in range(LAYERS)),
    }
    with pytest.raises(UsageError, match="'experts' trains nothing"):
        bound("experts", sites)
    with pytest.raises(UsageError, match="'dwon_proj' trains nothing"):
        bound("dwon_proj", sites)
    mixed = sites | {"layers.0.mlp.experts.down_proj": describe("layers.0.mlp.experts.down_proj", (4, 4), experts=3)}
    assert bound("experts", mixed).active(0) == {"layers.0.mlp.experts.down_proj"}
    assert not returns(parse_schedule("gate_proj:2 > up_proj:2 > down_proj"))
    assert returns(parse_schedule("experts:2 > up_proj:2 > down_proj"))


def test_a_random_part_has_as_many_sites_and_follows_the_seed(sites: dict[str, Site]) -> None:
    drawn = [bound("random mlp:5 > all", sites, seed).active(0) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {len(one) for one in drawn} == {3 * LAYERS}


@given(lengths=st.lists(st.integers(1, 50), max_size=4), step=st.integers(0, 300))
def test_a_schedule_has_no_gap_and_reads_back(lengths: list[int], step: int) -> None:
    words = ["both", "mlp", "attention", "layers 0-1", "early"]
    text = " > ".join([f"{word}:{n}" for word, n in zip(words, lengths, strict=False)] + ["mlp layers 2"])
    form = parse_schedule(text)
    assert str(form) == text
    sites = {
        path: describe(path, (4, 4), "language")
        for layer in range(3)
        for path in (f"layers.{layer}.attn.q_proj", f"layers.{layer}.mlp.up_proj")
    }
    schedule = bind(form, sites, 1)
    assert schedule.active(step)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert schedule.name(step) == [*words[: len(lengths)], "mlp layers 2"][sum(step >= end for end in ends)]


def test_lisa_draws_from_the_seed_and_the_window_alone(sites: dict[str, Site]) -> None:
    schedule = bound("lisa:2@5", sites, seed=7)
    assert isinstance(parse_schedule("lisa:2@5"), Lisa)
    windows = [schedule.layers(5 * window) for window in range(40)]
    assert all(len(layers) == 2 for layers in windows)
    assert all(schedule.layers(5 * window + 4) == layers for window, layers in enumerate(windows))
    assert {layer for layers in windows for layer in layers} == set(range(LAYERS))
    assert windows != [bound("lisa:2@5", sites, seed=8).layers(5 * window) for window in range(40)]
    active = schedule.active(3)
    assert {sites[path].layer for path in active} == set(windows[0])
    assert len(active) == 2 * 7


def test_norm_is_a_function_of_its_choices_and_replays_as_phases(sites: dict[str, Site]) -> None:
    schedule = bound("norm:3", sites)
    assert isinstance(schedule, BoundNorm)
    assert schedule.active(0) == frozenset(sites), "nothing is chosen yet"
    for norms in ({"mlp": 2.0, "attention": 1.0}, {"mlp": 1.0, "attention": 2.0}, {"mlp": 1.0, "attention": 1.0}):
        schedule = schedule.chosen(norms)
    assert [schedule.name(step) for step in range(9)] == ["all"] + ["mlp"] * 3 + ["attention"] * 5
    replay = bind(schedule.replay(9), sites, 1)
    assert all(replay.active(step) == schedule.active(step) for step in range(9))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mpl", ("mpl", "did you mean mlp")),
        ("both:3 > mlp:4", ("last phase", "'mlp' without a length")),
        ("both > mlp", ("needs a length", "both:300")),
        ("both:3 >", ("empty phase", "quotes")),
        ("mlp:many", ("mlp:many", "number of optimizer steps")),
        ("layers 3-1", ("the first layer must not be above the last",)),
        ("mlp:0 > both", ("needs a length",)),
        ("lisa:0@4", ("at least 1",)),
        ("layers 2-9", ("layer 9", "layers 0 to 3")),
        ("layers 9", ("trains nothing",)),
        ("vision", ("trains nothing",)),
        ("lisa:5@4", ("5 layers", "4 are adapted")),
        ("early@6:3 > late", ("layer 6",)),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_what_to_do(
    text: str, words: tuple[str, ...], sites: dict[str, Site]
) -> None:
    with pytest.raises(UsageError) as raised:
        bound(text, sites)
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize("name", ["both-", "both->"])
def test_a_value_cut_by_the_shell_is_recognised(name: str) -> None:
    with pytest.raises(UsageError, match="shell") as raised:
        strategy(name, 300, 600)
    assert raised.value.exit_code == 2
    assert "quotes" in str(raised.value)


def test_ends_must_rise_and_strategies_must_exist() -> None:
    with pytest.raises(UsageError, match="phase1_end"):
        strategy("both-mlp-attn", 600, 300)
    with pytest.raises(UsageError, match="both-mlp-attn"):
        strategy("both-mlp-atn", 300, 600)
    assert strategy("early-late", 300, 200) == "early:300 > late", "it has one end only"
    assert set(STRATEGIES) == {*STRATEGY_SETS, "early-late"}


# --- what trains -----------------------------------------------------------------------------------------------------

SCHEDULES = [strategy(name, 3, 6) for name in STRATEGIES] + ["lisa:1@2", "mlp layers 1-2:4 > attention + mlp layers 0"]


Run = Callable[[str, bool], tuple[RankwiseTrainer, Watch]]


@pytest.fixture(scope="module")
def trained(base: Path, sites: dict[str, Site], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run of nine steps per schedule, with checkpointing or without, for all laws about it."""

    @cache
    def run(text: str, checkpointing: bool) -> tuple[RankwiseTrainer, Watch]:
        watch, folder = Watch(), tmp_path_factory.mktemp("run")
        given = {"max_steps": 9, "weight_decay": 0.1, "activation_checkpointing": checkpointing}
        trainer = phased(base, folder, bound(text, sites), callbacks=[watch], **given)
        trainer.train()
        return trainer, watch

    return run


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("text", SCHEDULES)
def test_frozen_is_bit_equal_and_active_has_moved(
    trained: Run, sites: dict[str, Site], text: str, checkpointing: bool
) -> None:
    """Seen from the weights, step by step, under accumulation."""
    schedule = bound(text, sites)
    trainer, watch = trained(text, checkpointing)
    assert watch.moved == [schedule.active(step) for step in range(9)]
    table = [(int(row["step"]) - 1, row["phase"], int(row["sites"])) for row in trainer.phases.table.read()]
    changes = [step for step in range(9) if step == 0 or schedule.active(step) != schedule.active(step - 1)]
    assert table == [(step, schedule.name(step), len(schedule.active(step))) for step in changes]
    assert all(value.requires_grad for name, value in trainer.model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(
    ("text", "checkpointing"),
    [
        (strategy("both-mlp-attn", 3, 6), False),
        (strategy("early-late", 3, 6), True),
        ("lisa:1@2", True),
        ("norm:2", False),
    ],
)
def test_dropping_gradients_equals_not_asking_for_them(
    base: Path, tmp_path: Path, trained: Run, sites: dict[str, Site], text: str, checkpointing: bool
) -> None:
    given = {"max_steps": 9, "weight_decay": 0.1, "activation_checkpointing": checkpointing}
    several = phased(base, tmp_path, bound(text, sites), several=True, **given)
    several.train()
    assert equal(weights(several), weights(trained(text, checkpointing)[0]))


@pytest.mark.parametrize("reset", [False, True], ids=["keep", "reset"])
@pytest.mark.parametrize(
    ("text", "stop"), [("both:3 > mlp:4 > both", 3), ("both:2 > mlp:2 > both", 3), ("lisa:1@2", 5), ("norm:2", 5)]
)
def test_resume_inside_a_phase_is_exact(
    base: Path, tmp_path: Path, sites: dict[str, Site], text: str, reset: bool, stop: int
) -> None:
    given = {"reset": reset, "lr_scheduler_type": "constant", "max_steps": 8}
    saved = {"save_strategy": "steps", "save_steps": stop}
    whole = phased(base, tmp_path / "whole", bound(text, sites), **given, **saved)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "part")  # the tables run on beyond the checkpoint: they are cut
    for later in (tmp_path / "part").glob("checkpoint-*"):
        if later.name != f"checkpoint-{stop}":
            shutil.rmtree(later)
    after = phased(base, tmp_path / "part", bound(text, sites), **given)
    assert equal(weights(resumed(after)), weights(whole))
    assert list(after.phases.table.read()) == list(whole.phases.table.read())
    assert phase_of(tmp_path / "part" / f"checkpoint-{stop}") == whole.phases.schedule.name(stop - 1)


def test_a_choice_that_was_lost_is_not_made_up(base: Path, tmp_path: Path, sites: dict[str, Site]) -> None:
    part = phased(base, tmp_path, bound("norm:2", sites), max_steps=3, save_strategy="steps", save_steps=3)
    part.train()
    (tmp_path / "checkpoint-3" / PHASES_STATE).unlink()
    with pytest.raises(DataError, match="cannot be replayed"):
        phased(base, tmp_path, bound("norm:2", sites), max_steps=9).train(tmp_path / "checkpoint-3")


def test_keep_and_reset_differ_only_from_the_return_on(base: Path, tmp_path: Path, sites: dict[str, Site]) -> None:
    class Seen(TrainerCallback):
        def __init__(self) -> None:
            self.steps: list[dict[str, torch.Tensor]] = []

        def on_step_end(self, *_: Any, model: nn.Module, **__: Any) -> None:
            self.steps.append(factors(model))

    seen = {}
    for reset in (False, True):
        watch = Seen()
        text = "both:3 > mlp:3 > both"
        trainer = phased(base, tmp_path / str(reset), bound(text, sites), reset=reset, callbacks=[watch], max_steps=8)
        trainer.train()
        seen[reset] = watch.steps
    assert all(equal(seen[False][step], seen[True][step]) for step in range(6))
    attention = [path for path in sites if sites[path].kind == "attention"]
    assert not equal(*({path: seen[reset][6][path] for path in attention} for reset in seen))
    mlp = [path for path in sites if sites[path].kind == "mlp"]
    assert equal(*({path: seen[reset][6][path] for path in mlp} for reset in seen)), "it was active all along"


def test_a_reset_site_starts_like_a_new_one(base: Path, tmp_path: Path, sites: dict[str, Site]) -> None:
    """With Adam the first step from a fresh state moves every entry by the learning rate."""
    watch = Watch()
    trainer = phased(
        base,
        tmp_path,
        bound("both:3 > mlp:3 > both", sites),
        reset=True,
        callbacks=[watch],
        max_steps=7,
        lr_scheduler_type="constant",
        max_grad_norm=0,
    )
    trainer.train()
    path = next(path for path in sites if sites[path].kind == "attention")
    moved = (factors(trainer.model)[path] - watch.before[path]).abs()
    torch.testing.assert_close(moved[moved > 0].max(), torch.tensor(1e-2), rtol=1e-3, atol=0)


def test_norm_chooses_by_the_measured_gradients_and_its_replay_is_the_same_run(
    base: Path, tmp_path: Path, sites: dict[str, Site]
) -> None:
    trainer = phased(base, tmp_path / "norm", bound("norm:2", sites), max_steps=8)
    asked: list[dict[str, float]] = []
    measure = trainer.phases.norms_by_kind
    trainer.phases.norms_by_kind = lambda: asked.append(measure()) or asked[-1]  # type: ignore[method-assign, func-returns-value]
    trainer.train()
    choices = trainer.phases.schedule.choices
    assert choices == tuple(max(norms, key=norms.__getitem__) for norms in asked)
    assert len(choices) == 4
    again = phased(base, tmp_path / "replay", bind(trainer.phases.schedule.replay(8), sites, 1), max_steps=8)
    again.train()
    assert equal(weights(again), weights(trainer))


def test_a_frozen_prefix_is_neither_recomputed_nor_passed_through(
    base: Path, tmp_path: Path, sites: dict[str, Site]
) -> None:
    """What makes the late phase faster: with checkpointing only the late layers run again in backward."""
    calls: dict[int, int] = dict.fromkeys(range(LAYERS), 0)
    trainer = phased(
        base, tmp_path, bound("late", sites), max_steps=1, gradient_accumulation_steps=1, activation_checkpointing=True
    )
    for number, layer in enumerate(trainer.model.get_base_model().model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: calls.update({number: calls[number] + 1}))
    passed: list[int] = []
    trainer.model.get_base_model().model.layers[0].register_full_backward_hook(lambda *_: passed.append(0))
    trainer.train()
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2}
    assert not passed


def test_boundaries_name_every_change(sites: dict[str, Site]) -> None:
    schedule = bound("both:3 > mlp:2 > attention", sites)
    assert boundaries(schedule, 10) == [(0, "both"), (3, "mlp"), (5, "attention")]
    assert isinstance(schedule, BoundPhases)
    assert isinstance(schedule.form, Phases)


def test_phases_that_training_does_not_reach_are_named(
    base: Path, tmp_path: Path, sites: dict[str, Site], capsys: pytest.CaptureFixture[str]
) -> None:
    phased(base, tmp_path, bound("both:2 > mlp:2 > attention", sites), max_steps=3).train()
    said = capsys.readouterr().out
    assert "before the phases attention begin" in said
    assert "phase from step 3: mlp" in said


def test_lisa_is_the_same_whatever_was_drawn_before(sites: dict[str, Site]) -> None:
    schedule = bound("lisa:2@5", sites)
    random.seed(0)
    first = schedule.active(12)
    random.seed(1)
    assert schedule.active(12) == first
