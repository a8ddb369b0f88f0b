"""Laws of the spectra of experts: each one's equals LAPACK's in float64, the parameter's is their sum of squares."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from planted import generator, truth
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from rankwise import cli
from rankwise.core.allocate import invert, shuffle
from rankwise.core.site import Site
from rankwise.core.spectrum import Spectrum, together
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.checkpoint import open_checkpoint
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites, weight_table
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SitesSection, SpectrumSection
from rankwise.ranks.deltas import BaseWeights, open_deltas, write_deltas
from rankwise.ranks.gain import at_ranks, gradient_spectra, loss_gains, mean_gradients, moved, truncations
from rankwise.ranks.measured import Measured, refuse_noise
from rankwise.ranks.probe import AdapterDeltas, open_pair, open_source
from rankwise.ranks.spectra import measure_adapter, measure_sites

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"


def expert_sites(model: PreTrainedModel) -> dict[str, Site]:
    return {site.weight: site for site in model_sites(model).values() if site.experts}


def planted_deltas(shape: tuple[int, ...], seed: int) -> Tensor:
    """(E, a, b): expert e has e + 1 directions of its own, so that no expert can be taken for another."""
    count, a, b = shape
    found = torch.zeros(shape)
    for expert in range(count):
        draw = generator(100 * seed + expert)
        rank = expert + 1
        left, right = torch.randn(a, rank, generator=draw), torch.randn(rank, b, generator=draw)
        found[expert] = 0.05 * (left * torch.logspace(0, -0.6, rank)) @ right
    return found


def saved_pair(
    folder: Path,
    family: str,
    *,
    fused: bool = False,
    dtype: torch.dtype = torch.float32,
    change: Callable[[tuple[int, ...], int], Tensor] = planted_deltas,
    **config: int,
) -> tuple[Path, Path, dict[str, Tensor]]:
    """base/ and tuned/, and of every parameter with experts the difference that the files hold."""
    model = experts.built(family, dtype=dtype, **config)
    names = list(expert_sites(model))
    before = {name: model.state_dict()[name].clone() for name in names}
    model.save_pretrained(folder / "base", save_original_format=not fused)
    with torch.no_grad():
        for seed, name in enumerate(names):
            parameter = model.get_parameter(name)
            parameter += change(tuple(parameter.shape), seed).to(dtype)
    model.save_pretrained(folder / "tuned", save_original_format=not fused)
    return (
        folder / "base",
        folder / "tuned",
        {n: model.state_dict()[n].double() - before[n].double() for n in names},
    )


def measured_pair(base: Path, tuned: Path, **spectrum: float) -> dict[str, Measured]:
    config = RanksConfig(spectrum=SpectrumSection(**spectrum))  # type: ignore[arg-type]
    found = measure_sites(open_pair(str(base), str(tuned), SitesSection(), []), config, lambda *_: None)
    return {site.weight: row for site, row in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", experts.FAMILIES)
def test_each_expert_has_its_own_spectrum(family: str, fused: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Float64 LAPACK per expert; every planted rank is found in its own expert and in no other."""
    base, tuned, differences = saved_pair(tmp_path, family, fused=fused, dtype=dtype)
    found = measured_pair(base, tuned)
    assert set(differences) <= set(found)
    for name, difference in differences.items():
        row = found[name]
        assert len(row.experts) == len(difference)
        squares = torch.zeros(min(difference.shape[1:]), dtype=torch.float64)
        for expert, (one, matrix) in enumerate(zip(row.experts, difference, strict=True)):
            values = truth(matrix)
            assert torch.allclose(one.spectrum.values, values, atol=1e-6 * float(values[0]), rtol=1e-6), (name, expert)
            assert one.energy == pytest.approx(float(matrix.square().sum()), rel=1e-6)
            if dtype is torch.float32:
                assert one.spectrum.rank_for(1 - 1e-6) == expert + 1, (name, expert)
            squares += values.square()
        assert torch.allclose(row.spectrum.values.square(), squares, rtol=1e-6, atol=1e-9 * float(squares[0]))
        assert row.energy == pytest.approx(float(difference.square().sum()), rel=1e-6)
        assert row.spectrum.complete


