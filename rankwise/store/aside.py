"""What a new run replaces: out of the way until the new one has begun, and back where it never does.

earlier = Aside(folder, ("checkpoint-*", "best_model.*"))
earlier.take()          # into .earlier/
earlier.drop()          # the new run has taken its first step
earlier.put_back()      # or it failed before
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rankwise.store.files import about_to_write

PLACE = ".earlier"


@dataclass(frozen=True)
class Aside:
    """Entries of a folder by patterns of their names. `take` and `put_back` are renames on one file system."""

    folder: Path
    patterns: tuple[str, ...]

    @property
    def place(self) -> Path:
        return self.folder / PLACE

    def there(self) -> list[Path]:
        return sorted({entry for pattern in self.patterns for entry in self.folder.glob(pattern)})

    def take(self) -> list[Path]:
        """Move the entries aside; returns where they were."""
        found = self.there()
        if found:
            self.place.mkdir(exist_ok=True)
        for entry in found:
            os.replace(entry, self.place / entry.name)
        return found

    def put_back(self) -> None:
        """Move them back, in place of what a run that did not begin has left; also after a process was killed."""
        if not self.place.is_dir():
            return
        about_to_write()
        for entry in self.place.iterdir():
            remove(self.folder / entry.name)
            os.replace(entry, self.folder / entry.name)
        self.place.rmdir()

    def drop(self) -> None:
        """Delete them."""
        if self.place.is_dir():
            shutil.rmtree(self.place)

    @contextmanager
    def until_dropped(self) -> Iterator[None]:
        """Entries that are still aside when the block fails are put back, and deleted when it ends."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise
        self.drop()


def remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink(missing_ok=True)
