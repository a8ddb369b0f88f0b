"""K-quants of a mixture: llama.cpp's quantizer keeps every expert its own, and llama.cpp runs what it wrote.

The tiny mixtures' widths are no multiples of 256, the block of a K-quant: this one's are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import exported
import exported_experts
import pytest
import torch

pytest.importorskip("gguf")

from rankwise.device.parity.floor import measure_floor
from rankwise.errors import UsageError, VerificationError
from rankwise.files.checkpoint import open_checkpoint
from rankwise.files.gguf import GGUFFile
from rankwise.gguf import quantize as module
from rankwise.gguf.export import changed_keys, tuning_kept
from rankwise.gguf.plan import plan_export
from rankwise.gguf.provenance import origins
from rankwise.gguf.quantize import quantize, quantizer, rounding_of
from rankwise.gguf.view import model_view
from rankwise.options.commands import ExportConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1] / "device"))
from shipbench_gguf import altered
from test_parity_experts import climbed, exchange, ladder, side

STACKS = [f"blk.{layer}.ffn_{name}_exps.weight" for layer in (0, 1) for name in ("gate", "up", "down")]
TYPES = {"q6_k": {"Q6_K"}, "q4_k_m": {"Q4_K", "Q6_K"}, "q3_k_m": {"Q3_K", "Q4_K"}, "q4_0": {"Q4_0"}}


def there() -> bool:
    try:
        return bool(quantizer())
    except UsageError:
        return False


needs_quantizer = pytest.mark.skipif(not there(), reason="no llama-quantize and no llama-cpp-python on this machine")


@pytest.fixture(scope="module")
def wide(converter: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, model and export/model-f32.gguf, model-f16.gguf of a Mixtral of width 256, inside and out."""
    folder = tmp_path_factory.mktemp("wide")
    model = exported_experts.mixture("mixtral", folder, inner=256, hidden_size=256, head_dim=64)
    told = exported_experts.taught(exported.installed_converter(), model, folder / "converter")
    plan = plan_export(ExportConfig(model=str(model), outtype=["f32", "f16"]), told)
    (folder / "export").mkdir()
    files = {form: folder / "export" / plan.file(form) for form in ("f32", "f16")}
    with model_view(plan.model, plan.changes, plan.name) as view:
        lines = [
            [str(view), "--model-name", "model", "--outtype", form, "--outfile", str(file)]
            for form, file in files.items()
        ]
        told._run(["-c", exported_experts.DRIVER, json.dumps(lines)], list(files.values()), str(folder))
    return folder


@needs_quantizer
@pytest.mark.parametrize("form", TYPES)
def test_every_expert_is_its_own(form: str, wide: Path, tmp_path: Path) -> None:
    source = GGUFFile(wide / "export" / "model-f16.gguf")
    made = GGUFFile(quantize(source.path, tmp_path / f"model-{form}.gguf", form, threads=1).path)
    assert {made.tensors[name].type for name in STACKS} == TYPES[form]
    for name in STACKS:
        pairs = list(zip(source.parts(name), made.parts(name), strict=True))
        limit = rounding_of(made.tensors[name].type)
        errors = [float((after - before).norm() / before.norm()) for before, after in pairs]
        assert limit / 6 < max(errors) < limit / 2, "neither loose nor near to a false alarm"
        other = float((pairs[0][1] - pairs[1][0]).norm() / pairs[1][0].norm())
        assert other > 1
    model, base = (open_checkpoint(wide / name) for name in ("model", "base"))
    whole = GGUFFile(wide / "export" / "model-f32.gguf")
    rows = tuning_kept(made, origins(whole, model), base, model, changed_keys(base, model))
    assert {row.name for row in rows} >= {f"{name}, expert {number}" for name in STACKS for number in range(4)}
    assert not any(row.lost for row in rows)


@needs_quantizer
@pytest.mark.slow
def test_llama_cpp_runs_them(wide: Path, tmp_path: Path) -> None:
    """Its log-probabilities are off by what the bits explain, KL being quadratic in the rounding; two experts exchanged
    are off by more."""
    pytest.importorskip("xllamacpp")
    reference, cases = side(wide / "model")
    limits, apart = measure_floor(reference, cases).thresholds("q8_0"), {}
    for form in ("q8_0", "q6_k", "q4_k_m"):
        file = quantize(wide / "export" / "model-f16.gguf", tmp_path / f"model-{form}.gguf", form, threads=1).path
        apart[form] = ladder(climbed(reference, cases, file), limits, file)["logprobs"].measured["kl_mean"]
    assert 4 < apart["q6_k"] / apart["q8_0"] < 40, "2 bits: 16"
    assert apart["q4_k_m"] > 4 * apart["q6_k"]
    with altered(tmp_path / "model-q6_k.gguf", tmp_path / "wrong-q6_k.gguf") as draft:
        exchange(draft, STACKS[5])
    wrong = ladder(climbed(reference, cases, tmp_path / "wrong-q6_k.gguf"), limits, tmp_path / "wrong-q6_k.gguf")
    assert wrong["logprobs"].measured["kl_mean"] > 4 * apart["q6_k"]


def test_an_expert_in_anothers_place_is_named(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exchanges(command: Sequence[str], source: Path, *_: Any) -> None:
        with altered(source, Path(command[-2])) as draft:
            values, kind = draft.tensors[STACKS[1]]
            draft.tensors[STACKS[1]] = values[[1, 0, 2, 3]], kind

    monkeypatch.setattr(module, "quantizer", lambda *_: ["llama-quantize"])
    monkeypatch.setattr(module, "_run", exchanges)
    with pytest.raises(
        VerificationError, match=rf"{STACKS[1]}, matrix 0, {STACKS[1]}, matrix 1: not the source's values"
    ):
        quantize(wide / "export" / "model-f16.gguf", tmp_path / "out" / "q.gguf", "q4_0")
    assert not list((tmp_path / "out").iterdir())


def test_a_limit_of_every_type() -> None:
    assert [rounding_of(kind) for kind in ("F16", "Q8_0", "Q6_K", "Q4_K", "IQ4_XS", "Q2_K", "IQ1_S")] == [
        2**-9,
        2**-6,
        2**-4,
        2**-2,
        2**-2,
        0.9,
        0.9,
    ]
    assert rounding_of("F32") < torch.finfo(torch.float32).eps * 4
