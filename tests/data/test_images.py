"""Pictures of a data set: decoded right or refused by name, and nothing outside the folder is read."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import random
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, ImageOps
from tiny_vision import drawn_image

from rankwise.data import images
from rankwise.data.images import BadImage, ImageReader

WIDTH, HEIGHT = 40, 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "images"
    place.mkdir()
    return place


@pytest.fixture
def reader(folder: Path) -> ImageReader:
    return ImageReader(folder)


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def photo() -> Image.Image:
    return drawn_image(3, (WIDTH, HEIGHT))


def near(first: Image.Image, second: Image.Image, tolerance: int = 0) -> bool:
    difference = np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int))
    return first.size == second.size and difference.mean() <= tolerance


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "how", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("PPM", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 3),
        ("JPEG2000", {"irreversible": False}, 0),
    ],
)
def test_the_content_says_what_a_file_is(
    folder: Path, reader: ImageReader, kind: str, how: dict[str, Any], tolerance: int
) -> None:
    """The suffix lies in every case."""
    (folder / "x.gif").write_bytes(encoded(photo(), kind, **how))
    image = reader.open("x.gif")
    assert image.mode == "RGB" and near(image, photo(), tolerance)
    assert reader.size("x.gif") == (WIDTH, HEIGHT)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_exif_orientation_is_applied_and_known_from_the_header(
    folder: Path, reader: ImageReader, kind: str, number: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    (folder / "x").write_bytes(encoded(photo(), kind, exif=exif))
    with Image.open(folder / "x") as stored:
        expected = ImageOps.exif_transpose(stored).convert("RGB")
    image = reader.open("x")
    assert near(image, expected)
    assert reader.size("x") == image.size == ((HEIGHT, WIDTH) if number >= 5 else (WIDTH, HEIGHT))


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_a_png_may_tell_its_orientation_behind_the_pixels(folder: Path, reader: ImageReader) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    plain = encoded(photo(), "PNG")
    end = plain.index(b"IEND") - 4
    (folder / "x.png").write_bytes(plain[:end] + png_chunk(b"eXIf", exif.tobytes()[6:]) + plain[end:])
    assert reader.size("x.png") == reader.open("x.png").size == (HEIGHT, WIDTH)


def test_unreadable_exif_data_are_no_orientation(folder: Path, reader: ImageReader) -> None:
    (folder / "x.jpg").write_bytes(encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffrubbish"))
    assert reader.size("x.jpg") == reader.open("x.jpg").size == (WIDTH, HEIGHT)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA"])
def test_transparency_is_laid_on_white(folder: Path, reader: ImageReader, mode: str) -> None:
    """Clear, half-clear and solid black, over black: dropping the alpha would make all of it black."""
    strip = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    strip.putpixel((1, 0), (0, 0, 0, 128))
    strip.putpixel((2, 0), (0, 0, 0, 255))
    if mode == "P":
        image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
        image.putpalette([0] * 9)
        (folder / "x").write_bytes(encoded(image, "PNG", transparency=bytes([0, 128, 255])))
    else:
        (folder / "x").write_bytes(encoded(strip.convert(mode), "TIFF" if mode == "PA" else "PNG"))
    assert [pixel[0] for pixel in reader.open("x").get_flattened_data()] == [255, 127, 0]


def test_sixteen_bit_grey_is_scaled_and_not_clipped(folder: Path, reader: ImageReader) -> None:
    values = np.array([[0, 128, 257, 12_850, 32_768, 65_535]], dtype=np.uint16)
    expected = [round(int(value) / 257) for value in values[0]]
    Image.fromarray(values).save(folder / "x.png")
    Image.fromarray(values).save(folder / "x.tif")
    (folder / "x.pgm").write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    for name in ("x.png", "x.tif", "x.pgm"):
        assert [pixel[0] for pixel in reader.open(name).get_flattened_data()] == expected, name


def test_cmyk_becomes_rgb(folder: Path, reader: ImageReader) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(folder / "x.jpg", quality=95)
    assert near(reader.open("x.jpg"), Image.new("RGB", (8, 8), (255, 0, 0)), 3)


def test_a_second_picture_in_a_photograph_is_not_an_animation(folder: Path, reader: ImageReader) -> None:
    plain = Image.new("RGB", (WIDTH, HEIGHT), (200, 100, 50))
    plain.save(folder / "x.jpg", "MPO", save_all=True, append_images=[photo()])
    assert near(reader.open("x.jpg"), plain, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_and_several_pages_are_refused(folder: Path, reader: ImageReader, kind: str) -> None:
    frames = [drawn_image(seed, (16, 16)) for seed in range(3)]
    frames[0].save(folder / "x", kind, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="image x has several frames"):
        reader.open("x")


@pytest.mark.parametrize("mode", ["F", "I"])
def test_grey_without_a_known_white_is_refused(folder: Path, reader: ImageReader, mode: str) -> None:
    Image.new(mode, (4, 4)).save(folder / "x.tif")
    with pytest.raises(BadImage, match=r"x\.tif has (float|32-bit) pixels"):
        reader.open("x.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_pictures_cut_short_are_refused_and_never_filled_with_grey(
    folder: Path, reader: ImageReader, kind: str
) -> None:
    whole = encoded(drawn_image(5, (64, 64)), kind)
    for share in (0.1, 0.5, 0.9):
        (folder / "cut.img").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadImage, match=r"image cut\.img is "):
            reader.open("cut.img")


def test_pillow_told_to_accept_cut_files_is_not_trusted(
    folder: Path, reader: ImageReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "x.jpg").write_bytes(encoded(photo(), "JPEG")[:400])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImage, match="LOAD_TRUNCATED_IMAGES"):
        reader.open("x.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_altered_bytes_give_a_picture_or_a_reason(folder: Path, reader: ImageReader, kind: str) -> None:
    """Whatever is in a file, no other error leaves the reader, no warning either, and a size agreed is a size kept."""
    whole = encoded(photo(), kind)
    generator = random.Random(kind)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(generator.choice([1, 2, 8])):
            content[generator.randrange(min(len(content), 300))] = generator.randrange(256)
        (folder / "x").write_bytes(content)
        with suppress(BadImage):
            size = reader.size("x")
            image = reader.open("x")
            assert (image.mode, image.size) == ("RGB", size)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
        (b"%PDF-1.4\n", "is not a picture"),
    ],
)
def test_files_that_are_no_pictures(folder: Path, reader: ImageReader, content: bytes, reason: str) -> None:
    (folder / "x.jpg").write_bytes(content)
    for read in (reader.open, reader.size):
        with pytest.raises(BadImage, match=rf"image x\.jpg {reason}"):
            read("x.jpg")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes that says it has so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = zlib.compress(bytes(100_000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_a_pixel_bomb_is_refused_from_its_header(
    folder: Path, reader: ImageReader, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over our limit, over that at which Pillow warns, and over that at which it raises: before a pixel is decoded."""
    (folder / "bomb.png").write_bytes(bomb(side, side))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for read in (reader.open, reader.size):
        with pytest.raises(BadImage, match=r"image bomb\.png (has 8000 × 8000|has 12000|is a decompression bomb)"):
            read("bomb.png")