def test_out_equal_to_in_is_no_excuse(tmp_path: Path) -> None:
    """2I = H: gate_up is square, and only the family says which axis is which."""
    for family in ("gpt_oss", "llama4_text", "mixtral"):
        base, tuned, differences = saved_pair(tmp_path / family, family, inner=32)
        pair = open_pair(str(base), str(tuned), SitesSection(), [])
        for site in pair.sites.values():
            if site.experts:
                stored = differences[site.weight][1].float()
                matrix = pair.expert(site, 1).matrix
                assert torch.allclose(matrix, stored.T if site.transposed else stored, atol=1e-6), site.path


def decaying(shape: tuple[int, ...], seed: int) -> Tensor:
    draw = generator(seed)
    left = torch.linalg.qr(torch.randn(shape[0], shape[1], shape[1], generator=draw)).Q
    right = torch.linalg.qr(torch.randn(shape[0], shape[2], shape[2], generator=draw)).Q
    rank = min(shape[1:])
    scale = torch.rand(shape[0], 1, 1, generator=draw) + 0.1
    return scale * (left[:, :, :rank] * 0.9 ** torch.arange(rank)) @ right[:, :, :rank].mT


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.62, 0.9])
def test_sketches_decide_what_exact_spectra_decide(threshold: float, tmp_path: Path) -> None:
    """Short sides of 64 and 5 values: the sketch's path, whose ranks and bounds hold whichever way it goes."""
    base, tuned, differences = saved_pair(tmp_path, "qwen3_moe", change=decaying, moe_intermediate_size=160)
    config = RanksConfig(spectrum=SpectrumSection(max_rank=5))
    pair = open_pair(str(base), str(tuned), SitesSection(), [])

    def question(_: Site, spectrum: Spectrum) -> object:
        return spectrum.rank_for(threshold, 1, 5)

    found = {site.weight: row for site, row in measure_sites(pair, config, question).items()}
    for name, difference in differences.items():
        squares = torch.stack([truth(matrix).square() for matrix in difference]).sum(0)
        kept = squares.cumsum(0) / squares.sum()
        spectrum = found[name].spectrum
        assert spectrum.rank_for(threshold, 1, 5) == min(5, int((kept < threshold).sum()) + 1)
        for k in range(1, 6):
            low, high = spectrum.energy(k)
            assert low - 1e-6 <= float(kept[k - 1]) <= high + 1e-6, (name, k, spectrum.method)
    methods = {row.spectrum.method for row in found.values() if row.experts}
    assert any("sketch" in method for method in methods), methods


def test_a_question_that_sketches_cannot_answer_is_answered_exactly(tmp_path: Path) -> None:
    """Near the true energy the widest experts are measured exactly, and no more of them than it takes."""
    base, tuned, differences = saved_pair(tmp_path, "qwen3_moe", change=decaying, moe_intermediate_size=160)
    pair = open_pair(str(base), str(tuned), SitesSection(include="layers.0.*gate_up"), [])
    squares = torch.stack([truth(matrix).square() for matrix in differences[GATE_UP]]).sum(0)
    kept = squares.cumsum(0) / squares.sum()
    exact = []
    for beside, rank in ((-1e-5, 3), (1e-5, 4), (1e-4, 4), (2e-4, 4), (5e-4, 4)):
        threshold = float(kept[2]) + beside

        def question(_: Site, spectrum: Spectrum, threshold: float = threshold) -> object:
            return spectrum.rank_for(threshold, 1, 5)

        (row,) = measure_sites(pair, RanksConfig(spectrum=SpectrumSection(max_rank=5)), question).values()
        assert row.spectrum.rank_for(threshold, 1, 5) == rank
        assert ("undecided" in row.spectrum.method) == any("undecided" in one.spectrum.method for one in row.experts)
        exact.append(sum("undecided" in one.spectrum.method for one in row.experts))
    assert exact[0] and exact[1] and exact[1:] == sorted(exact[1:], reverse=True), exact
    assert any(0 < count < 8 for count in exact), exact


