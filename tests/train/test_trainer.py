"""Steps that must not be taken are not taken, signals end in a checkpoint, and nothing that was good is lost."""

from __future__ import annotations

import os
import signal
import textwrap
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from rows import Rows, SendWhileValidating, adapted_base, equal, logged, make_trainer, resumed, weights
from tiny import tiny_llama
from torch import nn
from transformers import Trainer, TrainerCallback

from rankwise.errors import DataError, DivergedError, Interrupted, RankwiseError
from rankwise.files import document
from rankwise.train.checkpoints import find_damage, newest_complete
from rankwise.train.gradients import gradient_norm
from rankwise.train.step import SKIPPED_IN_A_ROW, StepGuard, memory_advice


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


class Poison(TrainerCallback):
    """Makes the gradients of one step infinite (`loss=False`) or a weight NaN before it."""

    def __init__(self, step: int, *, loss: bool) -> None:
        self.step, self.loss = step, loss
        self.before: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step + 1 != self.step:
            return
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.before = {name: value.detach().clone() for name, value in trained.items()}
        if self.loss:
            model.get_output_embeddings().weight.data.fill_(float("nan"))
        else:
            next(iter(trained.values())).register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("loss", [True, False])
def test_a_step_that_is_not_finite_is_not_taken(base: Path, tmp_path: Path, loss: bool) -> None:
    poison = Poison(4, loss=loss)
    trainer = make_trainer(base, tmp_path, callbacks=[poison], save_strategy="steps", save_steps=3)
    with pytest.raises(DivergedError) as raised:
        trainer.train()
    message = str(raised.value)
    assert "step 4" in message
    assert ("loss is nan" if loss else "gradient") in message
    named = [word.strip(".,") for word in message.split() if word.startswith("row-")]
    assert len(set(named)) == 4, "2 batches of 2 samples are in the step"
    assert raised.value.exit_code == 4
    assert equal(weights(trainer), poison.before)
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-3"


def test_the_plain_trainer_would_have_hidden_it(base: Path, tmp_path: Path) -> None:
    """What the guard is for: without it all adapters become NaN."""
    trainer = make_trainer(base, tmp_path, callbacks=[Poison(2, loss=False)], max_steps=3)
    trainer.before_step = lambda model: None  # type: ignore[method-assign]
    trainer.train()
    assert any(value.isnan().any() for value in weights(trainer).values())


def test_the_gradient_norm_is_that_of_all_gradients() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layers(torch.ones(2, 3)).sum().backward()
    frozen = nn.Linear(2, 2)
    everything = torch.cat([value.grad.flatten() for value in layers.parameters()])
    measured = gradient_norm([*layers.parameters(), *frozen.parameters()])
    torch.testing.assert_close(measured, everything.norm())


def test_a_gradient_scaler_may_skip_but_not_for_ever() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    guard, reasons = StepGuard(), []
    for step in range(SKIPPED_IN_A_ROW):
        optimizer.zero_grad()
        loss = (parameter.sum() * (float("inf") if step != 3 else 1.0)).clamp(max=1e38)
        scaler.scale(parameter.sum()).backward()
        if step != 3:
            parameter.grad.fill_(float("inf"))
        guard.losses.append(loss)
        values = guard.values([parameter]).tolist()
        reasons.append(guard.check(*values, scaled=True))
        guard.reset()
        scaler.step(optimizer)
        scaler.update()
    assert reasons == [None] * SKIPPED_IN_A_ROW, "a finite step in between starts the count again"
    assert guard.skipped_total == SKIPPED_IN_A_ROW - 1
    row = [guard.check(1.0, float("inf"), scaled=True) for _ in range(SKIPPED_IN_A_ROW)]
    assert row[-1]
    assert "in a row" in row[-1]
    assert guard.check(float("nan"), 1.0, scaled=True), "a loss that is not finite is no matter of scale"


def test_evaluation_changes_no_weight(base: Path, tmp_path: Path) -> None:
    plain = make_trainer(base, tmp_path / "plain", max_steps=4)
    plain.train()
    watched = make_trainer(base, tmp_path / "watched", max_steps=4, eval_strategy="steps", eval_steps=1)
    watched.train()
    assert equal(weights(plain), weights(watched))


