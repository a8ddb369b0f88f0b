"""Laws of intruder dimensions: PEFT's own as oracle, a planted one is found and scaled, what is not decided is not
claimed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from tiny import tiny_llama
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from rankwise import cli
from rankwise.core.factors import Factors
from rankwise.errors import DataError, UsageError
from rankwise.files.adapter import LoraPair, read_adapter
from rankwise.files.checkpoint import Weight
from rankwise.models.load import load_model
from rankwise.options.commands import CompressConfig, RanksConfig
from rankwise.ranks import compress, intruders
from rankwise.ranks.command import run as run_ranks
from rankwise.ranks.intruders import BaseMatrices, compare, examine, leading, scale_intruders
from rankwise.report.report import build_report

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]
ROOT = Path(__file__).parents[2]
RAW = Path("analysis_outputs/svd/raw_data/intruders.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), hidden_size=64, intermediate_size=96, num_hidden_layers=2)


def save_adapter(base: Path, folder: Path, rank: int = 4, std: float = 0.1) -> Path:
    """A LoRA adapter whose products are as large as the base's leading singular values."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(load_model(str(base), torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def peft_model(base: Path, adapter: Path) -> PeftModel:
    """In float64: in float32 PEFT's own rounding, of a few SVDs, is 1e-5 of ΔW."""
    model: PreTrainedModel = load_model(str(base), torch.float32)
    return PeftModel.from_pretrained(model, adapter).double()


def changes(model: PeftModel, name: str) -> dict[str, Tensor]:
    """Path → ΔW of an adapter of a PEFT model."""
    layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(name).detach() for path, layer in layers.items()
    }


@pytest.mark.parametrize("scale", [0.75, 0.0])
def test_peft_finds_and_scales_the_same(base: Path, adapter: Path, tmp_path: Path, scale: float) -> None:
    """Its `reduce_intruder_dimension` on the same adapter: as many at every site, the same ΔW."""
    model, told = peft_model(base, adapter), list[str]()
    reduce_intruder_dimension(model, mitigation_lambda=scale, logging_sink=told.append)
    counts = {line.partition(": ")[0]: line.rpartition(": ")[2] for line in told if ": " in line}
    wanted = {
        path.removeprefix("base_model.model."): 0 if said == "No intruders" else int(said)
        for path, said in counts.items()
    }
    compress.run(CompressConfig(str(adapter), intruders=scale, base_model=str(base), output_dir=str(tmp_path)))
    content = json.loads((tmp_path / "intruders.json").read_text())
    assert {row["path"]: len(row["intruders"]) for row in content["sites"]} == wanted
    assert 0 < content["intruders"] == sum(wanted.values())
    after, expected = read_adapter(tmp_path), changes(model, "intruder_reduced")
    assert after.pairs.keys() == expected.keys()
    before = changes(model, "default")
    for path, delta in expected.items():
        own = after.pairs[path].factors().product()
        assert float((own - delta).norm() / delta.norm()) < 1e-6, path
        assert wanted[path] == 0 or float((own - before[path]).norm() / delta.norm()) > 0.01, path


def test_a_planted_direction_is_the_only_intruder() -> None:
    torch.manual_seed(0)
    for rows, columns in ((48, 80), (80, 48)):
        u, values, vt = torch.linalg.svd(torch.randn(rows, columns, dtype=torch.float64), full_matrices=False)
        weight = (u * torch.linspace(2, 1, len(values)).double()) @ vt
        side = torch.randn(rows, 1, dtype=torch.float64), torch.randn(1, columns, dtype=torch.float64)
        planted = Factors(3 * side[0] / side[0].norm(), side[1] / side[1].norm())
        found = compare(weight.float(), planted)
        assert found.intruders == [0]
        pair = LoraPair.of(Factors(planted.left.float(), planted.right.float()).padded(2))
        for scale in (0.5, 0.0):
            scaled, kept = scale_intruders(pair, found, scale)
            whole = weight + scaled.factors().product().double()
            along = found.left[:, 0] @ whole @ found.right[0]
            assert kept == pytest.approx(1.0)
            assert float(along) == pytest.approx(scale * float(found.values[0]), abs=1e-5)
            assert scaled.rank == pair.rank
        assert scale_intruders(pair, found, 1.0)[0] is pair


