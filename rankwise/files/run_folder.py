"""A run folder: everything one run reads and writes, held by one process at a time.

run = RunFolder("runs/first")
with run.lock(), run.recording("ranks", {"pretrained": base, "finetuned": tuned}) as record:
    run.save_config(config)
    record.outputs["plan"] = plan.save(run / "lora_rank_config.json")
# leaving the block without an error writes manifest.json, last
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from rankwise.errors import DataError, UsageError
from rankwise.files.atomic import about_to_write, fingerprint, read_if_there, read_object, rehearsing, write_json
from rankwise.files.document import Document
from rankwise.files.gguf import SOURCE
from rankwise.files.monitor import PeakMemory
from rankwise.files.processes import process_index
from rankwise.files.versions import versions
from rankwise.options.field import SECRET, flatten

# user:password@ and queries of addresses; a password with any sign in it but a space
USER = re.compile(
    r"(?<=://)([^\s/:?#@]*:\S*|[^\s/?#@]*)@|(?<![^\s\"'=,\[])[^\s/:?#@]+:(?!//)[^\s@]+@(?=[\w.-]+([:/]|$))"
)
QUERY = re.compile(r"(://[^\s?#\"]*)[?#][^\s\"]*|\?[\w.%-]+=[^\s\"]*")
NOT_SHOWN = "(not shown)"


def without_secrets(content: Any, instead: str | None = NOT_SHOWN) -> Any:
    """The settings, with the values of keys that name a secret masked."""
    if isinstance(content, dict):
        return {
            key: instead if SECRET.search(str(key)) and isinstance(value, str) else without_secrets(value, instead)
            for key, value in content.items()
        }
    return [without_secrets(item, instead) for item in content] if isinstance(content, list) else content


def told_outside(content: Any) -> Any:
    """What another service may be told of settings: nothing whose name is a secret's, no user, password or query of an
    address in any text."""
    if isinstance(content, Mapping):
        return {name: told_outside(value) for name, value in content.items() if not SECRET.search(str(name))}
    if isinstance(content, (list, tuple)):
        return [told_outside(value) for value in content]
    return QUERY.sub(r"\1", USER.sub("", content)) if isinstance(content, str) else content


if sys.platform != "win32":
    import resource

LOCK, HOLDER = ".rankwise.lock", ".rankwise.lock.json"
CONFIG, MANIFEST = "resolved_config.json", "manifest.json"
SITES = Document("sites.json", "rankwise-sites/1", "a record of adapted sites", "rankwise train", ("sites", "left_out"))
STAGES = Document(MANIFEST, "rankwise-manifest/1", "a manifest")
Inputs = Mapping[str, Path | str | None]


@dataclass
class Record:
    """What a stage reports of itself while it runs: outputs by name (paths), and any further facts.

    memory: what the process took since it began.
    """

    outputs: dict[str, Path | str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    memory: PeakMemory = field(default_factory=PeakMemory)


class RunFolder:
    """A folder and its conventions: `run / "name"` is a path in it.

    portable: what goes to other people; its config and manifest say what things are called, not where they lie.
    """

    def __init__(self, path: Path | str, *, portable: bool = False) -> None:
        self.path, self.portable = Path(path), portable

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def __fspath__(self) -> str:
        return str(self.path)

    @contextmanager
    def lock(self) -> Iterator[RunFolder]:
        """Hold the folder for this process. UsageError where another one holds it. A dry run makes and locks nothing.

        The operating system frees the lock when its process ends, however it ends: nothing to clean up after a
        kill. Of several processes of one run only rank 0 takes it. The lock's files go with the block, and so do
        folders that were made for it and into which nothing was written.
        """
        if rehearsing():
            yield self
            return
        made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be a run folder ({error.strerror}); choose another one") from error
        lock = FileLock(self / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise UsageError(
                f"{self.path}: in use by {_holder(self / HOLDER)}; wait for it, stop it, or choose another folder"
            ) from error
        try:
            now = {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            write_json(self / HOLDER, now)
            yield self
        finally:
            (self / HOLDER).unlink(missing_ok=True)
            if sys.platform != "win32":  # before the release: a process that takes it between would lose its file
                (self / LOCK).unlink(missing_ok=True)
            lock.release()
            remove_empty(made)

    def refuse_other_content(self, stage: str) -> None:
        """UsageError where the folder holds anything but an earlier result of the stage, which replaces all of it."""
        found = self.path.iterdir() if self.path.is_dir() else ()
        visible = sorted(entry.name for entry in found if not entry.name.startswith("."))
        if visible and stage not in self.stages():
            raise UsageError(f"{self.path}: holds other files ({', '.join(visible[:3])} …); choose a new --output_dir")

    def config_name(self, stage: str) -> str:
        """Where a stage saves its config: in the folder of another one, a training run's say, that one's keeps its
        name."""
        return f"resolved_config.{stage}.json" if set(self.stages()) - {stage} else CONFIG

    def save_config(self, config: Any, name: str = CONFIG) -> Path:
        """Save a resolved config (mapping or dataclass) flat: the file, given to its command, reproduces it. Secrets
        are left out."""
        is_dataclass = dataclasses.is_dataclass(config) and not isinstance(config, type)
        content = without_secrets(flatten(config) if is_dataclass else dict(config), None)
        return write_json(self / name, without_places(content) if self.portable else content)

    @contextmanager
    def recording(self, stage: str, inputs: Inputs) -> Iterator[Record]:
        """Measure a stage, and enter it in the manifest when the block ends without an error. inputs: by name; None or
        "" for one that is not given.

        Inputs are fingerprinted before the block: they are what the stage started from. Not so in a dry run, whose
        block ends before there is anything to enter.
        """
        if rehearsing():
            yield Record()
            about_to_write()
        started, clock = datetime.now(UTC), time.monotonic()
        described = {name: describe_input(value) for name, value in inputs.items() if value}
        record = Record()
        with record.memory:
            yield record
        record.facts = {"peak_memory_bytes": record.memory.bytes, **record.facts}
        self._enter(stage, described, record, started, time.monotonic() - clock)

    def record(
        self,
        stage: str,
        inputs: Inputs,
        outputs: Mapping[str, Path | str],
        seconds: float,
        **facts: Any,
    ) -> None:
        """Record a stage that has just finished and was timed by the caller."""
        described = {name: describe_input(value) for name, value in inputs.items() if value}
        started = datetime.now(UTC) - timedelta(seconds=seconds)
        self._enter(stage, described, Record(dict(outputs), facts), started, seconds)

    def _enter(self, stage: str, inputs: Mapping[str, Any], record: Record, started: datetime, seconds: float) -> None:
        """Write manifest.json anew with this stage's entry; the other stages' entries stay."""
        entry = {
            "stage": stage,
            "started": started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 3),
            **process_peaks(),
            "python": platform.python_version(),
            "versions": versions(),
            "inputs": {name: called(row) if self.portable else row for name, row in inputs.items()},
            "outputs": {name: self._describe_output(Path(path)) for name, path in record.outputs.items()},
            **record.facts,
        }
        STAGES.write(self, {"stages": {**self.stages(), stage: entry}})

    def stages(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by stage; empty where no stage has finished yet."""
        try:
            stages: dict[str, dict[str, Any]] = read_if_there(self / MANIFEST).get("stages", {})
        except DataError as error:
            raise DataError(f"{error}; restore it, or delete it: what the folder holds stays") from error
        return stages

    def _describe_output(self, path: Path) -> dict[str, str]:
        inside = path.is_relative_to(self.path)
        shown = path.relative_to(self.path) if inside else path
        return {"path": shown.as_posix(), "fingerprint": fingerprint(path)}


