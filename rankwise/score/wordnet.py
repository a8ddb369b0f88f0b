"""WordNet for METEOR's synonyms, from wherever this machine has it; nothing is downloaded.

nltk's own data ─┐
$WNSEARCHDIR ────┼──▶ installed_wordnet() ──▶ .synsets(word), or None
$WNHOME/dict ────┤
/usr/share/wordnet (Debian's wordnet-base)
"""

from __future__ import annotations

import io
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from rankwise.errors import DataError, need

NOT_INSTALLED = (
    "WordNet is not installed, so METEOR without synonyms is given as meteor_exact_stem; to have it: apt-get install "
    "wordnet-base, or WNSEARCHDIR=<the folder with data.noun>, or python -m nltk.downloader wordnet"
)
SYSTEM = "/usr/share/wordnet"
NEEDED = tuple(f"{kind}.{part}" for kind in ("data", "index") for part in ("adj", "adv", "noun", "verb"))
LEXICOGRAPHERS = 45  # files of WordNet 3; METEOR asks for none of their names
LEXNAMES = "".join(f"{number}\tlexicographer.{number}\t1\n" for number in range(LEXICOGRAPHERS))


def installed_wordnet() -> Any | None:
    """nltk's reader of the WordNet that is installed; None where none is. DataError as for `wordnet_folder`."""
    folder = wordnet_folder()
    if folder is not None:
        return reader(folder)
    wordnet = need("nltk.corpus", extra="eval").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return None
    return wordnet


def wordnet_folder() -> Path | None:
    """The folder that WordNet's own variables name, else Debian's; None where there is none.

    DataError for one that a variable names and that holds no whole WordNet.
    """
    for variable, inside in (("WNSEARCHDIR", ""), ("WNHOME", "dict")):
        if os.environ.get(variable):
            place = Path(os.environ[variable]).expanduser() / inside
            if absent := missing_files(place):
                raise DataError(f"{variable}: {place} holds no WordNet ({absent[0]} is missing)")
            return place
    return None if missing_files(Path(SYSTEM)) else Path(SYSTEM)


def missing_files(folder: Path) -> list[str]:
    return [name for name in NEEDED if not (folder / name).is_file()]


@cache
def reader(folder: Path) -> Any:
    """nltk's reader of WordNet's own files: they lack `lexnames`, a list of its sources that nltk wants to have."""
    module, known = need("nltk.corpus.reader.wordnet", extra="eval"), need("nltk.data", extra="eval").path
    if str(folder) not in known:
        known.append(str(folder))  # nltk opens no file elsewhere

    class Plain(module.WordNetCorpusReader):  # type: ignore[name-defined]
        def open(self, file: str) -> Any:
            return io.StringIO(LEXNAMES) if file == "lexnames" else super().open(file)

        def map_wn(self, version: str = "wordnet") -> None:
            """From another version's numbers: of no use here, and it needs nltk's data."""

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has no other languages
        return Plain(str(folder), None)
