"""rankwise evaluate as a command: what it writes, that it goes on after a kill, and that processes share the work."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import processes
import pytest
from rows import adapted_base
from tiny import CHAT_TEMPLATE, tiny_llama

from rankwise import cli
from rankwise.data.render import IGNORED
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.data.sources.table import SOURCES
from rankwise.data.sources.table import SPLITS as SOURCE_SPLITS
from rankwise.evaluate import command as evaluate
from rankwise.evaluate.predictions import FORGETTING, EvaluationResult
from rankwise.evaluate.tasks import TASKS, task
from rankwise.models.adapters import save_adapter
from rankwise.models.load import load_config
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import SCORED_TASKS, SPLITS, DataSection, ModelSection

LABELS = ("entailment", "neutral", "contradiction")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), initializer_range=0.3)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model = adapted_base(base)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(model, folder, str(base))
    return folder


@pytest.fixture(scope="module")
def restaurants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    rows = [f"name[a{n}]{', x' * (n % 5)},text of a{n}\n" for n in range(9)]
    quoted = [f'"{row.rsplit(",", 1)[0]}",{row.rsplit(",", 1)[1]}' for row in rows]
    (folder / "devset.csv").write_text("mr,ref\n" + "".join(quoted) + '"name[a0]",another text\n')
    return folder


def evaluated(*words: Any) -> int:
    return cli.main(["evaluate", *map(str, words), "--device", "cpu"])


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_rows_are_read_as_the_options_say(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training: who speaks, and how many placeholders one image fills."""
    turns = [{"role": "pupil", "content": "<image> and <image>: what?"}, {"role": "coach", "content": "red"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"id": "a", "messages": turns, "images": ["0.png"]}) + "\n")
    words = (base, "--task", "conversations", "--data_path", tmp_path / "rows.jsonl", "--max_new_tokens", 3)
    assert evaluated(*words, "-o", tmp_path / "out") == 3
    assert "pupil" in capsys.readouterr().err
    roles = ("--roles", "pupil=user,coach=assistant")
    assert evaluated(*words, *roles, "-o", tmp_path / "out") == 3
    assert "image" in capsys.readouterr().err
    read = []
    plain = evaluate.read_items
    monkeypatch.setattr(evaluate, "read_items", lambda *a, **k: read.append(plain(*a, **k)) or read[-1])
    evaluated(*words, *roles, "--repeat_image", "--prompt", "raw", "-o", tmp_path / "out")
    assert read[0][0].images == ("0.png", "0.png")
    assert read[0][0].answer == "red"


# --- generated answers -------------------------------------------------------------------------------------------


def test_an_adapter_s_scores_land_beside_it_and_a_second_run_goes_on(
    adapter: Path, restaurants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default folder lies inside the model's own, and must not count as a change of the model."""
    words = (adapter, "--task", "e2e_nlg", "--data_path", restaurants, "--max_new_tokens", 6)
    assert evaluated(*words) == 0
    folder = adapter / "evaluation"
    first = EvaluationResult.load(folder)
    made = lines(folder)
    assert first.n == len(made) == 9
    assert first.settings["made_from"].keys() == {"model", "adapter", "data"}
    path = folder / "predictions.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]) + '{"id": "half')
    assert evaluated(*words) == 0
    assert lines(folder) == made
    assert EvaluationResult.load(folder) == first
    assert "e2e_nlg, n = 9: bleu" in capsys.readouterr().out
    assert "evaluate" in json.loads((folder / "manifest.json").read_text())["stages"]


def test_a_changed_adapter_is_another_model(base: Path, adapter: Path, restaurants: Path, capsys: Any) -> None:
    words = (adapter, "--task", "e2e_nlg", "--data_path", restaurants, "--max_new_tokens", 6)
    assert evaluated(*words) == 0
    model = adapted_base(base)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.2)
    save_adapter(model, adapter, str(base))
    assert evaluated(*words) == 2
    assert "adapter: " in capsys.readouterr().err


