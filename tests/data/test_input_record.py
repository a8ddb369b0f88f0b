"""input.json: what decides the prompts travels with all that is made of a training run, and is noticed if not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import (
    FAST,
    OTHER_TEMPLATE,
    chat_base,
    conversation,
    edited,
    evaluate,
    exported_by_hand,
    jsonl,
    overheard,
    run,
    talks,
    train,
    trained_prompts,
)
from rows import adapted_base
from tiny import CHAT_TEMPLATE, tiny_llama, tiny_tokenizer
from transformers import AutoTokenizer

from rankwise.data.input_record import InputRecord, as_recorded, read_input, recorded
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.evaluate.engines import load as load_trained
from rankwise.files.adapter import INPUT
from rankwise.files.atomic import read_object, write_json
from rankwise.models.adapters import save_adapter
from rankwise.models.load import load_config
from rankwise.options.sections import DataSection, ModelSection
from rankwise.report.card import files_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talks(tmp_path_factory.mktemp("rows") / "rows.jsonl")


@pytest.fixture(scope="module")
def chat_run(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(base, tmp_path_factory.mktemp("made") / "run", "--data_path", rows, "--max_seq_length", 64)


@pytest.fixture
def own_run(chat_run: Path, tmp_path: Path) -> Path:
    """The run, to be damaged."""
    return Path(shutil.copytree(chat_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def chat_merged(chat_run: Path) -> Path:
    assert run("merge", chat_run, "-o", chat_run.parent / "merged") == 0
    return chat_run.parent / "merged"


@pytest.fixture
def merged(chat_merged: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chat_merged, tmp_path / "merged"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    return overheard(monkeypatch)


# --- auto ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "style"), [(CHAT_TEMPLATE, "chat"), (None, "sections")])
def test_conversations_of_a_chat_model_are_chat(
    template: str | None, style: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_llama(tmp_path / "base", tokenizer={"chat_template": template})
    out = train(base, tmp_path / "run", "--data_path", rows)
    assert read_object(out / INPUT)["prompt"] == style
    assert {"chat": "prompts: chat template", "sections": "prompts: headed sections"}[style] in capsys.readouterr().out


def test_a_task_of_sections_stays_one_on_a_chat_model(base: Path, tmp_path: Path) -> None:
    (tmp_path / "trainset.csv").write_text("mr,ref\n" + "".join(f'"name[a{n}]",text {n}\n' for n in range(6)))
    out = train(base, tmp_path / "run", "--task", "e2e_nlg", "--data_path", tmp_path)
    assert read_object(out / INPUT)["prompt"] == "sections"


def test_a_resumed_run_keeps_its_own_style(base: Path, rows: Path, tmp_path: Path) -> None:
    """The flag is not repeated; a run of before there were records goes on as it was, too."""
    saving = ("--data_path", rows, "--save_strategy", "steps", "--save_steps", 1)
    for name in ("run", "old"):
        train(base, tmp_path / name, *saving, "--prompt", "sections", "--max_seq_length", 100)
    (tmp_path / "old" / INPUT).unlink()
    going_on = (*saving, "--max_steps", 3, "--resume_from_checkpoint", "true")
    train(base, tmp_path / "run", *going_on)
    assert read_object(tmp_path / "run" / INPUT)["prompt"] == "sections"
    assert run("train", "--model_name", base, "-o", tmp_path / "run", *FAST, *going_on, "--prompt", "chat") == 2
    train(base, tmp_path / "old", *going_on, "--max_seq_length", 100)
    assert read_object(tmp_path / "old" / INPUT)["prompt"] == "sections"


def test_a_chat_run_of_an_earlier_version_goes_on(base: Path, rows: Path, tmp_path: Path) -> None:
    """Its checkpoints do not say which template they learnt with."""
    saving = ("--data_path", rows, "--save_strategy", "steps", "--save_steps", 2, "--prompt", "chat")
    out = train(base, tmp_path / "run", *saving)
    file = out / "checkpoint-2" / "rankwise_manifest.json"
    content = read_object(file)
    content["identity"] = {k: v for k, v in content["identity"].items() if not k.startswith("chat_template")}
    write_json(file, content)
    (out / INPUT).unlink()
    train(base, out, *saving, "--max_steps", 3, "--resume_from_checkpoint", "true")
    assert read_object(out / INPUT)["prompt"] == "chat", "written anew, as it was trained"


# --- noticed where it is not as it was -------------------------------------------------------------------------------


def test_an_artefact_without_a_record_is_read_as_before_aloud(
    own_run: Path, rows: Path, asked: dict[str, list[int]], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Conversations without images were sections then."""
    (own_run / INPUT).unlink()
    assert evaluate(own_run, "--task", "conversations", "--data_path", rows) == 0
    assert f"warning: {own_run} has no {INPUT}" in capsys.readouterr().out
    renderer = renderer_for(DataSection(prompt="sections"), ModelSection(), str(base), load_config(str(base)))
    assert asked.items() <= trained_prompts(renderer, load("conversations", rows)).items()


