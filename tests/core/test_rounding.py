"""Rounding is seen for what it is: by the digits of the values, under both histories that the files allow.

Every pair is written to files and goes through `rankwise ranks` or `rankwise extract`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import generator
from safetensors.torch import save_file
from torch import Tensor

from rankwise import cli
from rankwise.core.measure import energy_of, exact_spectrum, subtract
from rankwise.core.rounding import Digits
from rankwise.files.plan import PLAN_FILE, read_plan

RAW = Path("analysis_outputs/svd/raw_data/detailed_svd_analysis.json")
KEYS = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
EXACT = ["--no_plots", "--min_rank", "1"]
UNSMOOTHED = ["--smoothing_factor", "0"]  # acts with a threshold only
FIRST, BOTH = False, True  # histories: whether the base was rounded as well


def change(rms: float, shape: tuple[int, int], rank: int, seed: int) -> Tensor:
    draw = generator(seed)
    low = torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)
    return low * rms / low.square().mean().sqrt()


def weights(
    rms: float, dtype: torch.dtype, both: bool, shape: tuple[int, int] = (256, 256), rank: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Weights of 0.02 before and after a change of known rank, as `dtype` keeps them; both: of float32 weights."""
    weight = 0.02 * torch.randn(shape, generator=generator(seed + 1000))
    before = weight if both else weight.to(dtype).float()
    return before.to(dtype), (before + change(rms, shape, rank, seed)).to(dtype)


def write(folder: Path, pairs: list[tuple[Tensor, Tensor]]) -> list[str]:
    names = []
    for index, name in enumerate(("base", "tuned")):
        save_file(
            {key: pair[index].clone() for key, pair in zip(KEYS, pairs, strict=False)},
            folder / f"{name}.safetensors",
        )
        names.append(str(folder / f"{name}.safetensors"))
    return names


def ranks(folder: Path, pairs: list[tuple[Tensor, Tensor]], *argv: str, code: int = 0) -> dict[str, int]:
    files = write(folder, pairs)
    assert (
        cli.main(
            ["ranks", *files, "--out", str(folder / "out"), *EXACT, *([] if "--budget" in argv else UNSMOOTHED), *argv]
        )
        == code
    )
    if code:
        assert not (folder / "out" / PLAN_FILE).exists()
        return {}
    return read_plan(folder / "out").ranks


def details(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "out" / RAW).read_text())["sites"].values())


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bf16_training_has_bf16_noise_whatever_type_holds_it(tmp_path: Path, stored: torch.dtype) -> None:
    """Measured by the container, the noise of float16 files is 64-fold too small and ranks of 6 read 26 and 68."""
    pairs = [tuple(half.to(stored) for half in weights(2e-4, torch.bfloat16, FIRST, rank=6, seed=s)) for s in (0, 1)]
    found = ranks(tmp_path, pairs, "--energy", "0.95")  # type: ignore[arg-type]
    assert set(found.values()) == {6}
    (first, second) = details(tmp_path)
    assert first["stored_as"] == second["stored_as"] == "bfloat16"
    assert 0.02 < first["noise_share"] < 0.04


