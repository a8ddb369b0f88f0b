"""The measuring of `rankwise features compare`: from networks and images to the content of comparison.json.

training matrices ── shared_basis ──▶ PCA ─┐
networks ──────────────────────────────────┴─ measure, timings, sweep on every source ──▶ one mapping (factor_words)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rankwise.core.approximation import normalised, shared_basis
from rankwise.core.closeness import ROUNDING, break_even_rank, excess_error, stored_numbers
from rankwise.data.features.cache import FeatureCache
from rankwise.nets.factorize.factorizer import Factorizer
from rankwise.score.factor_cost import counted, timings
from rankwise.score.factor_rows import array, estimated, paired, summary
from rankwise.score.factorization import (
    PCA,
    SVD,
    Batches,
    Closeness,
    Method,
    baselines,
    measure,
    network,
    optimum,
    sweep,
)
from rankwise.show.factor_words import FORMAT, label
from rankwise.stages.features.trained import cached

DRAWN = ("relative_error", "excess_error", "cosine")


@dataclass(frozen=True)
class Source:
    """Some matrices of a cache, under the name they are shown by."""

    name: str
    cache: FeatureCache
    places: tuple[int, ...]

    def batches(self, device: torch.device) -> Iterator[Tensor]:
        """Normalised (B, T, D) on the device."""
        return (batch.to(device) for batch in cached(self.cache, self.places))

    def groups(self) -> list[str]:
        return [self.cache.groups[place] for place in self.places]


@dataclass(frozen=True)
class Compared:
    """What is compared, on what, and how. sources: the test images first."""

    networks: Mapping[str, Factorizer]
    rank: int
    training: Source
    sources: Sequence[Source]
    ranks: Sequence[int]
    batch_size: int
    repeats: int
    device: torch.device
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.training.cache.tokens, self.training.cache.channels

    def swept_ranks(self) -> list[int]:
        """Those asked for that such a matrix has, and the comparison's own."""
        return sorted({rank for rank in self.ranks if rank <= min(self.shape)} | {self.rank})

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed)


def compared(asked: Compared) -> dict[str, Any]:
    """The content of comparison.json."""
    for net in asked.networks.values():
        net.to(asked.device).eval()
    ranks = asked.swept_ranks()
    basis = shared_basis(asked.training.batches(asked.device), max(ranks)).to(asked.device)
    methods = baselines(asked.rank, basis, asked.generator())
    methods += [network(net, name, asked.rank) for name, net in asked.networks.items()]
    first, best = asked.sources[0], {source.name: optimum(of(source, asked)) for source in asked.sources}
    (tokens, channels), cache = asked.shape, asked.training.cache
    factors, whole = stored_numbers(tokens, channels, asked.rank)
    errors = sweep(ranks, of(first, asked), best[first.name], basis, asked.networks, asked.generator())
    return {
        "format": FORMAT,
        "rank": asked.rank,
        "tokens": tokens,
        "channels": channels,
        "networks": list(asked.networks),
        "network_ranks": {name: net.settings.rank for name, net in asked.networks.items()},
        "features": str(cache.path),
        "model": cache.model.name if cache.model else None,
        "training_matrices": len(asked.training.places),
        "sources": [source_record(source, methods, best[source.name], asked) for source in asked.sources],
        **cost_record(methods, asked),
        "sweep": {"ranks": ranks, "relative_error": errors},
        "storage": {"factors": factors, "matrix": whole, "break_even_rank": break_even_rank(tokens, channels)},
    }


def of(source: Source, asked: Compared) -> Batches:
    return lambda: source.batches(asked.device)


def source_record(source: Source, methods: Sequence[Method], best: Tensor, asked: Compared) -> dict[str, Any]:
    """Means with intervals of every method on one source, paired differences, and the single matrices."""
    groups = source.groups()
    found = measure(methods, of(source, asked), best)
    rows = [row_record(one, methods, best, groups, asked.seed) for one in found]
    products = {one.method: one for one in found if not one.refined}
    return {
        "name": source.name,
        "source": source.cache.source,
        "features": str(source.cache.path),
        "matrices": len(source.places),
        "images": len(set(groups)),
        "rows": rows,
        "paired": [
            paired(products[name], products[other], groups, "relative_error", asked.seed)
            for name in asked.networks
            for other in (SVD, PCA)
        ],
        "ids": [source.cache.ids[place] for place in source.places],
        "values": {label(row): drawn(one) for row, one in zip(rows, found, strict=True)},
    }


def row_record(
    found: Closeness, methods: Sequence[Method], best: Tensor, groups: Sequence[str], seed: int
) -> dict[str, Any]:
    """One method's row; where a mask lets fewer ranks act, also its excess over the optimum of that rank. Over an
    optimum that is exact there is no excess: None."""
    method = next(one for one in methods if one.name == found.method)
    acting = None if found.refined else method.effective_rank
    row = {
        "method": found.method,
        "refined": found.refined,
        "learned": method.learned,
        "rank": found.rank,
        "effective_rank": acting,
        **summary(found, groups, seed),
    }
    if "excess_error" in row and float(best[:, found.rank - 1].min()) <= ROUNDING:
        row["excess_error"] = None
    if acting and float(best[:, acting - 1].min()) > ROUNDING:
        excess = excess_error(found.values["relative_error"], best[:, acting - 1])
        (row["excess_at_effective_rank"],) = estimated(array(excess)[None], groups, seed)
    return row


def drawn(found: Closeness) -> dict[str, list[float]]:
    return {name: found.values[name].tolist() for name in DRAWN if name in found.values}


def cost_record(methods: Sequence[Method], asked: Compared) -> dict[str, Any]:
    """Operations, time, parameters and stored numbers of every method, and how time was measured."""
    batch = timing_batch(asked)
    spent = timings(methods, batch, asked.repeats)
    cost = [
        {
            "method": method.name,
            "flops": method.flops,
            "seconds": spent[method.name].seconds,
            "slowest": spent[method.name].slowest,
            "parameters": method.parameters,
            "stored": method.stored(*asked.shape, asked.rank),
        }
        for method in counted(methods, batch[: min(len(batch), 4)])
    ]
    on_cpu = asked.device.type == "cpu"
    timing = {
        "device": "CPU" if on_cpu else torch.cuda.get_device_name(asked.device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "batch_size": asked.batch_size,
        "repeats": asked.repeats,
    }
    return {"cost": cost, "timing": timing}


def timing_batch(asked: Compared) -> Tensor:
    """`batch_size` test matrices, over again where there are fewer: time does not depend on what is in them."""
    source = asked.sources[0]
    places = itertools.islice(itertools.cycle(source.places), asked.batch_size)
    return torch.stack([normalised(source.cache[place]) for place in places]).to(asked.device)
