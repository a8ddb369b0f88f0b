"""rankwise run: a pipeline of stages from one recipe; skips what is done, goes on where it was stopped.

MODEL_NAME=… DATA_PATH=… rankwise run recipes/svd_ranks.yaml --set train.learning_rate=1e-3
rankwise run smolvlm_android --background

Why not doit: it tells whether a task is up to date, ten lines here (`fingerprint_of`). That a stage which was stopped
goes on from its checkpoint and one that changed starts over, for which the mark of its start is kept, it cannot say.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

from rankwise.errors import DataError, Interrupted, RankwiseError, UsageError
from rankwise.files.atomic import about_to_write, fingerprint, write_json
from rankwise.files.log import NOBODY, copier, logged
from rankwise.files.monitor import Monitor, usage_of
from rankwise.files.run_folder import STATE, RunFolder, read_marks, write_mark
from rankwise.options.commands import RunConfig
from rankwise.options.field import OUTPUTS, SECRET, flatten, options_of, unknown
from rankwise.page.blocks import table_lines
from rankwise.page.text import duration
from rankwise.pipeline import preflight
from rankwise.pipeline.recipe import (
    Recipe,
    Stage,
    find_recipe,
    load_recipe,
    note_shadowed,
    outputs,
    packaged_lines,
    resolve_stage,
    resolve_stages,
)
from rankwise.pipeline.table import stage_of
from rankwise.pipeline.times import BEFORE, UNASKED, UNFINISHED, UNREACHED, StageTime, time_table

LOGS, MONITOR, AUTO = "logs", "monitor.csv", "auto"
RECORD = "resolved_config.recipe.json"  # a stage may write into the run folder itself, and its config beside this one
FILLED = ("depth_cache", "run")  # options of folders that stages write into beside what they read there


def run(config: RunConfig) -> Path | None:
    """Run the stages in order. Returns the run folder; None where recipes were listed."""
    if config.list_:
        print("\n".join(packaged_lines()))
        return None
    recipe, configs = prepare(config)
    for note in (note_shadowed(str(config.recipe)), *recipe.notes):
        print(note, file=sys.stderr) if note else None
    about_to_write()
    folder = RunFolder(run_folder(config))
    state = RunFolder(folder / STATE)
    if config.background:
        with state.lock():  # UsageError where a run holds it
            pass
        start(config, folder.path, log_path(config))
        return folder.path
    with state.lock(), logging(config), stoppable("the same command goes on from here"):
        folder.save_config(record_of(recipe), RECORD)
        chosen, again = selection(config, recipe)
        times = {stage.name: StageTime(stage.name, note=UNASKED) for stage in recipe.stages}
        times |= {name: StageTime(name, note=UNREACHED) for name in chosen}
        print(f"recipe: {recipe.path}")
        with Monitor(folder / LOGS / MONITOR) as monitor, print_times(times):
            print(f"watching: {monitor.said}")
            for index, stage in enumerate(recipe.stages):
                if stage.name in chosen:
                    with mark_unfinished(times, stage.name):
                        options = read_late(stage, recipe, config) if stage.config else configs[stage.name]
                        times[stage.name] = step(folder, recipe, index, options, again, monitor)
                    again = times[stage.name].ran or again
                    gc.collect()
        print(f"{recipe.name}: everything is in {folder.path}")
    return folder.path


def read_late(stage: Stage, recipe: Recipe, config: RunConfig) -> Any:
    """The config of a stage whose config file earlier stages have made, checked as the others were at the start."""
    _, found, notes = resolve_stage(stage, recipe, config.set)
    for note in notes:
        print(note, file=sys.stderr)
    with name_stage(stage):
        preflight.ready(stage.command, found, run=run_folder(config))
    return found


@contextmanager
def logging(config: RunConfig) -> Iterator[None]:
    if not config.log_file:
        yield
        return
    with logged(log_path(config)) as path:
        print(f"log: {path}")
        yield


def log_path(config: RunConfig) -> Path:
    if config.log_file and config.log_file != AUTO:
        return Path(config.log_file)
    return run_folder(config) / LOGS / f"{datetime.now():%Y%m%d-%H%M%S}.log"


@contextmanager
def mark_unfinished(times: dict[str, StageTime], stage: str) -> Iterator[None]:
    """Record the time until the run was stopped or failed."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        times[stage] = StageTime(stage, time.monotonic() - started, note=UNFINISHED)
        raise


