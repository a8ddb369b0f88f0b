"""Every mixture of experts that transformers builds: what each stack of matrices is, by what the model does with it.

The types are those of `benchmarks/results/coverage.json` that have experts, made as small as the benchmark makes them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import Site
from rankwise.models.sites import model_sites

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROWS = json.loads((BENCHMARKS / "results" / "coverage.json").read_text())["rows"]
MIXTURES = [(row["task"], row["type"], row["layers"], row["divided"]) for row in ROWS if row.get("experts")]
# Every token goes through these.
NOT_ROUTED = ("SharedExperts",)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    threads = torch.get_num_threads()
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))
    torch.set_num_threads(threads)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def calls_of(model: PreTrainedModel, paths: set[str]) -> dict[str, Call]:
    """What each of these modules is called with, for a row of text."""
    import coverage

    found: dict[str, Call] = {}
    hooks = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: found.update({path: (args, kwargs)}), with_kwargs=True
        )
        for path in paths
    ]
    with torch.no_grad():
        coverage.run_text(model)
    for hook in hooks:
        hook.remove()
    return found


def chosen(call: Call) -> Tensor | None:
    """(tokens, k): the experts that a call names for each of its rows; None where it goes by counts."""
    values = [*call[0], *call[1].values()]
    rows = values[0].reshape(-1, values[0].shape[-1]).shape[0]
    named = (one for one in values[1:] if isinstance(one, Tensor) and not one.is_floating_point())
    return next((one for one in named if one.dim() == 2 and one.shape[0] == rows), None)


def rows_of(output: Any) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    return first.reshape(-1, first.shape[-1])


def widths(sites: list[Site]) -> tuple[int, int]:
    """(in of what reads, out of what writes)."""
    return sites[0].shape[1], sites[-1].shape[0]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "kind", "layers", "divided"), MIXTURES)
def test_an_experts_matrix_is_of_the_rows_that_name_it(task: str, kind: str, layers: int | None, divided: int) -> None:
    """Of every class of experts in it: the stream goes in at `in` and comes out at `out`; a change of one
    expert's matrix changes what comes out for the rows that name the expert, and for no other."""
    import coverage

    model = coverage.small_model(kind, task, coverage.small_config(kind, layers, divided))
    held: dict[str, list[Site]] = {}
    for path, site in model_sites(model).items():
        if site.experts:
            held.setdefault(path.rpartition(".")[0], []).append(site)
    of_class = {type(model.get_submodule(path)).__name__ + path.rpartition(".")[2]: path for path in held}
    assert of_class
    calls = calls_of(model, set(of_class.values()))
    assert set(calls) == set(of_class.values())
    for path in of_class.values():
        module, call, sites = model.get_submodule(path), calls[path], held[path]
        with torch.no_grad():
            before = rows_of(module(*call[0], **call[1])).clone()
        reads, writes = widths(sites)
        assert call[0][0].shape[-1] == reads, f"{path}: (out, in) of {sites[0]}"
        assert before.shape[-1] == writes, f"{path}: (out, in) of {sites[-1]}"
        if not type(module).__name__.endswith(NOT_ROUTED):
            only_its_rows(module, call, sites, before)


def only_its_rows(module: nn.Module, call: Call, sites: list[Site], before: Tensor) -> None:
    named = chosen(call)
    used = min(site.experts for site in sites)  # LongCat's first stack has places for experts that do nothing
    for site in sites:
        stack = module.get_parameter(site.projection if site.path.endswith(site.projection) else "weight")
        for expert in range(used):
            with torch.no_grad():
                plain = stack[expert].clone()
                stack[expert] += 0.1 * torch.randn(plain.shape, generator=torch.Generator().manual_seed(1))
                moved = (rows_of(module(*call[0], **call[1])) - before).abs().amax(dim=1) > 0
                stack[expert] = plain
            if named is not None:
                assert torch.equal(moved, (named == expert).any(dim=1)), (site.path, expert)
            else:
                assert not bool(moved.all()), (site.path, expert)
