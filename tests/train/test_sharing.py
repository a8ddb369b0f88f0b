"""A token weighs the same in every batch and process: losses and weights do not depend on how rows are shared."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from rows import Rows, logged, make_trainer, weights
from safetensors.torch import load_file
from test_finetune import restaurants
from tiny import tiny_llama
from tiny_isaac import tiny_isaac
from tiny_vision import FAMILIES, tiny_qwen25vl
from torch.nn import functional as F
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import AutoTokenizer

from rankwise import cli
from rankwise.data.dataset import RenderedDataset
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import read_object
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model
from rankwise.train.rows import Filled, Silenceable, silenceable

SEEING = {**FAMILIES, "isaac": tiny_isaac}
PLAIN = {"dropout": 0.0, "optim": "sgd", "learning_rate": 0.3}  # AdamW makes much of a gradient's rounding
LIKE = {"rtol": 1e-4, "atol": 2e-6}
Table = list[dict[str, str]]


class Uneven(Rows):
    """Rows of 4 to 12 tokens of which 1 to 8 are learnt: a mean of means is far from the mean."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        length, learnt = 4 + (index * 5) % 9, 1 + (index * 3) % 8
        ids = [4 + (index * 31 + place * 17) % 300 for place in range(length)]
        labels = [-100] * max(1, length - learnt) + ids[max(1, length - learnt) :]
        return {"input_ids": ids, "labels": labels, "sample_index": index}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