def test_the_pixel_limit_is_a_setting(folder: Path) -> None:
    photo().save(folder / "x.png")
    assert ImageReader(folder, max_pixels=WIDTH * HEIGHT).open("x.png").size == (WIDTH, HEIGHT)
    with pytest.raises(BadImage, match="has 40 × 24 = 960 pixels, the limit is 959"):
        ImageReader(folder, max_pixels=WIDTH * HEIGHT - 1).open("x.png")


# --- paths -------------------------------------------------------------------------------------------------------


def test_paths_out_of_the_folder_are_refused_unless_allowed(folder: Path, reader: ImageReader) -> None:
    secret = folder.parent / "secret.png"
    photo().save(secret)
    (folder / "link.png").symlink_to(secret)
    (folder / "up").symlink_to(folder.parent)
    beside = folder.parent / "images-of-others"
    beside.mkdir()
    photo().save(beside / "x.png")
    ways_out = ("../secret.png", str(secret), "link.png", "up/secret.png", "sub/../../secret.png")
    for way in (*ways_out, "../images-of-others/x.png"):
        with pytest.raises(BadImage, match="leads out of the image folder"):
            reader.open(way)
        assert ImageReader(folder, allow_outside=True).open(way).size == (WIDTH, HEIGHT)


def test_paths_that_stay_in_the_folder_are_read(folder: Path, reader: ImageReader) -> None:
    (folder / "sub").mkdir()
    photo().save(folder / "sub" / "ä b.png")
    (folder / "link.png").symlink_to("sub/ä b.png")
    for way in ("sub/ä b.png", "sub/../sub/ä b.png", "link.png", str(folder / "sub" / "ä b.png")):
        assert reader.size(way) == (WIDTH, HEIGHT)


@pytest.mark.parametrize("way", ["missing.png", "sub", "", "a\0b.png", "x" * 5000, "loop"])
def test_what_is_no_file_is_named(folder: Path, reader: ImageReader, way: str) -> None:
    (folder / "sub").mkdir()
    (folder / "loop").symlink_to("loop")
    with pytest.raises(BadImage, match=r"image .*(is not there|is no file|cannot be read)"):
        reader.open(way)


def test_a_pipe_is_not_waited_for(folder: Path, reader: ImageReader) -> None:
    os.mkfifo(folder / "pipe.png")
    with pytest.raises(BadImage, match="is no file"):
        reader.open("pipe.png")


