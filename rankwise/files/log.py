"""A log file of everything that is printed: by us, by libraries, by child processes, and an error's last words.

with logged(run / "logs" / "20261121-153000.log"):     # the terminal gets it too
    …
with copier(path, {1: NOWHERE, 2: NOWHERE}) as (process, pipes):     # for a child in the background: the file alone
    subprocess.Popen(…, stdout=pipes[1], stderr=pipes[2])
"""

from __future__ import annotations

import io
import os
import re
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rankwise.errors import RankwiseError, UsageError

SECRET = re.compile(r"api_?key|password|secret|token", re.IGNORECASE)
SHORTEST = 8  # characters: a shorter value would strike out ordinary words
BLOCK = 2**16
NOWHERE = -1


def secrets_of(environment: Mapping[str, str]) -> dict[bytes, bytes]:
    """Value → what stands in its place, longest first."""
    found = {name: value for name, value in environment.items() if SECRET.search(name) and len(value) >= SHORTEST}
    longest = sorted(found, key=lambda name: -len(found[name]))
    return {os.fsencode(found[name]): f"[{name}]".encode() for name in longest}


class Lines:
    """Bytes in pieces → whole lines as the log has them."""

    def __init__(self, secrets: Mapping[bytes, bytes], encoding: str = "utf-8") -> None:
        self.secrets, self.encoding, self.rest = secrets, encoding, b""

    def add(self, piece: bytes) -> Iterator[bytes]:
        *whole, self.rest = (self.rest + piece).split(b"\n")
        yield from (self.cleaned(line) + b"\n" for line in whole)
        self.rest = self.rest[self.rest.rfind(b"\r", 0, -1) + 1 :]  # a bar's earlier states

    def end(self) -> Iterator[bytes]:
        if self.rest:
            yield self.cleaned(self.rest) + b"\n"

    def cleaned(self, line: bytes) -> bytes:
        line = line.rstrip(b"\r").rpartition(b"\r")[2]
        for value, name in self.secrets.items():
            line = line.replace(value, name)
        return as_utf8(line, self.encoding)


def as_utf8(line: bytes, encoding: str) -> bytes:
    """A line in the encoding of the run's streams, or in UTF-8 already as native libraries write it."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return line.decode(encoding, "replace").encode()
    return line


def copy(log: int, encoding: str, targets: Mapping[int, int], secrets: Mapping[bytes, bytes]) -> None:
    """Copy until all sources have ended. A target that has gone (a closed terminal) is written to no more."""
    selector = selectors.DefaultSelector()
    lines = {source: Lines(secrets, encoding) for source in targets}
    open_targets = dict(targets)
    for source in targets:
        selector.register(source, selectors.EVENT_READ)
    while selector.get_map():
        for key, _ in selector.select():
            source = int(key.fd)
            piece = os.read(source, BLOCK)
            if not piece:
                selector.unregister(source)
            open_targets[source] = passed_on(piece, open_targets[source])
            written = lines[source].add(piece) if piece else lines[source].end()
            os.write(log, b"".join(written))


def passed_on(piece: bytes, target: int) -> int:
    """The target, or NOWHERE once it takes no more."""
    while piece and target != NOWHERE:
        try:
            piece = piece[os.write(target, piece) :]
        except OSError:
            return NOWHERE
    return target


def main(words: Sequence[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    targets = {int(source): int(target) for source, target in (word.split(":") for word in words[2:])}
    log = os.open(words[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    copy(log, words[1], targets, secrets_of(os.environ))


if __name__ == "__main__":
    main(sys.argv[1:])


STREAMS = (1, 2)
PATIENCE = 5.0  # seconds for the copying to end: a child that outlives the block keeps it open
NOBODY = dict.fromkeys(STREAMS, NOWHERE)


@contextmanager
def logged(path: Path) -> Iterator[Path]:
    """Copy standard output and error, by descriptor, into the file too (appended).

    An error that ends the block is written to the file here, because whoever prints it does so after the block.
    """
    created(path)
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
        raise UsageError("a log file needs what Windows lacks; redirect the output instead: rankwise … > LOG 2>&1")
    created(path)
    pipes = {target: os.pipe() for target in dict.fromkeys(targets.values())}
    words = [f"{reading}:{target}" for target, (reading, _) in pipes.items()]
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", __file__, str(path), sys.stdout.encoding, *words],
            pass_fds=[reading for reading, _ in pipes.values()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the run, not for its log
        )
        yield process, {stream: pipes[target][1] for stream, target in targets.items()}
    finally:
        for ends in pipes.values():
            for end in ends:
                os.close(end)


def created(path: Path) -> None:
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
        print("note: a process of this run is still there; the log goes on as long as it writes", file=sys.stderr)


def line_by_line() -> None:
    """So that the log can be followed; a pipe would otherwise be written to in blocks."""
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
    lines = Lines(secrets_of(os.environ))
    with path.open("ab") as stream:
        stream.write(b"".join(lines.add(text.encode(errors="surrogateescape"))))
