"""Laws of `extract`: nothing beats the truncated SVD at equal rank, and base + extracted adapter is the tuned model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rankwise.cli import main
from rankwise.core.measure import from_difference
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site, describe
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import read_adapter
from rankwise.files.plan import write_plan
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.options.commands import ExtractConfig
from rankwise.options.sections import SitesSection
from rankwise.ranks.deltas import DELTAS
from rankwise.ranks.extract import check, factor_deltas, run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.arange(40).reshape(2, 20)
DOWN = "model.layers.0.mlp.down_proj"


def tiny_gpt2(folder: Path) -> Path:
    tiny_tokenizer(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def tuned_from(base: Path, folder: Path, also: tuple[str, ...] = ()) -> Path:
    """The base with every site's weight moved (falling spectrum plus noise), and other tensors where asked."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for path in model_sites(model):
            weight = model.get_submodule(path).weight
            low_rank = torch.randn(weight.shape[0], 3) @ torch.randn(3, weight.shape[1])
            weight += 0.02 * low_rank + 0.01 * torch.randn_like(weight)
        for name in also:
            model.get_parameter(name).add_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tiny_llama(tmp_path_factory.mktemp("base"))
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tiny_gpt2(tmp_path_factory.mktemp("base"))
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned"))


def settings_for(pair: tuple[Path, Path], out: Path, **options: object) -> ExtractConfig:
    return ExtractConfig(base=str(pair[0]), tuned=str(pair[1]), output_dir=str(out), **options)  # type: ignore[arg-type]


def plan_file(pair: tuple[Path, Path], path: Path, ranks: dict[str, int], **fields: object) -> str:
    sites = model_sites(meta_model(str(pair[0])))
    rows = tuple(PlannedSite(sites[site], rank) for site, rank in ranks.items())
    return str(write_plan(path, RankPlan(rows, **fields)))  # type: ignore[arg-type]


def deltas_of(pair: tuple[Path, Path]) -> dict[str, Tensor]:
    base, tuned = (load_file(folder / "model.safetensors") for folder in pair)
    return {
        key.removesuffix(".weight"): tuned[key] - base[key] for key in base if not torch.equal(base[key], tuned[key])
    }


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_base_with_the_full_rank_adapter_is_the_tuned_model(
    architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    pair: tuple[Path, Path] = request.getfixturevalue(architecture)
    fidelity = run(settings_for(pair, tmp_path, rank=1000))
    model = AutoModelForCausalLM.from_pretrained(pair[0], dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig.from_pretrained(str(tmp_path)))
    loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(tmp_path), device="cpu"))
    assert not loaded.unexpected_keys
    assert not [key for key in loaded.missing_keys if "lora_" in key]
    tuned = AutoModelForCausalLM.from_pretrained(pair[1], dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(IDS).logits, tuned(IDS).logits, rtol=1e-4, atol=1e-4)
    assert fidelity.energy_kept == pytest.approx(1, abs=1e-6)
    assert all("above min(m, n)" in row.note and row.rank == row.site.full_rank for row in fidelity.rows)


