"""Commands run in this process on a family's rows."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

from families.subject import Subject
from families.talks import TALKS
from rankwise import cli

PLACE = re.compile(r"/(?:[^/\s:()]+/)+")  # of a folder: the table is committed, and shows names only


def command(line: str, out: Path) -> tuple[int, str]:
    """Exit code and the sentence that it was refused with, run in this process."""
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        try:
            code = cli.main([*line.split(), "--output_dir", str(out)])
        except Exception as error:  # noqa: BLE001 - a traceback is what a question finds
            return 1, f"{type(error).__name__}: {error}"
    lines = [said for said in errors.getvalue().splitlines() if said.startswith(("error", "rankwise"))]
    said = lines[-1] if lines else errors.getvalue()[-300:]
    return code, f"exit {code}: {PLACE.sub('', said)}"


def usable(subject: Subject) -> Path:
    """The rows that the family takes."""
    return rows_of(subject, subject.talks, "usable.json")


def one_row(subject: Subject, name: str) -> Path:
    return rows_of(subject, [name], "one.json")


def rows_of(subject: Subject, names: Iterable[str], file: str) -> Path:
    path = subject.product.data.parent / file
    path.write_text(json.dumps([TALKS[name].row(name) for name in names]))
    return path
