"""The certificates of spectra hold where they decide, and each is seen to fail when the product's own is broken.

rank by a sketch        never a wrong one without fall-back, on spectra built against it
what a sketch misses    its bound fails for no spectrum (but for a probability of 2e-6)
--budget                keeps what exact spectra would, within 0.1 %
corrected for rounding  bounds stay bounds
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hard_spectra import SHAPE, UP_TO, cases, with_energy, with_squares, wrong_ranks
from planted import generator, planted, truth
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankwise import cli
from rankwise.core import measure as measuring
from rankwise.core.allocate import by_budget, spectral_gains
from rankwise.core.measure import Delta, Sketch, energy_of, exact_spectrum, from_difference, sketch, sketches
from rankwise.core.site import Site, describe
from rankwise.core.spectrum import Spectrum
from rankwise.files.plan import read_plan
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import SpectrumSection
from rankwise.ranks import decide, spectra
from rankwise.ranks.decide import rule_of, unsettled_sites
from rankwise.ranks.spectra import measure_sites

RAW = Path("analysis_outputs/svd/raw_data/detailed_svd_analysis.json")
BARE = ["--no_plots", "--min_rank", "1", "--max_rank", str(UP_TO)]
TRUE_REFINED, TRUE_MISSED, TRUE_NOISE = Sketch.refined, Spectrum.missed, Spectrum.without_noise


def test_no_rank_is_wrong_without_a_fall_back() -> None:
    assert list(wrong_ranks(cases(720))) == []


def gap_without_residual(self: Sketch) -> Spectrum:
    right = TRUE_REFINED(self)
    assert right.excess is not None
    squares = self.values.square()[: self.up_to]
    return replace(right, excess=right.excess * ((squares - self.residual**2) / squares).abs())


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (measuring, "safety", lambda *_: 0.2),
        (measuring, "ROUNDING", 0.0),
        (Sketch, "refined", gap_without_residual),
        (Spectrum, "missed", lambda self: TRUE_MISSED(self).clamp(max=self.residual**2)),
        (Spectrum, "missed", lambda self: 0.5 * TRUE_MISSED(self)),
    ],
    ids=["safety 0.2", "no rounding", "gap of the refined bound", "one residual for all values", "half of the bound"],
)
def test_a_broken_bound_gives_wrong_ranks(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, broken: Any) -> None:
    monkeypatch.setattr(owner, name, broken)
    assert any(wrong_ranks(cases(720)))


def spiked(m: int, seed: int) -> Tensor:
    """A few values above a flat bulk, which a small basis overlooks and power iteration is slow to see."""
    draw = generator(seed)
    count, height = 1 + seed % 3, 1.05 + 1.6 * float(torch.rand(1, generator=draw))
    values = torch.ones(m)
    values[:count] = height
    return torch.diag(values)


def residual_ratios() -> Iterator[float]:
    """Bound ÷ truth of what the sketch leaves out, over spikes that are hard to see."""
    for seed in range(30):
        matrix = spiked(600, seed)
        found = sketch(matrix, energy_of(matrix), 1 + seed % 5, generator(seed))
        # With W = diag(v) and |v| ≤ height: ‖W − QQᵀW‖₂ by subspace iteration from the spikes themselves.
        left = torch.eye(600)[:, :4].double()
        wide, basis = matrix.double(), found.basis.double()
        for _ in range(6):
            image = wide.T @ (left - basis @ (basis.T @ left))
            left = torch.linalg.qr(wide @ image - basis @ (basis.T @ (wide @ image))).Q
        yield found.residual / float(torch.linalg.matrix_norm(wide.T @ (left - basis @ (basis.T @ left)), 2))


def test_what_a_sketch_leaves_out_is_bounded_even_where_it_hides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values just above a flat bulk: two power iterations with 1.25 were too low in up to half of such draws."""
    assert min(residual_ratios()) >= 1 - 1e-5
    monkeypatch.setattr(measuring, "safety", lambda *_: 0.9)
    assert any(ratio < 1 for ratio in residual_ratios())


