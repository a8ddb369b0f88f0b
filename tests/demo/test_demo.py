"""Laws of the demo: its world is split honestly, its two tokenizer files agree, and it makes everything it promises."""

from __future__ import annotations

import csv
import json
import random
import shlex
import shutil
from itertools import islice
from pathlib import Path

import pytest
import sentencepiece
from PIL import Image
from transformers import AutoTokenizer

from rankwise import cli
from rankwise.data.sources.load import load
from rankwise.demo import command as demo
from rankwise.demo.restaurants import VALUES, describe, guide, restaurants, write_task
from rankwise.errors import UsageError, VerificationError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.tiny import check_same_ids, save_tokenizer
from rankwise.options.commands import DemoConfig


def some(*, held_out: bool, count: int = 300) -> list[dict[str, str]]:
    return [one.facts for one in islice(restaurants(random.Random(0), held_out=held_out), count)]


def test_held_out_pairs_are_never_met_in_training() -> None:
    train, dev = some(held_out=False), some(held_out=True)
    pairs = [{(facts["name"], facts["food"]) for facts in side} for side in (train, dev)]
    assert not pairs[0] & pairs[1]
    for attribute in VALUES:
        values = [{facts[attribute] for facts in side if attribute in facts} for side in (train, dev)]
        assert values[1] <= values[0], "a held-out row combines anew what training has shown, and no more"


def test_the_base_reads_no_meaning_representation_and_no_held_out_pair() -> None:
    pages = "\n".join(guide(random.Random(0), 500))
    assert not [attribute for attribute in VALUES if f"{attribute}[" in pages]
    references = {describe(one, random.Random(1)) for one in islice(restaurants(random.Random(0), held_out=False), 200)}
    assert not [text for text in references if text in pages], "nor any sentence of the task"


def test_rows_are_the_official_form_with_several_references(tmp_path: Path) -> None:
    write_task(tmp_path / "devset.csv", random.Random(0), count=20, references=3, held_out=True)
    examples = load("e2e_nlg", tmp_path, "dev")
    assert len({example.group for example in examples}) == 20
    assert len(examples) > 40
    first, second = (tmp_path / name for name in ("first.csv", "second.csv"))
    for path in (first, second):
        write_task(path, random.Random(5), count=10, references=2, held_out=False)
    assert first.read_bytes() == second.read_bytes()


def test_every_fact_with_words_of_its_own_is_in_the_reference(tmp_path: Path) -> None:
    write_task(tmp_path / "rows.csv", random.Random(0), count=100, references=2, held_out=False)
    with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            facts = dict(part.rstrip("]").split("[") for part in row["mr"].split(", "))
            named = [facts[name] for name in ("name", "food", "eatType", "near") if name in facts]
            assert not [value for value in named if value not in row["ref"]]


def test_both_tokenizer_files_give_the_same_ids(tmp_path: Path) -> None:
    pages = guide(random.Random(0), 150)
    save_tokenizer(tmp_path, pages, 320)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    others = ["### Input:\nname[Ünïcode  Café], area[123]\n\n### Output:\n", "", "two\n\nbreaks", "£5 €6"]
    check_same_ids(pieces, loaded, [*guide(random.Random(9), 50), *others])
    ids = loaded(pages[0])["input_ids"]
    assert ids[0] == loaded.bos_token_id
    assert loaded.decode(ids, skip_special_tokens=True) == pages[0]
    other = sentencepiece.SentencePieceProcessor(model_file=str(retrained(tmp_path / "other")))
    with pytest.raises(VerificationError, match=r"tokenizer\.model disagree"):
        check_same_ids(other, loaded, pages)


def retrained(folder: Path) -> Path:
    folder.mkdir()
    save_tokenizer(folder, ["quite another text", "of other words"] * 20, 290)
    return folder / "tokenizer.model"


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `rankwise demo --quick` ran."""
    here = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        assert cli.main(["demo", "--quick"]) == 0
    return here


@pytest.mark.slow
def test_the_quick_demo_makes_every_file(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = quick / "runs" / "demo"
    wanted = (
        *("data/trainset.csv", "data/devset.csv", "base/model.safetensors", "base/tokenizer.model"),
        *("base/tokenizer.json", "probe/deltas", "ranks/configs/lora_rank_config.json", "advise/advice.json"),
        *("advise/advice.yaml", "train/adapter_config.json"),
        *("before/evaluation_results.json", "after/predictions.jsonl", "report.html", "report.md"),
    )
    assert not [name for name in wanted if not (folder / name).exists()]
    assert EvaluationResult.load(folder / "after").n == EvaluationResult.load(folder / "before").n > 0
    plan = json.loads((folder / "ranks" / "configs" / "lora_rank_config.json").read_text(encoding="utf-8"))
    assert len(plan["rank_pattern"]) == 7 * 3
    monkeypatch.chdir(quick)
    capsys.readouterr()
    assert cli.main(["demo", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "runs/demo/report.html" in printed.splitlines()[-1]
    assert printed.count("done already") == (7 if demo.lacking_parts() else 10), "nothing again"


# Of the examples in the help: what is smaller here than in the real demo, and what an example before has made.
SMALLER = {
    "advise": "--choose_size 20 --confirm_size 20",
    "study": "--train_size 20 --dev_size 10 --test_size 10",
    "features train": "--epochs 1",
}
SHIPPED = ("export", "validate", "bundle")  # need llama.cpp's converter, or what the demo made by it
ELSEWHERE = ("features downstream",)  # on what `tiny` and `label` make: run in test_downstream.py
MAKES = ("features capture", "features train")
COPIED = {"train": "demo/train", "ranks": "demo/ranks"}


@pytest.mark.slow
def test_the_examples_of_the_help_work_after_the_demo(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that others need run, the others as far as their first write."""
    monkeypatch.chdir(quick)
    (quick / "runs/tiny/photos").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(quick / "runs/tiny/photos/fire.png")
    for made, source in COPIED.items():
        shutil.copytree(quick / "runs" / source, quick / "runs" / made)
    for name, row in cli.COMMANDS.items():
        if name in ELSEWHERE or (name in SHIPPED and demo.lacking_parts()):
            continue
        words = [*shlex.split(row.example)[1:], *SMALLER.get(name, "").split(), *["--dry-run"] * (name not in MAKES)]
        assert cli.split_command(words)[0] == name
        words += ["--overwrite"] * (name == "train")
        assert cli.main(words) == 0, (name, capsys.readouterr().err)


def test_without_llama_cpp_the_demo_says_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(folder: str | None) -> None:
        raise UsageError("no converter: rankwise export --install-converter")

    monkeypatch.setattr(demo, "find_converter", absent)
    assert "install-converter" in demo.lacking_parts()
    whole, part = (demo.recipe_config(DemoConfig(), shipping=shipping) for shipping in (True, False))
    assert whole.only == [] and whole.recipe == part.recipe
    assert set(part.only).isdisjoint(demo.SHIPPING) and "report" in part.only and "train" in part.only
