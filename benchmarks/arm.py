"""Does llama.cpp answer on ARM as it does on this machine? The runtime's aarch64 wheel, emulated, on the same files.

    apt-get install qemu-user-static
    rankwise run quickstart -o RUN; rankwise demo -o DEMO
    python benchmarks/arm.py --run RUN --model DEMO/merged --data DEMO/data [--out benchmarks/results]

On Debian or Ubuntu. An arm64 Python with its libraries (apt, from this machine's own sources, installed nowhere) and
the wheel (pip) go into --work, once. `rankwise.device.llama.serve` then runs under qemu-user, and the parity ladder is
climbed on it and on this machine's own build: quickstart's export for pictures, a text model's for text. It ends with
exit code 6 where a rung is broken on ARM alone, or token ids differ. Correctness only: an emulator's seconds say
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rankwise.cli import main as rankwise
from rankwise.device.llama.client import ServerRuntime
from rankwise.device.llama.runtime import RemoteServer
from rankwise.device.parity.ladder import Ladder, climb
from rankwise.device.parity.reference import Observed
from rankwise.device.sides import Shipped, TrainedSide, context, shipment, trained_side
from rankwise.errors import VerificationError
from rankwise.files.atomic import write_json, write_text
from rankwise.options.commands import ValidateConfig
from rankwise.options.sections import ScoredData

ROOT = Path(__file__).parent.parent
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
PACKAGES = ("python3", "libstdc++6", "libgomp1")
PYTHON = "usr/bin/python3"
LONGEST = 16  # tokens of an answer
TOLERANCE = 50  # noise floors, as the quickstart's: a dozen items
NATIVE, ARM = "native", "arm"


@dataclass(frozen=True)
class Emulator:
    """qemu: its path. root: an arm64 system's files. packages: folder of the wheel. cpu: what qemu emulates."""

    qemu: str
    root: Path
    packages: Path
    cpu: str

    def python(self, *words: str) -> list[str]:
        return [self.qemu, "-cpu", self.cpu, "-L", str(self.root), str((self.root / PYTHON).resolve()), *words]

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": os.pathsep.join([str(self.packages), str(ROOT)])}

    def told(self, code: str) -> str:
        done = subprocess.run(
            self.python("-c", code), env=self.environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"the arm64 Python does not run ({done.returncode}):\n{done.stderr[-2000:]}")
        return done.stdout.strip()

    @contextmanager
    def runtime(self, one: Shipped, size: int) -> Iterator[ServerRuntime]:
        words = ["-m", "rankwise.device.llama.serve", "--model", str(one.text), "--context", str(size)]
        words += ["--threads", "1", *(["--mmproj", str(one.mmproj)] if one.mmproj else [])]
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(
                self.python(*words),
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            ) as child,
        ):
            assert child.stdout and child.stdin
            if not (line := child.stdout.readline()):
                said.seek(0)
                sys.exit(f"the aarch64 wheel does not load {one.text}:\n{said.read()[-2000:]}")
            with RemoteServer(json.loads(line)["address"], timeout=600, patience=600) as runtime:
                yield runtime
            child.stdin.close()  # which it ends on


# --- an arm64 Python -------------------------------------------------------------------------------------------------


def arm_root(work: Path) -> Path:
    """The files of PACKAGES and all that they depend on, unpacked; apt keeps its lists below `work`, too."""
    root, apt = work / "arm64", work / "apt"
    if (root / PYTHON).exists():
        return root
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "state/status").touch()  # nothing is installed, so every dependency is fetched
    (apt / "conf").write_text(
        'APT::Architecture "arm64"; APT::Architectures {"arm64";}; APT::Sandbox::User "root";\n'
        f'Dir::State "{apt}/state"; Dir::State::status "{apt}/state/status"; Dir::Cache "{apt}/cache";\n'
    )
    environment = os.environ | {"APT_CONFIG": str(apt / "conf")}
    install = ["apt-get", "install", "--yes", "--no-install-recommends", "--download-only", *PACKAGES]
    for command in (["apt-get", "update"], install):
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory(dir=work) as unpacked:
        for package in (apt / "cache/archives").glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(package), unpacked], check=True)
        shutil.move(unpacked, root)
        Path(unpacked).mkdir()
    if not (root / "lib").exists():  # a link of a package that was not fetched
        (root / "lib").symlink_to("usr/lib")
    return root


