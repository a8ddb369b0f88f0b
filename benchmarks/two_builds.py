"""The golden vectors of a bundle on two builds of llama.cpp: xllamacpp's here, and @fugood/llama.node's from npm.

    npm install --prefix /tmp/node @fugood/llama.node
    python benchmarks/two_builds.py --node_modules /tmp/node/node_modules quickstart=runs/quickstart/bundle …

Each bundle's own clients/golden.mjs asks llama.node; its lines are read as `bundle --replay --answers` reads them. Each
build is held to the trained model in float32 (the ladder), and both are compared with each other at the same places.
The table goes into docs/android.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.data.device import read_target
from rankwise.device.app_answers import TokenTexts, observed, read_answers
from rankwise.device.bundle_files import read_bundle
from rankwise.device.golden import Golden, read_golden
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.ladder import Ladder
from rankwise.device.parity.reference import Observed, common
from rankwise.device.parity.rungs import RUNGS, said
from rankwise.device.scores import latency
from rankwise.files.atomic import write_json, write_text
from rankwise.files.gguf import GGUFFile

DOCS = Path(__file__).parents[1] / "docs" / "android.md"
MARKS = ("<!-- two_builds: made by benchmarks/two_builds.py -->", "<!-- /two_builds -->")
SHOWN = ("pixels", "image tokens", "token ids", "logprobs", "text")


@dataclass(frozen=True)
class Build:
    """One build on one bundle."""

    name: str
    seen: Sequence[Observed]
    ladder: Ladder
    seconds: dict[str, float] | None

    def facts(self) -> dict[str, Any]:
        measured = self.ladder["logprobs"].measured
        rungs = {name: said(self.ladder[name].as_dict()) for name in SHOWN}
        numbers = {name: measured[name] for name in ("kl_mean", "kl_max", "flips", "positions")}
        return {"build": self.name, **rungs, **numbers, "latency": self.seconds}


def here(folder: Path, golden: Golden, content: dict[str, Any]) -> Build:
    mmproj = folder / content["mmproj"] if content["mmproj"] else None
    with LlamaServer(folder / content["model"], mmproj, content["context"], 1) as runtime:
        seen = [Observed.of(golden.expected(case), runtime, case, golden.top) for case in golden.cases]
        ladder = Ladder(tuple(rung(seen, runtime, golden.thresholds) for rung in RUNGS.values()))
        return Build(runtime.info.build, seen, ladder, latency([one.free.seconds for one in seen if one.free]))


def by_node(folder: Path, golden: Golden, content: dict[str, Any], modules: Path) -> Build:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "node_modules").symlink_to(modules)
        copied = Path(shutil.copytree(folder, Path(place) / "bundle"))
        out = Path(place) / "phone.jsonl"
        subprocess.run(["node", str(copied / "clients" / "golden.mjs"), str(out)], check=True, capture_output=True)
        answers = read_answers(out, golden.cases)
    texts = TokenTexts.of(GGUFFile(folder / content["model"]))
    seen = [observed(golden.expected(case), case, answers[case.id], texts) for case in golden.cases]
    ladder = Ladder(tuple(rung(seen, texts, golden.thresholds) for rung in RUNGS.values()))
    version = json.loads((modules / "@fugood" / "llama.node" / "package.json").read_text())["version"]
    build = str(next(answer.build for answer in answers.values()))
    return Build(
        build.replace("llama.node", f"llama.node {version}"),
        seen,
        ladder,
        latency([(answer.ms or 0) / 1000 for answer in answers.values()]),
    )


def between(one: Build, other: Build) -> dict[str, Any]:
    """Both builds at the places where both were told: the likeliest token, and its log-probability."""
    pairs = [pair for a, b in zip(one.seen, other.seen, strict=True) for pair in zip(a.tops, b.tops, strict=False)]
    best = [(max(a, key=a.__getitem__), max(b, key=b.__getitem__), a, b) for a, b in pairs]
    apart = [abs(a[first] - b[first]) for first, _, a, b in best if first in b]
    texts = [a.free and b.free and known(a) == known(b) for a, b in zip(one.seen, other.seen, strict=True)]
    return {
        "places": len(pairs),
        "other_likeliest": sum(first != second for first, second, _, _ in best),
        "largest_difference": float(np.max(apart)),
        "mean_difference": float(np.mean(apart)),
        "answers": len(texts),
        "same_answers": sum(map(bool, texts)),
    }


def known(one: Observed) -> Any:
    """The answer up to the reference's length: its own end token may be untold."""
    assert one.free
    shared = common(one.free.tokens, one.expected.answer)
    return one.free.tokens[: shared + 1][: len(one.expected.answer)]


def table(found: dict[str, Any]) -> str:
    lines = []
    for name, facts in found.items():
        builds = facts["builds"]
        lines += [f"| {name} | {' | '.join(one['build'] for one in builds)} |", "|---|" + "---|" * len(builds)]
        lines += [f"| {rung} | {' | '.join(one[rung] for one in builds)} |" for rung in SHOWN]
        for key, title in (("kl_mean", "mean KL to training, nats"), ("kl_max", "largest KL")):
            lines.append(f"| {title} | {' | '.join(f'{one[key]:.1e}' for one in builds)} |")
        flips = " | ".join(f"{one['flips']} of {one['positions']}" for one in builds)
        lines.append(f"| another likeliest token than in training | {flips} |")
        times = " | ".join("{median:.3f}, {p95:.3f}".format(**one["latency"]) for one in builds)
        lines.append(f"| median and 95th percentile of an answer, s | {times} |")
        both = facts["between"]
        lines += [
            "",
            f"{name}, build against build: log-probability of the likeliest token {both['mean_difference']:.1e} apart "
            f"on the average, {both['largest_difference']:.1e} at most; another likeliest token at "
            f"{both['other_likeliest']} of {both['places']} places; {both['same_answers']} of {both['answers']} "
            "answers the same.",
            "",
        ]
    return "\n".join(lines).rstrip()


def into_docs(text: str) -> None:
    """Between the marks."""
    page = DOCS.read_text(encoding="utf-8")
    start, end = map(re.escape, MARKS)
    write_text(DOCS, re.sub(f"(?s)({start}\n).*({end})", lambda found: f"{found[1]}{text}\n{found[2]}", page))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", help="NAME=FOLDER")
    parser.add_argument("--node_modules", type=Path, default=os.environ.get("RANKWISE_NODE_MODULES"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    modules, found = Path(options.node_modules).resolve(), {}
    for given in options.bundles:
        name, _, folder = given.partition("=")
        content, golden = read_bundle(Path(folder)), read_golden(Path(folder), read_target(folder))
        builds = [here(Path(folder), golden, content), by_node(Path(folder), golden, content, modules)]
        found[name] = {"builds": [one.facts() for one in builds], "between": between(*builds)}
    facts = {"date": date.today().isoformat(), "machine": platform.platform(), "bundles": found}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "two_builds.json", facts)
    into_docs(table(found))
    print(table(found))


if __name__ == "__main__":
    main()
