"""What `rankwise features downstream` puts in the features' place: baselines at every rank, networks, the two controls.

networks of the right shape ──────────────┐
cache or own pictures ── parts ──▶ Part* ─┴─ replacements(part) ──▶ Replacement*, the same names for every part
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rankwise.core.approximation import shared_basis
from rankwise.data.features.split import SPLIT, read_split
from rankwise.errors import DataError, UsageError
from rankwise.score.downstream import Replacement, baselines, controls, of_method
from rankwise.score.factorization import network
from rankwise.stages.features.questions import Questions, Shape
from rankwise.stages.features.trained import Network, cached

CROSSED = "each half of the pictures with a basis from the other half's features"


@dataclass(frozen=True)
class Part:
    """Rows that share a basis (r, D) of the shared PCA; None where there are too few pictures for one."""

    places: Sequence[int]
    basis: Tensor | None


def fitting(found: Sequence[Network], shapes: Sequence[Shape], asked: bool) -> tuple[list[Network], list[str]]:
    """The networks that take these shapes, and notes on the others.

    asked: they were named; then DataError for one that does not fit.
    """
    usable, notes = [], []
    for each in found:
        wanted = (each.net.settings.tokens, each.net.settings.channels)
        if all(shape == wanted for shape in shapes):
            usable.append(each)
            continue
        line = f"{each.name} takes {sized(wanted)}, and these pictures give {', '.join(map(sized, shapes))}"
        if asked:
            raise DataError(f"{each.folder}: {line}; leave it out of --arch, or capture and train at that size")
        notes.append(f"{line}: left out")
    return usable, notes


def origin_notes(found: Sequence[Network], fingerprint: str, rows: Questions) -> list[str]:
    """What a reader must know of where the networks come from: another model, or pictures that are asked about here."""
    notes = []
    for each in found:
        if each.cache is None:
            notes.append(f"{each.name}: which model its features came from is not known: {each.lost}")
            continue
        origin = each.cache.model
        if origin is None:
            notes.append(f"{each.name} was trained on {each.cache.source}, which names no model")
        elif origin.fingerprint != fingerprint:
            notes.append(
                f"warning: {each.name} was trained on features of {origin.name}, whose files are not this model's "
                f"({origin.fingerprint[:12]}… against {fingerprint[:12]}…): unless they see alike, its numbers are not "
                "those of a network for this model"
            )
        notes += seen_in_training(each, rows)
    return notes


def seen_in_training(each: Network, rows: Questions) -> list[str]:
    assert each.cache is not None
    trained = {each.cache.groups[place] for place in read_split(each.folder / SPLIT, each.cache).train}
    shown = {picture for row in rows.pictures for picture in row}
    known = len(shown & trained)
    if not known:
        return []
    return [
        f"warning: {each.name} was trained on {known} of these {len(shown)} pictures: it does better than on new ones"
    ]


def sized(shape: Shape) -> str:
    return f"{shape[0]} tokens × {shape[1]} channels"


def ranks_of(asked: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape]) -> list[int]:
    """Ranks of the baselines, ascending. UsageError for one that no matrix has."""
    most = max(min(shape) for shape in shapes)
    default = [each.rank for each in found] or [max(1, most // 4), max(1, most // 2), most]
    ranks = sorted(set(asked or default))
    if not 1 <= ranks[0] <= ranks[-1] <= most:
        raise UsageError(f"--ranks: matrices of {sized(max(shapes))} have ranks 1 to {most}; got {ranks}")
    return ranks


def parts(rows: Questions, found: Sequence[Network], rank: int, seed: int) -> tuple[list[Part], str]:
    """The rows with the bases of the shared PCA, and where those come from: the training matrices of a cache, else,
    crosswise, the rows' own pictures. found: networks whose caches hold features of this model."""
    whole = list(range(len(rows)))
    for each in found:
        if each.cache is not None:
            split = read_split(each.folder / SPLIT, each.cache)
            basis = shared_basis(cached(each.cache, split.train), rank).to(rows.tested.device)
            return [Part(whole, basis)], f"basis from the {len(split.train)} training matrices of {each.cache.path}"
    halves = rows.halves(seed)
    if len(halves) < 2:
        return [Part(whole, None)], "left out, since there is only one picture and no cache to take a basis from"
    first, second = (shared_basis(rows.features(places), rank) for places in halves)
    return [Part(halves[0], second), Part(halves[1], first)], CROSSED


def replacements(
    part: Part, ranks: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape], seed: int
) -> list[Replacement]:
    """All that stand in, in the table's order: no picture, baselines by method and rank, networks, all ranks."""
    whole, nothing = controls(*max(shapes, key=min))
    by_rank = [baselines(rank, part.basis, seed) for rank in ranks]
    ordered = [method for same in zip(*by_rank, strict=True) for method in same]
    learned = [one for each in found for one in of_method(network(each.net, each.name), each.rank)]
    return [nothing, *ordered, *learned, whole]
