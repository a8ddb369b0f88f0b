"""A chat template's text and variables, with the date that it prints fixed.

    given, or the tokenizer's own ── template_text ──▶ text ── pinned(kwargs) ──▶ kwargs ── with_date ──▶ as rendered

Templates that print today's date (Llama 3.2: "Today Date: 29 Nov 2026") would make another prompt tomorrow. The date of
the first rendering is kept among the variables, so that whoever reads them later makes the same prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError

NOW, DATE = "strftime_now", "date_string"
CALL = re.compile(rf"{NOW}\(\s*([\"'])(.*?)\1\s*\)")


def template_text(given: str | None) -> str | None:
    """The template that --chat_template names: the content of a file, or the text itself; None for none.

    UsageError where it is neither.
    """
    if given is None or "{%" in given or "{{" in given:
        return given
    path = Path(given).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--chat_template {given}: neither a readable file nor a Jinja template ({error})") from error


def pinned(text: str, kwargs: Mapping[str, Any], today: date | None = None) -> dict[str, Any]:
    """The variables with the date that the template prints among them; as they are where it prints none.

    It is `date_string`, in the template's own format, where the template has that variable; elsewhere `strftime_now`
    as YYYY-MM-DD, which `with_date` puts into the text.
    """
    if NOW not in text or {NOW, DATE} & set(kwargs):
        return dict(kwargs)
    today = today or date.today()
    call = CALL.search(text)
    if DATE in text and call:
        return {**kwargs, DATE: today.strftime(call[2])}
    return {**kwargs, NOW: today.isoformat()}


def with_date(text: str, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(template, variables) as they are rendered: each `strftime_now(format)` replaced by the pinned date.

    UsageError where that is no date.
    """
    if NOW not in kwargs:
        return text, dict(kwargs)
    try:
        day = date.fromisoformat(str(kwargs[NOW]))
    except ValueError as error:
        raise UsageError(f"--chat_template_kwargs: {NOW} is a date, YYYY-MM-DD; got {kwargs[NOW]!r}") from error
    fixed = CALL.sub(lambda call: json.dumps(day.strftime(call[2])), text)
    return fixed, {name: value for name, value in kwargs.items() if name != NOW}
