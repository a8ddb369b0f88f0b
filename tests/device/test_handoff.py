"""rankwise validate by reference: a verdict on what an OpenAI-compatible server answers, red and green, by its first
line and its exit code."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported import once, session_root
from handed_off import HandedOff, adapt, in_two_bits, text_scene, vision_scene, written
from openai_server import Loopback

from rankwise.cli import main
from rankwise.demo.restaurants import write_task
from rankwise.device.handoff import ask, command
from rankwise.device.handoff.answers import by_api
from rankwise.device.handoff.cases import read_cases, write_cases
from rankwise.device.handoff.page import HANDOFF
from rankwise.device.handoff.variants import in_bits
from rankwise.device.llama.runtime import LlamaServer
from rankwise.models.depth.encoder import DepthSettings, write_depth
from rankwise.models.load import load_processor, load_tokenizer
from rankwise.report.report import build_report

TUNED, RED, UNDECIDED = 0, 6, 7
TRAVELS = ("handoff.json", "answers.jsonl")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> HandedOff:
    folder = once(session_root(tmp_path_factory) / "handoff-text", text_scene)
    return HandedOff(folder, folder / "base", folder / "tuned", folder / "cases", load_tokenizer(str(folder / "base")))


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> HandedOff:
    folder = once(session_root(tmp_path_factory) / "handoff-vision", vision_scene)
    processor = load_processor(str(folder / "base"))
    return HandedOff(folder, folder / "base", folder / "tuned", folder / "cases", processor.tokenizer, processor)


@pytest.fixture
def verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, int, dict[str, Any]]]:
    """First line, exit code and handoff.json of a server's answers to a scene's cases."""

    def found(scene: HandedOff, model: Any, *options: str, **server: Any) -> tuple[str, int, dict[str, Any]]:
        capsys.readouterr()  # what was said before
        with Loopback(model, scene.tokenizer, scene.processor, **server) as served:
            line = ["validate", "--cases", str(scene.cases), "--server", served.url, "-o", str(tmp_path / "out")]
            code = main([*line, *options])
        said = capsys.readouterr()
        assert "Traceback" not in said.err and said.out, said.err
        return said.out.splitlines()[0], code, HANDOFF.read(tmp_path / "out")

    return found


# --- green -----------------------------------------------------------------------------------------------------------

GREEN: dict[str, dict[str, Any]] = {
    "vLLM, token ids told": {"form": "ids"},
    "SGLang, texts told": {},
    "llama-server": {"form": "llama", "most": 64},
    "top 5 only": {"most": 5},
    "top 1 only": {"most": 1},
    "chat alone, the first token": {"apis": ["chat"], "goes_on": False},
    "chat alone, continued": {"apis": ["chat"]},
    "completions without token ids": {"apis": ["completions"], "takes_ids": False},
    "prompt tokens not counted": {"counts": False},
}


@pytest.mark.parametrize("server", GREEN.values(), ids=GREEN)
def test_the_tuned_model_over_each_api(scene: HandedOff, verdict: Any, server: dict[str, Any]) -> None:
    line, code, _ = verdict(scene, scene.model(), **server)
    assert (line.split(" (")[0], code) == ("answers are the TUNED model's", TUNED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_tuned_model_in_other_precision(scene: HandedOff, verdict: Any, dtype: torch.dtype) -> None:
    line, code, _ = verdict(scene, scene.model(dtype), most=5)
    assert (line.split(" (")[0], code) == ("answers are the TUNED model's", TUNED)


# --- red -------------------------------------------------------------------------------------------------------------

OTHER_TEMPLATE = (
    "{% for m in messages %}### {{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)
WITHOUT_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def layers_below(count: int) -> Callable[[str], float]:
    return lambda name: float(any(f"layers.{layer}." in name for layer in range(count)))


WEIGHTS: dict[str, tuple[Callable[[HandedOff], Any], str]] = {
    "base": (lambda scene: scene.model(base=True), "the BASE model's: the adapter has no effect"),
    "base in bfloat16": (lambda scene: scene.model(torch.bfloat16, base=True), "the BASE model's"),
    "half of the layers": (
        lambda scene: scene.mixed(layers_below(2)),
        "partly tuned: the tuning of the first half of the layers alone",
    ),
    "the other half": (
        lambda scene: scene.mixed(lambda name: 1 - layers_below(2)(name)),
        "partly tuned: the tuning of the second half of the layers alone",
    ),
    "the MLPs alone": (
        lambda scene: scene.mixed(lambda name: float("mlp" in name)),
        "partly tuned: the tuning of the MLPs alone",
    ),
    "half the scale": (lambda scene: scene.mixed(lambda _: 0.5), "partly tuned: the adapter at half its scale"),
    "alpha left out": (lambda scene: scene.mixed(lambda _: 0.25), "partly tuned: the adapter at scale 1 instead of 4"),
    "twice the scale": (lambda scene: scene.mixed(lambda _: 2.0), "partly tuned: the adapter at twice its scale"),
    "weights of two bits": (
        lambda scene: rounded(scene.model(), 2),
        "partly tuned: weights of 2 bits explain it best",
    ),
}
PROMPTS: dict[str, tuple[dict[str, Any], str]] = {
    "another template": ({"template": OTHER_TEMPLATE}, "another prompt: "),
    "another template, chat alone": ({"template": OTHER_TEMPLATE, "apis": ["chat"]}, "another prompt: "),
    "no system text": ({"template": WITHOUT_SYSTEM}, "another prompt: the template without its system text"),
    "a second BOS": ({"begin": 1}, "another prompt: a second BOS token"),
    "a second BOS, texts alone": (
        {"begin": 1, "apis": ["completions"], "takes_ids": False},
        "another prompt: a second BOS token",
    ),
    "a short context": ({"keep": 12}, "another prompt: "),
    "a short context, chat alone": ({"keep": 12, "apis": ["chat"]}, "another prompt: "),
}


@pytest.mark.parametrize(("make", "first"), WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights(scene: HandedOff, verdict: Any, make: Callable[[HandedOff], Any], first: str) -> None:
    line, code, _ = verdict(scene, make(scene))
    assert line.startswith(first) and code == RED, line


def rounded(model: Any, bits: int) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(in_bits(parameter, bits))
    return model


def test_two_bits_in_another_format(scene: HandedOff, verdict: Any) -> None:
    """Other errors than ours, as large."""
    line, code, _ = verdict(scene, in_two_bits(scene.model()))
    assert "as far off as weights of 2 bits are" in line and code == RED, line


@pytest.mark.parametrize("most", [5, 1])
def test_the_base_by_few_tokens(scene: HandedOff, verdict: Any, most: int) -> None:
    line, code, _ = verdict(scene, scene.model(base=True), most=most)
    assert line.startswith("the BASE model's") and code == RED, line


@pytest.mark.parametrize(("server", "first"), PROMPTS.values(), ids=PROMPTS)
def test_other_prompts(scene: HandedOff, verdict: Any, server: dict[str, Any], first: str) -> None:
    line, code, _ = verdict(scene, scene.model(), **server)
    assert line.startswith(first) and code == RED, line


# --- a model that sees -----------------------------------------------------------------------------------------------


def tower(kind: str) -> Callable[[str], float]:
    return lambda name: float(("vision_model" in name) is (kind == "vision"))


SEEN: dict[str, tuple[Callable[[HandedOff], Any], str, int]] = {
    "tuned": (lambda scene: scene.model(), "answers are the TUNED model's", TUNED),
    "base": (lambda scene: scene.model(base=True), "the BASE model's", RED),
    "vision side alone": (
        lambda scene: scene.mixed(tower("vision")),
        "partly tuned: the tuning of the vision side alone",
        RED,
    ),
    "language side alone": (
        lambda scene: scene.mixed(tower("language")),
        "partly tuned: the tuning of the language side alone",
        RED,
    ),
}


@pytest.mark.parametrize(("make", "first", "wanted"), SEEN.values(), ids=SEEN)
def test_a_model_that_sees(
    seeing: HandedOff, verdict: Any, make: Callable[[HandedOff], Any], first: str, wanted: int
) -> None:
    line, code, content = verdict(seeing, make(seeing))
    assert line.startswith(first) and code == wanted, line
    assert [one["route"] for one in content["apis"]] == ["chat"]


# --- what cannot be told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [False, True])
def test_an_adapter_below_the_noise(scene: HandedOff, tmp_path: Path, verdict: Any, base: bool) -> None:
    """Tuned or base, in bfloat16: neither an accusation nor a proof."""
    weak = HandedOff(tmp_path, scene.base, tmp_path / "weak", tmp_path / "cases", scene.tokenizer)
    shutil.copy(scene.folder / "rows.jsonl", tmp_path)
    adapt(weak.model(base=True), weak.tuned, ["q_proj"], size=1e-5)
    written(weak)
    line, code, _ = verdict(weak, weak.model(torch.bfloat16, base=base))
    assert line.startswith("cannot tell: base and tuned are too close on these rows (KL between them ")
    assert code == UNDECIDED


def test_too_few_rows(scene: HandedOff, tmp_path: Path, verdict: Any) -> None:
    few = HandedOff(scene.folder, scene.base, scene.tuned, tmp_path / "cases", scene.tokenizer)
    assert main(few.line("--write_cases", str(few.cases), "--num_samples", "3")) == 0
    line, code, _ = verdict(few, few.model())
    assert line.startswith("cannot tell: 3 of at least 4 items") and code == UNDECIDED


# --- an app's answers ------------------------------------------------------------------------------------------------


def judged(scene: HandedOff, answers: Path, out: Path, capsys: Any) -> tuple[str, int, str]:
    code = main(["validate", "--cases", str(scene.cases), "--answers", str(answers), "-o", str(out)])
    said = capsys.readouterr()
    return (said.out.splitlines() or [""])[0], code, said.err


@pytest.mark.parametrize("base", [False, True])
def test_answers_in_a_file_are_judged_as_a_servers(
    scene: HandedOff, verdict: Any, base: bool, tmp_path: Path, capsys: Any
) -> None:
    line, code, _ = verdict(scene, scene.model(base=base))
    assert judged(scene, tmp_path / "out" / "answers.jsonl", tmp_path / "again", capsys)[:2] == (line, code)


def test_whole_responses_of_the_first_places(scene: HandedOff, tmp_path: Path, capsys: Any) -> None:
    """As an app may keep them, without reading them."""
    rows = []
    with Loopback(scene.model(), scene.tokenizer, form="llama") as served:
        for case in read_cases(scene.cases).cases:
            for place in case.places:
                body = {"prompt": case.prompt + place.text, "logprobs": 20}
                response = served.post("/v1/completions", body)[1]
                rows.append({"case": case.id, "place": place.forced, "api": "completions", "response": response})
    file = tmp_path / "got.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line, code, _ = judged(scene, file, tmp_path / "out", capsys)
    assert line.startswith("answers are the TUNED model's") and code == TUNED
    file.write_text("\ufeff" + "\n\n".join(json.dumps(row) for row in rows))  # as editors and apps write files
    assert judged(scene, file, tmp_path / "again", capsys)[0] == line
    counted = [
        json.loads((tmp_path / name / "handoff.json").read_text())["apis"][0]["places"] for name in ("out", "again")
    ]
    assert counted == [len(rows)] * 2, "the last line has no end"


CHAT = '{"case": "r0", "place": 0, "api": "chat"'
BAD = {
    '{"case": "r0", "place": 0, "top_logprobs": [{"id": 5, "logprob": -1}]}': "'api'",
    CHAT + "}": "'top_logprobs'",
    CHAT + ', "top_logprobs": []}': "no log-probabilities",
    CHAT + ', "top_logprobs": [{"id": 5}]}': "'logprob'",
    CHAT.replace("chat", "mcp") + ', "top_logprobs": [{"id": 5, "logprob": -1}]}': "api is 'mcp'",
    CHAT + ', "top_logprobs": [{"id": 5, "logprob": 0}, {"id": 6, "logprob": -1}]}': "more than 1",
    CHAT + ', "response": {"choices": []}}': "no log-probabilities",
    CHAT.replace("0", "99", 2).replace("r99", "r0")
    + ', "top_logprobs": [{"id": 5, "logprob": -1}]}': "place 99 was not",
    CHAT.replace("r0", "nobody") + ', "top_logprobs": [{"id": 5, "logprob": -1}]}': "'nobody'",
    CHAT + ', "top_logprobs": [[5, -1.0]]}': "not an answer",
    CHAT + ', "top_logprobs": {"a": -1}}': "not an answer",
    CHAT + ', "response": {"choices": "abc"}}': "not an answer",
    CHAT + ', "response": {"choices": [{"logprobs": "x"}]}}': "not an answer",
    CHAT + ', "top_logprobs": [{"id": 1e999, "logprob": -1}]}': "not an answer",
    "\n".join(2 * [CHAT + ', "top_logprobs": [{"id": 5, "logprob": -1}]}']): "was answered by chat already",
    CHAT + ', "top_logprobs": [{"id": 5.5, "logprob": -1}]}': "expected an integer, found 5.5",
    CHAT.replace('"place": 0', '"place": 0.7') + ', "top_logprobs": [{"id": 5, "logprob": -1}]}': "found 0.7",
    CHAT + ', "top_logprobs": [{"id": 5, "logprob": NaN}]}': "logprob is NaN",
    CHAT + ', "top_logprobs": [{"id": 5, "logprob": -Infinity}]}': "no log-probability above the least",
    "[]": "expected an object",
    "": "no answers",
}


@pytest.mark.parametrize(("line", "why"), BAD.items())
def test_a_line_that_is_no_answer(scene: HandedOff, tmp_path: Path, capsys: Any, line: str, why: str) -> None:
    (tmp_path / "got.jsonl").write_text(line and f"{line}\n")
    _, code, said = judged(scene, tmp_path / "got.jsonl", tmp_path / "out", capsys)
    assert code == 3 and why in said and "got.jsonl" in said, said
    assert not (tmp_path / "out").exists()


def told_otherwise(answers: Path, change: Callable[[list[dict[str, Any]]], None], top: int) -> Path:
    """A file of answers with the likeliest tokens alone, and those changed."""
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    for row in rows:
        row["top_logprobs"] = row["top_logprobs"][:top]
        change(row["top_logprobs"])
    answers.write_text("\n" + "".join(json.dumps(row) + "\n" for row in rows))
    return answers


def on_base(base: int) -> Callable[[list[dict[str, Any]]], None]:
    def change(top: list[dict[str, Any]]) -> None:
        for one in top:
            one["logprob"] /= math.log(base)

    return change


def probabilities(top: list[dict[str, Any]]) -> None:
    for one in top:
        one["logprob"] = math.exp(one["logprob"])


def taken_alone(top: list[dict[str, Any]]) -> None:
    for number, one in enumerate(top):
        one["logprob"] = -math.inf if number else 0.0


def other_ids(top: list[dict[str, Any]]) -> None:
    for one in top:
        one["id"] = 900_000 + len(one["token"])


SCALES: dict[str, tuple[Callable[[list[dict[str, Any]]], None], int, str]] = {
    "base 2": (on_base(2), 64, "log-probabilities on base 2"),
    "base 2, the likeliest alone": (on_base(2), 1, "log-probabilities on base 2"),
    "base 10": (on_base(10), 64, "more than 1: are these natural logarithms"),
    "base 10, the likeliest alone": (on_base(10), 1, "log-probabilities on base 10"),
    "probabilities": (probabilities, 64, "above 0: are these natural logarithms"),
    "what was taken": (taken_alone, 1, "every answer is one token of probability 1"),
    "what was taken, and others": (taken_alone, 5, "every answer is one token of probability 1"),
    "another vocabulary": (other_ids, 20, "none of the tokens told, here or elsewhere"),
}


@pytest.mark.parametrize("base", [False, True], ids=["tuned", "base"])
@pytest.mark.parametrize(("change", "top", "why"), SCALES.values(), ids=SCALES)
def test_answers_that_are_no_log_probabilities(
    scene: HandedOff, verdict: Any, tmp_path: Path, capsys: Any, base: bool, change: Any, top: int, why: str
) -> None:
    """In one way or another they passed as weights of few bits, or as the base's."""
    verdict(scene, scene.model(base=base), "--top", "64", form="llama", most=64)
    answers = told_otherwise(tmp_path / "out" / "answers.jsonl", change, top)
    line, code, said = judged(scene, answers, tmp_path / "again", capsys)
    assert code == 3 and why in said and f"{answers}, line " in said and not line, said
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(("how", "why"), [("base 2", "on base 2"), ("base 10", "more than 1"), ("taken", "taken at")])
def test_a_server_that_tells_no_log_probabilities(
    scene: HandedOff, tmp_path: Path, capsys: Any, how: str, why: str
) -> None:
    class Otherwise(Loopback):
        def distribution(self, ids: Any, inputs: Any) -> torch.Tensor:
            found = super().distribution(ids, inputs)
            if how == "taken":
                return torch.where(found == found.max(), 0.0, -math.inf)
            return found / math.log(int(how.split()[1]))

    with Otherwise(scene.model(), scene.tokenizer) as served:
        out = ["-o", str(tmp_path / "out")]
        code = main(["validate", "--cases", str(scene.cases), "--server", served.url, *out])
    said = capsys.readouterr().err
    assert code == 3 and why in said and f"{served.url}, case r0, place 0: " in said, said


