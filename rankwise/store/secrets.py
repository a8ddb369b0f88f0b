"""Secrets stay out of what is written: options whose names say that they hold one are saved without their value."""

from __future__ import annotations

import re
from typing import Any

SECRET = re.compile(r"api_?key|password|secret|(access|hf|hub|auth)_token", re.IGNORECASE)
NOT_SHOWN = "(not shown)"


def without_secrets(content: Any, instead: str | None = NOT_SHOWN) -> Any:
    """The settings with something else in place of the values of keys that name a secret."""
    if isinstance(content, dict):
        return {
            key: instead if SECRET.search(str(key)) and isinstance(value, str) else without_secrets(value, instead)
            for key, value in content.items()
        }
    return [without_secrets(item, instead) for item in content] if isinstance(content, list) else content
