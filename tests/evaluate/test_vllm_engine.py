"""The vLLM engine against a stand-in of vLLM's interface: same prompt ids, right requests, right sums.

vLLM itself needs a GPU; what is checked here is what we ask of it and how we read its answers. The stand-in applies
adapters in full, in part or not at all.
"""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise import cli
from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate import vllm_effect
from rankwise.evaluate.generate import GenerationSettings, HFGenerator
from rankwise.evaluate.vllm_engine import VLLMGenerator, max_rank
from rankwise.files.atomic import write_json
from rankwise.models.adapt import ADAPTER, lora_layers
from rankwise.models.adapters import load_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

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
    """Runs the same transformers model behind vLLM's interface, and keeps what it was asked.

    share: how much of an adapter it applies; layers: in how many of the first layers; noise: nats that it adds to every
    log-probability, another value each time; off: the same value every time, where transformers has none.
    """

    loaded: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    share: float = 1.0
    layers: int = 99
    noise: float = 0.0
    off: float = 0.0
    draws: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def LLM(self, **given: Any) -> FakeVLLM:
        self.loaded = given
        self.model = AutoModelForCausalLM.from_pretrained(given["model"], dtype=torch.float32)
        return self

    def adapted(self, path: str) -> Any:
        base = AutoModelForCausalLM.from_pretrained(self.loaded["model"], dtype=torch.float32)
        model = load_adapter(base, path)
        for name, layer in lora_layers(model).items():
            layer.scaling[ADAPTER] *= self.share * (int(name.split(".")[2]) < self.layers)
        return model

    def generate(self, prompts: Any, *, sampling_params: Params, use_tqdm: bool, lora_request: Any) -> list[Any]:
        self.asked.append({"prompts": prompts, "params": sampling_params, "lora": lora_request})
        model = self.adapted(lora_request.lora_path) if lora_request else self.model
        return [self.answer(model, prompt["prompt_token_ids"], sampling_params) for prompt in prompts]

    def answer(self, model: Any, ids: list[int], params: Params) -> Any:
        assert params.temperature == 0, "the stand-in is greedy"
        made: list[int] = []
        with torch.no_grad():
            steps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            steps += self.noise * torch.randn(steps.shape, generator=self.draws)
            steps += self.off * torch.randn(steps.shape, generator=torch.Generator().manual_seed(1))
            while len(made) < params.max_tokens and (not made or made[-1] not in (params.stop_token_ids or ())):
                made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
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