def test_each_tensor_has_its_own_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A float32 file with one matrix from bfloat16 training, and one from float32 training on that base."""
    before, after = (half.float() for half in weights(2e-4, torch.bfloat16, FIRST, rank=6))
    finer = before + change(2e-4, (256, 256), 6, 5)
    ranks(tmp_path, [(before, after), (before, finer)], "--energy", "0.95")
    assert [row["stored_as"] for row in details(tmp_path)] == ["bfloat16", "float32"]
    assert [row["noise_share"] > 0 for row in details(tmp_path)] == [True, False]
    assert "stored as bfloat16 + float32" in capsys.readouterr().out


def test_one_float32_value_anywhere_is_float32(tmp_path: Path) -> None:
    """Not in the rows that a sample looks at, either."""
    before, after = (half.float() for half in weights(2e-4, torch.bfloat16, FIRST))
    after[255, 255] += 1e-6
    delta = subtract(before, after)
    assert (delta.stored_as, delta.noise_share) == ("float32", 0.0)


def test_zero_and_unchanged_tensors_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = 0.02 * torch.randn(256, 256, generator=generator(0)).bfloat16().float()
    cleared = before + change(2e-4, (256, 256), 6, 0)
    assert subtract(before, torch.zeros(256, 256)).stored_as is None
    assert subtract(before, before.clone()).stored_as is None
    ranks(tmp_path, [(before, before.clone()), (before, cleared)])
    assert [row["stored_as"] for row in details(tmp_path)] == [None, "float32"]
    assert "stored as float32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float8_e4m3fn, 1.0), (torch.float8_e4m3fn, 2.0**-7), (torch.float8_e5m2, 2.0**-5)]
)
def test_eight_bit_floats_are_seen_through(tmp_path: Path, dtype: torch.dtype, scale: float, capsys: Any) -> None:
    """Weights that went through fp8, scaled by a power of two, in a bfloat16 file: the change is below their steps."""
    before, after = weights(1e-3, torch.float32, FIRST)
    kept = tuple(((half / scale).to(dtype).float() * scale).bfloat16() for half in (before, after))
    ranks(tmp_path, [kept], code=3)  # type: ignore[list-item]
    assert f"{str(dtype).removeprefix('torch.')} weights" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [4, 8])
def test_dequantized_weights_are_refused(tmp_path: Path, bits: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Integers times a scale per row (8 bits) or per 64 entries (4 bits), which no significand shows."""
    before, after = weights(1e-4 if bits == 8 else 1e-3, torch.bfloat16, FIRST)
    groups = after.float().reshape(-1, 256 if bits == 8 else 64)
    scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    coarse = ((groups / scale).round() * scale).reshape(256, 256).bfloat16()
    ranks(tmp_path, [(before, coarse)], code=3)
    assert "quantized weights" in capsys.readouterr().err
    assert subtract(before, after).stored_as == "bfloat16"


def test_a_narrow_range_of_bf16_values_is_not_taken_for_quantized() -> None:
    """Weights within one binade have 256 values in bfloat16, as many as 8-bit codes, but next to each other."""
    before = (1 + torch.rand(256, 512, generator=generator(0))).bfloat16()
    after = (before.float() + 0.05 * torch.randn(256, 512, generator=generator(1))).clamp(1, 1.99).bfloat16()
    assert subtract(before, after).stored_as == "bfloat16"


def test_float16_has_no_finer_steps_below_its_smallest_number() -> None:
    """Weights of 1e-5 in float16 are rounded to multiples of 6e-8, not to 11 digits."""
    weight = 1e-5 * torch.randn(256, 512, generator=generator(0))
    for kind in (torch.float16, torch.bfloat16):
        delta = subtract(torch.zeros(256, 512), weight.to(kind).half())
        assert delta.rounding_energy == pytest.approx(energy_of(weight.to(kind).half().float() - weight), rel=0.15)


@settings(max_examples=20)
@given(
    dtype=st.sampled_from([torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16]),
    stored=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_the_coarsest_format_that_reproduces_the_values_is_found(
    dtype: torch.dtype, stored: torch.dtype, seed: int
) -> None:
    values = torch.randn(64, 64, generator=generator(seed)).to(dtype).float().to(stored)
    digits = Digits(stored)
    digits.see(values.float(), torch.ones(64, 64))
    coarser = max(torch.finfo(dtype).eps, torch.finfo(stored).eps)
    assert digits.format is not None
    assert torch.finfo(digits.format).eps == coarser


@settings(max_examples=10, deadline=None)
@given(
    rms=st.floats(1.5e-4, 1e-3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    both=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_noise_of_either_history_is_what_a_simulation_has(
    rms: float, dtype: torch.dtype, both: bool, seed: int
) -> None:
    """One rounding, or two independent ones, against the change itself."""
    rms = rms / (1 if dtype is torch.bfloat16 else 8)
    before, after = weights(rms, dtype, both, (256, 256), seed=seed)
    delta = subtract(before, after)
    true_noise = energy_of(delta.matrix - change(rms, (256, 256), 8, seed))
    expected = delta.rounding_energy + (delta.base_rounding if both else 0.0)
    assert expected == pytest.approx(true_noise, rel=0.12)


@pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 5e-5), (torch.float16, 6.25e-6)])
def test_ranks_that_depend_on_the_history_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype, rms: float
) -> None:
    """The change has rank 8; corrected for one rounding where there were two it reads 128 at every site."""
    pairs = [weights(rms, dtype, BOTH, (512, 512))]
    ranks(tmp_path, pairs, code=3)
    error = capsys.readouterr().err
    assert "At 1 of 1 sites the ranks differ by more than a factor of 2" in error
    assert "128 if only the tuned weights were rounded, 7 if the base was as well" in error
    assert "save float32 deltas (`rankwise finetune`" in error
    found = ranks(tmp_path, pairs, "--allow_noise")
    assert set(found.values()) == {128}
    plan = read_plan(tmp_path / "out")
    assert {row.rank_if_base_rounded for row in plan.sites} == {7}
    assert "THESE RANKS ARE IN DOUBT" in plan.doubt
    assert {row["rank_if_base_rounded"] for row in details(tmp_path)} == {7}
    rounding = plan.metadata["rounding"]
    assert rounding["noise_share_if_base_rounded"] == pytest.approx(2 * rounding["noise_share"], rel=0.02)
    shown = capsys.readouterr().out
    assert "if only the tuned weights were rounded: ranks 128 to 128" in shown
    assert "if the base was, too: ranks 7 to 7" in shown