def wheel(work: Path, python: str) -> Path:
    """xllamacpp for aarch64, of the version that is installed here."""
    folder = work / "packages"
    if not folder.is_dir():
        only = ["--no-deps", "--only-binary=:all:", "--platform", "manylinux_2_17_aarch64", "--python-version", python]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), *only]
        subprocess.run([*command, f"xllamacpp=={version('xllamacpp')}"], check=True)
    return folder


# --- what is compared ------------------------------------------------------------------------------------------------


def sides(given: argparse.Namespace) -> Iterator[tuple[str, ValidateConfig]]:
    if given.run:
        yield "pictures", asked(given.run / "export", "labels", given.run / "dataset", given.items)
    if given.model:
        export = given.work / "export" / given.model.resolve().name
        if not export.is_dir():
            words = ["export", str(given.model), "--outtype", "f16,q8_0", "-o", str(export)]
            if rankwise(words):
                sys.exit(f"rankwise {' '.join(words)} failed")
        yield "text", asked(export, given.task, given.data, given.items)


def asked(export: Path, task: str, data: Path, items: int) -> ValidateConfig:
    section = ScoredData(task=task, data_path=str(data))
    how = {"parity_samples": items, "num_samples": items, "max_new_tokens": LONGEST}
    return ValidateConfig(export=str(export), data=section, tolerance=TOLERANCE, threads=1, **how)


def compared(side: TrainedSide, here: Sequence[Observed], there: Sequence[Observed]) -> dict[str, Any]:
    """Two runtimes on the same cases. difference: of the log-probabilities that both tell at the same place."""
    pairs = list(zip(here, there, strict=True))
    apart = [
        abs(one[token] - other[token])
        for a, b in pairs
        for one, other in zip(a.tops, b.tops, strict=True)
        for token in one.keys() & other.keys()
    ]
    shared = [
        len(one.keys() & other.keys()) / len(one) for a, b in pairs for one, other in zip(a.tops, b.tops, strict=True)
    ]
    return {
        "cases": len(pairs),
        "with_pictures": sum(bool(case.images) for case in side.cases),
        "same_ids": sum(a.text_ids == b.text_ids and a.span == b.span for a, b in pairs),
        "same_text": sum(told(a) == told(b) for a, b in pairs),
        "places": len(shared),
        "shared_of_top": min(shared),
        "difference": max(apart),
        "mean_difference": sum(apart) / len(apart),
    }


def told(one: Observed) -> str | None:
    return one.free.text if one.free else None


def measured(config: ValidateConfig, emulators: Sequence[Emulator]) -> Iterator[dict[str, Any]]:
    """A row for each form and each emulated CPU."""
    shipped = shipment(config)
    side = trained_side(config, shipped)
    floor, size = side.floor(), context(side.renderer)
    assert floor
    for one in shipped.forms:
        limits = floor.thresholds(one.form, config.tolerance)

        def run(runtime: ServerRuntime) -> tuple[Ladder, list[Observed]]:
            ladder = climb(side.reference, runtime, side.cases, limits, config.top)  # noqa: B023
            seen = [Observed.of(side.reference.expected(case), runtime, case, config.top) for case in side.cases]
            return ladder, seen

        with one.start(size, 1) as runtime:
            own, here = run(runtime)
        for emulator in emulators:
            with emulator.runtime(one, size) as runtime:
                ladder, there = run(runtime)
            row = {"form": one.form, "cpu": emulator.cpu, **compared(side, here, there)}
            yield row | {"rungs": {NATIVE: rungs(own), ARM: rungs(ladder)}}