# --- the cases -------------------------------------------------------------------------------------------------------


def test_cases_are_read_as_they_were_written(scene: HandedOff, seeing: HandedOff, tmp_path: Path) -> None:
    for one in (scene, seeing):
        found = read_cases(one.cases)
        write_cases(tmp_path / "again", found)
        for file in filter(Path.is_file, one.cases.rglob("*")):
            assert (tmp_path / "again" / file.relative_to(one.cases)).read_bytes() == file.read_bytes()
    assert len(found.pictures) == len(found.cases)


def test_what_travels_does_not_say_where_models_lie(scene: HandedOff, verdict: Any, tmp_path: Path) -> None:
    """Cases go to whoever has the phone, a verdict to a colleague."""
    verdict(scene, scene.model(), names=[str(scene.tuned)], apis=["completions"])
    files = [*filter(Path.is_file, scene.cases.rglob("*")), *(tmp_path / "out" / name for name in TRAVELS)]
    homes = [str(scene.folder).encode(), str(tmp_path).encode()]
    assert len(files) > 3 and [file for file in files for home in homes if home in file.read_bytes()] == []
    found = HANDOFF.read(tmp_path / "out")
    assert (found["reference"], found["base"], found["served_model"]) == ("tuned", "base", "tuned")


def test_prompts_are_those_of_the_models_own_template(scene: HandedOff) -> None:
    for case in read_cases(scene.cases).cases:
        own = scene.tokenizer.apply_chat_template(case.messages, add_generation_prompt=True, return_dict=True)
        assert own["input_ids"] == list(case.ids) == scene.tokenizer(case.prompt)["input_ids"]
        assert case.places[0].forced == 0 and all(place.as_text for place in case.places)


