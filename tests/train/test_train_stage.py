"""`rankwise train` from flags to adapter: plans, starts, resuming after a signal, and refusals."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
from rows import logged
from safetensors.torch import load_file
from test_finetune import restaurants
from tiny import tiny_llama

from rankwise import cli
from rankwise.core.factors import truncate
from rankwise.core.plan import PlannedSite, RankPlan, load_plan
from rankwise.files.adapter import read_adapter
from rankwise.files.atomic import write_json
from rankwise.files.plan import write_plan
from rankwise.models.adapt import built_shapes, lora_layers
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.ranks.deltas import open_deltas
from rankwise.train.checkpoints import newest_complete

Train = Callable[..., int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return restaurants(tmp_path_factory.mktemp("data"))


def words(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    own = f"train --model_name {base} --task e2e_nlg --data_path {data} -o {out} --lr 1e-2 --logging_steps 1"
    return [*own.split(), *"--use_cpu --per_device_train_batch_size 4 --save_strategy no --no_plots".split(), *more]


@pytest.fixture
def train(base: Path, data: Path, tmp_path: Path) -> Train:
    """Run the command into tmp_path; returns the exit code."""
    return lambda *more: cli.main(words(base, data, tmp_path, *more))


def fresh(base: Path) -> torch.nn.Module:
    return load_model(str(base), torch.float32)


def plan_file(base: Path, folder: Path, *, tower: str | None = None, extra: str = "") -> Path:
    """A plan of ranks 1 to 4, of which the first site has 0."""
    sites = [replace(s, path=extra + s.path, tower=tower or s.tower) for s in model_sites(fresh(base)).values()]
    rows = tuple(PlannedSite(site, index % 5) for index, site in enumerate(sites))
    return write_plan(folder / "plan.json", RankPlan(rows, str(base)))


def test_a_run_leaves_everything_that_the_next_stage_needs(
    base: Path, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--num_train_epochs", "4", "--lora_r", "4") == 0
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert f"next: rankwise evaluate {tmp_path}" in printed
    losses = [float(row["loss"]) for row in logged(tmp_path) if row["loss"]]
    assert losses[-1] < losses[0]
    assert sum(bool(row["eval_loss"]) for row in logged(tmp_path)) == 4, "one validation an epoch"
    adapted = load_adapter(fresh(base), tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["train"]
    assert entry["trainable_parameters"] == sum(
        pair.rank * sum(pair.shape) for pair in read_adapter(tmp_path).pairs.values()
    )
    assert entry["total_parameters"] == sum(value.numel() for value in fresh(base).parameters())
    assert len(json.loads((tmp_path / "sites.json").read_text())["sites"]) == len(built_shapes(adapted)) == 14
    split = json.loads((tmp_path / "split.json").read_text())
    assert len(split["val"]) == 2
    assert not set(split["train"]) & set(split["val"])
    config = json.loads((tmp_path / "resolved_config.json").read_text())
    assert config["lora_r"] == 4
    again = cli.resolve("train", [str(tmp_path / "resolved_config.json")])[0]
    assert again.lora.lora_r == 4, "the saved config is a config file"
    assert not list(tmp_path.glob(".adapter-*"))


@pytest.mark.parametrize(
    ("flags", "trained", "validated"),
    [
        ("--max_samples 10 --val_fraction 0.2", 8, 2),
        ("--max_samples 10 --val_fraction 0.2 --max_val_samples 1", 8, 1),
        ("--max_val_samples 3 --max_samples 5 --val_path", 5, 3),
        ("--max_samples 10 --val_fraction 0", 10, 0),
    ],
)
def test_a_number_of_rows_bounds_validation_too(
    base: Path, data: Path, tmp_path: Path, flags: str, trained: int, validated: int
) -> None:
    """Rows that validate are some of those drawn, or bounded by a number of their own."""
    (tmp_path / "own").mkdir()
    restaurants(tmp_path / "own")
    held_out = [str(data)] if flags.endswith("--val_path") else []
    argv = words(base, tmp_path / "own", tmp_path / "out", "--max_steps", "1", *flags.split(), *held_out)
    assert cli.main(argv) == 0
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (trained, validated)


def test_a_limit_that_cutting_cannot_meet_does_not_advise_cutting(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--max_seq_length", "12") == 3
    assert "or pass --overlong drop or --overlong truncate_source" in capsys.readouterr().err
    assert train("--max_seq_length", "12", "--overlong", "truncate_source") == 3
    said = capsys.readouterr().err
    assert "longer than 12 tokens without their sources" in said and said.strip().endswith("or pass --overlong drop")


def test_the_seed_decides_the_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    found = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert cli.main(words(base, data, tmp_path / name, "--max_steps", "2", "--seed", seed)) == 0
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    key = next(iter(found[0]))
    assert torch.equal(found[0][key], found[1][key])
    assert not torch.equal(found[0][key], found[2][key])


def test_a_plan_decides_ranks_and_names_its_model(data: Path, base: Path, tmp_path: Path) -> None:
    plan = plan_file(base, tmp_path)
    line = f"train --lora-config {plan} --task e2e_nlg --data_path {data} -o {tmp_path / 'out'} --max_steps 2"
    assert cli.main(line.split()) == 0
    expected = {path: 0 if not i % 5 else i % 5 for i, path in enumerate(model_sites(fresh(base)))}
    ranks = {path: pair.rank for path, pair in read_adapter(tmp_path / "out").pairs.items()}
    assert ranks == {path: rank for path, rank in expected.items() if rank}
    assert read_adapter(tmp_path / "out").base_model == str(base)


def test_a_target_narrows_a_plan_and_says_what_it_leaves_out(
    train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(base, tmp_path)
    assert train("--lora_config", str(plan), "--target", "mlp_only", "--max_steps", "1", "--lr", "1e-3") == 0
    assert all(".mlp." in path for path in read_adapter(tmp_path).pairs)
    assert "left out" in capsys.readouterr().out
    assert json.loads((tmp_path / "sites.json").read_text())["left_out"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--lora_alpha", "32"], "the plan owns the scale"),
        (["--use_rslora"], "the plan owns the scale"),
        (["--load_in_8bit", "--load_in_4bit"], "exclude"),
        (["--warm_start", "delta"], "--deltas"),
        (["--init_lora_weights", "loftq"], "load_in_4bit"),
    ],
)
def test_combinations_that_cannot_work(
    train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], reason: str
) -> None:
    assert train("--lora_config", str(plan_file(base, tmp_path)), *flags) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "alpha"), [("24", None), ("9", None), ("24", "30")])
def test_rslora_has_one_alpha_and_scales_by_the_root(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: str, alpha: str | None
) -> None:
    """k_proj and v_proj, 16 × 32, are cut to rank 16: their scale is larger, their alpha is not."""
    more = ["--max_steps", "2", "--lora_r", rank, "--lora_dropout", "0", *(["--lora_alpha", alpha] if alpha else [])]
    assert cli.main(words(base, data, tmp_path / "rs", *more, "--use_rslora")) == 0
    printed = capsys.readouterr().out
    wanted = float(alpha or 2 * int(rank))
    config = json.loads((tmp_path / "rs" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["alpha_pattern"], config["use_rslora"]) == (wanted, {}, True)
    for layer in lora_layers(load_adapter(fresh(base), tmp_path / "rs")).values():
        assert layer.scaling["default"] == pytest.approx(wanted / layer.r["default"] ** 0.5)
    assert f"rsLoRA: alpha {wanted:g} at every site, scale alpha/√r = {wanted / int(rank) ** 0.5:.3g}" in printed
    assert "lower --learning_rate" in printed
    assert cli.main(words(base, data, tmp_path / "plain", *more)) == 0
    assert "rsLoRA" not in capsys.readouterr().out
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("rs", "plain"))
    assert any(not torch.equal(one[key], other[key]) for key in one), "the option had no effect"


def test_a_plan_of_rslora_without_a_ratio_has_twice_its_largest_rank_as_alpha(base: Path, tmp_path: Path) -> None:
    content = json.loads(plan_file(base, tmp_path).read_text())
    bare = {"rank_pattern": content["rank_pattern"], "use_rslora": True}
    plan = load_plan(bare, model_sites(fresh(base)), "plan.json")
    assert plan.alpha(1) == plan.alpha(4) == 8
    assert {plan.scale(rank) for rank in (1, 4)} == {8.0, 4.0}


def test_a_dry_run_does_not_name_an_alpha_that_cut_ranks_would_change(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = words(base, data, tmp_path / "rs", "--lora_r", "64", "--use_rslora", "--dry-run")
    assert cli.main(command) == 0
    assert "rsLoRA with alpha twice the largest rank that fits (at most 128)" in capsys.readouterr().out
    assert cli.main([*command, "--lora_alpha", "30"]) == 0
    assert "rsLoRA with alpha 30\n" in capsys.readouterr().out


def test_training_with_a_doubtful_plan_says_so(
    train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = plan_file(base, tmp_path)
    content = json.loads(file.read_text())
    content["analysis_metadata"] = {"doubt": "more noise than signal: THESE RANKS ARE IN DOUBT (--allow_noise)"}
    file.write_text(json.dumps(content))
    assert train("--lora_config", str(file), "--max_steps", "1") == 0
    assert f"warning: {file}: more noise than signal: THESE RANKS ARE IN DOUBT" in capsys.readouterr().out


def test_plans_that_do_not_fit(train: Train, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--lora_config", str(plan_file(base, tmp_path, extra="other."))) == 3
    assert "nearest: model.layers" in capsys.readouterr().err
    assert train("--lora_config", str(plan_file(base, tmp_path, tower="unknown"))) == 2
    assert "without a config.json" in capsys.readouterr().err
    assert train("--target_modules", "q_prj") == 2
    assert "q_proj" in capsys.readouterr().err
    write_json(tmp_path / "small.json", {"layer_ranks": {"q_proj": 2}})
    assert train("--lora_config", str(tmp_path / "small.json"), "--max_steps", "1") == 0
    assert len(read_adapter(tmp_path).pairs) == 2


def test_missing_data_is_named(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--data_path", str(tmp_path / "gone.csv")) == 3
    assert "gone.csv" in capsys.readouterr().err


def test_a_warm_start_begins_at_the_probes_delta(base: Path, data: Path, tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    line = f"finetune --model_name {base} --task e2e_nlg --data_path {data} -o {probe} --subset_ratio 1 --lr 1e-3"
    assert cli.main(line.split()) == 0
    more = ("--warm_start", "delta", "--deltas", str(probe), "--lora_r", "6", "--lr", "0", "--max_steps", "1")
    assert cli.main(words(base, data, tmp_path / "out", *more)) == 0
    deltas = open_deltas(probe)
    for path, pair in read_adapter(tmp_path / "out").pairs.items():
        expected = truncate(deltas.read(deltas.sites[path]).matrix, 6).product()
        torch.testing.assert_close(pair.factors().product(), expected, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("init", ["pissa", "eva"])
def test_other_starts_end_in_a_plain_adapter(train: Train, base: Path, tmp_path: Path, init: str) -> None:
    assert train("--init_lora_weights", init, "--max_steps", "2", "--lora_r", "4") == 0
    assert read_adapter(tmp_path).config["init_lora_weights"] is True
    load_adapter(fresh(base), tmp_path)


def test_dora_and_gradient_checkpointing_and_lora_plus_run(train: Train, base: Path, tmp_path: Path) -> None:
    flags = ("--use_dora", "--gradient-checkpointing", "--loraplus_lr_ratio", "8", "--max_steps", "2", "--use_rslora")
    assert train(*flags) == 0
    assert load_adapter(fresh(base), tmp_path).peft_config["default"].use_dora


def test_gradient_checkpointing_changes_no_weight(base: Path, data: Path, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("checkpointed", ("--gradient-checkpointing",))):
        assert cli.main(words(base, data, tmp_path / name, "--max_steps", "3", *more)) == 0
    plain, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "checkpointed"))
    for key, value in plain.items():
        torch.testing.assert_close(value, other[key])


def test_resuming_another_run_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saving = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2")
    assert train(*saving) == 0
    assert train(*saving) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert train(*saving, "--resume_from_checkpoint", "true", "--lora_r", "8", "--val_fraction", "0.3") == 2
    error = capsys.readouterr().err
    assert "ranks.model.layers.0.self_attn.q_proj: 16 in the checkpoint, 8 now" in error
    assert "validation" in error
    assert json.loads((tmp_path / "resolved_config.json").read_text())["lora_r"] == 16, "the refused run left no trace"
    assert train(*saving[:-1], "4", "--resume_from_checkpoint", "true") == 0
    assert train(*saving, "--overwrite_output_dir") == 0
    assert newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_a_dry_run_looks_at_the_disk_and_leaves_it_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, rows = tmp_path / "plan.json", tmp_path / "rows.json"
    line = f"train --lora-config {plan} --task cota --data-path {rows} -o {tmp_path / 'out'} --load-in-8bit --fp16"
    for missing, content in ((plan, '{"model_name": "org/model"}'), (rows, "[]")):
        assert cli.main([*line.split(), "--dry-run"]) == 3
        assert f"{missing}: no such file or folder" in capsys.readouterr().err
        missing.write_text(content)
    assert cli.main([*line.split(), "--dry-run"]) == 0
    assert "would adapt the model that the plan names" in capsys.readouterr().out
    assert sorted(tmp_path.iterdir()) == [plan, rows]


@pytest.mark.slow
def test_a_run_stopped_from_outside_goes_on_to_the_same_adapter(base: Path, data: Path, tmp_path: Path) -> None:
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    more = (
        "--num_train_epochs",
        "12",
        "--lora_dropout",
        "0.1",
        "--gradient_accumulation_steps",
        "2",
        "--eval_strategy",
        "no",
    )
    command, said = ["-m", "rankwise.cli", *words(base, data, stopped, *more)], tmp_path / "said.txt"
    process = processes.start(command, said, said, dict(os.environ))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        if (stopped / "training_log.csv").is_file() and len(logged(stopped)) >= 3:
            process.terminate()
            break
        time.sleep(0.02)
    process.join(60)
    assert process.exitcode == 143, said.read_text()
    assert newest_complete(stopped)
    assert not (stopped / "adapter_model.safetensors").exists()
    assert cli.main(words(base, data, stopped, *more, "--resume_from_checkpoint", "true")) == 0
    assert cli.main(words(base, data, straight, *more)) == 0
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (stopped, straight))
    assert all(torch.equal(first[key], second[key]) for key in second)


@pytest.mark.slow
def test_real_model_and_real_text(shared_data: Path, tmp_path: Path) -> None:
    base = shared_data / "tiny_weights" / "stories260K" / "hf_converted"
    rows = shared_data / "e2e_nlg" / "devset.csv"
    line = f"train --model_name {base} --task e2e_nlg --data_path {rows} -o {tmp_path} --lora_r 8"
    more = "--max_samples 40 --max_steps 10 --lr 1e-2 --batch_size 8 --overlong drop --val_fraction 0.1 --eval_on_start"
    assert cli.main([*line.split(), *more.split()]) == 0
    losses = [float(row["eval_loss"]) for row in logged(tmp_path) if row["eval_loss"]]
    assert losses[-1] < 0.8 * losses[0]
    load_adapter(fresh(base), tmp_path)
