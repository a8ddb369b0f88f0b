"""Short runs of `advise`: trained together on one frozen base, scored on held-out rows, kept in a ledger.

    bench = ShortRuns(config, material, short_runs(folder), recipe)
    bench.run([TrialRun(16, 2e-4, seed=1), …], "A")       # those that the ledger has are not trained again
    bench.choose                                          # TrialLosses on the rows that decide

Runs share forward passes; those that cannot (`why_in_turn`) train one after the other by the Trainer, on the same rows
from the same starts. The first run of a folder trains alone: its time and memory are those of one run. Rows of the last
comparison (`confirm`) are scored for runs of the rungs C and E only, lie in the same file and are read by `confirm`
alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rankwise.core.allocate import spectral_gains, spent
from rankwise.core.factors import Factors
from rankwise.core.site import Site
from rankwise.core.spectrum import together
from rankwise.data.dataset import Collator
from rankwise.data.render import Renderer
from rankwise.data.split import Parts
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.atomic import atomic_write
from rankwise.files.document import typed
from rankwise.files.ledger import Ledger, Row
from rankwise.files.processes import announce, gathered, own_share, process_index
from rankwise.models.sites import fused_experts
from rankwise.options.advise import AdviseConfig
from rankwise.page.progress import progress
from rankwise.page.text import memory, plural
from rankwise.ranks.gain import input_spectra
from rankwise.study.advice import UNIFORM, TrialLosses, TrialRun
from rankwise.study.arms import PARTS, Gains, part_of, ranks_within, uniform_ranks
from rankwise.study.evidence import Array, by_group
from rankwise.study.footprint import Footprint, at_most, free_memory
from rankwise.study.material import Material, ScoredItems
from rankwise.train.together.alone import StepLosses
from rankwise.train.together.fit import fit
from rankwise.train.together.optimizer import ArmSettings
from rankwise.train.together.stacked import PASSED_ON
from rankwise.train.together.starts import SCALE, random_start, row_order
from rankwise.train.together.train import Arm, TrainedArm, fitting

BATCH_SECONDS = 180  # a batch that is cut starts anew: this much is lost at most
CONFIRMED = "CE"
TOLERANCES = (0.005, 0.02, 0.1)  # of the parameters that are to be equal: small matrices have few ranks
EVA_ROWS, EVA_BATCH = 64, 8
FACTS: Mapping[str, type] = {
    **{"rung": str, "diverged": bool, "train_losses": list, "batch": int},
    **dict.fromkeys(("parameters", "tokens", "peak_bytes"), int),
    **dict.fromkeys(("training_seconds", "seconds"), float),
}  # of a ledger's row, with their types
Ranks = Mapping[Site, int]


@dataclass
class ShortRuns:
    """The bench of one `advise`. recipe: hash of everything that decides how a trial trains, beside its key. largest:
    the rank that the others are compared with. in_turn: why runs share no forward pass; empty where they do. needs:
    memory of a run, to which batches are cut. told: called with the seconds of a run around each batch, once they are
    known. base_losses: what runs in turn are watched against."""

    config: AdviseConfig
    material: Material
    ledger: Ledger
    recipe: str
    largest: int
    in_turn: str = ""
    needs: Footprint | None = None
    told: Callable[[float], object] = lambda seconds: None
    asked: dict[TrialRun, str] = field(default_factory=dict)
    base_losses: StepLosses = field(default_factory=dict)

    @property
    def settings(self) -> ArmSettings:
        config = self.config
        warmup = math.ceil(config.warmup_ratio * config.steps)
        return ArmSettings(
            config.steps,
            config.batch_size,
            config.lr_scheduler_type,
            warmup,
            config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        )

    def key(self, trial: TrialRun) -> dict[str, Any]:
        return asdict(trial) | {"recipe": self.recipe}

    def run(self, trials: Sequence[TrialRun], rung: str) -> None:
        """Ask for trials; processes share the batches of those that are not finished."""
        self.asked |= dict.fromkeys(trials, rung)
        missing = gathered(dict.fromkeys(trial for trial in trials if not self.is_finished(trial)))
        left = [trial for trial in dict.fromkeys(trials) if trial in missing]  # alike in all processes
        with progress(total=len(left), desc=f"rung {rung}", unit="run", leave=True) as bar:
            while left:
                self.tell()
                size = self.batch_size()
                count = min(len(left), size * process_index()[1])
                batches = [left[start : min(start + size, count)] for start in range(0, count, size)]
                for batch in own_share(batches, [float(len(batch)) for batch in batches]):
                    self.make(batch, rung)
                gathered({})  # all have finished theirs
                self.ledger.refresh()
                left = left[count:]
                bar.update(count)
        self.tell()

    def is_finished(self, trial: TrialRun) -> bool:
        """Whether it is in the ledger, with its factors where a placement may be made of them: another largest rank
        than before has none."""
        key = self.key(trial)
        if key not in self.ledger:
            return False
        needs = "energy" in self.config.placements and self.is_kept(trial) and not self.ledger[key]["diverged"]
        return not needs or self.factors(trial).is_file()

    def tell(self) -> None:
        if self.seconds:
            self.told(self.seconds)

    def batch_size(self) -> int:
        """Trials per batch: one where no time is known, else as many as take `BATCH_SECONDS` and fit into memory."""
        if self.in_turn:
            return 1
        arms, _ = self.room
        return max(1, min(arms, int(BATCH_SECONDS / self.seconds))) if self.seconds else 1

    @cached_property
    def room(self) -> tuple[int, int | None]:
        """Trials in a batch, and of these in one forward pass (None: as many as the device works on well), as memory
        allows; the same in every process."""
        asked = self.config.batch_arms
        if self.needs is None:
            return asked, None
        device = self.material.model.device
        free = free_memory(device)
        widest = self.config.batch_size * max(len(row["input_ids"]) for row in self.material.rows)
        passes = fitting(widest, device)
        arms, at_once = at_most(self.needs, free, asked, passes)
        if arms < asked:
            announce(f"memory: batches of {plural(arms, 'run')} instead of {asked}; {memory(free)} are free")
        return arms, at_once if at_once < passes else None

    def make(self, trials: Sequence[TrialRun], rung: str) -> None:
        """One batch, from start to ledger."""
        material, arms = self.material, [self.arm(trial) for trial in trials]
        parts = {"dev": material.dev} | ({"test": material.test} if rung in CONFIRMED else {})
        scored = {name: part.batches for name, part in parts.items()}
        alone = {"in_turn": True, "base_losses": self.base_losses}
        how: dict[str, Any] = alone if self.in_turn else {"at_once": self.room[1]}
        fitted = fit(material.model, arms, material.rows, material.collate, self.settings, scored, watch=True, **how)
        for trial, result in zip(trials, fitted.trained, strict=True):
            self.keep(trial, result)
        rows = [
            {
                "key": self.key(trial),
                "rung": rung,
                "parameters": sum(a.numel() + b.numel() for a, b in result.pairs.values()),
                "diverged": bool(fitted.losses["dev"][index].isnan().any()),
                "train_losses": [round(loss, 6) if math.isfinite(loss) else None for loss in result.losses],
                "tokens": result.tokens,
                "training_seconds": round(fitted.training_seconds / len(trials), 3),
                "seconds": round(fitted.seconds / len(trials), 3),
                "peak_bytes": fitted.peak_bytes,
                "batch": len(trials),
            }
            for index, (trial, result) in enumerate(zip(trials, fitted.trained, strict=True))
        ]
        self.ledger.add(rows, fitted.losses)

    def arm(self, trial: TrialRun) -> Arm:
        ranks = self.ranks(trial)
        start = random_start(ranks, trial.seed, self.largest)
        order = row_order(len(self.material.rows), self.config.steps * self.config.batch_size, trial.seed)
        return Arm(start, dict.fromkeys(start, SCALE), trial.learning_rate, order)

    def ranks(self, trial: TrialRun) -> dict[Site, int]:
        """Ranks of a trial: other placements spend the parameters of uniform rank, as nearly as the matrices allow.

        UsageError where they cannot come near: attention alone may be too small.
        """
        uniform = {site: min(trial.rank, site.largest_rank) for site in self.material.sites}
        if trial.placement == UNIFORM:
            return uniform
        for tolerance in TOLERANCES[:-1]:
            with suppress(UsageError):
                return self.placed(trial.placement, spent(uniform), tolerance)
        return self.placed(trial.placement, spent(uniform), TOLERANCES[-1])

    def can_place(self, trial: TrialRun) -> bool:
        try:
            self.ranks(trial)
        except UsageError:
            return False
        return True

    def placed(self, placement: str, budget: int, tolerance: float) -> dict[Site, int]:
        """UsageError where no ranks come that near to the budget."""
        sites = list(self.material.sites)
        if placement in PARTS:
            return uniform_ranks(part_of(sites, placement), budget, tolerance)
        gains = self.energy_gains() if placement == "energy" else self.eva_gains
        return ranks_within(gains, budget, max(site.largest_rank for site in sites), tolerance)

    def energy_gains(self) -> Gains:
        """σ² of the change that the best trial of the largest rank made, computed from its factors."""
        file, spectra = self.factors(self.best_of_largest), {}
        try:
            kept = load_file(file)
            for site in self.material.sites:
                left, right = SCALE * kept[f"{site.path}.B"], kept[f"{site.path}.A"]
                each = zip(left, right, strict=True) if site.experts else [(left, right)]
                spectra[site] = together([Factors(*halves).spectrum() for halves in each])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(
                f"{file}: no factors of a finished run of this model ({error}); delete it, and its run is made again"
            ) from error
        return spectral_gains(spectra)

    @property
    def best_of_largest(self) -> TrialRun:
        kept = [trial for trial in self.asked if self.is_kept(trial)]
        losses = self.losses(kept, "dev", self.material.dev, self.base_of_choose)
        return min(kept, key=lambda trial: (losses.loss(trial), trial.learning_rate))

    @cached_property
    def eva_gains(self) -> Gains:
        """Share of the inputs' variance, on training rows (Paischer et al. 2024)."""
        rows = self.material.rows[:EVA_ROWS]
        device = self.material.device
        batches = [
            {name: value.to(device) for name, value in self.material.collate(rows[at : at + EVA_BATCH]).items()}
            for at in range(0, len(rows), EVA_BATCH)
        ]
        return spectral_gains(input_spectra(self.material.model, list(self.material.sites), batches), "site")

    def is_kept(self, trial: TrialRun) -> bool:
        """Whether a trial's factors are kept, for the placements that are made of them."""
        first = min(each.seed for each in self.asked)
        return trial.rank == self.largest and trial.placement == UNIFORM and trial.seed == first

    def factors(self, trial: TrialRun) -> Path:
        return self.ledger.folder / "factors" / self.recipe / f"rank{trial.rank}-{trial.learning_rate:g}.safetensors"

    def keep(self, trial: TrialRun, result: TrainedArm) -> None:
        if self.is_kept(trial) and not result.diverged:
            tensors = {f"{path}.A": a.contiguous() for path, (a, _) in result.pairs.items()}
            tensors |= {f"{path}.B": b.contiguous() for path, (_, b) in result.pairs.items()}
            with atomic_write(self.factors(trial)) as temporary:
                save_file(tensors, temporary)

    @property
    def rows(self) -> dict[TrialRun, dict[str, Any]]:
        """Ledger rows of the trials that were asked for."""
        return {trial: self.ledger[self.key(trial)] for trial in self.asked}

    @property
    def finished(self) -> list[dict[str, Any]]:
        """Ledger rows of this recipe."""
        return rows_of(self.ledger, self.recipe)

    @property
    def seconds(self) -> float:
        """Of a trial, by the median of those finished: a slow start counts little; 0 before the first."""
        return median_seconds(self.finished)

    def affords(self, rung: str, trials: int) -> bool:
        """A rung that was begun goes on, whatever it takes: what stops the climb is recorded in no other place."""
        rows = self.finished
        if any(row["rung"] == rung for row in rows):
            return True
        processes = process_index()[1]
        spent = sum(row["seconds"] for row in rows)
        return bool(spent + trials * self.seconds <= 60 * self.config.minutes * processes)

    @property
    def choose(self) -> TrialLosses:
        return self.losses(list(self.asked), "dev", self.material.dev, self.base_of_choose)

    def confirm(self, trials: Sequence[TrialRun]) -> TrialLosses:
        return self.losses(trials, "test", self.material.test, self.base_of_confirm)

    def losses(self, trials: Sequence[TrialRun], part: str, scored: ScoredItems, base: Array) -> TrialLosses:
        sums = {
            trial: by_group(self.ledger.numbers(self.key(trial), part).double().numpy(), scored.groups)
            for trial in trials
        }
        return TrialLosses(sums, by_group(scored.tokens, scored.groups), base)

    @cached_property
    def base_of_choose(self) -> Array:
        return self.base(self.material.dev)

    @cached_property
    def base_of_confirm(self) -> Array:
        return self.base(self.material.test)

    def base(self, scored: ScoredItems) -> Array:
        return by_group(answer_losses(self.material.model, scored.batches)[0].double().cpu().numpy(), scored.groups)


