"""Official files fetched on request: `--download`.

    Download(url, sha256, size) ── fetch(download, folder) ──▶ folder/corpus.7z, checked

A transfer that is cut goes on where it stopped, within a run and in the next one (`.corpus.7z.part`). What arrives
with another checksum is deleted, and an error: those bytes are not the data set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock

from rankwise.errors import DataError, ServiceError, need
from rankwise.files.atomic import about_to_write, explained, sha256

ATTEMPTS = 5
WAIT = 1.0  # seconds before the second attempt; doubled before each later one
TIMEOUT = (10, 60)  # seconds to connect, and between two blocks
BLOCK = 2**16  # bytes; at most so many are lost when a transfer is cut
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Download:
    """One official file. sha256 of its content, in hexadecimal; size in bytes."""

    url: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        return PurePosixPath(urlsplit(self.url).path).name


def fetch(download: Download, folder: Path) -> Path:
    """The file in the folder, fetched unless it is there; checked either way.

    DataError where the content is not the official one: a fetched file is deleted, one that was there before is left
    alone. ServiceError where the file cannot be had. Several processes may ask at once: one fetches.
    """
    pooch: Any = need("pooch", extra="data")
    about_to_write()
    file = folder / download.name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f".{download.name}.lock"), explained(file):
        if file.exists():
            _check_present(file, download)
            return file
        pooch.get_logger().setLevel("WARNING")
        try:
            pooch.retrieve(
                download.url,
                known_hash=f"sha256:{download.sha256}",
                fname=file.name,
                path=folder,
                downloader=Resuming(download, folder / f".{download.name}.part"),
            )
        except ValueError as error:
            raise DataError(
                f"{download.url}: what arrived has not the checksum of the official {download.name} "
                f"({download.sha256[:16]}…) and was deleted; get the file from elsewhere and put it into {folder}"
            ) from error
    return file


def _check_present(file: Path, download: Download) -> None:
    if file.stat().st_size != download.size or sha256(file) != download.sha256:
        raise DataError(
            f"{file} is not the official file (its sha256 is not {download.sha256[:16]}…), and --download overwrites "
            "nothing: move it away, or leave --download out to read it as it is"
        )


@dataclass
class Resuming:
    """A downloader for pooch that keeps what has arrived in `part` and asks for the rest only."""

    download: Download
    part: Path

    def __call__(self, url: str, output_file: str | Path, pooch: Any) -> None:
        """Fetch into `output_file`. Raises ServiceError after ATTEMPTS; `part` then stays for the next run."""
        requests: Any = need("requests", extra="data")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(WAIT * 2 ** (attempt - 1))
            try:
                self._continue(requests, url)
            except requests.exceptions.RequestException as error:
                reason = str(error)
                status = getattr(error.response, "status_code", None)
                if status is not None and status not in TRY_AGAIN:
                    break
                continue
            if self._arrived() >= self.download.size:
                self.part.replace(output_file)
                return
            reason = "the transfer was cut"
        raise ServiceError(
            f"{url} could not be fetched ({reason}); {self._arrived():,} of {self.download.size:,} bytes have arrived. "
            "Run it again to go on from there, or fetch the file in another way and put it into "
            f"{self.part.parent}"
        )

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, requests: Any, url: str) -> None:
        """One request for what is missing, appended to `part`; a server that knows no ranges sends all of it again."""
        start = self._arrived()
        # Compressed on the way, a range would be one of other bytes.
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            if answer.status_code == 416:  # more has arrived than there is: nothing of it can be right
                self.part.unlink()
                return
            answer.raise_for_status()
            blocks = answer.iter_content(BLOCK)
            first = next(blocks, b"")
            if answer.status_code != 206:
                refuse_error_page(requests, answer, first, self.download.name)
            with self.part.open("ab" if answer.status_code == 206 else "wb") as file:
                for block in self._no_more_than_expected(chain([first], blocks), file.tell()):
                    file.write(block)

    def _no_more_than_expected(self, blocks: Iterable[bytes], arrived: int) -> Iterator[bytes]:
        """Blocks up to one beyond the known size: the checksum will refuse it, and an endless answer ends."""
        for block in blocks:
            yield block
            arrived += len(block)
            if arrived > self.download.size:
                return


def refuse_error_page(requests: Any, answer: Any, first: bytes, name: str) -> None:
    """An error page with status 200 is no part of a file: nothing of it is kept, and the file is asked for again. No
    official file begins like a page."""
    kind = answer.headers.get("Content-Type", "")
    told = kind.startswith("application/json") and not name.endswith(".json")
    if told or kind.startswith("text/html") or first.lstrip().startswith(b"<"):
        raise requests.exceptions.RequestException(f"the server sent a page that is not the file: {first[:80]!r}")