def test_the_saved_config_repeats_the_evaluation(base: Path, restaurants: Path, tmp_path: Path) -> None:
    words = (base, "--task", "e2e_nlg", "--data_path", restaurants, "--max_new_tokens", 6, "-o", tmp_path / "a")
    assert evaluated(*words) == 0
    assert evaluated(tmp_path / "a" / "resolved_config.json", "-o", tmp_path / "b") == 0
    assert EvaluationResult.load(tmp_path / "a") == EvaluationResult.load(tmp_path / "b")


# --- several processes -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_give_what_one_gives(adapter: Path, restaurants: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("One text about food.\n\nAnother about a river.\n\nThe last one, on prices.")
    words = (adapter, "--task", "e2e_nlg", "--data_path", restaurants, "--max_new_tokens", 6)
    words = (*words, "--forget", tmp_path / "other.txt")
    one, two = tmp_path / "one", tmp_path / "two"
    assert evaluated(*words, "-o", one) == 0
    two.mkdir()
    # what a killed run of three processes left behind: a whole line and half a line of one process
    kept = (one / "predictions.jsonl").read_text().splitlines(keepends=True)
    (two / "predictions.part2.jsonl").write_text(kept[0] + kept[1][:20])
    (two / "predictions.settings.json").write_bytes((one / "predictions.settings.json").read_bytes())
    done = processes.run("-m", "rankwise.cli", "evaluate", *words, "--device", "cpu", "-o", two, count=2)
    assert done.returncode == 0, done.stderr
    assert lines(two) == lines(one)
    assert EvaluationResult.load(two) == EvaluationResult.load(one)
    first, second = (EvaluationResult.load(folder / FORGETTING) for folder in (one, two))
    assert second.metrics == pytest.approx(first.metrics, rel=1e-5)
    assert done.stdout.count("e2e_nlg, n = 9") == 1
    assert not list(two.glob("*.part*"))


# --- the four tasks ----------------------------------------------------------------------------------------------

PLACES = {
    "e2e_nlg": ("e2e_nlg", "dev"),
    "samsum": ("samsum", "dev"),
    "wikisql": ("wikisql/derived/dev.subset.jsonl", "dev"),
    "multi_nli": ("multinli/derived/multinli_1.0_train.subset480.jsonl", "train"),
}


def test_every_task_that_the_command_names_has_a_source_and_a_scorer() -> None:
    assert set(SCORED_TASKS) == set(TASKS) <= set(SOURCES)
    assert set(SPLITS) <= set(SOURCE_SPLITS)


