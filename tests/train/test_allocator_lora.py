"""`train --allocator adalora`: ranks move to a target on schedule, what is saved is plain LoRA with the same logits,
resume is exact, and PEFT's scores are those of `core.importance`."""

from __future__ import annotations

import csv
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import processes
import pytest
import torch
from peft import PeftModel
from rows import SETTINGS, Rows, equal, weights
from safetensors.torch import load_file
from test_finetune import restaurants
from test_train_stage import words
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainerState, set_seed

from rankwise import cli
from rankwise.core.rank_budget import Importance, RankBudget, kept, triplet_scores
from rankwise.data.dataset import Collator
from rankwise.errors import DataError, VerificationError
from rankwise.files.adapter import LoraAdapter, LoraPair, read_adapter, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.plan import read_plan
from rankwise.models.adapt import (
    ADAPTER,
    Allocation,
    adalora_layers,
    adapt_allocated,
    allocated_plan,
    plain_pairs,
    regularize,
    site_of,
)
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train import results as saving
from rankwise.train.adalora import ALLOCATED_TABLE, ALLOCATOR_STATE, RankAllocation
from rankwise.train.arguments import build_arguments
from rankwise.train.checkpoints import remove
from rankwise.train.trainer import RankwiseTrainer

ADALORA = ("--allocator", "adalora", "--lora_r", "3", "--max_steps", "20")
SITES, START, TARGET = 14, 6, 3
IDS = torch.arange(4, 24).reshape(2, 10)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run by the command, with dropout, and a checkpoint every four steps."""
    folder = tmp_path_factory.mktemp("run")
    assert cli.main(words(base, data, folder, *ADALORA, *SAVING)) == 0
    return folder


SAVING = ("--save_strategy", "steps", "--save_steps", "4", "--lora_dropout", "0.1")


@pytest.fixture
def train(base: Path, data: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda *more: cli.main(words(base, data, tmp_path, *more))


def table(folder: Path) -> list[dict[str, int]]:
    with open(folder / ALLOCATED_TABLE, newline="") as file:
        return [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]


def ranks_in(row: Mapping[str, int]) -> dict[str, int]:
    return {name: value for name, value in row.items() if name.startswith("model.")}


# --- the command -------------------------------------------------------------------------------------------------


def test_ranks_fall_on_schedule_to_the_target_and_differ(run: Path) -> None:
    rows = table(run)
    budget = RankBudget(SITES * START, TARGET / START, 2, 6, 1, 20)  # the default warm-ups of 20 steps
    assert [row["step"] for row in rows] == [0, *range(3, 15)]
    assert [row["budget"] for row in rows] == [budget.at(row["step"]) for row in rows]
    assert [row["total_rank"] for row in rows] == [row["budget"] for row in rows], "no two channels score the same"
    assert rows[0]["total_rank"] == SITES * START > rows[1]["total_rank"]
    assert rows[-1]["total_rank"] == SITES * TARGET
    assert all(sum(ranks_in(row).values()) == row["total_rank"] for row in rows)
    assert len(set(ranks_in(rows[-1]).values())) > 2, "not uniform"


def test_the_saved_adapter_is_plain_lora_with_the_last_ranks_and_so_is_the_plan(run: Path, base: Path) -> None:
    ranks = {path: rank for path, rank in ranks_in(table(run)[-1]).items() if rank}
    adapter = read_adapter(run)
    assert {path: pair.rank for path, pair in adapter.pairs.items()} == ranks
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}
    assert read_plan(run).ranks == ranks
    sites = json.loads((run / "sites.json").read_text())
    assert {row["path"]: row["rank"] for row in sites["sites"]} == ranks
    assert len(sites["left_out"]) == SITES - len(ranks)
    entry = json.loads((run / "manifest.json").read_text())["stages"]["train"]
    assert entry["trainable_parameters"] == sum(pair.rank * sum(pair.shape) for pair in adapter.pairs.values())
    assert (entry["total_rank_before"], entry["total_rank_after"]) == (SITES * START, SITES * TARGET)
    assert entry["adapted_sites"] == len(ranks)
    load_adapter(load_model(str(base), torch.float32), run)


@pytest.mark.slow
def test_the_next_commands_take_what_came_out(run: Path, base: Path, data: Path, tmp_path: Path) -> None:
    plan = read_plan(run).ranks
    assert cli.main(["merge", str(run), "--base_model", str(base), "-o", str(tmp_path / "merged")]) == 0
    assert cli.main(["compress", str(run), "--energy", "0.9", "-o", str(tmp_path / "small")]) == 0
    score = f"evaluate {run} --task e2e_nlg --data_path {data} --num_samples 2 --max_new_tokens 2 --split train"
    assert cli.main([*score.split(), "-o", str(tmp_path / "scores"), "--device", "cpu"]) == 0
    again = (
        f"train --lora_config {run} --task e2e_nlg --data_path {data} -o {tmp_path / 'again'} --max_steps 1 --use_cpu"
    )
    assert cli.main([*again.split(), "--lr", "1e-3"]) == 0
    assert {path: pair.rank for path, pair in read_adapter(tmp_path / "again").pairs.items()} == plan


@pytest.mark.parametrize("step", [8, 16])  # while masked channels may come back, and with the final ranks
def test_a_resumed_run_ends_in_the_same_bits(run: Path, base: Path, data: Path, tmp_path: Path, step: int) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    (folder / "adapter_model.safetensors").unlink()
    for later in folder.glob("checkpoint-*"):
        if int(later.name.partition("-")[2]) > step:
            remove(later)
    assert cli.main(words(base, data, folder, *ADALORA, *SAVING, "--resume_from_checkpoint", "true")) == 0
    straight, resumed = (load_file(place / "adapter_model.safetensors") for place in (run, folder))
    assert equal(straight, resumed)
    assert (folder / ALLOCATED_TABLE).read_bytes() == (run / ALLOCATED_TABLE).read_bytes()
    last = [load_file(place / "checkpoint-20" / ALLOCATOR_STATE) for place in (run, folder)]
    assert equal(*last)


def test_resuming_needs_the_same_schedule_and_the_allocators_state(
    run: Path, base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(run, folder)
    resume = ("--resume_from_checkpoint", "true")
    assert cli.main(words(base, data, folder, *ADALORA[:-1], "40", *SAVING, *resume)) == 2
    assert "allocator.budget.total_steps: 20 in the checkpoint, 40 now" in capsys.readouterr().err
    (folder / "checkpoint-16" / ALLOCATOR_STATE).unlink()
    with pytest.raises(DataError, match="rank allocator cannot go on"):
        RankAllocation(allocation(), folder).restore(folder / "checkpoint-16")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--lora_config", "PLAN"), "a plan fixes the ranks"),
        (("--use_dora",), "magnitudes"),
        (("--use_rslora",), "starting rank"),
        (("--init_lora_weights", "pissa"), "its own start"),
        (("--loraplus_lr_ratio", "8"), "LoRA+"),
        (("--lora_bias", "all"), "no biases"),
        (("--phase_strategy", "both-mlp-attn"), "frozen matrix"),
        (("--early_stopping", "2"), "earlier checkpoint"),
        (("--load_best_model_at_end",), "earlier checkpoint"),
        (("--label_smoothing_factor", "0.1"), "--allocator_orth 0"),
        (("--auto_find_batch_size",), "must be known"),
        (("--allocator_keep_ratio", "1"), "--allocator_keep_ratio is 1.0; give a number above 0 and below 1"),
        (("--allocator_orth", "-1"), "--allocator_orth is -1.0; give a number of at least 0"),
        (("--allocator_mask_interval", "0"), "--allocator_mask_interval"),
        (("--allocator_init_warmup", "12", "--allocator_final_warmup", "8"), "Give for example 4 and 4"),
        (("--lora_r", "9"), "has no more than 16"),
    ],
)
def test_what_does_not_go_with_it_is_refused_by_name(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], reason: str
) -> None:
    given = [str(tmp_path / "plan.json") if flag == "PLAN" else flag for flag in flags]
    assert train(*ADALORA[:-4], *ADALORA[-2:], *(() if "--lora_r" in given else ADALORA[2:4]), *given) == 2
    assert reason in capsys.readouterr().err


def test_its_options_without_it_are_refused_and_a_dry_run_says_what_it_does(
    train: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--allocator_init_warmup", "3") == 2
    assert "acts only with --allocator adalora" in capsys.readouterr().err
    assert train(*ADALORA, "--dry-run") == 0
    assert "divide the ranks: 6 everywhere, 3 on average at last" in capsys.readouterr().out


def test_an_adapter_that_is_not_what_was_trained_is_not_passed_off(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*given: Any) -> dict[str, LoraPair]:
        return {
            path: LoraPair(pair.lora_A, pair.lora_B * 1.01, pair.scale) for path, pair in plain_pairs(*given).items()
        }

    monkeypatch.setattr(saving, "plain_pairs", wrong)
    assert train(*ADALORA) == 6
    assert "not what was trained" in capsys.readouterr().err


# --- the parts ---------------------------------------------------------------------------------------------------


def allocation(steps: int = 12, orthogonality: float = 0.5, **budget: Any) -> Allocation:
    schedule = {"init_warmup": 2, "final_warmup": 4, "mask_interval": 2, "total_steps": steps} | budget
    return Allocation(START, TARGET, RankBudget(SITES * START, TARGET / START, **schedule), orthogonality)


def adapted(base: Path, found: Allocation, dropout: float = 0.0) -> PeftModel:
    set_seed(0)
    model = load_model(str(base), torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model)), START, None, False, "tiny")
    return adapt_allocated(model, plan, LoraSection(lora_dropout=dropout), found)


def trainer_of(base: Path, folder: Path, found: Allocation | None = None, **given: Any) -> RankwiseTrainer:
    """Six optimizer steps an epoch, twelve in all, without dropout."""
    found = found or allocation()
    arguments = build_arguments(folder, 1, {**SETTINGS, **given})
    keeper = RankAllocation(found, folder)
    return RankwiseTrainer(
        model=adapted(base, found),
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        data_collator=Collator(0),
        allocator=keeper,
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_folding_changes_no_logit_and_masked_channels_are_gone(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(base, tmp_path)
    trainer.train()
    model, masks = trainer.model, trainer.allocator.kept
    assert {path: int(mask.sum()) for path, mask in masks.items()} == ranks_in(table(tmp_path)[-1])
    pairs = plain_pairs(model, masks, 2.0)
    write_adapter(tmp_path / "plain", LoraAdapter(lora_config(str(base)), pairs))
    before = logits(model)
    plain = logits(load_adapter(load_model(str(base), torch.float32), tmp_path / "plain"))
    torch.testing.assert_close(plain, before, rtol=1e-4, atol=1e-5)
    assert (before - logits(load_model(str(base), torch.float32))).abs().max() > 0.01, "training did something"
    for path, layer in adalora_layers(model).items():
        assert bool((layer.lora_E[ADAPTER].detach()[~masks[path]] == 0).all())
    path = next(path for path, mask in masks.items() if not mask.all())
    with torch.no_grad():
        adalora_layers(model)[path].lora_E[ADAPTER].fill_(1.0)
    with pytest.raises(VerificationError, match="is not zero"):
        plain_pairs(model, masks, 2.0)


def test_transposed_weights_fold_the_same(tmp_path: Path) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=64, n_positions=32)).eval()
    model.save_pretrained(tmp_path / "base")
    plan = uniform_plan(choose_sites(model_sites(model)), 4, 12.0, False, "tiny")
    found = Allocation(4, 2, RankBudget(4 * len(plan.ranks), 0.5, 1, 1, 1, 8))
    trained = adapt_allocated(model, plan, LoraSection(lora_dropout=0.0), found)
    masks = {path: torch.tensor([True, False, True, False]) for path in plan.ranks}
    masks[next(iter(masks))][:] = False
    with torch.no_grad():
        for path, layer in adalora_layers(trained).items():
            layer.lora_E[ADAPTER].normal_()
            layer.lora_E[ADAPTER][~masks[path]] = 0
    pairs = plain_pairs(trained, masks, plan.alpha_over_rank)
    write_adapter(tmp_path / "plain", LoraAdapter(lora_config("tiny"), pairs))
    assert allocated_plan(plan, masks).ranks == {path: pair.rank for path, pair in pairs.items()}
    again = load_adapter(GPT2LMHeadModel.from_pretrained(tmp_path / "base"), tmp_path / "plain")
    torch.testing.assert_close(logits(again), logits(trained), rtol=1e-4, atol=1e-6)


def test_peft_and_our_importance_agree_on_scores_budgets_and_kept_channels(base: Path) -> None:
    found = allocation(steps=9, init_warmup=1, final_warmup=2)
    model = adapted(base, found)
    allocator, ours = model.base_model.rankallocator, Importance()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    compared = 0
    for step in range(1, found.budget.end):
        ids = torch.randint(4, 300, (2, 8), generator=torch.Generator().manual_seed(step))
        with regularize(model, 0.5):
            model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        named = {name: one for name, one in model.base_model.model.named_parameters() if ".lora_" in name}
        ours = ours.updated(named, {name: one.grad for name, one in named.items()})
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
        budget, masks = allocator.budget_schedule(step)
        assert (budget, masks) == (found.budget.at(step), found.budget.masks_at(step))
        if masks:
            pattern = model.peft_config[ADAPTER].rank_pattern
            scores = torch.cat([triplets(ours, name) for name in pattern])
            theirs = torch.tensor([one for mask in pattern.values() for one in mask])
            torch.testing.assert_close(scores, torch.cat([triplets(peft_scores(allocator), n) for n in pattern]))
            assert torch.equal(kept(scores, budget), theirs)
            compared += 1
    assert compared == 3


def triplets(importance: Importance, name: str) -> torch.Tensor:
    """Scores (r,) of a site, whose Λ has this name."""
    scale, left, right = (importance.score(name.replace("lora_E", part)) for part in ("lora_E", "lora_A", "lora_B"))
    return triplet_scores(scale, left, right.T)


def peft_scores(allocator: Any) -> Importance:
    return Importance(sensitivity=allocator.exp_avg_ipt, uncertainty=allocator.exp_avg_unc)


def test_the_orthogonality_term_counts_once_a_step_and_never_in_validation(base: Path, tmp_path: Path) -> None:
    found = {}
    for name, batch, accumulated in (("whole", 4, 1), ("parts", 1, 4)):
        given = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "optim": "sgd"}
        trainer = trainer_of(
            base, tmp_path / name, allocation(steps=2, init_warmup=0, final_warmup=0), max_steps=2, **given
        )
        trainer.train()
        found[name] = weights(trainer)
    for name, value in found["whole"].items():
        torch.testing.assert_close(found["parts"][name], value, rtol=1e-4, atol=1e-6)
    losses = []
    for weight in (0.0, 5.0):
        trainer = trainer_of(base, tmp_path / str(weight), allocation(orthogonality=weight))
        losses.append((trainer.evaluate()["eval_loss"], trainer.train().training_loss))
    assert losses[0][0] == losses[1][0]
    assert losses[1][1] > losses[0][1] + 1


def test_a_skipped_step_and_a_missing_gradient_say_nothing_of_importance(base: Path, tmp_path: Path) -> None:
    found = allocation()
    model, keeper = adapted(base, found), RankAllocation(found, tmp_path)
    arguments, state = build_arguments(tmp_path, 1, SETTINGS), TrainerState(max_steps=12)
    keeper.on_train_begin(arguments, state, None, model=model)
    scores = model.base_model.rankallocator
    skipped, taken = (SimpleNamespace(step_was_skipped=flag) for flag in (True, False))
    with keeper.regularised(1.0):
        model(input_ids=IDS, labels=IDS).loss.backward()
    layer = adalora_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.lora_A[ADAPTER].grad.fill_(math.nan)
    keeper.on_optimizer_step(arguments, state, None, optimizer=skipped)
    assert not scores.exp_avg_ipt
    for part in (layer.lora_A, layer.lora_B, layer.lora_E):
        part[ADAPTER].grad = None
    state.global_step = 4
    with torch.no_grad():
        for other in adalora_layers(model).values():
            other.lora_E[ADAPTER].normal_()
    keeper.on_optimizer_step(arguments, state, None, optimizer=taken)
    assert all(bool(torch.isfinite(value).all()) for value in scores.exp_avg_ipt.values())
    assert sum(bool(value.any()) for value in scores.exp_avg_ipt.values()) == 3 * (SITES - 1)
    assert site_of("model.layers.0.self_attn.q_proj.lora_E.default") in keeper.kept
    state.global_step = 5  # the mask of this step: what nothing reached goes first
    keeper.on_optimizer_step(arguments, state, None, optimizer=taken)
    assert not keeper.kept["model.layers.0.self_attn.q_proj"].any()


class Kept(TrainerCallback):
    """How many channels are left after each optimizer step."""

    def __init__(self, keeper: RankAllocation) -> None:
        self.keeper, self.counts = keeper, dict[int, int]()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        self.counts[state.global_step] = sum(int(mask.sum()) for mask in self.keeper.kept.values())


def test_a_mask_is_set_after_the_step_that_the_schedule_names(base: Path, tmp_path: Path) -> None:
    trainer, budget = trainer_of(base, tmp_path), allocation().budget
    seen = Kept(trainer.allocator)
    trainer.add_callback(seen)
    trainer.train()
    last = {step: max([0, *filter(budget.masks_at, range(step + 1))]) for step in range(1, 13)}
    assert seen.counts == {step: budget.at(mask) for step, mask in last.items()}


def test_another_number_of_steps_than_planned_is_an_error(base: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="12 optimizer steps and the rank allocator planned for 24"):
        trainer_of(base, tmp_path, allocation(steps=24)).train()


SCRIPT = """
    import sys
    from pathlib import Path

    import torch
    from rows import weights
    from test_allocator_lora import trainer_of

    from rankwise.files.processes import finish, process_index

    base, folder = map(Path, sys.argv[1:])
    trainer = trainer_of(base, folder, per_device_train_batch_size=1)
    assert trainer.accelerator.distributed_type == "MULTI_CPU"
    trainer.train()
    torch.save(weights(trainer), folder / f"{process_index()[0]}.pt")
    finish()
"""


@pytest.mark.slow
def test_two_processes_allocate_as_one(base: Path, tmp_path: Path) -> None:
    script, folder = tmp_path / "run.py", tmp_path / "two"
    folder.mkdir()
    script.write_text(textwrap.dedent(SCRIPT))
    done = processes.run(script, base, folder, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"{index}.pt", weights_only=True) for index in (0, 1))
    assert equal(first, second)
    alone = trainer_of(base, tmp_path / "one")
    alone.train()
    assert table(folder) == table(tmp_path / "one")
    for name, value in weights(alone).items():
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-5)
