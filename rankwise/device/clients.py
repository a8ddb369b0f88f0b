"""Client code of a bundle for llama.node (Node.js), llama.rn (React Native) and Android, and what replays its vectors.

    Prompt, end tokens, bundle.json ── client_files ──▶ clients/llama.node.mjs, llama.rn.ts, Ask.kt: constants inside
    client_files/ ────────────── copied ──────────────▶ clients/golden.mjs, Picture.kt, Golden.kt: they read the bundle

golden.mjs and Golden.kt put the golden vectors to the same code and write the lines that `bundle --replay --answers`
reads; Picture.kt does to a photo what device.json says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.data.device import MARKER
from rankwise.device.bundle_files import GRAMMAR, INPUT, Prompt

FOLDER = "clients"
STATIC = Path(__file__).parent / "client_files"
UNRUN = "Not run by Rankwise on a device."


@dataclass(frozen=True)
class ClientInputs:
    """Inputs of a client's code. grammar: whether labels.gbnf is there."""

    prompt: Prompt
    ends: Sequence[str]
    facts: Mapping[str, Any]
    grammar: bool

    @property
    def takes(self) -> list[str]:
        """Arguments of a client, by name."""
        return [*(["picture"] if self.prompt.images else []), *(["input"] if self.prompt.takes_input else [])]


def client_files(asking: ClientInputs) -> dict[str, str]:
    """Name in the bundle → content."""
    return {
        f"{FOLDER}/llama.node.mjs": llama_node(asking),
        f"{FOLDER}/llama.rn.ts": llama_rn(asking),
        f"{FOLDER}/Ask.kt": kotlin(asking),
        **{f"{FOLDER}/{file.name}": file.read_text(encoding="utf-8") for file in sorted(STATIC.iterdir())},
    }


def javascript_constants(asking: ClientInputs) -> list[str]:
    return [f"const PROMPT = {quoted(asking.prompt.text)}", f"const STOP = {quoted(list(asking.ends))}"]


def settings(asking: ClientInputs, model: str, mmproj: str, grammar: str) -> tuple[list[str], list[str], list[str]]:
    """Lines of llama.node and llama.rn, whose interfaces are one: loading, seeing, asking."""
    facts = asking.facts
    load = [f"  model: {model},", f"  n_ctx: {facts['context']},"]
    see = [f"await context.initMultimodal({{ path: {mmproj}, use_gpu: false }})"] if facts["mmproj"] else []
    prompt = f"PROMPT.replace({quoted(INPUT)}, () => input)" if asking.prompt.takes_input else "PROMPT"
    ask = [
        f"  prompt: {prompt},",
        *(["  media_paths: [picture],"] if asking.prompt.images else []),
        *([f"  grammar: {grammar},"] if asking.grammar else []),
        "  ...GREEDY,",
    ]
    return load, see, ask


def greedy(asking: ClientInputs) -> str:
    """llama.node's and llama.rn's own defaults are others, XTC among them."""
    plain = "temperature: 0, top_k: 1, penalty_repeat: 1, xtc_probability: 0, dry_multiplier: 0"
    return f"const GREEDY = {{ n_predict: {asking.facts['max_new_tokens']}, {plain}, stop: STOP }}"


def llama_node(asking: ClientInputs) -> str:
    takes = asking.takes
    arguments = " ".join({"picture": "PICTURE.png", "input": '"YOUR TEXT"'}[name] for name in takes)
    model, mmproj = (f"file({quoted(asking.facts[name])})" for name in ("model", "mmproj"))
    load, see, ask = settings(asking, model, mmproj, f"readFileSync(file({quoted(GRAMMAR)}), 'utf8')")
    lines = [
        f"// npm install @fugood/llama.node && node {FOLDER}/llama.node.mjs {arguments}".rstrip(),
        f"import {{ {'readFileSync, ' * asking.grammar}realpathSync }} from 'node:fs'",
        "import { fileURLToPath } from 'node:url'",
        "import { loadModel } from '@fugood/llama.node'",
        "",
        *javascript_constants(asking),
        "export " + greedy(asking),
        "export const file = (name) => fileURLToPath(new URL(`../${name}`, import.meta.url))",
        "",
        "export async function load() {",
        "  const context = await loadModel({",
        *(f"  {line}" for line in [*load, "})", *see]),
        "  return context",
        "}",
        "",
        "export const context = await load()",
        "",
        f"export async function ask({', '.join(takes)}) {{",
        "  const { text } = await context.completion({",
        *(f"  {line}" for line in ask),
        "  })",
        "  return text.trim()",
        "}",
        "",
        "if (realpathSync(process.argv[1]) === fileURLToPath(import.meta.url)) {",
        "  console.log(await ask(...process.argv.slice(2)))",
        "  process.exit()",
        "}",
    ]
    return "\n".join(lines) + "\n"


