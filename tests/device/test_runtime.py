"""llama.cpp as a runtime: given answers have the model's own log-probabilities, a broken file kills only a child,
and a server elsewhere is asked carefully."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from served import text_gguf, text_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.device.llama.client import LEAST_LOGPROB, ServerRuntime, Talk, _completion
from rankwise.device.llama.runtime import LlamaServer, NotTold, RemoteServer, Runtime
from rankwise.errors import DataError, ServiceError, UsageError, VerificationError

END = 2


@pytest.fixture(scope="module")
def server() -> Iterator[ServerRuntime]:
    with LlamaServer(text_gguf(), context=256, threads=1, exact=True) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(text_model(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(text_model())


def log_probs(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """(answer, vocabulary): what transformers says of every place of an answer."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(stream, "PNG")
    return stream.getvalue()


def test_what_answers_says_what_it_is(server: ServerRuntime) -> None:
    info = server.info
    assert info.build.startswith("xllamacpp ")
    assert info.model == str(text_gguf()) and info.context == 256 and not info.sees
    assert "__media" in info.marker and info.marker != "<__media__>"
    assert (info.begin_id, info.begin_text) == (1, "<s>")


def test_ids_are_read_as_they_are_and_answered_as_transformers_does(server, model, tokenizer) -> None:
    ids = tokenizer("The Vaults pub near")["input_ids"]
    found = server.complete(ids, max_new_tokens=12)
    with torch.inference_mode():
        whole = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=END)[0].tolist()
    assert found.prompt_tokens == len(ids)
    assert list(found.tokens) == whole[len(ids) :]
    assert found.logprobs == () and found.top == ()


def test_a_begin_token_never_stands_twice(server: ServerRuntime, tokenizer) -> None:
    ids = tokenizer("The Vaults")["input_ids"]
    assert ids[0] == 1
    for prompt in ("The Vaults", "<s>The Vaults", ids):
        assert server.complete(prompt, max_new_tokens=1).prompt_tokens == len(ids), prompt


@pytest.mark.parametrize("ended", [True, False])
def test_a_given_answer_has_the_models_own_log_probabilities(server, model, tokenizer, ended: bool) -> None:
    """Of tokens that the model would never say, and cut as no tokenizer would cut them."""
    prompt = tokenizer("A family-friendly")["input_ids"]
    answer = [tokenizer.convert_tokens_to_ids(piece) for piece in ("W", "a", "t", "e", "r", "?")] + [END] * ended
    found = server.complete(prompt, force=answer, top=5)
    expected = log_probs(model, prompt, answer)
    own = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert list(found.tokens) == answer and found.ended == ended
    assert found.logprobs == pytest.approx(own.tolist(), abs=1e-4)
    for place, top in enumerate(found.top):
        best = expected[place].topk(5)
        assert list(top) == best.indices.tolist()
        assert list(top.values()) == pytest.approx(best.values.tolist(), abs=1e-4)


def test_keeping_the_prompt_changes_nothing_but_the_time(server, tokenizer) -> None:
    prompt = tokenizer("The Vaults pub near Café Adriatic has a 5 star")["input_ids"]
    answer = [*tokenizer(" rating", add_special_tokens=False)["input_ids"], END]
    fresh = server.complete(prompt, force=answer)
    kept = server.complete(prompt, force=answer, reuse=True)
    assert kept.logprobs == pytest.approx(fresh.logprobs, abs=1e-5)
    assert kept.prompt_tokens == fresh.prompt_tokens == len(prompt)


def test_an_answer_may_be_its_end_alone_or_a_text(server, model, tokenizer) -> None:
    prompt = tokenizer("The")["input_ids"]
    alone = server.complete(prompt, force=[END])
    assert alone.tokens == (END,) and alone.text == ""
    assert alone.logprobs[0] == pytest.approx(float(log_probs(model, prompt, [END])[0, END]), abs=1e-4)
    assert (
        list(server.complete(prompt, force="Vaults").tokens)
        == tokenizer("Vaults", add_special_tokens=False)["input_ids"]
    )


def test_pieces_of_a_character_have_no_log_probabilities_here(server, tokenizer) -> None:
    """The server leaves such places out of its list; the places left would be taken for others."""
    ids = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    with pytest.raises(NotTold, match="pieces of characters"):
        server.complete([1], force=ids)
    answer = {"content": "x", "tokens": [5, 6], "tokens_evaluated": 1, "stop_type": "limit"}
    answer["completion_probabilities"] = [{"id": 6, "logprob": -1.0, "top_logprobs": [{"id": 6, "logprob": -1.0}]}]
    found = _completion(answer, 0.1, named=1)
    assert found.tokens == (5, 6) and found.logprobs == () and found.top == ()