def square_ratios() -> Iterator[float]:
    """Bound ÷ truth of ‖RRᵀ‖_F, from one direction left over to hundreds."""
    for seed in range(40):
        place = torch.arange(96, dtype=torch.float64)
        tail = torch.where(place < 20, 1.0, 1e-9) if seed % 4 == 0 else (1 + place) ** -(0.3 * (seed % 4))
        matrix = with_squares(tail, seed)
        found = sketch(matrix, energy_of(matrix), 6, generator(seed))
        left = matrix.double() - found.basis.double() @ (found.basis.double().T @ matrix.double())
        yield found.bounds[1] / float(torch.linalg.matrix_norm(left @ left.T))


def test_the_sum_of_what_a_sketch_leaves_out_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By ‖RRᵀ‖_F, closely where many directions are left; without what a sample of 16 vectors can be short of, not."""
    ratios = list(square_ratios())
    assert min(ratios) >= 1 - 1e-5
    assert min(ratios) < 2
    monkeypatch.setattr(measuring, "FAILURE", 1.0)
    assert any(ratio < 1 for ratio in square_ratios())


@pytest.mark.parametrize("matrices", [1, 2 * 12_288])
@pytest.mark.parametrize("m", [64, 900, 20000])
def test_the_factor_of_safety_is_the_quantile_that_it_is_said_to_be(m: int, matrices: int) -> None:
    """Of each matrix an equal part of the run's probability: by the union bound all of them hold together."""
    stats = pytest.importorskip("scipy.stats")
    failure = measuring.FAILURE / matrices
    least, most = stats.chi2.ppf(failure, measuring.PROBES), stats.chi2.isf(failure, m)
    exact = math.cosh(math.asinh(math.sqrt(most / least)) / (2 * measuring.STEPS - 1))
    assert exact <= measuring.safety(m, matrices) <= 1.02 * exact


