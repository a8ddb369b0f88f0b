"""Which file a `--data-path` means: a file, a folder of official files, or a data set of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rankwise.errors import DataError

HUB_ID = re.compile(r"(hf://)?(?P<id>[\w.-]+/[\w.-]+)")
DATA_SUFFIXES = {".csv", ".json", ".jsonl", ".ndjson", ".tsv", ".txt", ".7z", ".bz2", ".zip"}


def find_file(path: str | Path, names: tuple[str, ...], what: str) -> Path:
    """The file that `path` means; `names` are the official names to look for in a folder or on the hub.

    A path that exists is never taken for a hub id, and neither is one with the suffix of a data file.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return _in_folder(local, names, what)
    if local.exists():
        return local
    hub = HUB_ID.fullmatch(str(path))
    if hub and local.suffix not in DATA_SUFFIXES and names:
        return _on_hub(hub["id"], names, what)
    raise DataError(f"{local} does not exist; pass the path of a data file, or of the folder that holds it")


def _in_folder(folder: Path, names: tuple[str, ...], what: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if not names:
        raise DataError(f"{folder} is a folder; pass the path of the file that holds {what}")
    raise DataError(f"{folder} lacks {what}: looked for {', '.join(names)}; pass the file itself if its name differs")


def _on_hub(repository: str, names: tuple[str, ...], what: str) -> Path:
    reasons = []
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, repo_type="dataset"))
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reasons.append(f"{name}: {str(error).splitlines()[0]}")
    tried = "\n    ".join(reasons)
    raise DataError(
        f"no file or folder {repository}, and {what} could not be fetched from the hub data set of that name:"
        f"\n    {tried}\n  Without a network, pass the path of the official file."
    )
