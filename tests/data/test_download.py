"""`--download`: official files by checksum; a cut transfer goes on, altered bytes go, nothing is overwritten."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rankwise.data.sources import official as archives
from rankwise.data.sources.load import load
from rankwise.data.sources.official import Download, fetch
from rankwise.data.sources.table import OFFICIAL, SOURCES
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.options.sections import DataSection

CONTENT = json.dumps([{"id": str(n), "dialogue": f"A: {n}?\nB: yes", "summary": f"{n} it is."} for n in range(200)])
BYTES = CONTENT.encode()


@dataclass
class Server:
    """A file server on this machine. cut: how many bytes each of the next answers sends before it breaks off."""

    url: str = ""
    content: bytes = BYTES
    ranges: bool = True
    status: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    pages: list[bool | None] = field(default_factory=list)

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers.get("Range")
        self.asked.append(wanted)
        if self.pages:
            length, page = self.pages.pop(0), b"<html>Down for maintenance</html>"
            request.send_response(200)
            request.send_header("Content-Type", "text/html" if length is None else "application/zip")
            if length is not None:
                request.send_header("Content-Length", str(len(page)))
            request.end_headers()
            request.wfile.write(page)
            return
        if self.status:
            request.send_error(self.status.pop(0))
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start > len(self.content):
            request.send_error(416)
            return
        body = self.content[start:]
        request.send_response(206 if wanted and self.ranges else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cut.pop(0)] if self.cut else body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{listening.server_port}/files/train.json"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archives, "WAIT", 0.0)
    monkeypatch.setattr(archives, "BLOCK", 50)
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


def official(server: Server, content: bytes = BYTES) -> Download:
    return Download(server.url, hashlib.sha256(content).hexdigest(), len(content))


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_a_file_is_fetched_once_and_checked(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "samsum"
    assert fetch(official(server), folder).read_bytes() == BYTES
    assert fetch(official(server), folder).read_bytes() == BYTES
    assert server.asked == [None]
    assert visible(folder) == ["train.json"]


def test_a_cut_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.cut = [1000, 500]
    assert fetch(official(server), tmp_path).read_bytes() == BYTES
    assert server.asked == [None, "bytes=1000-", "bytes=1500-"]


def test_a_transfer_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.cut = [100] * archives.ATTEMPTS
    with pytest.raises(ServiceError, match=rf"500 of {len(BYTES):,} bytes have arrived\. Run it again") as error:
        fetch(official(server), tmp_path)
    assert error.value.exit_code == 5
    assert visible(tmp_path) == [".train.json.part"]
    assert fetch(official(server), tmp_path).read_bytes() == BYTES
    assert server.asked[-1] == "bytes=500-"
    assert visible(tmp_path) == ["train.json"]


@pytest.mark.parametrize("length", [True, None], ids=["with its length", "as a web page"])
def test_an_error_page_with_status_200_is_no_part_of_the_file(
    length: bool | None, server: Server, tmp_path: Path
) -> None:
    """Before the first byte, and in the middle."""
    server.pages, server.cut = [length], [1000]
    assert fetch(official(server), tmp_path / "a").read_bytes() == BYTES
    assert server.asked == [None, None, "bytes=1000-"]
    server.pages = [length] * archives.ATTEMPTS
    with pytest.raises(ServiceError, match="a page that is not the file"):
        fetch(official(server), tmp_path / "b")
    assert visible(tmp_path / "b") == []


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    server.cut, server.ranges = [1000], False
    assert fetch(official(server), tmp_path).read_bytes() == BYTES


def test_altered_bytes_are_deleted_and_an_error(server: Server, tmp_path: Path) -> None:
    server.content = BYTES.replace(b"yes", b"no!")
    with pytest.raises(DataError, match=r"has not the checksum of the official train\.json") as error:
        fetch(official(server), tmp_path)
    assert error.value.exit_code == 3
    assert visible(tmp_path) == []


def test_what_arrived_of_another_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".train.json.part").write_bytes(b"something else")
    with pytest.raises(DataError, match="checksum"):
        fetch(official(server), tmp_path)
    assert visible(tmp_path) == []
    (tmp_path / ".train.json.part").write_bytes(BYTES + b"more than there is")
    assert fetch(official(server), tmp_path).read_bytes() == BYTES  # the server says 416; all anew


def test_an_endless_answer_ends(server: Server, tmp_path: Path) -> None:
    server.content = BYTES * 100
    with pytest.raises(DataError, match="checksum"):
        fetch(official(server), tmp_path)
    assert visible(tmp_path) == []


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server: Server, tmp_path: Path) -> None:
    server.status = [503, 429]
    assert fetch(official(server), tmp_path / "a").read_bytes() == BYTES
    server.status, server.asked = [404] * 3, []
    with pytest.raises(ServiceError, match=r"could not be fetched .*404"):
        fetch(official(server), tmp_path / "b")
    assert len(server.asked) == 1


def test_no_server_is_a_service_error(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "ATTEMPTS", 2)
    nowhere = replace(official(server), url="http://127.0.0.1:1/train.json")
    with pytest.raises(ServiceError, match="could not be fetched"):
        fetch(nowhere, tmp_path)


def test_a_file_that_is_there_is_never_overwritten(server: Server, tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("mine")
    with pytest.raises(DataError, match="is not the official file"):
        fetch(official(server), tmp_path)
    assert (tmp_path / "train.json").read_text() == "mine"
    assert server.asked == []


# --- through load ------------------------------------------------------------------------------------------------


@pytest.fixture
def samsum(server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    monkeypatch.setattr("rankwise.data.sources.load.OFFICIAL", [official(server)])
    return server


def test_load_fetches_what_the_folder_lacks(samsum: Server, tmp_path: Path) -> None:
    folder = tmp_path / "samsum"
    with pytest.raises(DataError, match="does not exist"):
        load("samsum", folder)
    assert samsum.asked == []
    assert len(load("samsum", folder, how=DataSection(download=True))) == 200
    assert len(load("samsum", folder, how=DataSection(download=True))) == len(load("samsum", folder)) == 200
    assert samsum.asked == [None]


def test_load_keeps_to_other_forms_that_are_there(samsum: Server, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("id,dialogue,summary\n1,A: x,y\n")
    assert len(load("samsum", tmp_path, how=DataSection(download=True))) == 1
    assert samsum.asked == []


def test_load_fetches_nothing_into_a_file_or_for_a_task_without_official_files(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(CONTENT)
    with pytest.raises(UsageError, match="is a file; leave --download out"):
        load("samsum", file, how=DataSection(download=True))
    with pytest.raises(UsageError, match="cota has no official files"):
        load("cota", tmp_path, how=DataSection(download=True))


def test_every_split_of_the_official_data_can_be_fetched(shared_data: Path) -> None:
    for name in ("e2e_nlg", "samsum", "wikisql", "multi_nli"):
        source = SOURCES[name]
        for split in source.files:
            names = source.sought(split).all_names
            [wanted] = [each for each in OFFICIAL if each.name in names]
            assert wanted.url.startswith("https://") and len(wanted.sha256) == 64
    for each in OFFICIAL[:2]:
        official_bytes = (shared_data / "e2e_nlg" / each.name).read_bytes()
        assert (len(official_bytes), hashlib.sha256(official_bytes).hexdigest()) == (each.size, each.sha256)
