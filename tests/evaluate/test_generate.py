"""Generation: batching changes nothing, a killed run goes on, other models' predictions are never mixed in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from rankwise.data.example import Example, Turn
from rankwise.data.render import IGNORED, Rendered, Renderer
from rankwise.errors import DataError, UsageError
from rankwise.evaluate.generate import Generated, GenerationSettings, HFGenerator
from rankwise.evaluate.likelihood import answer_losses, training_batches
from rankwise.evaluate.predictions import EvaluationResult, predict
from rankwise.evaluate.tasks import evaluate, task


def example(name: str, source: str = "name[x]", answer: str = "An answer.") -> Example:
    turns = (
        Turn("user", "Describe.", "Instruction"),
        Turn("user", source, "Input"),
        Turn("assistant", answer, "Output"),
    )
    return Example(name, name, turns, references=(answer,))


MIXED = [example(f"e{n}", "name[x], " * n) for n in (3, 1, 8, 2, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    folder = tiny_llama(tmp_path_factory.mktemp("model"), initializer_range=0.3)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def renderer(model: PreTrainedModel) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(model.name_or_path), reserve=12)


def texts(generator: HFGenerator, examples: Sequence[Example]) -> list[str]:
    found = {generated.position: generated.text for generated in generator.generate(examples)}
    return [found[position] for position in range(len(examples))]


# --- the transformers engine -------------------------------------------------------------------------------------


def plain_greedy(model: PreTrainedModel, ids: list[int], steps: int, end: tuple[int, ...]) -> list[int]:
    made: list[int] = []
    while len(made) < steps and (not made or made[-1] not in end):
        with torch.no_grad():
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    return made


def test_batches_give_what_one_by_one_gives_in_the_order_asked(model: PreTrainedModel, renderer: Renderer) -> None:
    generator = HFGenerator(model, renderer, GenerationSettings(max_new_tokens=12, batch_size=3))
    plain = [plain_greedy(model, renderer.prompt_ids(row), 12, renderer.end_ids) for row in MIXED]
    assert texts(generator, MIXED) == [renderer.answer(ids) for ids in plain]
    assert len({tuple(ids) for ids in plain}) > 1  # the prompts do matter
    assert renderer.tokenizer.padding_side == "right"


def test_generation_stops_at_every_end_token(model: PreTrainedModel, renderer: Renderer) -> None:
    [row] = MIXED[:1]
    free = plain_greedy(model, renderer.prompt_ids(row), 12, ())
    stop = free[4]
    stopped = Renderer(renderer.tokenizer, reserve=12, generation_eos=[stop])
    settings = GenerationSettings(max_new_tokens=12)
    assert texts(HFGenerator(model, stopped, settings), [row]) == [renderer.answer(free[: free.index(stop)])]


def test_the_model_s_own_defaults_do_not_leak_in(model: PreTrainedModel, renderer: Renderer) -> None:
    generator = HFGenerator(model, renderer, GenerationSettings(max_new_tokens=12))
    expected = texts(generator, MIXED)
    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=3.0, repetition_penalty=5.0, no_repeat_ngram_size=1, num_beams=2, max_length=3
    )
    try:
        assert texts(generator, MIXED) == expected
    finally:
        model.generation_config = own


def test_sampling_follows_its_seed_and_leaves_the_global_one_alone(model: PreTrainedModel, renderer: Renderer) -> None:
    def sampled(seed: int) -> list[str]:
        settings = GenerationSettings(max_new_tokens=12, do_sample=True, temperature=1.5, top_p=0.95, seed=seed)
        return texts(HFGenerator(model, renderer, settings), MIXED)

    state = torch.random.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_beams_run_and_training_mode_is_put_back(model: PreTrainedModel, renderer: Renderer) -> None:
    model.train()
    settings = GenerationSettings(max_new_tokens=6, num_beams=3, length_penalty=0.8)
    assert len(texts(HFGenerator(model, renderer, settings), MIXED)) == 5
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"batch_size": 0},
        {"do_sample": True, "temperature": 0},
        {"temperature": 0.5},
        {"top_p": 0.5},
    ],
)
def test_settings_that_cannot_work_are_usage_errors(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        GenerationSettings(**wrong)


def test_a_real_model_continues_its_story(shared_data: Path) -> None:
    """Greedy text of stories260K equals the reference computed from the original file without transformers."""
    folder = shared_data / "tiny_weights" / "stories260K" / "hf_converted"
    reference = json.loads((folder / "reference.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt, expected = reference["text"], reference["greedy_text"].strip()

    class Plain(Renderer):
        def prompt(self, example: Example) -> Rendered:
            ids = list(self.tokenizer(example.turns[0].text)["input_ids"])
            return Rendered(ids, [IGNORED] * len(ids))

    row = Example("story", "story", (Turn("user", prompt), Turn("assistant", "x")))
    settings = GenerationSettings(max_new_tokens=20)
    [generated] = HFGenerator(model, Plain(tokenizer, positions=512), settings).generate([row])
    assert expected.startswith(prompt)
    assert generated.text.startswith(expected[len(prompt) :].strip())


# --- the file of predictions -------------------------------------------------------------------------------------


@dataclass
class Echo:
    """A generator that answers with the sample's name, and may be killed after some answers."""

    dies_after: int | None = None
    settings: dict[str, Any] = field(default_factory=lambda: {"engine": "echo", "seed": 1})
    asked: list[str] = field(default_factory=list)

    def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
        for number, row in reversed(list(enumerate(examples))):
            if self.dies_after is not None and len(self.asked) >= self.dies_after:
                raise KeyboardInterrupt
            self.asked.append(row.id)
            yield Generated(number, f"prompt of {row.id}", f"text of {row.id}\n£")