def test_a_common_rank_keeps_the_sum_of_what_each_keeps() -> None:
    """`together` of complete and truncated spectra: values, bounds and totals add up."""
    matrices = [torch.randn(8, 12, generator=generator(seed)) * (seed + 1) for seed in range(3)]
    whole = [Spectrum(truth(m), float(m.square().sum()), (8, 12), complete=True) for m in matrices]
    both = together(whole)
    for k in range(1, 9):
        kept = sum(float(truth(m).square()[:k].sum()) for m in matrices) / both.energy_total
        assert both.energy(k).low == pytest.approx(kept, rel=1e-6)
    part = [Spectrum(each.values[:4], each.energy_total, (8, 12), residual=float(each.values[4])) for each in whole]
    cut = together([*part[:2], whole[2]])
    assert len(cut) == 4 and not cut.complete
    assert torch.allclose(cut.values, both.values[:4])
    assert float(cut.missed()[0]) >= float(sum(each.missed()[0] for each in part[:2])) - 1e-9


# --- bad input is named by expert ------------------------------------------------------------------------------------


def broken(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def ranks(base: Path, tuned: Path, out: Path, *options: str) -> int:
    return cli.main(["ranks", str(base), str(tuned), "--output_dir", str(out), "--no_plots", *options])


def fewer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if ".experts.3." not in key}


def without_one(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if ".layers.1.block_sparse_moe.experts.2.w2." not in key}


