"""The memory that a process holds for itself, and the most of it so far.

with PeakMemory() as memory:     # a thread samples ten times a second
    measure()
memory.bytes

Pages of mapped files (weights that are read one tensor at a time) are resident as well, and the kernel's own peak
counts them. The system takes them back whenever it needs them, so they say nothing of how much a machine must have.
"""

from __future__ import annotations

import threading

import psutil

SECONDS = 0.1  # between two samples


def own_memory(process: psutil.Process) -> int:
    """Bytes of anonymous memory (Linux); elsewhere all resident bytes, mapped files included."""
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


class PeakMemory:
    """Samples this process from `with` to its end. `bytes`: the most of `own_memory` that was seen."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS):
            self.sample()

    def sample(self) -> None:
        self._most = max(self._most, own_memory(self._process))

    @property
    def bytes(self) -> int:
        """Up to now."""
        self.sample()
        return self._most
