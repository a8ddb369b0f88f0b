"""Stopping before the end: by a signal, or by an error of one question while others are on their way.

with Stopping() as stopping:
    for task in await stopping.next_done(tasks): …     # Interrupted once SIGINT or SIGTERM came
    await stopping.wind_down(tasks)                    # waits for what is on its way, GRACE seconds at most
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterable
from typing import Any

from rankwise.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 20.0


class Stopping:
    """A context inside a running event loop in which the first signal is a request and the second one ends at once.

    Every answer is on the disk before it is used, so the second one loses only answers that are still on their way.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._asked = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._handles = sys.platform != "win32" and threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Stopping:
        for number in SIGNALS if self._handles else ():
            self._loop.add_signal_handler(number, self._receive, number)
        return self

    def __exit__(self, *_: object) -> None:
        for number in SIGNALS if self._handles else ():
            self._loop.remove_signal_handler(number)

    def _receive(self, number: int) -> None:
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number
        self._asked.set()
        text = "waiting for the answers that are on their way; a second signal stops at once"
        print(f"\nrankwise: {text}", file=sys.stderr, flush=True)

    async def next_done(self, tasks: set[asyncio.Task[Any]], *, wait: bool = True) -> set[asyncio.Task[Any]]:
        """The tasks that are done; with `wait`, once there is one. Raises Interrupted where a signal came."""
        asked = asyncio.create_task(self._asked.wait())
        try:
            done, _ = await asyncio.wait(
                {*tasks, asked}, timeout=None if wait else 0, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            asked.cancel()
        if self.requested is not None:
            name = signal.Signals(self.requested).name
            raise Interrupted(f"interrupted by {name}; every answer is in the ledger", self.requested)
        return done - {asked}

    async def wind_down(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Let open tasks finish for a while, then cancel them; what they raise is of no more interest."""
        open_tasks = [task for task in tasks if not task.done()]
        if open_tasks:
            await asyncio.wait(open_tasks, timeout=GRACE)
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