def short_runs(folder: Path) -> Ledger:
    """The ledger of a folder's short runs. DataError for entries of another command."""
    return Ledger(folder, check_row)


def rows_of(ledger: Ledger, recipe: str) -> list[Row]:
    """Entries of runs of these settings."""
    return [row for row in ledger.rows.values() if row["key"]["recipe"] == recipe]


def check_row(row: Row) -> None:
    """KeyError, TypeError or ValueError for a ledger's row that is none of a short run."""
    TrialRun(**{name: value for name, value in row["key"].items() if name != "recipe"})
    typed(row["key"]["recipe"], str)
    for name, kind in FACTS.items():
        typed(row[name], kind)
    if not all(0 <= row[name] < math.inf for name in ("training_seconds", "seconds")):
        raise ValueError(f"seconds are {row['training_seconds']} and {row['seconds']}")
    if not row["train_losses"]:
        raise ValueError("no train_losses")
    for loss in row["train_losses"]:
        typed(loss, float | None)


def median_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
    return float(median(row["seconds"] for row in rows)) if rows else 0.0


def why_in_turn(skeleton: PreTrainedModel, renderer: Renderer, parts: Parts, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why runs cannot share a forward pass; empty where they can."""
    shown = any(example.images for part in (parts.train, parts.dev, parts.test) for example in part)
    if shown and renderer.sight is not None:
        return "rows have pictures"
    if fused_experts(skeleton):
        return "the model has fused experts"
    foreign = sorted(set(Collator.of(renderer.tokenizer, sight=renderer.sight)([rows[0]])) - PASSED_ON)
    return f"the model takes {', '.join(foreign)} beside the tokens" if foreign else ""
