"""Deltas of experts as wholes: what is told of them, how they are written, and bad ones that a run would start from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_expert_spectra import DOWN, in_steps, planted_deltas, saved_pair
from torch import Tensor

from rankwise.core.measure import energy_of
from rankwise.errors import DataError
from rankwise.models.adapt import adapt
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.sections import LoraSection, SitesSection
from rankwise.ranks.deltas import dense
from rankwise.ranks.outputs import write_delta_weights
from rankwise.ranks.probe import open_pair
from rankwise.train.adapter import warm_start


def test_what_is_told_of_the_whole_is_of_all_experts(tmp_path: Path) -> None:
    """Expert 0 moves by less than bf16's spacing, expert 1 not at all: the whole is like neither."""
    base, tuned, differences = saved_pair(tmp_path, "mixtral", dtype=torch.bfloat16, change=in_steps)
    source = open_pair(str(base), str(tuned), SitesSection(include="experts"), [])
    site = next(site for site in source.sites.values() if site.weight == DOWN)
    whole, parts = dense(source, site), [source.expert(site, expert) for expert in range(site.experts)]
    assert torch.equal(whole.matrix.double(), differences[DOWN])
    assert whole.energy == pytest.approx(float(differences[DOWN].square().sum()))
    before = load_model(str(base), torch.float32).get_parameter(DOWN).detach()
    assert whole.base_energy == pytest.approx(energy_of(before.flatten(1)), rel=1e-5)
    assert whole.unchanged == pytest.approx(float((differences[DOWN] == 0).double().mean()))
    assert whole.rounding_energy == pytest.approx(sum(one.rounding_energy for one in parts)) != 0
    assert {one.stored_as for one in parts if one.energy} == {whole.stored_as} != {None}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_deltas_are_written_in_shards(family: str, tmp_path: Path) -> None:
    base, tuned, _ = saved_pair(tmp_path, family)
    source = open_pair(str(base), str(tuned), SitesSection(include="experts"), [])
    sites = list(source.sites.values())
    (single,) = write_delta_weights(tmp_path, source, sites)
    whole = load_file(single)
    assert single.name == "delta_weights.safetensors" and whole.keys() == {site.weight for site in sites}
    assert all(whole[site.weight].shape == (site.experts, *site.shape) for site in sites)
    *files, index = write_delta_weights(tmp_path, source, sites, limit=4 * sites[0].size)
    places = json.loads(index.read_text())["weight_map"]
    assert len(files) > 1 and {file.name for file in files} == set(places.values())
    for file in files:
        for name, matrix in load_file(file).items():
            assert places.pop(name) == file.name and torch.equal(matrix, whole[name])
    assert not places


def with_nan(shape: tuple[int, ...], seed: int) -> Tensor:
    found = planted_deltas(shape, seed)
    found[2, 0, 0] = torch.nan
    return found


def test_a_run_does_not_start_from_an_expert_that_diverged(tmp_path: Path) -> None:
    base, tuned, _ = saved_pair(tmp_path, "mixtral", change=with_nan)
    source = open_pair(str(base), str(tuned), SitesSection(include="experts"), [])
    model = load_model(str(base), torch.float32)
    plan = uniform_plan(choose_sites(model_sites(model), "experts"), 2, None, False, "x")
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.experts\.\w+, expert 2: the delta has NaN"):
        warm_start(adapt(model, plan, LoraSection()), plan, source, torch.Generator().manual_seed(0))