@pytest.mark.parametrize("style", ["sections", "chat"])
@pytest.mark.parametrize("name", PLACES)
def test_prompts_are_the_same_token_ids_in_training_and_evaluation(
    name: str, style: str, shared_data: Path, tmp_path: Path
) -> None:
    """Training reads with `load` and renders whole samples; evaluation reads with the task and renders prompts."""
    place, split = PLACES[name]
    trained = {row.id: row for row in load(name, shared_data / place, split)}
    asked = task(name).examples(shared_data / place, split).items
    tiny_llama(tmp_path, tokenizer={"chat_template": CHAT_TEMPLATE})
    data, model = DataSection(task=name, prompt=style, max_seq_length=4096), ModelSection(model_name=str(tmp_path))
    renderer = renderer_for(data, model, str(tmp_path), load_config(str(tmp_path)))
    renderer = replace(renderer, positions=None)
    for row in asked[:: max(1, len(asked) // 40)]:
        prompt = replace(renderer, reserve=128).prompt_ids(row)
        whole = renderer.training(trained[row.id])
        assert whole.input_ids[: len(prompt)] == prompt
        assert set(whole.labels[: len(prompt)]) == {IGNORED}
        assert whole.labels[len(prompt)] != IGNORED


@pytest.mark.parametrize(("name", "items"), [("e2e_nlg", 547), ("samsum", 818), ("wikisql", 94), ("multi_nli", 480)])
def test_items_are_the_official_ones(name: str, items: int, shared_data: Path) -> None:
    place, split = PLACES[name]
    found = task(name).examples(shared_data / place, split).items
    assert len(found) == items == len({row.id for row in found})
    several = {row.id for row in found if len(row.references) > 1}
    assert bool(several) == (name == "e2e_nlg")


def test_labels_by_likelihood_from_file_to_confusion(
    base: Path, shared_data: Path, tmp_path: Path, capsys: Any
) -> None:
    words = (base, "--task", "multi_nli", "--data_path", shared_data / PLACES["multi_nli"][0], "--num_samples", 12)
    assert evaluated(*words, "-o", tmp_path / "a") == 0
    result = EvaluationResult.load(tmp_path / "a")
    shown = capsys.readouterr().out
    assert f"accuracy {result['accuracy']:.2f}" in shown and "contradiction" in shown
    assert "multi_nli by likelihood, n = 12: " in shown
    rows = list(csv.reader((tmp_path / "a" / "confusion.csv").read_text().splitlines()))
    assert rows[0] == ["true \\ guessed", *LABELS, "unparsed"]
    counts = [[int(cell) for cell in row[1:]] for row in rows[1:]]
    assert sum(map(sum, counts)) == 12
    assert 100 * sum(counts[n][n] for n in range(3)) / 12 == pytest.approx(result["accuracy"])
    for row in lines(tmp_path / "a").values():
        assert row["prediction"] == max(LABELS, key=row["scores"].__getitem__)
    assert evaluated(*words, "-o", tmp_path / "a", "--max_new_tokens", 3) == 0  # decoding has no part in it
    assert evaluated(*words, "-o", tmp_path / "a", "--classify", "generation") == 2
    assert evaluated(*words, "-o", tmp_path / "b", "--classify", "generation", "--max_new_tokens", 3) == 0
    other = EvaluationResult.load(tmp_path / "b")
    assert other.settings["scoring"]["unparsed"] == sum(
        not any(label in row["prediction"].lower() for label in LABELS) for row in lines(tmp_path / "b").values()
    )


def test_dialogues_are_scored_with_stems_and_case(base: Path, shared_data: Path, tmp_path: Path) -> None:
    words = (base, "--task", "samsum", "--data_path", shared_data / "samsum", "--num_samples", 3)
    assert evaluated(*words, "--max_new_tokens", 5, "-o", tmp_path / "out") == 0
    scoring = EvaluationResult.load(tmp_path / "out").settings["scoring"]
    assert "stems" in scoring["rouge"] and "case:mixed" in scoring["bleu"]


def test_overlong_items_are_dropped_or_cut_aloud(base: Path, tmp_path: Path, capsys: Any) -> None:
    pairs = [("It rains. " * 60, "neutral"), ("It rains.", "neutral"), ("It snows.", "entailment")]
    rows = [
        {"pairID": str(n), "sentence1": text, "sentence2": "Wet.", "gold_label": label}
        for n, (text, label) in enumerate(pairs)
    ]
    data = tmp_path / "multinli_1.0_dev_matched.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (base, "--task", "multi_nli", "--data_path", tmp_path, "--max_seq_length", 200)
    for policy, items, note in (
        ("drop", 2, "1 samples dropped"),
        ("truncate_source", 3, "source of 1 samples was cut"),
    ):
        assert evaluated(*words, "--overlong", policy, "-o", tmp_path / policy) == 0
        assert EvaluationResult.load(tmp_path / policy).n == items
        assert note in capsys.readouterr().out
    assert evaluated(*words, "--overlong", "error", "-o", tmp_path / "error") == 3


def test_download_is_asked_for_by_its_flag_only(
    base: Path, restaurants: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[bool] = []

    def reads(name: str, path: str, split: str, how: DataSection) -> Any:
        asked.append(how.download)
        return load(name, path, split, replace(how, download=False))

    monkeypatch.setattr("rankwise.evaluate.tasks.load", reads)
    words = (base, "--task", "e2e_nlg", "--data_path", restaurants, "--max_new_tokens", 2, "-o", tmp_path)
    assert evaluated(*words) == evaluated(*words, "--download") == 0
    assert asked == [False, True]


def test_queries_are_scored_on_their_tables(base: Path, shared_data: Path, tmp_path: Path, capsys: Any) -> None:
    words = (base, "--task", "wikisql", "--data_path", shared_data / PLACES["wikisql"][0], "--num_samples", 4)
    assert evaluated(*words, "--max_new_tokens", 5, "-o", tmp_path / "out") == 0
    result = EvaluationResult.load(tmp_path / "out")
    assert {"exact_match", "logical_form", "execution_accuracy"} <= {*result.metrics, *result.unavailable}
    assert "wikisql, n = 4: exact_match" in capsys.readouterr().out


# --- forgetting --------------------------------------------------------------------------------------------------


@pytest.fixture
def other_text(tmp_path: Path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text("One text about food.\n\nAnother about a river.\n\nThe last one, on prices.", encoding="utf-8")
    return path


def test_forgetting_needs_no_task(adapter: Path, other_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(adapter, "--forget", other_text) == 0
    result = EvaluationResult.load(adapter / "evaluation" / FORGETTING)
    assert result["kl"] > 0 and result.n == 3
    assert f"KL(base || adapted) {result['kl']:.4f}" in capsys.readouterr().out
    assert not (adapter / "evaluation" / "evaluation_results.json").exists()
    recorded = json.loads((adapter / "evaluation" / "manifest.json").read_text())["stages"]["evaluate"]
    assert set(recorded["outputs"]) == {"forgetting"}


def test_a_merged_model_is_compared_with_its_base(base: Path, other_text: Path, tmp_path: Path, capsys: Any) -> None:
    other = tiny_llama(tmp_path / "merged", initializer_range=0.3, seed=4)
    assert evaluated(other, "--forget", other_text) == 2
    assert "--base_model_id" in capsys.readouterr().err
    assert evaluated(other, "--forget", other_text, "--base_model_id", base) == 0
    assert EvaluationResult.load(other / "evaluation" / FORGETTING)["kl"] > 0
    assert evaluated(base, "--forget", other_text, "--base_model_id", base, "-o", tmp_path / "same") == 0
    assert EvaluationResult.load(tmp_path / "same" / FORGETTING)["kl"] == 0


def test_a_base_with_other_tokens_is_refused(base: Path, other_text: Path, tmp_path: Path, capsys: Any) -> None:
    other = tiny_llama(tmp_path / "other", ["quite other texts about forgetting"])
    assert evaluated(other, "--forget", other_text, "--base_model_id", base) == 3
    assert "tokenize the text differently" in capsys.readouterr().err


# --- what cannot work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a model"),
        (("m",), "needs --task"),
        (("m", "--task", "e2e"), "--task is one of e2e_nlg"),
        (("m", "--task", "e2e_nlg"), "--data_path is missing"),
        (("m", "--forget", "x.txt", "--num_fewshot", "2"), "acts only with --task lm_eval:NAME"),
        (("m", "--task", "lm_eval:x", "--engine", "vllm"), "--engine transformers"),
        (("m", "--task", "lm_eval:x", "--lm_eval_tasks_path", "no/such"), "not a folder of task files"),
        (
            ("m", "--task", "e2e_nlg", "--data_path", "d", "--num_samples", "0"),
            "--num_samples is 0; give",
        ),
        (("m", "--forget", "x.txt", "--engine", "vllm"), "--forget needs the logits"),
        (("m", "--forget", "x.txt", "--classify", "guess"), "likelihood, generation"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_read(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", *words, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "m", "--task", "e2e_nlg", "--data_path", "d", "--forget", "x.txt", "-o", "out"]
    shown = "\n".join(evaluate.describe(cli.resolve("evaluate", words[1:])[0]))
    assert cli.main([*words, "--dry-run"]) == 3
    assert "x.txt: no such file or folder (--forget)" in capsys.readouterr().err
    assert "out/evaluation_results.json" in shown and "out/forgetting.json" in shown


def test_defaults_are_those_that_the_documents_name() -> None:
    config = EvaluateConfig()
    assert (config.classify, config.engine, config.data.overlong) == ("likelihood", "transformers", "truncate_source")
