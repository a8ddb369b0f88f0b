"""The table of gradient norms says what autograd says, loses nothing, and is the same however training is run."""

from __future__ import annotations

import csv
import json
import math
import shutil
import textwrap
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rows import Rows, logged, make_trainer, resumed, weights
from tiny import tiny_llama
from torch import nn
from transformers import TrainerCallback, set_seed

from rankwise.data.dataset import Collator
from rankwise.errors import DataError, DivergedError, UsageError
from rankwise.models.adapt import adapt, lora_layers, lora_pairs, quiet_peft
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection
from rankwise.train.arguments import build_arguments
from rankwise.train.gradient_table import (
    GRADIENT_SUMMARY,
    GROUPS,
    LAYERS,
    NORMS,
    SiteNorm,
    kept,
    stored,
    summary,
    views,
)
from rankwise.train.gradients import (
    ABSENT,
    GradientNorms,
    Pair,
    TrainedModel,
    TrainedModule,
    TrainedParameter,
    measure_gradient_norms,
    one_by_one,
    parameter_norms,
    site_norms,
    stacked,
    trained_model,
)
from rankwise.train.trainer import RankwiseTrainer

FILES = (NORMS, GROUPS, LAYERS)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def load_gradient_norms(path: Path) -> list[SiteNorm]:
    return list(stored(path / NORMS if path.is_dir() else path))


class Copies(TrainerCallback):
    """Keeps the gradients of each step as they are just before the optimizer takes it: after clipping."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.steps.append({name: value.grad.clone() for name, value in trained(model) if value.grad is not None})


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def written(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def text_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def train(base: Path, folder: Path, every: int = 1, **given: Any) -> RankwiseTrainer:
    trainer = make_trainer(base, folder, gradients=GradientNorms(folder, every), **given)
    trainer.train()
    return trainer


def filled(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in row.items() if value not in (None, "")}


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an uninterrupted run of 12 steps with a checkpoint every 4."""
    folder = tmp_path_factory.mktemp("straight")
    train(base, folder, save_strategy="steps", save_steps=4)
    return folder