@given(rows=st.integers(1, 40), size=st.integers(1, 5), processes=st.integers(2, 4), split=st.booleans())
def test_every_row_counts_once_and_every_process_has_as_many_full_batches(
    rows: int, size: int, processes: int, split: bool
) -> None:
    size = size * processes if split else size
    batches = Filled(BatchSampler(SequentialSampler(range(rows)), size, False), 1 if split else processes)
    shares = [list(BatchSamplerShard(batches, processes, rank, split_batches=split)) for rank in range(processes)]
    assert len({len(share) for share in shares}) == 1
    assert {len(batch) for share in shares for batch in share} == {size // processes if split else size}
    steps = [[place for batch in together for place in batch] for together in zip(*shares, strict=True)]
    for step, places in enumerate(steps):
        counted = [place for place in places if place >= 0]
        assert counted == list(range(rows))[step * len(places) : (step + 1) * len(places)], "as one process has them"
    assert all(0 <= ~place < rows for step in steps for place in step if place < 0)


def test_a_silenced_row_runs_and_has_nothing_to_learn() -> None:
    rows = Silenceable(Uneven(5))
    assert rows[3] == Uneven(5)[3] and len(rows) == 5
    silent = rows[~3]
    assert silent["input_ids"] == rows[3]["input_ids"]
    assert set(silent["labels"]) == {-100} and silent["sample_index"] == ~3
    with pytest.raises(UsageError, match="hold their labels"):
        silenceable([{"input_ids": [1, 2]}])


# --- the validation loss ---------------------------------------------------------------------------------------------


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = f"train --model_name {base} --task e2e_nlg --data_path {data} -o {out} --lr 0.1 --logging_steps 1"
    return [
        *own.split(),
        "--use_cpu",
        "--val_fraction",
        "0.5",
        "--lora_dropout",
        "0",
        "--no_plots",
        "--optim",
        "sgd",
        *more,
    ]


def token_mean(base: Path, data: Path, run: Path) -> float:
    """Of the run's adapter on its validation rows, each alone: no batch, no padding, no Trainer."""
    chosen = set(read_object(run / "split.json")["val"])
    renderer = Renderer(AutoTokenizer.from_pretrained(base), max_length=2048)
    rows = RenderedDataset([one for one in load("e2e_nlg", data, "train") if one.id in chosen], renderer)
    model, total, tokens = load_adapter(load_model(str(base), torch.float32), run).eval(), 0.0, 0
    with torch.no_grad():
        for index in range(len(rows)):
            row = rows[index]
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            targets = torch.tensor(row["labels"][1:])
            total += float(F.cross_entropy(logits.double(), targets, reduction="sum", ignore_index=-100))
            tokens += int((targets != -100).sum())
    return total / tokens


@pytest.mark.parametrize("more", [(), ("--packing",), ("--label_smoothing_factor", "0.2")])
def test_the_validation_loss_is_the_mean_over_tokens_whatever_the_batch_size(
    base: Path, data: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    found = []
    for size in ("1", "3", "8"):
        out = tmp_path / size
        assert cli.main(words(base, data, out, "--max_steps", "3", "--per_device_eval_batch_size", size, *more)) == 0
        found += [float(row["eval_loss"]) for row in logged(out) if row["eval_loss"]][-1:]
    assert found == pytest.approx([token_mean(base, data, tmp_path / "1")] * 3, rel=1e-6)


def test_evaluation_makes_no_logits_but_those_of_learnt_tokens(base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, tmp_path, rows=Uneven(6))
    shapes: list[tuple[int, ...]] = []
    hook = trainer.model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    trainer.evaluate(Uneven(6))
    hook.remove()
    learnt = sum(label >= 0 for row in map(Uneven(6).__getitem__, range(6)) for label in row["labels"][1:])
    assert [(shape[0], shape[1]) for shape in shapes] == [(1, learnt)]


# --- two processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    from rows import make_trainer, resumed, weights
    from test_sharing import CASES, RESUMED, made

    from rankwise.files.processes import finish, process_index

    base, folder = sys.argv[1:]
    results = {}
    for name in CASES:
        trainer = made(Path(base), Path(folder) / name, name, size=1)
        trainer.train()
        results[name] = weights(trainer), trainer.evaluate()["eval_loss"]
    for name in RESUMED:
        place = Path(folder) / f"stopped-{name}"
        stopped, again = (made(Path(base), place, name, size=1, save_strategy="steps", save_steps=7) for _ in range(2))
        stopped.train()
        results[f"{name} resumed"] = weights(resumed(again, str(place / "checkpoint-7"), processes=2)), 0.0
    if process_index()[0] == 0:
        torch.save(results, Path(folder) / "results.pt")
    finish()
"""
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "smoothed": {"label_smoothing_factor": 0.1},
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "split": {"accelerator_config": {"split_batches": True}},
}
RESUMED = ("plain", "grouped")


class Lengthy(Uneven):
    @property
    def lengths(self) -> list[int]:
        return [len(self[index]["input_ids"]) for index in range(len(self))]


def made(base: Path, folder: Path, name: str, size: int, **more: Any) -> Any:
    """9 rows and two processes: the last step of an epoch has one row, which one process runs."""
    given = {"num_train_epochs": 2, "gradient_accumulation_steps": 1, **PLAIN, **CASES[name], **more}
    size = 2 if name == "split" else size
    trainer = make_trainer(
        base, folder, rows=Lengthy(9), per_device_train_batch_size=size, per_device_eval_batch_size=size, **given
    )
    trainer.eval_dataset = silenceable(Uneven(5)) if trainer.args.world_size > 1 else Uneven(5)
    return trainer


@pytest.fixture(scope="module")
def in_two(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    file = folder / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    done = processes.run(file, base, folder, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Any] = torch.load(folder / "results.pt")
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_and_score_what_one_does(
    base: Path, tmp_path: Path, in_two: dict[str, Any], name: str
) -> None:
    trainer = made(base, tmp_path, name, size=2)
    trainer.train()
    found, loss = in_two[name]
    for key, value in weights(trainer).items():
        torch.testing.assert_close(found[key], value, **LIKE)
    assert loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", RESUMED)
def test_two_processes_resume_within_an_epoch_exactly(in_two: dict[str, Any], name: str) -> None:
    straight, again = in_two[name][0], in_two[f"{name} resumed"][0]
    assert all(torch.equal(straight[key], again[key]) for key in straight)


def table(file: Path) -> Table:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.mark.slow
def test_the_command_in_two_processes_is_the_command_in_one(base: Path, data: Path, tmp_path: Path) -> None:
    """Phases, gradient norms, losses and adapter, with rows that do not divide."""
    more = ["--num_train_epochs", "2", "--schedule", "both:2 > mlp", "--max_samples", "3", "--eval_strategy", "epoch"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(words(base, data, one, "--per_device_train_batch_size", "2", *more)) == 0
    rest = words(base, data, two, "--per_device_train_batch_size", "1", "--per_device_eval_batch_size", "2", *more)
    done = processes.run("-m", "rankwise.cli", *rest, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, **LIKE)
    for name, columns in (("training_log.csv", ("loss", "eval_loss", "grad_norm")), ("gradient_norms.csv", ("norm",))):
        rows = [[float(row[column] or 0) for row in table(two / name) for column in columns]]
        rows += [[float(row[column] or 0) for row in table(one / name) for column in columns]]
        assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-6)
        assert rows[0]


# --- families that say they cannot be told ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(SEEING))
def test_every_family_weighs_tokens_not_batches(tmp_path: Path, family: str) -> None:
    base = SEEING[family](tmp_path / "base")
    more = {"label_smoothing_factor": 0.1} if family == "qwen25vl" else {}
    found = []
    for size, accumulated in ((4, 1), (1, 4)):
        own = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        trainer = make_trainer(base, tmp_path / str(size), rows=Uneven(7), **PLAIN, **own, **more)
        trainer.train()
        found.append((weights(trainer), [row["loss"] for row in trainer.state.log_history if "loss" in row]))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for key, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][key], value, **LIKE)


def test_smoothed_labels_are_the_next_tokens(tmp_path: Path) -> None:
    """transformers shifts them for causal models only: one that sees would learn to repeat its input."""
    base = tiny_qwen25vl(tmp_path / "base")
    losses = []
    for smoothing in (0.0, 1e-6):
        trainer = make_trainer(base, tmp_path, rows=Uneven(4), dropout=0.0, label_smoothing_factor=smoothing)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_model_that_drops_the_count_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tiny_qwen25vl(tmp_path / "base"), tmp_path, rows=Uneven(4))
    model = trainer.model.get_base_model()
    loss = model.loss_function
    model.loss_function = lambda *args, num_items_in_batch=None, **rest: loss(*args, **rest)
    with pytest.raises(VerificationError, match="does not divide its loss") as raised:
        trainer.train()
    assert raised.value.exit_code == 6
