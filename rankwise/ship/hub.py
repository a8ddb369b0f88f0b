"""Files to a repository of the Hugging Face hub: exactly those that were named, and the card as its README.

upload(Upload("org/name", Path("merged"), ("config.json", "model.safetensors"), card))
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError

from rankwise.errors import ServiceError, UsageError
from rankwise.files.checkpoint import HUB_ID

TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}|Bearer\s+\S+")
CARD = "README.md"


@dataclass(frozen=True)
class Upload:
    """What goes where. files: names in the folder; nothing else of it leaves the machine."""

    repository: str
    folder: Path
    files: tuple[str, ...]
    card: str
    private: bool = False

    @property
    def bytes(self) -> int:
        return sum((self.folder / name).stat().st_size for name in self.files)


def check_repository(name: str) -> None:
    if not HUB_ID.fullmatch(name):
        raise UsageError(f"--push_to_hub takes ORG/NAME, got {name!r}")


def upload(what: Upload) -> str:
    """Create the repository where there is none, send files and card; returns its address.

    The token is the one that `hf auth login` or HF_TOKEN has left. ServiceError, without any token in it, where the hub
    refuses or is not there; what was sent by then stays, and a second call sends only the rest.
    """
    with explained(what.repository):
        api = HfApi()
        address = api.create_repo(what.repository, repo_type="model", private=what.private or None, exist_ok=True)
        api.upload_folder(
            repo_id=what.repository,
            folder_path=str(what.folder),
            allow_patterns=[glob.escape(name) for name in what.files],
            commit_message="Upload with rankwise",
        )
        api.upload_file(
            path_or_fileobj=what.card.encode(),
            path_in_repo=CARD,
            repo_id=what.repository,
            commit_message="Model card by rankwise",
        )
    return str(address)


@contextmanager
def explained(repository: str) -> Iterator[None]:
    """The hub's errors as ours: what is wrong with the name is the user's, the rest is the service's."""
    try:
        yield
    except HFValidationError as error:
        raise UsageError(f"--push_to_hub {repository}: {scrubbed(error)}") from None
    except (LocalTokenNotFoundError, HfHubHTTPError, HTTPError, OSError) as error:
        raise ServiceError(
            f"{repository}: the hub did not take it ({scrubbed(error)}); check the network, `hf auth login` and that "
            "you may write there, then run it again: what has arrived is not sent twice"
        ) from None


def scrubbed(error: Exception) -> str:
    """The first line of an error, without anything that looks like a token."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return TOKEN.sub("(token)", lines[0] if lines else type(error).__name__)