@pytest.mark.parametrize("damage", ["gone", "cut", "other", "version"])
def test_a_damaged_folder_of_cases(scene: HandedOff, tmp_path: Path, capsys: Any, damage: str) -> None:
    folder = Path(shutil.copytree(scene.cases, tmp_path / "cases"))
    tensors, file = folder / "log_probs.safetensors", folder / "cases.json"
    if damage == "gone":
        tensors.unlink()
    elif damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-100])
    else:
        content = json.loads(file.read_text())
        content |= {"cases": content["cases"][1:]} if damage == "other" else {"format": "rankwise-cases/0"}
        file.write_text(json.dumps(content))
    code = main(["validate", "--cases", str(folder), "--server", "http://127.0.0.1:9/v1", "-o", str(tmp_path / "out")])
    assert code == 3 and str(folder) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_answers_to_one_question_are_one_row(scene: HandedOff, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (scene.folder / "rows.jsonl").read_text().splitlines()][:4]
    again = [{**row, "id": f"{row['id']}, again"} for row in rows]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for pair in zip(rows, again, strict=True) for row in pair))
    line = ["validate", "--reference", str(scene.tuned), "--base_model", str(scene.base), "--data_path", str(file)]
    assert main([*line, "--write_cases", str(tmp_path / "cases"), "--num_samples", "3"]) == 0
    assert [case.id for case in read_cases(tmp_path / "cases").cases] == ["r0", "r1", "r2"]


