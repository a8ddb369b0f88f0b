"""The vLLM engine against a stand-in of vLLM's interface: same prompt ids, right requests, right sums.

vLLM itself needs a GPU; what is checked here is what we ask of it and how we read its answers.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import cli
from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.errors import UsageError
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.evaluate.vllm_engine import VLLMGenerator, max_rank
from rankwise.files.atomic import write_json

LABELS = ("yes", "no", "it depends")


def example(name: str, text: str) -> Example:
    return Example(name, name, (Turn("user", text, "Input"), Turn("assistant", "yes", "Output")), ("yes",))


ROWS = [example(f"r{n}", "near the river " * n) for n in (1, 4, 2)]


@dataclass
class Params:
    """SamplingParams' fields that are used here; an unknown one is a TypeError, as in vLLM."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 16
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


@dataclass
class FakeVLLM:
    """Runs the same transformers model behind vLLM's interface, and keeps what it was asked."""

    loaded: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def LLM(self, **given: Any) -> FakeVLLM:
        self.loaded = given
        self.model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
        return self

    def generate(self, prompts: Any, *, sampling_params: Params, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.asked.append({"prompts": prompts, "params": sampling_params, "lora": lora_request})
        return [self.answer(prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def answer(self, ids: list[int], params: Params) -> Any:
        assert params.temperature == 0, "the stand-in is greedy"
        made: list[int] = []
        with torch.no_grad():
            steps = self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            while len(made) < params.max_tokens and (not made or made[-1] not in (params.stop_token_ids or ())):
                made.append(int(self.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        known = [{token: types.SimpleNamespace(logprob=float(steps[n, token]))} for n, token in enumerate(ids[1:])]
        prompt = None if params.prompt_logprobs is None else [None, *known]
        output = types.SimpleNamespace(token_ids=tuple(made))
        return types.SimpleNamespace(prompt_token_ids=list(ids), outputs=[output], prompt_logprobs=prompt)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
    fake = FakeVLLM()
    module: Any = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = fake.LLM, Params
    request: Any = types.ModuleType("vllm.lora.request")
    request.LoRARequest = Request
    for name, value in {
        "vllm": module,
        "vllm.lora": types.ModuleType("vllm.lora"),
        "vllm.lora.request": request,
    }.items():
        monkeypatch.setitem(sys.modules, name, value)
    return fake


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model"), initializer_range=0.3)


@pytest.fixture
def renderer(folder: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(folder), max_length=300, reserve=12)


def test_texts_and_prompts_are_those_of_the_transformers_engine(
    vllm: FakeVLLM, folder: Path, renderer: Renderer
) -> None:
    decoding = GenerationSettings(max_new_tokens=12)
    found = {each.position: each for each in VLLMGenerator(str(folder), renderer, decoding).generate(ROWS)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = {each.position: each for each in HFGenerator(model, renderer, decoding).generate(ROWS)}
    assert found == expected
    given = [prompt["prompt_token_ids"] for prompt in vllm.asked[0]["prompts"]]
    assert sorted(given) == sorted(renderer.prompt_ids(row) for row in ROWS)
    assert vllm.asked[0]["params"].stop_token_ids == list(renderer.end_ids)
    assert vllm.loaded["generation_config"] == "vllm"  # the model's own defaults don't leak in
    assert vllm.loaded["max_model_len"] == 301
    assert "enable_lora" not in vllm.loaded and vllm.asked[0]["lora"] is None


def test_label_scores_are_those_of_the_transformers_engine(vllm: FakeVLLM, folder: Path, renderer: Renderer) -> None:
    found = {each.position: each for each in VLLMGenerator(str(folder), renderer).label_scores(ROWS, LABELS)}
    model = AutoModelForCausalLM.from_pretrained(folder)
    for each in HFGenerator(model, renderer).label_scores(ROWS, LABELS):
        assert found[each.position].log_likelihoods == pytest.approx(each.log_likelihoods, abs=1e-4)
        assert found[each.position].prompt == each.prompt
    assert vllm.asked[0]["params"].prompt_logprobs == 0


def test_small_chunks_give_the_same(vllm: FakeVLLM, folder: Path, renderer: Renderer, monkeypatch: Any) -> None:
    whole = sorted(VLLMGenerator(str(folder), renderer).generate(ROWS), key=lambda each: each.position)
    monkeypatch.setattr("rankwise.evaluate.vllm_engine.CHUNKS_IN_FLIGHT", 1)
    engine = VLLMGenerator(str(folder), renderer, GenerationSettings(batch_size=1))
    assert sorted(engine.generate(ROWS), key=lambda each: each.position) == whole
    assert len(vllm.asked) == 1 + len(ROWS)


def test_sampling_settings_reach_the_engine(vllm: FakeVLLM, folder: Path, renderer: Renderer) -> None:
    settings = GenerationSettings(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.8, seed=3)
    sampled = VLLMGenerator(str(folder), renderer, settings)._sampling()
    assert (sampled.temperature, sampled.top_p, sampled.max_tokens, sampled.seed) == (0.7, 0.8, 9, 3)


def adapter(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(
        folder / "adapter_config.json", {"peft_type": "LORA", "r": 20, "lora_alpha": 40, "bias": "none"} | config
    )
    return folder


def test_an_adapter_goes_in_as_a_lora_request(vllm: FakeVLLM, folder: Path, renderer: Renderer, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter")
    list(VLLMGenerator(str(folder), renderer, GenerationSettings(max_new_tokens=2), path).generate(ROWS))
    assert vllm.asked[0]["lora"] == Request("adapter", 1, str(path))
    assert (vllm.loaded["enable_lora"], vllm.loaded["max_lora_rank"]) == (True, 32)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "rankwise compress .* --uniform"),
        ({"alpha_pattern": {"q_proj": 4}}, "rankwise compress .* --uniform"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias all"),
        ({"peft_type": "LOHA"}, "peft_type LOHA"),
        ({"r": 1000}, "512 at most"),
    ],
)
def test_what_vllm_would_read_wrong_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        max_rank(adapter(tmp_path / "adapter", **config))


def test_beams_are_refused(renderer: Renderer, folder: Path) -> None:
    with pytest.raises(UsageError, match="num_beams"):
        VLLMGenerator(str(folder), renderer, GenerationSettings(num_beams=4))


def test_without_vllm_the_command_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    words = ["evaluate", str(folder), "--task", "e2e_nlg", "--data_path", str(tmp_path), "--engine", "vllm"]
    assert cli.main(words) == 2
    assert "rankwise[vllm]" in capsys.readouterr().err


def test_the_command_runs_through_vllm(
    vllm: FakeVLLM, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "devset.csv").write_text("mr,ref\nname[a],text of a\nname[b],text of b\n")
    words = ["evaluate", str(folder), "--task", "e2e_nlg", "--data_path", str(tmp_path), "--max_new_tokens", "4"]
    assert cli.main([*words, "--engine", "vllm", "-o", str(tmp_path / "out")]) == 0
    assert "e2e_nlg, n = 2" in capsys.readouterr().out
    assert len(vllm.asked[0]["prompts"]) == 2