def test_a_probability_of_zero_is_no_infinity() -> None:
    answer = {"content": "x", "tokens": [5], "tokens_evaluated": 1, "stop_type": "limit"}
    answer["completion_probabilities"] = [{"id": 5, "logprob": -3.4e38, "top_logprobs": []}]
    assert _completion(answer, 0.1, named=0).logprobs == (LEAST_LOGPROB,)


def test_the_template_of_the_file_is_the_models(server, tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    for variables in ({}, {"loud": True}):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **variables)
        assert expected.endswith("(loud)") == bool(variables)
        assert server.info.begin_text + server.apply_template(messages, variables) == expected


def test_images_and_slots_must_agree(server: ServerRuntime) -> None:
    with pytest.raises(DataError, match="1 image slots"):
        server.complete("What is <__media__>?")
    with pytest.raises(DataError, match="0 image slots"):
        server.complete("What is it?", [png()])
    with pytest.raises(DataError, match="token ids has no image slots"):
        server.complete([1, 5], [png()])
    with pytest.raises(UsageError, match="mmproj"):
        server.complete("What is <__media__>?", [png()])


def test_what_does_not_fit_the_context_names_the_flag(server: ServerRuntime) -> None:
    with pytest.raises(UsageError, match=r"--context \(now 256 tokens\)"):
        server.complete([5] * 300)


def test_the_child_is_there_while_the_context_is(tmp_path: Path) -> None:
    starting = LlamaServer(text_gguf(), context=64, threads=1)
    with starting as runtime:
        child = starting._child
        assert child is not None and child.poll() is None
        assert runtime.memory() > 10e6
        address = runtime.talk.url
    assert child.poll() is not None
    with pytest.raises(ServiceError, match="cannot be reached"):
        Talk(address).get("/props")


@pytest.mark.parametrize("cut", [0, 100, 0.5])
def test_a_broken_file_is_named_with_what_llama_cpp_said(tmp_path: Path, cut: float) -> None:
    content = text_gguf().read_bytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(content[: int(cut if cut > 1 else cut * len(content))])
    with pytest.raises(VerificationError, match=r"broken\.gguf") as error, LlamaServer(broken):
        pass
    assert error.value.exit_code == 6
    assert "error" in str(error.value) or "failed" in str(error.value)


def test_files_are_looked_for_before_anything_starts(tmp_path: Path) -> None:
    for model, mmproj in ((tmp_path / "no.gguf", None), (text_gguf(), tmp_path / "no.gguf")):
        with pytest.raises(DataError, match=r"no\.gguf"), LlamaServer(model, mmproj):
            pass


def test_a_child_that_takes_too_long_is_not_left_behind() -> None:
    starting = LlamaServer(text_gguf(), start_timeout=0.0)
    with pytest.raises(ServiceError, match="did not load"), starting:
        pass
    assert starting._child is None


def test_a_child_that_dies_while_answering_is_a_broken_runtime() -> None:
    starting = LlamaServer(text_gguf(), context=64, threads=1)
    with starting as runtime:
        assert runtime.info and starting._child is not None
        os.kill(starting._child.pid, signal.SIGKILL)
        starting._child.wait()
        with pytest.raises(VerificationError, match="SIGKILL"):
            runtime.complete([1, 5])


PARENT = """
import os, subprocess, sys, time
command = [sys.executable, "-m", "rankwise.device.llama.serve", "--model", sys.argv[1], "--context", "64"]
child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
sibling = os.fork() if sys.argv[2] == "forked" else 0
if sibling or sys.argv[2] == "alone":
    print(child.pid, sibling, flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("kind", ["alone", "forked"])
def test_a_killed_parent_leaves_no_child(kind: str) -> None:
    """Though a process that it forked still holds the pipe to the child."""
    command = [sys.executable, "-c", PARENT, str(text_gguf()), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, sibling = map(int, parent.stdout.readline().split())
        assert running(child)
        parent.kill()
    deadline = time.monotonic() + 15
    while running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    gone = not running(child)
    if sibling:
        os.kill(sibling, signal.SIGKILL)
    assert gone


def running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process}/status")
    return "\nState:\tZ" not in status.read_text() if status.is_file() else True


# --- a server elsewhere -------------------------------------------------------------------------------------------


def test_a_server_elsewhere_answers_the_same(server: ServerRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no proxy comes between: this one would refuse."""
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with RemoteServer(server.talk.url) as remote:
        checked: Runtime = remote
        assert (
            checked.complete([1, 5, 6], max_new_tokens=5).tokens == server.complete([1, 5, 6], max_new_tokens=5).tokens
        )
        assert checked.info.model == str(text_gguf()) and checked.memory() is None


