"""A GGUF file taken apart, changed and put together again, so that one thing in it is wrong and the rest as it was.

with altered(Path("model-f16.gguf"), out) as draft:
    draft["llama.rope.freq_base"] = 1e6                      # a value of the metadata, of its own type
    draft.put("output_norm.weight", np.ones(128))            # a tensor, written in the type that it had
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

HEADER = "GGUF."  # what the reader calls the numbers of the file's own header
NEW = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, str: gguf.GGUFValueType.STRING}
Values = NDArray[np.float32]


class Draft:
    """Metadata and tensors of a file, to be changed in place."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith(HEADER)}
        self.values: dict[str, Any] = {name: field.contents() for name, field in fields.items()}
        self.types = {name: field.types for name, field in fields.items()}
        self.tensors = {one.name: (np.array(one.data), one.tensor_type) for one in reader.tensors}

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """A value of a key that the file has, or a flag, number or text under a new one."""
        self.types.setdefault(key, [NEW.get(type(value))])
        self.values[key] = value

    def remove(self, key: str) -> None:
        del self.values[key], self.types[key]

    def floats(self, name: str) -> Values:
        """A tensor dequantized, row-major."""
        data, kind = self.tensors[name]
        return np.array(gguf.quants.dequantize(data, kind), dtype=np.float32)

    def put(self, name: str, values: NDArray[Any]) -> None:
        """New values in the type that the tensor has."""
        kind = self.tensors[name][1]
        self.tensors[name] = (gguf.quants.quantize(np.ascontiguousarray(values, dtype=np.float32), kind), kind)

    def swap(self, first: str, second: str) -> None:
        self.tensors[first], self.tensors[second] = self.tensors[second], self.tensors[first]

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, str(self.values["general.architecture"]))
        for key, value in self.values.items():
            if key != "general.architecture":
                kind, *inner = self.types[key]
                writer.add_key_value(key, value, kind, inner[-1] if inner else None)
        for name, (data, kind) in self.tensors.items():
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@contextmanager
def altered(source: Path, out: Path) -> Iterator[Draft]:
    """The source's content; what the block leaves of it is written to `out`."""
    draft = Draft(source)
    yield draft
    out.parent.mkdir(parents=True, exist_ok=True)
    draft.write(out)
