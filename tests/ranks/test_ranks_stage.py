"""Laws of `rankwise ranks` as a whole: what it writes, what it refuses, what its evidence means."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from planted import planted
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from rankwise import cli
from rankwise.data.render import Renderer
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.plan import PLAN_FILE, read_plan
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.sites import model_sites
from rankwise.ranks.running import probe_batches

RAW = Path("analysis_outputs/svd/raw_data")
NAMES = ("Alimentum", "Bibimbap", "Clowns", "Cotto", "Strada", "Zizzi", "Wildwood", "Fitzbillies")
AREAS = ("riverside", "city centre")
PLACES = ("pub", "restaurant", "coffee shop")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 restaurants with a sentence each, in the form of E2E."""
    path = tmp_path_factory.mktemp("data") / "devset.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["mr", "ref"])
        for name in NAMES:
            for area in AREAS:
                for place in PLACES:
                    mr = f"name[{name}], eatType[{place}], area[{area}]"
                    writer.writerow([mr, f"{name} is a {place} in the {area}."])
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), num_hidden_layers=3)


def fine_tuned(base: Path, rows: Path, folder: Path, seed: int, steps: int = 25) -> Path:
    """The base after a few steps of full fine-tuning on half of the rows."""
    model = load_model(str(base), torch.float32)
    config = cli.resolve(
        "ranks", ["--task", "e2e_nlg", "--seed", str(seed), "--num-samples", "24", "--batch-size", "8"]
    )[0]
    batches = probe_batches(config, Renderer(load_tokenizer(str(base)), positions=512), str(rows), "dev")
    optimizer = torch.optim.AdamW([m.weight for m in map(model.get_submodule, model_sites(model))], lr=3e-3)
    for step in range(steps):
        batch = batches[step % len(batches)]
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(base, rows, tmp_path_factory.mktemp("tuned"), seed=0)


