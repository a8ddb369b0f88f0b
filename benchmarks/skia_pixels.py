"""How far are our pixels from those of Skia, which scales pictures on Android? By shape and kind of picture.

    python benchmarks/skia_pixels.py [--out benchmarks/results]

Writes the table, and what the tests compare with where Skia does not import: Skia's pixels
of every picture, and the SHA-256 of what its native bitmaps, Android's software canvas, make of them (tests/data).

    pip install 'rankwise[device]'; apt-get install libgl1 libegl1
    python benchmarks/skia_pixels.py --draw               the files in tests/data/skia, once
    python benchmarks/skia_pixels.py --photos FOLDER      a line about photos of your own; nothing is written
"""

from __future__ import annotations

import argparse
import io
import json
import platform
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rankwise.core.geometry import letterbox
from rankwise.data.device import encoded, resize_for_device
from rankwise.device.parity.pixels import sha256_rgb, skia_pixels, unavailable
from rankwise.files.atomic import write_json, write_text

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
FILES, PIXELS, HASHES = DATA / "skia", DATA / "skia_pixels.npz", DATA / "skia_canvas.json"
SMALL, SIDE = 64, 256  # pixels kept in the repository; the device's
SHAPES = (
    *((1000, 37), (37, 1000), (4000, 3000), (3024, 4032), (1920, 1080), (640, 480), (480, 640), (300, 200)),
    *((333, 777), (511, 513), (257, 255), (255, 256), (129, 128), (96, 100), (17, 23), (5, 5), (3, 500), (1, 1)),
)
OTHERS = {"LANCZOS": Image.Resampling.LANCZOS, "Pillow's BILINEAR": Image.Resampling.BILINEAR}
Pixels = np.ndarray


# --- the pictures ----------------------------------------------------------------------------------------------------