def test_digests_follow_the_content(folder: Path, reader: ImageReader) -> None:
    for name, seed in (("a.png", 0), ("b.jpg", 0), ("c.png", 1)):
        drawn_image(seed).save(folder / name, "PNG")
    first, same, other = (reader.digest(name) for name in ("a.png", "b.jpg", "c.png"))
    assert first == same != other


# --- data URLs ---------------------------------------------------------------------------------------------------


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def test_data_urls_are_pictures_and_tell_the_type_by_content(folder: Path, reader: ImageReader) -> None:
    content = encoded(photo(), "PNG")
    assert near(reader.open(data_url(content, "image/jpeg")), photo())
    assert reader.size(data_url(content)) == (WIDTH, HEIGHT)
    (folder / "x.png").write_bytes(content)
    assert reader.digest(data_url(content)) == reader.digest("x.png")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,iVBOR*", "not valid base64"),
        ("data:image/png;base64,", "holds no bytes"),
        ("data:image/png,rawbytes", "is a data URL, but not"),
        ("data:text/html;base64,PGI+", "is a data URL, but not"),
        ("data:image/png;base64," + "QUFB" * 100, "is not a picture"),
        (data_url(bomb(60_000, 60_000)), "is a decompression bomb"),
    ],
)
def test_bad_data_urls_are_named_in_short(reader: ImageReader, url: str, reason: str) -> None:
    with pytest.raises(BadImage, match=rf"image data:.*{reason}") as raised:
        reader.open(url)
    assert len(str(raised.value)) < 300