@contextmanager
def print_times(times: Mapping[str, StageTime]) -> Iterator[None]:
    """Print the table of times, however the run ends."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        print("stopped; the same command goes on from here")
        raise
    finally:
        print("\n".join(["", *table_lines(time_table(list(times.values()))), ""]), flush=True)


def step(folder: RunFolder, recipe: Recipe, index: int, config: Any, again: bool, monitor: Monitor) -> StageTime:
    """One stage, unless it is done and nothing asks for it again; how long it took, now or then."""
    stage, title = recipe.stages[index], f"[{index + 1}/{len(recipe.stages)}] {recipe.stages[index].name}"
    entries = read_marks(folder.path)
    before = entries.get(stage.name, {})
    previous = entries.get(recipe.stages[index - 1].name, {}).get("done") if index else None
    mark = fingerprint_of(stage, config, previous)
    if not again and before.get("done") == mark and all(path.exists() for path in outputs(config)):
        print(f"{title}: done already in {duration(before['seconds'])}, skipped")
        return StageTime(stage.name, before["seconds"], before, BEFORE)
    started = time.monotonic()
    print(f"{title}: rankwise {stage.command}", flush=True)
    with name_stage(stage):
        ready, begun = resuming(stage, config, before, mark)
    write_mark(folder.path, stage.name, begun)
    with monitor.watching(stage.name) as samples:
        execute(stage, ready, folder / STATE)
    seconds, usage = round(time.monotonic() - started, 3), asdict(usage_of(samples))
    # A stage may write beside what it reads: the mark is that of the finished run.
    done = {"done": fingerprint_of(stage, config, previous), "seconds": seconds, **usage}
    write_mark(folder.path, stage.name, done | {key: begun[key] for key in ("outputs",) if key in begun})
    print(f"{title}: {duration(seconds)}", flush=True)
    return StageTime(stage.name, seconds, usage)


def ready(config: RunConfig, made: Sequence[Path] = ()) -> None:
    """Check every stage to run before the first one starts. made: outputs that exist by then."""
    if config.list_:
        return
    recipe, configs = prepare(config)
    chosen, _ = selection(config, recipe)
    there = list(made)
    for stage in recipe.stages:
        if stage.name in chosen:
            with name_stage(stage):
                if stage.config:
                    preflight.require_outputs(configs[stage.name])
                else:
                    preflight.ready(stage.command, configs[stage.name], there, run_folder(config))
            there += outputs(configs[stage.name])


def record_of(recipe: Recipe) -> dict[str, Any]:
    """The recipe as it was resolved, for the run folder."""
    stages = [
        {"name": stage.name, "command": stage.command}
        | ({"config": str(stage.config)} if stage.config else {})
        | stage.options
        for stage in recipe.stages
    ]
    return {"recipe": str(recipe.path), "description": recipe.description, "stages": stages}


def prepare(config: RunConfig) -> tuple[Recipe, dict[str, Any]]:
    """The recipe, and every stage's config: all of it is checked before anything runs."""
    if not config.recipe:
        raise UsageError("run needs a recipe: rankwise run RECIPE.yaml, or the name of one of `rankwise run --list`")
    loaded = load_recipe(find_recipe(config.recipe), run_folder(config), config.set)
    chosen, _ = selection(config, loaded)
    return resolve_stages(loaded, config.set, chosen)


def run_folder(config: RunConfig) -> Path:
    assert config.recipe is not None
    return Path(config.output_dir or Path("runs") / Path(config.recipe).stem)


def selection(config: RunConfig, recipe: Recipe) -> tuple[set[str], bool]:
    """The stages to look at, and whether they run whatever was done before."""
    names = [stage.name for stage in recipe.stages]
    for name in [*config.only, *([config.from_] if config.from_ else [])]:
        if name not in names:
            error = unknown(name, names, str(recipe.path), "stage")
            raise UsageError(f"{error}; the stages are {', '.join(names)}")
    chosen = names[names.index(config.from_) :] if config.from_ else names
    return {name for name in chosen if not config.only or name in config.only}, bool(config.force or config.from_)


