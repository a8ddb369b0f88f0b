"""A family on both sides: as the product loads and feeds it, and as transformers alone does.

    product:  options ── stages.rendering, data.Collator, nets.load ──▶ prompts, batches, logits
    family:   one processor.apply_chat_template(conversation, tokenize=True, return_dict=True) ──▶ the same

Only the folder is shared. The family's side imports nothing of the product, but for Isaac, which is our own model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from families.talks import TALKS, Talk, drawn, written
from rankwise.data.dataset import Collator
from rankwise.data.example import Example
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.models.load import load_config, load_model, load_processor
from rankwise.options.sections import DataSection, ModelSection

Tensors = dict[str, Tensor]
TEXT = ("input_ids", "attention_mask")


class NotTheirs(Exception):
    """The family's own processor takes no such conversation."""


@dataclass(frozen=True)
class Family:
    """transformers alone: the processor's one call, and the model that is given what it returns.

    known: what conversations were made into, for all questions about them.
    """

    folder: Path
    pictures: dict[str, Image.Image]
    known: dict[tuple[str, Talk, bool], Any] = field(default_factory=dict, repr=False)

    def seeing(self, pictures: dict[str, Image.Image]) -> Family:
        """The same processor and model with other pictures."""
        other = Family(self.folder, pictures)
        vars(other).update(processor=self.processor, model=self.model)
        return other

    @cached_property
    def processor(self) -> Any:
        ours = AutoConfig.from_pretrained(self.folder).model_type == "isaac"
        return load_processor(str(self.folder)) if ours else AutoProcessor.from_pretrained(self.folder)

    @cached_property
    def model(self) -> Any:
        """float32, eager attention where the family leaves the choice."""
        if AutoConfig.from_pretrained(self.folder).model_type == "isaac":
            return load_model(str(self.folder), torch.float32).eval()
        return AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32).eval()

    @property
    def image_token_id(self) -> int | None:
        """The id that stands for a feature of an image, by the family's config."""
        names = ("image_token_id", "image_token_index")
        return next((value for name in names if (value := getattr(self.model.config, name, None)) is not None), None)

    def inputs(self, talk: Talk, *, answered: bool = False) -> Tensors:
        """What the model takes for one conversation, asked for an answer unless `answered`. NotTheirs where the
        processor refuses it."""
        key = ("inputs", talk, answered)
        if key not in self.known:
            self.known[key] = self._inputs(talk, answered)
        return dict(self.known[key])

    def _inputs(self, talk: Talk, answered: bool) -> Tensors:
        try:
            found = self.processor.apply_chat_template(
                talk.messages(self.pictures, answered=answered),
                add_generation_prompt=not answered,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        except Exception as error:
            raise NotTheirs(f"{type(error).__name__}: {error}") from error
        tensors = {name: torch.as_tensor(value) for name, value in found.items() if takes(self.model, name)}
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}

    @torch.no_grad()
    def logits(self, talk: Talk) -> Tensor:
        """(length, vocabulary) of one conversation with its answers, alone."""
        key = ("logits", talk, True)
        if key not in self.known:
            self.known[key] = self.model(**self.inputs(talk, answered=True)).logits[0].float()
        return self.known[key]

    @torch.no_grad()
    def generated(self, talk: Talk, tokens: int, ends: Sequence[int]) -> list[int]:
        """Greedy ids behind the prompt, alone, without padding."""
        given = self.inputs(talk)
        made = self.model.generate(**given, max_new_tokens=tokens, do_sample=False, eos_token_id=list(ends))
        return made[0, given["input_ids"].shape[1] :].tolist()


@dataclass(frozen=True)
class Product:
    """What training and evaluation do with the same rows."""

    folder: Path
    data: Path

    @cached_property
    def renderer(self) -> Renderer:
        section = DataSection(task="conversations", data_path=str(self.data))
        return renderer_for(section, ModelSection(), str(self.folder), load_config(str(self.folder)))

    @cached_property
    def model(self) -> Any:
        return load_model(str(self.folder), torch.float32).eval()

    @cached_property
    def examples(self) -> dict[str, Example]:
        return {example.id: example for example in load("conversations", self.data)}

    def batch(self, names: Sequence[str], *, answered: bool = True) -> Tensors:
        """As the data loader gives it to the model."""
        render = self.renderer.training if answered else self.renderer.prompt
        rows = [vars(render(self.examples[name])) for name in names]
        return Collator.of(self.renderer.tokenizer, sight=self.renderer.sight)(rows)

    @torch.no_grad()
    def logits(self, names: Sequence[str]) -> list[Tensor]:
        """(length, vocabulary) of each row, all in one batch."""
        batch = self.batch(names)
        lengths = batch["attention_mask"].sum(1).tolist()
        batch.pop("labels")
        found = self.model(**batch).logits.float()
        return [row[:length] for row, length in zip(found, lengths, strict=True)]


@dataclass(frozen=True)
class Subject:
    """A family's tiny model, its conversations, and both sides. work: a folder for what the commands write."""

    name: str
    family: Family
    product: Product
    work: Path

    @classmethod
    def of(cls, name: str, folder: Path, work: Path) -> Subject:
        """folder: the saved model."""
        data = written(work / "data", list(TALKS))
        return cls(name, Family(folder, drawn(work / "data")), Product(folder, data), work)

    @property
    def folder(self) -> Path:
        return self.family.folder

    @cached_property
    def talks(self) -> list[str]:
        """Names of the conversations that the family's own processor takes."""
        return [name for name in TALKS if not self.refusal(name)]

    def refusal(self, name: str) -> str:
        """Why the family's own processor, or its model, takes no such conversation; "" where it does."""
        try:
            self.family.logits(TALKS[name])
        except NotTheirs as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - a model that cannot run what its processor made
            return f"its model: {type(error).__name__}: {error}"
        return ""


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has this argument."""
    parameters = inspect.signature(model.forward).parameters
    return name in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())
