"""The parity ladder: is what runs in llama.cpp what was trained? From the picture to the answer, rung by rung.

    pixels ─▶ image tokens ─▶ token ids ─▶ embeddings ─▶ logprobs ─▶ text

    reference = HFReference(load_model(merged, torch.float32), renderer)
    cases = [case_of(example, renderer) for example in examples]
    floor = measure_floor(reference, cases)
    with LlamaServer(gguf, mmproj) as runtime:
        ladder = climb(reference, runtime, cases, floor.thresholds("f16"))
    ladder.first_broken                      # None, or the Rung that names what is wrong

Every rung is tried, though one below it is broken; the first broken one is the cause to look for. To try a fault,
change a case (`replace(case, images=…)`), give another GGUF, or another reference; nothing else is needed. Cases
without their pictures (`cases.blind`) tell a fault of the language weights from one of the vision side.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rankwise.device.llama.runtime import Runtime
from rankwise.device.parity.cases import Case
from rankwise.device.parity.floor import TOP, WEAK, Thresholds
from rankwise.device.parity.pixels import AppPixels
from rankwise.device.parity.reference import Observed, Reference, Rows
from rankwise.device.parity.rungs import BROKEN, NO_PICTURE, NOT_MEASURED, RUNGS, Rung
from rankwise.errors import VerificationError
from rankwise.page.text import plural

NAMES = tuple(RUNGS)
LAST = 800  # characters of what a failed process said


@dataclass(frozen=True)
class Ladder:
    """All rungs in order."""

    rungs: tuple[Rung, ...]

    @classmethod
    def of(cls, seen: Sequence[Observed], runtime: Runtime, thresholds: Thresholds) -> Ladder:
        return cls(tuple(rung(seen, runtime, thresholds) for rung in RUNGS.values()))

    @property
    def first_broken(self) -> Rung | None:
        return next((rung for rung in self.rungs if rung.status == BROKEN), None)

    @property
    def holds(self) -> bool:
        return self.first_broken is None

    def __getitem__(self, name: str) -> Rung:
        return self.rungs[NAMES.index(name)]

    def as_dict(self) -> dict[str, Any]:
        broken = self.first_broken
        return {"first_broken": broken.name if broken else None, "rungs": [rung.as_dict() for rung in self.rungs]}


class Embedding(Protocol):
    """Protocol: embeds images, PNG each."""

    def of(self, images: Sequence[bytes]) -> list[Rows]: ...


@dataclass(frozen=True)
class Embedder:
    """The vision side of one exported form, by llama-cpp-python in a child process. VerificationError where llama.cpp
    ends on the files. threads: None for llama.cpp's own choice."""

    text: Path
    mmproj: Path
    threads: int | None = None

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec("llama_cpp") is not None

    def of(self, images: Sequence[bytes]) -> list[Rows]:
        """(tokens, width) of each picture, PNG."""
        with tempfile.TemporaryDirectory() as folder:
            names = [Path(folder, f"{number:06d}.png") for number in range(len(images))]
            for name, image in zip(names, images, strict=True):
                name.write_bytes(image)
            command = [sys.executable, "-m", "rankwise.device.parity.embed", "--model", str(self.text)]
            command += ["--mmproj", str(self.mmproj), "--threads", str(self.threads or 0), folder]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
            if done.returncode:
                raise VerificationError(f"llama.cpp crashed on {self.mmproj}:\n{done.stderr[-LAST:]}")
            return [np.load(name.with_suffix(".npy")) for name in names]


def climb(
    reference: Reference,
    runtime: Runtime,
    cases: Sequence[Case],
    thresholds: Thresholds,
    top: int = TOP,
    embedder: Embedding | None = None,
    app: AppPixels | None = None,
) -> Ladder:
    """Run every case on both sides and compare them on all rungs.

    Args:
        reference: what is right; an `HFReference`, or stored values.
        runtime: the llama.cpp to test.
        cases: at least one; a rung that has nothing to compare (no pictures) is "not measured".
        thresholds: of `Floor.thresholds`.
        top: tokens compared at each place; the KL lumps all others.
        embedder: what gives the same file's embeddings of pictures; without one that rung is "not measured". The
            reference must keep its own (`HFReference(…, embeds=True)`) before the floor is measured.
        app: the pixels that the app says it sends.

    A case that the runtime refuses breaks the rung where that shows; it raises nothing. A server that is gone raises
    ServiceError, a GGUF that llama.cpp breaks down on VerificationError.
    """
    return Ladder.of(observe(reference, runtime, cases, top, embedder, app), runtime, thresholds)


