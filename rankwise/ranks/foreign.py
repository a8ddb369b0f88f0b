"""Two checkpoints without a config.json: which of their tensors belong together, and what their names tell of sites.

matching = match_keys(base, tuned, rules, flatten_conv)      # REGEX=TEXT rules of --rename
sites = foreign_sites(base, matching)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rankwise.core.site import Site, describe
from rankwise.errors import DataError, UsageError
from rankwise.files.checkpoint import Checkpoint
from rankwise.ranks.deltas import WEIGHT_TYPES

CONV1D = frozenset(["c_attn", "c_proj", "c_fc", "q_attn"])  # modules of GPT-2 and its kin
NOT_ANALYSED = re.compile(r"(running_mean|running_var|num_batches_tracked)$")


def rename_keys(keys: Iterable[str], rules: Sequence[str]) -> dict[str, str]:
    """New name → key, after the REGEX=TEXT rules in order. Two keys that get one name are an error."""
    compile_regex = []
    for rule in rules:
        regex, equals, text = rule.partition("=")
        if not equals:
            raise UsageError(f"--rename takes REGEX=TEXT; got {rule!r}")
        try:
            compile_regex.append((re.compile(regex), text))
        except re.error as error:
            raise UsageError(f"--rename {rule!r}: {error}") from error
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for regex_, text in compile_regex:
            name = regex_.sub(text, name)
        if name in names:
            raise DataError(f"--rename gives {key} and {names[name]} the same name {name}")
        names[name] = key
    return names


@dataclass(frozen=True)
class Matching:
    """The tensors that two foreign checkpoints share, and those they do not, all counted."""

    shared: dict[str, tuple[str, str]]
    only_base: tuple[str, ...]
    only_tuned: tuple[str, ...]
    other_shape: tuple[str, ...]
    skipped: tuple[str, ...]

    def explain(self) -> str:
        """The lists, three names each, for the error and for the printed count."""
        parts = [
            (self.only_base, "only in the base"),
            (self.only_tuned, "only in the tuned checkpoint"),
            (self.other_shape, "of different shapes"),
        ]
        return "; ".join(f"{len(names)} {what} ({', '.join(names[:3])} …)" for names, what in parts if names)


def match_keys(base: Checkpoint, tuned: Checkpoint, rules: Sequence[str], flatten_conv: bool) -> Matching:
    """Matrices that both have. 1-D, integer and running-statistics tensors are skipped, and so are convolutions
    unless they are to be flattened."""
    before, after = rename_keys(base.keys(), rules), rename_keys(tuned.keys(), rules)

    def analysed(checkpoint: Checkpoint, key: str) -> bool:
        dims = len(checkpoint.shape(key))
        fits = dims == 2 or (dims > 2 and flatten_conv)
        return fits and checkpoint.dtype(key) in WEIGHT_TYPES and not NOT_ANALYSED.search(key)

    left = {name for name, key in before.items() if analysed(base, key)}
    right = {name for name, key in after.items() if analysed(tuned, key)}
    both = [name for name in before if name in left & right]
    same = [name for name in both if base.shape(before[name]) == tuned.shape(after[name])]
    return Matching(
        shared={name: (before[name], after[name]) for name in same},
        only_base=tuple(sorted(left - right)),
        only_tuned=tuple(sorted(right - left)),
        other_shape=tuple(name for name in both if name not in set(same)),
        skipped=tuple(name for name in before if name not in left),
    )


def foreign_sites(base: Checkpoint, matching: Matching) -> dict[str, Site]:
    """Sites of a pair that has no config.json: the key is the path, the tower is unknown, and names alone tell what is
    no linear layer (embeddings), what no site (heads), and what is stored transposed (Conv1D)."""
    sites = {}
    for name, (key, _) in matching.shared.items():
        shape = base.shape(key)
        path = name.removesuffix(".weight")
        site = describe(path, (shape[0], math.prod(shape[1:])))
        if site.kind not in ("embed", "head"):
            sites[path] = site
    # A fused q, k, v or an MLP's first layer that is wider than it is tall: GPT-2's Conv1D, not nanoGPT's Linear.
    fused = [site for site in sites.values() if site.projection in ("c_attn", "c_fc")]
    conv1d = any(site.shape[0] < site.shape[1] for site in fused)
    return {
        path: replace(site, shape=site.shape[::-1], transposed=True) if conv1d and site.projection in CONV1D else site
        for path, site in sites.items()
    }
