"""SIGINT and SIGTERM while training: the first stops after the running step or validation batch, the second at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from rankwise.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 2.0  # torchrun and a terminal may both deliver one and the same signal to each of its processes


class Interruption:
    """A context in which the two signals are requests. `requested` is the signal's number, or None.

    A repeated signal ends the process with 128 + its number, from wherever it is: checkpoints that bear a manifest
    are complete, and the one being written bears none. Handlers are set in the main thread only, and put back.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested: int | None = None
        self._echo = ECHO_SECONDS if processes > 1 else 0.0
        self._asked_at = 0.0
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self.requested = None
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data loader's worker, forked with this handler
            return
        if self.requested is None:
            self.requested, self._asked_at = number, time.monotonic()
            say("finishing this step or validation batch, then saving a checkpoint; a second signal stops at once")
        elif time.monotonic() - self._asked_at >= self._echo:
            say("stopped; the last complete checkpoint is intact")
            os._exit(128 + number)

    def raise_if_requested(self, folder: str) -> None:
        """Raise Interrupted where a signal came: training has stopped and its checkpoint is written."""
        if self.requested is not None:
            raise Interrupted(
                f"interrupted by {signal.Signals(self.requested).name}; the checkpoint is complete. To go on, run the "
                f"same command with --resume_from_checkpoint true (checkpoints in {folder})",
                self.requested,
            )


def say(text: str) -> None:
    """Straight to standard error: print may be what the signal interrupted."""
    os.write(2, f"\nrankwise: {text}\n".encode())
