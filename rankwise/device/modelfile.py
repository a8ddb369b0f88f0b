"""Ollama's `Modelfile` of a bundle's model.

    conversations with marked texts ── Renderer ──▶ Pieces ── laid_out = rendered? ──▶ TEMPLATE (a conversation)
    the bundle's own prompt ── cut at its question ──▶ before, after ─────────────────▶ TEMPLATE (one question)
    neither                                                                          ──▶ TEMPLATE "{{ .Prompt }}" (raw)

A template is written only where it gives, text for text, what the training's own renderer gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from rankwise.data.device import MARKER
from rankwise.data.example import IMAGE_SLOT, Example, Turn
from rankwise.data.render import Renderer
from rankwise.device.bundle_files import SENTINEL, Prompt
from rankwise.errors import DataError

MODELFILE = "Modelfile"
PICTURE = "[img]"  # in a message, where Ollama puts the picture; before its text where it has none
QUOTES = '"""'
WORDS = ("Be brief.", "why?", "Which of 7\n\n- `a`\n- B", "No", "It is so: {3}.", "水, or\tso")  # lengths differ, too
SYSTEM, FIRST, SECOND, THIRD, ANSWER, REPLY = (f"\ue000{words}\ue001" for words in WORDS)
Talk = tuple[str | None, tuple[str, ...]]
"""A system text and the texts of user and assistant in turn, the user's last."""
TALKS: tuple[Talk, ...] = (
    (None, (FIRST,)),
    (SYSTEM, (FIRST,)),
    (None, (FIRST, ANSWER, SECOND)),
    (SYSTEM, (FIRST, ANSWER, SECOND)),
    (SYSTEM, (FIRST, ANSWER, SECOND, REPLY, THIRD)),
)


@dataclass(frozen=True)
class Pieces:
    """Fixed text of a chat template around messages. system: None for a template that takes none; head: without one."""

    system: tuple[str, str] | None
    head: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    opening: str

    def laid_out(self, talk: Talk) -> str:
        """The prompt, as Ollama makes it of the template."""
        system, texts = talk
        around = (self.user, self.assistant)
        said = "".join(text.join(around[place % 2]) for place, text in enumerate(texts))
        return (system.join(self.system) if system is not None and self.system else self.head) + said + self.opening

    @property
    def template(self) -> str:
        head = literal(self.head)
        if self.system:
            before, after = map(literal, self.system)
            head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{{{{ else }}}}{head}{{{{ end }}}}"
        user, assistant = ("{{ .Content }}".join(map(literal, each)) for each in (self.user, self.assistant))
        return (
            f'{head}{{{{ range .Messages }}}}{{{{ if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}{{{{ end }}}}{literal(self.opening)}'
        )


@dataclass(frozen=True)
class Template:
    """TEMPLATE, and in words how it is used. content: the message that makes the bundle's prompt, None for raw."""

    text: str
    use: str
    content: str | None


CONVERSATION = "Whole conversations, by /api/chat: the template is the training's, text for text."
QUESTION = "One question in one request: the template has no place for earlier turns or another system prompt."
RAW = (
    "The training's prompt cannot be written as a Go template exactly ({why}), so this is none: send prompt.txt, by "
    '/api/generate with "raw": true.'
)


def template_of(example: Example, renderer: Renderer, prompt: Prompt) -> Template:
    """The best of the three that renders `example`, and for conversations the probing ones, as the renderer does."""
    skip = "" if prompt.sent else prompt.begin
    reasons = []
    for make in (conversation_template, question_template):
        try:
            found = make(example, renderer, skip)
        except DataError as error:
            reasons.append(str(error))
            continue
        if QUOTES not in found.text and not found.text.endswith('"'):
            return found
        reasons.append("it cannot be quoted in a Modelfile")
    return Template("{{ .Prompt }}", RAW.format(why=reasons[-1]), None)


def conversation_template(example: Example, renderer: Renderer, skip: str) -> Template:
    """DataError where there is none: sections or raw text, pictures (a template may write their turns otherwise)."""
    if renderer.style != "chat" or example.images or any(turn.heading for turn in example.turns):
        raise DataError("no chat of texts")
    pieces = pieces_of(renderer, skip)
    if pieces is None or pieces.laid_out(talk_of(example)) != whole(example, renderer, skip):
        raise DataError("a template that writes texts by other rules than around them")
    return Template(pieces.template, CONVERSATION, asked(example))


def talk_of(example: Example) -> Talk:
    """DataError where user and assistant do not speak in turn."""
    first, turns = example.turns[0], example.turns[:-1]
    system = first.text if first.role == "system" else None
    said = turns[1:] if system is not None else turns
    if [turn.role for turn in said] != [("user", "assistant")[place % 2] for place in range(len(said))] or not said:
        raise DataError("several turns of one speaker")
    return system, tuple(turn.text for turn in said)


def whole(example: Example, renderer: Renderer, skip: str) -> str:
    return renderer.prompt_text(example, MARKER).removeprefix(skip)


def rendered(renderer: Renderer, talk: Talk, skip: str) -> str:
    system, texts = talk
    turns = [Turn("system", system)] if system is not None else []
    turns += [Turn(("user", "assistant")[place % 2], text) for place, text in enumerate(texts)]
    return whole(Example("probe", "probe", (*turns, Turn("assistant", "."))), renderer, skip)