class Scripted(BaseHTTPRequestHandler):
    """Answers with what `script` holds next: (status, body), or seconds to be silent."""

    script: list
    seen: list

    def do_GET(self) -> None:
        self.seen.append(dict(self.headers))
        step = self.script.pop(0)
        if isinstance(step, float):
            time.sleep(step)
            step = (200, b"{}")
        if step is None:
            self.connection.close()
            return
        with suppress(ConnectionError):  # nobody may be waiting any more
            self.send_response(step[0])
            self.end_headers()
            self.wfile.write(step[1])

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def scripted() -> Iterator[tuple[str, type[Scripted]]]:
    handler = type("Handler", (Scripted,), {"script": [], "seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as listening:
        listening.daemon_threads = True
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", handler
        listening.shutdown()
        thread.join()


def body(**content: object) -> bytes:
    return json.dumps(content).encode()


def test_an_old_server_is_told_apart(scripted) -> None:
    url, handler = scripted
    handler.script += [(200, body(total_slots=1))]
    with pytest.raises(ServiceError, match="too old") as error, RemoteServer(url):
        pass
    assert error.value.exit_code == 5


def test_a_loading_server_is_waited_for_and_a_dropped_request_repeated(scripted) -> None:
    url, handler = scripted
    handler.script += [(503, body(error={"message": "Loading model"})), None, (200, body(status="ok"))]
    assert Talk(url).get("/health") == {"status": "ok"}
    assert len(handler.seen) == 3


def test_waiting_ends(scripted) -> None:
    url, handler = scripted
    handler.script += [(503, body(error={}))] * 20
    with pytest.raises(ServiceError, match="still loading"):
        Talk(url, patience=0.0).get("/health")
    handler.script[:] = [None] * 20
    handler.seen.clear()
    with pytest.raises(ServiceError, match="cannot be reached"):
        Talk(url).get("/health")
    assert len(handler.seen) == 4
    handler.script[:] = [1.0]
    with pytest.raises(ServiceError, match=r"did not answer within 0\.2 s"):
        Talk(url, timeout=0.2).get("/health")


def test_something_else_on_the_port_is_no_llama_server(scripted) -> None:
    url, handler = scripted
    handler.script += [(200, b"<html>a router</html>")]
    with pytest.raises(ServiceError, match=r"a router.*is it a llama\.cpp server"):
        Talk(url).get("/props")


@pytest.mark.parametrize(
    ("status", "answer", "words"),
    [
        (200, body(error={"message": "upstream is down"}), "answers 200: upstream is down"),
        (200, body(error="upstream is down"), "answers 200: .*upstream is down"),
        (200, body(detail="Not Found"), "unexpected JSON"),
        (200, body(tokens=None), "unexpected JSON"),
        (200, body(tokens=["x"]), "unexpected JSON"),
        (307, body(moved=True), "answers 307"),
        (200, b"", "without a JSON object"),
        (200, b'data: {"tokens": [1]}', "without a JSON object"),
    ],
)
def test_an_outage_with_status_200_is_no_answer(scripted, status: int, answer: bytes, words: str) -> None:
    """For each thing that a server is asked for."""
    url, handler = scripted
    runtime = ServerRuntime(Talk(url))
    asked = [
        lambda: runtime.tokenize("a"),
        lambda: runtime.detokenize([1]),
        lambda: runtime.apply_template([]),
        lambda: runtime.complete([1]),
        lambda: runtime.ends(1),
        lambda: runtime.info,
    ]
    for ask in asked:
        handler.script[:] = [(status, answer)] * 2
        with pytest.raises(ServiceError, match=words if ask is not asked[-1] else "too old|answers") as error:
            ask()
        assert error.value.exit_code == 5


def test_the_key_is_sent_and_never_shown(scripted) -> None:
    url, handler = scripted
    remote = RemoteServer(url, key="sk-very-secret")
    handler.script += [(401, body(error={"message": "Invalid key sk-very-secret", "type": "authentication_error"}))]
    with pytest.raises(ServiceError, match="Invalid key") as error, remote:
        pass
    assert handler.seen[0]["Authorization"] == "Bearer sk-very-secret"
    shown = str(error.value) + repr(remote) + repr(Talk(url, key="sk-very-secret"))
    assert "secret" not in shown


def test_the_key_may_come_from_the_variable(scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    url, handler = scripted
    monkeypatch.setenv("LLAMA_API_KEY", "sk-from-outside")
    handler.script += [(401, body(error={"message": "no", "type": "authentication_error"}))]
    with pytest.raises(ServiceError, match="401"), RemoteServer(url):
        pass
    assert handler.seen[0]["Authorization"] == "Bearer sk-from-outside"


BAD = ["ftp://phone", "http://user:pass@phone:80", "http://phone?key=1", "http://", "phone:99999", "http://[::1"]


@pytest.mark.parametrize("url", BAD)
def test_what_is_no_address_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(UsageError) as error:
        Talk(url)
    assert "pass" not in str(error.value).replace("password", "") and "key=1" not in str(error.value)


def test_an_address_without_a_scheme_is_http() -> None:
    assert Talk("192.168.1.20:8080/").url == "http://192.168.1.20:8080"
    assert Talk("https://[::1]:80/api/").url == "https://[::1]:80/api"