def test_bounds_hold_for_a_run_not_for_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sketches of an expert and one of a matrix are counted; the more there are in a run, the wider the bounds."""
    matrix, (few, many) = torch.randn(64, 96, generator=generator(1)), (1, 2 * 12_288)
    near, far = (sketch(matrix, energy_of(matrix), 6, generator(0), count).bounds for count in (few, many))
    assert far[0] / near[0] == pytest.approx(measuring.safety(64, many) / measuring.safety(64, few), rel=1e-4)
    assert far[1] > near[1]
    stack = sketches(matrix[None], [energy_of(matrix)], 6, generator(0), many)[0].bounds
    assert stack == pytest.approx(far, rel=1e-4)
    sites = {"a": Site("a", (4, 4)), "b": Site("b", (4, 4)), "c": Site("c", (4, 4), experts=8)}
    counts: list[int] = []

    def measured(*args: Any) -> Any:
        counts.append(args[-1])
        return SimpleNamespace(spectrum=None, if_base_rounded=None)

    for name in ("measure_site", "measure_experts"):
        monkeypatch.setattr(spectra, name, measured)
    source: Any = SimpleNamespace(sites=sites, read=lambda site: None, prefetch=lambda site: None)
    spectra.measure_sites(source, RanksConfig(), lambda *_: None)
    assert counts == [18, 18, 18]


def write_pair(folder: Path, deltas: dict[str, Tensor]) -> list[str]:
    base = {
        key: 0.02 * torch.randn(value.shape, generator=generator(index))
        for index, (key, value) in enumerate(deltas.items())
    }
    save_file(base, folder / "base.safetensors")
    save_file({key: base[key] + value for key, value in deltas.items()}, folder / "tuned.safetensors")
    return [str(folder / "base.safetensors"), str(folder / "tuned.safetensors")]


def key(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.q_proj.weight"


def run_ranks(folder: Path, files: list[str], out: str, *argv: str) -> dict[str, Any]:
    """Path → what the command wrote of the site."""
    bare = BARE if "--budget" in argv else [*BARE, "--smoothing_factor", "0"]
    assert cli.main(["ranks", *files, "--out", str(folder / out), *bare, *argv]) == 0
    sites = json.loads((folder / out / RAW).read_text())["sites"]
    rows = {row.site.path: row for row in read_plan(folder / out).sites}
    return {path: details | {"row": rows[path]} for path, details in sites.items()}


def true_rank(delta: Tensor, threshold: float, most: int) -> int:
    squares = truth(delta).square()
    return min(int((squares.cumsum(0) / squares.sum() < threshold).sum()) + 1, most)


def test_the_command_s_ranks_are_those_of_the_svd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 sites whose E(k) lies 2e-5 above the threshold; with the bound at a fifth the command plans wrong ranks."""
    deltas = {key(i): with_energy(0.9 + 2e-5, 1 + i % (UP_TO - 1), 8 * (i // 8) + i % 6) for i in range(96)}
    files = write_pair(tmp_path, deltas)
    base, tuned = (load_file(file) for file in files)
    expected = {name.removesuffix(".weight"): true_rank(tuned[name] - base[name], 0.9, UP_TO) for name in deltas}
    found = run_ranks(tmp_path, files, "right")
    assert {path: details["r_final"] for path, details in found.items()} == expected
    assert {details["method"] for details in found.values()} >= {"exact, undecided by the sketch"}
    monkeypatch.setattr(measuring, "safety", lambda *_: 0.2)
    broken = run_ranks(tmp_path, files, "broken")
    assert {path: details["r_final"] for path, details in broken.items()} != expected


def test_energies_saturation_and_entropy_are_what_they_are_called(tmp_path: Path) -> None:
    """Of a spectrum known in closed form, and of one whose threshold lies right at --max_rank."""
    halves = with_squares(torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64), 0)
    beyond = with_energy(0.9 - 2e-5, UP_TO, 0)  # E(--max_rank) falls short by 2e-5
    reached = with_energy(0.9 + 2e-5, UP_TO, 0)
    files = write_pair(tmp_path, {key(0): halves, key(1): beyond, key(2): reached})
    first, second, third = run_ranks(tmp_path, files, "out").values()
    assert first["energy"] == pytest.approx(16.0, rel=1e-5)
    assert [details["energy"] for details in (second, third)] == pytest.approx(
        [energy_of(beyond), energy_of(reached)], rel=1e-6
    )
    assert [details["saturated"] for details in (first, second, third)] == [False, True, False]
    assert (first["r_raw"], third["r_raw"]) == (4, UP_TO)
    assert first["stable_rank"] == pytest.approx(2.0, rel=1e-5)
    assert first["entropy_rank"] is None or first["complete"]
    exact = next(iter(run_ranks(tmp_path, files, "exact", "--exact").values()))
    assert exact["entropy_rank"] == pytest.approx(2 ** (15 / 8), rel=1e-4), (
        "entropy of 1/2, 1/4, 1/8, 1/16, 1/16: 15/8 bits"
    )
    assert exact["decay_rate"] is None or exact["decay_rate"] > 10


@pytest.mark.parametrize(
    ("threshold", "rank"), [("0.75", 3), ("0.5", 2), ("1.0", 4), ("0.7500001", 4), ("0.7499999", 3)]
)
def test_ties_go_to_the_lower_rank(tmp_path: Path, threshold: str, rank: int) -> None:
    """Four equal values: 75 % of the energy is what three of them hold, not a little less."""
    delta = torch.zeros(96, 144)
    delta[torch.arange(4), torch.arange(4)] = 0.5
    save_file({key(0): torch.zeros(96, 144)}, tmp_path / "base.safetensors")
    save_file({key(0): delta}, tmp_path / "tuned.safetensors")
    files = [str(tmp_path / "base.safetensors"), str(tmp_path / "tuned.safetensors")]
    for argv in ([], ["--exact"]):
        (details,) = run_ranks(tmp_path, files, f"out{len(argv)}", "--energy", threshold, *argv).values()
        assert details["r_final"] == rank


@dataclass(frozen=True)
class Matrices:
    """Deltas in memory as a source."""

    matrices: dict[str, Tensor]
    description: str = "matrices"

    @property
    def sites(self) -> dict[str, Site]:
        return {path: describe(path, tuple(matrix.shape), "language") for path, matrix in self.matrices.items()}  # type: ignore[arg-type]

    def read(self, site: Site) -> Delta:
        return from_difference(self.matrices[site.path])

    def prefetch(self, site: Site) -> None:
        """In memory."""


def uneven(seed: int) -> Matrices:
    """Sites with a flat tail of noise, which a sketch takes for a quarter less than it is, beside sharp ones."""
    draw = generator(seed)
    noise = torch.randn(SHAPE, generator=draw)
    noise /= torch.linalg.matrix_norm(noise, 2)
    level = 0.8 + 0.19 * float(torch.rand(1, generator=draw))
    sharp = with_squares(torch.full((UP_TO,), level**2, dtype=torch.float64), seed)
    steep = with_squares(level**2 * 0.8 ** torch.arange(96, dtype=torch.float64), seed + 1)
    return Matrices({f"model.layers.{i}.self_attn.q_proj": m for i, m in enumerate((noise, sharp, steep))})


def kept_by_budget(seed: int, normalise: str) -> float:
    """Energy that the plan from certified spectra keeps ÷ what the plan from exact ones keeps."""
    source, section = uneven(seed), SpectrumSection(min_rank=1, max_rank=UP_TO, budget="uniform:6", normalise=normalise)
    asked, rule = RanksConfig(spectrum=section), rule_of(section)
    found = measure_sites(
        source,
        asked,
        lambda _, spectrum: spectrum.require_refined(),
        lambda spectra: unsettled_sites(asked, spectra),
    )
    exact = {site: exact_spectrum(source.matrices[site.path], row.energy) for site, row in found.items()}
    budget, gains = sum(site.parameters(6) for site in found), spectral_gains(exact, normalise)
    plans = (
        by_budget(spectral_gains(spectra, normalise), budget, rule)
        for spectra in ({site: row.spectrum for site, row in found.items()}, exact)
    )
    kept, best = (sum(float(gains[site][:rank].sum()) for site, rank in plan.items()) for plan in plans)
    return kept / best


def shares_kept() -> Iterator[float]:
    return itertools.starmap(kept_by_budget, itertools.product(range(40), ("none", "site")))


def test_a_budget_keeps_what_exact_spectra_would_make_it_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(shares_kept()) >= 0.999
    monkeypatch.setattr(decide, "unsettled", lambda *_: [])
    assert any(kept < 0.99 for kept in shares_kept()), "the sketches alone starve the site with the flat tail"


def test_the_command_s_budget_is_divided_as_by_exact_spectra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_pair(tmp_path, {f"{path}.weight": matrix for path, matrix in uneven(3).matrices.items()})
    budget = ["--budget", "uniform:6"]
    exact = run_ranks(tmp_path, files, "exact", *budget, "--exact")

    def kept(found: dict[str, Any]) -> float:
        values = {path: torch.tensor(details["singular_values"]).square() for path, details in exact.items()}
        return sum(float(values[path][: details["r_final"]].sum()) for path, details in found.items())

    found = run_ranks(tmp_path, files, "fast", *budget)
    assert kept(found) >= 0.999 * kept(exact)
    assert "sketch" in {details["method"].split(",")[0] for details in found.values()}, "not all need the exact path"
    monkeypatch.setattr(decide, "unsettled", lambda *_: [])
    assert kept(run_ranks(tmp_path, files, "uncertain", *budget)) < 0.99 * kept(exact)


def corrected_outside() -> Iterator[str]:
    """Cases in which the energy of an exact spectrum, corrected, lies outside a corrected sketch's bounds."""
    for seed in range(120):
        m, n = ((96, 144), (120, 100), (96, 300))[seed % 3]
        noise = 0.01 + 0.4 * float(torch.rand(1, generator=generator(seed)))
        matrix = planted(m, n, 1 + seed % 9, noise, seed, (1.0, 0.8, 0.4)[seed // 3 % 3])
        removed = energy_of(matrix) * noise / (1 + noise) * (0.3, 0.8, 1.0, 1.5)[seed % 4]
        exact = exact_spectrum(matrix, energy_of(matrix)).without_noise(removed)
        found = sketch(matrix, energy_of(matrix), UP_TO, generator(seed))
        for bounded in (found.coarse(), found.spectrum(), found.refined()):
            spectrum = bounded.without_noise(removed)
            for k in range(1, UP_TO + 1):
                low, high = spectrum.energy(k)
                if not low - 1e-9 <= exact.energy(k).low <= high + 1e-9:
                    yield f"case {seed}, rank {k}"


def without_bounds(self: Spectrum, energy: float) -> Spectrum:
    """As it was: the values alone."""
    return replace(TRUE_NOISE(self, energy), residual=0.0, excess=None, rounding=0.0)


def test_correcting_for_noise_keeps_the_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(corrected_outside()) == []
    monkeypatch.setattr(Spectrum, "without_noise", without_bounds)
    assert any(corrected_outside())


def test_a_corrected_sketch_still_knows_what_it_has_not_computed() -> None:
    """Twelve of 96 equal values stand above a little noise: the other 84 do so as well, and the site is saturated."""
    matrix = with_squares(torch.ones(96, dtype=torch.float64), 0)
    corrected = (
        sketch(matrix, energy_of(matrix), UP_TO, generator(0)).spectrum().without_noise(0.05 * energy_of(matrix))
    )
    assert not corrected.complete
    assert corrected.saturated(0.9, UP_TO)
    low_rank = planted(96, 144, 3, 0.05, 0)
    ended = (
        sketch(low_rank, energy_of(low_rank), UP_TO, generator(0)).refined().without_noise(0.1 * energy_of(low_rank))
    )
    assert ended.complete, "every value beyond the computed ones is below the noise's edge"


def test_exact_ranks_are_right_to_a_billionth() -> None:
    """The Gram matrix is summed in float64: thresholds 1e-9 beside E(k), which float32 would not tell apart."""
    asked: list[tuple[int, int]] = []
    for seed in range(60):
        matrix = with_energy(0.9, 1 + seed % 11, seed)
        squares = truth(matrix).square()
        energies = squares.cumsum(0) / squares.sum()
        spectrum = exact_spectrum(matrix, energy_of(matrix))
        for k, beside in itertools.product(range(1, UP_TO), (-1e-9, 1e-9)):
            threshold = float(energies[k - 1]) + beside
            asked.append((spectrum.rank_for(threshold), k + (beside > 0)))
    assert all(found == right for found, right in asked)


def test_mostly_unchanged_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """55 % of the entries come out as they were; the noise alone, 42 % of the energy, would be corrected."""
    weight = (0.02 * torch.randn(256, 256, generator=generator(0))).bfloat16()
    low = torch.randn(256, 8, generator=generator(1)) @ torch.randn(8, 256, generator=generator(2))
    tuned = (weight.float() + 5e-5 * low / low.square().mean().sqrt()).bfloat16()
    save_file({key(0): weight}, tmp_path / "base.safetensors")
    save_file({key(0): tuned}, tmp_path / "tuned.safetensors")
    files = [str(tmp_path / f"{name}.safetensors") for name in ("base", "tuned")]
    assert cli.main(["ranks", *files, "--out", str(tmp_path / "out"), *BARE]) == 3
    error = capsys.readouterr().err
    assert "No ranks can be read from this" in error
    assert "55% of entries unchanged" in error
