"""The design of a study: arms, contrasts, grids, seeds. Checked before anything is read.

design = design_study(config)
design.contenders        arm × budget × scheduler × phase state
design.contrasts         (first, second) pairs that get a verdict
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.data.sources.load import check_data
from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import digest_of, read_if_there, write_json
from rankwise.files.document import Document, append_lines, as_plain, finished_lines, read_lines
from rankwise.files.run_folder import versions
from rankwise.options.field import flatten
from rankwise.options.study import StudyConfig
from rankwise.pipeline.idle import refuse_idle
from rankwise.study.arms import (
    BASE,
    REFERENCES,
    VERSUS,
    check_arm,
    chooses,
    contrast,
    default_arms,
    default_contrasts,
    has_state,
    yoked_to,
)

NOT_DESIGN = ("output_dir", "batch_arms", "device", "deviation", "time_only")
TUNING_OFFSET = 500


@dataclass(frozen=True)
class Contender:
    """An arm at one budget, in one way of training; its learning rate and scale are still to be tuned.

    `budget` is empty for references, which have none.
    """

    arm: str
    budget: str
    scheduler: str
    state: str

    @property
    def is_reference(self) -> bool:
        return self.arm in REFERENCES

    @property
    def trains_alone(self) -> bool:
        """Whether it trains separately (all weights, or phases chosen during training) instead of in a stack."""
        return self.is_reference or chooses(self.arm)

    @property
    def replayed(self) -> Contender | None:
        """The contender whose choices a yoked arm replays."""
        arm = yoked_to(self.arm)
        return replace(self, arm=arm) if arm is not None else None


@dataclass(frozen=True)
class Run:
    """One training run, as the ledger keeps it. purpose: tune or report. source: the run that a yoked one replays."""

    contender: Contender
    scale: str
    learning_rate: float
    seed: int
    purpose: str
    recipe: str
    source: Run | None = None

    @property
    def key(self) -> dict[str, Any]:
        own = {name: value for name, value in vars(self).items() if name not in ("contender", "source")}
        told = ("scale", "learning_rate", "seed")
        replays = {"replays": {name: vars(self.source)[name] for name in told}} if self.source is not None else {}
        return vars(self.contender) | own | replays


@dataclass(frozen=True)
class RateGrid:
    """Learning rates low·ratio^k; k below 0 and above the last point continue it."""

    low: float
    high: float
    points: int

    def rate(self, k: int) -> float:
        ratio = (self.high / self.low) ** (1 / (self.points - 1))
        return float(f"{self.low * ratio**k:.6g}")


@dataclass(frozen=True)
class Design:
    """A checked study."""

    config: StudyConfig
    arms: tuple[str, ...]
    contrasts: tuple[tuple[str, str], ...]

    @property
    def contenders(self) -> list[Contender]:
        """Every arm at every budget, with every scheduler and phase state that matters to it; references last."""
        grid = self.config.grid
        found = []
        for budget, scheduler, arm in itertools.product(self.config.budgets, grid.lr_schedulers, self.arms):
            states = grid.phase_states if has_state(arm, self.config) else ["keep"]
            way = grid.lr_schedulers[0] if arm == BASE else scheduler
            found += [Contender(arm, "" if arm in REFERENCES else budget, way, state) for state in states]
        return sorted(dict.fromkeys(found), key=lambda each: each.is_reference)

    def grid(self, contender: Contender) -> RateGrid:
        own = self.config.grid
        if contender.arm == "full":
            return RateGrid(own.full_grid_low, own.full_grid_high, own.grid_points)
        return RateGrid(own.grid_low, own.grid_high, own.grid_points)

    def pairs(self) -> list[tuple[Contender, Contender]]:
        """The primary contrasts in every budget and way of training."""
        return [pair for first, second in self.contrasts for pair in self.paired(first, second)]

    def paired(self, first: str, second: str) -> list[tuple[Contender, Contender]]:
        """first and second in the same budget and scheduler; phase states are matched where they matter to both."""
        return [
            (one, other)
            for one, other in itertools.product(self.contenders, repeat=2)
            if (one.arm, other.arm) == (first, second)
            and (one.scheduler == other.scheduler or BASE in (one.arm, other.arm))
            and (one.budget == other.budget or not one.budget or not other.budget)
            and (one.state == other.state or not (has_state(first, self.config) and has_state(second, self.config)))
        ]

    def label(self, contender: Contender) -> str:
        """The arm, with its phase state where there are several."""
        several = len(self.config.grid.phase_states) > 1 and has_state(contender.arm, self.config)
        return f"{contender.arm}, {contender.state}" if several else contender.arm

    def tuning_seeds(self) -> list[int]:
        return [self.config.seed * 1000 + TUNING_OFFSET + i for i in range(self.config.grid.tuning_seeds)]

    def report_seeds(self, count: int) -> list[int]:
        return [self.config.seed * 1000 + i for i in range(count)]

    @property
    def content(self) -> dict[str, Any]:
        """All preregistered decisions: the content that is hashed."""
        rest = {name: value for name, value in flatten(self.config).items() if name not in NOT_DESIGN}
        return rest | {"arms": list(self.arms), "primary": [VERSUS.join(pair) for pair in self.contrasts]}

    @property
    def recipe(self) -> str:
        """Hash of the settings that determine a run's training and scoring: runs of another recipe are not reused."""
        asked = ("question", "arms", "primary", "budgets", "smallest_effect", "resamples", "kind", "metric")
        grids = tuple(flatten(self.config.grid))
        counts = ("first_seeds", "more_seeds", "most_seeds")
        rest = {name: value for name, value in self.content.items() if name not in (*asked, *grids, *counts)}
        return digest(rest)[:16]


