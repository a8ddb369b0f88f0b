"""What a command was told, as the tables of `idle` and `extras` ask for it."""

from __future__ import annotations

from typing import Any


class Told(dict[str, Any]):
    """Options by name, as attributes; None for one that a command does not have or that was not given."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)
