"""ShipBench: does the way to the device notice when what is shipped is wrong, and is it quiet when it is right?

    python benchmarks/shipbench.py --work FOLDER [--llama_cpp_dir L] [--out benchmarks/results] [--only alpha,padding]

Trained tiny models are merged, exported and put on the parity ladder. Then one thing at a time is made wrong: in the
app, in a file, in the model that was taken. Each fault says beforehand which rung must break first, and whether the
verification that `rankwise export` does would have found it; the table says what happened. Sound exports of several
models and forms must break nothing. Everything that is made is kept in FOLDER for the next run.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shipbench_app import APP
from shipbench_fault import FILE, MMPROJ, TEXT, Delivery, Fault, Request, delivered, make_file, sound
from shipbench_files import FILES
from shipbench_ships import FORMS, Ship, drawings, elements, texts

from rankwise.device.llama.client import ServerRuntime
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.ladder import climb
from rankwise.device.sides import context
from rankwise.errors import ServiceError, VerificationError
from rankwise.files.atomic import write_json, write_text
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.converter import find_converter
from rankwise.gguf.export import verification
from rankwise.gguf.plan import plan_export
from rankwise.options.commands import ExportConfig

FAULTS = [*APP, *FILES]
HOLDS, NO_RUNG = "holds", "—"
WHICH = re.compile(r"^\d+ cases? \([^)]*\): ")  # a reason names its cases first
Row = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """A connection that changes requests for free answers, as an app with other settings would."""

    talk: Any
    request: Request

    @property
    def url(self) -> str:
        return str(self.talk.url)

    def get(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self.talk.get(path)
        return found

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        free = path == "/completion" and "grammar" not in body  # a given answer is forced by a grammar
        found: dict[str, Any] = self.talk.post(path, self.request(body) if free else body)
        return found


@dataclass(frozen=True)
class Found:
    """rung: the first broken one, `file` where llama.cpp refused it, `holds` where none broke. why: its first words."""

    rung: str
    why: str
    kl: float | None = None


def climbed(delivery: Delivery, ship: Ship, threads: int | None = None) -> Found:
    """Put a delivery on the ladder, as `rankwise validate` does. threads: as it takes them."""
    limits = ship.floor.thresholds(delivery.form)
    try:
        with LlamaServer(delivery.text, delivery.mmproj, context(ship.trained.renderer), threads) as runtime:
            asked = changed(runtime, delivery.request)
            ladder = climb(ship.trained.reference, asked, delivery.cases, limits)
    except (VerificationError, ServiceError) as error:
        return Found(FILE, str(error).replace(f"{delivery.text.parent}/", "").replace(f"{ship.exported.folder}/", ""))
    broken = ladder.first_broken
    kl = ladder["logprobs"].measured.get("kl_mean")
    return Found(broken.name, broken.why, kl) if broken else Found(HOLDS, "", kl)


def changed(runtime: ServerRuntime, request: Request | None) -> ServerRuntime:
    return runtime if request is None else replace(runtime, talk=Asking(runtime.talk, request))  # type: ignore[arg-type]


def proven(fault: Fault, ship: Ship, folder: Path) -> str | None:
    """What export's verification says of files with this fault: its error, "" where it finds none; None where the
    fault is in no file. The float32 file that it compares with has the fault too, unless it is damage."""
    if fault.change:
        return None
    plan = replace(ship.plan, outtypes=(fault.form,))
    if fault.model in ("base", "alpha"):
        model, base = str(ship.other_model(fault.model)), str(ship.base)
        plan = plan_export(ExportConfig(model=model, outtype=[fault.form], base_model=base), plan.converter)
        plan = replace(plan, name=ship.plan.name)
    places = {fault.form: folder, "f32": folder / ".f32"}
    for form, place in places.items():
        place.mkdir(parents=True, exist_ok=True)
        for kind in plan.kinds:
            source = ship.exported.text(form) if kind == TEXT else ship.exported.mmproj(form)
            assert source
            wrong = kind == fault.kind and not (fault.damage and form == "f32")
            made = replace(fault, form=form)
            make_file(made, ship, source, place / plan.file(form, kind)) if wrong else shutil.copyfile(
                source, place / plan.file(form, kind)
            )
    try:
        files = {(fault.form, kind): GGUFFile(folder / plan.file(fault.form, kind)) for kind in plan.kinds}
        verification(plan, files, places["f32"])
    except VerificationError as error:
        return str(error).replace(str(folder), "")
    return ""


def tried(fault: Fault, ship: Ship, work: Path) -> Row:
    """One row of the table."""
    folder = work / "faults" / fault.name.replace("/", "-").replace(" ", "_")
    shutil.rmtree(folder, ignore_errors=True)
    found = climbed(delivered(fault, ship, folder), ship)
    proof = proven(fault, ship, folder / "proof")
    shutil.rmtree(folder, ignore_errors=True)
    expected = fault.rung or HOLDS
    told = None if proof is None else bool(proof)
    return {
        "what": fault.what,
        "in": "app" if fault.change else "model" if fault.model else "mmproj" if fault.kind == MMPROJ else "text file",
        "form": fault.form,
        "expected_rung": expected,
        "expected_proof": fault.proof,
        **asdict(found),
        "proof": told,
        "proof_says": proof,
        "caught": found.rung != HOLDS or bool(proof),
        "as_expected": found.rung == expected and told == fault.proof,
    }


def quiet(ship: Ship, form: str, part: int, parts: int) -> Row:
    """A sound delivery: a ship in one form, on one of several disjoint sets of items."""
    other = ship.on(part, parts)
    found = climbed(sound(other, form), other)
    return {
        "model": ship.name,
        "form": form,
        "items": part,
        "cases": len(other.trained.items),
        **asdict(found),
        "as_expected": found.rung == HOLDS,
    }


# --- the table ---------------------------------------------------------------------------------------------------


def words(text: str, most: int = 150) -> str:
    """The beginning of a reason, for a table's cell."""
    line = WHICH.sub("", " ".join(text.split())).replace("|", "\\|")
    return line if len(line) <= most else line[:most].rsplit(" ", 1)[0] + " …"


