"""Choosing a checkpoint and balancing classes: what is measured, that training is not touched by it, resuming."""

from __future__ import annotations

import os
import signal
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rows import SendWhileValidating, equal, logged, make_trainer, resumed, weights
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.data.example import Example, Turn
from rankwise.data.label_answer import found_label
from rankwise.data.render import Renderer
from rankwise.errors import Interrupted, UsageError
from rankwise.evaluate.classify import MAX_NEW_TOKENS, LabelAccuracy, Tally
from rankwise.options.sections import SelectionSection
from rankwise.train.checkpoints import checkpoints
from rankwise.train.selection import Balanced, Patience, arguments_for, describe_balance

LABELS = ("yes", "no", "I cannot say")
SAID = ("It rains.", "The sun shines.", "Two dogs.", "A man eats.", "Nobody is here.", "It snows.", "A cat.")


def example(number: int) -> Example:
    label = LABELS[number % 3]
    turns = (Turn("user", f"{SAID[number]} Is it so?"), Turn("assistant", label))
    reason = (Turn("user", "Why?"), Turn("assistant", "It is written there."))
    return Example(str(number), str(number), turns + reason * (number % 2), facts={"label": label, "labels": LABELS})


EXAMPLES = tuple(map(example, range(len(SAID))))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), initializer_range=0.5)


@pytest.fixture(scope="module")
def renderer(base: Path) -> Renderer:
    return Renderer(AutoTokenizer.from_pretrained(base), max_length=256)


# --- accuracy ------------------------------------------------------------------------------------------------------


def slow_likelihood(model: Any, renderer: Renderer, asked: Example, label: str) -> float:
    """Token by token, alone and unpadded."""
    turns = (*asked.turns[:-1], replace(asked.turns[-1], text=label))
    whole = renderer.training(replace(asked, turns=turns)).input_ids
    start = len(renderer.prompt_ids(asked))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(float(logits[place - 1, whole[place]]) for place in range(start, len(whole)))