def test_a_model_with_depth_is_refused(scene: HandedOff, tmp_path: Path, capsys: Any) -> None:
    tuned = Path(shutil.copytree(scene.tuned, tmp_path / "tuned"))
    write_depth(tuned, DepthSettings())
    line = ["validate", "--reference", str(tuned), "--base_model", str(scene.base)]
    line += ["--data_path", str(scene.folder / "rows.jsonl"), "--write_cases", str(tmp_path / "cases")]
    assert main(line) == 2 and "takes depth, which no other runtime does" in capsys.readouterr().err


# --- servers that cannot be judged -----------------------------------------------------------------------------------


class Silent(Loopback):
    """It answers without log-probabilities."""

    def told(self, *_: Any) -> dict[str, Any]:
        return {}


def test_a_server_without_log_probabilities(scene: HandedOff, tmp_path: Path, capsys: Any) -> None:
    with Silent(scene.model(), scene.tokenizer) as served:
        code = main(["validate", "--cases", str(scene.cases), "--server", served.url, "-o", str(tmp_path / "out")])
    assert code == 5 and "tells no log-probabilities" in capsys.readouterr().err


def test_a_server_of_several_models(scene: HandedOff, verdict: Any, tmp_path: Path, capsys: Any) -> None:
    with Loopback(scene.model(), scene.tokenizer, names=("base", "mine")) as served:
        line = ["validate", "--cases", str(scene.cases), "--server", served.url, "-o", str(tmp_path / "out")]
        assert main(line) == 2 and "serves base, mine: choose one with --served_model" in capsys.readouterr().err
        assert main([*line, "--served_model", "mine"]) == TUNED
        assert {body["model"] for _, body in served.seen} == {"mine"}


