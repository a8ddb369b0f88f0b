"""What a processor does with texts and images, and which texts it hands to its tokenizer on the way.

    heard(processor, ["<image>What?"], [[picture]])     # {"pixel_values": …}, ["<image><image>…What?"]

Transformers' processors replace the image token in different ways, some by the text around it (Idefics2) and some with
nothing that tells where (no `text_replacement_offsets`); what they make of it all goes through the tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from transformers import ProcessorMixin

from rankwise.errors import UsageError

SUPPORTED = "`rankwise check` says which model families are tested; docs/vision.md lists them"


def heard(
    processor: ProcessorMixin, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]
) -> tuple[Mapping[str, Any], list[str]]:
    """(the processor's output as tensors, the texts given to its tokenizer) for rows of text with their images.

    ValueError where it refuses the images; UsageError, naming the processor, where it cannot be called so.
    """
    listening = copy.copy(processor)
    listening.tokenizer = tokenizer = _Listening(processor.tokenizer)
    try:
        found = listening(
            text=list(texts),
            images=[list(row) for row in images] if any(images) else None,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",  # some processors count their placeholders by what tensors have (Ovis2, Aria)
        )
    except (AttributeError, LookupError, TypeError, NotImplementedError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{type(processor).__name__} takes no rows of text with images ({reason}); {SUPPORTED}"
        ) from error
    return found, tokenizer.given


class _Listening:
    """A tokenizer that keeps the texts it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.given = tokenizer, []  # type: tuple[Any, list[str]]

    def __call__(self, text: Any, *args: Any, **how: Any) -> Any:
        self.given += [text] if isinstance(text, str) else list(text)
        return self._tokenizer(text, *args, **how)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