@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_likeliest_label_counts_and_nothing_behind_it(base: Path, renderer: Renderer, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    accuracy = LabelAccuracy.of(EXAMPLES, renderer, "likelihood", batch_size)
    asked = [replace(each, turns=each.turns[:2]) for each in EXAMPLES]
    best = [max(LABELS, key=lambda label: slow_likelihood(model, renderer, each, label)) for each in asked]
    right = sum(label == LABELS[number % 3] for number, label in enumerate(best))
    assert accuracy.right(model) == Tally(right, len(EXAMPLES))
    gold = [
        replace(each, turns=(each.turns[0], Turn("assistant", label))) for each, label in zip(asked, best, strict=True)
    ]
    assert LabelAccuracy.of(gold, renderer, "likelihood", batch_size).right(model) == Tally(len(gold), len(gold))


def test_the_label_generated_counts(base: Path, renderer: Renderer) -> None:
    """Right answers are what the model says anyway: the end of a greedy text is made the label."""
    model = AutoModelForCausalLM.from_pretrained(base)
    asked = [replace(each, turns=each.turns[:2]) for each in EXAMPLES]
    texts = []
    for each in asked:
        ids = torch.tensor([renderer.prompt_ids(each)])
        made = model.generate(input_ids=ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, ids.shape[1] :]
        texts.append(renderer.answer(made.tolist()))
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    assert words, "the random model says a word somewhere"
    labels = (words[0], "certainly not")
    rows = [
        replace(each, turns=(each.turns[0], Turn("assistant", words[0])), facts={"label": words[0], "labels": labels})
        for each in asked
    ]
    right = sum(found_label(text, labels) == words[0] for text in texts)
    assert LabelAccuracy.of(rows, renderer, "generation").right(model) == Tally(right, len(rows))


def measuring(base: Path, folder: Path, accuracy: Any, **given: Any) -> Any:
    """A trainer that evaluates every second of its 12 steps."""
    evaluation = {"eval_strategy": "steps", "eval_steps": 2, **given}
    trainer = make_trainer(base, folder, **evaluation)
    trainer.accuracy = accuracy
    return trainer


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_measuring_changes_no_weight(base: Path, renderer: Renderer, tmp_path: Path, by: str) -> None:
    plain = make_trainer(base, tmp_path / "plain")
    plain.train()
    watched = measuring(base, tmp_path / "watched", LabelAccuracy.of(EXAMPLES, renderer, by))
    watched.train()
    assert equal(weights(plain), weights(watched))
    found = [row["eval_accuracy"] for row in watched.state.log_history if "eval_accuracy" in row]
    assert len(found) == 6
    assert all(0 <= value <= 1 for value in found)


@dataclass
class Scripted:
    """Shares of ten that are right at one evaluation after the other."""

    shares: Iterable[int]
    asked: int = 0
    seen: list[dict[str, torch.Tensor]] = field(default_factory=list)

    def right(self, model: Any) -> Tally:
        self.seen.append({name: value.detach().clone() for name, value in model.named_parameters() if "lora" in name})
        self.asked += 1
        return Tally(list(self.shares)[self.asked - 1], 10)


def choosing(patience: int | None = None) -> dict[str, Any]:
    selection = SelectionSection(select="accuracy", early_stopping=patience)
    chosen = arguments_for(selection, {"eval_strategy": "steps", "eval_steps": 2})
    return {**chosen, "callbacks": [Patience(patience)] if patience else []}


def test_the_best_checkpoint_is_what_remains(base: Path, tmp_path: Path) -> None:
    script = Scripted([3, 7, 9, 9, 4, 5])
    trainer = measuring(base, tmp_path, script, save_total_limit=1, **choosing())
    trainer.train()
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6", "the first of two equally good ones"
    assert trainer.state.best_metric == 0.9
    assert equal(weights(trainer), script.seen[2])
    assert not equal(weights(trainer), script.seen[5])
    assert {folder.name for folder in checkpoints(tmp_path)} == {"checkpoint-6", "checkpoint-12"}, "the best is kept"


def test_training_log_has_the_accuracy_where_it_is_measured(base: Path, renderer: Renderer, tmp_path: Path) -> None:
    accuracy = LabelAccuracy.of(EXAMPLES, renderer)
    make_trainer(base, tmp_path, accuracy=accuracy, eval_strategy="epoch").train()
    assert [row["step"] for row in logged(tmp_path) if row["eval_accuracy"]] == ["6", "12"]


def test_early_stopping_counts_on_after_a_resume(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = [5, 6, 6, 4, 9, 9]
    straight = measuring(base, tmp_path / "straight", Scripted(shares), **choosing(2))
    straight.train()
    assert straight.state.global_step == 8, "two evaluations without a better one"
    assert "early stopping at step 8: 2 evaluations without a better accuracy than 0.6" in capsys.readouterr().out
    again = measuring(base, tmp_path / "again", Scripted(shares), **choosing(2))
    again.train()
    for folder in checkpoints(tmp_path / "again")[:1]:
        (folder / "rankwise_manifest.json").unlink()
    later = resumed(measuring(base, tmp_path / "again", Scripted(shares[3:]), **choosing(2)))
    assert later.state.global_step == 8, "one evaluation was without a better one before the resume"
    assert equal(weights(straight), weights(later))


def test_a_validation_that_a_signal_cut_off_counts_once_it_is_made_up(base: Path, tmp_path: Path) -> None:
    """The one that ends training early: the resumed run makes it, and takes no step after it."""
    shares = [5, 6, 6, 4, 9, 9]
    straight = measuring(base, tmp_path / "straight", Scripted(shares), **choosing(2))
    straight.train()
    stopped = measuring(base, tmp_path / "again", Scripted(shares), **choosing(2))
    stopped.add_callback(SendWhileValidating(8))
    with pytest.raises(Interrupted):
        stopped.train()
    later = resumed(measuring(base, tmp_path / "again", Scripted(shares[3:]), **choosing(2)))
    assert (later.state.global_step, straight.state.global_step) == (8, 8)
    assert equal(weights(straight), weights(later)), "the best checkpoint's"
    chosen = [Path(trainer.state.best_model_checkpoint).name for trainer in (straight, later)]
    assert chosen == ["checkpoint-4"] * 2


@pytest.mark.parametrize("by", ["likelihood", "generation"])
def test_a_signal_ends_the_measuring_of_labels_at_once(
    base: Path, renderer: Renderer, tmp_path: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = LabelAccuracy.of(EXAMPLES, renderer, by)
    answered = []

    def right(self: LabelAccuracy, model: Any) -> Tally:
        os.kill(os.getpid(), signal.SIGTERM)
        answered.append(plain(self, model))
        return answered[-1]

    plain = LabelAccuracy.right
    monkeypatch.setattr(LabelAccuracy, "right", right)
    trainer = measuring(base, tmp_path, accuracy)
    with pytest.raises(Interrupted):
        trainer.train()
    assert not answered
    assert not any(row["eval_loss"] for row in logged(tmp_path))
    assert not trainer.model.get_input_embeddings()._forward_pre_hooks


def test_a_new_training_starts_counting_anew(base: Path, tmp_path: Path) -> None:
    trainer = measuring(base, tmp_path, Scripted([9, 1, 1, 9, 1, 1, 1, 1]), **choosing(2))
    trainer.train()
    assert trainer.state.global_step == 6
    trainer.train()
    assert trainer.state.global_step == 6, "and not at the first evaluation"


# --- arguments -----------------------------------------------------------------------------------------------------


def test_what_choosing_needs_is_set_and_what_was_given_stays() -> None:
    assert arguments_for(SelectionSection(), {"lr": 1}) == {"lr": 1}
    loss = arguments_for(SelectionSection(early_stopping=3), {})
    assert (loss["metric_for_best_model"], loss["greater_is_better"], loss["save_strategy"]) == ("loss", False, "epoch")
    steps = arguments_for(SelectionSection(select="accuracy"), {"eval_strategy": "steps", "eval_steps": 0.1})
    assert (steps["save_strategy"], steps["save_steps"], steps["greater_is_better"]) == ("steps", 0.1, True)
    assert arguments_for(SelectionSection(select="loss"), {"eval_strategy": "steps"})["save_steps"] == 10
    kept = arguments_for(SelectionSection(select="loss"), {"save_strategy": "best"})
    assert kept["save_strategy"] == "best"
    wrongs = (
        {"eval_strategy": "no"},
        {"eval_strategy": None},
        {"save_strategy": "no"},
        {"load_best_model_at_end": False},
    )
    for wrong in wrongs:
        with pytest.raises(UsageError, match="--select"):
            arguments_for(SelectionSection(select="loss"), wrong)


# --- balance -------------------------------------------------------------------------------------------------------


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=5), rule=st.sampled_from(["oversample", "sqrt"]))
def test_every_row_is_seen_and_repetition_is_even(counts: list[int], rule: str) -> None:
    labels = [str(name) for name, count in enumerate(counts) for _ in range(count)]
    sampler = Balanced(labels, rule, seed=1)
    order = list(sampler)
    seen = Counter(order)
    assert len(order) == len(sampler)
    assert set(seen) == set(range(len(labels)))
    for name, count in enumerate(counts):
        times = [seen[place] for place, label in enumerate(labels) if label == str(name)]
        expected = max(counts) if rule == "oversample" else round((count * max(counts)) ** 0.5)
        assert sum(times) == expected >= count
        assert max(times) - min(times) <= 1


def test_the_order_comes_from_seed_and_epoch_alone() -> None:
    labels = ["a"] * 30 + ["b"] * 7
    first, same, other = (Balanced(labels, "oversample", seed) for seed in (1, 1, 2))
    torch.manual_seed(5)
    order = list(first)
    torch.manual_seed(6)
    assert order == list(same) != list(other)
    first.set_epoch(3)
    drawn = list(first)
    assert drawn != order
    same.set_epoch(3)
    assert list(same) == drawn
    assert Counter(drawn) != Counter(order), "which rows come once more is drawn anew"


def test_counts_are_said_and_classes_without_rows_named() -> None:
    said = describe_balance(Balanced(["a"] * 300 + ["b"] * 12, "sqrt", 1), ("b", "a", "c"))
    assert said[0] == "balance: b 12 → 60, a 300 → 300; 360 rows an epoch instead of 312"
    assert said[1:] == ["warning: no training row is of c: the model cannot learn it"]


def test_a_balanced_run_resumes_exactly_within_an_epoch(base: Path, tmp_path: Path) -> None:
    def trainer(folder: Path, **given: Any) -> Any:
        made = make_trainer(base, folder, num_train_epochs=2, **given)
        made.sampler = Balanced(["a"] * 19 + ["b"] * 5, "oversample", seed=1)
        return made

    straight = trainer(tmp_path / "straight")
    straight.train()
    assert straight.state.global_step == 20, "38 rows an epoch, two a batch, two batches a step"
    saving = {"save_strategy": "steps", "save_steps": 13}
    trainer(tmp_path / "resumed", **saving).train()
    final = tmp_path / "resumed" / "checkpoint-20"
    if final.is_dir():
        (final / "rankwise_manifest.json").unlink()
    assert equal(weights(straight), weights(resumed(trainer(tmp_path / "resumed", **saving))))


# --- several processes ---------------------------------------------------------------------------------------------

SCRIPT = """
    import sys
    from pathlib import Path

    from rows import Rows, make_trainer
    from test_selection import EXAMPLES, AutoTokenizer, Balanced, LabelAccuracy, Renderer

    from rankwise.files.processes import finish, process_index

    class Seen(Rows):
        asked = []
        def __getitem__(self, index):
            self.asked.append(index)
            return super().__getitem__(index)

    base, folder = sys.argv[1:]
    accuracy = LabelAccuracy.of(EXAMPLES, Renderer(AutoTokenizer.from_pretrained(base), max_length=256))
    given = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 0.0}
    rows = Seen(24)
    sampler = Balanced(["a"] * 19 + ["b"] * 5, "oversample", 1)
    trainer = make_trainer(Path(base), Path(folder), accuracy=accuracy, sampler=sampler, rows=rows, **given)
    trainer.train()
    values = [row["eval_accuracy"] for row in trainer.state.log_history if "eval_accuracy" in row]
    Path(folder, f"{process_index()[0]}.txt").write_text(f"{values}|{rows.asked[:8]}")
    finish()
"""


@pytest.mark.slow
def test_two_processes_share_the_samples_and_agree(base: Path, renderer: Renderer, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    result = processes.run(script, base, tmp_path, count=2)
    assert result.returncode == 0, result.stderr[-3000:]
    alone = LabelAccuracy.of(EXAMPLES, renderer).right(AutoModelForCausalLM.from_pretrained(base))
    values, asked = zip(*((tmp_path / f"{rank}.txt").read_text().split("|") for rank in (0, 1)), strict=True)
    assert values == (f"[{alone.right / alone.asked}]",) * 2, "with a learning rate of 0 the model is the base"
    assert asked[0] != asked[1], "each process has its own part of the balanced order"


STOPPED = """
    import sys
    from pathlib import Path

    from rows import SendWhileValidating, make_trainer, resumed
    from test_selection import EXAMPLES, AutoTokenizer, LabelAccuracy, Renderer

    from rankwise.errors import Interrupted
    from rankwise.files.processes import finish, process_index

    base, folder = sys.argv[1:]
    accuracy = LabelAccuracy.of(EXAMPLES, Renderer(AutoTokenizer.from_pretrained(base), max_length=256))
    given = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
    sent = SendWhileValidating(2)
    first = process_index()[0] == 0
    trainer = make_trainer(Path(base), Path(folder), accuracy=accuracy, callbacks=[] if first else [sent], **given)
    try:
        trainer.train()
        said = "went on"
    except Interrupted as error:
        said = f"exit {error.exit_code}"
    later = resumed(make_trainer(Path(base), Path(folder), accuracy=accuracy, **given), processes=2)
    found = [row["step"] for row in later.state.log_history if "eval_accuracy" in row]
    Path(folder, f"{process_index()[0]}.txt").write_text(f"{said}, step {trainer.state.global_step}, then {found}")
    finish()
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_their_validation(base: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(STOPPED))
    result = processes.run(script, base, tmp_path, count=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["exit 143, step 2, then [2, 4]"] * 2
