"""Upload to the Hugging Face hub, for `rankwise card --push_to_hub`: resumable, file by file.

    check_token()                                            # UsageError before anything is made
    upload(Upload("org/name", folder, ("model.safetensors", "config.json"), card))

What the repository holds already is compared by size and hash and not sent again. Every large file is a commit of its
own, so an interruption costs at most the file on its way (of which the hub's own chunk storage keeps what has arrived);
small files and the card go together, last: in a first upload the repository has a card only once it is complete.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.hf_api import RepoFile

from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.files.atomic import sha256
from rankwise.files.checkpoint import HUB_ID

TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|Bearer\s+\S+")
CARD = "README.md"
LARGE = 10 * 2**20  # bytes: from about here on the hub stores a file outside of git
MESSAGE = "Upload with rankwise"


@dataclass(frozen=True)
class Upload:
    """An upload to the hub. files: names in the folder; nothing else of it leaves the machine. instead: name → content
    that is sent in place of the file's own."""

    repository: str
    folder: Path
    files: tuple[str, ...]
    card: str
    private: bool = False
    instead: Mapping[str, bytes] = field(default_factory=dict)

    def content(self, name: str) -> bytes | Path:
        """What is sent under this name."""
        return self.card.encode() if name == CARD else self.instead.get(name, self.folder / name)

    def size(self, name: str) -> int:
        return size_of(self.content(name))

    @property
    def bytes(self) -> int:
        return sum(map(self.size, self.files))


def check_repository(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"--push_to_hub takes ORG/NAME, got {name!r}")


def check_token() -> None:
    """UsageError where no token is on this machine. Asks nobody whether it is valid."""
    if not get_token():
        raise UsageError("--push_to_hub needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def upload(what: Upload) -> str:
    """Create the repository where there is none, send what it lacks; returns its address.

    The token is the one that `hf auth login` or HF_TOKEN has left. ServiceError, without any token in it, where the hub
    refuses or is not there; what was committed by then stays, and a second call sends only the rest. DataError where a
    file here cannot be read.
    """
    names = [*what.files, CARD]
    with local_errors(what.folder):
        adding = {name: CommitOperationAdd(name, what.content(name)) for name in names}
    with hub_errors(what.repository):
        api = HfApi()
        address = api.create_repo(what.repository, repo_type="model", private=what.private or None, exist_ok=True)
        there = {one.path: one for one in api.get_paths_info(what.repository, names) if isinstance(one, RepoFile)}
    with local_errors(what.folder):
        missing = [name for name in names if not is_same(what.content(name), there.get(name))]
        large = [name for name in missing if what.size(name) >= LARGE]
    if len(missing) < len(names):
        print(f"already there: {len(names) - len(missing)} of {len(names)} files")
    with hub_errors(what.repository):
        for group in [*([name] for name in large), [name for name in missing if name not in large]]:
            if group:
                api.create_commit(what.repository, [adding[name] for name in group], commit_message=MESSAGE)
    return str(address)


def size_of(content: bytes | Path) -> int:
    return content.stat().st_size if isinstance(content, Path) else len(content)


def is_same(content: bytes | Path, there: RepoFile | None) -> bool:
    """Whether the hub has this content: by SHA-256 of what it stores outside of git, else by git's own hash."""
    if there is None or there.size != size_of(content):
        return False
    if there.lfs is not None:
        own = sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        return bool(own == there.lfs.sha256)
    data = content.read_bytes() if isinstance(content, Path) else content
    return bool(hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == there.blob_id)


@contextmanager
def local_errors(folder: Path) -> Iterator[None]:
    """Files that cannot be read are not the hub's. ValueError is how huggingface_hub reports one that has gone."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not uploaded: {error}; make the file readable, then run it again") from error


@contextmanager
def hub_errors(repository: str) -> Iterator[None]:
    """The hub's errors as ours: what is wrong with the name is the user's, the rest is the service's. RuntimeError is
    how huggingface_hub and its storage client report a file that did not arrive."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {repository}: {scrub(error)}") from None
    except (LocalTokenNotFoundError, HfHubHTTPError, HTTPError, OSError, RuntimeError) as error:
        raise ServiceError(
            f"{repository}: the hub did not take it ({scrub(error)}); check the network, `hf auth login` and that "
            "you may write there, then run it again: only what is missing is sent"
        ) from None


def scrub(error: BaseException) -> str:
    """The first line of an error and of its cause, without anything that looks like a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = f" {scrub(error.__cause__)}" if error.__cause__ else ""
    return TOKEN.sub("(token)", lines[0] if lines else type(error).__name__) + cause