def llama_rn(asking: ClientInputs) -> str:
    arguments = ["folder: string", *(f"{name}: string" for name in asking.takes)]
    arguments += ["grammar: string"] if asking.grammar else []
    model, projector = (f"`${{folder}}/{asking.facts[name]}`" for name in ("model", "mmproj"))
    load, see, ask = settings(asking, model, projector, "grammar")
    body = ["const context = await initLlama({", *load, "  ctx_shift: false,", "})", *see]
    body += ["const { text } = await context.completion({", *ask, "})", "await context.release()"]
    told = f", grammar: the text of {GRAMMAR}" if asking.grammar else ""
    lines = [
        "// npm install llama.rn. Not run by Rankwise: it needs a device. From llama.node.mjs, which is, it differs in",
        f"// loading. folder: where the app has put the bundle{told}.",
        "import { initLlama } from 'llama.rn'",
        "",
        *javascript_constants(asking),
        greedy(asking),
        "",
        f"export async function ask({', '.join(arguments)}): Promise<string> {{",
        *(f"  {line}" for line in body),
        "  return text.trim()",
        "}",
    ]
    return "\n".join(lines) + "\n"


def kotlin(asking: ClientInputs) -> str:
    prompt = asking.prompt
    arguments = [*(["picture: ByteArray"] if prompt.images else []), *(["input: String"] if prompt.takes_input else [])]
    arguments += ["grammar: String"] if asking.grammar else []
    how = {"prompt": "prompt", "n_predict": asking.facts["max_new_tokens"], "temperature": 0, "repeat_penalty": 1}
    how |= {"stop": "JSONArray(STOP)"} | ({"grammar": "grammar"} if asking.grammar else {})
    put = [f'.put("{name}", {value})' for name, value in how.items()]
    lines = [
        "// Android, against a llama-server on the phone or in its network (README.md has its command). Call it off",
        f"// the main thread.{' picture: png(square(photo, SIZE)) of Picture.kt.' * bool(prompt.images)} {UNRUN}",
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
        "fun post(url: String, body: JSONObject): String {",
        "    val connection = URL(url).openConnection() as HttpURLConnection",
        "    connection.doOutput = true",
        '    connection.setRequestProperty("Content-Type", "application/json")',
        "    connection.outputStream.use { it.write(body.toString().toByteArray()) }",
        "    return connection.inputStream.bufferedReader().use { it.readText() }",
        "}",
    ]
    return "\n".join(lines) + "\n"


def kotlin_prompt(prompt: Prompt) -> list[str]:
    """A server has a marker of its own, which its /props names."""
    put = f".replace({kotlin_text(INPUT)}, input)" if prompt.takes_input else ""
    if not prompt.images:
        return [f"    val prompt = PROMPT{put}"]
    return [
        '    val marker = JSONObject(URL("$server/props").readText()).getString("media_marker")',
        f'    val prompt = JSONObject().put("prompt_string", PROMPT.replace({kotlin_text(MARKER)}, marker){put})',
        '        .put("multimodal_data", JSONArray(listOf(Base64.encodeToString(picture, Base64.NO_WRAP))))',
    ]


def quoted(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def kotlin_text(text: str) -> str:
    """A Kotlin string: as JSON writes it, but for templates, which begin with a dollar sign."""
    return quoted(text).replace("$", "\\$").replace("\\f", "\\u000c")
