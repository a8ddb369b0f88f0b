"""Laws of what a bundle gives to other runtimes: Ollama's template is the training's prompt, constants the bundle's."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from go_template import executed
from test_templates import FAMILIES, SYSTEM, TALKS, pytestmark, renderer_of, tokenizer_of

from rankwise.data.device import MARKER
from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.device.bundle_files import INPUT, Prompt
from rankwise.device.clients import STATIC, ClientInputs, client_files
from rankwise.device.modelfile import CONVERSATION, QUESTION, Template, end_texts, modelfile, template_of
from rankwise.errors import DataError

__all__ = ["pytestmark"]
PROMPT = Prompt("", 0, "", sent=True)
FACTS = {"model": "m-q8_0.gguf", "mmproj": None, "max_new_tokens": 32, "context": 512}
LONG = (*SYSTEM[:-1], Turn("assistant", "Here."), Turn("user", "And  then?\n\n- a\n- b"), Turn("assistant", "x"))


def sample(*turns: Turn) -> Example:
    return Example("x", "x", turns)


def as_ollama(template: Template, example: Example) -> str:
    """The prompt that Ollama makes of a conversation."""
    system = "".join(turn.text for turn in example.turns if turn.role == "system")
    messages = [(turn.role, turn.text) for turn in example.turns[:-1]]
    return executed(template.text, system=system, messages=messages, prompt=messages[-1][1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_real_chat_template_is_a_go_template(name: str) -> None:
    renderer, single = renderer_of(name), sample(*TALKS["single"])
    template = template_of(single, renderer, PROMPT)
    assert template.use == CONVERSATION and template.content == "Who?"
    for turns in (TALKS["single"], TALKS["multi"], SYSTEM, LONG):
        try:
            wanted = renderer.prompt_text(sample(*turns), MARKER)
        except DataError:
            assert not FAMILIES[name].system and turns[0].role == "system"
            continue
        assert as_ollama(template, sample(*turns)) == wanted


def test_the_runtimes_start_token_is_not_in_the_template() -> None:
    renderer = renderer_of("llama3")
    template = template_of(sample(*TALKS["single"]), renderer, Prompt("", 0, "<s>", sent=False))
    assert "<s>" + as_ollama(template, sample(*SYSTEM)) == renderer.prompt_text(sample(*SYSTEM), MARKER)


@pytest.mark.parametrize("style", ["sections", "raw"])
def test_sections_and_raw_texts_take_one_question(style: str) -> None:
    renderer = Renderer(tokenizer_of(""), style=style)
    turns = (
        Turn("user", "Be brief.", "Instruction"),
        Turn("user", "Who is {{ it }}?", "Input"),
        Turn("assistant", "I."),
    )
    template = template_of(sample(*turns), renderer, PROMPT)
    assert template.use == QUESTION and template.content == "Who is {{ it }}?"
    other = sample(turns[0], replace(turns[1], text="Where?"), turns[2])
    assert executed(template.text, prompt="Where?") == renderer.prompt_text(other, MARKER)


def test_what_opens_an_action_in_a_template_is_text() -> None:
    renderer = Renderer(tokenizer_of(""), style="sections")
    turns = (Turn("user", "Fill in {{ name }}.", "Instruction"), Turn("user", "a", "Input"), Turn("assistant", "b"))
    template = template_of(sample(*turns), renderer, PROMPT)
    assert executed(template.text, prompt="a") == renderer.prompt_text(sample(*turns), MARKER)


COUNTED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }} ({{ m.content | length }})</s>{% endfor %}<|assistant|>"
)


def test_a_template_that_looks_into_a_text_is_none_of_ollamas() -> None:
    renderer = Renderer(tokenizer_of(COUNTED), style="chat")
    template = template_of(sample(Turn("user", "abc"), Turn("assistant", "b")), renderer, PROMPT)
    file = modelfile(template, PROMPT, FACTS, ["</s>"], None)
    assert template.text == "{{ .Prompt }}" and "cannot be written as a Go template exactly" in file
    assert '"raw": true' in file


def test_a_modelfile_ends_answers_as_training_did() -> None:
    renderer = renderer_of("qwen2_5")
    template = template_of(sample(*TALKS["single"]), renderer, PROMPT)
    facts = FACTS | {"mmproj": "mmproj-m.gguf"}
    file = modelfile(template, PROMPT, facts, end_texts(renderer), "Be brief.")
    assert re.findall(r"^FROM (.*)$", file, re.MULTILINE) == ["./m-q8_0.gguf", "./mmproj-m.gguf"]
    assert re.findall(r'^PARAMETER stop "(.*)"$', file, re.MULTILINE) == ["<|im_end|>", "</s>"]
    assert {"PARAMETER num_predict 32", "PARAMETER temperature 0", 'SYSTEM """Be brief."""'} <= set(file.splitlines())
    assert f'TEMPLATE """{template.text}"""' in file


# --- clients -------------------------------------------------------------------------------------------------------


def constants(name: str, content: str) -> tuple[str, list[str]]:
    """PROMPT and STOP, read as the language does."""
    prompt = re.search(r'PROMPT = (".*")$', content, re.MULTILINE)
    stop = re.search(r"STOP = (?:listOf\(|\[)(.*)[\])]$", content, re.MULTILINE)
    assert prompt and stop
    written = [prompt[1], f"[{stop[1]}]"]
    if name.endswith(".kt"):
        assert not any(re.search(r"(?<!\\)\$", text) for text in written), "a dollar sign begins a template"
        written = [text.replace("\\$", "$") for text in written]
    return json.loads(written[0]), json.loads(written[1])


def asking(images: int, takes_input: bool, grammar: bool) -> ClientInputs:
    text = f'<|im_start|>User:{MARKER * images}Is "$x" \\ 5 € or\n水?{INPUT * takes_input}<|im_end|>\nAssistant:'
    facts: dict[str, Any] = FACTS | {"mmproj": "mmproj-m.gguf" if images else None}
    return ClientInputs(Prompt(text, images, "", sent=True), ["<|im_end|>", "$</s>"], facts, grammar)


STRICT = "--noEmit --strict --skipLibCheck --target es2022 --module esnext --moduleResolution bundler"


@pytest.mark.slow
def test_what_is_given_to_llama_rn_is_what_it_declares(tmp_path: Path) -> None:
    """The client's calls, checked by TypeScript against the package's own declarations; and that it is a check."""
    modules = Path(os.environ.get("RANKWISE_NODE_MODULES") or "nowhere")
    compiler = modules.resolve() / "typescript" / "bin" / "tsc"
    if not (modules / "llama.rn").is_dir() or not compiler.is_file() or not shutil.which("node"):
        pytest.skip("needs node, and RANKWISE_NODE_MODULES: a node_modules folder that has llama.rn and typescript")
    (tmp_path / "node_modules").symlink_to(modules.resolve())

    def checked(**files: str) -> str:
        for name, content in files.items():
            (tmp_path / f"{name}.ts").write_text(content, encoding="utf-8")
        line = ["node", str(compiler), *STRICT.split(), *(f"{name}.ts" for name in files)]
        return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True).stdout

    options = itertools.product([0, 1], [False, True], [False, True])
    clients = {f"client{n}": client_files(asking(*one))["clients/llama.rn.ts"] for n, one in enumerate(options)}
    assert checked(**clients) == ""
    assert "'xtc_probabilty' does not exist" in checked(
        other=clients["client0"].replace("...GREEDY", "xtc_probabilty: 0, ...GREEDY")
    )


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("takes_input", [False, True])
@pytest.mark.parametrize("grammar", [False, True])
def test_clients_have_the_bundles_constants(images: int, takes_input: bool, grammar: bool) -> None:
    given = asking(images, takes_input, grammar)
    text, files = given.prompt.text, client_files(given)
    copied = {f"clients/{file.name}" for file in STATIC.iterdir()}
    assert len(copied) == 3 and copied < set(files) and len(files) == 6
    for name, content in files.items():
        if name in copied:
            continue
        assert constants(name, content) == (text, ["<|im_end|>", "$</s>"])
        assert ("32" in content) and (("grammar" in content) is grammar)
        assert ("input: String" in content or "=> input)" in content) is takes_input, name
        assert ("mmproj-m.gguf" in content) is bool(images and not name.endswith(".kt")), name
        if not name.endswith(".mjs"):
            assert "Not run by Rankwise" in content.split("import ")[0]
