"""Logits of base, base + adapter and merged model on the same inputs, whole in memory or with one layer at a time.

    batches = [text_batch(model), image_batch(model, "org/base")]     # or prompt_batch(renderer, examples)
    logits(load_whole("org/base"), batches)                            # (positions, vocabulary), float32
    logits(layered_adapted("org/base", adapter), batches)              # the same, by layers

Where no whole model fits, its structure runs with NaN for every weight: hooks bring a layer's weights from the files
before it, and take them away after it. A layer here is any module with weights of its own, so the peak is the largest
matrix (mostly the embeddings), and every pass reads the files once. NaN, because a model that reads a weight past its
layer must not pass for right; accelerate's offloading hooks leave meta tensors there, with which torch computes garbage
without a word.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import get_max_memory
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.site import PEFT_PREFIX, parameter_name
from rankwise.data.dataset import pad, seen
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.vision_inputs import Sight
from rankwise.errors import UsageError
from rankwise.files.adapter import adapter_files
from rankwise.files.checkpoint import Checkpoint, Weight, open_checkpoint, resolve
from rankwise.merge.plan import quiet_ties, read_state
from rankwise.models.adapt import ADAPTER
from rankwise.models.adapters import attach_layers, fill_weights, load_adapter
from rankwise.models.expert_files import ExpertFiles
from rankwise.models.load import load_model, load_processor, weightless_model
from rankwise.models.sites import weight_table
from rankwise.models.vocabulary import resize, row_count, row_names, with_rows

SEQUENCES, PICTURES, TOKENS, SEED = 4, 2, 32, 0
INSTEAD = "merge on a machine with more memory, or with --no_verify"
ABSENT = torch.tensor(torch.nan)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Noise:
    """Noise images, one per number, in place of an image reader."""

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


def text_batch(model: Any, among: Collection[int] = (), rows: int = SEQUENCES) -> Batch:
    """Random ordinary tokens: none that stands for an image, padding, or a beginning or end. Every other one is one of
    `among`, where that is given."""
    ids = ordinary_tokens(model, rows)
    if among:
        places = ids[:, ::2].numel()
        chosen = torch.tensor(list(among))[torch.arange(places) % len(among)]
        ids[:, ::2] = chosen.view_as(ids[:, ::2])
    return for_decoder(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def for_decoder(model: Any, batch: Batch) -> Batch:
    """Add the same tokens as decoder inputs, for an encoder-decoder model."""
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


@torch.inference_mode()
def logits(model: Any, batches: Sequence[Batch]) -> Tensor:
    """(positions, vocabulary): the model's first output (logits, or hidden states where it has no head) at the last
    tokens of every row."""
    return torch.cat([end_logits(model, batch) for batch in batches])


def end_logits(model: Any, batch: Batch) -> Tensor:
    places = last_tokens(batch["attention_mask"])
    with narrow_head(model, places):
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
def narrow_head(model: Any, places: Tensor) -> Iterator[None]:
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


def load(name: str, layered: bool, rows: int | None = None) -> PreTrainedModel:
    if layered:
        return layered_model(name, rows)
    model = load_model(name, torch.float32)
    if rows and rows != row_count(model):
        resize(model, rows)
    return model


def attach_adapter(model: PreTrainedModel, adapter: Path) -> PeftModel:
    """Base + adapter as PEFT itself reads it, where the file has PEFT's own names; else as `load_adapter` does."""
    with quiet_ties():
        if all(
            f"{PEFT_PREFIX}{name}" == key for name, key in open_checkpoint(adapter_files(adapter)[0]).stored.items()
        ):
            return PeftModel.from_pretrained(model, str(adapter)).eval()
        return load_adapter(model, adapter)


class Weights(Protocol):
    """Parameters and buffers by name, float32, made or read whenever they are asked for."""

    def __contains__(self, name: object) -> bool: ...

    def __getitem__(self, name: str) -> Tensor: ...


class FileWeights:
    """A model's parameters by name, read from its files in float32 whenever they are asked for.

    rows: of embeddings and head, where they are to have another number than the files; new ones are zero.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, rows: int | None = None) -> None:
        self.checkpoint, self.places, self.rows = checkpoint, weight_places(model, checkpoint), rows
        self.rowed = row_names(model)
        lacking = [name for name, _ in model.named_parameters() if name not in self.places]
        if lacking:
            raise UsageError(
                f"{checkpoint.path}: {type(model).__name__} cannot be compared layer by layer: its files store "
                f"{lacking[0]} in a different layout; {INSTEAD}"
            )

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        weight = self.places[name].read(self.checkpoint).float()
        return with_rows(weight, self.rows) if self.rows and name in self.rowed else weight


def weight_places(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Weight | ExpertFiles]:
    """Where the files hold each parameter; what is tied has its partner's place."""
    table = weight_table(model, checkpoint.keys())
    found: dict[str, Weight | ExpertFiles] = {**table.experts, **table.weights}
    for name, other in model.all_tied_weights_keys.items():
        for one, partner in ((name, other), (other, name)):
            if one not in found and partner in found:
                found[one] = found[partner]
    return found


