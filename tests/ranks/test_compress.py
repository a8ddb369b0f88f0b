"""Laws of `compress`: the asked energy and not one rank more, the best factors there are, the rest untouched."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.cli import main
from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import describe
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraAdapter, LoraPair, read_adapter, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.plan import write_plan
from rankwise.options.commands import CompressConfig
from rankwise.ranks.compress import check, compress_adapter, run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SOUND = [
    "dialogpt-small-patient_r4",
    "distilbert-imdb_r8",
    "gemma3-270m-svg_r4_main",
    "gemma3-270m-svg_r4_seed123",
    "gemma3-270m-svg_r4_stage1",
    "gpt-neo-125m-movies_r8",
    "gpt2-cls-bin_r8",
    "gpt2-cls_r8",
    "gpt2-great-bin_r8",
    "gpt2-medium-therapy_r8",
    "loralib_roberta-base-mnli_r8",
    "open-calm-1b-fp16_r1",
    "opt-125m-bf16_r16",
]


def inner(left: Tensor, right: Tensor) -> float:
    """‖left·right‖²_F = tr(LᵀL · RRᵀ), without the dense matrix and without any SVD."""
    left, right = left.double(), right.double()
    return float(((left.T @ left) * (right @ right.T)).sum())


def energies(pair: LoraPair) -> Tensor:
    """Squared singular values of scale·B·A: eigenvalues of an r×r matrix, another way than QR."""
    b, a = pair.lora_B.double() * pair.scale, pair.lora_A.double()
    lower = torch.linalg.cholesky(b.T @ b + 1e-300 * torch.eye(b.shape[1]))
    return torch.linalg.eigvalsh(lower.T @ (a @ a.T) @ lower).flip(0).clamp(min=0)


def difference(one: LoraPair, other: LoraPair) -> float:
    """‖Δ₁ − Δ₂‖²_F."""
    left = torch.cat([one.lora_B.double() * one.scale, -other.lora_B.double() * other.scale], 1)
    return inner(left, torch.cat([one.lora_A.double(), other.lora_A.double()]))


def random_adapter(ranks: dict[str, int], seed: int = 0, rows: int = 12, columns: int = 10) -> LoraAdapter:
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        path: LoraPair(
            torch.randn(rank, columns, generator=generator) * (0.5 ** torch.arange(rank))[:, None],
            torch.randn(rows, rank, generator=generator),
            scale=1.5,
        )
        for path, rank in ranks.items()
    }
    return LoraAdapter(lora_config("org/base"), pairs)


@pytest.mark.parametrize("name", SOUND)
def test_real_adapters_keep_exactly_the_asked_energy(name: str, shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data / "adapters" / name
    scale = 2.0 if name.startswith("loralib") else None
    energy = 0.9
    run(CompressConfig(adapter=str(folder), energy=energy, scale=scale, output_dir=str(tmp_path)))
    before, after = read_adapter(folder, scale), read_adapter(tmp_path)
    assert after.pairs.keys() == before.pairs.keys()
    for path, pair in after.pairs.items():
        original = before.pairs[path]
        squares = energies(original)
        kept = squares.cumsum(0) / squares.sum()
        assert float(kept[pair.rank - 1]) >= energy - 1e-7, path
        assert pair.rank == 1 or float(kept[pair.rank - 2]) < energy + 1e-7, f"{path}: one rank less would do"
        lost, rounding = float(squares[pair.rank :].sum()), 1e-9 * float(squares.sum())
        assert difference(original, pair) == pytest.approx(lost, rel=1e-3, abs=rounding)
        assert pair.fan_in_fan_out == original.fan_in_fan_out
        assert pair.lora_A.dtype == pair.lora_B.dtype == torch.float32
    assert after.extra.keys() == before.extra.keys()
    assert all(torch.equal(tensor, before.extra[key]) for key, tensor in after.extra.items())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken_gemma-2b-allNaN_r16", "NaN"),
        ("notlora_gpt2-prompt-tuning", "PROMPT_TUNING"),
        ("zeroB_stella-400m_r16", "every B·A is zero"),
    ],
)
def test_unsound_adapters_are_refused_by_name(name: str, reason: str, shared_data: Path, tmp_path: Path) -> None:
    config = CompressConfig(adapter=str(shared_data / "adapters" / name), energy=0.9, output_dir=str(tmp_path))
    with pytest.raises(DataError, match=reason) as caught:
        run(config)
    assert name in str(caught.value)
    assert not (tmp_path / "adapter_config.json").exists()


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 8),
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    energy=st.floats(0.05, 1),
    seed=st.integers(0, 99),
)
def test_no_factors_of_that_rank_come_closer(rank: int, rows: int, columns: int, energy: float, seed: int) -> None:
    adapter = random_adapter({"q": rank}, seed, rows, columns)
    smaller, fidelity = compress_adapter(adapter, CompressConfig(adapter="a", energy=energy))
    dense = adapter.pairs["q"].factors().product().double()
    squares = torch.linalg.svdvals(dense).square()
    found = smaller.pairs["q"].rank
    error = float((dense - smaller.pairs["q"].factors().product().double()).square().sum())
    assert error == pytest.approx(float(squares[found:].sum()), rel=1e-3, abs=1e-9 * float(squares.sum()))
    assert float(squares[:found].sum() / squares.sum()) >= energy - 1e-6
    assert fidelity.energy_kept == pytest.approx(1 - error / float(squares.sum()), abs=1e-5)


@pytest.mark.parametrize("normalise", ["none", "site"])
def test_a_budget_is_kept_and_spent_where_the_energy_is(normalise: str) -> None:
    adapter = random_adapter({"a.q": 8, "b.q": 8, "c.q": 8})
    strong = replace(adapter.pairs["a.q"], scale=30.0)
    adapter = replace(adapter, pairs={**adapter.pairs, "a.q": strong})
    smaller, fidelity = compress_adapter(adapter, CompressConfig(adapter="a", budget="uniform:3", normalise=normalise))
    assert fidelity.parameters <= 3 * 3 * 22
    uniform, same_size = compress_adapter(adapter, CompressConfig(adapter="a", budget="uniform:3", uniform=True))
    assert {pair.rank for pair in uniform.pairs.values()} == {3}
    assert same_size.parameters == 3 * 3 * 22
    if normalise == "none":
        assert fidelity.energy_kept >= same_size.energy_kept - 1e-9
        assert smaller.pairs["a.q"].rank > 3
    else:
        mean = sum(row.energy_kept for row in fidelity.rows) / 3
        assert mean >= sum(row.energy_kept for row in same_size.rows) / 3 - 1e-9


def test_one_threshold_keeps_the_largest_singular_values_of_all_sites() -> None:
    """Whatever a rank costs: what is kept is above what is not, up to the first value that did not fit."""
    small, large = random_adapter({"small": 4}), random_adapter({"large": 4}, 1, rows=60, columns=50)
    first = [float(energies(pair)[0]) for one in (small, large) for pair in one.pairs.values()]
    wider = replace(large.pairs["large"], scale=1.5 * (2 * first[0] / first[1]) ** 0.5)  # its largest σ²: twice small's
    adapter = LoraAdapter(small.config, {**small.pairs, "large": wider})
    squares = {path: energies(pair) for path, pair in adapter.pairs.items()}
    for budget in (110, 154, 264, 400):
        after, _ = compress_adapter(adapter, CompressConfig(budget=str(budget), metric="sigma"))
        ranks = {path: after.pairs[path].rank if path in after.pairs else 0 for path in adapter.pairs}
        spent = 22 * ranks["small"] + 110 * ranks["large"]
        assert spent <= budget
        kept = min(float(squares[path][rank - 1]) for path, rank in ranks.items() if rank)
        cost = {"small": 22, "large": 110}
        for path, rank in ranks.items():
            if rank < 4 and float(squares[path][rank]) > kept * (1 + 1e-6):
                assert spent + cost[path] > budget, (budget, ranks)
    energy, _ = compress_adapter(adapter, CompressConfig(budget="110"))
    sigma, _ = compress_adapter(adapter, CompressConfig(budget="110", metric="sigma"))
    assert energy.pairs.keys() == {"small"} and sigma.pairs.keys() == {"large"}, "the cost of a rank counts in one only"


def test_a_budget_that_buys_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="below rank 1"):
        compress_adapter(random_adapter({"q": 4}), CompressConfig(adapter="a", budget="10"))


def test_a_plan_gives_ranks_to_the_adapters_own_sites(tmp_path: Path) -> None:
    adapter = random_adapter({"layers.0.q_proj": 4, "layers.1.q_proj": 4, "layers.2.q_proj": 4})
    write_adapter(tmp_path / "first", adapter)
    asked = {"layers.0.q_proj": 2, "layers.1.q_proj": 0, "layers.2.q_proj": 5}
    sites = {path: describe(path, (12, 10)) for path in asked}
    write_plan(tmp_path / "plan.json", RankPlan(tuple(PlannedSite(sites[path], rank) for path, rank in asked.items())))
    smaller = ["--plan", str(tmp_path / "plan.json"), "-o", str(tmp_path / "out")]
    assert main(["compress", str(tmp_path / "first"), *smaller]) == 0
    pairs = read_adapter(tmp_path / "out").pairs
    assert {path: pair.rank for path, pair in pairs.items()} == {"layers.0.q_proj": 2, "layers.2.q_proj": 4}
    assert difference(pairs["layers.2.q_proj"], adapter.pairs["layers.2.q_proj"]) == pytest.approx(0, abs=1e-6)
    assert main(["compress", str(tmp_path / "first"), *smaller, "--energy", "0.9"]) == 2


@pytest.mark.parametrize("energy", [None, 0.9])
def test_the_uniform_form_has_the_same_product_and_no_patterns(energy: float | None, tmp_path: Path) -> None:
    adapter = random_adapter({"a.q": 6, "b.q": 3, "c.q": 5})
    adapter = replace(adapter, pairs={**adapter.pairs, "b.q": replace(adapter.pairs["b.q"], scale=0.25)})
    plain, _ = compress_adapter(adapter, CompressConfig(adapter="a", energy=energy or 1.0))
    uniform, _ = compress_adapter(adapter, CompressConfig(adapter="a", energy=energy, uniform=True))
    assert len({pair.rank for pair in uniform.pairs.values()}) == 1
    for path, pair in uniform.pairs.items():
        torch.testing.assert_close(pair.factors().product(), plain.pairs[path].factors().product())
    write_adapter(tmp_path, uniform)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {} and config["alpha_pattern"] == {}
    assert config["lora_alpha"] == 2 * config["r"] == 2 * next(iter(uniform.pairs.values())).rank


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_hidden_layers=2, **sizes)).eval()


def peft_folder(folder: Path, rank: int, seed: int, **config: object) -> Path:
    model = get_peft_model(tiny_model(), LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], **config))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def logits_with(folder: Path) -> Tensor:
    model = get_peft_model(tiny_model(), LoraConfig.from_pretrained(str(folder)))
    loaded = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    with torch.no_grad():
        return model.eval()(torch.arange(16)[None]).logits


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_it_and_computes_the_same(tmp_path: Path, use_rslora: bool) -> None:
    original = peft_folder(tmp_path / "original", 6, 1, use_rslora=use_rslora, rank_pattern={"down_proj": 3})
    run(CompressConfig(adapter=str(original), energy=1.0, output_dir=str(tmp_path / "same")))
    run(CompressConfig(adapter=str(original), uniform=True, output_dir=str(tmp_path / "uniform")))
    expected = logits_with(original)
    for form in ("same", "uniform"):
        torch.testing.assert_close(logits_with(tmp_path / form), expected, rtol=1e-3, atol=1e-4)
        config = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert config["use_rslora"] is False and config["lora_alpha"] == 2 * config["r"]


def test_the_uniform_forms_of_two_adapters_swap_in_a_running_model(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        folder = peft_folder(tmp_path / f"{name}_original", 6, seed, rank_pattern={"down_proj": 3})
        run(CompressConfig(adapter=str(folder), uniform=True, output_dir=str(tmp_path / name)))
    model = get_peft_model(tiny_model(), LoraConfig.from_pretrained(str(tmp_path / "one")))
    set_peft_model_state_dict(model, load_peft_weights(str(tmp_path / "one"), device="cpu"))
    hotswap_adapter(model, str(tmp_path / "two"), adapter_name="default", torch_device="cpu")
    with torch.no_grad():
        swapped = model.eval()(torch.arange(16)[None]).logits
    torch.testing.assert_close(swapped, logits_with(tmp_path / "two"))


def test_what_is_written_is_recorded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = random_adapter({"a.q": 6, "b.q": 6}).pairs
    zero = replace(pairs["b.q"], lora_B=torch.zeros(12, 6))
    write_adapter(tmp_path / "original", LoraAdapter(lora_config("org/base"), {"a.q": pairs["a.q"], "b.q": zero}))
    assert main(["compress", str(tmp_path / "original"), "--energy", "0.8", "-o", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "1 site (b.q …): its product is zero: left out" in printed
    assert "1 site · rank" in printed
    content = json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert content["parameters_before"] == 2 * 6 * 22
    assert [row["rank_before"] for row in content["sites"]] == [6, 6]
    assert content["energy_kept"] >= 0.8
    entry = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["compress"]
    assert "fingerprint" in entry["inputs"]["adapter"]
    assert not any("b.q" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))


def test_what_cannot_work_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, random_adapter({"q": 2}))
    for options in (
        {},
        {"adapter": str(tmp_path)},
        {"adapter": str(tmp_path), "energy": 0.9, "budget": "100"},
        {"adapter": str(tmp_path), "energy": 1.5},
        {"adapter": str(tmp_path), "energy": 0.9, "scale": -1.0},
        {"adapter": str(tmp_path), "energy": 0.9, "output_dir": str(tmp_path)},
        {"adapter": str(tmp_path), "energy": 0.9, "metric": "sigma"},
        {"adapter": str(tmp_path), "budget": "100", "metric": "sigma", "uniform": True},
        {"adapter": str(tmp_path), "intruders": 1.5},
    ):
        with pytest.raises(UsageError):
            check(CompressConfig(**options))  # type: ignore[arg-type]
    check(CompressConfig(adapter="not/made/yet", energy=0.9))