def digest(content: Any) -> str:
    """SHA-256 of the content as canonical JSON."""
    return digest_of(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def design_study(config: StudyConfig) -> Design:
    """The design of a config. UsageError for invalid values."""
    check(config)
    arms = tuple(dict.fromkeys(config.arms or default_arms(config)))
    for arm in arms:
        check_arm(arm, config)
    check_yoked(arms, config)
    contrasts = tuple(contrast(text, arms) for text in config.primary) or default_contrasts(arms, config)
    if not contrasts:
        raise UsageError(f"no primary contrast among the arms {', '.join(arms)}; name them, as in --primary 'a vs b'")
    return Design(config, arms, contrasts)


def check_yoked(arms: tuple[str, ...], config: StudyConfig) -> None:
    """What is replayed must be made, and for another seed."""
    for arm in arms:
        if config.kind == "phases" and yoked_to(arm) not in (None, *arms):
            raise UsageError(f"{arm} replays the runs of {yoked_to(arm)}: name that arm as well")
        if config.kind == "phases" and yoked_to(arm) and config.grid.tuning_seeds < 2:
            raise UsageError(f"{arm} replays the run of another seed, in tuning as well: --tuning_seeds at least 2")


def another_seed(seed: int, first: int) -> int:
    """The seed whose run a yoked one replays: the one before, of the first the second. Seeds that are added later
    change nothing about it."""
    return seed - 1 if seed > first else seed + 1


def check(config: StudyConfig) -> None:
    """Refuse invalid numbers and combinations."""
    check_data(config.data, "study")
    refuse_idle(config)
    grid = config.grid
    if not config.model.model_name:
        raise UsageError("study needs a model: --model_name FOLDER_OR_HUB_ID")
    if not config.first_seeds <= config.most_seeds < TUNING_OFFSET:
        raise UsageError(
            f"seeds need --first_seeds ≤ --most_seeds < {TUNING_OFFSET}; got {config.first_seeds} and "
            f"{config.most_seeds}"
        )
    for low, high in ((grid.grid_low, grid.grid_high), (grid.full_grid_low, grid.full_grid_high)):
        if not low < high:
            raise UsageError(f"a grid of learning rates needs low < high; got {low:g} and {high:g}")
    if config.kind == "plans" and (len(grid.lr_schedulers) > 1 or len(grid.phase_states) > 1):
        raise UsageError("--lr_schedulers and --phase_states are crossed in a study of phases; give one of each")
    if not config.budgets:
        raise UsageError("study needs --budgets: parameter budgets of every arm")


def run_counts(design: Design) -> Mapping[str, int]:
    """How many runs the plan has: for tuning without growth, and for reporting at least and at most."""
    config, tuned = design.config, [each for each in design.contenders if each.arm != "base"]
    scales = {each: 1 if each.is_reference else len(config.grid.scales) for each in tuned}
    tuning = sum(scales.values()) * config.grid.grid_points * config.grid.tuning_seeds
    base = len(design.contenders) - len(tuned)
    return {
        "tuning": tuning,
        "least": tuning + base + len(tuned) * config.first_seeds,
        "most": tuning + base + len(tuned) * config.most_seeds,
    }


def further_counts(config: StudyConfig) -> list[int]:
    """Numbers of seeds at which the stop rule is asked."""
    steps = math.ceil((config.most_seeds - config.first_seeds) / config.more_seeds)
    return [min(config.first_seeds + i * config.more_seeds, config.most_seeds) for i in range(steps + 1)]


PREREGISTRATION = Document("preregistration.json", "rankwise-preregistration/1", "a preregistration", "rankwise study")
FILE, DEVIATIONS, TEST_READ = PREREGISTRATION.name, "deviations.jsonl", "test_read.json"


@dataclass(frozen=True)
class Registration:
    """A registered study in its folder."""

    folder: Path

    @property
    def first(self) -> dict[str, Any]:
        """VerificationError where it was altered."""
        return sound(PREREGISTRATION.read(self.folder), str(self.folder / FILE))

    @property
    def deviations(self) -> list[dict[str, Any]]:
        """VerificationError where one was altered."""
        path = self.folder / DEVIATIONS
        return [
            sound(row, f"{path}, line {number}")
            for number, row in enumerate(read_lines(path, "a deviation", dict, "restore the file"), 1)
        ]

    @property
    def test_read(self) -> dict[str, Any] | None:
        return read_if_there(self.folder / TEST_READ) or None

    def deviate(self, why: str, what: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Put a deviation on record, with what was known when it was decided."""
        row = {
            "time": now(),
            "why": why,
            **what,
            "runs_finished": sum(len(list(finished_lines(path))) for path in self.folder.glob("runs*.jsonl")),
            "test_was_read": self.test_read is not None,
            "sha256": digest(content),
            "versions": versions(),
            "content": content,
        }
        append_lines(self.folder / DEVIATIONS, [as_plain(row, sort_keys=True)])

    def read_test(self, runs: Sequence[Mapping[str, Any]], deviation: str | None) -> None:
        """Mark that the test items of these runs are looked at; once, or as a deviation.

        The same runs again show the same numbers, and are no second reading.
        """
        mark = digest(sorted(digest(key) for key in runs))
        before = self.test_read
        if before is not None and before["runs_sha256"] == mark:
            return
        if before is not None and not deviation:
            raise UsageError(
                f"{self.folder}: the test items were read on {before['time']} for {before['runs']} runs, and now "
                f"{len(runs)} others or more would be read; give --deviation 'why', which the report will show"
            )
        if before is not None:
            assert deviation is not None
            self.deviate(deviation, {"test_read_again": before["time"]}, self.current)
        write_json(self.folder / TEST_READ, {"time": now(), "runs": len(runs), "runs_sha256": mark})

    @property
    def latest(self) -> dict[str, Any]:
        """The current design: as registered, or as changed by the last deviation."""
        return [self.first, *self.deviations][-1]

    @property
    def current(self) -> dict[str, Any]:
        content: dict[str, Any] = self.latest["content"]
        return content


def sound(record: dict[str, Any], where: str) -> dict[str, Any]:
    """VerificationError where a record's content is not what its hash is of."""
    if digest(record["content"]) != record["sha256"]:
        raise VerificationError(
            f"{where}: not what was registered: its content has another sha256 than it states. Put the file back as it "
            "was, or take another --output_dir"
        )
    return record


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def register(folder: Path, content: Mapping[str, Any], deviation: str | None) -> Registration:
    """Write the preregistration; of a study that has begun, put on record where it goes on otherwise.

    Raises UsageError, naming every difference, where it does and no deviation is declared.
    """
    registration = Registration(folder)
    content = as_plain(content)
    if not (folder / FILE).is_file():
        facts = {"sha256": digest(content), "time": now(), "versions": versions()}
        PREREGISTRATION.write(folder, facts | {"content": content})
        return registration
    changed = declared_changes(folder, content, deviation)
    if changed:
        assert deviation is not None
        registration.deviate(deviation, {"changed": changed}, content)
    return registration


def declared_changes(folder: Path, content: Mapping[str, Any], deviation: str | None) -> dict[str, list[Any]]:
    """What has changed since registration, if there was one. UsageError, naming it, where no deviation is declared."""
    if not (folder / FILE).is_file():
        return {}
    latest = Registration(folder).latest
    changed = differences(latest["content"], as_plain(content)) | other_versions(latest.get("versions"))
    if changed and not deviation:
        lines = "".join(f"\n  {name}: {before!r} → {after!r}" for name, (before, after) in changed.items())
        raise UsageError(
            f"{folder} holds a study that was registered otherwise:{lines}\n"
            "take another --output_dir, or go on with --deviation 'why', which the report will show"
        )
    return changed


def other_versions(before: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Libraries that have changed since registration: the runs would mix versions."""
    here, there = ({f"version of {name}": one for name, one in found.items()} for found in (before or {}, versions()))
    return differences(here, there) if before else {}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*before, *after])
    return {
        name: [before.get(name), after.get(name)] for name in names if before.get(name, ...) != after.get(name, ...)
    }
