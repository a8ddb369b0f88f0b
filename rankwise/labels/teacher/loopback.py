"""A teacher on this machine: a small server of the OpenAI chat protocol that labels an image by its colours.

with LoopbackTeacher() as teacher:
    rankwise label photos/ --base_url teacher.url …          # what --loopback_teacher does

It knows nothing of what is in a picture: blue is water to it, sky or not, and a class that is no element and no colour
gets a hue by its place in the list. It is there so that the whole way from photos to a device can be walked and tested
without a network or a key. Its labels measure nothing but that way.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image, ImageColor

from rankwise.data.label_answer import name_key
from rankwise.options.label import TeacherSection

MODEL = "loopback-colours"
NO_LIMIT = 600_000.0  # requests per minute of a teacher on this machine
GRID = 48  # pixels of the image that are looked at, per side
PADDING = 24  # an RGB sum up to this is the black around a letterboxed image
ELEMENTS = {
    "water": ((30, 90, 180), (120, 170, 215)),
    "land": ((150, 115, 75), (205, 180, 130)),
    "fire": ((225, 50, 20), (250, 160, 30)),
    "wood": ((45, 110, 45), (95, 115, 60)),
    "metal": ((45, 45, 50), (120, 120, 125), (225, 225, 225)),
}
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Response:
    """What goes back for one request. delay: seconds before it. cut: send only so many bytes, then hang up."""

    status: int
    content: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


Respond = Callable[[dict[str, Any]], Response]


def completion(text: str, request: Mapping[str, Any], **message: Any) -> Response:
    """A chat completion with this text. Tokens are guesses: 255 for the picture, and 4 characters each for texts."""
    asked = sum(len(part.get("text", "")) for part in parts_of(request))
    usage = {"prompt_tokens": 255 + asked // 4, "completion_tokens": max(1, len(text) // 4)}
    reason = message.pop("finish_reason", "stop")
    said = {"role": "assistant", "content": text, "refusal": None, **message}
    body = {
        "id": "chatcmpl-loopback",
        "object": "chat.completion",
        "created": 0,
        "model": request.get("model", MODEL),
        "choices": [{"index": 0, "finish_reason": reason, "message": said}],
        "usage": {**usage, "total_tokens": sum(usage.values())},
    }
    return Response(200, json.dumps(body).encode())


def parts_of(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The typed parts of the messages."""
    contents = [message["content"] for message in request["messages"]]
    return [part for content in contents if isinstance(content, list) for part in content]


def picture_of(request: Mapping[str, Any]) -> bytes:
    """The bytes of the first picture (a data URL)."""
    url = next(part["image_url"]["url"] for part in parts_of(request) if part["type"] == "image_url")
    return base64.b64decode(url.split(",", 1)[1])


def label_by_colours(request: dict[str, Any]) -> Response:
    """The answer of the default teacher: the class whose colours fill most of the picture, in the asked form."""
    try:
        schema = request["response_format"]["json_schema"]["schema"]
        field_name, classes = label_property(schema)
        image = Image.open(io.BytesIO(picture_of(request)))
    except (LookupError, TypeError, ValueError, OSError) as error:
        said = f"one image as a data URL and a json_schema response format are needed: {error!r}"
        return Response(400, json.dumps({"error": {"message": said, "type": "invalid_request_error"}}).encode())
    ranked = shares(image, classes).most_common()
    (label, share), runner_up = ranked[0], ranked[1] if len(ranked) > 1 else None
    breakdown = ", ".join(f"{name} {part:.0%}" for name, part in ranked)
    answer = {
        "visual_features": [f"{part:.0%} of the pixels are nearest to the colours of {name}" for name, part in ranked],
        "color_breakdown": breakdown,
        "texture": "not looked at",
        "reason": f"labelled by colours alone: {breakdown}",
        field_name: label,
        "confidence": round(min(1.0, 0.5 + share / 2), 2),  # 0.75 where it fills half of the picture
        f"alternative_{field_name}": runner_up[0] if runner_up else None,
        "ambiguity_note": None,
    }
    return completion(json.dumps({name: answer.get(name) for name in schema["properties"]}), request)