class LayerHooks:
    """The hooks of one module: `inner name → name in the files` of the weights that come before it and go after it."""

    def __init__(self, names: Mapping[str, str], weights: Weights) -> None:
        self.names, self.weights = names, weights

    def fetch(self, module: nn.Module, _: Any) -> None:
        for inner, name in self.names.items():
            put(module, inner, self.weights[name])

    def drop(self, module: nn.Module, *_: Any) -> None:
        for inner in self.names:
            put(module, inner, ABSENT.expand(module.get_parameter(inner).shape))


def put(module: nn.Module, inner: str, weight: Tensor) -> None:
    path, _, leaf = inner.rpartition(".")
    setattr(module.get_submodule(path), leaf, nn.Parameter(weight, requires_grad=False))


def layered_model(name: str, rows: int | None = None) -> PreTrainedModel:
    """The model of a folder or hub id. UsageError where its files hold weights in another form than its modules.

    rows: of its embeddings, where it is to have another number than its files; new ones are zero.
    """
    model = weightless_model(name)
    if rows:
        resize(model, rows)
    return stream_weights(model, FileWeights(model, open_checkpoint(resolve(name)), rows))


def layered_adapted(name: str, adapter: Path, weights: Weights | None = None) -> PeftModel:
    """Base + adapter by PEFT; the adapter's tensors are in memory, the base's come and go (from its files, where
    `weights` gives no other source)."""
    model, where = weightless_model(name), f"adapter {adapter} on {name}"
    state = {key: tensor.float() for key, tensor in read_state(model, adapter, where).items()}
    weights = empty_weights(model, weights or FileWeights(model, open_checkpoint(resolve(name)), row_count(model)))
    with quiet_ties():
        adapted = attach_layers(model, adapter, where, False)
    fill_weights(adapted, state, where, assign=True)
    hook_layers(adapted, weights)
    return adapted.eval()


def stream_weights(model: PreTrainedModel, weights: Weights) -> PreTrainedModel:
    """A model without weights, to which they come from anywhere. UsageError where some come from nowhere."""
    lacking = [name for name, _ in model.named_parameters() if name not in weights]
    if lacking:
        raise UsageError(f"{type(model).__name__} cannot be run layer by layer: no file stores {lacking[0]}")
    hook_layers(model, empty_weights(model, weights))
    return model.eval()


def empty_weights(model: PreTrainedModel, weights: Weights) -> Weights:
    """Make every weight of the model NaN, to come from `weights`; buffers come from there at once."""
    for path, parameter in list(model.named_parameters(remove_duplicate=False)):
        put(model, path, ABSENT.expand(parameter.shape))
    for path, buffer in model.named_buffers():
        if path in weights:
            buffer.copy_(weights[path])
    return weights


def hook_layers(model: nn.Module, weights: Weights) -> None:
    """Register the hooks. What an adapter has brought with it (factors, biases, modules trained in full) stays."""
    done: list[str] = []
    for path, module in list(model.named_modules()):
        if any(path.startswith(f"{other}.") for other in done):
            continue
        whole = needs_inner_weights(module)
        inner = [name for name, value in module.named_parameters(recurse=whole) if is_absent(value)]
        if inner:
            hooks = LayerHooks({name: parameter_name(f"{path}.{name}") for name in inner}, weights)
            module.register_forward_pre_hook(hooks.fetch)
            module.register_forward_hook(hooks.drop)
        done += [path] if whole else []


def needs_inner_weights(module: nn.Module) -> bool:
    """Whether a module uses weights of the modules in it without calling these: it gets all of them at once. PEFT puts
    what it adapts by parameter together before it calls the module."""
    return isinstance(module, nn.MultiheadAttention | ParamWrapper) or (
        isinstance(module, LoraLayer) and bool(module.use_dora.get(ADAPTER))
    )


def is_absent(value: Tensor) -> bool:
    return value.untyped_storage().data_ptr() == ABSENT.untyped_storage().data_ptr()


def require_finite(logits: Tensor, model: Any) -> None:
    """UsageError where a weight was read past its layer, so that NaN came out."""
    if not bool(torch.isfinite(logits).all()):
        raise UsageError(
            f"{type(model).__name__} cannot be compared layer by layer: a weight is read past its layer (or the logits "
            f"are not finite anyway); {INSTEAD}"
        )


def free_memory() -> int:
    """Default memory limit of a comparison, in bytes."""
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