def pieces_of(renderer: Renderer, skip: str) -> Pieces | None:
    """None where no such pieces give what the template renders, conversation for conversation."""
    systems = takes_system(renderer)
    talks = [talk for talk in TALKS if talk[0] is None or systems]
    try:
        known = {talk: rendered(renderer, talk, skip) for talk in talks}
        first, end = parts(known[TALKS[0]], FIRST)
        start, between, behind, last = parts(known[TALKS[2]], FIRST, ANSWER, SECOND)
        before_system, after_system = parts(known[TALKS[1]], SYSTEM, FIRST)[:2] if systems else ("", behind)
    except DataError:
        return None
    if (first, end) != (start, last):
        return None
    after_user = common_start(end, between)
    before_user = common_end(first, behind, after_system)
    pieces = Pieces(
        system=(before_system, after_system.removesuffix(before_user)) if systems else None,
        head=first.removesuffix(before_user),
        user=(before_user, after_user),
        assistant=(between.removeprefix(after_user), behind.removesuffix(before_user)),
        opening=end.removeprefix(after_user),
    )
    return pieces if all(pieces.laid_out(talk) == text for talk, text in known.items()) else None


def takes_system(renderer: Renderer) -> bool:
    try:
        text = rendered(renderer, TALKS[1], "")
    except DataError:
        return False
    return text.count(SYSTEM) == 1


def parts(text: str, *marks: str) -> list[str]:
    """The text around the marks. DataError where they do not stand in it once each, in this order."""
    found, rest = [], text
    for mark in marks:
        before, there, rest = rest.partition(mark)
        if not there or mark in rest:
            raise DataError("a template that repeats, changes or drops what is said")
        found.append(before)
    return [*found, rest]


def common_start(*texts: str) -> str:
    same = takewhile(lambda chars: len(set(chars)) == 1, zip(*texts, strict=False))
    return "".join(chars[0] for chars in same)


def common_end(*texts: str) -> str:
    return common_start(*(text[::-1] for text in texts))[::-1]


def asked(example: Example) -> str:
    """The last question, as a message of Ollama's."""
    return next(turn.text for turn in reversed(example.turns) if turn.role == "user").replace(IMAGE_SLOT, PICTURE)


def question_template(example: Example, renderer: Renderer, skip: str) -> Template:
    """The example's prompt with its last question as the app's. DataError where the question is not in it once, as it
    is, or decides what stands around it."""
    last = max(place for place, turn in enumerate(example.turns) if turn.role == "user")
    question = example.turns[last].text.replace(IMAGE_SLOT, "").strip()

    def asking(text: str) -> str:
        turn = example.turns[last]
        changed = replace(turn, text=turn.text.replace(question, text) if question else turn.text + text)
        turns = (*example.turns[:last], changed, *example.turns[last + 1 :])
        return whole(replace(example, turns=turns), renderer, skip)

    before, content, after = around(asking(SENTINEL))
    if any(before + content.replace(SENTINEL, text) + after != asking(text) for text in (question, SECOND)):
        raise DataError("a question that decides what stands around it")
    message = content.replace(SENTINEL, question).replace(MARKER, PICTURE)
    return Template(f"{literal(before)}{{{{ .Prompt }}}}{literal(after)}", QUESTION, message)


def around(text: str) -> tuple[str, str, str]:
    """The text before the question and its images, these, and the text after."""
    if text.count(SENTINEL) != 1:
        raise DataError("a template that repeats, changes or drops the question")
    marks = [mark for mark in (SENTINEL, MARKER) if mark in text]
    start = min(text.find(mark) for mark in marks)
    end = max(text.rfind(mark) + len(mark) for mark in marks)
    return text[:start], text[start:end], text[end:]


def literal(text: str) -> str:
    """A text as a Go template writes it out: what opens an action is one."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(
    template: Template, prompt: Prompt, facts: Mapping[str, Any], ends: Iterable[str], system: str | None
) -> str:
    """The whole file. facts: bundle.json's; ends: what ends an answer, as texts; system: the training's own prompt."""
    files = [name for name in (facts["model"], facts["mmproj"]) if name]
    lines = ["# ollama create NAME -f Modelfile        (in this folder)", f"# {template.use}"]
    if template.content is not None and not prompt.takes_input:
        pictures = ', "images": ["BASE64 OF THE PNG"]' if prompt.images else ""
        message = json.dumps(template.content, ensure_ascii=False)
        lines.append(f'# This bundle\'s prompt: {{"role": "user", "content": {message}{pictures}}}')
    if prompt.images:
        lines.append("# Pictures go in as README.md says: made by the app, the device's size, without loss.")
    lines += [*(f"FROM ./{name}" for name in files), f"TEMPLATE {QUOTES}{template.text}{QUOTES}"]
    if system and template.use == CONVERSATION and QUOTES not in system:
        lines.append(f"SYSTEM {QUOTES}{system}{QUOTES}")
    lines += [f"PARAMETER stop {go_text(end)}" for end in ends]
    lines += [
        f"PARAMETER num_predict {facts['max_new_tokens']}",
        f"PARAMETER num_ctx {facts['context']}",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    return "\n".join(lines) + "\n"


def go_text(text: str) -> str:
    return f'"{text}"' if '"' not in text and "\n" not in text else f"{QUOTES}{text}{QUOTES}"


def end_texts(renderer: Renderer) -> Sequence[str]:
    return [renderer.text([token]) for token in renderer.end_ids]