def describe_input(value: Path | str) -> dict[str, Any]:
    """A path with the fingerprint of what it holds, and the GGUF file that it was unpacked from; a name (a hub id, say)
    as it is."""
    path = Path(value)
    if path.exists():
        origin = {"gguf": read_object(path / SOURCE)} if (path / SOURCE).is_file() else {}
        return {"path": str(value), "fingerprint": fingerprint(path), **origin}
    return {"name": str(value)}


def called(row: Mapping[str, Any]) -> dict[str, Any]:
    """An input's or a model's description with its name in place of its path; the fingerprint stays."""
    rest = {name: value for name, value in row.items() if name != "path"}
    return {"name": Path(row["path"]).resolve().name, **rest} if "path" in row else rest


def without_places(content: Any) -> Any:
    """Names in place of paths, anywhere in a config: of what lies on this machine, and of absolute paths."""
    if isinstance(content, dict):
        return {key: without_places(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_places(value) for value in content]
    if not isinstance(content, str) or not content:
        return content
    path = Path(content).expanduser()
    return path.resolve().name if path.is_absolute() or is_there(path) else content


def is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or no path at all
        return False


def process_peaks() -> dict[str, int]:
    """The process's peaks so far: resident bytes, mapped files included, and on a GPU allocated bytes."""
    peaks = {}
    if sys.platform != "win32":
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["peak_resident_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peaks["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
    return peaks


def remove_empty(folders: Sequence[Path]) -> None:
    """Remove folders, inner ones first, up to the first that holds something."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _holder(path: Path) -> str:
    """Holder of the lock, as far as it is recorded."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return f"process {content['pid']} on {content['host']} since {content['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def held(folder: RunFolder, stage: str, inputs: Inputs) -> Iterator[Record]:
    """The run folder, locked and recorded by the first process; the others work beside it."""
    if process_index()[0] != 0:
        yield Record()
        return
    with folder.lock(), folder.recording(stage, inputs) as record:
        yield record


STATE, MARKS = ".stages", "done.json"


def read_marks(run: Path) -> dict[str, dict[str, Any]]:
    """Empty where no stage has begun. DataError, naming the file, where it is broken."""
    file = run / STATE / MARKS
    content = read_if_there(file)
    if not all(isinstance(entry, dict) for entry in content.values()):
        raise DataError(f"{file}: expected an object per stage; delete the file, and every stage runs again")
    return content


def write_mark(run: Path, stage: str, entry: Mapping[str, Any]) -> None:
    """Replace one stage's entry; the other stages' stay."""
    write_json(run / STATE / MARKS, read_marks(run) | {stage: dict(entry)})