def test_the_guard_changes_no_weight(base: Path, tmp_path: Path) -> None:
    ours = make_trainer(base, tmp_path, max_steps=4)
    ours.train()
    plain = Trainer(
        model=adapted_base(base),
        args=ours.args,
        train_dataset=Rows(),
        data_collator=lambda rows: drop_index(ours, rows),
    )
    plain.train()
    assert equal(weights(ours), weights(plain))
    assert ours.state.total_flos == plain.state.total_flos > 0


def drop_index(trainer: Any, rows: Any) -> dict[str, torch.Tensor]:
    batch = trainer.data_collator(rows)
    batch.pop("sample_index")
    return batch


def test_lora_plus_gives_b_its_own_rate(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path, loraplus_lr_ratio=16.0, max_steps=1)
    names = {id(value): name for name, value in trainer.model.named_parameters()}
    rates: dict[str, set[float]] = {"lora_A": set(), "lora_B": set()}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            rates["lora_A" if "lora_A" in names[id(parameter)] else "lora_B"].add(group["lr"])
    assert rates == {"lora_A": {1e-2}, "lora_B": {16e-2}}


def test_losses_are_written_as_they_come(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2)
    trainer.train()
    rows = logged(tmp_path)
    assert [row["step"] for row in rows if row["loss"]] == ["1", "2", "3", "4"]
    assert [row["step"] for row in rows if row["eval_loss"]] == ["2", "4"]
    assert float(rows[0]["learning_rate"]) == 1e-2
    assert all(float(row["grad_norm"]) > 0 for row in rows if row["loss"])