def test_a_little_noise_decides_near_a_threshold_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2.6 % of noise, half of it left in one history: at 90 % both say 8, at 99 % one of them says 128."""
    ranks(tmp_path, [weights(2e-4, torch.bfloat16, BOTH)], "--energy", "0.99", code=3)
    assert "differ by more than a factor of 2" in capsys.readouterr().err


@pytest.mark.parametrize("both", [FIRST, BOTH])
@pytest.mark.parametrize(("dtype", "rms"), [(torch.bfloat16, 2e-4), (torch.float16, 2.5e-5)])
def test_a_large_change_is_planned_as_from_float32_whatever_the_history(
    tmp_path: Path, dtype: torch.dtype, rms: float, both: bool
) -> None:
    pairs = [weights(rms, dtype, both, seed=seed) for seed in (0, 1)]
    found = ranks(tmp_path, pairs)
    exact = [
        exact_spectrum(change(rms, (256, 256), 8, seed), energy_of(change(rms, (256, 256), 8, seed))) for seed in (0, 1)
    ]
    assert [spectrum.rank_for(0.9) for spectrum in exact] == [7, 7]
    assert all(rank == 7 or (both and rank == 8) for rank in found.values())
    assert read_plan(tmp_path / "out").doubt == ""


def test_one_history_is_left_where_the_tuned_weights_are_float32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They trained from these very values; nothing is corrected, however small the change."""
    before = weights(0.0, torch.bfloat16, FIRST)[0]
    found = ranks(tmp_path, [(before, before.float() + change(2e-5, (256, 256), 8, 0))])
    assert list(found.values()) == [7]
    assert "Rounding" not in capsys.readouterr().out


def test_a_base_coarser_than_the_change_was_not_rounded_after_it() -> None:
    """An fp8 base's own rounding would have made more energy than the delta has: that history is ruled out."""
    weight = (0.02 * torch.randn(256, 256, generator=generator(0))).to(torch.float8_e4m3fn).float()
    delta = subtract(weight, (weight + change(2e-4, (256, 256), 8, 0)).bfloat16())
    assert delta.base_rounding > delta.energy
    assert delta.noise_share_both == 1.0


def test_a_budget_says_both_and_does_not_refuse_what_costs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight directions hold all that there is; what a larger budget buys beyond them is noise in either history."""
    pairs = [weights(1e-4, torch.bfloat16, BOTH, (256, 384), seed=seed) for seed in (0, 1)]
    found = ranks(tmp_path, pairs, "--budget", "uniform:16")
    assert min(found.values()) >= 8
    assert {row.rank_if_base_rounded for row in read_plan(tmp_path / "out").sites} == {8}
    assert "if the base was, too: ranks 8 to 8" in capsys.readouterr().out


def test_a_threshold_near_one_is_not_reached_by_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """0.4 % of noise is little at 90 % and decides at 99.9 %."""
    pair = [weights(5e-4, torch.bfloat16, FIRST)]
    assert list(ranks(tmp_path, pair, "--energy", "0.999").values()) == [8]
    assert "spectra corrected for it" in capsys.readouterr().out


def test_extract_says_how_much_of_what_it_keeps_may_be_rounding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = write(tmp_path, [weights(1e-4, torch.bfloat16, BOTH)])
    assert cli.main(["extract", *files, "--rank", "16", "-o", str(tmp_path / "adapter")]) == 0
    assert "bfloat16 weights: more than 10% of the delta's energy may be rounding" in capsys.readouterr().out


def test_infinite_noise_shares_cannot_be() -> None:
    """float16 overflow is an infinite weight, which is an error elsewhere; its digits are not asked."""
    weight = torch.full((4, 4), 70000.0).half()
    assert math.isinf(subtract(torch.zeros(4, 4), weight).energy)
