"""What was fixed before a study's first run, every deviation from it, and when its test items were read.

registration = register(folder, content, power, deviation=None)      # refuses what was registered otherwise
registration.read_test(keys, heads, deviation=None)                  # once
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError, VerificationError
from rankwise.files.atomic import digest, read_if_there, write_json
from rankwise.files.document import Document, append_lines, as_plain, finished_lines, read_lines
from rankwise.files.versions import versions

PREREGISTRATION = Document("preregistration.json", "rankwise-preregistration/1", "a preregistration", "rankwise study")
ITEMS = Document(
    "items.json", "rankwise-study-items/1", "a study's items", "rankwise study", ("sites", "dev", "test"), indent=None
)
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

    @property
    def chain(self) -> dict[str, Any]:
        """What the ledger's chain starts from: what was registered, and the items that runs are scored on."""
        return {"registration": self.first["sha256"], "items": digest(ITEMS.read(self.folder))}

    def read_test(self, runs: Sequence[Mapping[str, Any]], heads: Mapping[str, Any], deviation: str | None) -> None:
        """Mark that the test items of these runs are looked at, and the ledger's heads; once, or as a deviation.

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
        read = {"time": now(), "runs": len(runs), "runs_sha256": mark, "heads": heads}
        write_json(self.folder / TEST_READ, read)

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


def register(
    folder: Path, content: Mapping[str, Any], items: Mapping[str, Any], power: Sequence[Any], deviation: str | None
) -> Registration:
    """Write the preregistration; of a study that has begun, put on record where it goes on otherwise.

    items: what runs are scored on (`Material.record`), for a study of before as well. power: beside the content.

    Raises UsageError, naming every difference, where it does and no deviation is declared.
    """
    registration = Registration(folder)
    content = as_plain(content)
    if not (folder / FILE).is_file():
        facts = {"sha256": digest(content), "time": now(), "versions": versions()}
        facts |= {"power": list(power)} if power else {}
        ITEMS.write(folder, items)
        PREREGISTRATION.write(folder, facts | {"content": content})
        return registration
    if not ITEMS.file(folder).is_file():
        ITEMS.write(folder, items)
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
