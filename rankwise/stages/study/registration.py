"""What was decided before the first run, hashed; and what went otherwise, on record.

preregistration.json     the content and its SHA-256, written before the first run and never again
deviations.jsonl         one line each time a study went on otherwise: why, what changed, how much was known by then
test_read.json           when the test items were looked at, and for which runs
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import read_object, write_json
from rankwise.files.run_folder import versions
from rankwise.stages.study.design import digest

FORMAT = "rankwise-preregistration/1"
FILE, DEVIATIONS, TEST_READ = "preregistration.json", "deviations.jsonl", "test_read.json"


@dataclass(frozen=True)
class Registration:
    """A registered study in its folder."""

    folder: Path

    @property
    def first(self) -> dict[str, Any]:
        """VerificationError where it was altered."""
        return sound(read_object(self.folder / FILE), str(self.folder / FILE))

    @property
    def deviations(self) -> list[dict[str, Any]]:
        """VerificationError where one was altered."""
        path = self.folder / DEVIATIONS
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return [sound(json.loads(line), f"{path}, line {number}") for number, line in enumerate(lines, 1)]

    @property
    def test_read(self) -> dict[str, Any] | None:
        path = self.folder / TEST_READ
        return read_object(path) if path.is_file() else None

    def deviate(self, why: str, what: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Put a deviation on record, with what was known when it was decided."""
        row = {
            "time": now(),
            "why": why,
            **what,
            "runs_finished": sum(
                len(path.read_text(encoding="utf-8").splitlines()) for path in self.folder.glob("runs*.jsonl")
            ),
            "test_was_read": self.test_read is not None,
            "sha256": digest(content),
            "versions": versions(),
            "content": content,
        }
        with (self.folder / DEVIATIONS).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")

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
        """What holds now: as registered, or as the last deviation left it."""
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
    """Write the preregistration, or check that a study that has begun goes on as registered.

    Raises UsageError, naming every difference, where it does not and no deviation is declared.
    """
    registration = Registration(folder)
    content = json.loads(json.dumps(content))
    if not (folder / FILE).is_file():
        facts = {"format": FORMAT, "sha256": digest(content), "time": now(), "versions": versions()}
        write_json(folder / FILE, facts | {"content": content})
        return registration
    changed = differences(registration.current, content) | other_versions(registration.latest.get("versions"))
    if changed and not deviation:
        lines = "".join(f"\n  {name}: {before!r} → {after!r}" for name, (before, after) in changed.items())
        raise UsageError(
            f"{folder} holds a study that was registered otherwise:{lines}\n"
            "take another --output_dir, or go on with --deviation 'why', which the report will show"
        )
    if changed:
        assert deviation is not None
        registration.deviate(deviation, {"changed": changed}, content)
    return registration


def other_versions(before: Mapping[str, Any] | None) -> dict[str, list[Any]]:
    """Libraries that have changed since: half of the runs would be of one version, half of another."""
    here, there = ({f"version of {name}": one for name, one in found.items()} for found in (before or {}, versions()))
    return differences(here, there) if before else {}


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    names = dict.fromkeys([*before, *after])
    return {
        name: [before.get(name), after.get(name)] for name in names if before.get(name, ...) != after.get(name, ...)
    }