def test_another_flag_is_warned_about_and_another_template_too(
    own_run: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--task", "conversations", "--data_path", rows)
    assert evaluate(own_run, *words, "--prompt", "sections", "-o", tmp_path / "a") == 0
    said = capsys.readouterr().out
    assert "warning: --prompt: prompts are not those of training" in said
    assert '"chat" in training, "sections" now' in said
    edited(own_run, chat_template_sha256="0" * 64)
    assert evaluate(own_run, *words, "-o", tmp_path / "b") == 0
    assert "warning: prompts are not those of training" in capsys.readouterr().out
    assert evaluate(edited(own_run, chat_template=OTHER_TEMPLATE), *words, "-o", tmp_path / "c") == 3
    assert "its chat_template is not the one of its chat_template_sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", [{"prompt": "prose"}, {"end_tokens": {}}, {"format": "rankwise-input/9"}, {"max_seq_length": "64"}]
)
def test_a_damaged_record_is_named(
    damage: dict[str, Any], own_run: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(edited(own_run, **damage), "--task", "conversations", "--data_path", rows) == 3
    assert str(own_run / INPUT) in capsys.readouterr().err


def validated(export: Path, rows: Path, *more: Any) -> int:
    return run("validate", export, "--task", "conversations", "--data_path", rows, "-o", export.parent / "v", *more)


def test_validate_refuses_other_prompts(
    merged: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both sides would be asked wrongly alike, and the proof would hold."""
    export = exported_by_hand(merged, tmp_path / "export")
    assert validated(export, rows, "--prompt", "sections") == 2
    assert "--prompt: prompts are not those of training" in capsys.readouterr().err
    assert validated(edited(export, prompt="sections", chat_template_sha256=None), rows) == 3
    assert "come from different training runs" in capsys.readouterr().err
    shutil.copyfile(merged / INPUT, export / INPUT)
    (merged / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    assert validated(export, rows) == 3
    assert "chat_template_sha256" in capsys.readouterr().err


TABLES = 'TEXT_MODEL_MAP = {"LlamaForCausalLM": "a"}\nMMPROJ_MODEL_MAP = {}\n'


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that knows our model and would fail."""
    folder = tmp_path_factory.mktemp("converter")
    (folder / "conversion").mkdir()
    (folder / "conversion" / "__init__.py").write_text(TABLES)
    (folder / "convert_hf_to_gguf.py").write_text("def main():\n    raise OSError('half')\n")
    return folder


@pytest.mark.parametrize("damage", ["template", "record", "end token"])
def test_export_refuses_a_model_whose_prompts_are_not_those_of_its_training(
    damage: str, merged: Path, converter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    words = ("export", merged, "--llama_cpp_dir", converter, "-o", tmp_path / "out")
    assert run(*words) == 6, "as it is, it comes to the converter"
    assert f"— from {merged / INPUT}" in capsys.readouterr().out
    if damage == "template":
        (merged / "chat_template.jinja").write_text(OTHER_TEMPLATE)
    elif damage == "record":
        edited(merged, chat_template_sha256="0" * 64)
    else:
        write_json(merged / "generation_config.json", {"eos_token_id": [2, 3]})
    assert run(*words) == 3
    assert "prompts are not those of training" in capsys.readouterr().err
    assert not (tmp_path / "out" / "export.json").exists()


# --- carried along ---------------------------------------------------------------------------------------------------


def test_a_given_template_becomes_the_merged_models_own(base: Path, rows: Path, tmp_path: Path) -> None:
    """Whoever uses the merged tokenizer, llama.cpp's converter among them, asks as training did."""
    (tmp_path / "own.jinja").write_text(OTHER_TEMPLATE)
    out = train(base, tmp_path / "run", "--data_path", rows, "--chat_template", tmp_path / "own.jinja")
    assert read_object(out / INPUT)["chat_template"] == OTHER_TEMPLATE
    assert run("merge", out, "-o", tmp_path / "merged") == 0
    record = read_object(tmp_path / "merged" / INPUT)
    assert record["chat_template"] is None
    assert record["chat_template_sha256"] == read_object(out / INPUT)["chat_template_sha256"]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == OTHER_TEMPLATE


def test_merging_refuses_a_tokenizer_with_another_template(own_run: Path, tmp_path: Path, capsys: Any) -> None:
    """The adapter brings a tokenizer, which the merged model gets: it is not the one that training had."""
    tiny_tokenizer(own_run, chat_template=OTHER_TEMPLATE)
    assert run("merge", own_run, "-o", tmp_path / "merged") == 3
    assert "chat_template_sha256" in capsys.readouterr().err
    assert not (tmp_path / "merged" / "config.json").exists()


def test_an_adapters_own_tokenizer_asks_before_and_after_merging(
    base: Path, rows: Path, tmp_path: Path, asked: dict[str, list[int]]
) -> None:
    """An adapter of another program, without a record: merged it has that tokenizer, so it is evaluated with it."""
    out = tmp_path / "adapter"
    out.mkdir()
    model = adapted_base(base)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.normal_(std=0.1)
    save_adapter(model, out, str(base))
    tiny_tokenizer(out, chat_template=OTHER_TEMPLATE)
    words = ("--task", "conversations", "--data_path", rows, "--prompt", "chat")
    assert evaluate(out, *words) == 0
    before = dict(asked)
    assert run("merge", out, "-o", tmp_path / "merged") == 0
    assert not (tmp_path / "merged" / INPUT).exists()
    asked.clear()
    assert evaluate(tmp_path / "merged", *words) == 0
    assert before == asked


def test_a_checkpoint_and_smaller_adapters_have_the_record(base: Path, rows: Path, tmp_path: Path) -> None:
    out = train(base, tmp_path / "run", "--data_path", rows, "--save_strategy", "steps", "--save_steps", 1)
    record = read_input(out)
    assert record and read_input(out / "checkpoint-1") == record
    assert run("merge", out / "checkpoint-1", "-o", tmp_path / "of_checkpoint") == 0
    assert run("compress", out, "--energy", "0.5", "-o", tmp_path / "smaller") == 0
    for folder in ("of_checkpoint", "smaller"):
        found = read_input(tmp_path / folder)
        assert found and found[0] == record[0]


def test_a_fine_tune_is_measured_and_extracted_with_its_prompts(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--use_cpu --max_steps 2 --subset_ratio 1 --batch_size 2 --gradient_accumulation 1 --save both".split()
    probe = tmp_path / "probe"
    assert run("finetune", "--model_name", base, "--data_path", rows, "-o", probe, *words, "--prompt", "raw") == 0
    assert all(
        read_input(probe / kind) == (record_of(probe), probe / kind / INPUT) for kind in ("finetuned", "pretrained")
    )
    capsys.readouterr()
    measured = ("ranks", "--deltas", probe, "--model_name", base, "--task", "conversations", "--gain", rows)
    assert run(*measured, "--num_samples", 2, "--no_plots", "--allow_noise", "-o", tmp_path / "ranks") == 0
    assert f"prompts: the rows' texts alone, up to 512 tokens, answers end at </s> — from {probe / INPUT}" in (
        capsys.readouterr().out
    )
    capsys.readouterr()
    train(base, tmp_path / "warm", "--data_path", rows, "--warm_start", "delta", "--deltas", probe, "--prompt", "chat")
    assert f'{probe} was trained with other prompts: prompt "raw" in training, "chat" now' in capsys.readouterr().out
    assert run("extract", "--deltas", probe, "--rank", 2, "-o", tmp_path / "adapter") == 0
    assert read_input(tmp_path / "adapter") == (record_of(probe), tmp_path / "adapter" / INPUT)


def record_of(folder: Path) -> InputRecord:
    found = read_input(folder)
    assert found
    return found[0]


def test_the_record_of_a_model_is_the_default_of_further_training(merged: Path, rows: Path, tmp_path: Path) -> None:
    edited(merged, overlong="drop")
    out = train(merged, tmp_path / "more", "--data_path", rows, "--task", "conversations")
    found = read_object(out / INPUT)
    assert (found["max_seq_length"], found["overlong"], found["prompt"]) == (64, "drop", "chat")


def test_a_merge_does_not_take_its_bases_record_for_its_own(merged: Path, rows: Path, tmp_path: Path) -> None:
    """An adapter of before there were records, on a base that has one."""
    out = train(merged, tmp_path / "more", "--data_path", rows)
    (out / INPUT).unlink()
    assert run("merge", out, "-o", tmp_path / "again") == 0
    assert not (tmp_path / "again" / INPUT).exists()


def test_the_system_prompt_that_all_rows_share_is_recorded_and_missed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = talks(tmp_path / "shared.jsonl", system="Be brief.")
    out = train(base, tmp_path / "run", "--data_path", shared)
    assert read_object(out / INPUT)["system_prompt"] == "Be brief."
    other = talks(tmp_path / "other.jsonl")
    assert evaluate(out, "--task", "conversations", "--data_path", other, "-o", tmp_path / "e") == 0
    assert "warning: 2 of 2 rows do not begin with the system prompt" in capsys.readouterr().out
    mixed = jsonl(
        tmp_path / "mixed.jsonl", [conversation(0, "Be brief."), conversation(1, "Be long."), conversation(2)]
    )
    found = train(base, tmp_path / "mixed", "--data_path", mixed)
    assert read_object(found / INPUT)["system_prompt"] is None


def test_the_date_of_training_is_asked_with_later(
    base: Path, rows: Path, tmp_path: Path, asked: dict[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that prints the date: next year prompts are those of training, and so are those that the merged
    model's own template makes for others."""
    import datetime

    from rankwise.data import template

    dated = "Today is {{ strftime_now('%Y') }}. " + CHAT_TEMPLATE
    out = train(base, tmp_path / "run", "--data_path", rows, "--chat_template", dated)
    words = ("--task", "conversations", "--data_path", rows)
    assert evaluate(out, *words, "-o", tmp_path / "now") == 0
    before = dict(asked)
    assert run("merge", out, "-o", tmp_path / "merged") == 0

    class Later(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return cls(2099, 1, 1)

    monkeypatch.setattr(template, "date", Later)
    for model in (out, tmp_path / "merged"):
        asked.clear()
        assert evaluate(model, *words, "-o", tmp_path / f"later {model.name}") == 0
        assert before == asked
    assert read_object(tmp_path / "merged" / INPUT)["chat_template_kwargs"] == {}
    own = AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert "strftime_now" not in own and own.startswith(f'Today is {{{{ "{datetime.date.today().year}" }}}}')


def test_variables_are_taken_one_by_one(own_run: Path) -> None:
    edited(own_run, chat_template_kwargs={"date_string": "1 Jan 2026", "thinking": True})
    data = as_recorded(DataSection(chat_template_kwargs={"thinking": False}), recorded([own_run]))
    assert data.chat_template_kwargs == {"date_string": "1 Jan 2026", "thinking": False}
    assert as_recorded(DataSection(prompt="raw"), recorded([own_run])).chat_template_kwargs is None


def test_the_card_says_how_the_model_is_asked_and_the_record_is_published(own_run: Path) -> None:
    assert run("card", own_run) == 0
    assert (
        f"Trained with these prompts ({INPUT}): chat template of the tokenizer" in (own_run / "README.md").read_text()
    )
    assert INPUT in files_of("adapter", own_run)


def test_from_python_too(base: Path, rows: Path, tmp_path: Path) -> None:
    """rankwise.load: the record, and a tokenizer that makes the prompts of training."""
    (tmp_path / "own.jinja").write_text(OTHER_TEMPLATE)
    out = train(base, tmp_path / "run", "--data_path", rows, "--chat_template", tmp_path / "own.jinja")
    trained = load_trained(out, device="cpu")
    assert trained.record == record_of(out)
    assert trained.tokenizer.chat_template == OTHER_TEMPLATE