def test_a_change_along_the_bases_own_directions_has_none(base: Path) -> None:
    """Where a cosine with W were not taken of all of its vectors, this would fail: σ₁₂ grows to be the largest."""
    torch.manual_seed(0)
    weight = torch.randn(40, 64, dtype=torch.float64)
    u, values, vt = torch.linalg.svd(weight, full_matrices=False)
    for at in (0, 11, 39):
        found = compare(weight, Factors(u[:, at : at + 1] * 2 * values[0], vt[at : at + 1]))
        assert not found.intruders
        assert float(found.cosines.min()) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
def test_the_iteration_finds_what_all_eigenvectors_give(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    decay = torch.cat([torch.linspace(3, 2, 12), torch.logspace(0, -2, min(shape) - 12)]).double()
    u, v = (torch.linalg.qr(torch.randn(n, min(shape), dtype=torch.float64)).Q for n in shape)
    left, right = (torch.randn(*size, dtype=torch.float64) / 8 for size in ((shape[0], 4), (4, shape[1])))
    weight, own = (u * decay) @ v.T, Factors(left, right)
    taken = list[object]()
    plain = intruders.certified
    monkeypatch.setattr(intruders, "certified", lambda *given: (taken.append(plain(*given)), taken[-1])[1])
    fast = compare(weight, own)
    assert [found is not None for found in taken] == [True]
    monkeypatch.setattr(intruders, "SHARE", 0.0)
    slow = compare(weight, own)
    torch.testing.assert_close(fast.values, slow.values, rtol=1e-10, atol=0)
    torch.testing.assert_close((fast.left * slow.left).sum(0).abs(), torch.ones_like(fast.values))
    torch.testing.assert_close(fast.cosines, slow.cosines, rtol=1e-6, atol=1e-6)
    u2, values, _ = torch.linalg.svd(weight + own.product(), full_matrices=False)
    torch.testing.assert_close(fast.values, values[: len(fast.values)], rtol=1e-9, atol=0)
    assert float((u2[:, : len(fast.values)] * fast.left).sum(0).abs().min()) > 1 - 1e-8


def test_an_iteration_that_misses_the_largest_is_not_taken() -> None:
    """Started orthogonally to the largest eigenvector, it converges to the next ones: the certificate tells."""
    values = torch.arange(1, 201, dtype=torch.float64)
    gram, start = torch.diag(values), torch.eye(200, dtype=torch.float64)[:, 180:199]
    assert intruders.certified(gram, start, 5) is None
    torch.testing.assert_close(leading(gram, start, 5)[0], values[-5:].flip(0))
    whole = intruders.certified(gram, torch.eye(200, dtype=torch.float64)[:, 181:], 5)
    assert whole is not None
    torch.testing.assert_close(whole[0], values[-5:].flip(0))


def test_ranks_counts_them_in_summary_json_and_report(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["ranks", str(base), "--adapter", str(adapter), "-o", str(tmp_path), "--no_plots"]) == 0
    said = capsys.readouterr().out
    content = json.loads((tmp_path / RAW).read_text())
    table, _ = examine(BaseMatrices.open(str(base)), read_adapter(adapter).pairs)
    assert content["intruders"] == table.count > 0
    assert table.sentence().startswith(f"{table.count:,} of {10 * len(table.rows):,} leading singular vectors")
    assert (
        f"{table.count} of {10 * len(table.rows)} leading singular vectors" in said
        and "about" in said
        and "matrices of the base" in said
    )
    page = build_report(tmp_path).read_text()
    assert table.sentence() in page.replace("&#43;", "+")
    assert all(str(row.site.path) in page for row in table.rows if len(row.intruders) == 10)
    run_ranks(RanksConfig(adapter=str(adapter), output_dir=str(tmp_path / "without"), no_plots=True))
    assert not (tmp_path / "without" / RAW).exists()
    run_ranks(RanksConfig(adapter=str(adapter), output_dir=str(tmp_path), no_plots=True))
    assert not (tmp_path / RAW).exists(), "the earlier run's, into the same folder"


def test_the_time_is_said_before_anything_is_read(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a dry run too, which reads no matrix and writes nothing."""
    monkeypatch.setattr(BaseMatrices, "read", None)
    lines = (["ranks", str(base), "--adapter", str(adapter)], ["compress", str(adapter), "--intruders", "0.5"])
    for line in lines:
        assert cli.main([*line, "-o", str(tmp_path / "out"), "--dry_run"]) == 0
        found = capsys.readouterr()
        assert "8 matrices of the base (largest 64 × 96), about" in found.err
        assert "intruder dimensions of base + adapter" in found.out
    assert not (tmp_path / "out").exists()


def test_scaled_and_truncated_at_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The size is of the scaled adapter: first the intruders, then the budget."""
    _, pairs = examine(BaseMatrices.open(str(base)), read_adapter(adapter).pairs, 0.5)
    options = CompressConfig(str(adapter), base_model=str(base), output_dir=str(tmp_path / "both"))
    compress.run(replace(options, intruders=0.5, budget="uniform:2", uniform=True))
    after = read_adapter(tmp_path / "both")
    for path, pair in after.pairs.items():
        wanted = pairs[path].factors().compress(2).product()
        torch.testing.assert_close(pair.factors().product(), wanted, rtol=0, atol=1e-5)
    compress.run(replace(options, intruders=1.0, output_dir=str(tmp_path / "same")))
    for path, pair in read_adapter(tmp_path / "same").pairs.items():
        own = read_adapter(adapter).pairs[path].factors().product()
        torch.testing.assert_close(pair.factors().product(), own, rtol=0, atol=1e-5)
    assert (tmp_path / "both" / "intruders.json").is_file()
    compress.run(replace(options, budget="uniform:2", uniform=True))
    assert not (tmp_path / "both" / "intruders.json").exists(), "scaled by the earlier run"


def test_what_has_no_count_is_named(base: Path, adapter: Path, tmp_path: Path) -> None:
    matrices = BaseMatrices.open(str(base))
    pair = read_adapter(adapter).pairs["model.layers.0.self_attn.q_proj"]
    experts = replace(pair, lora_A=pair.lora_A[None], lora_B=pair.lora_B[None])
    pairs = {"model.layers.0.self_attn.q_proj": pair, "lm_head": pair, "model.layers.0.mlp.experts.up": experts}
    table, after = examine(matrices, pairs, 0.5)
    assert table.skipped == ("lm_head", "model.layers.0.mlp.experts.up")
    assert "lm_head" in table.notes()[0] and table.content()["not_compared"] == list(table.skipped)
    assert after["lm_head"] is pair and after["model.layers.0.self_attn.q_proj"] is not pair
    assert not examine(matrices, {"lm_head": pair})[0].rows
    with pytest.raises(UsageError, match="experts, embeddings and heads"):
        matrices.require_comparable({"lm_head": pair})
    moved = Path(shutil.copytree(adapter, tmp_path / "moved")) / "adapter_config.json"
    moved.write_text(moved.read_text().replace(str(base), "org/nowhere"))
    with pytest.raises(DataError, match="not on this machine"):
        compress.run(CompressConfig(str(moved.parent), intruders=0.5, output_dir=str(tmp_path / "out")))
    wide = replace(pair, lora_A=torch.randn(4, 32))
    with pytest.raises(DataError, match=r"is \(64, 32\) in the adapter and \(64, 64\)"):
        examine(matrices, {"model.layers.0.self_attn.q_proj": wide})


def test_weights_that_are_not_plain_are_refused(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = BaseMatrices.open(str(base))
    with monkeypatch.context() as patch:
        patch.setattr(Weight, "read", lambda *_: torch.full((64, 64), torch.nan))
        with pytest.raises(DataError, match=r"_proj\.weight has entries that are NaN"):
            examine(matrices, read_adapter(adapter).pairs)
    monkeypatch.setattr(intruders, "WEIGHT_TYPES", (torch.float16,))
    with pytest.raises(DataError, match="stored as float32"):
        examine(matrices, read_adapter(adapter).pairs)


def test_a_transposed_layer_is_compared_by_its_outputs(tmp_path: Path) -> None:
    """GPT-2 stores (in, out); the count is that of the vectors on the output side all the same."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    base, path = BaseMatrices.open(str(tmp_path)), "transformer.h.0.attn.c_attn"
    weight = load_model(str(tmp_path), torch.float32).get_parameter(f"{path}.weight").detach().T
    own = Factors(torch.randn(96, 2) / 20, torch.randn(2, 32) / 4)
    table, _ = examine(base, {path: LoraPair.of(own, fan_in_fan_out=True)})
    left, _, _ = torch.linalg.svd(weight + own.product(), full_matrices=False)
    cosines = (torch.linalg.svd(weight, full_matrices=False)[0].T @ left).abs().amax(0)[:10]
    torch.testing.assert_close(torch.tensor(table.rows[0].cosines), cosines, rtol=0, atol=1e-3)


def test_the_documented_figures_are_the_measured_ones() -> None:
    """Of the tables every row; of the sentences below them what they rest on."""
    results = ROOT / "benchmarks" / "results"
    page = (results / "after_training.md").read_text(encoding="utf-8").splitlines()
    doc = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8").splitlines()
    first, last = doc.index("## Compress: a smaller adapter, exactly"), doc.index("## Merge: adapter into base")
    rows = [line for line in doc[first:last] if line.startswith("| ")]
    assert len(rows) == 20 and [row for row in rows if row not in page] == []
    every = json.loads((results / "after_training.json").read_text(encoding="utf-8"))
    told, smol = every["stories260K × E2E"], every["SmolLM2-135M × E2E"]
    variants, gain, pairs = told["variants"], told["gain"], told["pairs"]
    assert pairs["budget − uniform, 25 %"][1] > 0.15 and pairs["sigma − uniform, 25 %"][1] > 0
    tenth = [variants[f"{way} 10"] for way in ("budget", "sigma", "uniform")]
    assert max(row["loss"] for row in tenth) - min(row["loss"] for row in tenth) < 0.05
    assert all(0.38 < row["over_full"][0] / gain < 0.45 for row in tenth)
    spent = [variants[f"{way} 25"]["parameters"] for way in ("budget", "sigma", "uniform")]
    assert max(spent) / min(spent) < 1.005
    scaled = [variants[f"intruders {scale:g}"] for scale in (1, 0.75, 0.5, 0.25, 0)]
    for name in ("kl_answer", "kl_prompt"):
        assert all(more[name][1] > less[name][2] for more, less in pairwise(scaled)), "KL falls with every step of λ"
    assert all(more["over_full"][2] < less["over_full"][1] for more, less in pairwise(scaled)), "and the loss rises"
    assert scaled[1]["over_full"][0] / gain < 0.015 and abs(scaled[0]["over_full"][0]) < 1e-6
    lost = {name: row["over_full"][0] / smol["gain"] for name, row in smol["variants"].items()}
    ways = ("budget", "sigma", "uniform")
    assert all(0.025 < lost[f"{way} 25"] < 0.04 and 0.085 < lost[f"{way} 10"] < 0.11 for way in ways)
    pairs = smol["pairs"]
    assert pairs["budget − uniform, 25 %"][2] < 0 < pairs["budget − uniform, 10 %"][1]
    assert all(pairs[f"sigma − uniform, {size} %"][1] > 0 > pairs[f"budget − sigma, {size} %"][2] for size in (10, 25))
    assert all(smol["variants"][f"intruders {scale:g}"]["intruders"] == 0 for scale in (1, 0.75, 0.5, 0.25, 0))
