"""What the vision side makes of pictures, on both sides of the ladder's embeddings rung.

Embedder(text, mmproj).of([png, …])     llama.cpp's, by llama-cpp-python in a child process
embedded(model, renderer, rendered)     transformers': what stands at the picture's tokens before the first layer
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rankwise.data.dataset import seen
from rankwise.data.render import Rendered, Renderer
from rankwise.errors import VerificationError

BINDINGS = "llama_cpp"
LAST = 800  # characters of what a failed process said
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Embedder:
    """One exported form. VerificationError where llama.cpp ends on the files."""

    text: Path
    mmproj: Path

    @staticmethod
    def available() -> bool:
        return importlib.util.find_spec(BINDINGS) is not None

    def of(self, images: Sequence[bytes]) -> list[Rows]:
        """(tokens, width) of each picture, PNG."""
        with tempfile.TemporaryDirectory() as folder:
            names = [Path(folder, f"{number:06d}.png") for number in range(len(images))]
            for name, image in zip(names, images, strict=True):
                name.write_bytes(image)
            command = [sys.executable, "-m", "rankwise.device.parity.embed", "--model", str(self.text)]
            done = subprocess.run(
                [*command, "--mmproj", str(self.mmproj), folder],
                capture_output=True,
                encoding="utf-8",
                errors="replace",
            )
            if done.returncode:
                raise VerificationError(f"llama.cpp broke down on {self.mmproj}:\n{done.stderr[-LAST:]}")
            return [np.load(name.with_suffix(".npy")) for name in names]


@torch.inference_mode()
def embedded(model: Any, renderer: Renderer, rendered: Rendered) -> Rows | None:
    """(image tokens, width) of a prompt's pictures; None for a prompt without."""
    if renderer.sight is None or not rendered.images:
        return None
    ids = torch.tensor([rendered.input_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | seen(renderer.sight, ids, [rendered.images])
    device = next(model.parameters()).device
    with _first_inputs(model) as found:
        model(**{name: value.to(device) for name, value in inputs.items()})
    rows: Rows = found[0][0, ids[0] == renderer.sight.placeholder_id].float().cpu().numpy()
    return rows


@contextmanager
def _first_inputs(model: Any) -> Iterator[list[Any]]:
    """What the language model is given, as its calls come."""
    found: list[Any] = []

    def keep(_: Any, __: Any, given: dict[str, Any]) -> None:
        found.append(given["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


def apart(found: Rows, expected: Rows) -> float:
    """Relative distance (root mean square); infinite where the shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