def test_the_long_table_is_thinned_and_the_others_are_not(tmp_path: Path) -> None:
    """1,000 steps with 35 sites: 4 MB before, 1.3 MB now, and the statistics are those of all steps."""
    places = [TrainedModule(f"model.layers.{n // 7}.mlp.up_proj_{n % 7}", "language", "mlp", n // 7) for n in range(35)]
    weights = [nn.Parameter(torch.zeros(2, 3)) for _ in range(70)]
    parameters = [TrainedParameter(n // 2, "ab"[n % 2], weight) for n, weight in enumerate(weights)]
    pairs = [Pair(n, weights[2 * n], weights[2 * n + 1], 1.0) for n in range(35)]
    sizes = {}
    for every in (None, 1):
        folder = tmp_path / str(every)
        folder.mkdir()
        table = GradientNorms(folder, every)
        table.model = TrainedModel(tuple(places), tuple(parameters), tuple(pairs))
        for step in range(1, 1001):
            table.record(step, [0.01234567 / step] * 105, 1.0, None)
        sizes[every] = (folder / NORMS).stat().st_size
        (folder / "summary.json").write_text(json.dumps(summary(table.groups.read())))
    assert sizes[1] > 20e6 / 6
    assert sizes[None] < sizes[1] / 3
    assert written(tmp_path / "None" / GROUPS) == written(tmp_path / "1" / GROUPS)
    assert (tmp_path / "None" / "summary.json").read_text() == (tmp_path / "1" / "summary.json").read_text()


def test_what_is_kept_of_many_steps() -> None:
    steps = [step for step in range(1, 100_001) if kept(step)]
    assert steps[:100] == list(range(1, 101))
    assert (len(steps), sum(step <= 1000 for step in steps)) == (790, 330)
    assert all(late <= 1.0101 * early + 1 for early, late in pairwise(steps[100:]))
    for cycle in (2, 3, 4, 10):
        counts = Counter(step % cycle for step in steps if step > 1000)
        assert max(counts.values()) < 1.5 * min(counts.values()), "phases that take turns are all met"


def test_the_table_holds_the_norms_of_the_accumulated_gradient_before_clipping(base: Path, tmp_path: Path) -> None:
    copies, limit = Copies(), 1e-3
    train(base, tmp_path, max_steps=3, callbacks=[copies], max_grad_norm=limit)
    groups = written(tmp_path / GROUPS)
    unclipped = Copies()
    make_trainer(base, tmp_path / "plain", max_steps=1, callbacks=[unclipped], max_grad_norm=0).train()
    everything = torch.cat([gradient.flatten() for gradient in unclipped.steps[0].values()]).norm()
    assert float(groups[0]["total_norm"]) == pytest.approx(float(everything), rel=1e-6)
    reported = [row["grad_norm"] for row in logged(tmp_path) if row["loss"]]
    assert [float(row["total_norm"]) for row in groups] == pytest.approx([float(norm) for norm in reported], rel=1e-6)
    for row, gradients in zip(groups, copies.steps, strict=True):
        clipped = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert float(row["clipped_total_norm"]) == pytest.approx(float(clipped), rel=1e-3) == limit
        assert float(row["total_norm"]) > limit


def test_by_site_group_and_layer_it_is_what_autograd_computed(base: Path, tmp_path: Path) -> None:
    copies = Copies()
    train(base, tmp_path, max_steps=2, callbacks=[copies], max_grad_norm=0)
    rows = {(row.step, row.site): row for row in load_gradient_norms(tmp_path)}
    groups, layers = written(tmp_path / GROUPS), written(tmp_path / LAYERS)
    assert len(rows) == 2 * 14
    for step, gradients in enumerate(copies.steps, start=1):
        squares: dict[str, float] = {"attention": 0.0, "mlp": 0.0}
        for site in model_sites(load_model(str(base), torch.float32)).values():
            own = {part: gradients[f"base_model.model.{site.path}.lora_{part}.default.weight"] for part in "AB"}
            norm = math.hypot(own["A"].norm(), own["B"].norm())
            row = rows[step, site.path]
            assert (row.norm, row.norm_a, row.norm_b) == pytest.approx(
                (norm, float(own["A"].norm()), float(own["B"].norm())), rel=1e-6
            )
            count = own["A"].numel() + own["B"].numel()
            assert row.norm_per_sqrt_parameter == pytest.approx(norm / math.sqrt(count), rel=1e-6)
            assert (row.kind, row.layer, row.tower) == (site.kind, site.layer, "language")
            squares[site.kind] += norm**2
            name = f"layer_{site.layer}_{site.kind}"
            squares[name] = squares.get(name, 0.0) + norm**2
        found = {**groups[step - 1], **layers[step - 1]}
        for name, square in squares.items():
            column = name if name.startswith("layer") else f"{name}_norm"
            assert float(found[column]) == pytest.approx(math.sqrt(square), rel=1e-6), name
        assert groups[step - 1]["embed_norm"] == groups[step - 1]["lm_head_norm"] == "", "blank, not 0"


def test_the_documented_tables_are_views_of_the_long_one(straight: Path) -> None:
    again = views(load_gradient_norms(straight), max_grad_norm=1.0)
    assert [filled(row) for row in again.groups] == [filled(row) for row in written(straight / GROUPS)]
    assert [filled(row) for row in again.layers] == [filled(row) for row in written(straight / LAYERS)]
    header = (straight / LAYERS).read_text().splitlines()[0]
    assert header == "step,layer_0_attention,layer_0_mlp,layer_1_attention,layer_1_mlp"


def test_the_summary_says_when_the_peak_was(straight: Path) -> None:
    summary = json.loads((straight / GRADIENT_SUMMARY).read_text())
    norms = [float(row["mlp_norm"]) for row in written(straight / GROUPS)]
    assert list(summary) == ["attention", "mlp", "total"]
    assert summary["mlp"]["peak_step"] == 1 + norms.index(max(norms))
    assert summary["mlp"]["max"] == max(norms) and summary["mlp"]["min"] == min(norms)
    values = torch.tensor(norms, dtype=torch.float64)
    assert summary["mlp"]["mean"] == pytest.approx(float(values.mean()))
    assert summary["mlp"]["std"] == pytest.approx(float(values.std(correction=0)))


def test_at_the_start_only_b_has_a_gradient(straight: Path) -> None:
    rows = load_gradient_norms(straight)
    first = [row for row in rows if row.step == 1]
    assert all(row.norm_a == 0.0 and row.norm_b > 0 and row.delta_norm == 0.0 for row in first)
    assert all(row.norm_a > 0 and row.delta_norm > 0 for row in rows if row.step > 1)


def test_measuring_changes_no_weight(base: Path, tmp_path: Path) -> None:
    watched = train(base, tmp_path / "watched", max_steps=3)
    plain = make_trainer(base, tmp_path / "plain", max_steps=3)
    plain.train()
    assert all(torch.equal(value, weights(plain)[name]) for name, value in weights(watched).items())


def test_every_nth_step(base: Path, tmp_path: Path, straight: Path) -> None:
    train(base, tmp_path, every=4)
    rows = written(tmp_path / GROUPS)
    assert rows == [row for row in written(straight / GROUPS) if int(row["step"]) % 4 == 0]
    with pytest.raises(UsageError, match="log_frequency"):
        GradientNorms(tmp_path, 0)


def test_resuming_continues_the_tables_to_the_byte(base: Path, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    shutil.rmtree(folder / "checkpoint-12")
    (folder / NORMS).write_bytes((folder / NORMS).read_bytes() + b"1")  # what a power cut leaves of row 13
    trainer = make_trainer(base, folder, save_strategy="steps", save_steps=4, gradients=GradientNorms(folder))
    resumed(trainer)
    assert text_of(folder) == text_of(straight)
    assert (folder / GRADIENT_SUMMARY).read_text() == (straight / GRADIENT_SUMMARY).read_text()


class Stop(TrainerCallback):
    """Fails in the middle of a step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 5:
            raise RuntimeError("the machine went away")


def test_a_crash_loses_nothing_that_was_measured(base: Path, straight: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="went away"):
        train(base, tmp_path, callbacks=[Stop()])
    for name in FILES:
        expected = [row for row in written(straight / name) if int(row["step"]) <= 5]
        assert written(tmp_path / name) == expected and expected


class Freeze(TrainerCallback):
    """Attention is frozen in the second step, and everything of layer 0 from the third on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        for path, layer in lora_layers(model).items():
            frozen = "attn" in path if state.global_step == 1 else state.global_step > 1 and ".0." in path
            for part in (layer.lora_A, layer.lora_B):
                part.default.weight.requires_grad_(not frozen)


def test_what_does_not_train_is_blank_and_rows_stay_aligned(base: Path, tmp_path: Path) -> None:
    gradients = GradientNorms(tmp_path, phase_at=lambda step: ("all", "mlp", "late")[min(step, 3) - 1])
    make_trainer(base, tmp_path, gradients=gradients, callbacks=[Freeze()], max_steps=4).train()
    groups, layers = written(tmp_path / GROUPS), written(tmp_path / LAYERS)
    assert [row["step"] for row in groups] == [row["step"] for row in layers] == ["1", "2", "3", "4"]
    assert [row["phase"] for row in groups] == ["all", "mlp", "late", "late"]
    assert [bool(row["attention_norm"]) for row in groups] == [True, False, True, True]
    assert [bool(row["layer_0_attention"]) for row in layers] == [True, False, False, False]
    assert [bool(row["layer_0_mlp"]) for row in layers] == [True, True, False, False]
    assert all(float(row["layer_1_mlp"]) > 0 for row in layers)
    assert "0" not in {value for row in [*groups, *layers] for value in row.values()}
    sites = [row.site for row in load_gradient_norms(tmp_path) if row.step == 3]
    assert len(sites) == 7 and all(".1." in site for site in sites), "no row for what does not train"


def with_gradients(base: Path, rank: int = 4, **settings: Any) -> Any:
    """An adapted model after one backward, with B no longer 0."""
    set_seed(1)
    model = load_model(str(base), torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model)), rank, None, False, "tiny")
    model = adapt(model, plan, LoraSection(lora_dropout=0.0, **settings))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B.default.weight, std=0.1)
    backward(model)
    return model


def backward(model: Any, scale: float = 1.0) -> None:
    model.zero_grad()
    batch = Collator(0)([Rows()[0], Rows()[1]])
    batch.pop("sample_index")
    (scale * model(**batch).loss).backward()


def measured(model: Any, loss_scale: float = 1.0) -> dict[str, SiteNorm]:
    table = GradientNorms(Path("nowhere"))
    table.model = trained_model(model)
    rows = site_norms(table.model, table.values(1).tolist(), loss_scale, step=1, phase="")
    return {row.site: row for row in rows}


def test_norms_of_a_and_b_depend_on_the_scaling_of_the_factors_and_the_delta_does_not(base: Path) -> None:
    model = with_gradients(base)
    before = measured(model)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_A.default.weight.mul_(4)
            layer.lora_B.default.weight.div_(4)
    backward(model)
    for site, row in measured(model).items():
        assert row.delta_norm == pytest.approx(before[site].delta_norm, rel=1e-5)
        assert row.norm_a == pytest.approx(before[site].norm_a / 4, rel=1e-3)
        assert row.norm_b == pytest.approx(before[site].norm_b * 4, rel=1e-3)


def test_the_delta_norm_is_that_of_the_whole_delta(base: Path) -> None:
    model = with_gradients(base)
    rows = measured(model)
    for path, pair in lora_pairs(model).items():
        assert rows[path].delta_norm == pytest.approx(pair.scale * float((pair.lora_B @ pair.lora_A).norm()), rel=1e-5)


def test_stacked_or_one_by_one_it_is_the_same(base: Path) -> None:
    factors = [(torch.randn(4, 30), torch.randn(20, 4)) for _ in range(5)]
    for form in (stacked, one_by_one):
        found = [float(square) for square in form(factors)]
        assert found == pytest.approx([float((b @ a).square().sum()) for a, b in factors], rel=1e-5)


def test_scaled_gradients_are_reported_unscaled(base: Path) -> None:
    model = with_gradients(base)
    plain, scaler = measured(model), torch.amp.GradScaler("cpu", init_scale=2.0**12)
    model.zero_grad()
    backward(model, scaler.scale(torch.ones(())).item())
    scaled = measured(model, scaler.get_scale())
    for site, row in scaled.items():
        assert row.norm == pytest.approx(plain[site].norm, rel=1e-5)
        assert row.delta_norm == plain[site].delta_norm, "weights are not scaled"


def test_a_step_that_the_scaler_skips_keeps_its_row_with_blank_norms(base: Path, tmp_path: Path) -> None:
    model = with_gradients(base)
    first = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    table = GradientNorms(tmp_path)
    table.model = trained_model(model)
    for step, value in ((1, 1.0), (2, math.inf), (3, math.nan)):
        first.lora_A.default.weight.grad.fill_(value)
        table.record(step, table.values(1).tolist(), 2.0, 1.0)
    groups = views(load_rows(tmp_path)).groups
    assert groups[0]["total_norm"] > 0
    assert [set(row) for row in groups[1:]] == [{"step", "phase"}] * 2
    assert len({row.step for row in load_rows(tmp_path)}) == 3


def load_rows(folder: Path) -> list[SiteNorm]:
    """Rows of a table that was written without a header."""
    path = folder / NORMS
    header = ",".join(SiteNorm.__dataclass_fields__)
    if not path.read_text().startswith("step"):
        path.write_text(header + "\n" + path.read_text())
    return load_gradient_norms(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_do_not_overflow(dtype: torch.dtype) -> None:
    parameter, frozen = nn.Parameter(torch.zeros(64, 64, dtype=dtype)), nn.Parameter(torch.zeros(2))
    parameter.grad = torch.full_like(parameter, 30000.0)
    norms = parameter_norms([parameter, frozen])
    assert norms.dtype == torch.float32
    assert norms[0] == pytest.approx(64 * float(torch.tensor(30000.0, dtype=dtype)), rel=1e-5)
    assert norms[1] == ABSENT


def test_under_autocast_it_is_still_what_autograd_computed(base: Path, tmp_path: Path) -> None:
    copies = Copies()
    train(base, tmp_path, max_steps=2, bf16=True, callbacks=[copies], max_grad_norm=0)
    for row, gradients in zip(written(tmp_path / GROUPS), copies.steps, strict=True):
        everything = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        assert float(row["total_norm"]) == pytest.approx(float(everything), rel=1e-5)


def test_a_full_fine_tune_fills_every_group(base: Path, tmp_path: Path) -> None:
    arguments = build_arguments(tmp_path, 1, {"use_cpu": True, "max_steps": 2, "save_strategy": "no"})
    model = load_model(str(base), torch.float32)
    table = GradientNorms(tmp_path)
    copies = Copies()
    RankwiseTrainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        eval_dataset=Rows(4),
        data_collator=Collator(0),
        gradients=table,
        callbacks=[copies],
    ).train()
    rows = load_gradient_norms(tmp_path)
    assert {row.site for row in rows} == {name.rpartition(".")[0] for name, _ in trained(model)}
    assert all(row.norm_a is row.norm_b is row.delta_norm is None for row in rows)
    group = written(tmp_path / GROUPS)[0]
    parts = [float(group[name]) for name in ("embed_norm", "attention_norm", "mlp_norm", "lm_head_norm")]
    norms = math.sqrt(sum(row.norm**2 for row in rows if row.kind == "other" and row.step == 1))
    assert all(parts) and norms > 0
    assert float(group["total_norm"]) == pytest.approx(math.hypot(*parts, norms), rel=1e-6)


def test_places_are_named_as_in_the_base_model_whatever_wraps_them(base: Path) -> None:
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head", "mlp"],
        use_dora=True,
        task_type="CAUSAL_LM",
    )
    with quiet_peft():
        model = get_peft_model(load_model(str(base), torch.float32), config, adapter_name="mine")
    found = trained_model(model)
    expected = {"model.embed_tokens": "embed", "lm_head": "head"}
    for layer in (0, 1):
        expected |= {f"model.layers.{layer}.self_attn.q_proj": "attention"}
        expected |= {f"model.layers.{layer}.mlp.{name}_proj": "mlp" for name in ("gate", "up", "down")}
    assert {place.path: place.kind for place in found.places} == expected
    assert len(found.parameters) == 3 * 3 + 1 + 6, "A, B, magnitude of three sites; the head; the MLPs"
    assert len(found.pairs) == 3


def test_measuring_after_any_backward(base: Path) -> None:
    model = with_gradients(base)
    found = measure_gradient_norms(model)
    rows = measured(model)
    assert found["embed_norm"] is None and found["lm_head_norm"] is None
    assert found["total_norm"] == pytest.approx(math.hypot(found["attention_norm"], found["mlp_norm"]), rel=1e-6)
    assert list(found["layer_data"]) == [0, 1]
    late = math.sqrt(sum(row.norm**2 for row in rows.values() if row.layer == 1 and row.kind == "mlp"))
    assert found["layer_data"][1]["mlp"] == pytest.approx(late, rel=1e-6)
    assert found["total_norm"] == pytest.approx(2 * measure_gradient_norms(model, loss_scale=2.0)["total_norm"])
    model.zero_grad()
    assert measure_gradient_norms(model)["total_norm"] is None


def test_a_diverging_step_is_not_in_the_table(base: Path, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if state.global_step == 2:
                trained(model)[0][1].register_hook(lambda gradient: gradient * math.inf)

    with pytest.raises(DivergedError):
        train(base, tmp_path, callbacks=[Poison()])
    assert [row["step"] for row in written(tmp_path / GROUPS)] == ["1", "2"]


def test_a_broken_table_is_named_with_its_line(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_gradient_norms(tmp_path)
    lines = (straight / NORMS).read_text().splitlines()
    lines[2] = lines[2].replace("attention,0,", "attention,none,")
    (tmp_path / NORMS).write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"{NORMS}, line 3"):
        load_gradient_norms(tmp_path)
    (tmp_path / NORMS).write_text("step,site\n1,q\n")
    with pytest.raises(DataError, match=r"no column .*norm_a"):
        load_gradient_norms(tmp_path)


def test_towers_beside_the_language_model_have_layers_of_their_own() -> None:
    rows = [
        SiteNorm(1, "visual.blocks.0.attn.qkv", "vision", "attention", 0, 3.0),
        SiteNorm(1, "language_model.layers.0.self_attn.q_proj", "language", "attention", 0, 4.0),
    ]
    found = views(rows)
    assert found.layers == [{"step": 1, "vision_layer_0_attention": 3.0, "layer_0_attention": 4.0}]
    assert found.groups[0]["attention_norm"] == 5.0


# --- several processes -------------------------------------------------------------------------------------------

SCRIPT = """
    from pathlib import Path
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from test_gradients import backward, measured, train, with_gradients

    train(Path({base!r}), Path({out!r}), max_steps=3, per_device_train_batch_size=1, dropout=0.0)

    for shape, names in (((2,), ("shard",)), ((2, 1), ("copy", "shard"))):
        model = with_gradients(Path({base!r}), rank=3)  # 3 rows do not divide by 2
        expected = measured(model)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        backward(model)
        found = measured(model)
        assert list(found) == list(expected) and len(found) == 14
        for site, row in found.items():
            for name in ("norm", "norm_a", "norm_b", "norm_per_sqrt_parameter", "delta_norm"):
                one, whole = getattr(row, name), getattr(expected[site], name)
                assert abs(one - whole) <= 1e-5 * whole, (site, name, one, whole)
        print(" ".join(["the same on", *names, "\\n"]), end="", flush=True)  # one write: two processes share the pipe
    dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_processes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a run under DDP, and what two processes with sharded gradients had to say."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(base=str(base), out=str(folder)))
    done = processes.run(script, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.mark.slow
def test_two_processes_write_the_table_of_one_with_the_double_batch(
    base: Path, two_processes: tuple[Path, str], tmp_path: Path
) -> None:
    train(base, tmp_path, max_steps=3, per_device_train_batch_size=2, dropout=0.0)
    one, two = load_gradient_norms(tmp_path), load_gradient_norms(two_processes[0])
    assert [(row.step, row.site) for row in one] == [(row.step, row.site) for row in two]
    assert len(one) == 3 * 14
    for first, second in zip(one, two, strict=True):
        for name in ("norm", "norm_a", "norm_b", "delta_norm"):
            assert getattr(first, name) == pytest.approx(getattr(second, name), rel=1e-3, abs=1e-7), (first, second)


@pytest.mark.slow
def test_sharded_gradients_have_the_norms_of_whole_ones(two_processes: tuple[Path, str]) -> None:
    """FSDP2, and its mesh with copies, whose squares must not be added up."""
    assert two_processes[1].count("the same on shard") == 2
    assert two_processes[1].count("the same on copy shard") == 2
