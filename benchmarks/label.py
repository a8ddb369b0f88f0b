"""How well labelling uses what a service allows, and what it costs beside the service: a teacher on this machine.

    python benchmarks/label.py [--images 120] [--latency 0.5] [--out benchmarks/results]

The teacher answers after a fixed time, the same good answer always. What is possible is the smaller of the rate and
concurrency ÷ latency. Measured from the first request to the last answer: requests per minute against what is possible,
the most requests that began in any ten seconds against the limit's share of them, and the most in flight. Then with no
limit and no latency: what one image costs us (decoding, resizing, JPEG, request, check, ledger with fsync, PNG), the
server's own work in the same process included, and a rerun that finds everything in the ledger.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from PIL import Image
from workload import command, machine

from rankwise.labels import command as label
from rankwise.labels.teacher.loopback import LoopbackTeacher, Response, completion
from rankwise.options.label import LabelConfig, TeacherSection

WINDOW = 10.0
NO_LIMIT = 1e9
LIMITS = ((60, 5), (300, 5), (1200, 5), (1200, 20))  # requests per minute, concurrency
ANSWER = {
    "visual_features": ["a feature"] * 4,
    "color_breakdown": "blue 80 %, white 20 %",
    "texture": "smooth",
    "reason": "mostly water, as far as this teacher is concerned",
    "element": "water",
    "confidence": 0.9,
    "alternative_element": None,
    "ambiguity_note": None,
}


@dataclass(frozen=True)
class Watched:
    """What the server saw: the times at which requests came, seconds, and the most that it held at one time."""

    starts: tuple[float, ...]
    most_in_flight: int
    latency: float

    @property
    def per_minute(self) -> float:
        """Requests per minute from the first to the last; the first opens the interval and is not counted."""
        return 60 * (len(self.starts) - 1) / (self.starts[-1] - self.starts[0])

    @property
    def most_in_window(self) -> int:
        return max(sum(start <= other < start + WINDOW for other in self.starts) for start in self.starts)


def photos(folder: Path, count: int) -> None:
    """Photos of COCO's usual size: noise over a slope, which JPEG compresses about as badly as a photo."""
    noise = random.Random(0)
    for number in range(count):
        small = Image.frombytes("RGB", (80, 60), noise.randbytes(80 * 60 * 3))
        small.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{number:05d}.jpg", quality=90)


def labelled(config: LabelConfig, latency: float) -> tuple[Watched, float]:
    """One run of the command against a teacher with this latency: what it saw, and the command's seconds."""
    starts: list[float] = []
    lock = threading.Lock()

    def respond(request: dict[str, Any]) -> Response:
        with lock:
            starts.append(time.monotonic())
        return replace(completion(json.dumps(ANSWER), request), delay=latency)

    with LoopbackTeacher(respond) as server, contextlib.redirect_stdout(io.StringIO()):
        teacher = replace(config.teacher, base_url=server.url)
        started = time.perf_counter()
        label.run(replace(config, teacher=teacher))
        return Watched(tuple(sorted(starts)), server.most_in_flight, latency), time.perf_counter() - started


def at_the_limit(
    images: Path, folder: Path, rate: float, concurrency: int, options: argparse.Namespace
) -> dict[str, Any]:
    """How much of what is possible is used. At a low rate fewer images do: about half a minute each."""
    possible = min(rate, 60 * concurrency / options.latency)
    count = max(10, min(options.images, round(possible / 2)))
    section = TeacherSection(requests_per_minute=rate, concurrency=concurrency, trial=0)
    config = LabelConfig(str(images), num_images=count, output_dir=str(folder), teacher=section)
    watched, seconds = labelled(config, options.latency)
    return {
        "requests_per_minute": rate,
        "concurrency": concurrency,
        "images": count,
        "possible_per_minute": possible,
        "reached_per_minute": watched.per_minute,
        "share_of_possible": watched.per_minute / possible,
        "most_in_ten_seconds": watched.most_in_window,
        "allowed_in_ten_seconds": rate * WINDOW / 60 + 1,
        "most_in_flight": watched.most_in_flight,
        "command_seconds": seconds,
    }


def without_limits(images: Path, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per image of everything on our side, and of a rerun from the ledger."""
    section = TeacherSection(requests_per_minute=NO_LIMIT, concurrency=5, trial=0)
    config = LabelConfig(str(images), num_images=options.images, output_dir=str(folder), teacher=section)
    watched, first = labelled(config, 0.0)
    assert len(watched.starts) == options.images
    with LoopbackTeacher() as server, contextlib.redirect_stdout(io.StringIO()):
        started = time.perf_counter()
        label.run(replace(config, teacher=replace(section, base_url=server.url)))
        assert not server.requests
        again = time.perf_counter() - started
    return {
        "milliseconds_per_image": 1000 * first / options.images,
        "milliseconds_per_image_again": 1000 * again / options.images,
    }


def page(rows: Sequence[dict[str, Any]], own: dict[str, float], options: argparse.Namespace) -> str:
    lines = [
        "# Labelling at a service's limits",
        "",
        f"{date.today()} · {machine()} · a teacher on this machine that answers after {options.latency:g} s · "
        f"`{command()}`",
        "",
        "| requests per minute allowed | in flight allowed | images | possible per minute | reached | share | most in "
        "any 10 s (allowed) | most in flight |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {row['requests_per_minute']:g} | {row['concurrency']} | {row['images']} | "
        f"{row['possible_per_minute']:.0f} | {row['reached_per_minute']:.0f} | {row['share_of_possible']:.1%} | "
        f"{row['most_in_ten_seconds']} "
        f"({row['allowed_in_ten_seconds']:.0f}) | {row['most_in_flight']} |"
        for row in rows
    ]
    lines += [
        "",
        f"Without limits and latency, {options.images} images of 640 × 480: {own['milliseconds_per_image']:.0f} ms per "
        f"image on our side, the server in the same process included; {own['milliseconds_per_image_again']:.0f} ms per "
        "image in a rerun that finds every answer in the ledger.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=120)
    parser.add_argument("--latency", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        photos(folder / "photos", options.images)
        own = without_limits(folder / "photos", folder / "own", options)
        rows = [at_the_limit(folder / "photos", folder / f"{r}-{c}", r, c, options) for r, c in LIMITS]
    options.out.mkdir(parents=True, exist_ok=True)
    content = {"limits": rows, "without_limits": own, "latency_seconds": options.latency, "machine": machine()}
    (options.out / "label.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (options.out / "label.md").write_text(page(rows, own, options), encoding="utf-8")
    print(page(rows, own, options))


if __name__ == "__main__":
    main()
