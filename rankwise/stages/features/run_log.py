"""`log/logs_<time>/`: what a training of factors was told, said and found, apart from its run folder."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.files.atomic import write_json
from rankwise.files.processes import announce, process_index
from rankwise.options.field import flatten

OPTIONS, LOG, SUMMARY = "config.json", "training.log", "final_summary.json"


@dataclass(frozen=True)
class RunLog:
    """A folder per start of the command. Only the first process writes.

    folder: None in the others.
    """

    folder: Path | None

    @classmethod
    def begun(cls, log_dir: Path, config: Any) -> RunLog:
        if process_index()[0] != 0:
            return cls(None)
        folder = new_folder(log_dir)
        write_json(folder / OPTIONS, flatten(config))
        return cls(folder)

    def line(self, text: str) -> None:
        """Printed, and written with the time."""
        announce(text)
        self.note(text)

    def note(self, text: str) -> None:
        if self.folder is not None:
            with open(self.folder / LOG, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {text}\n")

    def summary(self, content: dict[str, Any]) -> None:
        if self.folder is not None:
            write_json(self.folder / SUMMARY, content)


def new_folder(log_dir: Path) -> Path:
    """`logs_20261121_181200`; a second one of the same second gets a number."""
    name = f"logs_{datetime.now():%Y%m%d_%H%M%S}"
    for suffix in ("", *(f"_{number}" for number in range(2, 1000))):
        folder = log_dir / f"{name}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"--log_dir {log_dir}: cannot be a folder ({error.strerror}); choose another") from error
        return folder
    raise AssertionError("a thousand runs in one second")