def label_property(schema: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The property that takes one of a set of texts, and the set."""
    for name, part in schema["properties"].items():
        if part.get("type") == "string" and "enum" in part:
            return name, part["enum"]
    raise LookupError("no property with a set of classes")


def shares(image: Image.Image, classes: Sequence[str]) -> Counter[str]:
    """Share of the pixels nearest to each class, the black padding left out. Distances in YCbCr, brightness halved."""
    small = image.convert("RGB").resize((GRID, GRID), Image.Resampling.NEAREST)
    anchors = [(name, _luma_chroma(colour)) for name in classes for colour in colours_of(name, classes)]
    counts: Counter[str] = Counter()
    colours: Any = small.getcolors(GRID * GRID)
    for count, colour in colours:
        if sum(colour) > PADDING:
            counts[_nearest(colour, anchors)] += count
    total = counts.total()
    return Counter({name: count / total for name, count in counts.items()}) if total else Counter({classes[0]: 0.0})


def colours_of(name: str, classes: Sequence[str]) -> tuple[Colour, ...]:
    """Colours of a class for this teacher."""
    key = name_key(name)
    if key in ELEMENTS:
        return ELEMENTS[key]
    if key in ImageColor.colormap:
        return (ImageColor.getrgb(key)[:3],)
    hue = 360 * list(classes).index(name) // len(classes)
    return (ImageColor.getrgb(f"hsl({hue},70%,50%)")[:3],)


def _luma_chroma(colour: Colour) -> tuple[float, float, float]:
    red, green, blue = colour
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return luma / 2, 0.564 * (blue - luma), 0.713 * (red - luma)


def _nearest(colour: Colour, anchors: Sequence[tuple[str, tuple[float, float, float]]]) -> str:
    here = _luma_chroma(colour)
    return min(anchors, key=lambda anchor: sum((a - b) ** 2 for a, b in zip(here, anchor[1], strict=True)))[0]


class LoopbackTeacher:
    """The server: listens on a free port of 127.0.0.1 while the context is open.

    respond: what a chat request gets [`label_by_colours`]. requests: all that were received, in order. keys: the keys
    that came with them. most_in_flight: the most that were being answered at one time. Thread-safe.
    """

    def __init__(self, respond: Respond = label_by_colours) -> None:
        self.respond = respond
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.most_in_flight = self._in_flight = 0
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        """What `--base_url` takes."""
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> LoopbackTeacher:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def received(self, request: dict[str, Any], key: str) -> Response:
        """Count a request; what it gets."""
        with self._lock:
            self.requests.append(request)
            self.keys.add(key)
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        return self.respond(request)

    def answered(self) -> None:
        with self._lock:
            self._in_flight -= 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may keep its connection open
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print no traceback for a client that disconnected."""


def _handler(teacher: LoopbackTeacher) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if not self.path.endswith("/chat/completions"):
                self._send(Response(404, b'{"error": {"message": "only /v1/chat/completions is served"}}'))
                return
            try:
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self._send(teacher.received(json.loads(content), key))
            finally:
                teacher.answered()

        def _send(self, response: Response) -> None:
            if response.delay:
                threading.Event().wait(response.delay)
            self.send_response(response.status)
            for name, value in {"Content-Type": "application/json", **response.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(response.content)))
            self.end_headers()
            self.wfile.write(response.content[: response.cut])
            self.close_connection = self.close_connection or response.cut is not None

        def log_message(self, format: str, *args: Any) -> None:
            """Silent: tests and pipelines read the output of the command."""

    return Handler


@contextmanager
def serving(section: TeacherSection) -> Iterator[TeacherSection]:
    """The options with a service that is there: `--loopback_teacher` starts its own."""
    if not section.loopback_teacher:
        yield section
        return
    with LoopbackTeacher() as loopback:
        yield replace(
            section,
            base_url=loopback.url,
            teacher_model=MODEL,
            openai_api_key="none",  # whatever key is in the environment is nobody's business here
            requests_per_minute=max(section.requests_per_minute, NO_LIMIT),
        )
