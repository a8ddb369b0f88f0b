"""A YAML or JSON file that a person has written, read strictly: a key twice in any mapping is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rankwise.errors import UsageError
from rankwise.files.atomic import read_json


def content_of(path: Path) -> Any:
    """What the file holds. UsageError (YAML) or DataError (JSON) with the line where it cannot be read."""
    if path.suffix == ".json":
        return read_json(path)
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Strict)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text: {error.reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error


class _Strict(yaml.SafeLoader):
    """YAML in which a key that a mapping holds twice is an error: PyYAML keeps the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        written: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in written:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} appears twice", key.start_mark)
            written.add(str(key.value))
        return super().construct_mapping(node, deep)