def with_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 5] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (fewer, (GATE_UP, "has 3 experts", "where the model has 4", "tuned checkpoint")),
        (without_one, ("model.layers.1.mlp.experts.down_proj", "of expert 2", "tuned checkpoint")),
        (with_nan, ("model.layers.1.mlp.experts.gate_up_proj, expert 2", "NaN")),
    ],
)
def test_bad_experts_are_named_and_nothing_is_written(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    names: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, tuned, _ = saved_pair(tmp_path, "mixtral")
    broken(tuned, change)
    assert ranks(base, tuned, tmp_path / "out") == DataError.exit_code
    said = capsys.readouterr().err
    assert all(name in said for name in names), said
    assert not (tmp_path / "out" / "configs").exists()


def test_another_number_of_fused_experts_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, _ = saved_pair(tmp_path, "gpt_oss")
    broken(tuned, lambda tensors: {k: v[:3].contiguous() if "experts" in k else v for k, v in tensors.items()})
    assert ranks(base, tuned, tmp_path / "out") == DataError.exit_code
    said = capsys.readouterr().err
    assert GATE_UP in said and "has 3 experts" in said and "where the model has 4" in said


def test_a_missing_shard_names_the_experts_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, _, _ = saved_pair(tmp_path, "mixtral")
    tuned = tmp_path / "sharded"
    experts.built("mixtral").save_pretrained(tuned, max_shard_size="100KB")
    shutil.copy(base / "config.json", tuned / "config.json")
    places = json.loads((tuned / "model.safetensors.index.json").read_text())["weight_map"]
    key = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    (tuned / places[key]).unlink()
    lost = [name for name, file in places.items() if file == places[key]]
    assert ranks(base, tuned, tmp_path / "out") == DataError.exit_code
    said = capsys.readouterr().err
    assert places[key] in said and any(name in said for name in lost if "experts" in name), said


# --- other sources ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_saved_deltas_are_the_same_source(family: str, tmp_path: Path) -> None:
    """What `finetune` writes: one tensor per parameter, the base's energy of each expert."""
    base, tuned, differences = saved_pair(tmp_path, family)
    checkpoint, skeleton = open_checkpoint(base), meta_model(str(base))
    weights = BaseWeights.before_training(checkpoint, weight_table(skeleton, checkpoint.keys()), differences)
    assert not weights.copies, "experts are read from the files again, not copied"
    after, after_model = open_checkpoint(tuned), meta_model(str(tuned))
    table = weight_table(after_model, after.keys())
    state = {name: table.experts[name].read(after) for name in differences}
    write_deltas(tmp_path / "deltas", state, weights, model_sites(skeleton), {})
    saved = open_deltas(tmp_path)
    pair = open_pair(str(base), str(tuned), SitesSection(), [])
    assert {site.weight for site in saved.sites.values()} == set(differences)
    for site in saved.sites.values():
        for expert in range(site.experts):
            one, other = saved.expert(site, expert), pair.expert(site, expert)
            assert torch.equal(one.matrix, other.matrix), (site.path, expert)
            assert one.relative_change == pytest.approx(other.relative_change, rel=1e-5)


def test_saved_deltas_of_another_number_of_experts_are_refused(tmp_path: Path) -> None:
    base, _, differences = saved_pair(tmp_path, "mixtral")
    checkpoint, skeleton = open_checkpoint(base), meta_model(str(base))
    table = weight_table(skeleton, checkpoint.keys())
    weights = BaseWeights.before_training(checkpoint, table, differences)
    state = {name: table.experts[name].read(checkpoint) for name in differences}
    folder = write_deltas(tmp_path / "deltas", state, weights, model_sites(skeleton), {})
    content = (folder / "deltas.json").read_text().replace('"experts": 4', '"experts": 5')
    (folder / "deltas.json").write_text(content)
    with pytest.raises(DataError, match=r"\(4, 96, 64\) in the weights and 5 × \(96, 64\)"):
        open_deltas(tmp_path)


def test_an_adapter_is_measured_from_its_factors() -> None:
    """Every expert's scale·B·A, and the same by its dense deltas."""
    draw = generator(0)
    pair = LoraPair(torch.randn(4, 3, 24, generator=draw), torch.randn(4, 40, 3, generator=draw), 0.5)
    skeleton = experts.built("mixtral")
    site = next(site for site in expert_sites(skeleton).values())
    site = Site(site.path, (40, 24), experts=4)
    source = AdapterDeltas(LoraAdapter({}, {site.path: pair}), {site.path: site}, "")
    (row,) = measure_adapter(source.adapter, source.sites).values()
    for expert, one in enumerate(row.experts):
        values = truth(0.5 * pair.lora_B[expert].double() @ pair.lora_A[expert].double())
        assert torch.allclose(one.spectrum.values, values[:3], rtol=1e-5)
        assert torch.allclose(truth(source.expert(site, expert).matrix)[:3], values[:3], rtol=1e-4)
    assert row.spectrum.complete and row.energy == pytest.approx(sum(one.energy for one in row.experts))


# --- rounding --------------------------------------------------------------------------------------------------------


def in_steps(shape: tuple[int, ...], seed: int) -> Tensor:
    """Expert 0 moves by far less than bf16's spacing, expert 1 not at all, the others by far more."""
    found = decaying(shape, seed)
    found[0] *= 2e-3
    found[1] = 0
    return found


def test_rounding_is_judged_expert_by_expert(tmp_path: Path) -> None:
    base, tuned, _ = saved_pair(tmp_path, "mixtral", dtype=torch.bfloat16, change=in_steps)
    source = open_source(SitesSection(include="experts"), [], base=str(base), tuned=str(tuned))
    found = measure_sites(source, RanksConfig(spectrum=SpectrumSection()), lambda *_: None)
    row = next(row for site, row in found.items() if site.weight == GATE_UP)
    assert row.experts[0].noise_share > 0.1 and row.experts[2].noise_share < 0.01
    assert row.experts[1].energy == 0 and row.experts[1].unchanged == 1
    assert row.unchanged < 0.5, "an expert that no token was routed to is no rounded one"
    warnings: list[str] = []
    refuse_noise(found, False, warnings)
    assert any("experts are mostly rounding" in said and ", expert 0" in said for said in warnings), warnings


# --- plans, the map of experts, other metrics ------------------------------------------------------------------------


def plan_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "configs" / "lora_rank_config.json").read_text())
    return content