def test_predictions_are_recorded_and_come_in_order(tmp_path: Path) -> None:
    found = predict(Echo(), MIXED, tmp_path / "p.jsonl")
    assert [p.id for p in found] == [row.id for row in MIXED]
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["id"]: row["prediction"] for row in rows} == {row.id: f"text of {row.id}\n£" for row in MIXED}
    assert rows[0] == {
        "id": "e5",
        "prompt": "prompt of e5",
        "prediction": "text of e5\n£",
        "references": ["An answer."],
    }


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(KeyboardInterrupt):
        predict(Echo(dies_after=2), MIXED, path)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "e8", "prompt": "half a li')  # what a kill -9 leaves
    second = Echo()
    assert predict(second, MIXED, path) == predict(Echo(), MIXED, tmp_path / "straight.jsonl")
    assert sorted(second.asked) == ["e1", "e3", "e8"]
    third = Echo()
    assert len(predict(third, MIXED, path)) == 5
    assert third.asked == []
    assert len(path.read_text(encoding="utf-8").splitlines()) == 5


def test_more_samples_are_added_to_those_done(tmp_path: Path) -> None:
    predict(Echo(), MIXED[:2], tmp_path / "p.jsonl")
    more = Echo()
    assert len(predict(more, MIXED, tmp_path / "p.jsonl")) == 5
    assert "e3" not in more.asked
    assert len(predict(Echo(), MIXED[:1], tmp_path / "p.jsonl")) == 1


def test_predictions_made_otherwise_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    predict(Echo(), MIXED, path, {"model": "aaa"})
    with pytest.raises(UsageError, match="model: 'aaa' then, 'bbb' now"):
        predict(Echo(), MIXED, path, {"model": "bbb"})
    with pytest.raises(UsageError, match="seed: 1 then, 2 now"):
        predict(Echo(settings={"engine": "echo", "seed": 2}), MIXED, path, {"model": "aaa"})
    with pytest.raises(UsageError, match="references of e3"):
        predict(Echo(), [example("e3", answer="Other.")], path, {"model": "aaa"})
    (tmp_path / "p.settings.json").unlink()
    with pytest.raises(UsageError, match="next to it does not"):
        predict(Echo(), MIXED, path, {"model": "aaa"})


def test_a_spoilt_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    predict(Echo(), MIXED[:2], path)
    path.write_text(path.read_text(encoding="utf-8") + '{"id": "e8"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="line 3: not a prediction"):
        predict(Echo(), MIXED, path)


# --- likelihood --------------------------------------------------------------------------------------------------


def test_losses_are_those_of_the_model_whatever_the_batch(model: PreTrainedModel, renderer: Renderer) -> None:
    rows = [example(f"r{n}", "x " * n, "yes " * (n + 1)) for n in range(5)]
    losses, tokens = answer_losses(model, training_batches(rows, renderer, batch_size=3))
    for row, loss, count in zip(rows, losses, tokens, strict=True):
        rendered = renderer.training(row)
        ids, labels = torch.tensor([rendered.input_ids]), torch.tensor([rendered.labels])
        with torch.no_grad():
            mean = model(input_ids=ids, labels=labels).loss
        assert count == (labels != -100).sum()
        assert loss / count == pytest.approx(mean.item(), rel=1e-5)


def test_loss_of_a_real_model_equals_the_reference(shared_data: Path) -> None:
    folder = shared_data / "tiny_weights" / "stories260K" / "hf_converted"
    reference = json.loads((folder / "reference.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([reference["input_ids"]])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses, tokens = answer_losses(model, [batch])
    assert (losses / tokens).item() == pytest.approx(reference["mean_nll_nats"], abs=1e-3)


# --- a whole evaluation ------------------------------------------------------------------------------------------


def test_evaluate_scores_what_was_generated_and_writes_it(tmp_path: Path) -> None:
    data = tmp_path / "testset_w_refs.csv"
    data.write_text("mr,ref\nname[a],text of a\nname[a],another text\nname[b],something else\n")
    e2e = task("e2e_nlg")
    rows = e2e.examples(tmp_path)
    assert [row.references for row in rows] == [("text of a", "another text"), ("something else",)]

    class Perfect(Echo):
        def generate(self, examples: Sequence[Example]) -> Iterator[Generated]:
            yield from (Generated(n, "p", row.references[-1]) for n, row in enumerate(examples))

    result = evaluate(e2e, Perfect(), rows.items, tmp_path / "out", {"model": "aaa"})
    assert result["rouge_l"] == pytest.approx(100)
    assert result["num_samples"] == 2
    assert result.settings["made_from"] == {"model": "aaa"}
    assert result.versions["sacrebleu"]
    assert EvaluationResult.load(tmp_path / "out") == result
    with pytest.raises(UsageError, match="e2e_nlg"):
        task("e2e")


def test_a_tiny_model_goes_through_a_whole_evaluation(
    model: PreTrainedModel, renderer: Renderer, tmp_path: Path
) -> None:
    generator = HFGenerator(model, renderer, GenerationSettings(max_new_tokens=12))
    result = evaluate(task("e2e_nlg"), generator, MIXED, tmp_path)
    assert result.n == 5
    assert result.settings["dtype"] == "float32"
    assert 0 <= result["bleu"] <= 100
