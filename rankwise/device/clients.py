"""Twenty lines each that ask a bundle's model: llama.node (Node.js), llama.rn (React Native), Kotlin (Android).

    Prompt, end tokens, bundle.json ── client_files ──▶ clients/llama.node.mjs, clients/llama.rn.ts, clients/Ask.kt

All constants are written in; pictures are to be prepared as device.json says before they are handed over.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.data.device import MARKER
from rankwise.device.bundle_files import GRAMMAR, INPUT, Prompt

FOLDER = "clients"


@dataclass(frozen=True)
class Asking:
    """What a client has to know. grammar: whether labels.gbnf is there."""

    prompt: Prompt
    ends: Sequence[str]
    facts: Mapping[str, Any]
    grammar: bool

    @property
    def takes(self) -> list[str]:
        """Arguments of a client, by name."""
        return [*(["picture"] if self.prompt.images else []), *(["input"] if self.prompt.takes_input else [])]


def client_files(asking: Asking) -> dict[str, str]:
    """Name in the bundle → content."""
    return {
        f"{FOLDER}/llama.node.mjs": llama_node(asking),
        f"{FOLDER}/llama.rn.ts": llama_rn(asking),
        f"{FOLDER}/Ask.kt": kotlin(asking),
    }


def javascript_constants(asking: Asking) -> list[str]:
    return [f"const PROMPT = {quoted(asking.prompt.text)}", f"const STOP = {quoted(list(asking.ends))}"]


def settings(asking: Asking, model: str, mmproj: str, grammar: str) -> tuple[list[str], list[str], list[str]]:
    """Lines of llama.node and llama.rn, whose interfaces are one: loading, seeing, asking."""
    facts = asking.facts
    load = [f"  model: {model},", f"  n_ctx: {facts['context']},"]
    see = [f"await context.initMultimodal({{ path: {mmproj}, use_gpu: false }})"] if facts["mmproj"] else []
    prompt = f"PROMPT.replace({quoted(INPUT)}, () => input)" if asking.prompt.takes_input else "PROMPT"
    ask = [
        f"  prompt: {prompt},",
        *(["  media_paths: [picture],"] if asking.prompt.images else []),
        f"  n_predict: {facts['max_new_tokens']}, temperature: 0, top_k: 1, penalty_repeat: 1, stop: STOP,",
        *([f"  grammar: {grammar},"] if asking.grammar else []),
    ]
    return load, see, ask


def llama_node(asking: Asking) -> str:
    takes = asking.takes
    arguments = " ".join({"picture": "PICTURE.png", "input": '"YOUR TEXT"'}[name] for name in takes)
    load, see, ask = settings(asking, f"file({quoted(asking.facts['model'])})", mmproj(asking), text_of("file"))
    lines = [
        f"// npm install @fugood/llama.node && node {FOLDER}/llama.node.mjs {arguments}".rstrip(),
        *(["import { readFileSync } from 'node:fs'"] if asking.grammar else []),
        "import { fileURLToPath } from 'node:url'",
        "import { loadModel } from '@fugood/llama.node'",
        "",
        *javascript_constants(asking),
        *([f"const [{', '.join(takes)}] = process.argv.slice(2)"] if takes else []),
        "const file = (name) => fileURLToPath(new URL(`../${name}`, import.meta.url))",
        "",
        "const context = await loadModel({",
        *load,
        "})",
        *see,
        "const { text } = await context.completion({",
        *ask,
        "})",
        "console.log(text.trim())",
        "await context.release()",
    ]
    return "\n".join(lines) + "\n"


def mmproj(asking: Asking) -> str:
    return f"file({quoted(asking.facts['mmproj'])})"


def text_of(file: str) -> str:
    return f"readFileSync({file}({quoted(GRAMMAR)}), 'utf8')"


def llama_rn(asking: Asking) -> str:
    arguments = ["folder: string", *(f"{name}: string" for name in asking.takes)]
    arguments += ["grammar: string"] if asking.grammar else []
    model, projector = (f"`${{folder}}/{asking.facts[name]}`" for name in ("model", "mmproj"))
    load, see, ask = settings(asking, model, projector, "grammar")
    told = f", grammar: the text of {GRAMMAR}" if asking.grammar else ""
    lines = [
        "// npm install llama.rn. Not run by Rankwise: it needs a device. From llama.node.mjs, which is, it differs in",
        f"// loading. folder: where the app has put the bundle{told}.",
        "import { initLlama } from 'llama.rn'",
        "",
        *javascript_constants(asking),
        "",
        f"export async function ask({', '.join(arguments)}): Promise<string> {{",
        *indented(["const context = await initLlama({", *load, "  ctx_shift: false,", "})", *see]),
        *indented(["const { text } = await context.completion({", *ask, "})", "await context.release()"]),
        "  return text.trim()",
        "}",
    ]
    return "\n".join(lines) + "\n"


def indented(lines: Sequence[str]) -> list[str]:
    return [f"  {line}" for line in lines]


def kotlin(asking: Asking) -> str:
    prompt = asking.prompt
    arguments = [*(["png: ByteArray"] if prompt.images else []), *(["input: String"] if prompt.takes_input else [])]
    arguments += ["grammar: String"] if asking.grammar else []
    put = [f'.put("{name}", {value})' for name, value in kotlin_settings(asking).items()]
    lines = [
        "// Android, against a llama-server on the phone or in its network (README.md has its command). Call it off",
        "// the main thread. Not run by Rankwise: it needs a device; its constants are checked against the bundle.",
        "import android.util.Base64",
        "import java.net.HttpURLConnection",
        "import java.net.URL",
        "import org.json.JSONArray",
        "import org.json.JSONObject",
        "",
        f"const val PROMPT = {kotlin_text(prompt.text)}",
        f"val STOP = listOf({', '.join(kotlin_text(end) for end in asking.ends)})",
        "",
        f"fun ask({', '.join([*arguments, 'server: String = ' + quoted('http://127.0.0.1:8080')])}): String {{",
        *kotlin_prompt(prompt),
        "    val body = JSONObject()" + put[0],
        *(f"        {line}" for line in put[1:]),
        '    val answer = post("$server/completion", body)',
        '    return JSONObject(answer).getString("content").trim()',
        "}",
        "",
        "private fun post(url: String, body: JSONObject): String {",
        "    val connection = URL(url).openConnection() as HttpURLConnection",
        "    connection.doOutput = true",
        '    connection.setRequestProperty("Content-Type", "application/json")',
        "    connection.outputStream.use { it.write(body.toString().toByteArray()) }",
        "    return connection.inputStream.bufferedReader().use { it.readText() }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def kotlin_settings(asking: Asking) -> dict[str, str]:
    grammar = {"grammar": "grammar"} if asking.grammar else {}
    return {
        "prompt": "prompt",
        "n_predict": str(asking.facts["max_new_tokens"]),
        "temperature": "0",
        "repeat_penalty": "1",
        "stop": "JSONArray(STOP)",
        **grammar,
    }


def kotlin_prompt(prompt: Prompt) -> list[str]:
    """A server has a marker of its own, which its /props names."""
    put = f".replace({kotlin_text(INPUT)}, input)" if prompt.takes_input else ""
    if not prompt.images:
        return [f"    val prompt = PROMPT{put}"]
    return [
        '    val marker = JSONObject(URL("$server/props").readText()).getString("media_marker")',
        f'    val prompt = JSONObject().put("prompt_string", PROMPT.replace({kotlin_text(MARKER)}, marker){put})',
        '        .put("multimodal_data", JSONArray(listOf(Base64.encodeToString(png, Base64.NO_WRAP))))',
    ]


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def kotlin_text(text: str) -> str:
    """A Kotlin string: as JSON writes it, but for templates, which begin with a dollar sign."""
    return quoted(text).replace("$", "\\$").replace("\\f", "\\u000c")