def rungs(ladder: Ladder) -> dict[str, dict[str, Any]]:
    parts = ("status", "measured", "threshold")
    return {rung["name"]: {part: rung[part] for part in parts} for rung in ladder.as_dict()["rungs"]}


def broken(row: Mapping[str, Any]) -> list[str]:
    """Rungs that are broken on ARM and whole here; what is broken on both is not ARM's."""
    here, there = row["rungs"][NATIVE], row["rungs"][ARM]
    found = [name for name in there if "broken" == there[name]["status"] != here[name]["status"]]
    return found + (["other token ids"] if row["same_ids"] < row["cases"] else [])


# --- what is written -------------------------------------------------------------------------------------------------


def report(found: Mapping[str, Any]) -> str:
    lines = [
        "# llama.cpp on ARM, emulated, against this machine's",
        "",
        f"{found['date']} · {found['machine']} · python benchmarks/arm.py",
        "",
        *(f"- {cpu}: {said}" for cpu, said in found["features"].items()),
        "",
        "log p: greatest (mean) difference, in nats, of the likeliest 64 tokens at each place of the answers. KL: mean",
        "divergence from transformers, on this machine and on ARM, and what the ladder allows.",
        "",
        "| | form | CPU | cases | same ids | same text | log p | KL, here | on ARM | limit | broken on ARM |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in found["rows"]:
        here, there = (row["rungs"][side]["logprobs"]["measured"]["kl_mean"] for side in (NATIVE, ARM))
        limit = row["rungs"][ARM]["logprobs"]["threshold"]["kl_mean"]
        cells = [row["side"], row["form"], row["cpu"], str(row["cases"]), f"{row['same_ids']}", f"{row['same_text']}"]
        cells += [
            f"{row['difference']:.1e} ({row['mean_difference']:.1e})",
            f"{here:.1e}",
            f"{there:.1e}",
            f"{limit:.1e}",
        ]
        lines.append("| " + " | ".join([*cells, ", ".join(broken(row)) or "none"]) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--run", type=Path, help="run folder of quickstart, for pictures")
    parser.add_argument("--model", type=Path, help="folder of a text model")
    parser.add_argument("--task", default="e2e_nlg")
    parser.add_argument("--data", type=Path, help="rows for the text model")
    parser.add_argument("--items", type=int, default=4)
    parser.add_argument("--cpu", default="max", help="CPUs that qemu emulates, comma-separated")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "rankwise-arm")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    qemu = next((found for name in QEMU if (found := shutil.which(name))), None)
    if qemu is None or shutil.which("dpkg-deb") is None:
        missing = "qemu-user" if qemu is None else "dpkg-deb (this is not Debian or Ubuntu)"
        print(f"skipped: {missing} is missing; apt-get install qemu-user-static")
        return
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    root = arm_root(given.work)
    first = Emulator(qemu, root, given.work / "packages", given.cpu.split(",")[0])
    python = first.told("import sys; print('%d.%d' % sys.version_info[:2])")
    wheel(given.work, python)
    emulators = [Emulator(qemu, root, given.work / "packages", cpu) for cpu in given.cpu.split(",")]
    said = "import platform, xllamacpp; print(platform.machine(), xllamacpp.get_system_info())"
    emulated = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    found = {
        "date": str(date.today()),
        "machine": f"{platform.machine()} · {emulated} · Python {python} · xllamacpp {version('xllamacpp')}",
        "features": {emulator.cpu: emulator.told(said) for emulator in emulators},
        "rows": [{"side": name, **row} for name, config in sides(given) for row in measured(config, emulators)],
    }
    write_json(given.out / "arm.json", found)
    write_text(given.out / "arm.md", report(found))
    print(report(found))
    if any(map(broken, found["rows"])):
        sys.exit(VerificationError.exit_code)


if __name__ == "__main__":
    main()
