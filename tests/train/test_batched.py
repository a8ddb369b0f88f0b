"""Arms trained together are what each would have become alone, and nothing passes from one to another."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rankwise.core.phase import Bound, BoundNorm, bind, boundaries
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.schedule import parse_schedule
from rankwise.data.dataset import Collator
from rankwise.data.render import IGNORED
from rankwise.errors import Interrupted, UsageError, VerificationError
from rankwise.evaluate.likelihood import answer_losses
from rankwise.models.adapt import ADAPTER, adapt, lora_layers
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.gradient_table import PHASES_TABLE, StepTable
from rankwise.train.phases import COLUMNS, PhaseKeeper
from rankwise.train.together import train
from rankwise.train.together.alone import Undropped, train_alone
from rankwise.train.together.fit import fit
from rankwise.train.together.optimizer import ArmSettings, Course, StackedAdamW, learning_rates
from rankwise.train.together.stacked import Stack, running
from rankwise.train.together.train import Arm, TrainedArm, Validation, losses_together, train_together
from rankwise.train.trainer import RankwiseTrainer

STEPS, BATCH = 24, 3
SETTINGS = ArmSettings(STEPS, BATCH, "cosine", warmup_steps=4, weight_decay=0.05, max_grad_norm=0.3)
SCHEDULES = (None, "both:6 > mlp:7 > attention:5 > both", "attention:9 > both:4 > mlp")


class Answers:
    """Rows of unequal lengths whose first half is a prompt: ids follow from the position."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [4 + (index * 31 + place * place * 17) % 90 for place in range(5 + (index * 7) % 9)]
        prompt = len(ids) // 2
        return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:], "sample_index": index}


def tiny(family: str) -> PreTrainedModel:
    torch.manual_seed(1)
    if family == "gpt2":
        # Attention this small has gradients of 1e-8 at the usual 0.02, and Adam makes steps of their rounding.
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.1}
        still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=96, bos_token_id=1, eos_token_id=2, **sizes, **still))
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def order(seed: int) -> list[int]:
    return torch.randint(len(Answers()), (STEPS * BATCH,), generator=torch.Generator().manual_seed(seed)).tolist()


