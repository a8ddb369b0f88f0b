"""The ways in which a running llama.cpp server switches LoRAs, and a parity ladder for each.

    server with A at 1, B at 0 ──▶ scale 0 · scale 1 again · A by request · base by request · B by request
                                   each on a few cases, against the adapter or the base in transformers ──▶ Climbed

llama.cpp: POST /lora-adapters sets the scales of requests that name none; `lora` in a request sets its own, 0 for what
it does not name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.device.llama.client import LoadedLora, Refusal, ServerRuntime
from rankwise.device.lora.held import compared
from rankwise.device.lora.variants import Variants, off, rescaled
from rankwise.device.parity.cases import Case
from rankwise.device.parity.floor import (
    Divergence,
    Floor,
    Thresholds,
    compare,
    explaining,
    joined,
    measure_floor,
    top_of,
)
from rankwise.device.parity.ladder import Ladder, observe
from rankwise.device.parity.reference import Expected, HFReference, Observed
from rankwise.device.parity.rungs import BROKEN, Rung, beyond
from rankwise.device.sides import LoraFile
from rankwise.errors import DataError
from rankwise.files.adapter import adapter_files
from rankwise.files.checkpoint import resolve

MOST = 8  # cases of each setting: a LoRA that is switched wrongly is far off
BASE = "the base"
Scales = Mapping[int, float]
"""Number of a file → its scale."""


@dataclass(frozen=True)
class Setting:
    """scales: of the server. asked: of every request; None for requests that name none. expects: number of the file
    whose adapter has to answer; None: the base."""

    name: str
    scales: Scales
    asked: Scales | None
    expects: int | None


def settings(files: Sequence[LoraFile]) -> list[Setting]:
    """All that is tried, after the first file as it is loaded: at scale 1, the others at 0."""
    none = dict.fromkeys(range(len(files)), 0.0)
    first = none | {0: 1.0}
    others = {number: float(number > 0) for number in none}
    by_request = [Setting(f"{files[number].name} by request", first, {number: 1.0}, number) for number in [*none][1:]]
    return [
        Setting("scale 0", none, None, None),
        Setting("scale 1 again", first, None, 0),
        Setting(f"{files[0].name} by request", others, {0: 1.0}, 0),
        Setting("the base by request", first, none, None),
        *by_request,
    ]


@dataclass(frozen=True)
class KnownReference:
    """Reference values of some cases, and their noise floor. name: of what it is, in words."""

    name: str
    known: Mapping[str, Expected]
    floor: Floor

    def expected(self, case: Case) -> Expected:
        return self.known[case.id]

    @classmethod
    def of(
        cls, name: str, reference: HFReference, cases: Sequence[Case], top: int, paths: Sequence[str]
    ) -> KnownReference:
        floor = measure_floor(reference, cases, top, paths)
        return cls(name, {case.id: reference.expected(case) for case in cases}, floor)


@dataclass(frozen=True)
class Climbed:
    """A setting, what it has to be, and its ladder; None where that was not measured, and why."""

    setting: str
    expects: str
    ladder: Ladder | None
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        ladder = self.ladder.as_dict() if self.ladder else {"first_broken": None, "rungs": []}
        return {"setting": self.setting, "expects": self.expects, "why": self.why, **ladder}


@dataclass(frozen=True)
class LoraSide:
    """What LoRAs are held to. held: each file against its adapter; known: number of a file → its adapter's values, None
    → the base's, on the same few cases; effect: of the first adapter there, from it to the base."""

    files: tuple[LoraFile, ...]
    held: tuple[Rung, ...]
    cases: tuple[Case, ...]
    known: Mapping[int | None, KnownReference]
    variants: Variants
    effect: Divergence
    top: int

    def told_apart(self, limits: Thresholds) -> bool:
        """Whether adapter and base differ by more than the limits, so that a ladder that holds tells them apart."""
        return self.effect.mean > limits.kl_mean or bool(self.effect.flips_above(limits.margin))

    def limits(self, form: str, tolerance: float, expects: int | None = 0) -> Thresholds:
        return self.known[expects].floor.thresholds(form, tolerance)

    def named(self, ladder: Ladder, seen: Sequence[Observed], limits: Thresholds, expects: int | None = 0) -> Ladder:
        """The ladder with reasons that name the LoRA, and say what the answers are instead."""
        who = f"{self.files[expects or 0].name}, where it has to be {self.words(expects)}"
        rungs = [replace(rung, why=f"{who}: {rung.why}") if rung.status == BROKEN else rung for rung in ladder.rungs]
        place = next(number for number, rung in enumerate(rungs) if rung.name == "logprobs")
        if rungs[place].status == BROKEN:
            heard = [one for one in seen if one.tops]
            found = joined([compare(one.expected.log_probs, one.tops, one.case.id) for one in heard])
            facts = "; ".join(beyond(found, found.as_dict(limits.margin), limits))
            why = f"{who}: {facts}; {self.variants.explained(heard, found, expects)}{self.also(expects)}"
            rungs[place] = replace(rungs[place], why=why)
        return Ladder(tuple(rungs))

    def also(self, expects: int | None) -> str:
        """What is wrong with the file itself, where it is the one that has to answer."""
        rung = self.held[expects] if expects is not None else None
        return f". {rung.why}" if rung and rung.status == BROKEN else ""

    def words(self, expects: int | None) -> str:
        return BASE if expects is None else f"the adapter {self.files[expects].adapter}"

    # --- on a running server

    def climb(self, runtime: ServerRuntime, form: str, tolerance: float) -> list[dict[str, Any]]:
        """A ladder for every setting; the server's scales are afterwards as they were.

        DataError where the server has not loaded a file. A build without /lora-adapters switches nothing: then nothing
        is measured, and says why.
        """
        try:
            before = runtime.loras()
        except Refusal as error:
            why = f"this build of llama.cpp does not tell its LoRAs, so they cannot be switched while it runs: {error}"
            return [Climbed(one.name, self.words(one.expects), None, why).as_dict() for one in settings(self.files)]
        ids = loaded_ids(self.files, before)
        try:
            return [self.tried(runtime, ids, one, form, tolerance).as_dict() for one in settings(self.files)]
        finally:
            runtime.set_scales({one.id: one.scale for one in before})

    def tried(
        self, runtime: ServerRuntime, ids: Sequence[int], setting: Setting, form: str, tolerance: float
    ) -> Climbed:
        words = self.words(setting.expects)
        if setting.expects not in self.known:
            assert setting.expects
            return Climbed(setting.name, words, None, self.held[setting.expects].why)
        runtime.set_scales({ids[number]: scale for number, scale in setting.scales.items()})
        asked = {ids[number]: scale for number, scale in setting.asked.items()} if setting.asked is not None else None
        asking = runtime.naming(asked)
        seen = observe(self.known[setting.expects], asking, self.cases, self.top)
        limits = self.limits(form, tolerance, setting.expects)
        ladder = Ladder.of(seen, asking, limits)
        return Climbed(setting.name, words, self.named(ladder, seen, limits, setting.expects))

    def as_dict(self, climbed: Mapping[str, Sequence[Mapping[str, Any]]], tolerance: float) -> dict[str, Any]:
        """The `adapters` of validation.json. climbed: form → what `climb` found."""
        told = {form: self.told_apart(self.limits(form, tolerance)) for form in climbed}
        return {
            "files": [
                {"name": one.name, "reference": one.adapter, "bytes": one.path.stat().st_size, "file": rung.as_dict()}
                for one, rung in zip(self.files, self.held, strict=True)
            ],
            "effect": {"kl_mean": self.effect.mean, "kl_max": self.effect.max, "told_apart": told},
            "settings": {form: list(found) for form, found in climbed.items()},
        }