@pytest.fixture(scope="module")
def tuned(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter of rank 20 that changes every layer's answers."""
    place = tmp_path_factory.mktemp("tuned")
    config = LoraConfig(r=20, lora_alpha=40, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = str(folder)
    model.save_pretrained(place)
    return place


def engine_of(folder: Path, renderer: Renderer, path: Path) -> VLLMGenerator:
    return VLLMGenerator(str(folder), renderer, GenerationSettings(max_new_tokens=2), path)


def test_an_adapter_goes_in_as_a_lora_request(vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path) -> None:
    list(engine_of(folder, renderer, tuned).generate(ROWS))
    assert vllm.asked[-1]["lora"] == Request("adapter", 1, str(tuned))
    assert (vllm.loaded["enable_lora"], vllm.loaded["max_lora_rank"]) == (True, 32)
    assert vllm.loaded["enable_prefix_caching"] is False, "log-probabilities of a prompt depend on it"


# --- whether the adapter acts ----------------------------------------------------------------------------------------


def test_an_adapter_that_acts_is_proven_once(
    vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vllm.noise = 1e-3
    engine = engine_of(folder, renderer, tuned)
    list(engine.generate(ROWS))
    found = engine.effect
    assert found and found.expected and found.share == pytest.approx(1, abs=0.01)
    assert found.effect == pytest.approx(found.expected, rel=0.05) and found.effect > 0.1
    assert 5e-4 < found.repeated < 5e-3
    proof = [(len(one["prompts"]), one["lora"] is not None) for one in vllm.asked[:-1]]
    assert proof == [(3, True), (3, False), (1, True), (1, True), (1, True)]
    assert "the adapter acts in vLLM" in capsys.readouterr().out
    before = len(vllm.asked)
    list(engine.label_scores(ROWS, LABELS))
    assert len(vllm.asked) == before + 1, "once per run"


FAULTS = {
    "no effect": ({"share": 0.0}, "has no effect in vLLM"),
    "no effect under noise": ({"share": 0.0, "noise": 0.02}, "has no effect in vLLM"),
    "half its scale": ({"share": 0.5}, r"vLLM applies [3-7]\d% of its effect"),
    "half of the layers": ({"layers": 1}, r"vLLM applies -?\d+% of its effect"),
    "twice": ({"share": 2.0}, r"vLLM applies \d\d\d% of its effect"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_act_as_it_should(
    vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path, fault: str
) -> None:
    how, said = FAULTS[fault]
    vars(vllm).update(how)
    with pytest.raises(VerificationError, match=said) as error:
        list(engine_of(folder, renderer, tuned).generate(ROWS))
    for named in (str(tuned), "vllm#34186", "vllm#48019", "vllm#41754", "rankwise merge", "--engine transformers"):
        assert named in str(error.value)


def test_labels_are_not_scored_by_an_adapter_without_effect(
    vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path
) -> None:
    vllm.share = 0.0
    with pytest.raises(VerificationError, match="what would be scored is the base"):
        list(engine_of(folder, renderer, tuned).label_scores(ROWS, LABELS))


def test_a_large_base_is_proven_without_transformers(
    vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_effect, "SMALL", 1000)
    monkeypatch.setattr(vllm_effect, "load_model", None)
    engine = engine_of(folder, renderer, tuned)
    list(engine.generate(ROWS))
    assert engine.effect and engine.effect.expected is None
    assert "not compared with transformers" in engine.effect.words()
    vllm.share = 0.0
    with pytest.raises(VerificationError, match="has no effect in vLLM"):
        list(engine_of(folder, renderer, tuned).generate(ROWS))


def test_what_cannot_be_told_is_a_warning(
    vllm: FakeVLLM, folder: Path, renderer: Renderer, tuned: Path, tmp_path: Path
) -> None:
    """An adapter that transformers too hardly notices, and an engine that computes the base otherwise."""
    faint = adapter(
        tmp_path / "faint", **json.loads((tuned / "adapter_config.json").read_text()) | {"lora_alpha": 1e-3}
    )
    (faint / "adapter_model.safetensors").symlink_to(tuned / "adapter_model.safetensors")
    engine = engine_of(folder, renderer, faint)
    list(engine.generate(ROWS))
    assert engine.effect and engine.effect.weak and "cannot be told" in engine.effect.words()
    vllm.off = 2.0
    engine = engine_of(folder, renderer, tuned)
    list(engine.generate(ROWS))
    assert engine.effect and engine.effect.blind and "how much of it acts cannot be told" in engine.effect.words()


def test_the_command_fails_with_exit_6_before_it_answers(
    vllm: FakeVLLM, tuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "devset.csv").write_text("mr,ref\nname[a],text of a\nname[b],text of b\n")
    words = ["evaluate", str(tuned), "--task", "e2e_nlg", "--data_path", str(tmp_path), "--max_new_tokens", "4"]
    words += ["--engine", "vllm", "-o", str(tmp_path / "out")]
    vllm.share = 0.0
    assert cli.main(words) == 6
    assert "has no effect in vLLM" in capsys.readouterr().err
    assert not (tmp_path / "out" / "predictions.jsonl").read_text()
    vllm.share = 1.0
    for _ in range(2):  # the second time nothing is left to answer
        assert cli.main(words) == 0
        result = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
        assert result["settings"]["adapter_effect"]["share"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"rank_pattern": {"q_proj": 4}}, "rankwise compress .* --uniform"),
        ({"alpha_pattern": {"q_proj": 4}}, "rankwise compress .* --uniform"),
        ({"use_dora": True}, "use_dora"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "adapts parameters by name .* merge it"),
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