class FullDisk:
    """From the n-th call on, writing fails as on a full disk."""

    def __init__(self, real: Any, after: int, error: Exception) -> None:
        self.real, self.left, self.error = real, after, error

    def __call__(self, *args: Any, **rest: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.real(*args, **rest)


@pytest.mark.parametrize("place", ["weights", "optimizer", "manifest"])
def test_a_full_disk_leaves_the_old_checkpoint(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    full = OSError(28, "No space left on device")
    trainer = make_trainer(base, tmp_path, save_strategy="steps", save_steps=3, save_total_limit=1)
    if place == "weights":
        monkeypatch.setattr("peft.peft_model.safe_save_file", FullDisk(lambda *a, **k: real_save(*a, **k), 1, full))
    elif place == "optimizer":
        monkeypatch.setattr(torch, "save", FullDisk(torch.save, 5, full))
    else:
        monkeypatch.setattr(document, "write_text", FullDisk(document.write_text, 1, DataError("no space left")))
    with pytest.raises(DataError, match=r"(?i)no space left"):
        trainer.train()
    monkeypatch.undo()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert find_damage(tmp_path / "checkpoint-3") == []
    assert resumed(make_trainer(base, tmp_path)).state.global_step == 12


def real_save(*args: Any, **rest: Any) -> Any:
    from safetensors.torch import save_file

    return save_file(*args, **rest)


def test_out_of_memory_says_what_helps() -> None:
    with pytest.raises(RankwiseError, match="gradient_checkpointing") as raised, memory_advice():
        torch.empty(2**60)
    assert raised.value.exit_code == 1
    with pytest.raises(RuntimeError, match="another matter"), memory_advice():
        raise RuntimeError("another matter")


class Send(TrainerCallback):
    """Sends signals to this process at the start of the third step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_in_a_checkpoint_that_goes_on_exactly(base: Path, tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    trainer = make_trainer(base, tmp_path / "stopped", callbacks=[Send(number)], eval_strategy="epoch")
    with pytest.raises(Interrupted, match="--resume_from_checkpoint true") as raised:
        trainer.train()
    assert raised.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert newest_complete(tmp_path / "stopped") == tmp_path / "stopped" / "checkpoint-3"
    assert not any(row["eval_loss"] for row in logged(tmp_path / "stopped")), "whoever sent it does not wait for that"
    continued = resumed(make_trainer(base, tmp_path / "stopped"))
    straight = make_trainer(base, tmp_path / "straight")
    straight.train()
    assert equal(weights(continued), weights(straight))


@pytest.mark.parametrize(
    ("evaluation", "step"),
    [
        ({"eval_strategy": "steps", "eval_steps": 4}, 4),
        ({"eval_strategy": "epoch"}, 6),
        ({"eval_strategy": "epoch"}, 12),
    ],
    ids=["within an epoch", "at its end", "at the end of all"],
)
def test_a_signal_during_validation_does_not_wait_for_the_rest(
    base: Path, tmp_path: Path, evaluation: dict[str, Any], step: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The resumed run makes it up, and ends as one that was never stopped: weights, choice and log."""
    given = {"per_device_eval_batch_size": 1, "load_best_model_at_end": True, **evaluation}
    given |= {"save_strategy": given["eval_strategy"], "save_steps": 4, "lr_scheduler_type": "reduce_lr_on_plateau"}
    sent = SendWhileValidating(step)
    stopped = make_trainer(base, tmp_path / "run", callbacks=[sent], **given)
    with pytest.raises(Interrupted) as raised:
        stopped.train()
    assert (raised.value.exit_code, sent.batches) == (143, 1), "of four batches"
    assert newest_complete(tmp_path / "run") == tmp_path / "run" / f"checkpoint-{step}"
    assert str(step) not in [row["step"] for row in logged(tmp_path / "run") if row["eval_loss"]]
    continued = resumed(make_trainer(base, tmp_path / "run", **given))
    assert f"validating at step {step}, which the stop has left out" in capsys.readouterr().out
    straight = make_trainer(base, tmp_path / "straight", **given)
    straight.train()
    assert equal(weights(continued), weights(straight))
    assert continued.state.best_metric == straight.state.best_metric
    best = [Path(trainer.state.best_model_checkpoint).name for trainer in (continued, straight)]
    assert best[0] == best[1]
    columns = ("step", "loss", "eval_loss", "learning_rate")
    rows = [[[row[name] for name in columns] for row in logged(tmp_path / name)] for name in ("run", "straight")]
    assert rows[0] == rows[1]
    assert continued.state.global_step == 12


def test_a_finished_run_takes_no_further_step(base: Path, tmp_path: Path) -> None:
    """`max_steps` may lie within an epoch, which the Trainer would go on with."""
    make_trainer(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=4).train()
    assert (
        resumed(make_trainer(base, tmp_path, max_steps=4, save_strategy="steps", save_steps=4)).state.global_step == 4
    )


SCRIPT = """
    import os, signal
    from pathlib import Path
    import torch
    from test_trainer import Send, make_trainer

    def save(content, path, real=torch.save):
        if "checkpoint-4" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        real(content, path)

    if {killed}:
        torch.save = save
    callbacks = [] if {killed} else [Send(signal.SIGTERM, signal.SIGTERM)]
    make_trainer(Path({base!r}), Path({out!r}), callbacks=callbacks, save_strategy="steps", save_steps=2).train()
"""


def ended(base: Path, out: Path, *, killed: bool) -> int:
    """Exit status of a run that is killed within its second save, or gets two signals in its third step."""
    script = base.parent / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(killed=killed, base=str(base), out=str(out)))
    return processes.run(script).returncode


def test_a_second_signal_stops_at_once(base: Path, tmp_path: Path) -> None:
    assert ended(base, tmp_path, killed=False) == 128 + signal.SIGTERM
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"
    assert not (tmp_path / "checkpoint-3").exists()


def test_killed_while_saving_the_previous_checkpoint_goes_on(base: Path, tmp_path: Path) -> None:
    assert ended(base, tmp_path / "killed", killed=True) == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-4" / "adapter_model.safetensors").exists()
    assert newest_complete(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    continued = resumed(make_trainer(base, tmp_path / "killed"))
    straight = make_trainer(base, tmp_path / "straight")
    straight.train()
    assert equal(weights(continued), weights(straight))