def observe(
    reference: Reference,
    runtime: Runtime,
    cases: Sequence[Case],
    top: int = TOP,
    embedder: Embedding | None = None,
    app: AppPixels | None = None,
) -> list[Observed]:
    """Both sides of every case, as `climb` compares them."""
    assert cases
    seen = [Observed.of(reference.expected(case), runtime, case, top) for case in cases]
    if embedder:
        seen = with_embeddings(seen, embedder)
    if app:
        seen = [replace(one, handed=tuple(map(app.of, one.case.sources))) for one in seen]
    return seen


def with_embeddings(seen: Sequence[Observed], embedder: Embedding) -> list[Observed]:
    """All pictures of all cases embedded in one go."""
    rows = iter(embedder.of([image for one in seen for image in one.case.images]))
    return [
        replace(one, embeddings=np.concatenate([next(rows) for _ in one.case.images])) if one.case.images else one
        for one in seen
    ]


# --- in words --------------------------------------------------------------------------------------------------------
#
# {"f16": broken, …}             the conversion is wrong: nothing can be said about rounding yet
# {"f16": ok, "q8_0": broken}    the conversion is right, and rounding costs more than rounding explains
# {"q8_0": broken}               either; validate the f16 file too

EXACT = ("f32", "f16", "bf16")  # forms that hold the weights, or all but all of them


def verdict(ladders: Mapping[str, Ladder]) -> list[str]:
    """Sentences, the most important first."""
    exact = [form for form in ladders if form in EXACT]
    rounded = [form for form in ladders if form not in EXACT]
    broken = {form: ladder.first_broken for form, ladder in ladders.items() if ladder.first_broken}
    if not broken:
        return [
            f"What runs in llama.cpp is what was trained ({', '.join(ladders)}): no rung is broken{unproven(ladders)}.",
            *set_apart(ladders),
            *cost(ladders),
        ]
    lines = [
        f"{form} breaks at the rung `{broken[form].name}`: {broken[form].why}"
        for form in [*exact, *rounded]
        if form in broken
    ]
    return [blame(exact, rounded, list(broken)), *lines, *cost(ladders)]


def unproven(ladders: Mapping[str, Ladder]) -> str:
    """Limits of the verdict: rungs that were not measured, and those whose limits are wide."""
    rungs = [rung for ladder in ladders.values() for rung in ladder.rungs]
    missing = dict.fromkeys(rung.name for rung in rungs if rung.status == NOT_MEASURED and rung.why != NO_PICTURE)
    weak = dict.fromkeys(rung.name for rung in rungs if rung.note.startswith(WEAK))
    parts = [f"{', '.join(names)} {what}" for names, what in ((missing, "not measured"), (weak, "weak")) if names]
    return f" ({'; '.join(parts)})" if parts else ""


def blame(exact: list[str], rounded: list[str], broken: list[str]) -> str:
    wrong = [form for form in exact if form in broken]
    if wrong:
        beyond = f"; {', '.join(rounded)} says nothing about quantization until that is right" if rounded else ""
        return f"Conversion error: {', '.join(wrong)} keeps the weights, yet does not do what was trained{beyond}."
    if exact:
        return (
            f"Quantization damage: {', '.join(exact)} does what was trained, {', '.join(broken)} does not, by more "
            "than rounding explains in transformers."
        )
    return (
        f"{', '.join(broken)} is not what was trained; validate the f16 file too, which tells conversion from rounding."
    )


def set_apart(ladders: Mapping[str, Ladder]) -> list[str]:
    """Of a mixture of experts: how much near ties of routers leave unproven."""
    parts = []
    for form, ladder in ladders.items():
        places, told = ladder["logprobs"].measured.get("positions_of_another_routing", 0), ladder["text"].measured
        if places or told.get("another_routing"):
            answers = f"{told.get('another_routing', 0)} of {told.get('cases', 0)} answers"
            parts.append(f"{form}: {plural(places, 'place')} of forced answers and {answers}")
    if not parts:
        return []
    return [f"Not proved, since near ties of routers may choose other experts there ({'; '.join(parts)})."]


def cost(ladders: Mapping[str, Ladder]) -> list[str]:
    """What rounding costs, where there is an exact form to compare with."""
    measured = {form: ladder["logprobs"].measured.get("kl_mean") for form, ladder in ladders.items()}
    known = {form: value for form, value in measured.items() if value is not None}
    told = ", ".join(f"{form} {value:.2g}" for form, value in known.items())
    return [f"Mean KL from the trained model: {told} nats."] if len(known) > 1 else []
