"""A log file of everything that is printed: by us, by libraries, by child processes, and an error's last words.

with logged(run / "logs" / "20261121-153000.log"):     # the terminal gets it too
    …
with copier(path, {1: NOWHERE, 2: NOWHERE}) as (process, pipes):     # for a child in the background: the file alone
    subprocess.Popen(…, stdout=pipes[1], stderr=pipes[2])
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rankwise.errors import RankwiseError, UsageError
from rankwise.files import log_copy
from rankwise.files.log_copy import NOWHERE, Lines, secrets_of
from rankwise.options.field import SECRET

STREAMS = (1, 2)
PATIENCE = 5.0  # seconds for the copying to end: a child that outlives the block keeps it open
NOBODY = dict.fromkeys(STREAMS, NOWHERE)


@contextmanager
def logged(path: Path) -> Iterator[Path]:
    """Copy standard output and error, by descriptor, into the file too (appended).

    An error that ends the block is written to the file here, because whoever prints it does so after the block.
    """
    require_log_file(path)
    line_by_line()
    try:
        with redirected(path):
            yield path
    except BaseException as error:
        append(path, last_words(error))
        raise


@contextmanager
def redirected(path: Path) -> Iterator[None]:
    """Both streams through a copier while the block runs."""
    together = os.path.sameopenfile(*STREAMS)
    with copier(path, {stream: STREAMS[0] if together else stream for stream in STREAMS}) as (process, pipes):
        kept = {stream: os.dup(stream) for stream in STREAMS}
        for stream, pipe in pipes.items():
            os.dup2(pipe, stream)
    try:
        yield
    finally:
        flush()
        for stream, own in kept.items():
            os.dup2(own, stream)
            os.close(own)
        wait(process)


@contextmanager
def copier(path: Path, targets: Mapping[int, int]) -> Iterator[tuple[subprocess.Popen[bytes], dict[int, int]]]:
    """A started process that copies to the file, and for each stream the end of a pipe to write into, open within the
    block. A target is where the stream goes besides, a descriptor of this process or NOWHERE; streams of one target
    share a pipe, which keeps their order."""
    if sys.platform == "win32":
        raise UsageError("log files are not supported on Windows; redirect the output instead: rankwise … > LOG 2>&1")
    require_log_file(path)
    pipes = {target: os.pipe() for target in dict.fromkeys(targets.values())}
    words = [f"{reading}:{target}" for target, (reading, _) in pipes.items()]
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", log_copy.__file__, str(path), sys.stdout.encoding, SECRET.pattern, *words],
            pass_fds=[reading for reading, _ in pipes.values()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the run, not for its log
        )
        yield process, {stream: pipes[target][1] for stream, target in targets.items()}
    finally:
        for ends in pipes.values():
            for end in ends:
                os.close(end)


def require_log_file(path: Path) -> None:
    """UsageError where the file cannot be written: before anything runs."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"{path}: the log cannot be written there: {error.strerror}; choose another file") from error


def wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        print("note: a process of this run is still running; its output still goes to the log", file=sys.stderr)


def line_by_line() -> None:
    """Switch to line buffering, so that the log can be followed; a pipe is block-buffered otherwise."""
    flush()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def last_words(error: BaseException) -> str:
    if isinstance(error, RankwiseError):
        return f"rankwise: {error} (exit code {error.exit_code})\n"
    if isinstance(error, KeyboardInterrupt):
        return "rankwise: interrupted (exit code 130)\n"
    return "".join(traceback.format_exception(error))


def append(path: Path, text: str) -> None:
    lines = Lines(secrets_of(os.environ, SECRET))
    with path.open("ab") as stream:
        stream.write(b"".join(lines.add(text.encode(errors="surrogateescape"))))