def start(model: PreTrainedModel, seed: int, *, zero_b: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors whose ranks differ between sites and between seeds."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (path, site) in enumerate(choose_sites(model_sites(model)).items()):
        rank, (m, n) = 1 + (number * (seed + 2) + seed) % 5, site.shape
        a, b = torch.randn(rank, n, generator=generator) / n**0.5, torch.randn(m, rank, generator=generator) / 10
        found[path] = (a, b * 0 if zero_b else b)
    return found


def make_arms(model: PreTrainedModel, *, schedules: Sequence[str | None] = (None, None, None)) -> list[Arm]:
    arms = []
    for seed, (rate, schedule) in enumerate(zip((3e-3, 1e-2, 1e-3), schedules, strict=True)):
        pairs = start(model, seed)
        active = bound(model, schedule).active if schedule else None
        arms.append(Arm(pairs, dict.fromkeys(pairs, 2.0 / (1 + seed)), rate, order(seed), active))
    return arms


def bound(model: PreTrainedModel, schedule: str) -> Bound:
    return bind(parse_schedule(schedule), choose_sites(model_sites(model)), seed=0)


def together(model: PreTrainedModel, arms: Sequence[Arm], settings: ArmSettings = SETTINGS) -> list[TrainedArm]:
    return train_together(model, arms, Answers(), Collator(0), settings)


def adapted(model: PreTrainedModel, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Any:
    """The project's own PEFT model with these factors."""
    sites = model_sites(model)
    plan = RankPlan(tuple(PlannedSite(sites[path], a.shape[0]) for path, (a, _) in pairs.items()), "", False, scale)
    found = adapt(model, plan, LoraSection(lora_dropout=0.0))
    for path, layer in lora_layers(found).items():
        layer.lora_A[ADAPTER].weight.data.copy_(pairs[path][0])
        layer.lora_B[ADAPTER].weight.data.copy_(pairs[path][1])
    return found


def alone(
    model: PreTrainedModel, arm: Arm, folder: Path, settings: ArmSettings, schedule: str | None = None
) -> TrainedArm:
    """The same run by the project's Trainer."""
    phases = bound(model, schedule) if schedule else None
    arguments = build_arguments(
        folder,
        1,
        {
            "use_cpu": True,
            "optim": "adamw_torch",
            "per_device_train_batch_size": settings.batch_size,
            "max_steps": settings.steps,
            "learning_rate": arm.learning_rate,
            "lr_scheduler_type": settings.lr_scheduler,
            "warmup_steps": settings.warmup_steps,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "train_sampling_strategy": "sequential",
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
        },
    )
    trainer = RankwiseTrainer(
        model=adapted(model, arm.start, next(iter(arm.scales.values()))),
        args=arguments,
        train_dataset=Subset(Answers(), arm.order),  # type: ignore[arg-type]
        data_collator=Collator(0),
        phases=PhaseKeeper(phases, folder, reset=settings.phase_state == "reset") if phases else None,
    )
    trainer.train()
    layers = lora_layers(trainer.model)
    pairs = {
        path: (layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach())
        for path, layer in layers.items()
    }
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return TrainedArm(pairs, [row["loss"] for row in steps], [row["grad_norm"] for row in steps], False)


def distance(first: Mapping[str, tuple[Tensor, Tensor]], second: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """Largest difference of any number."""
    assert first.keys() == second.keys()
    pairs = [(one, other) for path in first for one, other in zip(first[path], second[path], strict=True)]
    assert all(one.shape == other.shape for one, other in pairs)
    return max(float((one - other).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("schedules", [(None, None, None), SCHEDULES], ids=["static", "phases"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_together_is_one_after_the_other(family: str, schedules: Sequence[str | None], tmp_path: Path) -> None:
    arms = make_arms(tiny(family), schedules=schedules)
    settings = dataclasses.replace(SETTINGS, phase_state="reset" if family == "gpt2" else "keep")
    trained = together(tiny(family), arms, settings)
    assert max(max(arm.norms) for arm in trained) > settings.max_grad_norm, "clipping is at work"
    for number, (arm, schedule) in enumerate(zip(arms, schedules, strict=True)):
        expected = alone(tiny(family), arm, tmp_path / str(number), settings, schedule)
        assert distance(arm.start, expected.pairs) > 1e-3, "it has moved"
        assert distance(trained[number].pairs, expected.pairs) < 1e-5
        assert trained[number].losses == pytest.approx(expected.losses, abs=1e-5)
        assert trained[number].norms == pytest.approx(expected.norms, rel=1e-4)
        assert trained[number].diverged == expected.diverged


def choosing(model: PreTrainedModel, every: int = 5) -> BoundNorm:
    found = bound(model, f"norm:{every}")
    assert isinstance(found, BoundNorm)
    return found


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_an_arm_that_chooses_is_the_trainers_and_its_replay_is_the_same_together(state: str, tmp_path: Path) -> None:
    model, settings = tiny("gpt2"), dataclasses.replace(SETTINGS, phase_state=state)
    arm = make_arms(model)[1]
    found, replay = train_alone(model, arm, choosing(model, 2), Answers(), Collator(0), settings)  # type: ignore[arg-type]
    expected = alone(tiny("gpt2"), arm, tmp_path, settings, "norm:2")
    table = list(StepTable(tmp_path / PHASES_TABLE, COLUMNS).read())
    assert [(int(row["step"]) - 1, row["phase"]) for row in table] == boundaries(bound(model, str(replay)), STEPS)
    assert len(table) > 4, "it has changed its mind"
    assert distance(found.pairs, expected.pairs) == 0
    assert found.losses == expected.losses and found.norms == expected.norms
    (again,) = together(model, [dataclasses.replace(arm, active=bound(model, str(replay)).active)], settings)
    assert distance(again.pairs, found.pairs) < 1e-5
    assert again.losses == pytest.approx(found.losses, abs=1e-5)


def test_an_arm_that_trains_alone_leaves_the_model_as_it_was_and_drops_nothing_out() -> None:
    model = tiny("gpt2").eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    model.lm_head.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    arm, settings = make_arms(model)[0], dataclasses.replace(SETTINGS, steps=6)
    first, replay = train_alone(model, arm, choosing(model, 2), Answers(), Collator(0), settings)  # type: ignore[arg-type]
    (again,) = together(model, [dataclasses.replace(arm, active=bound(model, str(replay)).active)], settings)
    assert distance(again.pairs, first.pairs) < 1e-5
    assert modules == [(name, type(module)) for name, module in model.named_modules()]
    assert not model.training and not hasattr(model, "peft_config")
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0]) and value.requires_grad == before[name][1]


def test_an_arm_that_diverges_alone_is_told_as_one_that_does_together() -> None:
    model, settings = tiny("llama"), dataclasses.replace(SETTINGS, lr_scheduler="constant", warmup_steps=0)
    arm = dataclasses.replace(make_arms(model)[1], learning_rate=1e36)
    found, replay = train_alone(model, arm, choosing(model), Answers(), Collator(0), settings)  # type: ignore[arg-type]
    (again,) = together(model, [dataclasses.replace(arm, active=bound(model, str(replay)).active)], settings)
    assert found.diverged and again.diverged
    assert found.losses == pytest.approx(again.losses, rel=1e-3, nan_ok=True) and len(found.losses) == STEPS


def test_a_signal_stops_an_arm_that_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun as well, whose variables are the Trainer's no more than those of the run beside it."""
    variables = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model, asked = tiny("llama"), []

    def collate(rows: Any) -> Any:
        asked.append(len(rows))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return Collator(0)(rows)

    with pytest.raises(Interrupted, match="same command") as stopped:
        train_alone(model, make_arms(model)[0], choosing(model), Answers(), collate, SETTINGS)  # type: ignore[arg-type]
    assert stopped.value.exit_code == 130 and 3 <= len(asked) < STEPS
    assert {name: os.environ[name] for name in variables} == variables


def test_state_kept_or_reset_is_not_the_same() -> None:
    arms = make_arms(tiny("llama"), schedules=SCHEDULES)
    kept, reset = (
        together(tiny("llama"), arms, dataclasses.replace(SETTINGS, phase_state=state)) for state in ("keep", "reset")
    )
    assert distance(kept[0].pairs, reset[0].pairs) == 0, "it has no phases"
    assert distance(kept[1].pairs, reset[1].pairs) > 1e-4


def test_an_arm_does_not_depend_on_its_neighbours() -> None:
    arms = make_arms(tiny("llama"), schedules=(None, None, SCHEDULES[1]))
    all_three, two, one = (together(tiny("llama"), chosen) for chosen in (arms, arms[:2], arms[:1]))
    assert distance(all_three[0].pairs, one[0].pairs) < 1e-6
    assert distance(two[0].pairs, one[0].pairs) < 1e-6
    assert distance(all_three[1].pairs, two[1].pairs) < 1e-6


def test_arms_may_take_turns_within_a_step() -> None:
    model = tiny("llama")
    arms = make_arms(model, schedules=SCHEDULES)
    whole = together(model, arms)
    in_turns = train_together(model, arms, Answers(), Collator(0), SETTINGS, at_once=2)
    for one, other in zip(whole, in_turns, strict=True):
        assert distance(one.pairs, other.pairs) < 1e-6
        assert one.losses == pytest.approx(other.losses, abs=1e-6)


def test_what_rests_is_bit_equal_and_what_is_active_moves() -> None:
    model = tiny("llama")
    sites = model_sites(model)
    resting = [path for path in start(model, 0) if sites[path].kind == "attention"]
    arms = make_arms(model, schedules=("mlp", None, "attention:5 > mlp"))
    trained = together(model, arms)
    for path, pair in trained[0].pairs.items():
        assert [torch.equal(*both) for both in zip(arms[0].start[path], pair, strict=True)] == [path in resting] * 2
    assert all(not torch.equal(arms[2].start[path][0], pair[0]) for path, pair in trained[2].pairs.items())


def test_zero_rows_of_padding_stay_zero() -> None:
    """Ranks 1 to 5 are padded to the widest; after training the stack's padding is still exactly zero."""
    model = tiny("llama")
    arms = make_arms(model)
    stack = Stack.of([arm.start for arm in arms], [arm.scales for arm in arms], model.device)
    before = stack.values.clone()
    optimizer = StackedAdamW(
        stack,
        Course.of([None] * 3, [site.path for site in stack.sites], 5, reset=False),
        torch.full((5, 3), 1e-2, dtype=torch.float64),
        ArmSettings(5, 2, weight_decay=0.1),
    )
    with running(model, stack) as runner:
        for step in range(5):
            batch = Collator(0)([Answers()[index] for index in range(step, step + 6)])
            loss, gradients = train.backward(runner, stack, batch)
            optimizer.step(step, loss, gradients)
    padding = before == 0
    assert 0.2 < padding.float().mean() < 0.8
    assert not stack.values[padding].any()
    assert (stack.values[~padding] != before[~padding]).all()


def test_without_b_and_without_a_rate_it_is_the_base() -> None:
    model = tiny("llama")
    pairs = start(model, 0, zero_b=True)
    settings = dataclasses.replace(SETTINGS, steps=4)
    arm = Arm(pairs, dict.fromkeys(pairs, 2.0), 0.0, order(0))
    (trained,) = together(model, [arm], settings)
    for step, loss in enumerate(trained.losses):
        batch = Collator(0)([Answers()[index] for index in arm.order[step * BATCH : (step + 1) * BATCH]])
        sums, counts = answer_losses(model, [batch])
        assert loss == pytest.approx(float(sums.sum() / counts.sum()), abs=1e-6)
    assert distance(trained.pairs, pairs) == 0


@pytest.mark.parametrize(("family", "dtype"), [("llama", "float32"), ("gpt2", "float32"), ("llama", "bfloat16")])
def test_losses_are_those_of_each_adapter(family: str, dtype: str) -> None:
    precision, near = getattr(torch, dtype), 1e-5 if dtype == "float32" else 0.05
    arms = make_arms(tiny(family))
    batches = [Collator(0)([Answers()[index] for index in range(first, first + 5)]) for first in (0, 5, 10)]
    base = tiny(family).to(precision)
    sums, tokens = losses_together(
        base, [*(arm.start for arm in arms), {}], [*(arm.scales for arm in arms), {}], batches
    )
    assert sums.dtype == torch.float64
    assert sums.shape == (4, 15)
    torch.testing.assert_close(sums[3], answer_losses(base, batches)[0], atol=near, rtol=1e-6)
    for arm, found in zip(arms, sums, strict=False):
        peft = adapted(tiny(family).to(precision), arm.start, next(iter(arm.scales.values())))
        expected, counts = answer_losses(peft, batches)
        assert float((found - sums[3]).abs().max()) > 3 * near, "the adapter acts"
        torch.testing.assert_close(found, expected, atol=near, rtol=1e-6)
        assert torch.equal(tokens, counts)


def test_autocast_computes_in_its_precision_and_trains_in_float32() -> None:
    arms = make_arms(tiny("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = together(tiny("llama"), arms)
    for one, other in zip(mixed, together(tiny("llama"), arms), strict=True):
        assert one.losses == pytest.approx(other.losses, abs=0.05)
        assert one.losses != other.losses
        assert all(part.dtype == torch.float32 for pair in one.pairs.values() for part in pair)


def test_the_model_is_afterwards_what_it_was() -> None:
    model = tiny("llama").train()
    model.lm_head.requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}
    batch = Collator(0)([Answers()[0]])
    plain = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits
    together(model, make_arms(model), dataclasses.replace(SETTINGS, steps=2))
    with pytest.raises(ZeroDivisionError):
        losses_together(model, [{}], [{}], (1 // 0 for _ in range(1)))  # type: ignore[misc]
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]
        assert value.grad is None
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(plain, model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits)


def test_an_arm_that_diverges_stops_alone() -> None:
    model, settings = tiny("llama"), dataclasses.replace(SETTINGS, lr_scheduler="constant", warmup_steps=0)
    arms = make_arms(model)
    endless = dataclasses.replace(arms[1], learning_rate=1e36)
    trained = together(model, [arms[0], endless, arms[2]], settings)
    assert [arm.diverged for arm in trained] == [False, True, False]
    finite = [loss == loss for loss in trained[1].losses]
    steps = sum(finite)
    assert 0 < steps < STEPS
    assert finite == [True] * steps + [False] * (STEPS - steps), "nan from one step on"
    before = together(model, [arms[0], endless, arms[2]], dataclasses.replace(settings, steps=steps))
    assert not before[1].diverged
    assert distance(trained[1].pairs, before[1].pairs) == 0, "it stays where it last was finite"
    sound = together(model, arms, settings)
    for number in (0, 2):
        assert distance(trained[number].pairs, sound[number].pairs) < 1e-6


def test_padding_on_the_left_needs_its_mask() -> None:
    """A mask is left out only where padding comes last."""
    model = tiny("llama")
    right = Collator(0)([Answers()[index] for index in (0, 1, 2)])
    lengths = right["attention_mask"].sum(1).tolist()
    left = {
        name: torch.stack([row.roll(-length) for row, length in zip(value, lengths, strict=True)])
        for name, value in right.items()
        if value.dim() == 2
    }
    pairs = start(model, 0)
    scales = dict.fromkeys(pairs, 1.0)
    expected, _ = answer_losses(adapted(tiny("llama"), pairs, 1.0), [left])
    found, _ = losses_together(model, [pairs], [scales], [left])
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-6)


def test_an_arm_may_lack_sites() -> None:
    model = tiny("llama")
    arms = make_arms(model)
    path = next(iter(arms[0].start))
    fewer = dataclasses.replace(arms[0], start={name: pair for name, pair in arms[0].start.items() if name != path})
    trained = together(model, [fewer, arms[1]])
    assert path not in trained[0].pairs
    assert distance(trained[0].pairs, together(model, [fewer])[0].pairs) < 1e-6


def test_the_course_counts_and_restarts() -> None:
    active = [frozenset("a"), frozenset("ab"), frozenset("b"), frozenset("a"), frozenset("a")]
    kept, reset = (Course.of([active.__getitem__, None], ["a", "b"], 5, reset=reset) for reset in (False, True))
    assert kept.moves[:, 0].tolist() == [[True, False], [True, True], [False, True], [True, False], [True, False]]
    assert kept.counts[:, 0, 0].tolist() == [1, 2, 2, 3, 4]
    assert kept.counts[:, 1, 1].tolist() == [1, 2, 3, 4, 5]
    assert reset.counts[[3, 4], 0, 0].tolist() == [1, 2]
    assert reset.fresh.nonzero().tolist() == [[1, 0, 1], [3, 0, 0]]


def test_rates_follow_transformers() -> None:
    linear = ArmSettings(6, 1, "linear", warmup_steps=2)
    assert learning_rates(linear, 0.5).tolist() == pytest.approx([0, 0.25, 0.5, 0.375, 0.25, 0.125])
    assert learning_rates(ArmSettings(3, 1), 1.0).tolist() == [1, 1, 1]
    for name in ("reduce_lr_on_plateau", "nonsense", "cosine_with_min_lr"):
        with pytest.raises(UsageError, match=name):
            learning_rates(ArmSettings(3, 1, name), 1.0)
    floor = ArmSettings(3, 1, "cosine_with_min_lr", scheduler_kwargs=(("min_lr", 0.1),))
    assert learning_rates(floor, 1.0)[-1] > learning_rates(floor, 0.2)[-1] > 0.1


def test_what_does_not_fit_is_said() -> None:
    model = tiny("llama")
    arm = make_arms(model)[0]
    path, (a, b) = next(iter(arm.start.items()))
    cases: list[tuple[str, Any]] = [
        ("need an order of 72 rows", {"order": arm.order[:-1]}),
        ("outside the 20", {"order": [20] * 72}),
        (re.escape(f"no scale for {path}"), {"scales": {}}),
        ("nothing to train", {"start": {}}),
        ("do not fit", {"start": {path: (a, b[:, :0])}}),
        ("no linear layer", {"start": {path + "x": (a, b)}, "scales": {path + "x": 1.0}}),
        ("in the model", {"start": {path: (a[:, 1:], b)}}),
    ]
    for message, change in cases:
        with pytest.raises(UsageError, match=message):
            together(model, [dataclasses.replace(arm, **change)])
    for wrong in ({"steps": 0}, {"phase_state": "forget"}):
        with pytest.raises(UsageError):
            dataclasses.replace(SETTINGS, **wrong)


def test_a_site_that_is_never_called_or_has_no_rows_is_said() -> None:
    model = tiny("llama")
    model.spare = torch.nn.Linear(4, 4)
    idle = {"spare": (torch.ones(1, 4), torch.ones(4, 1))}
    with pytest.raises(VerificationError, match="never calls spare"):
        together(model, [Arm(idle, {"spare": 1.0}, 1e-3, order(0))])
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x.flatten(0, 1)).view_as(x)
    with pytest.raises(UsageError, match="rows of tokens"):
        together(model, make_arms(model))


def batches() -> list[dict[str, Tensor]]:
    return [Collator(0)([Answers()[index] for index in range(start, start + 5)]) for start in (0, 5)]


def test_each_arm_ends_with_its_best_factors_where_they_are_kept() -> None:
    """At a rate that overshoots: validated on the way as afterwards, and the pairs are those of that step."""
    model = tiny("llama")
    settings = dataclasses.replace(SETTINGS, lr_scheduler="constant", warmup_steps=0, max_grad_norm=0.0)
    arms = [
        dataclasses.replace(arm, learning_rate=rate)
        for arm, rate in zip(make_arms(model), (0.1, 0.2, 1e-3), strict=True)
    ]
    shared = (model, arms, Answers(), Collator(0), settings)
    kept = train_together(*shared, validation=Validation(batches(), {6, 12, 18, 24}, keep_best=True))
    last = train_together(*shared)
    sums, tokens = losses_together(model, [arm.pairs for arm in kept], [arm.scales for arm in arms], batches())
    for arm, end, loss in zip(kept, last, (sums.sum(1) / tokens.sum()).tolist(), strict=True):
        assert list(arm.validated) == [6, 12, 18, 24] and arm.best == min(arm.validated, key=arm.validated.__getitem__)
        assert loss == pytest.approx(min(arm.validated.values()), abs=1e-5)
        assert (distance(arm.pairs, end.pairs) < 1e-6) == (arm.best == 24)
    assert len({arm.best for arm in kept}) > 1


def test_what_leaves_is_told_and_the_others_go_on_with_their_phases_and_their_best() -> None:
    """In parts of two arms, of which one leaves in the middle."""
    model = tiny("llama")
    arms = make_arms(model, schedules=SCHEDULES)
    lost = dataclasses.replace(arms[0], learning_rate=1e36)
    validation = Validation(batches(), {8, 16, 24}, keep_best=True)
    rows = (Answers(), Collator(0), dataclasses.replace(SETTINGS, phase_state="reset", warmup_steps=0))
    found = train_together(
        model, [arms[0], lost, arms[1], arms[2]], *rows, at_once=2, watch=True, validation=validation
    )
    alone = train_together(model, arms, *rows, validation=validation)
    assert found[1].diverged and "not finite by step 3" in found[1].left
    assert len(found[1].losses) == STEPS and found[1].losses[-1] != found[1].losses[-1]
    for one, other in zip([found[0], *found[2:]], alone, strict=True):
        assert distance(one.pairs, other.pairs) < 1e-6 and not one.left
        assert one.losses == pytest.approx(other.losses, abs=1e-6)
        assert one.validated == pytest.approx(other.validated, abs=1e-6) and one.best == other.best
        assert one.tokens == other.tokens > found[1].tokens > 0


def test_fitted_in_one_batch_or_in_turn_is_the_same() -> None:
    model = tiny("gpt2")
    arms = make_arms(model)
    lost = dataclasses.replace(arms[0], learning_rate=1e36)
    settings = dataclasses.replace(SETTINGS, steps=8)
    shared = (model, [*arms, lost], Answers(), Collator(0), settings, {"dev": batches(), "test": batches()[:1]})
    one, other = (fit(*shared, in_turn=in_turn) for in_turn in (False, True))
    for name, items in (("dev", 10), ("test", 5)):
        assert one.losses[name].shape == (4, items) and one.losses[name][3].isnan().all()
        assert torch.allclose(one.losses[name], other.losses[name], atol=1e-4, equal_nan=True)
    assert [arm.tokens for arm in one.trained[:3]] == [arm.tokens for arm in other.trained[:3]]
    assert one.peak_bytes > 0 and [arm.diverged for arm in one.trained] == [False] * 3 + [True]


def test_what_diverges_in_turn_leaves_as_it_does_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the same eighth, for the same reason; the others are as they are unwatched, and the base is asked once."""
    model = tiny("llama")
    model.lm_head.weight.data.mul_(20)  # one that can be worse than it is
    settings = dataclasses.replace(SETTINGS, lr_scheduler="constant", warmup_steps=0)
    good = make_arms(model)[0]
    wild, lost = (dataclasses.replace(good, learning_rate=rate) for rate in (0.3, 1e36))
    shared = (model, [good, wild, lost], Answers(), Collator(0), settings, {"dev": batches()})
    known: dict[tuple[int, ...], float] = {}
    one, other = fit(*shared, watch=True), fit(*shared, in_turn=True, watch=True, base_losses=known)
    told = [re.split(r"(?<=mean loss )[\d.]+", fitted.trained[1].left) for fitted in (one, other)]
    assert told[0] == told[1] and "steps 4 to 6, the base's there is 5.751" in told[0][1]
    for mine, theirs in zip(one.trained, other.trained, strict=True):
        assert mine.diverged == theirs.diverged
        assert mine.losses == pytest.approx(theirs.losses, rel=0.05, nan_ok=True)
    assert [arm.tokens for arm in one.trained[:2]] == [arm.tokens for arm in other.trained[:2]]
    assert [sum(loss == loss for loss in arm.losses) for arm in other.trained] == [STEPS, 6, 1]
    assert "not finite" in other.trained[2].left and not other.trained[0].left
    assert other.losses["dev"][1:].isnan().all() and other.losses["dev"][0].isfinite().all()

    def asked(self: Undropped, batch: Any) -> float:
        raise AssertionError("the base's losses on these rows are known")

    monkeypatch.setattr(Undropped, "base_loss", asked)
    again = fit(*shared, in_turn=True, watch=True, base_losses=known)
    unwatched = fit(*shared, in_turn=True)
    assert [arm.left for arm in again.trained] == [arm.left for arm in other.trained]
    assert distance(again.trained[0].pairs, unwatched.trained[0].pairs) == 0
    assert not unwatched.trained[1].diverged and not unwatched.trained[1].left


def test_rows_of_more_than_tokens_are_refused() -> None:
    model = tiny("llama")

    def collate(rows: Any) -> Any:
        return Collator(0)(rows) | {"pixel_values": torch.zeros(1)}

    with pytest.raises(UsageError, match="carry pixel_values"):
        train_together(model, make_arms(model), Answers(), collate, SETTINGS)
