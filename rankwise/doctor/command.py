"""`rankwise doctor`: Python, packages, torch, extras, converter, llama.cpp, WordNet, folders, memory, threads.

    checks()    →  [Diagnosis("torch", "ok", "2.15.0 (CPU build); devices: cpu"), …]

Three states. ok. note: something optional is missing, broken or untested; every command of the base install works.
problem: a command of the base install would fail; exit code 1. Only the standard library is imported here.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import util
from typing import Any

from rankwise import __version__
from rankwise.doctor.probes import MARK, constraints_file
from rankwise.errors import RankwiseError
from rankwise.options.commands import DoctorConfig
from rankwise.pipeline.extras import EXTRAS

FORMAT = "rankwise-doctor/1"
LONGEST_S = 300.0  # of one process; importing vllm takes a minute
LEAST = 2**30  # bytes free on a disk and in memory: torch and transformers alone take 0.6 GiB
OWN_ERROR = re.compile(r"^rankwise\.errors\.\w+: ")
MODULES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
    "nvidia-ml-py": "pynvml",
    "skia-python": "skia",
}
NOT_FOR_USERS = ("dev", "bench", "docs")
FOLDERS = {
    "working folder": "cd ~",
    "temporary folder": "export TMPDIR=/var/tmp",
    "cache": "export RANKWISE_CACHE=/path/with/space",
    "hub cache": "export HF_HUB_CACHE=/path/with/space",
}


@dataclass(frozen=True)
class Diagnosis:
    """One line. state: ok, note or problem. remedy: a command that can be pasted, where there is one."""

    name: str
    state: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:<8}{self.name:<18}{self.found}" + (f"  → {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class ProbeReply:
    """What a probe returned, or why it failed or crashed."""

    value: Any = None
    error: str = ""


ProbeReplies = dict[str, ProbeReply]


def run(config: DoctorConfig) -> None:
    """Print one line per check. RankwiseError (exit code 1) where one is a problem."""
    found = checks()
    problems = [check.name for check in found if check.state == "problem"]
    if config.json:
        content = {"format": FORMAT, "rankwise": __version__, "problems": len(problems)}
        print(json.dumps(content | {"checks": [asdict(check) for check in found]}, indent=2))
    else:
        print("\n".join(map(str, found)))
    if problems:
        raise RankwiseError(f"{len(problems)} of {len(found)} checks found a problem: {', '.join(problems)}")


def describe(config: DoctorConfig) -> list[str]:
    return ["check Python, packages, torch, extras, llama.cpp, WordNet, folders, memory and threads; write nothing"]


def checks() -> list[Diagnosis]:
    """Every line, in the order in which they depend on each other."""
    told = ask("packages", "pythons", "cores", "memory", *(name.replace(" ", "_") for name in FOLDERS))
    rows = [row for row in told["packages"].value or () if row["extra"] not in NOT_FOR_USERS]
    rows.sort(key=lambda row: (row["extra"], row["name"] != "torch"))  # where torch is broken, others are because of it
    modules = dict.fromkeys(module_of(row["name"]) for row in rows if row["installed"])
    probes = ["converter_place", "converter", *(["wordnet"] if installed(rows, "nltk") else [])]
    told |= ask("torch_build", *(f"imports:{module}" for module in modules), *probes)
    told |= ask(*(f"device:{name}" for name in (told["torch_build"].value or {}).get("devices", ())))
    failed = {name.partition(":")[2]: reply.error for name, reply in told.items() if name.startswith("imports:")}
    failed = {name: error for name, error in failed.items() if error}
    return [
        system(told["pythons"]),
        *base_packages(told["packages"].error, [row for row in rows if not row["extra"]], failed),
        *([torch_line(told)] if installed(rows, "torch") and "torch" not in failed else []),
        *extra_lines(rows, failed),
        other_packages(),
        converter_line(told["converter_place"], told["converter"]),
        *([llama_line(rows, failed)] if installed(rows, "xllamacpp") else []),
        *([wordnet_line(told["wordnet"])] if "wordnet" in told else []),
        *(folder_line(role, told[role.replace(" ", "_")]) for role in FOLDERS),
        memory_line(told["memory"]),
        threads_line(told["torch_build"], told["cores"]),
    ]


def ask(*probes: str) -> ProbeReplies:
    """The reply of each probe. One process asks them in turn; after one that fails or crashes, another one goes on."""
    told: ProbeReplies = {}
    while rest := probes[len(told) :]:
        values, error = asked_together(rest)
        told |= {name: ProbeReply(value) for name, value in zip(rest, values, strict=False)}
        if len(values) < len(rest):
            told[rest[len(values)]] = ProbeReply(error=error or "ended without an answer")
    return told


def asked_together(probes: Sequence[str]) -> tuple[list[Any], str]:
    """(what the probes returned up to the first that failed, why it did), from a process that imports from where this
    one does."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)  # matplotlib would make its folder in the home
    environment = {"MPLCONFIGDIR": scratch.name} | environment
    command = [sys.executable, "-P", "-W", "ignore", "-m", "rankwise.doctor.probes", *probes]
    with (
        scratch,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        try:
            said, complaint = process.communicate(timeout=LONGEST_S)
            error = ended(process.returncode, complaint)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            error = f"no answer within {LONGEST_S:g} s"
    lines = said.splitlines()
    return [json.loads(line.removeprefix(MARK)) for line in lines if line.startswith(MARK)], error


def ended(status: int, complaint: str) -> str:
    """Why a process failed, in one line; empty where it did not."""
    if status < 0:
        return f"crashed ({signal.Signals(-status).name})"
    lines = [line for line in complaint.splitlines() if line.strip()]
    return OWN_ERROR.sub("", lines[-1] if lines else f"ended with code {status}") if status else ""


def module_of(name: str) -> str:
    return MODULES.get(name.lower(), name.replace("-", "_").lower())


def installed(rows: Iterable[Any], name: str) -> bool:
    return any(row["installed"] for row in rows if row["name"] == name)


def pip(*wanted: str, how: str = "") -> str:
    return f"pip install {how}{' '.join(shlex.quote(name) for name in wanted)}"


# --- one function per line ------------------------------------------------------------------------------------------


def system(reply: ProbeReply) -> Diagnosis:
    here = ".".join(platform.python_version_tuple()[:2])
    tested = reply.value or [here]
    said = f"{platform.python_version()}, rankwise {__version__}, {platform.platform()}, {sys.executable}"
    if here in tested:
        return Diagnosis("python", "ok", said)
    return Diagnosis("python", "note", f"{said}; tested with {', '.join(tested)}")


def base_packages(error: str, rows: Sequence[Any], failed: dict[str, str]) -> Iterator[Diagnosis]:
    """A line per package that is missing, out of bounds or broken; one for all others."""
    if error:
        yield Diagnosis("packages", "problem", f"cannot be listed: {error}", pip("rankwise", how="--upgrade "))
        return
    for row in rows:
        if not row["fits"]:
            said = f"{row['installed']}, outside {row['wanted']}" if row["installed"] else "not installed"
            yield Diagnosis(row["name"], "problem", said, pip(row["name"] + row["wanted"]))
    for error in dict.fromkeys(failed.values()):
        names = [row["name"] for row in rows if failed.get(module_of(row["name"])) == error]
        if names:
            remedy = pip(
                *(row["name"] + row["wanted"] for row in rows if row["name"] in names), how="--force-reinstall "
            )
            yield Diagnosis(", ".join(names), "problem", f"cannot be imported: {error}", remedy)
    good = [row for row in rows if row["fits"] and module_of(row["name"]) not in failed]
    other = [f"{row['name']} {row['installed']} (tested: {row['tested']})" for row in good if untested(row)]
    said, file = f"{len(good)} of {len(rows)} base packages are within bounds", constraints_file()
    if other and file:
        remedy = pip("rankwise", how=f"-c {shlex.quote(str(file))} ")
        yield Diagnosis("packages", "note", f"{said}; not the tested version: {', '.join(other)}", remedy)
    else:
        yield Diagnosis("packages", "ok", f"{said}{'' if other or not file else ', in the tested versions'}")


def untested(row: Any) -> bool:
    """Whether major or minor version differ from those that the tests ran with."""
    pair = [re.findall(r"\d+", str(version))[:2] for version in (row["installed"], row["tested"])]
    return bool(row["tested"]) and pair[0] != pair[1]


def torch_line(told: ProbeReplies) -> Diagnosis:
    build, error = told["torch_build"].value, told["torch_build"].error
    if error:
        return Diagnosis("torch", "problem", f"does not start: {error}", pip("torch", how="--force-reinstall "))
    kind = f"CUDA {build['cuda']}" if build["cuda"] else f"ROCm {build['hip']}" if build["hip"] else "CPU"
    devices = {name: told[f"device:{name}"] for name in build["devices"]}
    said = f"{build['version']} ({kind} build); devices: "
    said += ", ".join(["cpu", *(reply.value or f"{name} fails: {reply.error}" for name, reply in devices.items())])
    if any(reply.error for reply in devices.values()):
        return Diagnosis("torch", "note", said, "export CUDA_VISIBLE_DEVICES=")
    if not devices and shutil.which("nvidia-smi"):
        remedy = "uv pip install --reinstall --torch-backend=auto torch torchvision"
        return Diagnosis("torch", "note", f"{said}; torch does not see the GPU of this machine's NVIDIA driver", remedy)
    return Diagnosis("torch", "ok", said)


def extra_lines(rows: Sequence[Any], failed: dict[str, str]) -> Iterator[Diagnosis]:
    """A line per extra: its packages, or what those that are missing or broken take away."""
    for extra in dict.fromkeys(row["extra"] for row in rows if row["extra"]):
        parts = [row for row in rows if row["extra"] == extra]
        missing = [row["name"] for row in parts if not row["installed"]]
        faults = [f"{row['name']} {row['installed']} is outside {row['wanted']}" for row in wrong(parts)]
        errors = {row["name"]: failed[module_of(row["name"])] for row in parts if module_of(row["name"]) in failed}
        faults += [f"{name} cannot be imported: {error}" for name, error in errors.items()]
        if missing:
            faults.insert(0, f"not installed: {', '.join(missing)}")
        if not faults:
            versions = ", ".join(f"{row['name']} {row['installed']}" for row in parts)
            yield Diagnosis(f"extra {extra}", "ok", versions)
            continue
        without = taken_away(extra, {module_of(name) for name in (*missing, *errors)})
        faults += [f"without it, out of use: {without}"] if without else []
        how = "--force-reinstall " if errors else ""
        names = [f"rankwise[{extra}]"] if missing or not errors else list(errors)
        faults += ["install it in an environment of its own: it pins torch"] if extra == "vllm" else []
        yield Diagnosis(f"extra {extra}", "note", "; ".join(faults), pip(*names, how=how))


def wrong(rows: Iterable[Any]) -> list[Any]:
    return [row for row in rows if row["installed"] and not row["fits"]]


def taken_away(extra: str, modules: set[str]) -> str:
    """What the table of optional packages says that these modules of an extra are for."""
    flags: dict[str, dict[str, None]] = {}
    for row in EXTRAS:
        if row.brings == f"[{extra}]" and row.module.partition(".")[0] in modules:
            flags.setdefault(", ".join(row.commands), {})[row.flag] = None
    named = {commands: ", ".join(flags[commands]) for commands in flags}
    return "; ".join(names if flag == "the command" else f"{flag} ({names})" for names, flag in named.items())


def other_packages() -> Diagnosis:
    """Packages that no extra brings."""
    rows = {row.module.partition(".")[0]: row for row in EXTRAS if not row.brings.startswith("[")}
    there = [module for module in rows if util.find_spec(module)]
    flags = dict.fromkeys(row.flag.split()[0] for row in rows.values())
    said = (
        f"{', '.join(there) or 'none'}; {len(rows) - len(there)} others are named when {', '.join(flags)} ask for them"
    )
    return Diagnosis("other packages", "ok", said)


def converter_line(place: ProbeReply, converter: ProbeReply) -> Diagnosis:
    name, install = "converter", "rankwise export --install-converter"
    if not converter.error:
        return Diagnosis(name, "ok", converter.value)
    said = f"{converter.error}; without it, out of use: export"
    if place.error:
        return Diagnosis(name, "note", said)
    if place.value["variable"]:
        return Diagnosis(name, "note", said, f"unset {place.value['variable']}")
    remove = f"rm -r {shlex.quote(place.value['folder'])} && " if place.value["there"] else ""
    return Diagnosis(name, "note", said, remove + install)


def llama_line(rows: Sequence[Any], failed: dict[str, str]) -> Diagnosis:
    if "xllamacpp" in failed:
        said = f"cannot be imported: {failed['xllamacpp']}; without it, out of use: validate, bundle"
        return Diagnosis("llama.cpp", "note", said, pip("xllamacpp", how="--force-reinstall "))
    version = next(row["installed"] for row in rows if row["name"] == "xllamacpp")
    return Diagnosis("llama.cpp", "ok", f"xllamacpp {version}")


def wordnet_line(reply: ProbeReply) -> Diagnosis:
    if reply.error:
        return Diagnosis("WordNet", "note", reply.error)
    folder, what = reply.value
    if folder:
        return Diagnosis("WordNet", "ok", folder)
    return Diagnosis("WordNet", "note", what.partition(";")[0], "apt-get install wordnet-base")


def folder_line(role: str, reply: ProbeReply) -> Diagnosis:
    """A folder that takes no file is a problem; so is a working folder without space."""
    if reply.error:
        return Diagnosis(role, "problem", f"cannot be looked at: {reply.error}", FOLDERS[role])
    path, free, error = reply.value
    said = f"{path}, {free / 2**30:,.1f} GiB free"
    if error:
        return Diagnosis(role, "problem", f"{path}: cannot be read and written: {error}", FOLDERS[role])
    if free < LEAST:
        state = "problem" if role == "working folder" else "note"
        return Diagnosis(role, state, f"{said}; a model needs {LEAST / 2**30:g} GiB at least", FOLDERS[role])
    return Diagnosis(role, "ok", said)


def memory_line(reply: ProbeReply) -> Diagnosis:
    if reply.error:
        return Diagnosis("memory", "note", f"cannot be read: {reply.error}")
    total, free = (value / 2**30 for value in reply.value)
    said = f"{free:,.1f} of {total:,.1f} GiB free"
    if free < LEAST / 2**30:
        return Diagnosis("memory", "problem", f"{said}; torch and transformers take 0.6 GiB before any model is loaded")
    return Diagnosis("memory", "ok", said)


def threads_line(torch: ProbeReply, cores: ProbeReply) -> Diagnosis:
    """Threads of torch against the cores that this process may use."""
    if torch.error or cores.error:
        return Diagnosis("threads", "note", f"cannot be told: {torch.error or cores.error}")
    threads, count = torch.value["threads"], cores.value
    whole, set_by = max(1, int(count)), [name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if name in os.environ]
    said = f"torch uses {threads} on {count:g} cores" + (f" ({', '.join(set_by)} is set)" if set_by else "")
    if threads > whole:
        return Diagnosis(
            "threads", "note", f"{said}: more threads than cores slow each other", f"export OMP_NUM_THREADS={whole}"
        )
    if set_by and threads < whole:
        return Diagnosis("threads", "note", f"{said}: cores stay idle", f"unset {' '.join(set_by)}")
    return Diagnosis("threads", "ok", said)
