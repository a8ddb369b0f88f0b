"""ShipBench on the product's own path: its code is damaged, and `rankwise validate` must end with exit 6 at the pixels.

    rankwise run quickstart -o RUN
    python benchmarks/shipbench_product.py --run RUN [--out benchmarks/results]

Training's pixels and those that are sent then come from the same wrong code, so that they agree: only an independent
side (Skia) can tell. The photos are quickstart's, some of them stored on their side, some with an alpha channel.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from rankwise.cli import main as rankwise
from rankwise.core.geometry import letterbox
from rankwise.data import device, pixels
from rankwise.data.device import read_target
from rankwise.data.label_task import read_task
from rankwise.device.parity.pixels import unavailable
from rankwise.files.atomic import write_json, write_text

Row = dict[str, Any]


def lanczos(image: Image.Image, size: int = device.SIZE, colour: str = "black") -> Image.Image:
    image = pixels.flattened(image, pixels.BLACK)
    place, square = letterbox(*image.size, size), Image.new("RGB", (size, size), colour)
    square.paste(image.resize((place.width, place.height), Image.Resampling.LANCZOS), (place.left, place.top))
    return square


def on_white(image: Image.Image, size: int = device.SIZE) -> Image.Image:
    return lanczos(image, size, "white")


FAULTS: dict[str, tuple[str, Callable[[], Any]]] = {
    "resize": ("`resize_for_device` scales with LANCZOS", lambda: patch.object(device, "resize_for_device", lanczos)),
    "padding": (
        "`resize_for_device` scales with LANCZOS on white",
        lambda: patch.object(device, "resize_for_device", on_white),
    ),
    "EXIF": ("the reader ignores the EXIF note", lambda: patch.object(pixels, "_orientation", lambda image: 1)),
    "alpha": ("transparency is laid on white", lambda: patch.object(device, "BLACK", pixels.WHITE)),
}


def photographed(run: Path, folder: Path) -> Path:
    """Quickstart's photos as a data set whose pictures are the files: a third on their side, a third transparent."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "photos").mkdir(parents=True)
    task, target = read_task(run / "dataset"), read_target(run / "export")
    assert target
    task.save(folder)
    target.save(folder)
    rows = []
    for number, file in enumerate(sorted((run / "tiny" / "photos").rglob("*.jpg"))):
        name = f"photos/{file.stem}.{'png' if number % 3 == 2 else 'jpg'}"
        with Image.open(file) as picture:
            photo = picture.convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 3 == 1 else 1
        if number % 3 == 2:
            across = np.indices((photo.height, photo.width)).sum(0)
            photo.putalpha(Image.fromarray((across // 24 % 2 * 255).astype(np.uint8)))
        photo.save(folder / name, exif=exif)
        rows.append({"image_id": file.stem, "image_path": name, task.field: label_of(file.stem, task.labels)})
    for name in ("train.jsonl", "val.jsonl"):
        write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return folder


def label_of(stem: str, labels: tuple[str, ...]) -> str:
    return next((label for label in labels if stem.startswith(label)), labels[0])


def validated(run: Path, data: Path, out: Path) -> tuple[int, Row]:
    """Exit code, and the first broken rung (of a sound program the pixels)."""
    shutil.rmtree(out, ignore_errors=True)
    asked = ["--task", "labels", "--data_path", str(data), "--outtype", "f16", "--tolerance", "50", "-o", str(out)]
    code = rankwise(["validate", str(run / "export"), *asked])
    rungs = json.loads((out / "validation.json").read_text(encoding="utf-8"))["parity"]["f16"]["rungs"]
    return code, next((rung for rung in rungs if rung["status"] == "broken"), rungs[0])


def table(rows: list[Row]) -> str:
    lines = [
        "| fault of the program | exit | first broken rung | largest difference from Skia |",
        "|---|---:|---|---:|",
    ]
    lines += [f"| {row['what']} | {row['exit']} | {row['rung']} | {row['skia']} of 255 |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of `rankwise run quickstart`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if unavailable():
        raise SystemExit(unavailable())
    data = photographed(options.run, options.run / "shipbench-photos")
    out = options.run / "shipbench-validation"
    code, rung = validated(options.run, data, out)
    rows = [{"what": "none", "exit": code, "rung": "holds" if code == 0 else rung["name"], **skia(rung)}]
    for what, damaged in FAULTS.values():
        with damaged():
            code, rung = validated(options.run, data, out)
        rows.append({"what": what, "exit": code, "rung": rung["name"] if code else "holds", **skia(rung)})
    facts = {"date": date.today().isoformat(), "machine": f"CPU · skia-python {version('skia-python')}"}
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "shipbench_product.json", {**facts, "rows": rows})
    head = f"# ShipBench: faults of the program itself\n\n{' · '.join(facts.values())}\n\n"
    write_text(options.out / "shipbench_product.md", head + table(rows) + "\n")
    print(table(rows))


def skia(rung: Row) -> Row:
    return {"skia": rung["measured"].get("Skia_largest_difference")}


if __name__ == "__main__":
    main()
