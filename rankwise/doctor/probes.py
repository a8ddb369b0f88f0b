"""What `doctor` asks this machine, in a process of its own: `python -m rankwise.doctor.probes PROBE[:WORD] …`.

Each probe returns one JSON value, which is printed behind `MARK`. One that fails or crashes ends the process: the last
line of the error stream says why, and whoever asked goes on with the next one in another process. One process for all
that are well, since libraries take seconds to import; they are imported by name inside the probes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

MARK = "rankwise-doctor: "
PACKAGE = Path(__file__).resolve().parents[1]
CONTROL_GROUP = Path("/sys/fs/cgroup")  # of a container: its limits of memory and processor time


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints_file() -> Path | None:
    """Versions that the tests ran with: in the package, in a checkout beside it."""
    places = (PACKAGE / "constraints.txt", PACKAGE.parent / "constraints.txt")
    return next((place for place in places if place.is_file()), None)


def tested_versions() -> dict[str, str]:
    file = constraints_file()
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    pins = [line.partition("==") for line in lines if "==" in line]
    return {canonical(name): version.strip() for name, _, version in pins}


def packages() -> list[dict[str, Any]]:
    """Every requirement of the package that applies here: of the base install (extra "") and of each extra."""
    requirement_of, tested = import_module("packaging.requirements").Requirement, tested_versions()
    rows = []
    for text in metadata.requires("rankwise") or ():
        wanted = requirement_of(text)
        found = re.search(r"extra == ['\"]([\w-]+)", str(wanted.marker or ""))
        extra = found[1] if found else ""
        if canonical(wanted.name) == "rankwise" or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        installed = installed_version(wanted.name)
        fits = installed is not None and wanted.specifier.contains(installed, prereleases=True)
        row = {"extra": extra, "name": wanted.name, "wanted": str(wanted.specifier), "installed": installed}
        rows.append(row | {"fits": fits, "tested": tested.get(canonical(wanted.name))})
    return rows


def installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def pythons() -> list[str]:
    """Versions of Python that the package says it is tested with."""
    prefix = "Programming Language :: Python :: "
    told = metadata.metadata("rankwise").get_all("Classifier") or []
    return [text.removeprefix(prefix) for text in told if text.startswith(prefix)]


def imports(module: str) -> None:
    import_module(module)


def torch_build() -> dict[str, Any]:
    """Version, what it was built for, its threads, and the devices that it sees."""
    torch = import_module("torch")
    devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    built = {"cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None)}
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "devices": devices, **built}


def device(*name: str) -> str:
    """A device that has added two numbers."""
    torch, place = import_module("torch"), ":".join(name)
    assert float(torch.ones(1, device=place) + 1) == 2
    if place == "mps":
        return place
    facts = torch.cuda.get_device_properties(place)
    return f"{place} ({facts.name}, {facts.total_memory / 2**30:.0f} GiB)"


def converter_place() -> dict[str, Any]:
    """Where llama.cpp's converter should be, whether anything is there, and the variable that names it if one does."""
    module = import_module("rankwise.gguf.converter")
    variable = os.environ.get(module.VARIABLE)
    folder = Path(variable).expanduser() if variable else module.converter_folder()
    return {"folder": str(folder), "there": os.path.lexists(folder), "variable": module.VARIABLE if variable else ""}


def converter() -> str:
    found = import_module("rankwise.gguf.converter").find_converter()
    return f"version {found.version}, {found.folder}"


def wordnet() -> list[str]:
    """Its folder; where there is none, what to do."""
    module = import_module("rankwise.evaluate.text")
    if not module.installed_wordnet():
        return ["", module.NOT_INSTALLED]
    return [str(module.wordnet_folder() or "nltk's own data"), ""]


def memory() -> list[int]:
    """Bytes: all there are, and those that are free; a container's limit counts."""
    system = import_module("psutil").virtual_memory()
    total, free = system.total, system.available
    limit, used = control_group("memory.max"), control_group("memory.current")
    if limit.isdigit() and used.isdigit() and int(limit) < total:
        total, free = int(limit), min(free, int(limit) - int(used))
    return [total, free]


def cores() -> float:
    """Processor cores that this process may use; a container's share of them counts."""
    count = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota, _, period = control_group("cpu.max").partition(" ")
    return min(count, int(quota) / int(period)) if quota.isdigit() and period.isdigit() else count


def control_group(name: str) -> str:
    file = CONTROL_GROUP / name
    return file.read_text(encoding="ascii").strip() if file.is_file() else ""


def working_folder() -> list[Any]:
    return place(Path.cwd())


def temporary_folder() -> list[Any]:
    return place(Path(tempfile.gettempdir()))


def cache() -> list[Any]:
    return place(import_module("rankwise.files.atomic").cache())


def hub_cache() -> list[Any]:
    return place(Path(import_module("huggingface_hub.constants").HF_HUB_CACHE))


def place(path: Path) -> list[Any]:
    """[path, free bytes, why nothing can be read or written there]. A file without a name is made, and is gone again,
    in the folder or in the first one above it that is there."""
    nearest = next(above for above in (path, *path.parents) if os.path.lexists(above))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            said = ""
        list(os.scandir(nearest))
    except OSError as error:
        said = error.strerror or str(error)
    state = os.statvfs(nearest)
    return [str(path), state.f_bavail * state.f_frsize, said]


PROBES = (
    *(packages, pythons, cores, memory, working_folder, temporary_folder, cache, hub_cache, imports, torch_build),
    *(device, converter_place, converter, wordnet),
)

if __name__ == "__main__":
    for asked in sys.argv[1:]:
        name, *words = asked.split(":")
        answer = next(probe for probe in PROBES if probe.__name__ == name)(*words)
        print(MARK + json.dumps(answer), flush=True)
