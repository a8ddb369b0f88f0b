"""A bundle in words: its README for the app's developer, and the rungs of a replay for the terminal."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.device import DeviceTarget
from rankwise.ship.abstain import Abstention
from rankwise.ship.parity.ladder import Ladder
from rankwise.ship.parity.rung import unmeasured


def ladder_lines(ladder: Ladder) -> list[str]:
    """One line for each rung, why one is not measured, and why the first broken one is broken."""
    width = max(len(rung.name) for rung in ladder.rungs)
    lines = [f"  {rung.name.ljust(width)}  {rung.said}" for rung in ladder.rungs]
    lines += [f"  {line}" for line in unmeasured(ladder.as_dict()["rungs"])]
    broken = ladder.first_broken
    return [*lines, f"  first to differ: {broken.name}: {broken.why}"] if broken else lines


@dataclass(frozen=True)
class Told:
    """What the README tells. facts, prompt: bundle.json's and prompt.json's; spaced: answers begin with a space;
    ollama: what the Modelfile's template is for."""

    facts: Mapping[str, Any]
    prompt: Mapping[str, Any]
    labels: Sequence[str]
    target: DeviceTarget | None
    unsure: Abstention
    spaced: bool
    ollama: str


def readme(told: Told) -> str:
    """README.md of the bundle."""
    parts = [
        running(told.facts),
        asking(told.facts, told.prompt, told.target),
        answering(told.labels, told.unsure, told.spaced),
        from_code(told.ollama),
        REPLAY,
        *doubts(told.facts),
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


def from_code(ollama: str) -> str:
    return (
        "## From code\n\n`clients/` has about twenty lines each for llama.node (Node.js), llama.rn (React Native) and "
        "Android, with this bundle's constants; `Modelfile` is for Ollama (`ollama create NAME -f Modelfile`). "
        f"{ollama}"
    )


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


REPLAY = """## Replay the golden vectors

`golden/golden.json` has inputs with what the trained model makes of them in float32: for each case the prompt, the
picture (`*-source.png`) and the device's pixels of it (`*-device.png`, and `sha256_rgb` of the raw bytes R G B, row by
row), the token ids of the whole prompt, the greedy answer with its ids, the likeliest tokens with their natural
log-probabilities at each place of it, and the tolerance: KL in nats that rounding explains.

```bash
rankwise bundle --replay .                                  # llama.cpp on this machine
rankwise bundle --replay . --server http://PHONE:8080       # the phone's
```

The first rung that differs is named, with what to look at; exit code 6. By hand, in this order:

1. scale `*-source.png` as your app does, and compare the raw RGB's SHA-256 with `sha256_rgb`;
2. count the prompt's tokens: `ids` has them all, a picture's included;
3. compare the ids of the text around the picture;
4. compare the log-probabilities of the first answer token; a difference below `margin` nats is no difference;
5. compare the text."""


def doubts(facts: Mapping[str, Any]) -> list[str]:
    if not facts["not_verified"]:
        return []
    return ["\n".join(["## Not verified", "", *(f"- {doubt}" for doubt in facts["not_verified"])])]
