"""Rendered samples against `apply_chat_template`: whole conversations, tokenized in one piece by transformers alone.

    Sample* ────────────── Oracle.differences ──▶ what differs, by sample      (text; of image rows the text only)
    (Example, Rendered) ─── Oracle.difference_seen ▶ the same for an image row, ids and pixels, by the processor

Nothing here uses the layouts or the pieces that training is made of: only the conversation and the template are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

import torch
from transformers.utils.chat_template_utils import encode_marked_chat

from rankwise.data.chat import MARK, Kept
from rankwise.data.example import Example, Turn
from rankwise.data.render import Rendered, Renderer
from rankwise.data.template import joined
from rankwise.data.vision_inputs import CROSSED, IGNORED, TEXT_INPUTS
from rankwise.errors import DataError

Atom = TypeVar("Atom", bound=Hashable)
Ids = list[int]
Sample = tuple[Example, Rendered, Ids]  # with the ids of its prompt
PROBE = "\ue000probe\ue001"
SHOWN = 12  # tokens shown where ids part


class Differs(DataError):
    """A sample is not rendered as its chat template renders it."""


@dataclass(frozen=True)
class Oracle:
    """What transformers makes of the conversations that a renderer with a chat template is given."""

    renderer: Renderer
    _prompts: Kept[tuple[Turn, ...], str] = field(default_factory=Kept, init=False, compare=False, repr=False)
    _tails: set[tuple[Any, ...]] = field(default_factory=set, init=False, compare=False, repr=False)

    def differences(self, batch: Sequence[Sample]) -> Iterator[tuple[Example, Differs]]:
        """Samples whose ids for training or for generation, or whose labels, are not the template's. One with images is
        compared by its text; one whose source was cut is left out."""
        batch = [sample for sample in batch if not sample[1].truncated]
        wholes, prompts = self._texts(batch, generate=False), self._texts(batch, generate=True)
        compared = [whole for whole, (_, rendered, _) in zip(wholes, batch, strict=True) if not rendered.images]
        tokenized = dict(zip(compared, self._tokenized(compared), strict=True))
        for (example, rendered, ours), whole, prompt in zip(batch, wholes, prompts, strict=True):
            if rendered.images:
                reason = self._text(example, whole, prompt)
            else:
                ids, border = tokenized[whole]
                known = border is not None and whole.startswith(prompt) and ours == ids[: border(len(prompt))]
                given = ours if known else self._tokenized([prompt])[0][0]
                reason = self._ids(example, rendered, ids, given, ours)
            if reason:
                yield example, Differs(f"sample {example.id}: {reason}")

    def difference_seen(self, example: Example, rendered: Rendered, prompt_ids: Ids) -> Differs | None:
        """What differs in ids, in inputs per token, or in the pixels of a sample with images."""
        sight = self.renderer.sight
        assert sight is not None
        whole, prompt = (self.own(example, generate=generate) for generate in (False, True))
        ids, given = whole["input_ids"][0].tolist(), prompt["input_ids"][0].tolist()
        reason = self._ids(example, rendered, ids, given, prompt_ids)
        ours = sight.seen(torch.tensor([rendered.input_ids]), [example.images])
        length = min(len(ids), len(rendered.input_ids))
        for name in sorted(set(ours) & set(whole)) if not reason else ():
            cut = (slice(None), slice(length)) if name in (*sight.token_types, CROSSED) else (...,)
            if not torch.equal(torch.as_tensor(whole[name])[cut], ours[name][cut].to(whole[name].dtype)):
                reason = f"{name} is not what {type(sight.processor).__name__} makes"
        lacking = sorted(name for name in set(whole) - TEXT_INPUTS - set(ours) if sight.taken(name))
        if not reason and lacking:
            reason = f"{', '.join(lacking)}: the model takes it, and training would not give it"
        return Differs(f"sample {example.id}: {reason}") if reason else None

    def own(self, example: Example, *, generate: bool = False) -> Mapping[str, Any]:
        """One call of the processor for a sample with images: ids, inputs per token and pixels, as tensors."""
        sight, template = self.renderer.sight, self.renderer.template
        assert sight is not None
        turns = joined(example)
        marked = {"sanitize_control_tokens": True} if any(template.control.search(turn.text) for turn in turns) else {}
        found: Mapping[str, Any] = sight.processor.apply_chat_template(
            template.messages(turns[: -1 if generate else None]),
            chat_template=template.source,
            add_generation_prompt=generate,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images": [sight.reader.open(reference) for reference in example.images], **marked},
            **template.kwargs,
        )
        return found

    def _ids(self, example: Example, rendered: Rendered, whole: Ids, given: Ids, prompt: Ids) -> str:
        """What differs: whole and given are the template's conversation and prompt, prompt is the renderer's."""
        if prompt != given:
            return f"its prompt is not the chat template's: {self._parted(prompt, given)}"
        if rendered.input_ids[: len(prompt)] != prompt:
            return f"training does not begin with the prompt: {self._parted(rendered.input_ids, prompt)}"
        if not self._teaches(example, rendered, len(prompt)):
            return "what is learnt is not its answers with an end token behind each"
        if not self._agree(rendered.input_ids, whole) and not self._joined(rendered.input_ids, whole):
            return f"its ids are not the chat template's: {self._parted(rendered.input_ids, whole)}"
        return ""

    def _teaches(self, example: Example, rendered: Rendered, start: int) -> bool:
        """Whether the labels are the last answer, from `start` on, and each earlier one with its end token."""
        ids, labels = rendered.input_ids, rendered.labels
        learnt = [turn for turn in example.turns if turn.role == "assistant" and turn.trained]
        before = labels[:start]
        ends = [before[place - 1] for place in range(1, start) if before[place] == IGNORED != before[place - 1]]
        last = labels[start:] == ids[start:] and before[-1:] in ([IGNORED], [])
        return last and len(ends) == len(learnt) - 1 and {*ends, ids[-1]} <= self._ends

    def _joined(self, ours: Ids, theirs: Ids) -> bool:
        """Equal in special tokens and characters: the tokenizer joins some across the beginning of an answer, where no
        prompt can be continued so."""
        return self._agree(self._spelled(ours), self._spelled(theirs))

    def _agree(self, ours: Sequence[Atom], theirs: Sequence[Atom]) -> bool:
        """Equal but for an end token where the template writes none, and for what it writes behind the last one."""
        place = _common(ours, theirs)
        left = tuple(theirs[place:])
        added = ours[-1] in self._ends and self._special.isdisjoint(left)
        return len(ours) - place <= added and (left in self._tails or self._is_tail(left))

    def _is_tail(self, atoms: tuple[Any, ...]) -> bool:
        """Whether this is what the template writes behind an answer, or the end of it."""
        found = self._tail.endswith(self._read(atoms))
        self._tails.update([atoms] if found else [])
        return found

    def _text(self, example: Example, whole: str, given: str) -> str:
        """What differs in the texts that the images of a sample stand in."""
        layout, prompt = self.renderer.template.layout(example, ""), self.renderer.template.prompt(example)
        pairs = zip(layout.before, layout.answers, strict=True)
        ours = "".join(f"{head}{answer}{layout.end}" for head, answer in pairs)
        place = _common(ours, whole)
        if prompt != given or ours[place:] not in ("", layout.end) or not self._tail.endswith(_dense(whole[place:])):
            return f"its text is not the chat template's: …{ours[-60:]!r} for …{whole[-60:]!r}"
        return ""

    def _tokenized(self, texts: list[str]) -> list[tuple[list[int], Callable[[int], int | None] | None]]:
        """(ids, which of them a character is in) of each text, as `apply_chat_template` tokenizes: a processor has the
        tokenizer add its begin token where there is none."""
        tokenizer = self.renderer.tokenizer
        marked = {text: encode_marked_chat(tokenizer, text) for text in texts if MARK in text}
        plain = [text for text in texts if text not in marked]
        if not plain:
            return [(marked[text], None) for text in texts]
        begins = tokenizer.bos_token is not None and plain[0].startswith(tokenizer.bos_token)
        adds = self.renderer.sight is not None and not begins
        sight = self.renderer.sight
        if sight is None or sight.replaces:
            found = tokenizer(plain, add_special_tokens=adds, verbose=False)
            ids = found["input_ids"]
            borders = [partial(found.char_to_token, place) if found.is_fast else None for place in range(len(plain))]
        else:  # it may write more than what stands for images (Molmo2)
            ids = sight.processor(text=plain, add_special_tokens=adds)["input_ids"]
            borders = [None] * len(plain)
        known = dict(zip(plain, zip(ids, borders, strict=True), strict=True))
        return [(marked[text], None) if text in marked else known[text] for text in texts]

    def _texts(self, batch: Sequence[Sample], *, generate: bool) -> list[str]:
        template, known = self.renderer.template, self._prompts
        turns = [tuple(joined(example)[: -1 if generate else None]) for example, *_ in batch]
        different = [each for each in dict.fromkeys(turns) if not (generate and each in known)]
        conversations = [template.messages(each) for each in different]
        texts = conversations and self.renderer.tokenizer.apply_chat_template(
            conversations,
            chat_template=template.source,
            add_generation_prompt=generate,
            tokenize=False,
            **template.kwargs,
        )
        found = dict(zip(different, texts, strict=True))
        rendered = [found.get(each) or known[each] for each in turns]
        for each, text in found.items() if generate else ():
            known.keep(each, text, len(text))
        return rendered

    def _spelled(self, ids: Sequence[int]) -> list[int | str]:
        """Special tokens as ids, what is between them as characters without whitespace."""
        atoms: list[int | str] = []
        text: list[int] = []
        for token in [*ids, None]:
            if token is None or token in self._special:
                atoms += _dense(self._decoded(text))
                text = []
                atoms += [] if token is None else [token]
            else:
                text.append(token)
        return atoms

    def _read(self, atoms: Sequence[Any]) -> str:
        if all(isinstance(atom, int) for atom in atoms):
            return _dense(self._decoded(atoms))
        return "".join(self._decoded([atom]) if isinstance(atom, int) else atom for atom in atoms)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.renderer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def _parted(self, ours: Sequence[int], theirs: Sequence[int]) -> str:
        place = _common(ours, theirs)
        shown, wanted = (self._decoded(ids[place : place + SHOWN]) for ids in (ours, theirs))
        return f"at token {place} {shown!r} for {wanted!r}"

    @cached_property
    def _tail(self) -> str:
        """What the template writes behind the last answer, without whitespace."""
        form, tokenizer = self.renderer.template, self.renderer.tokenizer
        said = [{"role": role, "content": PROBE} for role in ("user", "assistant")]
        typed = [one | {"content": [{"type": "text", "text": PROBE}]} for one in said]
        text = tokenizer.apply_chat_template(
            typed if form.typed else said, chat_template=form.source, tokenize=False, **form.kwargs
        )
        return _dense(str(text).split(PROBE)[-1])

    @cached_property
    def _ends(self) -> frozenset[Any]:
        return frozenset(self.renderer.end_ids)

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(self.renderer.tokenizer.added_tokens_decoder)


def _common(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many leading entries are equal."""
    if ours[: len(theirs)] == theirs[: len(ours)]:
        return min(len(ours), len(theirs))
    pairs = zip(ours, theirs, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(ours), len(theirs)))


def _dense(text: str) -> str:
    return "".join(text.split())
