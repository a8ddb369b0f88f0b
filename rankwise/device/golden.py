"""Golden vectors: the trained model's outputs for a few inputs, stored as the reference for any runtime.

    cases, HFReference ── write_golden ──▶ golden/golden.json, 00-source.png, 00-device.png …
    golden/ ── read_golden ──▶ Golden(cases, thresholds) ── climb ──▶ the first rung that differs

No model is needed to replay them: they are a `Reference` of the parity ladder with the values of that day.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rankwise.data.device import DeviceReader, DeviceTarget, encoded
from rankwise.data.example import Example, Turn
from rankwise.data.images import ImageReader
from rankwise.data.pixels import suffix_of
from rankwise.device.parity.cases import Case, SourceImage
from rankwise.device.parity.floor import Thresholds, top_of
from rankwise.device.parity.pixels import on_canvas, sha256_rgb
from rankwise.device.parity.reference import Expected, Pixels, Reference
from rankwise.errors import DataError
from rankwise.files.document import Document

FOLDER = "golden"
GOLDEN = Document("golden.json", "rankwise-golden/1", "golden vectors", "rankwise bundle", indent=None)
Row = dict[str, Any]


@dataclass(frozen=True)
class Golden:
    """Cases with what is expected of each, by id. top: tokens known at each place. facts: as written."""

    cases: tuple[Case, ...]
    known: Mapping[str, Expected]
    thresholds: Thresholds
    form: str
    top: int

    def expected(self, case: Case) -> Expected:
        """Golden values are a `Reference`."""
        return self.known[case.id]


# --- writing ---------------------------------------------------------------------------------------------------------


def write_golden(
    folder: Path, cases: Sequence[Case], reference: Reference, thresholds: Thresholds, form: str, top: int
) -> Path:
    """golden.json and its pictures below `folder`/golden. reference: float32, or its values are no measure."""
    place = folder / FOLDER
    place.mkdir(parents=True)
    rows = [row_of(number, case, reference.expected(case), place, top) for number, case in enumerate(cases)]
    vocabulary = reference.expected(cases[0]).log_probs.shape[-1] if cases else 0
    content = {
        "outtype": form,
        "vocabulary": vocabulary,
        "top": top,
        "tolerance": thresholds.as_dict(),
        "cases": rows,
    }
    return GOLDEN.write(place, content)


def row_of(number: int, case: Case, expected: Expected, place: Path, top: int) -> Row:
    tops = [sorted(one.items(), key=lambda pair: -pair[1]) for one in top_of(expected.log_probs, top)]
    return {
        "id": case.id,
        "prompt": case.prompt,
        "marker": case.marker,
        "images": pictures_of(number, case, expected, place),
        "ids": list(expected.ids),
        "image_ids": [list(one) for one in expected.expansions],
        "image_id": expected.image_id,
        "tiles": [list(one) for one in expected.tiles],
        "begin_id": expected.begin_id,
        "end_ids": list(expected.end_ids),
        "answer": list(expected.answer),
        "text": expected.text,
        "top_logprobs": [[[token, rounded(value)] for token, value in one] for one in tops],
        "template": template_row(expected),
        "kind": case.stratum,
    }


def template_row(expected: Expected) -> Row | None:
    if expected.template is None:
        return None
    messages, text = expected.template
    return {"messages": messages, "text": text, "kwargs": dict(expected.template_kwargs)}


def rounded(value: float) -> float:
    """Seven digits hold a float32; what is impossible has the smallest logarithm that JSON can have."""
    return float(f"{value:.7g}") if math.isfinite(value) else -1e30


def pictures_of(number: int, case: Case, expected: Expected, place: Path) -> list[Row]:
    """The source of each picture as it is stored, and the device's pixels of it as PNG."""
    rows = []
    for position, (source, pixels) in enumerate(zip(case.sources, expected.pixels, strict=True)):
        stem = f"{number:02d}" + (f"-{position}" if position else "")
        names = {"source": f"{stem}-source{suffix_of(source.content)}", "device": f"{stem}-device.png"}
        (place / names["source"]).write_bytes(source.content)
        (place / names["device"]).write_bytes(encoded(Image.fromarray(pixels), "PNG"))
        height, width = pixels.shape[:2]
        canvas = on_canvas(source, case)
        hashes = {"sha256_rgb": sha256_rgb(pixels)}
        hashes |= {"sha256_android_canvas": sha256_rgb(canvas)} if canvas is not None else {}
        rows.append({**names, "width": width, "height": height, **hashes})
    return rows


# --- reading ---------------------------------------------------------------------------------------------------------


def read_golden(folder: Path, target: DeviceTarget | None) -> Golden:
    """DataError where the file is not one, or a picture is not the one that was written.

    target: what the device does to a source picture; each case sends what it makes of it now.
    """
    file = folder / FOLDER / GOLDEN.name
    content = GOLDEN.read(file)
    try:
        rows = content["cases"]
        tolerance = Thresholds(**{name: value for name, value in content["tolerance"].items() if value is not None})
        known = {row["id"]: expected_of(row, int(content["vocabulary"]), file.parent) for row in rows}
        cases = tuple(case_of_row(row, file.parent, target) for row in rows)
        return Golden(cases, known, tolerance, str(content["outtype"]), int(content["top"]))
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{file}: not whole: {error!r}") from error


def case_of_row(row: Row, folder: Path, target: DeviceTarget | None) -> Case:
    reader = ImageReader(folder)
    read: Any = DeviceReader(reader, target) if target else reader
    images = [encoded(read.open(one["source"]), "PNG") for one in row["images"]]
    sources = tuple(SourceImage(one["device"], reader.content(one["source"])) for one in row["images"])
    size = target.image_size if target else None
    example = Example(row["id"], row["id"], (Turn("user", row["prompt"]), Turn("assistant", row["text"])))
    prompt, kind, marker = row["prompt"], row["kind"], row["marker"]
    return Case(row["id"], example, tuple(images), prompt, None, kind, marker, sources, size)


def expected_of(row: Row, vocabulary: int, folder: Path) -> Expected:
    template = row["template"]
    return Expected(
        ids=tuple(row["ids"]),
        answer=tuple(row["answer"]),
        log_probs=known_log_probs(row["top_logprobs"], vocabulary),
        text=row["text"],
        end_ids=tuple(row["end_ids"]),
        pixels=tuple(pixels_of(one, folder) for one in row["images"]),
        tiles=tuple((one[0], one[1], one[2]) for one in row["tiles"]),
        expansions=tuple(tuple(one) for one in row["image_ids"]),
        image_id=row["image_id"],
        begin_id=row["begin_id"],
        template=(template["messages"], template["text"]) if template else None,
        template_kwargs=(template or {}).get("kwargs", {}),
    )


def known_log_probs(tops: Sequence[Sequence[Sequence[float]]], vocabulary: int) -> Tensor:
    """(answer, vocabulary), NaN where a token is not among those that were written down."""
    table = torch.full((len(tops), vocabulary), math.nan)
    for place, top in enumerate(tops):
        for token, value in top:
            table[place, int(token)] = value
    return table


def pixels_of(row: Row, folder: Path) -> Pixels:
    file = folder / row["device"]
    if not file.is_file():
        raise DataError(f"{file}: missing; bundle the model again")
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if sha256_rgb(pixels) != row["sha256_rgb"]:
        raise DataError(f"{file}: its pixels changed since they were written (sha256 of the raw RGB differs)")
    return pixels