def folder_of(reference: str) -> Path:
    return adapter_files(resolve(reference))[0].parent


def loaded_ids(files: Sequence[LoraFile], loaded: Sequence[LoadedLora]) -> list[int]:
    """The server's id of each file, by its path, else by its name."""
    found = []
    for one in files:
        same = [each.id for each in loaded if each.path == str(one.path)]
        same += [each.id for each in loaded if each.path.replace("\\", "/").rpartition("/")[2] == one.name]
        if not same:
            has = ", ".join(each.path for each in loaded) or "none"
            raise DataError(f"the server has not loaded {one.name} (LoRAs that it has: {has}); start it with --lora")
        found.append(same[0])
    if len(set(found)) < len(found):
        raise DataError("LoRAs of one name cannot be told apart on the server; give the files different names")
    return found


def lora_side(
    files: Sequence[LoraFile],
    base: str,
    reference: HFReference,
    floor: Floor,
    cases: Sequence[Case],
    top: int,
    forms: Sequence[str],
    load: Callable[[Path], Any],
) -> LoraSide:
    """base: the model. reference: the first adapter on it, a PEFT model; floor: its noise floor on all cases. forms: of
    the base's files. load: an adapter's folder → the base with that adapter."""
    held = [compared(one, base) for one in files]
    few, paths = tuple(cases[:MOST]), explaining(forms)
    ids = [case.id for case in few]
    known: dict[int | None, KnownReference] = {}
    adapter = {case.id: reference.expected(case) for case in few}
    known[0] = KnownReference(files[0].name, adapter, floor.of(ids))
    variants = Variants(reference, files[0].name)
    with rescaled(reference.model, off):
        known[None] = KnownReference.of(BASE, replace(reference, _known={}), few, top, paths)
    without = variants.along(few, [adapter[name].answer for name in ids], off)
    parts = [compare(adapter[name].log_probs, top_of(base, top), name) for name, base in zip(ids, without, strict=True)]
    for number, one in enumerate(files[1:], 1):
        if one.reference:
            other = replace(reference, model=load(folder_of(one.reference)), _known={})
            known[number] = KnownReference.of(one.name, other, few, top, paths)
    return LoraSide(tuple(files), tuple(held), few, known, variants, joined(parts), top)
