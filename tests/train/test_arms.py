"""`rankwise train --arms`: each adapter is what a run of its own would have been, and what cannot be is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from peft import PeftModel
from rows import logged
from safetensors.torch import load_file
from test_finetune import restaurants
from tiny import tiny_llama
from tiny_vision import drawn_image, tiny_smolvlm
from transformers import AutoModelForCausalLM

from rankwise import cli
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.files.adapter import read_adapter
from rankwise.files.plan import write_plan
from rankwise.models.adapt import quiet_peft
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.train.together import arm_batch, train

SHAPE = "--max_steps 20 --lora_dropout 0 --lr_scheduler_type cosine --warmup_ratio 0.2 --weight_decay 0.05"
SHAPE += " --max_grad_norm 0.3 --logging_steps 3 --dtype float32"
STEPS = "--eval_strategy steps --eval_steps 5".split()
OWN = {
    "plain": {"rank": 2},
    "wide": {"rank": 7, "learning_rate": 3e-3, "seed": 5},
    "scaled": {"rank": 4, "scale": 0.7, "lr": "2e-2", "seed": 6},
    "planned": {"plan": "plan.json", "learning_rate": 1e-2, "seed": 7},
    "replanned": {"plan": "plan.json", "scale": 3.0, "seed": 5},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, trainset.csv, val.csv, plan.json, arms.json and a finished run in run/."""
    folder = tmp_path_factory.mktemp("arms")
    tiny_llama(folder / "base")
    restaurants(folder)
    lines = (folder / "trainset.csv").read_text(encoding="utf-8").splitlines()
    (folder / "val.csv").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    sites = model_sites(load_model(str(folder / "base"), torch.float32)).values()
    rows = tuple(PlannedSite(site, index % 5) for index, site in enumerate(sites))
    write_plan(folder / "plan.json", RankPlan(rows, str(folder / "base")))
    save_arms(folder, OWN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(words("run", *STEPS)) == 0
    return folder


def save_arms(folder: Path, arms: Mapping[str, Mapping[str, Any]], name: str = "arms.json") -> None:
    (folder / name).write_text(json.dumps([{"name": own, **arm} for own, arm in arms.items()]))


def words(out: str | Path, *more: str, arms: str = "arms.json") -> list[str]:
    own = f"train --model_name base --task e2e_nlg --data_path trainset.csv --val_path val.csv --arms {arms} -o {out}"
    return [*own.split(), "--use_cpu", "--per_device_train_batch_size", "5", "--lr", "5e-3", *SHAPE.split(), *more]


@pytest.fixture
def here(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert cli.main(list(argv)) == 2
    return capsys.readouterr().err


def distance(first: Path, second: Path) -> float:
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", OWN)
def test_an_arm_is_what_its_own_config_trains_alone(name: str, here: Path, tmp_path: Path) -> None:
    """Its resolved_config.json, given to `rankwise train`: same factors, same log."""
    arm = here / "run" / name
    assert cli.main(["train", str(arm / "resolved_config.json"), "-o", str(tmp_path / "alone")]) == 0
    assert distance(arm, tmp_path / "alone") < 1e-5
    ours, theirs = logged(arm), logged(tmp_path / "alone")
    assert len(ours) == len(theirs) == 6 + 4
    for one, other in zip(ours, theirs, strict=True):
        assert [bool(value) for value in one.values()] == [bool(value) for value in other.values()]
        for column in ("step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"):
            if one[column]:
                assert float(one[column]) == pytest.approx(float(other[column]), rel=1e-4), column
    assert read_adapter(arm).config["r"] == read_adapter(tmp_path / "alone").config["r"]
    told = json.loads((arm / "results_summary.json").read_text())["train_loss"]
    assert told == pytest.approx(
        json.loads((tmp_path / "alone/results_summary.json").read_text())["train_loss"], rel=1e-5
    )
    theirs_too = {
        path.name for path in (tmp_path / "alone").iterdir() if path.is_file() and "gradient" not in path.name
    }
    assert theirs_too <= {path.name for path in arm.iterdir()}


def test_peft_loads_each_and_the_run_says_what_came_of_it(here: Path) -> None:
    content = json.loads((here / "run/arms.json").read_text())
    assert [row["name"] for row in content["arms"]] == list(OWN) and content["steps"] == 20
    prompt = {"input_ids": torch.arange(4, 12)[None]}
    for row in content["arms"]:
        base = AutoModelForCausalLM.from_pretrained(here / "base")
        before = base(**prompt).logits
        with quiet_peft():
            model = PeftModel.from_pretrained(base, here / "run" / row["name"])
        assert not torch.allclose(model(**prompt).logits, before, atol=1e-4)
        assert row["parameters"] == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
        assert row["left"] is None and row["steps"] == 20
        assert row["eval_loss"] == pytest.approx(float(logged(here / "run" / row["name"])[-1]["eval_loss"]))
        entry = json.loads((here / "run" / row["name"] / "manifest.json").read_text())["stages"]["train"]
        assert entry["trainable_parameters"] == row["parameters"] and entry["tokens"] == row["tokens"] > 0
    assert json.loads((here / "run/manifest.json").read_text())["stages"]["train"]["arms"] == len(OWN)


@pytest.mark.parametrize(
    "more",
    [
        "--num_train_epochs 2 --eval_strategy epoch --logging_strategy epoch --group_by_length",
        "--select loss --eval_strategy steps --eval_steps 5 --lr_scheduler_type cosine_with_min_lr "
        '--lr_scheduler_kwargs {"min_lr":1e-3} --data_seed 3',
        "--schedule mlp:7>attention:6>both --phase_state reset --dataloader_drop_last --per_device_eval_batch_size 1 "
        "--init_lora_weights gaussian",
    ],
    ids=["epochs", "best", "phases"],
)
def test_other_shapes_of_a_run(more: str, here: Path, tmp_path: Path) -> None:
    save_arms(tmp_path, {"a": {"rank": 3, "lr": 1e-2, "seed": 1}, "b": {"rank": 6, "seed": 2}}, "two.json")
    flags = more.split()
    assert cli.main(words(tmp_path / "run", *flags, arms=str(tmp_path / "two.json"))) == 0
    for name in ("a", "b"):
        arm = tmp_path / "run" / name
        assert cli.main(["train", str(arm / "resolved_config.json"), "-o", str(tmp_path / name)]) == 0
        assert distance(arm, tmp_path / name) < 1e-5
        for one, other in zip(logged(arm), logged(tmp_path / name), strict=True):
            for column in ("step", "epoch", "loss", "eval_loss", "learning_rate"):
                assert one[column] == other[column] or float(one[column]) == pytest.approx(
                    float(other[column]), rel=1e-4
                )
        phases = [folder / "phases.csv" for folder in (arm, tmp_path / name)]
        assert [file.is_file() and file.read_text() for file in phases] == [
            phases[0].is_file() and phases[0].read_text()
        ] * 2


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--lora_dropout 0.1", "--lora_dropout 0.1"),
        ("--gradient_accumulation_steps 2", "--gradient_accumulation_steps 2"),
        ("--packing", "--packing"),
        ("--report_to tensorboard", "--report_to tensorboard: each arm has its losses in its folder"),
        ("--schedule norm:4", "norm:4"),
        ("--allocator adalora", "--allocator adalora"),
        ("--use_dora", "--use_dora"),
        ("--loraplus_lr_ratio 4", "--loraplus_lr_ratio 4"),
        ("--lora_bias all", "--lora_bias all"),
        ("--init_lora_weights pissa", "--init_lora_weights pissa"),
        ("--max_steps -1", "give --max_steps N"),
        ("--lora language,vision", "language tower"),
        ("--language_lr 1e-3", "language tower"),
        ("--early_stopping 3", "--early_stopping 3"),
        ("--optim sgd", "--optim sgd"),
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1"),
        ("--gradient_checkpointing", "--activation_checkpointing"),
        ("--save_strategy epoch", "--save_strategy epoch"),
        ("--estimate", "--estimate"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau"),
        ("--resume_from_checkpoint run/checkpoint-4", "--resume_from_checkpoint run/checkpoint-4"),
    ],
)
@pytest.mark.usefixtures("here")
def test_options_that_arms_cannot_have(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, in a dry run as well, before anything is written."""
    assert said in refused(capsys, *words(tmp_path / "out", *flags.split(), "--dry-run"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ({"name": "a", "rank": 2}, "expected a list of arms"),
        ([], "expected a list of arms"),
        ([{"name": "a", "lerning_rate": 1e-3}], "arm 1 (a): unknown option 'lerning_rate'; did you mean learning_rate"),
        ([{"rank": 2}], "arm 1: name is missing"),
        ([{"name": "a"}, {"name": "A"}], "a is the name of several arms"),
        ([{"name": "../a"}], "cannot be the arm's folder"),
        ([{"name": "arms.json"}], "cannot be the arm's folder"),
        ([{"name": "checkpoint-8"}], "cannot be the arm's folder"),
        ([{"name": "a", "rank": 2, "plan": "plan.json"}], "rank and plan both"),
        ([{"name": "a", "rank": 0}], "rank is 0; give a number of at least 1"),
        ([{"name": "a", "scale": -1}], "scale is -1.0"),
        ([{"name": "a", "learning_rate": "fast"}], "expected a number"),
        ([{"name": "a", "learning_rate": 0}], "learning_rate is 0.0; give a number above 0"),
        ([{"name": "a", "learning_rate": "nan"}], "learning_rate is nan; give a number above 0"),
        ([{"name": "a", "learning_rate": "inf"}], "learning_rate is inf; give a number above 0"),
        ([{"name": "a", "seed": -1}], "seed is -1; give a number of at least 0 and below 4294967296"),
        ([{"name": "a", "seed": 2**32}], "seed is 4294967296; give a number"),
        ([{"name": "a/b"}], "cannot be the arm's folder"),
        (["a"], "expected a list of arms"),
        (
            [{"name": "b", "rank": 10}, {"name": "a", "rank": 11}],
            "arm a: rank 11 is above ⌊mn/(m+n)⌋ = 10 of model.layers.0",
        ),
        ([{"name": "a", "plan": "nowhere.json"}], "nowhere.json"),
    ],
)
@pytest.mark.usefixtures("here")
def test_a_file_that_cannot_be_trained(
    arms: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.json").write_text(json.dumps(arms))
    capsys.readouterr()
    code = cli.main(words(tmp_path / "out", "--dry-run", arms=str(tmp_path / "wrong.json")))
    assert code == (3 if "nowhere" in said else 2)
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_key_that_stands_twice_in_an_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("a.yaml", "- name: a\n- name: b\n  seed: 1\n  seed: 2\n"),
        ("a.json", '[{"name": "a"}, {"name": "b", "seed": 1, "seed": 2}]'),
    ):
        (tmp_path / name).write_text(content)
        said = refused(capsys, *words(tmp_path / "out", "--dry-run", arms=str(tmp_path / name)))
        assert "seed is set twice" in said


def test_a_base_that_drops_out_itself(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_llama(tmp_path / "base", attention_dropout=0.1)
    argv = words(tmp_path / "out", "--dry-run")
    argv[argv.index("base")] = str(tmp_path / "base")
    said = refused(capsys, *argv)
    assert "attn (0.1)" in said


def test_pictures(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_arms(tmp_path, {"a": {"rank": 2}})
    tiny_smolvlm(tmp_path / "eye")
    drawn_image().save(tmp_path / "a.png")
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "water"}]
    (tmp_path / "talks.json").write_text(json.dumps([{"id": "1", "image": "a.png", "conversations": said}]))
    argv = words(tmp_path / "out", "--dry-run", "--max_seq_length", "512", arms=str(tmp_path / "arms.json"))
    argv[argv.index("base")] = str(tmp_path / "eye")
    for name, value in (("--data_path", str(tmp_path / "talks.json")), ("--task", "conversations")):
        argv[argv.index(name) + 1] = value
    argv[argv.index("--val_path") : argv.index("--val_path") + 2] = ["--val_fraction", "0"]
    assert "rows that have images" in refused(capsys, *argv)


# --- kept, left, shared ----------------------------------------------------------------------------------------------


def test_finished_arms_are_kept_and_a_cut_batch_starts_anew(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "arms.yaml", tmp_path / "run"
    file.write_text("- {name: a, rank: 2}\n- {name: b, rank: 3, lr: 1e-3}\n")
    steps = ["--max_steps", "4"]

    done: list[int] = []

    def cut(*args: Any, after_step: Any, **rest: Any) -> Any:
        def stop(step: int) -> None:
            after_step(step)
            done.append(step)
            if len(done) == 6:
                raise KeyboardInterrupt

        return train.train_together(*args, after_step=stop, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(arm_batch, "train_together", cut)
        patch.setattr(train, "CPU_TOKENS", 1)  # each arm a batch of its own
        assert cli.main(words(out, *steps, arms=str(file))) == 130
    assert {path.name for path in out.iterdir()} == {"resolved_config.json", "a"}
    assert cli.main(words(out, *steps, "--resume_from_checkpoint", "true", arms=str(file))) == 0
    assert "kept: 1 of 2 arms" in capsys.readouterr().out
    before = {name: (out / name / "adapter_model.safetensors").stat().st_mtime_ns for name in "ab"}
    assert "2 finished arms (a …)" in refused(capsys, *words(out, *steps, arms=str(file)))
    file.write_text("- {name: a, rank: 2}\n- {name: b, rank: 3, lr: 1e-3}\n- {name: c, rank: 1}\n")
    (out / "b/adapter_model.safetensors").write_bytes(b"cut")
    assert cli.main(words(out, *steps, "--resume_from_checkpoint", "true", arms=str(file))) == 0
    said = capsys.readouterr().out
    assert "kept: 1 of 3 arms" in said and "the arm is trained anew" in said
    after = {name: (out / name / "adapter_model.safetensors").stat().st_mtime_ns for name in "abc"}
    assert after["a"] == before["a"] and after["b"] > before["b"]
    assert [row["name"] for row in json.loads((out / "arms.json").read_text())["arms"]] == ["a", "b", "c"]
    (out / "notes").mkdir()
    (out / "notes/mine.txt").touch()
    file.write_text("- {name: notes, rank: 2}\n")
    assert "notes is in the way" in refused(capsys, *words(out, *steps, "--overwrite", arms=str(file)))
    file.write_text("- {name: a, rank: 4}\n")
    said = refused(capsys, *words(out, *steps, "--resume_from_checkpoint", "true", arms=str(file)))
    assert "an arm of another run" in said and "ranks.model.layers.0.mlp.down_proj: 2 in the checkpoint, 4 now" in said
    for arm, more, why in (
        ("{name: a, rank: 2, lr: 1e-4}", [], "learning_rate: 0.005 in the checkpoint, 0.0001 now"),
        ("{name: a, rank: 2, seed: 1}", [], "seed: 42"),
        ("{name: a, rank: 2, scale: 1}", [], "scales: [2.0]"),
        ("{name: a, rank: 2}", ["--max_steps", "5"], "steps: 4 in the checkpoint, 5 now"),
        ("{name: a, rank: 2}", ["--select", "loss"], "best_of: None"),
        ("{name: a, rank: 2}", ["--max_samples", "20"], "samples:"),
    ):
        file.write_text(f"- {arm}\n")
        assert why in refused(capsys, *words(out, *steps, *more, "--resume_from_checkpoint", "true", arms=str(file)))
    file.write_text("- {name: a, rank: 4}\n")
    assert cli.main(words(out, *steps, "--overwrite", arms=str(file))) == 0
    assert read_adapter(out / "a").config["r"] == 4


def test_arms_that_diverge_leave_and_the_others_are_as_without_them(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama(tmp_path / "base", initializer_range=0.3)  # one that can be worse than it is
    good = {"a": {"rank": 2, "seed": 1}, "b": {"rank": 3, "seed": 2}}
    bad = {"wild": {"rank": 4, "lr": 0.5, "seed": 3}, "lost": {"rank": 2, "lr": 1e30, "seed": 4}}
    save_arms(tmp_path, good, "good.json")
    save_arms(tmp_path, {**bad, **good}, "both.json")

    def trained(name: str) -> int:
        argv = words(tmp_path / name, arms=str(tmp_path / f"{name}.json"))
        return cli.main([str(tmp_path / "base") if word == "base" else word for word in argv])

    assert trained("good") == trained("both") == 0
    for name in good:
        assert distance(tmp_path / "good" / name, tmp_path / "both" / name) < 1e-6
    rows = {row["name"]: row for row in json.loads((tmp_path / "both/arms.json").read_text())["arms"]}
    assert rows["a"]["left"] is None and rows["a"]["steps"] == 20
    assert "the base's there is" in rows["wild"]["left"] and "not finite" in rows["lost"]["left"]
    told = [row for row in logged(tmp_path / "both/wild") if row["loss"]]
    assert rows["wild"]["steps"] < 20 and len(told) == rows["wild"]["steps"] // 3
    assert not (tmp_path / "both/wild/adapter_model.safetensors").exists()
    assert "wild: left: mean loss" in capsys.readouterr().out
    save_arms(tmp_path, bad, "bad.json")
    assert trained("bad") == 4
    assert "all 2 arms diverged" in capsys.readouterr().err
    assert (tmp_path / "bad/arms.json").is_file() and not (tmp_path / "bad/manifest.json").exists()


@pytest.mark.slow
def test_processes_share_the_arms(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = processes.run("-m", "rankwise.cli", *words(out, *STEPS), count=2)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in OWN:
        assert distance(out / name, here / "run" / name) < 1e-6
    assert len(json.loads((out / "arms.json").read_text())["arms"]) == len(OWN)
