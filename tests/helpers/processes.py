"""Commands in processes of their own, forked from a server that has imported the libraries: seven seconds less each.

run("-m", "rankwise.cli", *words, count=2) is what `torchrun --nproc-per-node 2 -m rankwise.cli …` runs: the same
variables, a store for the job outside of it, and when one process fails the others end. One law of every kind still
goes through the real launcher: test_capture.py::test_two_processes_make_what_one_makes.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from pictures import blank

from rankwise.page import canvas

CONTEXT = get_context("forkserver")
LIBRARIES = ("transformers.trainer", "transformers.models.llama.modeling_llama", "matplotlib.figure")
OURS = ("rankwise.train.command", "rankwise.models.adapt", "rankwise.study.command")
CONTEXT.set_forkserver_preload(["torch", "peft", "pytest", "hypothesis", *LIBRARIES, *OURS])
LOCAL = "127.0.0.1"


def run(
    *command: object, count: int = 1, env: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """command: ("-m", module, *arguments) or (script, *arguments). Output of all processes together."""
    argv = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder, "stdout"), Path(folder, "stderr")
        store = torch.distributed.TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False)
        jobs = [_variables(index, count, store.port) if count > 1 else {} for index in range(count)]
        processes = [start(argv, *files, dict(os.environ) | dict(env or {}) | job) for job in jobs]
        code = _wait(processes, timeout)
        out, err = (file.read_text(encoding="utf-8") for file in files)
    return subprocess.CompletedProcess(argv, code, out, err)


def start(argv: list[str], stdout: Path, stderr: Path, environment: dict[str, str]) -> BaseProcess:
    """Started and not waited for: `pid` to send signals to, `join` and `exitcode` for its end."""
    for file in (stdout, stderr):
        file.touch()
    process = CONTEXT.Process(target=_become, args=(argv, stdout, stderr, environment, Path.cwd()))
    process.start()
    return process


def _variables(index: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), str(index)) | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count)
    )
    store = {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {**ranks, **store, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}


def _wait(processes: list[BaseProcess], timeout: float) -> int:
    """The first exit status that is not 0, after which the others are ended."""
    running, until = {process.sentinel: process for process in processes}, time.monotonic() + timeout
    while running:
        ended = connection.wait(list(running), until - time.monotonic())
        codes = [running.pop(sentinel).exitcode for sentinel in ended]  # type: ignore[call-overload]
        if not ended or any(codes):
            for process in running.values():
                process.kill()
                process.join()
            if not ended:
                raise subprocess.TimeoutExpired("a forked command", timeout)
            return next(code for code in codes if code)
    return 0


def _become(argv: list[str], stdout: Path, stderr: Path, environment: dict[str, str], folder: Path) -> None:
    """The forked process turns into the command."""
    gc.freeze()  # what the server imported stays: the Trainer's `gc.collect()` need not walk it, nor copy its pages
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    gc.freeze()  # what was loaded before the fork need not be walked through, nor its memory copied
    canvas.every_glyph = blank
    warnings.simplefilter("ignore")
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", torch.get_num_threads())))
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            sys.path.insert(0, str(Path(argv[0]).parent))
            runpy.run_path(argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