def markdown(content: dict[str, Any]) -> str:
    faults, clean = content["faults"], content["sound"]
    named = [row for row in faults if row["rung"] == row["expected_rung"]]
    caught = [row for row in faults if row["caught"]]
    seen = [row for row in faults if row["rung"] != HOLDS]
    alarms = [row for row in clean if row["rung"] != HOLDS]
    lines = [
        "# ShipBench: faults on the way to a phone",
        "",
        f"{content['date']} · {content['machine']} · {content['minutes']} minutes · `{content['command']}`",
        "",
        f"{len(caught)} of {len(faults)} seeded faults are caught, {len(seen)} of them by the ladder. Which rung "
        f"breaks first, if any, was foretold right for {len(named)}. {len(alarms)} of {len(clean)} sound exports "
        f"raise an alarm (of {len({row['model'] for row in clean})} models: rows of one are no independent draws).",
        "",
        "Rung: the first one of the parity ladder that breaks (`file`: llama.cpp does not load it; `holds`: none "
        "does). Verification: what `rankwise export` would say of such files before it names them. Where the two "
        "columns differ from what was expected, the expectation stands in brackets.",
        "",
        "| in | fault | rung | verification | why, as the ladder says it |",
        "|---|---|---|---|---|",
    ]
    for row in faults:
        proof = NO_RUNG if row["proof"] is None else "found" if row["proof"] else "silent"
        if row["proof"] != row["expected_proof"]:
            proof += f" (expected: {'found' if row['expected_proof'] else 'silent'})"
        rung = row["rung"]
        if rung != row["expected_rung"]:
            rung += f" (expected: {row['expected_rung']})"
        why = row["why"] or row["proof_says"] or ""
        lines.append(f"| {row['in']} | {row['what']} | {rung} | {proof} | {words(why)} |")
    lines += [
        "",
        "## Sound exports",
        "",
        "| model | form | set | items | rung | mean KL, nats |",
        "|---|---|---:|---:|---|---:|",
    ]
    for row in clean:
        where = f"{row['model']} | {row['form']} | {row['items'] + 1} | {row['cases']}"
        lines.append(f"| {where} | {row['rung']} | {row['kl']:.2g} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="models, exports and pictures are made and kept here")
    parser.add_argument("--llama_cpp_dir", help="llama.cpp with its converter [$LLAMA_CPP_DIR, else the cache]")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--only", default="", help="names of faults, by commas; nothing is written then")
    parser.add_argument("--parts", type=int, default=2, help="sets of items for each sound export")
    parser.add_argument("--fresh", action="store_true", help="measure anew what an earlier run has measured")
    options = parser.parse_args()
    converter = find_converter(options.llama_cpp_dir)
    options.work.mkdir(parents=True, exist_ok=True)
    ships = [elements(options.work, converter), drawings(options.work, converter)]
    only = [name for name in options.only.split(",") if name]
    known = options.work / "rows.jsonl"
    if options.fresh:
        known.unlink(missing_ok=True)
    chosen = [fault for fault in FAULTS if not only or fault.name in only]
    rows = [remembered(known, fault.name, partial(tried, fault, ships[1], options.work)) for fault in chosen]
    if only:
        return
    ships += [elements(options.work, converter, seed=7), texts(options.work, converter)]
    clean = [
        remembered(
            known,
            f"sound {ship.name} {form} {part} of {options.parts}",
            partial(quiet, ship, form, part, options.parts),
        )
        for ship in ships
        for part in range(options.parts)
        for form in FORMS
    ]
    content = {
        "date": date.today().isoformat(),
        "machine": f"CPU · xllamacpp {version('xllamacpp')} · converter {converter.version}",
        "command": "python benchmarks/shipbench.py --work FOLDER",
        "minutes": round(sum(row["seconds"] for row in [*rows, *clean]) / 60),
        "faults": [placeless(row, options.work) for row in rows],
        "sound": clean,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "shipbench.json", content)
    write_text(options.out / "shipbench.md", markdown(content))


def placeless(row: Row, work: Path) -> Row:
    """Without the names of this machine's folders."""
    content = json.dumps(row)
    for place in (work, work.resolve(), *(folder.resolve() for folder in work.iterdir() if folder.is_symlink())):
        content = content.replace(f"{place}/", "")
    found: Row = json.loads(content)
    return found


def remembered(file: Path, name: str, measure: Callable[[], Row]) -> Row:
    """The row of an earlier run that was broken off, else one that is measured now."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    found = next((row for row in rows if row["name"] == name), None)
    if found is None:
        started = time.monotonic()
        found = {"name": name, **measure()}
        found["seconds"] = round(time.monotonic() - started, 1)
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(found, ensure_ascii=False) + "\n")
    sign = "ok" if found["as_expected"] else "!!"
    print(
        f"{sign} {name}: {found['rung']}, proof {found.get('proof')} · {found['seconds']} s · "
        f"{words(found['why'] or found.get('proof_says') or '')}",
        flush=True,
    )
    return found


if __name__ == "__main__":
    main()
