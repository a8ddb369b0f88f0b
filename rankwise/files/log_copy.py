"""The process that copies a run's output to its log file. `log.py` starts it as a script: standard library only.

python log_copy.py LOG cp1252 SECRET 5:1 6:2  # what comes from descriptor 5 goes to 1 and to LOG, from 6 to 2 and LOG

A process of its own, because whatever happens to the run (a kill, an abort in native code) its last words must still
reach the file. It ends when every writer has gone. Of a progress bar, which overwrites its line, the log gets the last
state; the values of environment variables named like SECRET are struck out. The log is UTF-8, whatever is printed.
"""

from __future__ import annotations

import os
import re
import selectors
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence

SHORTEST = 8  # characters: a shorter value would strike out ordinary words
BLOCK = 2**16
NOWHERE = -1


def secrets_of(environment: Mapping[str, str], secret: re.Pattern[str]) -> dict[bytes, bytes]:
    """Value → what stands in its place, longest first."""
    found = {name: value for name, value in environment.items() if secret.search(name) and len(value) >= SHORTEST}
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
            open_targets[source] = pass_on(piece, open_targets[source])
            written = lines[source].add(piece) if piece else lines[source].end()
            os.write(log, b"".join(written))


def pass_on(piece: bytes, target: int) -> int:
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
    targets = {int(source): int(target) for source, target in (word.split(":") for word in words[3:])}
    log = os.open(words[0], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    copy(log, words[1], targets, secrets_of(os.environ, re.compile(words[2], re.IGNORECASE)))


if __name__ == "__main__":
    main(sys.argv[1:])
