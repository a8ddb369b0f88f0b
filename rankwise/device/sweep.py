"""Choose the quantization type to ship: the smallest that is non-inferior to the largest on the same items.

    forms ── LlamaServer, one after the other ── ask(runtime) ──▶ right or wrong per item, seconds, peak memory
          ── paired differences from the largest ──▶ not inferior | inferior | undecided ──▶ Sweep.chosen

Paired, because forms of one model mostly err on the same items: a difference of 1 % shows on far fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.device.calibration import Calibration, calibrated, calibration_rows
from rankwise.device.llama.runtime import LlamaServer, Runtime
from rankwise.device.scores import NOT_INFERIOR, UNDECIDED, Difference, compared
from rankwise.device.sides import Shipment, Shipped, TrainedSide, answers_in, context
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.bootstrap import wilson
from rankwise.files.document import Document
from rankwise.files.gguf import GGUFFile
from rankwise.files.processes import announce
from rankwise.gguf.imatrix import Imatrix
from rankwise.gguf.quantize import MATRIX_KEY, quantize, quantizer
from rankwise.gguf.reading import first_few
from rankwise.options.commands import ValidateConfig

SWEEP = Document("sweep.json", "rankwise-sweep/1", "a sweep", "rankwise validate --sweep")
MARGIN = 0.02  # of accuracy
MATRIX, WITH_MATRIX = "imatrix.gguf", "imatrix-"  # a file; what marks forms that were made with it
SOURCES = ("f16", "bf16", "f32")  # what further forms are made from, the first that is there


@dataclass(frozen=True)
class ItemOutcome:
    """One item's outcome: right or not, and the seconds of its request."""

    right: bool
    seconds: float


@dataclass(frozen=True)
class Tried:
    """A quantization's outcomes by id. bytes: of the text model and the mmproj; memory: peak resident bytes of the
    process that ran it, interpreter included, None where unknown."""

    form: str
    bytes: int
    items: Mapping[str, ItemOutcome]
    memory: int | None = None

    @property
    def rights(self) -> dict[str, bool]:
        return {name: item.right for name, item in self.items.items()}

    @property
    def right(self) -> int:
        return sum(self.rights.values())

    @property
    def accuracy(self) -> float:
        return self.right / len(self.items)


