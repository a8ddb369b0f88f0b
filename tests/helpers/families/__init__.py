"""Tiny random models and processors of every image-text family that builds here, each made in a second; no network.

    from families import FAMILIES
    FAMILIES["gemma3"](folder)      # saves model, processor and chat template in `folder`, returns it

`family_matrix.py` puts questions to them (`questions`) and writes the table that docs and product read.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tiny_isaac import tiny_isaac
from tiny_vision import tiny_idefics3, tiny_llava, tiny_qwen2vl, tiny_qwen25vl, tiny_smolvlm

from families import deepseeks, gemmas, glms, grids, llavas, qwens, readers, tiles  # noqa: F401
from families.parts import BUILDERS, made

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "qwen2_vl": tiny_qwen2vl,
    "qwen2_5_vl": tiny_qwen25vl,
    "smolvlm": tiny_smolvlm,
    "idefics3": tiny_idefics3,
    "llava": tiny_llava,
    "isaac": tiny_isaac,
    **{name: partial(made, name) for name in BUILDERS},
}