def test_the_api_that_an_app_uses(scene: HandedOff, verdict: Any) -> None:
    """A template that is wrong is no matter where only completions are used."""
    line, code, content = verdict(scene, scene.model(), "--api", "completions", template=OTHER_TEMPLATE)
    assert line.startswith("answers are the TUNED model's") and code == TUNED
    assert [one["route"] for one in content["apis"]] == ["completions", "ids"]


def test_few_bits_are_a_fault_where_the_server_runs_more(scene: HandedOff, verdict: Any) -> None:
    model = rounded(scene.model(), 4)
    line, code, _ = verdict(scene, model)
    assert line.startswith("answers are the TUNED model's, as weights of 4 bits are (") and code == TUNED
    line, code, _ = verdict(scene, model, "--outtype", "f16")
    assert line.startswith("partly tuned: weights of 4 bits explain it best") and code == RED


# --- mutants of the product's own path -------------------------------------------------------------------------------


def test_a_judge_that_ignores_the_server_would_let_the_base_pass(
    scene: HandedOff, verdict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the red tests above hang on what the server told."""

    def ignoring(cases: Any, answers: Any) -> dict[str, Any]:
        found = by_api(cases, answers)
        return {
            api: {place: cases.candidates.as_server("tuned", place, 20) for place in told}
            for api, told in found.items()
        }

    monkeypatch.setattr(command, "by_api", ignoring)
    assert verdict(scene, scene.model(base=True))[1] == TUNED


def test_a_client_that_asks_otherwise_is_no_proof(
    scene: HandedOff, verdict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ask, "messages_of", lambda _, case, __: [{"role": "user", "content": f"{case.id}?"}])
    line, code, _ = verdict(scene, scene.model(), apis=["chat"])
    assert not line.startswith("answers are") and code == RED


# --- the whole command -----------------------------------------------------------------------------------------------


def test_from_the_models_to_the_report(scene: HandedOff, tmp_path: Path, capsys: Any, drawn_pictures: None) -> None:
    with Loopback(scene.mixed(layers_below(2)), scene.tokenizer) as served:
        assert main(scene.line("--server", served.url, "-o", str(tmp_path / "out"))) == RED
    said = capsys.readouterr()
    assert said.out.startswith("partly tuned: the tuning of the first half") and "partly tuned" in said.err
    assert (tmp_path / "out" / "plots" / "handoff_kl.png").stat().st_size > 10_000
    page = build_report(tmp_path / "out").read_text(encoding="utf-8")
    assert "partly tuned: the tuning of the first half of the layers alone" in page and "handoff_kl" in page


RECIPE = """
name: handed off
stages:
  - name: cases
    command: validate
    reference: {tuned}
    base_model: {base}
    data_path: {rows}
    write_cases: ${{run}}/cases
  - {{name: verdict, command: validate, cases: "${{run}}/cases", server: {url}, output_dir: "${{run}}/verdict"}}
"""


def test_cases_of_one_stage_are_asked_by_the_next(scene: HandedOff, tmp_path: Path, capsys: Any) -> None:
    """What a stage writes is what its options say, under whatever name; what it does not write is not missed."""
    file = tmp_path / "recipe.yaml"
    with Loopback(scene.model(), scene.tokenizer) as served:
        rows = scene.folder / "rows.jsonl"
        file.write_text(RECIPE.format(tuned=scene.tuned, base=scene.base, rows=rows, url=served.url))
        assert main(["run", str(file), "-o", str(tmp_path / "run")]) == 0
        assert HANDOFF.read(tmp_path / "run" / "verdict")["kind"] == "tuned"
        capsys.readouterr()
        assert main(["run", str(file), "-o", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.count("done already") == 2


def test_a_merged_model_and_a_dry_run(scene: HandedOff, tmp_path: Path, capsys: Any) -> None:
    merged = tmp_path / "merged"
    scene.model().save_pretrained(merged)
    scene.tokenizer.save_pretrained(merged)
    line = ["validate", "--reference", str(merged), "--data_path", str(scene.folder / "rows.jsonl"), "--device", "cpu"]
    line += ["--write_cases", str(tmp_path / "cases")]
    assert main(line) == 2 and "give its base with --base_model" in capsys.readouterr().err
    assert main([*line, "--base_model", str(merged)]) == 3
    assert "equals its base in every weight" in capsys.readouterr().err
    line += ["--base_model", str(scene.base)]
    capsys.readouterr()
    assert main([*line, "--dry-run"]) == 0 and not (tmp_path / "cases").exists()
    assert f"# would write --write_cases {tmp_path / 'cases'}\n" in capsys.readouterr().out
    assert main(line) == 0
    ours, theirs = (read_cases(folder) for folder in (tmp_path / "cases", scene.cases))
    assert [one.places for one in ours.cases] == [one.places for one in theirs.cases]
    number = theirs.candidates.number("tuned")
    assert ours.candidates.log_probs[0] == pytest.approx(theirs.candidates.log_probs[number], abs=1e-3)


def test_a_tokenizer_that_adds_its_own_bos(tmp_path: Path, verdict: Any) -> None:
    """A prompt's text goes without it then: the server's tokenizer puts it there."""
    own = text_scene(tmp_path / "scene", add_bos=True)
    case = read_cases(own.cases).cases[0]
    assert not case.prompt.startswith("<s>") and case.ids[0] == 1
    for begin, wanted in ((None, TUNED), (1, RED)):
        line, code, _ = verdict(own, own.model(), "--api", "completions", begin=begin)
        assert code == wanted and (line.startswith("another prompt: a second BOS token") or not wanted)


@pytest.mark.slow
def test_llama_cpps_own_openai_api(text_export: Path, tmp_path: Path, capsys: Any) -> None:
    """The exported model behind llama-server's API; and as a base, where another is the tuned one."""
    folder = text_export.parent
    rows = tmp_path / "rows.csv"
    write_task(rows, random.Random(0), count=8, references=1, held_out=False)
    with LlamaServer(text_export / "model-f16.gguf", context=512, threads=1) as runtime:
        for names, wanted in ((("model", "base"), TUNED), (("base", "model"), RED)):
            reference, base = (str(folder / name) for name in names)
            line = ["validate", "--reference", reference, "--base_model", base, "--data_path", str(rows)]
            line += ["--task", "e2e_nlg", "--server", f"{runtime.talk.url}/v1", "-o", str(tmp_path / names[0])]
            assert main([*line, "--device", "cpu"]) == wanted, capsys.readouterr()
            first = capsys.readouterr().out.splitlines()[0]
            assert first.startswith("the BASE model's" if wanted else "answers are the TUNED model's"), first