@dataclass(frozen=True)
class Sweep:
    """All quantization types, largest first, and the one to ship: None if none is good enough. why: in a sentence.
    imatrix: the importance matrix that they were made with."""

    tried: tuple[Tried, ...]
    differences: Mapping[str, Difference]
    margin: float
    chosen: str | None
    why: str
    min_accuracy: float | None = None
    imatrix: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For sweep.json. Accuracies and differences in shares of 1, sizes in bytes, seconds."""
        return {
            "items": len(self.tried[0].items),
            "reference": self.tried[0].form,
            "margin": self.margin,
            "min_accuracy": self.min_accuracy,
            "chosen": self.chosen,
            "why": self.why,
            **({"imatrix": self.imatrix} if self.imatrix else {}),
            "forms": [self._row(tried) for tried in self.tried],
        }

    def _row(self, tried: Tried) -> dict[str, Any]:
        seconds = [item.seconds for item in tried.items.values()]
        difference = self.differences.get(tried.form)
        return {
            "form": tried.form,
            "bytes": tried.bytes,
            "accuracy": tried.accuracy,
            "interval": list(wilson(tried.right, len(tried.items))),
            "peak_memory": tried.memory,
            "seconds_median": float(np.median(seconds)),
            "seconds_p95": float(np.quantile(seconds, 0.95)),
            "against_reference": asdict(difference) if difference else None,
        }

    def save(self, folder: Path | str) -> Path:
        return SWEEP.write(folder, self.as_dict())


# --- rankwise validate --sweep ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planned:
    """What a sweep starts from, checked before anything is answered: the largest form, and what the importance matrix
    is or will be computed on."""

    source: Shipped
    text: Path
    imatrix: Imatrix | None = None
    calibration: Calibration | None = None

    def matrix(self, trained: TrainedSide, out: Path) -> Imatrix | None:
        if self.calibration is None:
            return self.imatrix
        return calibrated(trained, self.calibration, self.text, out / "sweep" / MATRIX)

    def facts(self, imatrix: Imatrix) -> dict[str, Any]:
        return {
            "file": imatrix.path.name,
            "sha256": imatrix.sha256,
            "datasets": list(imatrix.datasets),
            "rows": len(self.calibration.rows) if self.calibration else None,
            "pictures": self.calibration.pictures if self.calibration else None,
        }


def planned(config: ValidateConfig, trained: TrainedSide, shipped: Shipment) -> Planned:
    """UsageError where there is nothing to make the forms from, or nothing that makes them; DataError for a matrix of
    another model, and for calibration rows that are scored."""
    source = next((one for form in SOURCES for one in shipped.forms if one.form == form), None)
    if source is None or source.text is None:
        raise UsageError("--sweep needs f16 among the quantization types: rankwise export --outtype f16,q8_0")
    imatrix = calibration = None
    weighed = bool(config.imatrix or config.calibration_samples)
    have = [one.form for one in shipped.forms if one.text]
    files = form_files(source.text, [form for form in config.sweep if form not in have], weighed)
    if not all(file.is_file() for file in files.values()):
        quantizer(config.llama_cpp_dir, weighed)
    if config.imatrix:
        imatrix = Imatrix.read(config.imatrix)
        if missing := imatrix.require_fit(GGUFFile(source.text)):
            announce(f"warning: {imatrix.path} lacks {first_few(missing)}: quantized without it")
    if config.calibration_samples:
        calibration = calibration_rows(config, trained, shipped)
    return Planned(source, source.text, imatrix, calibration)


def sweep_forms(config: ValidateConfig, trained: TrainedSide, shipped: Shipment, plan: Planned, out: Path) -> Sweep:
    """Make the forms, run them, write sweep.json. UsageError where no answer of the task is right or wrong."""
    source, imatrix = plan.source, plan.matrix(trained, out)
    have = {one.form: one.text for one in shipped.forms if one.text and one.form in config.sweep}
    wanted = [form for form in config.sweep if form not in have]
    made = prepared(plan.text, wanted, config.llama_cpp_dir, config.threads, imatrix)
    files = {source.form: plan.text, **have, **made}
    forms = {form: Shipped(form, path, source.mmproj) for form, path in files.items()}
    weighed = made if imatrix else {}
    found = sweep(
        files,
        lambda runtime, form: ask(
            trained, forms[form], out / "sweep" / (WITH_MATRIX * (form in weighed) + form), runtime
        ),
        mmproj=source.mmproj,
        margin=config.sweep_margin,
        min_accuracy=config.min_accuracy,
        context=config.context or context(trained.renderer),
        threads=config.threads,
    )
    found = replace(found, imatrix=plan.facts(imatrix) if imatrix else None)
    found.save(out)
    return found


def ask(trained: TrainedSide, one: Shipped, folder: Path, runtime: Runtime) -> dict[str, ItemOutcome]:
    """Answer every item with one quantization type."""
    engine, answers = answers_in(trained, one, runtime, folder)
    right, records = answers.rights(trained.items), engine.answers()
    if right is None:
        raise UsageError(f"--sweep needs right or wrong answers; {trained.task.name} is free text")
    pairs = zip(trained.items, right, strict=True)
    return {item.id: ItemOutcome(correct, records[item.id].seconds) for item, correct in pairs}


def prepared(
    source: Path,
    forms: Sequence[str],
    llama_cpp_dir: Path | str | None = None,
    threads: int | None = None,
    imatrix: Imatrix | None = None,
) -> dict[str, Path]:
    """Form → file beside `source`, quantized from it where it is not there yet, or was made with another matrix."""
    files = form_files(source, forms, imatrix is not None)
    for form, path in files.items():
        if not path.is_file() or (imatrix and GGUFFile(path).metadata.get(MATRIX_KEY) != imatrix.sha256):
            quantize(source, path, form, llama_cpp_dir, threads or 0, imatrix)
    return files


def form_files(source: Path, forms: Sequence[str], weighed: bool = False) -> dict[str, Path]:
    """Form → …-FORM.gguf beside …-f16.gguf (or -f32, -bf16); with an importance matrix …-imatrix-FORM.gguf."""
    stem, _, own = source.stem.rpartition("-")
    if own not in ("f32", "f16", "bf16") or not stem:
        raise UsageError(f"{source}: a sweep starts from a file named …-f16.gguf (or -f32, -bf16), which it quantizes")
    return {form: source.with_name(f"{stem}-{WITH_MATRIX if weighed else ''}{form}.gguf") for form in forms}


def sweep(
    files: Mapping[str, Path],
    ask: Callable[[Runtime, str], Mapping[str, ItemOutcome]],
    *,
    mmproj: Path | None = None,
    margin: float = MARGIN,
    min_accuracy: float | None = None,
    context: int | None = None,
    threads: int | None = None,
) -> Sweep:
    """Run every quantization type over the same items, one after the other, and choose.

    ask: (runtime, form) → outcome of every item by its id; the mmproj stays the same for all forms.
    """
    tried = []
    for form, path in files.items():
        with LlamaServer(path, mmproj, context=context, threads=threads) as runtime:
            items = dict(ask(runtime, form))
            size = path.stat().st_size + (mmproj.stat().st_size if mmproj else 0)
            tried.append(Tried(form, size, items, runtime.memory()))
    return choose(tried, margin=margin, min_accuracy=min_accuracy)


def choose(tried: Sequence[Tried], *, margin: float = MARGIN, min_accuracy: float | None = None) -> Sweep:
    """The smallest quantization type that is non-inferior to the largest and reaches `min_accuracy` (a share of 1).

    Each form is compared by itself: an inferior one passes with a chance of at most 2.5 %, so of k inferior ones some
    may pass with at most k times that. DataError where forms were tried on different items.
    """
    ordered = sorted(tried, key=lambda one: -one.bytes)
    if not ordered or not ordered[0].items:
        raise DataError("nothing to choose from: no quantization type was evaluated on any item")
    largest = ordered[0]
    odd = [one.form for one in ordered if one.items.keys() != largest.items.keys()]
    if odd:
        raise DataError(f"{', '.join(odd)}: not evaluated on the same items as {largest.form}; run the sweep again")
    differences = {one.form: compared(one.rights, largest.rights, margin) for one in ordered[1:]}
    sound = [one for one in ordered if one is largest or differences[one.form].verdict == NOT_INFERIOR]
    good = [one for one in sound if min_accuracy is None or one.accuracy >= min_accuracy]
    chosen = good[-1].form if good else None
    why = _why(ordered, differences, chosen, margin, min_accuracy)
    return Sweep(tuple(ordered), differences, margin, chosen, why, min_accuracy)


def _why(
    ordered: Sequence[Tried],
    differences: Mapping[str, Difference],
    chosen: str | None,
    margin: float,
    min_accuracy: float | None,
) -> str:
    largest = ordered[0].form
    unsure = {form: one for form, one in differences.items() if one.verdict == UNDECIDED}
    more = ""
    if unsure:
        needed = max(one.needed or 0 for one in unsure.values())
        more = f"; undecided: {', '.join(unsure)}: more items would tell, about {needed:,} in all"
        more += f" ({needed - len(ordered[0].items):,} more)" if needed else ""
    if chosen is None:
        return f"no form reaches an accuracy of {min_accuracy} and is not inferior to {largest}{more}"
    if chosen == largest:
        return f"ship {largest}: no smaller form is shown to be within {100 * margin:g} points of it{more}"
    return f"ship {chosen}: the smallest that is not inferior to {largest} by {100 * margin:g} points{more}"
