"""Prompts that a server may make of a row in place of training's: hypotheses of kind PROMPT, and which rows have them.

prompt ids ── without the system text · without the generation prompt · without a template · with a chat template
           ── BOS twice · BOS missing · only the last half
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jinja2 import TemplateError

from rankwise.data.chat import TemplateRefused
from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.data.template import joined
from rankwise.device.handoff.verdict import PROMPT, Hypothesis
from rankwise.device.parity.reference import common

Ids = tuple[int, ...]
Rewrite = Callable[[Renderer, Example, Ids], Sequence[int] | None]
A, B, C = "\ue000", "\ue001", "\ue002"  # stand in for texts, to see what a template puts around them


def other_prompts(
    renderer: Renderer, examples: Sequence[Example], prompts: Sequence[Ids]
) -> Iterator[tuple[Hypothesis, list[Ids]]]:
    """Each hypothesis with the prompts of all rows, those that it does not change among them; left out where it changes
    none. Rows with pictures are only tried with their BOS."""
    sees = any(example.images for example in examples)
    for name, (words, rewrite) in (OF_IDS if sees else OF_TEXT | OF_IDS).items():
        found = [tuple(rewrite(renderer, *pair) or pair[1]) for pair in zip(examples, prompts, strict=True)]
        if found != list(prompts):
            yield Hypothesis(name, PROMPT, words), found


def encoded(renderer: Renderer, text: str) -> list[int]:
    """Ids of a prompt's text, with the BOS that training puts before one."""
    ids = renderer.encoder.ids(text)
    return ids if ids[: len(renderer.begin)] == renderer.begin else renderer.begin + ids


def without_system(renderer: Renderer, example: Example, _: Ids) -> list[int] | None:
    """The row's own system text left out; else the one that the template writes by itself."""
    if renderer.style != "chat":
        return None
    turns = joined(example)[:-1]
    own = [turn for turn in turns if turn.role != "system"]
    if len(own) < len(turns):
        return encoded(renderer, renderer.template.text(own, generate=True)) if own else None
    text, header = renderer.template.text(turns, generate=True), user_header(renderer)
    start = text.find(header) if header else -1
    if start <= 0:
        return None
    begin = renderer.tokenizer.bos_token or ""
    return encoded(renderer, (begin if begin and text.startswith(begin) else "") + text[start:])


def user_header(renderer: Renderer) -> str:
    """What the template puts before a user's text: what its first and a later turn have in common, without the end of
    what stands before it. "" where it takes no second turn."""
    try:
        text = renderer.template.text([Turn("user", A), Turn("assistant", B), Turn("user", C)])
    except TemplateRefused:
        return ""
    first, later = text.split(A)[0], text.split(C)[0].split(B)[-1]
    length = common([*map(ord, first[::-1])], [*map(ord, later[::-1])])
    shared = first[len(first) - length :]
    end = renderer.template.end.strip()
    return (shared.split(end)[-1] if end else shared).lstrip()


def without_generation_prompt(renderer: Renderer, example: Example, _: Ids) -> list[int] | None:
    if renderer.style != "chat":
        return None
    return encoded(renderer, renderer.template.text(joined(example)[:-1]))


def without_template(renderer: Renderer, example: Example, _: Ids) -> list[int] | None:
    """What was said, line by line."""
    if renderer.style == "raw":
        return None
    return encoded(renderer, "\n".join(turn.text for turn in joined(example)[:-1]))


def with_template(renderer: Renderer, example: Example, ids: Ids) -> list[int] | None:
    """The whole prompt as a user's message: what a server does that puts its own template around every prompt."""
    if renderer.style == "chat" or not renderer.tokenizer.chat_template:
        return None
    said = [{"role": "user", "content": renderer.prompt_text(example, "")}]
    try:
        text = renderer.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    except (TemplateError, ValueError, TypeError):
        return None
    return renderer.encoder.ids(str(text))


def bos_twice(renderer: Renderer, _: Example, ids: Ids) -> list[int] | None:
    begin = renderer.tokenizer.bos_token_id
    return None if begin is None else [begin, *ids]


def without_bos(renderer: Renderer, _: Example, ids: Ids) -> list[int] | None:
    begin = renderer.tokenizer.bos_token_id
    return list(ids[1:]) if begin is not None and ids[:1] == (begin,) and len(ids) > 1 else None


def last_half(_: Renderer, __: Example, ids: Ids) -> list[int] | None:
    return list(ids[len(ids) // 2 :])


OF_TEXT: dict[str, tuple[str, Rewrite]] = {
    "no system text": ("the template without its system text", without_system),
    "no generation prompt": ("the template without its generation prompt", without_generation_prompt),
    "no template": ("the row's text without a template", without_template),
    "template around it": ("a chat template around the prompt", with_template),
    "last half": ("a context that keeps only the end of the prompt", last_half),
}
OF_IDS: dict[str, tuple[str, Rewrite]] = {
    "BOS twice": ("a second BOS token", bos_twice),
    "no BOS": ("a missing BOS token", without_bos),
}
