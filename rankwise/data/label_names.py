"""When two names mean one class, and which class an answer means: one rule for files, teachers, scores and the device.

    name_key("CAFE\\u0301") == name_key("café")          names: Unicode form, case and space at the ends do not count
    label_of('"Ripe."', labels)                         "ripe": an answer that is a label
    found_label("It looks ripe to me", labels)          "ripe": the only label that a text names

In scripts with spaces a text names a label where no letter, digit, hyphen or apostrophe touches it (`un-ripe` is not
`ripe`, nor `C#` `C`); in Han, kana, Thai, Lao, Khmer and Myanmar, which write none, wherever it stands. What a longer
label covers does not count, and a text that names two labels names none.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import regex

UNPARSED = "unparsed"  # the guess of an answer that names no label; no class may be called so
QUOTES = "\"'`“”„‟‘’‚‛«»‹›「」『』＂＇"
FINAL = ".!?。！？…"

UNSPACED = r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]"
LETTER = rf"[[\p{{L}}\p{{M}}\p{{N}}]--{UNSPACED}]"
JOINT = rf"[{LETTER}_'’＇\-\u00ad\u2010\u2011\u2212\ufe63\uff0d]"
BEFORE, BEHIND = rf"(?<!{JOINT})", rf"(?!{JOINT}|[+#])"  # C# and C++ are names of their own
NUMBER_BEFORE, NUMBER_BEHIND = r"(?<!\p{N}[.,])", r"(?![.,]\p{N})"  # 3.5 is not 5
OPENING, CLOSING = rf"(?<=(?<!{LETTER})['‘＇])", rf"(?=['’＇](?!{LETTER}))"  # around a label they are no apostrophes


def name_key(name: str) -> str:
    """What two names of one class have in common: NFC(casefold(NFC(name))), trimmed."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()).strip()


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Each name → how its class is spelt, in NFC: as most of the names have it, the first in the alphabet of equals."""
    names = list(names)
    counts = Counter(unicodedata.normalize("NFC", name).strip() for name in names)
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    chosen = {name_key(name): name for name in reversed(ranked)}
    return {name: chosen[name_key(name)] for name in names}


def label_called(name: str, labels: Sequence[str]) -> str | None:
    """The label of that name, in the labels' own spelling; None where there is none."""
    return _by_key(tuple(labels)).get(name_key(name))


def label_of(answer: str, labels: Sequence[str]) -> str | None:
    """The label that an answer is: by its name, then without quotes around it and marks that end a sentence."""
    known, key = _by_key(tuple(labels)), name_key(answer)
    while key and key not in known:
        unquoted = key.strip(QUOTES).strip()
        if unquoted == key and key[-1] not in FINAL:
            break
        key = unquoted if unquoted != key else key[:-1].rstrip()
    return known.get(key)


def named_labels(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that a text names anywhere."""
    known, text = _by_key(tuple(labels)), name_key(text)
    whole = {match.start() for match in regex.finditer(r"\X", text)} | {len(text)}  # not in the middle of an emoji
    found = {match.span(): known[match[0]] for match in _pattern(tuple(labels)).finditer(text, overlapped=True)}
    spans = [span for span in found if whole.issuperset(span)]
    whole_ones = [a for a in spans if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in spans)]
    return {found[span] for span in whole_ones}  # none that lies inside another


def found_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that a text is, or else the only one that it names; None where it names none or several."""
    label = label_of(text, labels)
    named = {label} if label else named_labels(text, labels)
    return named.pop() if len(named) == 1 else None


@lru_cache(maxsize=64)
def _by_key(labels: tuple[str, ...]) -> Mapping[str, str]:
    return {name_key(label): label for label in labels}


@lru_cache(maxsize=64)
def _pattern(labels: tuple[str, ...]) -> regex.Pattern[str]:
    """Every label's key where a text names it, longest first."""
    longest_first = sorted(_by_key(labels), key=len, reverse=True)
    return regex.compile("|".join(map(_standing, longest_first)), regex.V1)


def _standing(key: str) -> str:
    """A pattern of a key with nothing at its ends that would make it another word."""
    written = regex.escape(key, literal_spaces=True)
    if not regex.search(LETTER, key, regex.V1):
        return written
    ends = [regex.match(UNSPACED, end, regex.V1) for end in (key[0], key[-1])]
    left = "" if ends[0] else BEFORE + NUMBER_BEFORE * key[0].isnumeric()
    right = "" if ends[1] else BEHIND + NUMBER_BEHIND * key[-1].isnumeric()
    return f"{left}{written}{right}|{OPENING}{written}{CLOSING}"