@pytest.fixture(scope="module")
def probe2(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(base, rows, tmp_path_factory.mktemp("probe2"), seed=1)


def ranks(out: Path, *argv: str) -> None:
    assert cli.main(["ranks", *argv, "--out", str(out)]) == 0


def refused(capsys: pytest.CaptureFixture[str], out: Path, code: int, *argv: str) -> str:
    assert cli.main(["ranks", *argv, "--out", str(out)]) == code
    assert not (out / PLAN_FILE).exists()
    return capsys.readouterr().err


def raw(out: Path, name: str = "detailed_svd_analysis") -> Any:
    return json.loads((out / RAW / f"{name}.json").read_text())


def plan_content(out: Path) -> dict[str, Any]:
    content = json.loads((out / PLAN_FILE).read_text())
    del content["timestamp"]
    return content


def test_everything_that_is_documented_is_written(
    base: Path, tuned: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--energy", "0.8", "--max-rank", "12", "--smoothing-factor", "0", "--save-delta-weights", "--emit", "peft"]
    flags += ["--emit", "unsloth", "--task", "e2e_nlg", "--gain", str(rows), "--num-samples", "12"]
    ranks(tmp_path, str(base), str(tuned), *flags)
    content, sites = plan_content(tmp_path), model_sites(load_model(str(base), torch.float32))
    assert content["format"] == "rankwise-rank-plan/2"
    assert set(content["layer_metadata"]) == set(content["layer_ranks"]) == {s.projection for s in sites.values()}
    row = content["layer_metadata"]["q_proj"][0]
    fields = "layer path shape r_raw r_final energy_retained decay_rate stable_rank saturated method compression_ratio"
    assert set(fields.split()) <= set(row)
    metadata = content["analysis_metadata"]
    assert metadata | {"svd_threshold": 0.8, "min_rank": 4, "max_rank": 12, "seed": 42} == metadata
    assert set(metadata["inputs"]) == {"base", "tuned"}

    plan = read_plan(tmp_path, sites)
    assert set(plan.ranks) == set(sites)
    assert content["total_parameters"] == plan.parameters
    assert content["compression_ratio"] == pytest.approx(plan.parameters / sum(s.size for s in sites.values()))

    details = raw(tmp_path)["sites"]
    assert set(details) == set(sites)
    for path, found in details.items():
        values, rank = torch.tensor(found["singular_values"], dtype=torch.float64), found["r_final"]
        true = (
            load_file(tuned / "model.safetensors")[f"{path}.weight"]
            - load_file(base / "model.safetensors")[f"{path}.weight"]
        )
        assert torch.allclose(values, torch.linalg.svdvals(true.double())[: len(values)], atol=1e-6)
        energies = values.square().cumsum(0) / values.square().sum()
        assert found["r_raw"] == int((energies < 0.8).sum()) + 1
        assert rank == plan.ranks[path] == min(max(found["r_raw"], 4), 12, sites[path].largest_rank)
        assert found["energy_retained"] == pytest.approx(float(energies[rank - 1]))
        assert found["original_shape"] == list(sites[path].shape)

    plots = tmp_path / "analysis_outputs/svd/plots"
    assert {file.name for file in plots.iterdir()} == {f"{p}.png" for p in sites} | {
        "ranks_heatmap.png",
        "energy_heatmap.png",
        "gain.png",
    }
    saved = load_file(tmp_path / "analysis_outputs/svd/delta_weights.safetensors")
    assert set(saved) == {f"{path}.weight" for path in sites}
    emitted = json.loads((tmp_path / "configs/peft.json").read_text())
    assert {key: emitted["rank_pattern"].get(key, emitted["r"]) for key in content["rank_pattern"]} == (
        content["rank_pattern"]
    )
    shown = capsys.readouterr().out
    assert "Verdict" in shown
    assert "rankwise train --lora_config" in shown
    manifest = json.loads((tmp_path / "manifest.json").read_text())["stages"]["ranks"]
    assert set(manifest["inputs"]) == {"base", "tuned", "gain"}
    assert (tmp_path / "resolved_config.json").is_file()


def test_the_plan_depends_on_the_inputs_alone(base: Path, tuned: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ranks(tmp_path / name, str(base), str(tuned), "--no-plots")
    assert plan_content(tmp_path / "a") == plan_content(tmp_path / "b")
    assert raw(tmp_path / "a")["sites"].keys() == raw(tmp_path / "b")["sites"].keys()
    assert not (tmp_path / "a/analysis_outputs/svd/plots").exists()


def test_two_processes_give_the_plan_of_one(tmp_path: Path) -> None:
    """Also where spectra are sketched: the random numbers belong to the site, not to the process or the order."""
    base = tiny_llama(tmp_path / "base", hidden_size=64, intermediate_size=80, num_key_value_heads=4)
    model = load_model(str(base), torch.float32)
    for index, path in enumerate(model_sites(model)):
        weight = model.get_submodule(path).weight.data
        weight += planted(*weight.shape, 3, 0.01, index)
    model.save_pretrained(tmp_path / "tuned")
    argv = ["ranks", str(base), str(tmp_path / "tuned"), "--no-plots", "--max-rank", "4", "--min-rank", "1"]
    ranks(tmp_path / "one", *argv[1:])
    assert {row.method for row in read_plan(tmp_path / "one").sites} == {"sketch"}
    result = processes.run("-m", "rankwise.cli", *argv, "--out", tmp_path / "two", count=2)
    assert result.returncode == 0, result.stderr[-2000:]
    assert plan_content(tmp_path / "one") == plan_content(tmp_path / "two")
    assert result.stdout.count("Verdict") == 1, "one process speaks"


def test_budget_and_diff(base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = ["--budget", "uniform:5", "--min-rank", "1", "--no-plots"]
    ranks(tmp_path / "absolute", str(base), str(tuned), *budget)
    ranks(tmp_path / "shares", str(base), str(tuned), *budget, "--normalise", "site")
    first, second = (read_plan(tmp_path / name) for name in ("absolute", "shares"))
    limit = sum(row.site.parameters(5) for row in first.sites)
    smallest = min(row.site.parameters(1) for row in first.sites)
    assert limit - smallest < first.parameters <= limit
    assert len(set(first.ranks.values())) > 1
    capsys.readouterr()
    assert cli.main(["ranks", "diff", str(tmp_path / "absolute"), str(tmp_path / "shares")]) == 0
    shown = capsys.readouterr().out
    differing = [path for path in first.ranks if first.ranks[path] != second.ranks[path]]
    assert f"{len(differing)} sites differ" in shown
    assert all(f"{path}: {first.ranks[path]} → {second.ranks[path]}" in shown for path in differing)
    assert cli.main(["ranks", "diff", str(tmp_path / "absolute")]) == 2
    assert cli.main(["ranks", str(base), str(tuned), "--budget", "10", "--out", str(tmp_path / "poor")]) == 2
    assert "--min_rank 4 alone takes" in capsys.readouterr().err


def test_a_probe_repeats_itself_and_others_are_compared(
    base: Path, tuned: Path, probe2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--no-plots", "--min-rank", "1", "--max-rank", "32", "--energy", "0.5"]
    ranks(tmp_path, str(base), str(tuned), *flags, "--probe2", str(tuned), "--probe2", str(probe2))
    same, other = raw(tmp_path, "repeatability")["compared"]
    assert (same["rho_all"], same["rho_within"], same["sites"]) == (pytest.approx(1.0), pytest.approx(1.0), 21)
    assert other["rho_all"] < 1
    assert f"Spearman ρ {other['rho_all']:.2f}" in capsys.readouterr().out, "as good as the worst comparison"


def test_gain_kept_is_the_share_of_the_real_gain(base: Path, tuned: Path, rows: Path, tmp_path: Path) -> None:
    """At full rank all of it, at the same parameters less for the inverted plan; losses are the models' own."""
    data = ["--task", "e2e_nlg", "--gain", str(rows), "--num-samples", "16", "--no-plots"]
    ranks(tmp_path / "full", str(base), str(tuned), "--energy", "1", "--smoothing-factor", "0", *data)
    ranks(tmp_path / "part", str(base), str(tuned), "--budget", "uniform:2", "--min-rank", "0", *data)
    full, part = raw(tmp_path / "full", "gain"), raw(tmp_path / "part", "gain")
    config = cli.resolve("ranks", ["--task", "e2e_nlg", "--num-samples", "16"])[0]
    batches = probe_batches(config, Renderer(load_tokenizer(str(base)), positions=512), str(rows), "dev")
    for name, folder in (("base_loss", base), ("tuned_loss", tuned)):
        losses, tokens = answer_losses(load_model(str(folder), torch.float32), batches)
        assert full[name] == pytest.approx(float(losses.sum() / tokens.sum()), rel=1e-4)
    assert full["defined"]
    assert full["gain_low"] <= full["base_loss"] - full["tuned_loss"] <= full["gain_high"]
    kept = {arm["name"]: arm for arm in part["arms"]}
    assert set(kept) == {"plan", "uniform", "inverted"} | {f"shuffled {i}" for i in range(1, 9)}
    assert kept["shuffled 1"]["parameters"] == kept["plan"]["parameters"] >= kept["uniform"]["parameters"]
    assert 0 < kept["plan"]["kept"] < 1
    assert kept["plan"]["low"] <= kept["plan"]["kept"] <= kept["plan"]["high"]
    expected = (full["base_loss"] - kept["plan"]["loss"]) / (full["base_loss"] - full["tuned_loss"])
    assert kept["plan"]["kept"] == pytest.approx(expected, rel=1e-4)
    sites = model_sites(load_model(str(base), torch.float32)).values()
    whole = {path: min(site.largest_rank, 128) for path, site in ((s.path, s) for s in sites)}
    assert read_plan(tmp_path / "full").ranks == whole


def test_without_a_gain_there_is_no_share_of_it(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base against itself: every delta is zero, and so is the gain. Ranks come from the budget alone."""
    data = ["--task", "e2e_nlg", "--gain", str(rows), "--num-samples", "8"]
    ranks(tmp_path, str(base), str(base), *data, "--no-plots", "--signal", "uniform", "--budget", "uniform:4")
    gain = raw(tmp_path, "gain")
    assert (gain["defined"], gain["arms"], gain["margin"]) == (False, [], None)
    assert gain["losses"]["plan"] == pytest.approx(gain["base_loss"])
    assert "undefined" in capsys.readouterr().out
    assert {row.rank for row in read_plan(tmp_path).sites} == {4}
    assert {row.method for row in read_plan(tmp_path).sites} == {"zero delta"}


def test_loss_shares_add_up_to_the_loss_drop(base: Path, tuned: Path, rows: Path, tmp_path: Path) -> None:
    data = ["--task", "e2e_nlg", "--data_path", str(rows), "--num-samples", "16", "--no-plots"]
    ranks(tmp_path, str(base), str(tuned), "--metric", "loss", "--budget", "uniform:3", "--min-rank", "0", *data)
    config = cli.resolve("ranks", ["--task", "e2e_nlg", "--num-samples", "16"])[0]
    batches = probe_batches(config, Renderer(load_tokenizer(str(base)), positions=512), str(rows), "train")
    before, after = (answer_losses(load_model(str(folder), torch.float32), batches) for folder in (base, tuned))
    drop = float((before[0].sum() - after[0].sum()) / before[1].sum())
    assert drop > 0.1
    assert raw(tmp_path)["explained_loss"] == pytest.approx(drop, rel=2e-3)


@pytest.mark.parametrize(
    "variant",
    [
        ["--metric", "activation"],
        ["--metric", "activation", "--energy", "0.9", "--budget", "none"],
        ["--signal", "activation"],
        ["--signal", "gradient"],
        ["--signal", "gradient", "--budget", "none"],
        ["--signal", "uniform"],
        ["--signal", "random"],
    ],
)
def test_every_signal_gives_a_plan_within_the_budget(
    base: Path, tuned: Path, rows: Path, tmp_path: Path, variant: list[str]
) -> None:
    runs_the_model = {"activation", "gradient"} & set(variant)
    data = ["--task", "e2e_nlg", "--data_path", str(rows), "--num-samples", "8"] if runs_the_model else []
    least = [] if "uniform" in variant else ["--min-rank", "1"]
    ranks(tmp_path, str(base), str(tuned), "--budget", "uniform:4", "--no-plots", *data, *least, *variant)
    plan = read_plan(tmp_path)
    details = raw(tmp_path)["sites"]
    for row in plan.sites:
        energies = torch.tensor(details[row.site.path]["singular_values"]).square().cumsum(0)
        kept = float(energies[row.rank - 1] / details[row.site.path]["energy"])
        assert row.energy_retained == pytest.approx(kept, abs=1e-4), "explained by the delta, whoever decided"
    if "none" not in variant:
        assert plan.parameters <= sum(row.site.parameters(4) for row in plan.sites)
    assert (len(set(plan.ranks.values())) == 1) == ("uniform" in variant)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--adapter", "x", "--deltas", "y"], "ranks needs one of"),
        (["--signal", "random"], "it needs --budget"),
        (["--metric", "loss"], "it needs --budget"),
        (["--metric", "activation", "--signal", "gradient"], "alternatives"),
        (["--metric", "activation"], "give --data_path"),
        (["--gain", "x"], "need --task"),
        (["--include", "("], "not a regular expression"),
        (["--include", "nothing"], "none of 21 sites selected"),
        (["--budget", "some"], "--budget takes"),
    ],
)
def test_combinations_that_cannot_work_are_refused(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], message: str
) -> None:
    assert message in refused(capsys, tmp_path, 2, str(base), str(tuned), *argv)


def test_rounded_weights_are_refused_and_may_be_allowed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change far below bf16's steps: what is left of it is rounding."""
    model = load_model(str(base), torch.float32)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    for parameter in model.parameters():
        parameter.data += (1e-5 * torch.randn(parameter.shape)).bfloat16()
    model.save_pretrained(tmp_path / "tuned")
    pair = [str(tmp_path / "base"), str(tmp_path / "tuned"), "--no-plots"]
    error = refused(capsys, tmp_path / "out", 3, *pair)
    assert "No ranks can be read from this" in error
    assert "--allow_noise" in error
    ranks(tmp_path / "out", *pair, "--allow-noise")
    assert "THESE RANKS DESCRIBE NOISE" in capsys.readouterr().out


def adapter_of(shared_data: Path, name: str) -> str:
    return str(shared_data / "adapters" / name)


@pytest.mark.parametrize(
    ("name", "rank", "sites"),
    [("gemma3-270m-svg_r4_main", 4, 72), ("gpt-neo-125m-movies_r8", 8, 24), ("open-calm-1b-fp16_r1", 1, 24)],
)
def test_real_adapters_have_the_rank_that_they_were_trained_with(
    shared_data: Path, tmp_path: Path, name: str, rank: int, sites: int
) -> None:
    flags = ["--adapter", adapter_of(shared_data, name), "--energy", "1", "--smoothing-factor", "0", "--min-rank", "1"]
    ranks(tmp_path, *flags, "--no-plots")
    plan = read_plan(tmp_path)
    assert len(plan.sites) == sites
    assert {row.method for row in plan.sites} == {"factors"}
    assert all(1 <= row.rank <= rank and row.energy_retained == pytest.approx(1.0) for row in plan.sites)


def test_an_adapter_of_gpt2_has_gpt2_s_sites(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its A and B do not tell that the base stores weights the other way round; the model does."""
    adapter, model = adapter_of(shared_data, "gpt2-medium-therapy_r8"), str(shared_data / "model_configs" / "gpt2")
    ranks(tmp_path, "--adapter", adapter, "--model-name", model, "--no-plots")
    plan = read_plan(tmp_path)
    assert len(plan.sites) == 24
    assert {(row.site.shape, row.site.transposed, row.site.tower) for row in plan.sites} == {
        ((3072, 1024), True, "language")
    }
    smaller = ["--adapter", adapter_of(shared_data, "gpt2-cls_r8"), "--model-name", model]
    assert "(2304, 768) and (3072, 1024)" in refused(capsys, tmp_path / "other", 3, *smaller)
    llama = str(shared_data / "model_configs" / "TinyLlama-1.1B-Chat-v1.0")
    assert "24 of the adapter's 24 sites are not in the model" in refused(
        capsys, tmp_path / "other", 3, "--adapter", adapter, "--model-name", llama
    )


def test_an_adapter_without_effect_gets_no_ranks(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = adapter_of(shared_data, "zeroB_stella-400m_r16")
    assert "was the adapter saved untrained?" in refused(capsys, tmp_path / "out", 3, "--adapter", adapter)


@pytest.mark.parametrize(
    ("name", "message"),
    [("broken_gemma-2b-allNaN_r16", "NaN or infinite"), ("notlora_gpt2-prompt-tuning", "PROMPT_TUNING")],
)
def test_adapters_that_are_none_are_refused(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str
) -> None:
    assert message in refused(capsys, tmp_path, 3, "--adapter", adapter_of(shared_data, name))


def test_a_real_pair_of_detectors(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """90 % of the energy of its largest layer needs 118 of 256 directions: real deltas are not low rank."""
    folder = shared_data / "checkpoint_pairs/retinaface_mobilenet025/m2man"
    pair = [str(folder / "mobilenetV1X0.25_pretrain.tar"), str(folder / "mobilenet0.25_Final.pth")]
    brought = ["--rename", r"^module\.=", "--rename", r"^body\.=", "--flatten-conv", "--allow-unmatched"]
    ranks(tmp_path, *pair, *brought, "--no-plots", "--max-rank", "256", "--smoothing-factor", "0")
    details = raw(tmp_path)["sites"]
    assert len(details) == 27
    assert details["stage3.1.3"]["original_shape"] == [256, 256]
    assert details["stage3.1.3"]["r_raw"] == 118
    shown = capsys.readouterr().out
    assert "tensors do not match and were left out" in shown
    assert "`train` refuses the plan" in shown


def test_a_plan_of_no_parameters_is_not_written(
    base: Path, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--budget", "1", "--min_rank", "0")
    assert "--budget 1 gives every site rank 0" in refused(capsys, tmp_path, 2, str(base), str(tuned), *words)
    assert not (tmp_path / "configs").exists()


def test_an_adapters_site_that_the_model_lacks_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Most sites fit; the others would be measured as if they did."""
    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "target_modules": ["up_proj"]}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    paths = ("model.layers.0.mlp.up_proj", "model.layers.7.mlp.up_proj")
    pairs = {f"base_model.model.{path}.lora_A.weight": torch.ones(2, 32) for path in paths}
    pairs |= {f"base_model.model.{path}.lora_B.weight": torch.ones(48, 2) for path in paths}
    save_file(pairs, tmp_path / "adapter" / "adapter_model.safetensors")
    words = ("--adapter", str(tmp_path / "adapter"), "--model_name", str(base))
    said = refused(capsys, tmp_path, 3, *words)
    assert "1 of the adapter's 2 sites are not in the model (model.layers.7.mlp.up_proj" in said
    assert "nearest: model.layers." in said


def test_nan_in_a_checkpoint_names_the_tensor(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load_model(str(base), torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "tuned")
    error = refused(capsys, tmp_path / "out", 3, str(base), str(tmp_path / "tuned"))
    assert "model.layers.1.mlp.up_proj.weight" in error


def test_the_python_form_raises_what_the_command_reports(base: Path) -> None:
    with pytest.raises((DataError, UsageError)):
        cli.dispatch(["ranks", str(base), str(base / "nothing")])
