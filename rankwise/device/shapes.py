"""Golden vectors of the shapes that phones give to an app, where the data set has none of them.

    cases ── their sources' shapes ──▶ missing: wide, tall, turned, transparent ── drawn ──▶ Case*

A picture that has the device's size already passes through every resizer: only these show a wrong filter, place, EXIF
orientation or background. They are pictures of the data set, stretched, turned or cut out; the golden answer is the
trained model's own, whatever it is.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from PIL import ExifTags, Image, ImageDraw, ImageFilter

from rankwise.data.device import encoded
from rankwise.data.pixels import ON_ITS_SIDE, SQUARE, kind_of
from rankwise.data.render import Renderer
from rankwise.device.parity.cases import Case, SourceImage, case_of, decoded

HELD_UPRIGHT = 6  # EXIF's number for a camera that stores its pictures on their side
Shaped = Callable[[Image.Image], bytes]


def wide(picture: Image.Image) -> bytes:
    return encoded(picture.resize((640, 235), Image.Resampling.BICUBIC), "PNG")


def tall(picture: Image.Image) -> bytes:
    return encoded(picture.resize((203, 517), Image.Resampling.BICUBIC), "PNG")


def turned(picture: Image.Image) -> bytes:
    """As a camera stores a portrait: on its side, with a note."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = HELD_UPRIGHT
    upright = picture.resize((330, 440), Image.Resampling.BICUBIC)
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, subsampling=0, exif=exif)


def transparent(picture: Image.Image) -> bytes:
    """Cut out with a soft edge."""
    cut = picture.resize((300, 420), Image.Resampling.BICUBIC)
    edge = Image.new("L", cut.size)
    ImageDraw.Draw(edge).ellipse((30, 40, 270, 380), fill=255)
    cut.putalpha(edge.filter(ImageFilter.GaussianBlur(12)))
    return encoded(cut, "PNG")


SHAPES: Mapping[str, Shaped] = {"wide": wide, "tall": tall, "turned": turned, "transparent": transparent}


def shapes_of(content: bytes) -> set[str]:
    """Which of the shapes a picture file is; wide and tall as it is shown."""
    with Image.open(io.BytesIO(content)) as picture:
        note = picture.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = picture.size[:: -1 if note in ON_ITS_SIDE else 1]
        found = {
            "wide": width > height * (1 + SQUARE),
            "tall": height > width * (1 + SQUARE),
            "turned": note != 1,
            "transparent": bool(picture.has_transparency_data),
        }
    return {name for name, there in found.items() if there}


def with_all_shapes(cases: Sequence[Case], renderer: Renderer) -> list[Case]:
    """The cases, and one of each shape that no source of theirs has; as they are where no device scales pictures."""
    pictured = [case for case in cases if case.sources and case.size]
    known = {shape for case in pictured for source in case.sources for shape in shapes_of(source.content)}
    return [*cases, *(drawn(cases, renderer, known) if pictured else ())]


def drawn(cases: Sequence[Case], renderer: Renderer, known: set[str]) -> Iterator[Case]:
    """Every shape from another of the cases, in turn."""
    pictured = [case for case in cases if case.sources]
    for number, (shape, make) in enumerate(SHAPES.items()):
        if shape not in known:
            yield shaped(pictured[number % len(pictured)], shape, make, renderer)


def shaped(case: Case, shape: str, make: Shaped, renderer: Renderer) -> Case:
    """The case with its first picture in another shape."""
    content = make(decoded(case.sources[0].content))
    url = f"data:image/{'jpeg' if shape == 'turned' else 'png'};base64,{base64.b64encode(content).decode()}"
    facts = {name: value for name, value in case.example.facts.items() if name != "sources"}
    images = (url, *case.example.images[1:])
    made = case_of(replace(case.example, id=f"{case.id}, {shape}", images=images, facts=facts), renderer)
    with Image.open(io.BytesIO(content)) as picture:
        kind = kind_of(picture)
    first = SourceImage(f"{case.example.id}-{shape}.png", content)
    return replace(made, sources=(first, *made.sources[1:]), stratum=kind)
