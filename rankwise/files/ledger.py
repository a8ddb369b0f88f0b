"""What a long series of runs has finished: one line per run, with the numbers per item in files beside it.

ledger = Ledger(folder)                     # reads the lines of all processes, less one that was cut off
ledger.add(rows, {"dev": losses, "test": losses})     # a batch of runs, entered whole or not at all
ledger.numbers(key, "dev")                  # (items,) of one run; nothing else of its file is read

runs.jsonl, runs.1.jsonl …       {"key": {…}, "file": "runs/3f….safetensors", "row": 0, "sha256": "9a…", …facts}
runs/3f….safetensors             one matrix (runs, items) per name

Where the caller gives a `start`, the lines of a file are a chain: each has the hash of the line before it (`previous`),
the first that of file name and start, and of the run's own numbers per item (`items`). `runs.head.json` has the hash of
the last line; committed from time to time, it shows that no run was taken out or put in afterwards.
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

from rankwise.errors import DataError, VerificationError
from rankwise.files.atomic import atomic_write, digest, sha256
from rankwise.files.document import Document, append_lines, finished_lines, lines_of, read_lines, typed
from rankwise.files.processes import process_index

FOLDER = "runs"
FILE = re.compile(r"runs(\.[1-9][0-9]*)?\.jsonl")
REMEDY = "restore the file, cut it off before that line to repeat runs from there on, or choose another --output_dir"
HEAD = Document("runs.head.json", "rankwise-ledger-head/1", "a ledger's head", "", ("file", "lines", "sha256"))
Row = dict[str, Any]


def text_of(key: Mapping[str, Any]) -> str:
    """A key as one text: what tells runs apart."""
    return json.dumps(dict(key), sort_keys=True, ensure_ascii=False)


def hash_of(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def numbers_hash(numbers: Tensor) -> str:
    """SHA-256 of numbers as little-endian float64."""
    return hash_of(numbers.double().cpu().numpy().astype("<f8").tobytes())


class Ledger:
    """Finished runs of a folder. Several processes write files of their own and read all of them.

    check: raises KeyError, TypeError or ValueError for an entry that is none of the command's own. start: what the
    first line of a chain is bound to; without one, lines are not chained. Lines from before there were chains are read.

    VerificationError where a chained line does not follow from the one before it.
    """

    def __init__(
        self, folder: Path, check: Callable[[Row], object] = lambda row: None, start: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.check = check
        self.start = start
        self.rows: dict[str, Row] = {}
        self._matrices: dict[tuple[str, str], Tensor] = {}
        self.refresh()

    @property
    def own_file(self) -> Path:
        rank = process_index()[0]
        return self.folder / ("runs.jsonl" if rank == 0 else f"runs.{rank}.jsonl")

    @property
    def files(self) -> list[Path]:
        return sorted(file for file in self.folder.glob("runs*.jsonl") if FILE.fullmatch(file.name))

    def refresh(self) -> None:
        """Read what the other processes have entered meanwhile."""
        for path in self.files:
            self.rows |= dict(read_lines(path, "an entry of a finished run of this command", self.keyed, REMEDY))
            self.follow(path)

    def heads(self) -> dict[str, dict[str, Any]]:
        """File name → number of lines and hash of the last one."""
        found = {path.name: self.hashes(path) for path in self.files}
        return {name: {"lines": len(hashes) - 1, "sha256": hashes[-1]} for name, hashes in found.items() if hashes[1:]}

    def hashes(self, path: Path) -> list[str]:
        """What the first line of a file follows from, then the hash of each line."""
        return [digest({"file": path.name, "start": self.start}), *(hash_of(line) for _, line in finished_lines(path))]

    def follow(self, path: Path) -> None:
        """VerificationError for a chained line that does not follow from the one before it, or is not chained on."""
        if self.start is None:
            return
        hashes, chained = self.hashes(path), False
        for number, line in finished_lines(path):
            previous = json.loads(line).get("previous")
            if previous != hashes[number - 1] and (chained or previous is not None):
                raise VerificationError(
                    f"{path}, line {number}: does not follow from what is before it: a line, or what was registered, "
                    "was altered, taken out or put in since it was written. Put the files back as they were, or cut "
                    "this one off before that line to repeat its run and all later ones"
                )
            chained = chained or previous is not None

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
        name = hash_of("\n".join(text_of(row["key"]) for row in rows).encode())[:16]
        file = f"{FOLDER}/{name}.safetensors"
        with atomic_write(self.folder / file) as temporary:
            save_file({name: matrix.contiguous() for name, matrix in matrices.items()}, temporary)
        written = sha256(self.folder / file)
        entered: list[Row] = [{**row, "file": file, "row": index, "sha256": written} for index, row in enumerate(rows)]
        if self.start is not None:
            before = self.hashes(self.own_file)
            previous = before[-1]
            for index, row in enumerate(entered):
                row |= {"items": {name: numbers_hash(matrix[index]) for name, matrix in matrices.items()}}
                row["previous"] = previous
                previous = hash_of(lines_of([row]).encode()[:-1])
        append_lines(self.own_file, entered)
        if self.start is not None:
            head = {"file": self.own_file.name, "lines": len(before) - 1 + len(entered), "sha256": previous}
            HEAD.write(self.folder, head, self.own_file.name.replace(".jsonl", ".head.json"))
        self.rows |= {text_of(row["key"]): row for row in entered}

    def numbers(self, key: Mapping[str, Any], name: str) -> Tensor:
        """(items,) of one run. DataError where its file is gone or is not what was written."""
        row = self[key]
        again = f"restore it, or cut {self.folder / 'runs*.jsonl'} off before the lines that name it to repeat runs"
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