def fingerprint_of(stage: Stage, config: Any, previous: str | None) -> str:
    """Hash of a stage's resolved options, of the files that they name (what is written is not among them, nor is a
    choice: `.` may be one), and of the mark of the stage before it: what changes one, changes all after it."""
    options = flatten(config)
    no_inputs = {item.name for item in options_of(config) if item.choices or item.path in OUTPUTS}
    named = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    inputs = {
        f"{name} {value}": fingerprint(Path(value))
        for name, values in named.items()
        for value in values
        if name not in (*FILLED, *no_inputs) and isinstance(value, str) and value and Path(value).exists()
    }
    content = json.dumps([stage.command, options, inputs, previous], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()


def resuming(stage: Stage, config: Any, before: Mapping[str, Any], mark: str) -> tuple[Any, dict[str, Any]]:
    """(the config that a stage runs with, its mark meanwhile). Where it finds what it has made before, one that was
    stopped goes on and one whose options or inputs have changed starts over, as its command says (`going_on`).

    What this recipe has not made is not its to replace: its command decides. `outputs` of the mark: where the stage has
    begun. `replaced`: modification times of what it starts over from, which outlives a start that comes to nothing.
    """
    command, where = stage_of(stage.command), places(config)
    if not hasattr(command, "going_on"):
        return config, {"started": mark}
    own = set(before.get("outputs", where if before else []))
    there = {str(path): path.stat().st_mtime_ns for path in command.earlier(config)}
    if there and not where <= own:
        return config, {"started": mark, "outputs": sorted(own)}
    begun = {"started": mark, "outputs": sorted(own | where)}
    if not there:
        return config, begun
    unchanged = before.get("started") == mark and not there.items() & before.get("replaced", {}).items()
    return command.going_on(config, unchanged=unchanged), begun | ({} if unchanged else {"replaced": there})


def places(config: Any) -> set[str]:
    """Where a stage writes: where its options say, else beside its model."""
    return {str(path) for path in outputs(config)} or {str(flatten(config).get("model_name"))}


def execute(stage: Stage, config: Any, scratch: Path) -> None:
    with name_stage(stage):
        if stage.nproc > 1:
            run_in_processes(stage.command, flatten(config), stage.nproc, scratch / f"{stage.name}.json")
        else:
            preflight.run(stage.command, config)
    sys.stdout.flush()


@contextmanager
def name_stage(stage: Stage) -> Iterator[None]:
    """Name the stage in an error about its flags: `--metric` of a stage is `--set STAGE.metric=…` here."""
    try:
        yield
    except (UsageError, DataError) as error:
        error.args = (f"stage {stage.name} (rankwise {stage.command}): {error}",)
        raise


def describe(config: RunConfig) -> list[str]:
    """Every stage with its resolved options, then what it would do."""
    if config.list_:
        return ["list the recipes that come with the package"]
    recipe, configs = prepare(config)
    lines = [f"run {recipe.path} in {run_folder(config)}"]
    for stage in recipe.stages:
        if stage.config:
            lines.append(f"{stage.name}: rankwise {stage.command} {stage.config} {as_flags(stage.options)}")
            lines.append(f"  {stage.config} is read when this stage's turn comes, and checked then")
            continue
        lines.append(f"{stage.name}: rankwise {stage.command} {as_flags(flatten(configs[stage.name]))}")
        with name_stage(stage):
            lines += [f"  {line}" for line in preflight.describe(stage.command, configs[stage.name])]
    return lines


def as_flags(options: Mapping[str, Any]) -> str:
    """Options as flags, less those that are unset or off."""
    given = {name: value for name, value in options.items() if value not in (None, "", [], False)}
    values = {name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in given.items()}
    return " ".join(f"--{name} {value}" for name, value in values.items())


def start(config: RunConfig, folder: Path, log: Path) -> int:
    """Start the same run as a process that outlives this one and its terminal; returns its number."""
    refuse_secrets(config)
    line = [sys.executable, "-m", "rankwise.cli", "run", *words(config, folder)]
    with copier(log, NOBODY) as (_, pipes):
        process = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=pipes[1],
            stderr=pipes[2],
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"},
        )
    print(f"running in the background as process {process.pid}; everything is in {folder}")
    print(f"log:     {log}")
    print(f"follow:  tail -f {shlex.quote(str(log))}")
    print(f"stop:    kill {process.pid}    (training saves a checkpoint first; the same command goes on from there)")
    return process.pid


def words(config: RunConfig, folder: Path) -> list[str]:
    """The command line of the run itself."""
    assert config.recipe is not None
    found = [config.recipe, "--output_dir", str(folder)]
    found += [word for change in config.set for word in ("--set", change)]
    found += ["--only", ",".join(config.only)] if config.only else []
    found += ["--from", config.from_] if config.from_ else []
    return found + ["--force"] * config.force


def refuse_secrets(config: RunConfig) -> None:
    """A command line can be read by every user of the machine for as long as the process lives."""
    named = [change.partition("=")[0] for change in config.set if SECRET.search(change.partition("=")[0])]
    if named:
        raise UsageError(
            f"--set {named[0]}=… with --background would show the secret in the list of processes; "
            "give it as an environment variable instead (OPENAI_API_KEY, say)"
        )


class Terminated(BaseException):
    """SIGTERM, where no stage has its own way of stopping. No Exception: no library may take it for an error."""


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """Turn SIGTERM into Interrupted (143), so that locks and temporary files are cleaned up on the way; a second one
    ends the process at once. Training sets handlers of its own while it runs (train/trainer.py)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    own = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() != own:  # a worker, forked with this handler
            os._exit(128 + number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Terminated:
        raise Interrupted(f"stopped by SIGTERM; {advice}", signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def run_in_processes(command: str, options: Mapping[str, Any], processes: int, config: Path) -> None:
    """Run `rankwise COMMAND` on these options under torchrun; raises with its exit code where it fails."""
    write_json(config, {name: value for name, value in options.items() if value is not None})
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    if wait_for([*line, "-m", "rankwise.cli", *command.split(), str(config)]):
        raise RankwiseError(f"rankwise {command} in {processes} processes failed; see its message above")


def wait_for(line: Sequence[str]) -> int:
    """The exit code. A run that is stopped tells torchrun, which tells the processes, and waits until they have saved;
    Ctrl-C has reached them already."""
    with subprocess.Popen(line) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            child.wait()
            raise
        except BaseException:
            child.terminate()
            child.wait()
            raise
