"""How far long work is: a bar on a terminal, lines in a log. The one place that knows tqdm.

    for site in progress(sites, desc="spectra", unit="site"): …
    with progress(total=400, desc="train", unit="step", leave=True) as bar: bar.update()

On a terminal it is tqdm. Elsewhere (nohup, CI, a file) nothing overwrites itself:

    train: 400 steps
    train: 131 of 400 steps (33 %), 1 min 00 s so far, 2.2 steps/s, about 2 min 03 s left; loss 1.83
    train: done, 400 steps in 3 min 02 s

A bar that stays on a terminal (`leave`) has the first and the last line; of one that does not, and of one within
another, nothing is said unless a minute has passed. One process of several prints.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NoReturn, TypeVar, overload

import tqdm as package
from tqdm import auto, std

from rankwise.page.text import duration, memory

INTERVAL = 60.0  # seconds between two lines
BAR = std.tqdm  # tqdm's own, whatever stands for it later
T = TypeVar("T")


def silent() -> bool:
    """In all processes but the first of a job, as torchrun tells them (`process_index`, whose module needs torch)."""
    return os.environ.get("RANK", "0") != "0"


def terminal() -> bool:
    """Whether a bar can overwrite itself where standard error goes."""
    return sys.stderr is not None and sys.stderr.isatty()


@overload
def progress(
    items: None = None, *, total: int | None, desc: str, unit: str, initial: int = 0, leave: bool = False
) -> std.tqdm[NoReturn]: ...
@overload
def progress(
    items: Iterable[T], *, total: int | None = None, desc: str, unit: str, leave: bool = False
) -> std.tqdm[T]: ...
def progress(items: Any = None, *, desc: str, unit: str, **settings: Any) -> std.tqdm[Any]:
    """A tqdm over the items, or of a total, to be updated; without its output in all processes but the first.

    unit: a singular noun. leave: whether the bar is still there at the end. initial: what was done before.
    """
    kind = BAR if terminal() else LogLines
    settings = {"leave": False, **settings}
    bar: std.tqdm[Any] = kind(items, desc=desc, unit=unit, disable=silent(), **settings)
    return bar


def adopt_libraries() -> None:
    """Where no bar can be drawn, the bars of libraries that are imported from now on (datasets, the hub, transformers,
    lm_eval …) are lines too, of those that take over a minute. For processes that are a command of ours."""
    if not terminal():
        for module in (package, std, auto):
            vars(module)["tqdm"] = LibraryLines


def adopted() -> bool:
    return issubclass(auto.tqdm, LogLines)


class LogLines(BAR):  # type: ignore[type-arg]
    """A tqdm that draws nothing and is told about in lines of its own."""

    told = False  # whether a line was printed about it
    monitor_interval = 0

    def __init__(self, *args: Any, **settings: Any) -> None:
        settings["disable"] = bool(settings.get("disable")) or silent()
        super().__init__(*args, **{**settings, "delay": float("inf")})  # so that tqdm itself writes nothing
        self.began = time.monotonic()
        if not self.disable:
            BEAT.opened(self)

    def __iter__(self) -> Iterator[Any]:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def close(self) -> None:
        if not self.disable:
            BEAT.closed(self)
        super().close()

    def display(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def clear(self, *_: Any, **__: Any) -> None:
        """Nothing."""

    def title(self) -> str:
        return (self.desc or "").rstrip(": ") or "progress"

    def count(self, number: float) -> str:
        return memory(number) if self.unit == "B" else f"{number:,.0f}"

    def amount(self) -> str:
        """How much there is, or has been where that is not known."""
        number = self.n if self.total is None else self.total
        return self.count(number) + ("" if self.unit == "B" else f" {self.units(number)}")

    def units(self, number: float) -> str:
        one = {"it": "item"}.get(self.unit.strip(), self.unit.strip())
        return one if number == 1 or one == "percent" else one + ("es" if one.endswith(("ch", "x")) else "s")

    def rate(self, made: float, seconds: float) -> str:
        if self.unit == "B":
            return f"{memory(made / seconds)}/s"
        if made < seconds:
            return f"{duration(seconds / made)} per {self.units(1)}"
        return f"{made / seconds:,.{1 if made < 100 * seconds else 0}f} {self.units(2)}/s"

    def state(self) -> str:
        """Step of steps, time, rate, remaining time, and what the work itself says."""
        made, seconds = self.n - self.initial, time.monotonic() - self.began
        share = f"{self.count(self.n)} of {self.amount()} ({self.n / self.total:.0%})" if self.total else ""
        parts = [share or self.amount()]
        parts.append(f"{duration(seconds)} so far")
        if made > 0 and seconds > 0:
            parts.append(self.rate(made, seconds))
            if self.total and self.total > self.n:
                parts.append(f"about {duration((self.total - self.n) * seconds / made)} left")
        return f"{self.title()}: {', '.join(parts)}" + (f"; {self.postfix}" if self.postfix else "")


class LibraryLines(LogLines):
    """A library's bar."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{**settings, "leave": False})


class Beat:
    """Says how far the open bars are whenever `INTERVAL` has passed without a line, even within one slow item.

    A thread, while there is a bar.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.open: list[LogLines] = []
        self.running = False
        self.last = time.monotonic()

    def opened(self, bar: LogLines) -> None:
        with self.changed:
            self.open.append(bar)
            if len(self.open) == 1 and bar.leave:
                done = f", {bar.count(bar.initial)} of them done before" if bar.initial else ""
                self.say(bar, f"{bar.title()}: {bar.amount() if bar.total is not None else 'started'}{done}")
            if not self.running:
                self.running = True
                threading.Thread(target=self.run, name="progress", daemon=True).start()

    def closed(self, bar: LogLines) -> None:
        with self.changed:
            if not any(one is bar for one in self.open):  # tqdm compares bars by their places
                return
            self.open = [one for one in self.open if one is not bar]
            if bar.told:
                whole = not bar.total or bar.n >= bar.total
                what = f"done, {bar.amount()}" if whole else f"ended after {bar.count(bar.n)} of {bar.amount()}"
                self.say(bar, f"{bar.title()}: {what} in {duration(time.monotonic() - bar.began)}")
            if not self.open:
                self.changed.notify_all()

    def run(self) -> None:
        with self.changed:
            while self.open:
                rest = self.last + INTERVAL - time.monotonic()
                if rest > 0:
                    self.changed.wait(rest)
                else:
                    self.tell()
            self.running = False

    def tell(self) -> None:
        """One line: the outermost bar, and within it the innermost."""
        outer, inner = self.open[0], self.open[-1]
        self.say(outer, outer.state() + ("" if inner is outer else f" | {inner.state()}"))

    def say(self, bar: LogLines, text: str) -> None:
        bar.told, self.last = True, time.monotonic()
        with suppress(OSError, ValueError):  # a standard error that was closed ends no work
            print(text, file=sys.stderr, flush=True)

    def forked(self) -> None:
        """In a new process, which has neither the thread nor the work."""
        self.open, self.running = [], False
        self.changed.release()


BEAT = Beat()
if hasattr(os, "register_at_fork"):  # no fork while a line is being printed: its lock would stay closed
    os.register_at_fork(before=BEAT.changed.acquire, after_in_parent=BEAT.changed.release, after_in_child=BEAT.forked)
