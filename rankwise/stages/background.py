"""`rankwise run` in the background, and how a run is stopped from outside.

rankwise run recipe --background ── starts ──▶ rankwise run recipe    its own session, output in the log alone
kill PID ──▶ the stage's own checkpoint where it trains, else the stage ends where it is ──▶ exit code 143
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rankwise.config import RunConfig
from rankwise.errors import Interrupted, UsageError
from rankwise.store.log import NOBODY, copier
from rankwise.store.secrets import SECRET


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
    ends the process at once. Training sets handlers of its own while it runs (train/interruption.py)."""
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