class OneDelta:
    """A source of a single matrix."""

    description = "one matrix"

    def __init__(self, matrix: Tensor) -> None:
        self.site = describe("layer.q_proj", tuple(matrix.shape))
        self.sites = {self.site.path: self.site}
        self.delta = from_difference(matrix)

    def read(self, site: Site) -> object:
        return self.delta

    def prefetch(self, site: Site) -> None:
        """Nothing to prefetch."""


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 40), n=st.integers(2, 40), rank=st.integers(1, 12), seed=st.integers(0, 1000))
def test_nothing_beats_it_at_equal_rank(m: int, n: int, rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(m, n, generator=generator)
    rank = min(rank, m, n)
    source = OneDelta(delta)
    pairs, fidelity = factor_deltas(source, RankPlan((PlannedSite(source.site, rank),)), "cpu", seed)  # type: ignore[arg-type]
    error = float((delta - pairs["layer.q_proj"].factors().product()).norm())
    tail = float(torch.linalg.svdvals(delta.double())[rank:].norm())
    assert error == pytest.approx(tail, rel=1e-4, abs=1e-4)
    basis = torch.linalg.qr(torch.randn(m, rank, generator=generator)).Q
    assert error <= float((delta - basis @ (basis.T @ delta)).norm()) + 1e-4
    assert fidelity.energy_kept == pytest.approx(1 - (error / float(delta.norm())) ** 2, abs=1e-5)


def test_a_large_matrix_through_the_sketch_is_as_good_as_the_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(300, 5, generator=generator) @ torch.randn(5, 200, generator=generator)
    delta += 0.05 * torch.randn(300, 200, generator=generator)
    source = OneDelta(delta)
    plan = RankPlan((PlannedSite(source.site, 5),))
    pairs, _ = factor_deltas(source, plan, "cpu", 42)  # type: ignore[arg-type]
    again, _ = factor_deltas(source, plan, "cpu", 42)  # type: ignore[arg-type]
    error = float((delta - pairs["layer.q_proj"].factors().product()).norm())
    assert error <= 1.001 * float(torch.linalg.svdvals(delta)[5:].norm())
    assert torch.equal(pairs["layer.q_proj"].lora_A, again["layer.q_proj"].lora_A), "the sketch is seeded by site"


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_plan_gives_ranks_and_scale(llama: tuple[Path, Path], tmp_path: Path, use_rslora: bool) -> None:
    ranks = {DOWN: 9, "model.layers.1.self_attn.q_proj": 4, "model.layers.1.mlp.up_proj": 0}
    plan = plan_file(llama, tmp_path / "plan.json", ranks, use_rslora=use_rslora)
    fidelity = run(settings_for(llama, tmp_path / "out", plan=plan))
    adapter = read_adapter(tmp_path / "out")
    assert {path: pair.rank for path, pair in adapter.pairs.items()} == {p: r for p, r in ranks.items() if r}
    scales = {9: 18 / 9**0.5, 4: 18 / 4**0.5} if use_rslora else {9: 2.0, 4: 2.0}  # rsLoRA: one alpha, 2·9
    assert {pair.rank: pair.scale for pair in adapter.pairs.values()} == pytest.approx(scales)
    assert adapter.config["use_rslora"] is use_rslora and adapter.config["lora_alpha"] == 18
    for path, pair in adapter.pairs.items():
        delta = deltas_of(llama)[path]
        expected = float(torch.linalg.svdvals(delta.double())[pair.rank :].norm())
        assert float((delta - pair.factors().product()).norm()) == pytest.approx(expected, rel=1e-3)
    left_out = [row for row in fidelity.rows if not row.rank]
    assert [row.note for row in left_out] == ["rank 0 in the plan: left out"]
    assert fidelity.parameters == 9 * (32 + 48) + 4 * (32 + 32)


def test_the_table_is_written_and_recorded(llama: tuple[Path, Path], tmp_path: Path) -> None:
    fidelity = run(settings_for(llama, tmp_path, rank=4))
    content = json.loads((tmp_path / "fidelity.json").read_text())
    assert content["energy_kept"] == pytest.approx(fidelity.energy_kept)
    assert 0.5 < content["energy_kept"] < 1
    for row in content["sites"]:
        adapter = read_adapter(tmp_path).pairs[row["path"]]
        delta = deltas_of(llama)[row["path"]]
        residual = (delta - adapter.factors().product()).norm() / delta.norm()
        assert row["energy_kept"] == pytest.approx(1 - float(residual) ** 2, abs=1e-5)
    entry = json.loads((tmp_path / "manifest.json").read_text())["stages"]["extract"]
    assert set(entry["inputs"]) == {"base", "tuned"}
    assert set(entry["outputs"]) == {"adapter_model.safetensors", "adapter_config.json", "fidelity"}


def test_saved_deltas_give_the_same_adapter(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "deltas"
    folder.mkdir(parents=True)
    deltas = deltas_of(llama)
    save_file({f"{path}.weight": delta for path, delta in deltas.items()}, folder / "model.safetensors")
    sites = model_sites(meta_model(str(llama[0])))
    rows = [{"path": p, "shape": list(s.shape), "tower": s.tower, "transposed": s.transposed} for p, s in sites.items()]
    DELTAS.write(folder, {"sites": rows, "model_name": "org/base", "base_energy": {}})
    run(settings_for(llama, tmp_path / "one", rank=3))
    run(ExtractConfig(deltas=str(tmp_path / "run"), rank=3, output_dir=str(tmp_path / "two")))
    one, two = read_adapter(tmp_path / "one"), read_adapter(tmp_path / "two")
    assert two.base_model == "org/base"
    for path, pair in one.pairs.items():
        assert torch.equal(pair.lora_B, two.pairs[path].lora_B), path


def test_changes_that_the_adapter_cannot_carry_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_llama(tmp_path / "base")
    tuned = tuned_from(base, tmp_path / "tuned", also=("model.norm.weight", "model.embed_tokens.weight"))
    run(settings_for((base, tuned), tmp_path / "out", rank=2))
    printed = capsys.readouterr().out
    assert "2 tensors outside these sites changed as well" in printed
    assert "model.embed_tokens.weight, model.norm.weight" in printed
    assert "energy kept" in printed
    assert "next: rankwise merge" in printed


def test_a_zero_delta_is_left_out_and_only_zeros_are_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(llama[1] / "model.safetensors")
    tensors[f"{DOWN}.weight"] = load_file(llama[0] / "model.safetensors")[f"{DOWN}.weight"]
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    save_file(tensors, tuned / "model.safetensors")
    fidelity = run(settings_for((llama[0], tuned), tmp_path / "out", rank=2))
    assert [row.site.path for row in fidelity.rows if not row.rank] == [DOWN]
    assert DOWN not in read_adapter(tmp_path / "out").pairs
    with pytest.raises(DataError, match="none of the 14 sites has changed"):
        run(settings_for((llama[0], llama[0]), tmp_path / "none", rank=2))
    assert not (tmp_path / "none" / "adapter_config.json").exists()


def test_nan_names_its_tensor(llama: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(llama[1] / "model.safetensors")
    tensors[f"{DOWN}.weight"][0, 0] = float("nan")
    (tmp_path / "tuned").mkdir()
    save_file(tensors, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.down_proj\.weight.*NaN"):
        run(settings_for((llama[0], tmp_path / "tuned"), tmp_path / "out", rank=2))


def test_a_plan_for_another_model_is_refused_with_near_names(
    llama: tuple[Path, Path], gpt2: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = plan_file(llama, tmp_path / "plan.json", {DOWN: 4})
    content = Path(plan).read_text().replace("layers\\\\.0", "layers\\\\.7").replace("layers.0", "layers.7")
    (tmp_path / "other.json").write_text(content)
    with pytest.raises(DataError, match=r"no site model\.layers\.7\.mlp\.down_proj; nearest: .*down_proj"):
        run(settings_for(llama, tmp_path / "out", plan=str(tmp_path / "other.json")))
    with pytest.raises(DataError, match="plan for another model"):
        run(settings_for(gpt2, tmp_path / "out", plan=plan))


def test_a_plan_of_no_parameters_is_refused_as_that(
    llama: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(llama, tmp_path / "plan.json", {DOWN: 4})
    content = json.loads(Path(plan).read_text())
    content["rank_pattern"] = dict.fromkeys(content["rank_pattern"], 0)
    del content["alpha_pattern"]
    Path(plan).write_text(json.dumps(content))
    assert main(["extract", *map(str, llama), "--plan", plan, "-o", str(tmp_path / "out")]) == 2
    assert "plan.json gives every site rank 0" in capsys.readouterr().err


def test_site_filters_narrow_a_plan_and_say_so(
    llama: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_file(llama, tmp_path / "plan.json", {DOWN: 4, "model.layers.1.self_attn.q_proj": 4})
    run(settings_for(llama, tmp_path / "out", plan=plan, sites=SitesSection(include="mlp")))
    assert list(read_adapter(tmp_path / "out").pairs) == [DOWN]
    assert "1 sites of the plan are left out" in capsys.readouterr().out


def test_what_cannot_work_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for options in (
        {"rank": 2},
        {"base": "a", "rank": 2},
        {"base": "a", "tuned": "b", "deltas": "c", "rank": 2},
        {"base": "a", "tuned": "b"},
        {"base": "a", "tuned": "b", "rank": 2, "plan": "p"},
        {"base": "a", "tuned": "b", "rank": 0},
        {"base": "a", "tuned": "b", "rank": 2, "sites": SitesSection(flatten_conv=True)},
    ):
        with pytest.raises(UsageError):
            check(ExtractConfig(**options))  # type: ignore[arg-type]
    assert main(["extract", "nowhere", "either", "--rank", "4", "-o", str(tmp_path / "out")]) == 3
    assert not (tmp_path / "out").exists()
