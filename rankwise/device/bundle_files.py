"""Bundle folder: the files that an app needs to run the model, with a manifest; written and read back.

    export + validation + trained model ── write_bundle ──▶ DIR/
        model.gguf, mmproj.gguf             the files
        Modelfile, clients/                 what asks the model: Ollama, llama.node, llama.rn, Kotlin; its replay
        prompt.txt, prompt.json             what the runtime is sent, the marker where a picture goes
        labels.json, labels.gbnf            the answers that there are, and a grammar of exactly these
        abstain.json, device.json           when to say "unsure"; what is done to a picture
        input.json                          how training made its prompts
        golden/                             inputs with what must come out
        bundle.json                         sha256 of every file

A task without labels has no labels.*, a text model no pictures.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise.data.device import MARKER, DeviceTarget
from rankwise.data.example import IMAGE_SLOT, Example
from rankwise.data.label_task import LabelTask
from rankwise.data.render import Renderer
from rankwise.device.parity.cases import Case
from rankwise.device.parity.reference import Expected
from rankwise.device.scores import Abstention
from rankwise.errors import DataError, VerificationError
from rankwise.evaluate.likelihood import answer_ids
from rankwise.files.atomic import read_object, sha256, write_json, write_text
from rankwise.files.document import Document
from rankwise.files.gguf import GGUFFile
from rankwise.gguf.splitting import SPACES

BUNDLE = Document("bundle.json", "rankwise-bundle/1", "a bundle", "rankwise bundle", ("files",))
PROMPT, PROMPT_JSON, ABSTAIN = "prompt.txt", "prompt.json", "abstain.json"
LABELS, GRAMMAR = "labels.json", "labels.gbnf"
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
    """The prompt common to all samples: a constant where they ask the same, else with a place for the input."""
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
    ids = [tuple(answer_ids(renderer, example, each.name)) for each in task.classes]
    found = [LabelAnswer(one.name, one.definition, given) for one, given in zip(task.classes, ids, strict=True)]
    if len(set(ids)) < len(ids):
        raise VerificationError(f"task {task.name}: two labels have the same token ids; no answer distinguishes them")
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


# --- the parts read back ---------------------------------------------------------------------------------------------


def check_prompt(folder: Path, begin: str, cases: Sequence[Case]) -> None:
    """VerificationError where prompt.txt is not what these cases were asked with. begin: the text of the start token,
    where the runtime puts it."""
    text, facts = (folder / PROMPT).read_text(encoding="utf-8"), read_object(folder / PROMPT_JSON)
    if begin and text.startswith(begin):
        raise VerificationError(f"{folder / PROMPT}: begins with {begin}, which the runtime adds a second time")
    asked = [case.prompt.removeprefix(begin) for case in cases if len(case.images) == facts["images"]]
    before, _, after = text.partition(INPUT)
    fits = [one.startswith(before) and one.endswith(after) if facts["input"] else one == text for one in asked]
    if asked and not (any(fits) if facts["input"] else all(fits)):
        raise VerificationError(f"{folder / PROMPT}: differs from the prompt of the golden vectors: {asked[0]!r}")


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
    """Write the small text files."""
    write_text(folder / PROMPT, prompt.text)
    write_json(folder / PROMPT_JSON, prompt.as_dict())
    if task:
        rows = [{"name": one.name, "definition": one.definition, "ids": list(one.ids)} for one in answers]
        write_json(folder / LABELS, {"task": task.name, "field": task.field, "labels": rows})
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
            raise VerificationError(f"{folder / file.name}: the copy differs from {file}; check the disk")


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> Path:
    """bundle.json: the facts, and size and sha256 of all other files."""
    listed = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != BUNDLE.name)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in listed
    }
    return BUNDLE.write(folder, {**facts, "files": files})


def read_bundle(folder: Path) -> dict[str, Any]:
    """bundle.json. DataError for a folder that is no bundle; VerificationError, naming it, for a file that is missing
    or not the one that was bundled."""
    content = BUNDLE.read(folder)
    for name, facts in content["files"].items():
        path = folder / name
        if not path.is_file():
            raise VerificationError(f"{path}: missing, and {BUNDLE.name} lists it; bundle the model again")
        if sha256(path) != facts["sha256"]:
            raise VerificationError(f"{path}: changed since it was bundled (its sha256 differs); copy it again")
    return content


# --- README.md, for the app's developer ------------------------------------------------------------------------------


def readme(
    facts: Mapping[str, Any],
    prompt: Mapping[str, Any],
    labels: Sequence[str],
    target: DeviceTarget | None,
    unsure: Abstention,
    spaced: bool,
    ollama: str,
) -> str:
    """facts, prompt: bundle.json's and prompt.json's; spaced: answers begin with a space; ollama: what the Modelfile's
    template is for."""
    doubts = ["\n".join(["## Not verified", "", *(f"- {doubt}" for doubt in facts["not_verified"])])]
    parts = [
        running(facts),
        asking(facts, prompt, target),
        answering(labels, unsure, spaced),
        FROM_CODE + ollama,
        REPLAY,
        *(doubts if facts["not_verified"] else []),
    ]
    return "\n\n".join(["# A model for the device", *parts]) + "\n"


def running(facts: Mapping[str, Any]) -> str:
    mmproj = f" --mmproj {facts['mmproj']}" if facts["mmproj"] else ""
    return (
        "`bundle.json` lists every file with its SHA-256.\n\n```bash\n"
        f"llama-server --model {facts['model']}{mmproj} --ctx-size {facts['context']} --parallel 1\n```"
    )


def asking(facts: Mapping[str, Any], prompt: Mapping[str, Any], target: DeviceTarget | None) -> str:
    lines = [
        "## Ask",
        "",
        f"Send `prompt.txt` as it is, byte by byte, special tokens parsed; decode greedily, at most "
        f"{facts['max_new_tokens']} tokens, no repeat penalty. Do not apply a chat template to it: that is done. It is",
        "",
        fenced(prompt["prompt"]),
        "",
        start(prompt["start_token"]),
    ]
    if prompt["input"]:
        lines.append(f"`{prompt['input']}` is where your own text goes.")
    if prompt["marker"] and target:
        lines.append(
            f"`{prompt['marker']}` is where the runtime puts the picture (a server wants its own `media_marker` of "
            "`GET /props` there). Before that, scale the picture (upright, by "
            f"its EXIF note) into a square of {target.image_size} pixels: factor = min({target.image_size} / width, "
            f"{target.image_size} / height) in float32, sizes rounded down, the longer side {target.image_size}; "
            "bilinear without antialiasing; centred on black. Send it without loss (PNG, or raw RGB)."
        )
    return "\n".join(lines)


def fenced(text: str) -> str:
    """A code block that the text cannot end. Whether it ends with a line break is said in words."""
    ticks = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, ticks + 1)
    ending = "with a line break" if text.endswith("\n") else "without a line break"
    return f"{fence}text\n{text.removesuffix(chr(10))}\n{fence}\n\n{ending} at its end ({len(text.encode()):,} bytes)."


def start(token: Mapping[str, str]) -> str:
    if not token["text"]:
        return "No start token goes before it."
    if token["put_by"] == "the prompt":
        return f"It begins with the start token `{token['text']}` itself; the runtime must not add another."
    return f"The runtime puts the start token `{token['text']}` before it."


def answering(labels: Sequence[str], unsure: Abstention, spaced: bool) -> str:
    lines = ["## Take the answer", ""]
    if spaced:
        lines.append(
            "The raw text begins with a space: the answers of training did, and it is part of their first token. Cut "
            "it off after decoding; do not put one at the end of the prompt."
        )
    if labels:
        lines.append(
            f"One of {', '.join(labels)}. `labels.gbnf` is a grammar that admits exactly these, token by token; "
            "`labels.json` has their definitions and ids."
        )
    if unsure.threshold is not None:
        lines.append(
            f'Below a confidence of {unsure.threshold:.4f} say "unsure": above it {unsure.right} of {unsure.answered} '
            f"validated answers were right (at least {unsure.low:.1%} with 95 % confidence; wanted: "
            f"{unsure.min_precision:.0%}), which is {unsure.coverage:.1%} of all. `abstain.json` "
            "says what the confidence is."
        )
    else:
        lines.append(f'No threshold for "unsure" is known: {unsure.why}.')
    return "\n".join(lines)


FROM_CODE = """## From code

