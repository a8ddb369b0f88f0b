"""What an app needs to run the model, in one folder that says what is in it; and the folder read back.

    export + validation + trained model ── write_bundle ──▶ DIR/
        model.gguf, mmproj.gguf             the files
        Modelfile, clients/                 what asks the model: Ollama, llama.node, llama.rn, Kotlin
        prompt.txt, prompt.json             what the runtime is sent, the marker where a picture goes
        labels.json, labels.gbnf            the answers that there are, and a grammar of exactly these
        abstain.json, device.json           when to say "unsure"; what is done to a picture
        input.json                          how training made its prompts
        golden/                             inputs with what must come out
        bundle.json                         sha256 of every file

A task without labels has no labels.*, a text model no pictures.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.data.device import MARKER, DeviceTarget
from rankwise.data.example import IMAGE_SLOT, Example
from rankwise.data.label_task import LabelTask
from rankwise.data.render import Renderer
from rankwise.errors import DataError, VerificationError
from rankwise.evaluate.likelihood import answer_ids
from rankwise.files.atomic import read_document, read_object, sha256, write_json, write_text
from rankwise.gguf.reading import GGUFFile
from rankwise.gguf.vocabulary import SPACES
from rankwise.ship.parity.cases import Case
from rankwise.ship.parity.reference import Expected

FILE, FORMAT = "bundle.json", "rankwise-bundle/1"
PROMPT, PROMPT_JSON, LABELS, GRAMMAR, ABSTAIN = (
    "prompt.txt",
    "prompt.json",
    "labels.json",
    "labels.gbnf",
    "abstain.json",
)
INPUT = "{input}"
SENTINEL = "\ue000input\ue001"  # private use: no template and no tokenizer treats it specially
ADD_BOS, BOS = "tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id"


# --- the prompt ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """text: what the runtime is sent, `<__media__>` where a picture goes, `{input}` where the app's own text goes if
    prompts differ. begin: text of the start token. sent: whether it stands in `text`, or the runtime puts it there."""

    text: str
    images: int
    begin: str
    sent: bool

    @property
    def takes_input(self) -> bool:
        return INPUT in self.text

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt": self.text,
            "marker": MARKER if self.images else None,
            "images": self.images,
            "input": INPUT if self.takes_input else None,
            "start_token": {"text": self.begin, "put_by": "the prompt" if self.sent else "the runtime"},
            "special_tokens": "parsed: names such as <|im_start|> are one token each, never text",
        }


def prompt_of(examples: Sequence[Example], renderer: Renderer, file: GGUFFile) -> Prompt:
    """The prompt that all samples share: a constant where they ask the same, else with a place for the input."""
    texts = {renderer.prompt_text(example, MARKER) for example in examples}
    whole = texts.pop() if len(texts) == 1 else with_input(examples[0], renderer)
    begin = begin_text(file)
    own = bool(begin) and whole.startswith(begin)
    adds = bool(file.metadata.get(ADD_BOS, False))
    images = len(examples[0].images) if renderer.sight else 0
    return Prompt(whole.removeprefix(begin) if own and adds else whole, images, begin, own and not adds)


def with_input(example: Example, renderer: Renderer) -> str:
    """The prompt of a sample whose last question is the app's."""
    place = max(number for number, turn in enumerate(example.turns) if turn.role == "user")
    slots = IMAGE_SLOT * example.turns[place].text.count(IMAGE_SLOT)
    asked = replace(example.turns[place], text=f"{slots}\n{SENTINEL}" if slots else SENTINEL)
    turns = (*example.turns[:place], asked, *example.turns[place + 1 :])
    text = renderer.prompt_text(replace(example, turns=turns), MARKER)
    if text.count(SENTINEL) != 1:
        raise DataError(f"sample {example.id}: its prompt does not hold the question once, so an app cannot build it")
    return text.replace(SENTINEL, INPUT)


def begin_text(file: GGUFFile) -> str:
    place, tokens = file.metadata.get(BOS), file.metadata.get("tokenizer.ggml.tokens", ())
    return str(tokens[place]) if isinstance(place, int) and place < len(tokens) else ""


def answers_spaced(example: Example, renderer: Renderer) -> bool:
    """Whether the raw text of an answer, as training taught it, begins with a space."""
    first = answer_ids(renderer, example, example.answer)[0]
    return str(renderer.tokenizer.convert_ids_to_tokens(first)).startswith(SPACES)


# --- labels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelAnswer:
    """One class as the model says it. ids: with the end token last."""

    name: str
    definition: str
    ids: tuple[int, ...]


def label_answers(task: LabelTask, example: Example, renderer: Renderer) -> list[LabelAnswer]:
    """The answers that training taught, label by label. VerificationError where two are the same ids."""
    found = [
        LabelAnswer(each.name, each.definition, tuple(answer_ids(renderer, example, each.name)))
        for each in task.classes
    ]
    if len({one.ids for one in found}) < len(found):
        raise VerificationError(f"task {task.name}: two labels are the same tokens, so no answer tells them apart")
    return found


