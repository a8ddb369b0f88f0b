"""The proof of a merge: the merged model's logits against those of base + adapter, by PEFT, in float32.

reference = reference_logits("org/base", adapter)       # base and base + adapter, then freed
agreement = compare(reference, merged_logits(folder, reference.batches))
agreement.require(torch.bfloat16)

`layered=True`: the same comparison with one layer in memory at a time (`layered.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.site import PEFT_PREFIX
from rankwise.data.dataset import pad, seen
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.errors import UsageError, VerificationError
from rankwise.files.adapter import adapter_files
from rankwise.files.checkpoint import Checkpoint, open_checkpoint
from rankwise.merge.by_layer import INSTEAD, layered_adapted, layered_model, require_all_came
from rankwise.merge.plan import quiet_ties
from rankwise.models.adapters import load_adapter
from rankwise.models.load import load_model, load_processor
from rankwise.models.vocabulary import resize, row_count

SEQUENCES, PICTURES, TOKENS, SEED = 4, 2, 32, 0
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    """Pictures of noise, one for each number; they stand where a reader of files does."""

    width: int = 64
    height: int = 48

    def size(self, reference: str) -> tuple[int, int]:
        return self.width, self.height

    def open(self, reference: str) -> Image.Image:
        pixels = np.random.default_rng(int(reference)).integers(0, 256, (self.height, self.width, 3), dtype=np.uint8)
        return Image.fromarray(pixels)


def prompt_batch(renderer: Renderer, examples: Sequence[Example]) -> Batch:
    """Prompts as one batch (rows, length), padded on the right."""
    rows = [renderer.prompt(example) for example in examples]
    width = max(len(row.input_ids) for row in rows)
    ids = pad([row.input_ids for row in rows], width, renderer.tokenizer.pad_token_id or 0)
    mask = pad([[1] * len(row.input_ids) for row in rows], width, 0)
    return {"input_ids": ids, "attention_mask": mask} | seen(renderer.sight, ids, [row.images for row in rows])


def text_batch(model: Any, among: Collection[int] = ()) -> Batch:
    """Random ordinary tokens: none that stands for an image, padding, or a beginning or end. Every other one is one of
    `among`, where that is given."""
    ids = ordinary_tokens(model, SEQUENCES)
    if among:
        places = ids[:, ::2].numel()
        chosen = torch.tensor(list(among))[torch.arange(places) % len(among)]
        ids[:, ::2] = chosen.view_as(ids[:, ::2])
    return for_decoder(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def for_decoder(model: Any, batch: Batch) -> Batch:
    """The same tokens for the decoder, where there is one of its own."""
    return batch | ({"decoder_input_ids": batch["input_ids"]} if model.config.is_encoder_decoder else {})


def image_batch(model: Any, folder: str) -> Batch:
    """Rows of a picture and text. DataError where the folder holds no processor, which knows how to show a picture."""
    sight = Sight(load_processor(folder), Noise())  # type: ignore[arg-type]
    references = [str(number) for number in range(PICTURES)]
    encode = sight.processor.tokenizer
    shown = [encode(sight.expansions([one])[0], add_special_tokens=False)["input_ids"] for one in references]
    ids = torch.cat([torch.tensor(shown), ordinary_tokens(model, PICTURES)], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return batch | sight.seen(ids, [[one] for one in references])


def ordinary_tokens(model: Any, rows: int) -> Tensor:
    """(rows, 32) token ids, fewer where the model has fewer positions."""
    config = model.config.get_text_config()
    special = {
        value
        for part in (model.config.to_dict(), config.to_dict())
        for name, value in part.items()
        if name.endswith("token_id") and isinstance(value, int)
    }
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    length = min(TOKENS, getattr(config, "max_position_embeddings", None) or TOKENS)
    generator = torch.Generator().manual_seed(SEED)
    return ordinary[torch.randint(len(ordinary), (rows, length), generator=generator)]


NO_EFFECT = 1e-6  # relative: what float32 sums in another order differ by
# Relative error of the logits (rms) that rounding the merged weights may cause; a few times what was measured.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Reference:
    """Logits of the base and of base + adapter on the same inputs, float32."""

    batches: Sequence[Batch]
    base: Tensor
    adapted: Tensor


@dataclass(frozen=True)
class Agreement:
    """How the merged model differs from base + adapter, and how much the adapter does at all.

    `error` and `effect`: rms difference of the logits to base + adapter and of base + adapter to the base, both
    relative to the rms of base + adapter's. `same_top1`: share of positions with the same most likely token;
    `kl`: mean Kullback–Leibler divergence in nats of merged from adapted.
    """

    error: float
    effect: float
    max_difference: float
    same_top1: float
    kl: float

    @property
    def effect_lost(self) -> float:
        """Share of the adapter's effect that the difference amounts to."""
        return self.error / self.effect

    def require(self, dtype: torch.dtype) -> None:
        """VerificationError where the merged model is not base + adapter up to rounding to `dtype`."""
        require_effect(self.effect)
        tolerance = TOLERANCE[dtype]
        if not self.error <= tolerance:
            raise VerificationError(
                f"the merged model's logits differ from base + adapter's by {self.error:.2g} (relative rms), "
                f"more than the {tolerance:g} that {dtype} explains; nothing was written"
            )
        if self.error >= self.effect:
            raise VerificationError(
                f"rounding to {dtype} changes the logits by {self.error:.2g}, the adapter by {self.effect:.2g}: the "
                "adapter would be lost; write more digits with --dtype float32 (or float16)"
            )

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"effect_lost": self.effect_lost}


