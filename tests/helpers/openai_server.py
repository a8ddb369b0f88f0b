"""An OpenAI-compatible server in this process over a transformers model, and what can be wrong in it.

    with Loopback(model, tokenizer) as server:                  # server.url: http://127.0.0.1:…/v1
    Loopback(model, tokenizer, template=OTHER)                  # another chat template
    Loopback(model, tokenizer, begin=1)                         # another BOS before every prompt that is a text
    Loopback(model, tokenizer, keep=20)                         # only the last 20 tokens of a prompt are read
    Loopback(model, tokenizer, form="llama")                    # told as llama-server does; "ids" as vLLM does

Completions with texts and token ids and chat, one token each, as vLLM, SGLang and llama-server answer them.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from PIL import Image


@dataclass
class Loopback:
    """most: log-probabilities that it tells; more are refused. apis: that it has. takes_ids: token ids for a prompt.
    goes_on: with an answer that was begun. processor: of a model that sees. seen: what was asked."""

    model: Any
    tokenizer: Any
    processor: Any = None
    template: str | None = None
    begin: int | None = None
    keep: int | None = None
    most: int = 20
    form: str = "texts"
    apis: Sequence[str] = ("completions", "chat")
    takes_ids: bool = True
    goes_on: bool = True
    counts: bool = True
    names: Sequence[str] = ("tuned",)
    seen: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __enter__(self) -> Loopback:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(self))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, path: str) -> tuple[int, dict[str, Any]]:
        return (200, {"data": [{"id": one} for one in self.names]}) if path == "/v1/models" else (404, {})

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.seen.append((path, body))
        api = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}.get(path)
        if api not in self.apis:
            return 404, {"detail": "Not Found"}
        count = body["top_logprobs"] if api == "chat" else body["logprobs"]
        if count > self.most:
            return 400, {"error": {"message": f"logprobs: at most {self.most}", "type": "invalid_request_error"}}
        if api == "completions" and not isinstance(body["prompt"], str) and not self.takes_ids:
            return 400, {"error": {"message": "prompt must be a string"}}
        ids, inputs = self.prompt_of(api, body)
        ids = ids[-self.keep :] if self.keep else ids
        best = self.distribution(ids, inputs).topk(count)
        top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        usage = {"usage": {"prompt_tokens": len(ids)}} if self.counts else {}
        return 200, {"choices": [{"index": 0, "logprobs": self.told(api, body, top)}], **usage}

    def prompt_of(self, api: str, body: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        begin = [] if self.begin is None else [self.begin]
        if api == "completions":
            prompt = body["prompt"]
            return (begin + self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)), {}
        how = {"add_generation_prompt": body.get("add_generation_prompt", True)}
        if self.goes_on:
            how["continue_final_message"] = body.get("continue_final_message", False)
        if self.processor is not None:
            return self.pictured(body["messages"], how)
        text = self.tokenizer.apply_chat_template(
            body["messages"], tokenize=False, chat_template=self.template, **how, **body.get("chat_template_kwargs", {})
        )
        return begin + self.tokenizer(text, add_special_tokens=False)["input_ids"], {}

    def pictured(
        self, messages: Sequence[Mapping[str, Any]], how: Mapping[str, Any]
    ) -> tuple[list[int], dict[str, Any]]:
        pictures, said = [], []
        for one in messages:
            content = [{"type": "text", "text": one["content"]}] if isinstance(one["content"], str) else one["content"]
            parts = []
            for part in content:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
                    part = {"type": "image"}
                parts.append(part)
            said.append({"role": one["role"], "content": parts})
        text = self.processor.apply_chat_template(said, tokenize=False, **how)
        found = self.processor(
            text=[text], images=[pictures] if pictures else None, return_tensors="pt", add_special_tokens=False
        )
        ids = found.pop("input_ids")[0].tolist()
        found.pop("attention_mask")
        return ids, dict(found)

    @torch.inference_mode()
    def distribution(self, ids: Sequence[int], inputs: Mapping[str, Any]) -> torch.Tensor:
        dtype = next(self.model.parameters()).dtype
        more = {name: one.to(dtype) if one.is_floating_point() else one for name, one in inputs.items()}
        whole = torch.tensor([list(ids)])
        logits = self.model(input_ids=whole, attention_mask=torch.ones_like(whole), **more).logits
        return logits[0, -1].float().log_softmax(-1)

    def told(self, api: str, body: Mapping[str, Any], top: Sequence[tuple[int, float]]) -> dict[str, Any]:
        as_ids = self.form == "ids" and body.get("return_tokens_as_token_ids")
        texts = [f"token_id:{token}" if as_ids else self.tokenizer.decode([token]) for token, _ in top]
        if api == "completions" and self.form != "llama":
            return {
                "tokens": texts[:1],
                "token_logprobs": [top[0][1]],
                "top_logprobs": [{text: value for text, (_, value) in reversed([*zip(texts, top, strict=True)])}],
            }
        rows = [{"token": text, "logprob": value} for text, (_, value) in zip(texts, top, strict=True)]
        if self.form == "llama":
            rows = [{**row, "id": token} for row, (token, _) in zip(rows, top, strict=True)]
        return {"content": [{**rows[0], "top_logprobs": rows}]}


def handler_of(server: Loopback) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(*server.get(self.path))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(*server.post(self.path, body))

        def answer(self, status: int, content: Mapping[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    return Handler