def drawn(width: int, height: int) -> Image.Image:
    """Hatching, a gradient and a fine weave, by whole numbers: the same on every machine."""
    y, x = np.mgrid[:height, :width]
    hatched = np.where((x // 3 + y // 2) % 2, 240, 15)
    gradient, weave = (255 * x) // max(width - 1, 1), (37 * x + 91 * y + (x * y) % 53) % 256
    return Image.fromarray(np.stack([hatched, gradient, weave], axis=-1).astype(np.uint8))


def alpha(width: int, height: int, hard: bool) -> Image.Image:
    """Clear, half clear and solid parts; hard: only clear and solid."""
    y, x = np.mgrid[:height, :width]
    values = np.where((x // 9 + y // 7) % 2, 255, 0) if hard else (255 * (x + y)) // (width + height)
    return Image.fromarray(values.astype(np.uint8))


def draw_files(width: int = 90, height: int = 61) -> None:
    """Small files of the kinds that people have."""
    FILES.mkdir(parents=True, exist_ok=True)
    photo = drawn(width, height)
    soft, hard = photo.copy(), photo.copy()
    soft.putalpha(alpha(width, height, hard=False))
    hard.putalpha(alpha(width, height, hard=True))
    palette = photo.quantize(32)
    for number in range(2, 9):
        photo.save(FILES / f"exif-{number}.jpeg", quality=90, exif=turned(number))
    photo.save(FILES / "exif-6.png", exif=turned(6))
    photo.save(FILES / "exif-8.webp", quality=90, exif=turned(8))
    soft.save(FILES / "rgba-soft.png")
    hard.save(FILES / "rgba-hard.png")
    hard.save(FILES / "rgba-hard-exif-6.png", exif=turned(6))
    soft.save(FILES / "rgba-soft.webp", lossless=True, exact=True)
    soft.convert("LA").save(FILES / "la.png")
    palette.save(FILES / "palette.png")
    palette.save(FILES / "palette-transparent.png", transparency=bytes(8 * place for place in range(32)))
    palette.save(FILES / "palette-transparent.gif", transparency=3)
    photo.convert("L").save(FILES / "grey-colour-key.png", transparency=photo.convert("L").getpixel((4, 4)))
    photo.convert("L").save(FILES / "grey.jpeg", quality=90)
    photo.convert("1").save(FILES / "bilevel.png")
    photo.convert("CMYK").save(FILES / "cmyk.jpeg", quality=90)
    sixteen = np.asarray(photo.convert("L")).astype(np.uint16) * 257
    Image.fromarray(sixteen).save(FILES / "grey-16-bit.png")


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = number
    return exif


def pictures() -> Iterator[tuple[str, bytes]]:
    """Name and content of every picture: shapes by formula, kinds from files."""
    for width, height in SHAPES:
        yield f"{width} × {height}", encoded(drawn(width, height), "PNG")
    for file in sorted(FILES.iterdir()):
        yield file.name, file.read_bytes()


# --- the comparison --------------------------------------------------------------------------------------------------


def ours(content: bytes, size: int) -> Pixels:
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(resize_for_device(picture, size))


def otherwise(content: bytes, size: int, resample: Image.Resampling) -> Pixels:
    """What a trainer without this contract does: no EXIF note, alpha dropped, another filter, on black."""
    with Image.open(io.BytesIO(content)) as picture:
        rgb = (picture.convert("RGBA") if picture.has_transparency_data else picture).convert("RGB")
    place, square = letterbox(*rgb.size, size), Image.new("RGB", (size, size))
    square.paste(rgb.resize((place.width, place.height), resample), (place.left, place.top))
    return np.asarray(square)


def apart(one: Pixels, other: Pixels) -> dict[str, float]:
    difference = np.abs(one.astype(int) - other.astype(int))
    return {"max": int(difference.max()), "mean": round(float(difference.mean()), 2)}


def row(name: str, content: bytes) -> dict[str, Any]:
    skia, mine = skia_pixels(content, SIDE), ours(content, SIDE)
    canvas = skia_pixels(content, SIDE, canvas=True)
    assert skia is not None and canvas is not None, name
    found = {"ours": apart(mine, skia), "canvas": apart(canvas, mine)}
    return {
        "picture": name,
        **found,
        **{other: apart(otherwise(content, SIDE, how), skia) for other, how in OTHERS.items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Largest and mean difference of a value, of 255."""
    columns = ["ours", "canvas", *OTHERS]
    heads = ["ours", "Android's software canvas, from ours", *(f"{name} on black" for name in OTHERS)]
    lines = [f"| picture | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    lines += [f"| {one['picture']} | {' | '.join(cell(one[name]) for name in columns)} |" for one in rows]
    return "\n".join(lines)


def cell(found: Mapping[str, float]) -> str:
    return f"{found['max']} ({found['mean']:.2f})"


def of_photos(folder: Path) -> str:
    """The mean differences of photos, from the least to the largest, and the largest of a single value."""
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")]
    rows = [row(file.name, file.read_bytes()) for file in files]
    lines = [f"{len(rows)} photos"]
    for name in ("ours", "canvas", *OTHERS):
        found = [one[name] for one in rows]
        means = sorted(one["mean"] for one in found)
        largest = max(one["max"] for one in found)
        lines.append(f"{name}: mean {means[0]} to {means[-1]} (median {means[len(means) // 2]}), largest {largest}")
    return "\n".join(lines)


def kept() -> None:
    """What the tests need."""
    small, canvas = {}, {}
    for name, content in pictures():
        small[name] = skia_pixels(content, SMALL)
        drawn_natively = [skia_pixels(content, size, canvas=True) for size in (SMALL, SIDE)]
        canvas[name] = [sha256_rgb(one) for one in drawn_natively if one is not None]
    np.savez_compressed(PIXELS, **small)
    write_json(HASHES, {"skia": version("skia-python"), "sizes": [SMALL, SIDE], "sha256_rgb": canvas})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--draw", action="store_true", help="make the files of the kinds anew")
    parser.add_argument("--photos", type=Path, help="measure these photos instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if unavailable():
        raise SystemExit(unavailable())
    if options.photos:
        print(of_photos(options.photos))
        return
    if options.draw:
        draw_files()
    kept()
    rows = [row(name, content) for name, content in pictures()]
    facts = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()} · skia-python {version('skia-python')} · Pillow {version('pillow')}",
        "command": "python benchmarks/skia_pixels.py",
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "skia_pixels.json", {**facts, "rows": rows})
    head = f"# Our pixels against Skia's\n\n{' · '.join(facts.values())}\n\n"
    legend = f"Largest (mean) difference of a value, of 255, at {SIDE} × {SIDE}. LANCZOS and BILINEAR: without EXIF\n"
    legend += "orientation and alpha channel, as a trainer without this contract would.\n\n"
    write_text(options.out / "skia_pixels.md", head + legend + table(rows) + "\n")
    print(json.dumps({"pictures": len(rows), "ours": max(one["ours"]["max"] for one in rows)}))


if __name__ == "__main__":
    main()