def require_effect(effect: float) -> None:
    if not effect > NO_EFFECT:
        raise VerificationError(
            f"the adapter changes the logits by {effect:.1g} (relative rms), which is nothing: is it the right one, "
            "and was it trained?"
        )


def free_memory() -> int:
    """Bytes that a comparison may take where nobody says how many."""
    return int(get_max_memory()["cpu"])


def needs_layers(base: Checkpoint, allowed: int) -> bool:
    """Whether the model in float32 is larger than the memory allowed, so that it must be compared layer by layer.

    UsageError where not even its largest matrix fits, as stored and in float32.
    """
    sizes = [torch.Size(base.shape(key)).numel() for key in base]
    if whole_bytes(base) <= allowed:
        return False
    if 8 * max(sizes) > allowed:
        raise UsageError(
            f"{base.path}: its largest matrix needs {8 * max(sizes) / 2**30:.1f} GiB to be compared, and "
            f"{allowed / 2**30:.1f} GiB may be used; raise --max_memory, or {INSTEAD}"
        )
    return True


def whole_bytes(base: Checkpoint) -> int:
    """Bytes of the model in float32."""
    return 4 * sum(torch.Size(base.shape(key)).numel() for key in base)


def reference_logits(
    base: str,
    adapter: Path,
    *,
    pictures: bool = False,
    prompts: Batch | None = None,
    layered: bool = False,
    rows: tuple[int, int] | None = None,
) -> Reference:
    """Run the base, put the adapter on it, run it again. VerificationError where that changes nothing.

    pictures: look at images as well; an adapter of the vision tower or the projector shows only there. prompts: what
    to run them on, instead of random tokens. layered: one layer in memory at a time. rows: of the base's embeddings
    and of the adapter's, where they differ: the base gets as many (new ones zero), and both are asked about new tokens.
    """
    model = loaded(base, layered, rows[1] if rows else None)
    batches = [for_decoder(model, prompts) if prompts else text_batch(model)]
    if rows and rows[1] > rows[0]:
        batches.append(text_batch(model, range(*rows)))
    if pictures and "pixel_values" not in batches[0]:
        batches.append(image_batch(model, base))
    before = logits(model, batches)
    if layered:
        require_all_came(before, model)
        adapted = layered_adapted(base, adapter)
    else:
        adapted = by_peft(model, adapter)
    reference = Reference(batches, before, logits(adapted, batches))
    require_effect(relative(reference.adapted - before, reference.adapted))
    return reference


def merged_logits(folder: Path, batches: Sequence[Batch], *, layered: bool = False) -> Tensor:
    return logits(loaded(str(folder), layered), batches)


def loaded(name: str, layered: bool, rows: int | None = None) -> PreTrainedModel:
    if layered:
        return layered_model(name, rows)
    model = load_model(name, torch.float32)
    if rows and rows != row_count(model):
        resize(model, rows)
    return model


def by_peft(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Base + adapter as PEFT itself reads it, where the file has PEFT's own names; else as `load_adapter` does."""
    with quiet_ties():
        if all(
            f"{PEFT_PREFIX}{name}" == key for name, key in open_checkpoint(adapter_files(adapter)[0]).stored.items()
        ):
            return PeftModel.from_pretrained(model, str(adapter)).eval()
        return load_adapter(model, adapter)


@torch.inference_mode()
def logits(model: Any, batches: Sequence[Batch]) -> Tensor:
    """(positions, vocabulary): the model's first output (logits, or hidden states where it has no head) at the last
    tokens of every row."""
    return torch.cat([at_the_ends(model, batch) for batch in batches])


def at_the_ends(model: Any, batch: Batch) -> Tensor:
    places = last_tokens(batch["attention_mask"])
    with head_sees(model, places):
        output = model(**batch)
    found = output.logits if "logits" in output else output[0]
    everywhere = found.dim() > 2 and found.shape[:2] == places.shape
    chosen: Tensor = found[places] if everywhere else found.flatten(0, -2)
    return chosen.float()


def last_tokens(mask: Tensor) -> Tensor:
    """(rows, length), true at the last 32 tokens of every row, padding apart."""
    from_the_end = mask.flip(1).cumsum(1).flip(1)
    return mask.bool() & (from_the_end <= TOKENS)


@contextmanager
def head_sees(model: Any, places: Tensor) -> Iterator[None]:
    """Logits at these places only: at all of a few long prompts they would take gigabytes."""
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    head = plain.get_output_embeddings()
    if head is None:
        yield
        return

    def narrowed(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        return (hidden[places][None], *inputs[1:]) if hidden.shape[:2] == places.shape else inputs

    hook = head.register_forward_pre_hook(narrowed)
    try:
        yield
    finally:
        hook.remove()


def compare(reference: Reference, merged: Tensor) -> Agreement:
    adapted = reference.adapted
    log_adapted, log_merged = adapted.log_softmax(-1), merged.log_softmax(-1)
    return Agreement(
        error=relative(merged - adapted, adapted),
        effect=relative(adapted - reference.base, adapted),
        max_difference=float((merged - adapted).abs().max()),
        same_top1=float((merged.argmax(-1) == adapted.argmax(-1)).float().mean()),
        kl=max(0.0, float((log_adapted.exp() * (log_adapted - log_merged)).sum(-1).mean())),
    )


def relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())
