"""What a long series of runs has finished: one line per run, with the numbers per item in files beside it.

ledger = Ledger(folder)                     # reads the lines of all processes, less one that was cut off
ledger.add(rows, {"dev": losses, "test": losses})     # a batch of runs, entered whole or not at all
ledger.numbers(key, "dev")                  # (items,) of one run; nothing else of its file is read

runs.jsonl, runs.1.jsonl …       {"key": {…}, "file": "runs/3f….safetensors", "row": 0, "sha256": "9a…", …facts}
runs/3f….safetensors             one matrix (runs, items) per name
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rankwise.errors import DataError
from rankwise.files.atomic import atomic_write, sha256
from rankwise.files.document import append_lines, read_lines, typed
from rankwise.files.processes import process_index

FOLDER = "runs"
FILE = re.compile(r"runs(\.[1-9][0-9]*)?\.jsonl")
REMEDY = "restore the file, take the line out to repeat its run, or choose another --output_dir"
Row = dict[str, Any]


def text_of(key: Mapping[str, Any]) -> str:
    """A key as one text: what tells runs apart."""
    return json.dumps(dict(key), sort_keys=True, ensure_ascii=False)


class Ledger:
    """Finished runs of a folder. Several processes write files of their own and read all of them.

    check: raises KeyError, TypeError or ValueError for an entry that is none of the command's own.
    """

    def __init__(self, folder: Path, check: Callable[[Row], object] = lambda row: None) -> None:
        self.folder = folder
        self.check = check
        self.rows: dict[str, Row] = {}
        self._matrices: dict[tuple[str, str], Tensor] = {}
        self.refresh()

    @property
    def own_file(self) -> Path:
        rank = process_index()[0]
        return self.folder / ("runs.jsonl" if rank == 0 else f"runs.{rank}.jsonl")

    def refresh(self) -> None:
        """Read what the other processes have entered meanwhile."""
        for path in sorted(file for file in self.folder.glob("runs*.jsonl") if FILE.fullmatch(file.name)):
            self.rows |= dict(read_lines(path, "an entry of a finished run of this command", self.keyed, REMEDY))

    def keyed(self, row: Row) -> tuple[str, Row]:
        """A line with its key as text. KeyError or TypeError where it is not of a run."""
        for name, kind in (("key", dict), ("file", str), ("row", int)):
            typed(row[name], kind)
        self.check(row)
        return text_of(row["key"]), row

    def __contains__(self, key: Mapping[str, Any]) -> bool:
        return text_of(key) in self.rows

    def __getitem__(self, key: Mapping[str, Any]) -> Row:
        return self.rows[text_of(key)]

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rows: Sequence[Row], matrices: Mapping[str, Tensor]) -> None:
        """Enter finished runs: first the matrices (one row per run), then all lines at once.

        A process that is killed in between leaves a file that no line names; the runs are done again.
        """
        digest = hashlib.sha256("\n".join(text_of(row["key"]) for row in rows).encode()).hexdigest()[:16]
        file = f"{FOLDER}/{digest}.safetensors"
        with atomic_write(self.folder / file) as temporary:
            save_file({name: matrix.contiguous() for name, matrix in matrices.items()}, temporary)
        written = sha256(self.folder / file)
        entered = [{**row, "file": file, "row": index, "sha256": written} for index, row in enumerate(rows)]
        append_lines(self.own_file, entered)
        self.rows |= {text_of(row["key"]): row for row in entered}

    def numbers(self, key: Mapping[str, Any], name: str) -> Tensor:
        """(items,) of one run. DataError where its file is gone or is not what was written."""
        row = self[key]
        again = f"restore it, or take the lines that name it out of {self.folder / 'runs*.jsonl'} to repeat those runs"
        path = self.folder / row["file"]
        if (row["file"], name) not in self._matrices:
            try:
                if "sha256" in row and sha256(path) != row["sha256"]:  # lines of earlier versions have none
                    raise DataError(f"{path}: changed since it was written (its sha256 differs); {again}")
                with safe_open(path, framework="pt") as file:
                    self._matrices[row["file"], name] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path}: the numbers of a finished run cannot be read ({error}); {again}") from error
        matrix = self._matrices[row["file"], name]
        if not 0 <= row["row"] < len(matrix):
            raise DataError(f"{path}: has no row {row['row']} for a finished run; {again}")
        return matrix[row["row"]]