# --- URLs --------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """/photo is a picture, /to?… redirects there, /cut, /large and /missing are what they say."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        path, _, target = self.path.partition("?")
        content = encoded(photo(), "PNG")
        if path == "/to":
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
            return
        self.send_response(404 if path == "/missing" else 200)
        if path != "/large":
            self.send_header("Content-Length", str(len(content) * (2 if path == "/cut" else 1)))
        self.end_headers()
        self.wfile.write(content * (50 if path == "/large" else 1))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Gives host names addresses; returns the list of names that were looked up."""

    def give(**addresses: str | list[str]) -> list[str]:
        asked: list[str] = []

        def lookup(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            found = addresses[host.split(".")[0]]
            each = [found] if isinstance(found, str) else found
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)) for address in each]

        monkeypatch.setattr(images.socket, "getaddrinfo", lookup)
        return asked

    return give


def on_loopback(monkeypatch: pytest.MonkeyPatch, port: int) -> list[str]:
    """The address 198.18.0.1 counts as public and is this machine; returns the addresses that were connected to."""
    known, connected = images.is_public, []
    monkeypatch.setattr(images, "is_public", lambda address: address == "198.18.0.1" or known(address))
    direct = socket.create_connection

    def connect(address: tuple[str, int], *rest: Any, **more: Any) -> socket.socket:
        connected.append(address[0])
        raw = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", port))
        return raw

    assert direct is not connect
    monkeypatch.setattr(images.socket, "create_connection", connect)
    return connected


@pytest.mark.parametrize("url", ["http://photos.example/photo", "https://photos.example/photo", "file:///etc/passwd"])
def test_urls_are_refused_unless_allowed(reader: ImageReader, url: str, names: Callable[..., list[str]]) -> None:
    asked = names(photos="198.18.0.1")
    with pytest.raises(BadImage, match="is a URL, and URLs are refused; pass --allow-urls"):
        reader.open(url)
    assert not asked


def test_a_file_url_is_the_path_it_names(folder: Path) -> None:
    photo().save(folder / "ä b.png")
    photo().save(folder.parent / "outside.png")
    reader = ImageReader(folder, allow_urls=True)
    assert reader.size((folder / "ä b.png").as_uri()) == (WIDTH, HEIGHT)
    for url in ((folder.parent / "outside.png").as_uri(), "file://elsewhere/x.png"):
        with pytest.raises(BadImage, match=r"leads out of the image folder|of another machine"):
            reader.open(url)
    assert ImageReader(folder, True, True).size((folder.parent / "outside.png").as_uri()) == (WIDTH, HEIGHT)


def test_a_picture_is_fetched_once_and_redirects_followed(
    folder: Path, server: Any, names: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = names(photos="198.18.0.1", other="198.18.0.1")
    connected = on_loopback(monkeypatch, server.server_port)
    reader = ImageReader(folder, allow_urls=True)
    url = "http://photos.example/to?http://other.example/photo?size=1"
    assert reader.size(url) == (WIDTH, HEIGHT)
    assert near(reader.open(url), photo()) and reader.digest(url) == reader.digest(url)
    assert server.asked == ["/to?http://other.example/photo?size=1", "/photo?size=1"]
    assert asked == ["photos.example", "other.example"]  # one look-up a hop: what was checked is what is used
    assert connected == ["198.18.0.1", "198.18.0.1"]


def test_an_error_page_with_status_200_is_not_kept_as_the_picture(
    folder: Path, server: Any, names: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor believed where an earlier version kept it: the picture is there as soon as the server is."""
    names(photos="198.18.0.1")
    on_loopback(monkeypatch, server.server_port)
    reader, url = ImageReader(folder, allow_urls=True), "http://photos.example/photo"
    true_content = images._content
    monkeypatch.setattr(images, "_content", lambda url: b"<html>Down for maintenance</html>")
    with pytest.raises(BadImage, match=r"is no picture: the server sent '<html>Down"):
        reader.size(url)
    kept = folder.parent / "cache" / "urls" / hashlib.sha256(url.encode()).hexdigest()
    assert not kept.exists()
    kept.write_bytes(b"<html>Down for maintenance</html>")
    monkeypatch.setattr(images, "_content", true_content)
    assert reader.size(url) == (WIDTH, HEIGHT)
    assert len(server.asked) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_https_asks_for_the_certificate_of_the_host(
    folder: Path, server: Any, names: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection goes to the checked address; the certificate must still be the name's."""
    key, certificate = folder.parent / "key.pem", folder.parent / "certificate.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=DNS:photos.example"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    names(photos="198.18.0.1", other="198.18.0.1")
    on_loopback(monkeypatch, server.server_port)
    reader = ImageReader(folder, allow_urls=True)
    with pytest.raises(BadImage, match="certificate verify failed"):
        reader.size("https://photos.example/photo")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert reader.size("https://photos.example/photo") == (WIDTH, HEIGHT)
    with pytest.raises(BadImage, match="Hostname mismatch"):
        reader.size("https://other.example/photo")


@pytest.mark.parametrize(
    "target", ["http://inside.example/photo", "http://127.0.0.1/photo", "file:///etc/passwd", "ftp://a.example/x"]
)
def test_redirects_are_checked_at_every_hop(
    folder: Path, server: Any, names: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    names(photos="198.18.0.1", inside="10.0.0.8", **{"127": "127.0.0.1"})
    on_loopback(monkeypatch, server.server_port)
    with pytest.raises(BadImage, match=r"no public address|no http"):
        ImageReader(folder, allow_urls=True).open(f"http://photos.example/to?{target}")
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/missing", "the server answered 404"),
        ("/cut", "bytes did not arrive"),
        ("/large", "has more than 1,000 bytes"),
        ("/to?/to?/to?/to?/to?/to?/to?/photo", "redirected more than 5 times"),
    ],
)
def test_what_a_server_does_wrong_is_named(
    folder: Path, server: Any, names: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    names(photos="198.18.0.1")
    on_loopback(monkeypatch, server.server_port)
    monkeypatch.setattr(images, "LARGEST", 1000)
    with pytest.raises(BadImage, match=rf"image http://photos\.example{path[:4]}.*{reason}"):
        ImageReader(folder, allow_urls=True).open(f"http://photos.example{path}")
    assert not [file for file in (folder.parent / "cache" / "urls").iterdir() if file.suffix != ".lock"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:10.0.0.1",
        "64:ff9b::a00:1",
        "2002:7f00:1::",
    ],
)
def test_addresses_inside_are_never_called(folder: Path, names: Callable[..., list[str]], address: str) -> None:
    """One such address among public ones is enough."""
    names(photos=["93.184.215.14", address])
    with pytest.raises(BadImage, match=r"is no public address|leads to photos"):
        ImageReader(folder, allow_urls=True).open("http://photos.example/x.png")
    assert images.is_public("93.184.215.14") and images.is_public("2606:2800:21f:cb07::1")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/x.png", "is a s3 URL"),
        ("http://user:word@photos.example/x", "user name or password"),
        ("http:///x.png", "no http"),
        ("http://photos.example:99999/x", "is no URL"),
        ("http://photos.example/a b", "percent-encode"),
    ],
)
def test_urls_that_are_none(folder: Path, url: str, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        ImageReader(folder, allow_urls=True).open(url)


# --- real pictures -----------------------------------------------------------------------------------------------


def test_every_picture_of_the_real_sets_is_read(shared_data: Path) -> None:
    """Among them a PNG and a WEBP named .jpg, four with transparency."""
    files = [file for file in (shared_data / "llava").rglob("*") if file.suffix in (".jpg", ".png", ".jpeg", ".webp")]
    reader = ImageReader(shared_data / "llava")
    assert len(files) > 100
    for file in files:
        image = reader.open(str(file))
        assert image.mode == "RGB" and image.size == reader.size(str(file))