`clients/` has about twenty lines each for llama.node (Node.js), llama.rn (React Native) and Android, with this \
bundle's constants; what `device.json` says in Kotlin (`Picture.kt`); programs that run the golden vectors \
(`golden.mjs`, `Golden.kt`); `Modelfile` is for Ollama (`ollama create NAME -f Modelfile`). """
REPLAY = """## Replay the golden vectors

`golden/golden.json` has inputs with what the trained model makes of them in float32: for each case the prompt, the
picture (`*-source.png`) and the device's pixels of it (`*-device.png`, and `sha256_rgb` of the raw bytes R G B, row by
row), the token ids of the whole prompt, the greedy answer with its ids, the likeliest tokens with their natural
log-probabilities at each place of it, and the tolerance: KL in nats that rounding explains.

```bash
rankwise bundle --replay .                                  # llama.cpp on this machine
rankwise bundle --replay . --server http://PHONE:8080       # the phone's
rankwise bundle --replay . --answers phone.jsonl            # what an app has written, its pixels included
```

`clients/golden.mjs` (Node.js) and `clients/Golden.kt` (Android) write such lines, one for each case: `{"case": its id,
"text", "png" (base64, or "sha256_rgb") of the picture as it was sent, "prompt_ids" (-1 where the picture is),
"top_logprobs": [[[id or text, log p], …] at each place], "ms", "build"}`.

The first rung that differs is named, with what to look at; exit code 6. By hand, in this order:

1. scale `*-source.png` as your app does, and compare the raw RGB's SHA-256 with `sha256_rgb`;
2. count the prompt's tokens: `ids` has them all, a picture's included;
3. compare the ids of the text around the picture;
4. compare the log-probabilities of the first answer token; a difference below `margin` nats is no difference;
5. compare the text."""