def grammar(answers: Sequence[LabelAnswer], end_ids: Sequence[int]) -> str:
    """GBNF by token ids: each label in the one way that training wrote it, its leading space included. The end token is
    no part of a grammar: where it is through, llama.cpp lets in nothing else."""
    lines = ["# Exactly the labels, token by token, as the model was trained to say them; the end token follows."]
    names = []
    for number, one in enumerate(answers):
        inner = [token for token in one.ids if token not in end_ids]
        names.append(f"label-{number}")
        lines += [f"# {one.name}", f"label-{number} ::= " + " ".join(f"<[{token}]>" for token in inner)]
    return "\n".join(["root ::= " + " | ".join(names), *lines]) + "\n"


def labels_content(task: LabelTask, answers: Sequence[LabelAnswer]) -> dict[str, Any]:
    rows = [{"name": one.name, "definition": one.definition, "ids": list(one.ids)} for one in answers]
    return {"task": task.name, "field": task.field, "labels": rows}


# --- the parts read back ---------------------------------------------------------------------------------------------


def check_prompt(folder: Path, begin: str, cases: Sequence[Case]) -> None:
    """VerificationError where prompt.txt is not what these cases were asked with. begin: the text of the start token,
    where the runtime puts it."""
    text, facts = (folder / PROMPT).read_text(encoding="utf-8"), read_object(folder / PROMPT_JSON)
    if begin and text.startswith(begin):
        raise VerificationError(f"{folder / PROMPT}: begins with {begin}, which the runtime puts before it once more")
    asked = [case.prompt.removeprefix(begin) for case in cases if len(case.images) == facts["images"]]
    before, _, after = text.partition(INPUT)
    fits = [one.startswith(before) and one.endswith(after) if facts["input"] else one == text for one in asked]
    if asked and not (any(fits) if facts["input"] else all(fits)):
        raise VerificationError(f"{folder / PROMPT}: not what the golden vectors were asked with: {asked[0]!r}")


def read_labels(folder: Path, known: Iterable[Expected]) -> set[tuple[int, ...]]:
    """The ids of all labels, without end tokens. VerificationError where the trained model says one with other ids."""
    ends = {token for expected in known for token in expected.end_ids}
    rows = {row["name"]: spoken(row["ids"], ends) for row in read_object(folder / LABELS)["labels"]}
    for expected in known:
        said = spoken(expected.answer, ends)
        if rows.get(expected.text.strip(), said) != said:
            raise VerificationError(
                f"{folder / LABELS}: {expected.text.strip()!r} is {list(rows[expected.text.strip()])}, and the trained "
                f"model says it as {list(said)}"
            )
    return set(rows.values())


def spoken(ids: Iterable[int], ends: Collection[int]) -> tuple[int, ...]:
    return tuple(token for token in ids if token not in ends)


# --- the folder ------------------------------------------------------------------------------------------------------


def write_parts(
    folder: Path,
    prompt: Prompt,
    target: DeviceTarget | None,
    task: LabelTask | None,
    answers: Sequence[LabelAnswer],
    end_ids: Sequence[int],
    abstain: Mapping[str, Any] | None,
) -> None:
    """Everything that is small text."""
    write_text(folder / PROMPT, prompt.text)
    write_json(folder / PROMPT_JSON, prompt.as_dict())
    if task:
        write_json(folder / LABELS, labels_content(task, answers))
        write_text(folder / GRAMMAR, grammar(answers, end_ids))
    if abstain:
        write_json(folder / ABSTAIN, abstain)
    if target:
        target.save(folder)


def copy_model(folder: Path, files: Sequence[Path]) -> None:
    """The GGUF files under their own names. VerificationError where a copy is not the original."""
    for file in files:
        shutil.copyfile(file, folder / file.name)
        if sha256(folder / file.name) != sha256(file):
            raise VerificationError(f"{folder / file.name}: not what {file} is; is the disk sound?")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> Path:
    """bundle.json: the facts, and size and sha256 of all other files."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != FILE)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in listed
    }
    return write_json(folder / FILE, {"format": FORMAT, **facts, "files": files})


def read_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json. DataError for a folder that is no bundle; VerificationError, naming it, for a file that is missing
    or not the one that was bundled."""
    if not (folder / FILE).is_file():
        raise DataError(f"{folder}: no {FILE}; `rankwise bundle EXPORT -o {folder}` makes one")
    content = read_document(folder / FILE, FORMAT, "a bundle")
    for name, facts in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path}: missing, and {FILE} lists it; bundle the model again")
        if sha256(path) != facts["sha256"]:
            raise VerificationError(f"{path}: not the file that was bundled (its sha256 differs); copy it again")
    return content
