"""The matrix: every tiny family asked every question, and the table of it that the product and its docs read.

    make matrix    or    python tests/helpers/family_matrix.py [--only gemma3,mllama] [--fresh] [--work build/families]

One row a family, with its time; rows that are there already for these versions are kept, so an interrupted run goes on.
Writes rankwise/data/families.json and the table in docs/vision.md. A family that is not exact must be refused by the
product: the run ends with 1 where one is not. About seven seconds a family on one core.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from families import FAMILIES
from families.subject import Subject
from families.talks import TALKS
from families.trials import QUESTIONS, refused_by_train
from families.unbuilt import LIMITED, NOT_YET, REFUSED, UNBUILT
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from rankwise.data import renderer_for as product

ROOT = Path(__file__).resolve().parents[2]
TABLE, PAGE = ROOT / "rankwise" / "data" / "families.json", ROOT / "docs" / "vision.md"
BEGIN, END = "<!-- families: written by `make matrix` -->", "<!-- end of families -->"
VERSIONS = {"transformers": transformers.__version__}
BEYOND = ("UsageError", "exit 2", "exit 3", "NotTheirs", "what the family refuses")  # what a limit is kept by
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    names = options.only.split(",") if options.only else list(FAMILIES)
    for name in names:
        row = kept(options.work, name)
        if row is None or options.fresh or options.only:
            row = written(options.work, name, asked(name, options.work / name))
        print(line(name, row), flush=True)
    rows = {name: row for name in FAMILIES if (row := kept(options.work, name))}
    if missing := FAMILIES.keys() - rows.keys():
        print(f"no table yet: {len(missing)} families are not asked: {', '.join(sorted(missing))}")
        return 1
    table = table_of(rows)
    write_table(table)
    product.table.cache_clear()
    passing = {name: found for name in rows if table["families"][name]["state"] == "refused"
               and (found := let_through(name, options.work / name))}  # fmt: skip
    for name, said in passing.items():
        print(f"not refused: {name}: {said}")
    return 1 if passing else 0


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="families by name, asked anew")
    parser.add_argument("--fresh", action="store_true", help="ask all families anew")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "families", help="models, runs and rows")
    return parser.parse_args(arguments)


def asked(name: str, work: Path) -> Row:
    """All answers of one family, whatever the table says of it now. Its state is what the answers say; its reason the
    first that is no yes."""
    began = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    subject = Subject.of(name, FAMILIES[name](work / "model"), work)
    with no_table(work):
        answers = {question: answered(question, subject) for question in QUESTIONS}
        state, why = judged(subject, answers)
    return {
        "versions": VERSIONS,
        "state": state,
        "why": why,
        "questions": answers,
        "seconds": round(time.monotonic() - began, 1),
    }


@contextmanager
def no_table(work: Path) -> Iterator[None]:
    """The product does not know that it refuses a family."""
    product.TABLE = work / "no_table.json"
    product.TABLE.write_text('{"families": {}}')
    try:
        yield
    finally:
        product.TABLE = TABLE


def answered(question: str, subject: Subject) -> str:
    """`yes`, what differs, or `not taken` for a kind of row that family and product both refuse."""
    if question not in TALKS and not subject.talks:
        return "not taken"
    try:
        found = QUESTIONS[question](subject)
    except Exception as error:  # noqa: BLE001 - an answer, too: the product breaks on this family
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    not_taken = question in TALKS and question not in subject.talks
    return found or ("not taken" if not_taken else "yes")


def judged(subject: Subject, answers: Mapping[str, str]) -> tuple[str, str]:
    """State and reason: in words where there are some, else the first answer that is no yes."""
    wrong = {question: answer for question, answer in answers.items() if answer not in ("yes", "not taken")}
    if subject.name in LIMITED and all(any(kind in answer for kind in BEYOND) for answer in wrong.values()):
        return "untested", LIMITED[subject.name]
    if refusal := subject.refusal("one image"):
        return "refused", REFUSED.get(subject.name, f"its own chat call fails: {refusal}")
    if not wrong:
        return "exact", ""
    question, answer = next(iter(wrong.items()))
    return "refused", REFUSED.get(subject.name, f"{question}: {answer}")


def let_through(name: str, work: Path) -> str:
    """How the product takes a family that the table refuses; "" where it refuses it, as it must."""
    subject = Subject.of(name, work / "model", work)
    return "" if refused_by_train(subject) else "`train` takes it"


def kept(work: Path, name: str) -> Row | None:
    path = work / "rows" / f"{name}.json"
    row = json.loads(path.read_text()) if path.is_file() else None
    return row if row and row["versions"] == VERSIONS else None


def written(work: Path, name: str, row: Row) -> Row:
    path = work / "rows" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1))
    return row


def line(name: str, row: Row) -> str:
    return f"{name:20} {row['seconds']:6.1f} s  {row['state']:8} {row['why']}"


def table_of(rows: Mapping[str, Row]) -> dict[str, Any]:
    """What is committed: families that were asked, and those that transformers knows beside them."""
    found = {name: {key: row[key] for key in ("state", "why", "questions")} for name, row in rows.items()}
    for name in sorted(MAPPING.keys() - rows.keys()):
        found[name] = {"state": "untested", "why": UNBUILT.get(name, NOT_YET), "questions": {}}
    return {"versions": VERSIONS, "families": dict(sorted(found.items()))}


def write_table(table: Mapping[str, Any]) -> None:
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(table)}\n{END}{rest.split(END)[1]}")


def markdown(table: Mapping[str, Any]) -> str:
    """The table of the docs."""
    families = table["families"]
    states = {state: [name for name in families if families[name]["state"] == state] for state in
              ("exact", "refused", "untested")}  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines = [
        f"With {versions}: {len(states['exact'])} exact, {len(states['refused'])} refused, "
        f"{len(states['untested'])} untested, by `model_type`.",
        "",
        "| family | what holds |",
        "|---|---|",
        f"| {listed(states['exact'])} | exact |",
    ]
    lines += [f"| `{name}` | refused: {cell(families[name]['why'])} |" for name in states["refused"]]
    reasons = dict.fromkeys(families[name]["why"] for name in states["untested"])
    for why in reasons:
        lines.append(
            f"| {listed(n for n in states['untested'] if families[n]['why'] == why)} | untested: {cell(why)} |"
        )
    return "\n".join(lines)


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    sys.exit(main(sys.argv[1:]))
