"""Standard output and error that take any text: a sign that the terminal's encoding lacks is written in ASCII.

    readable()      # once, before the first print: ✓ → ok, – → -, σ → sigma under cp1252, latin-1 or ASCII

Files are UTF-8 whatever the terminal is.
"""

from __future__ import annotations

import codecs
import io
import re
import sys
import unicodedata

UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
ERRORS = "rankwise"  # name of the error handler of the two streams
ASCII = {
    sign: text
    for signs, text in (
        ("✓✔", "ok"),
        ("✗✘×", "x"),
        ("–—‒−⁻‐‑─━═·", "-"),
        ("┌┐└┘├┤┬┴┼", "+"),
        ("│‖┃", "|"),
        ("▁▂", "_"),
        ("▃▄▅", "="),
        ("▆▇█", "#"),
        ("‘’‚‛", "'"),
        ("“”„‟«»「」『』", '"'),
        ("▶›⟩", ">"),
        ("◀‹⟨", "<"),
        ("⌊⌈", "["),
        ("⌋⌉", "]"),
        ("→", "->"),
        ("←", "<-"),
        ("▲", "^"),
        ("▼", "v"),
        ("⏎", "<newline>"),
        ("•", "*"),
        ("÷", "/"),
        ("±", "+/-"),
        ("½", "1/2"),
        ("°", " degrees"),
        ("µ", "u"),
        ("ß", "ss"),
        ("≤", "<="),
        ("≥", ">="),
        ("≠", "!="),
        ("≈", "~"),
        ("√", "sqrt "),
        ("∇", "grad "),
        ("∂", "d"),
        ("⊥", "_|_"),
        ("£", "GBP "),
        ("€", "EUR "),
        ("。", "."),
    )
    for sign in signs
}


def harmless(text: str) -> str:
    """Without control characters and direction overrides, as a file or a service may put them into a message."""
    return UNPRINTABLE.sub("�", text.replace("\r\n", "\n"))


def readable() -> None:
    """Let both streams of this process print any text, in whichever encoding they are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors=ERRORS)


def plain(sign: str) -> str:
    """One sign in ASCII: its own spelling, its letters without accents, its Greek name, or a question mark."""
    if sign in ASCII:
        return ASCII[sign]
    name = unicodedata.name(sign, "")
    if name.startswith("GREEK ") and "LETTER " in name:
        letter = name.partition("LETTER ")[2].split()[0].replace("LAMDA", "LAMBDA").lower()
        return letter.capitalize() if "CAPITAL" in name else letter
    decomposed = unicodedata.normalize("NFKD", sign).encode("ascii", "ignore").decode()
    return decomposed or ("" if unicodedata.combining(sign) else "?")


def replaced(error: UnicodeError) -> tuple[str | bytes, int]:
    """What stands for the first sign that cannot be encoded; the bytes of a file name that were no text as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign, after = error.object[error.start], error.start + 1
    if "\udc80" <= sign <= "\udcff":
        return bytes([ord(sign) - 0xDC00]), after
    return plain(sign), after


codecs.register_error(ERRORS, replaced)