@pytest.mark.parametrize("options", [("--svd_threshold", "0.8", "--smoothing_factor", "0"), ("--budget", "uniform:3")])
def test_ranks_are_per_expert_and_paid_for_each(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Threshold and budget work on Σ_e σ²: the rank keeps what it says, and costs r·E·(m + n)."""
    base, tuned, differences = saved_pair(tmp_path, "mixtral", change=decaying)
    assert (
        ranks(base, tuned, tmp_path / "out", "--min_rank", "1", "--allow_noise", "--include", "experts", *options) == 0
    )
    plan = plan_of(tmp_path / "out")
    rows = {row["path"]: row for rows in plan["layer_metadata"].values() for row in rows}
    assert plan["total_parameters"] == sum(4 * row["r_final"] * sum(row["shape"]) for row in rows.values())
    for name, difference in differences.items():
        squares = torch.stack([truth(matrix).square() for matrix in difference]).sum(0)
        kept = squares.cumsum(0) / squares.sum()
        row = rows[name]
        assert row["energy_retained"] == pytest.approx(float(kept[row["r_final"] - 1]), abs=1e-6)
        if "--svd_threshold" in options:
            assert row["r_raw"] == int((kept < 0.8).sum()) + 1
    if "--budget" in options:
        assert plan["total_parameters"] <= sum(4 * 3 * sum(row["shape"]) for row in rows.values())
    said = capsys.readouterr().out
    assert "Experts" in said and "most moved: layer" in said
    facts = json.loads((tmp_path / "out/analysis_outputs/svd/raw_data/expert_changes.json").read_text())
    by_path = {row["path"]: row for row in facts["parameters"]}
    for name, difference in differences.items():
        energies = [float(matrix.square().sum()) for matrix in difference]
        assert by_path[name]["energy"] == pytest.approx(energies, rel=1e-5)


def test_ranks_are_exchanged_only_between_sites_of_equal_cost() -> None:
    """A layer's experts are no peer of a matrix of their shape: shuffled and inverted plans cost what the plan does."""
    kinds = (("up_proj", 0), ("experts.up_proj", 4), ("other.up_proj", 8))
    sites = [Site(f"model.layers.{k}.mlp.{name}", (96, 64), experts=count) for k in range(6) for name, count in kinds]
    plan = {site: 1 + 7 * number % 11 for number, site in enumerate(sites)}
    cost = sum(site.parameters(rank) for site, rank in plan.items())
    for other in (invert(plan), *(shuffle(plan, generator(seed)) for seed in range(5))):
        assert other != plan and sum(site.parameters(rank) for site, rank in other.items()) == cost


def one_expert(shape: tuple[int, ...], seed: int) -> Tensor:
    found = decaying(shape, seed) * 1e-3
    found[2] *= 1e4
    return found


def test_few_experts_with_nearly_all_of_the_change_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn_pictures: None
) -> None:
    """A warning with its figure, a map, a table of the most moved; in the report as well."""
    base, tuned, _ = saved_pair(tmp_path, "qwen3_moe", change=one_expert)
    out = tmp_path / "out"
    assert cli.main(["ranks", str(base), str(tuned), "--output_dir", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"warning: [12] of 16 experts \(\d+(\.\d)? %\) hold 90", said), said
    assert (out / "analysis_outputs/svd/plots/expert_map.png").stat().st_size > 10_000
    assert cli.main(["report", str(out)]) == 0
    page = (out / "report.md").read_text()
    assert "expert_map" in page and "most moved" in page and "expert 2" in page


def test_evenly_moved_experts_are_no_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned, _ = saved_pair(tmp_path, "qwen3_moe", change=decaying)
    assert ranks(base, tuned, tmp_path / "out") == 0
    assert "hold 90" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [("--metric", "activation", "--budget", "uniform:4"), ("--signal", "activation", "--budget", "uniform:4")],
)
def test_metrics_of_inputs_refuse_experts_before_anything_is_read(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, tuned, _ = saved_pair(tmp_path, "mixtral")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    task = ("--task", "e2e_nlg", "--data_path", str(rows))
    assert ranks(base, tuned, tmp_path / "out", *options, *task) == UsageError.exit_code
    said = capsys.readouterr().err
    assert "experts" in said and GATE_UP in said and options[1] in said


def test_the_loss_drop_is_shared_by_directions_of_all_experts() -> None:
    """`--metric loss`, `--signal gradient` and --gain move experts as they are stored: Llama 4 transposed, too."""
    for family in ("mixtral", "llama4_text"):
        model = experts.built(family)
        sites = list(expert_sites(model).values())
        batch = {"input_ids": torch.randint(3, 90, (4, 12), generator=generator(0))}
        batch |= {"attention_mask": torch.ones_like(batch["input_ids"]), "labels": batch["input_ids"]}
        draw = generator(1)
        deltas = {site: 0.02 * torch.randn(site.experts, *site.shape, generator=draw) for site in sites}
        before = {site: model.get_parameter(site.weight).detach().clone() for site in sites}

        def loss() -> float:
            with torch.no_grad():
                return float(model(**batch).loss)  # noqa: B023

        start = loss()
        with moved(model, deltas):
            drop = start - loss()
            for site in sites:
                change = model.get_parameter(site.weight).detach() - before[site]
                expected = deltas[site].mT if site.transposed else deltas[site]
                assert torch.allclose(change, expected, atol=1e-6)
        gains, total = loss_gains(model, deltas, [batch], 64)
        assert total == pytest.approx(drop, rel=0.02, abs=2e-4), family
        assert all(len(gain) == min(64, site.full_rank) for site, gain in gains.items())
        at_full = at_ranks(
            truncations(deltas, {"all": {site: site.full_rank for site in sites}}),
            {site: site.full_rank for site in sites},
        )
        for site in sites:
            assert torch.allclose(at_full[site], deltas[site], atol=1e-5)
            assert torch.equal(model.get_parameter(site.weight), before[site])
        for site, spectrum in gradient_spectra(model, sites, [batch]).items():
            gradient = mean_gradients(model, [site], [batch])[site]
            squares = torch.stack([truth(matrix).square() for matrix in gradient]).sum(0)
            assert torch.allclose(spectrum.values.square(), squares, rtol=1e-4, atol=1e-6 * float(squares[0]))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4_text"])
def test_a_saved_adapter_is_measured_per_expert(family: str, tmp_path: Path) -> None:
    """From PEFT's own layout of factors, in the site's orientation, whatever axis PEFT takes for in."""
    base = tmp_path / "base"
    experts.built(family).save_pretrained(base)
    draw, pairs = generator(0), {}
    for site in expert_sites(meta_model(str(base))).values():
        a, b = (torch.randn(site.experts, *size, generator=draw) for size in ((3, site.shape[1]), (site.shape[0], 3)))
        pairs[site.path] = LoraPair(a, b, 2.0, site.transposed, peft=site.peft, swapped=site.swapped, order=site.order)
    write_adapter(tmp_path / "adapter", LoraAdapter(lora_config(str(base)), pairs))
    options = ["--output_dir", str(tmp_path / "out"), "--no_plots", "--model_name", str(base)]
    assert cli.main(["ranks", "--adapter", str(tmp_path / "adapter"), *options]) == 0
    rows = json.loads((tmp_path / "out/analysis_outputs/svd/raw_data/expert_changes.json").read_text())["parameters"]
    assert {row["path"] for row in rows} == set(pairs)
    for row in rows:
        pair = pairs[row["path"]]
        energies = [
            float((2.0 * b.double() @ a.double()).square().sum()) for a, b in zip(pair.lora_A, pair.lora_B, strict=True)
        ]
        assert row["energy"] == pytest.approx(energies, rel=1e-5)
        assert set(row["rank_at_threshold"]) <= {1, 2, 3}


def test_an_mxfp4_base_is_measured_dequantized(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks and scales in the base, bfloat16 in the tuned checkpoint."""
    base, tuned, _ = saved_pair(tmp_path, "gpt_oss", dtype=torch.bfloat16)
    tensors, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    count, inner, outer = tensors.pop(GATE_UP).shape
    draw = generator(3)
    codes = {
        f"{GATE_UP}_blocks": torch.randint(0, 256, (count, outer, inner // 32, 16), generator=draw, dtype=torch.uint8),
        f"{GATE_UP}_scales": torch.randint(120, 124, (count, outer, inner // 32), generator=draw, dtype=torch.uint8),
    }
    save_file(tensors | codes, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    before = convert_moe_packed_tensors(*codes.values())
    found = measured_pair(base, tuned)[GATE_UP]
    for expert, one in enumerate(found.experts):
        values = truth(after[GATE_UP][expert].double() - before[expert].double())
        assert torch.allclose(one.spectrum.values, values, rtol=1e-5, atol=1e-6 * float(values[0]))
