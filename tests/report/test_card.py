"""The model card says what the records say and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from rankwise.cli import main
from rankwise.data.sources import table
from rankwise.data.sources.official import Download
from rankwise.files.atomic import sha256
from rankwise.files.run_folder import RunFolder
from rankwise.page.blocks import Table
from rankwise.page.template import markdown_table
from rankwise.report.card import MARK, CardFacts, model_card
from rankwise.report.card_facts import ManifestEntry
from rankwise.report.metadata import Metric, WidgetExample, hub_dataset, license_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


@pytest.mark.usefixtures("no_network")
def test_the_card_says_what_was_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["card", str(run)]) == 0
    assert "card of the export" in capsys.readouterr().out
    text = (run / "README.md").read_text()
    for words in (
        "rows.json",
        "ranks 2 to 6",
        "1,234 of 50,000",
        "| learning rate | 0.0002 |",
        "40 in 1 min 01 s",
        "| after | e2e_nlg | BLEU |",
        "61.25",
        "60.25 to 62.25",
        "compared with base + adapter on random tokens",
        "Rounding to bfloat16",
        "tiny-q8_0.gguf",
        "5 MiB",
        "| q8_0 | labels by generation | accuracy | 87.10 | 80.10 to 92.20 | 120 |",
        "## Scores before export, in transformers",
        "pixels, image tokens, token ids, logprobs, text agree with the trained model; embeddings not measured",
        f"torch {torch.__version__.split('+')[0]}",
        "Safety, bias",
    ):
        assert words in text, words
    data = front(text)
    assert data["license"] == "apache-2.0" and data["library_name"] == "llama.cpp" and "gguf" in data["tags"]
    assert "base_model" not in data, "a folder is no hub id"
    [result] = data["model-index"][0]["results"]
    how = "accuracy (q8_0 in llama.cpp, by generation, n = 120, 95 % interval 80.10 to 92.20)"
    args = {"n": 120, "interval_95": [80.1, 92.2]}
    told = {"type": "accuracy", "value": 87.1, "name": how, "args": args}
    assert result["metrics"] == [told], "the file's own, not transformers'"
    for private in ("secret_place", str(run.parent), "hf_abcdefgh", "DoRA"):
        assert private not in text


def test_each_kind_has_its_own_scores(run: Path, tmp_path: Path) -> None:
    """A merged model those of transformers; a bundle what it kept of its validation."""
    assert main(["card", str(run), "--files", "merged", "--out", str(tmp_path / "merged.md")]) == 0
    [result] = front((tmp_path / "merged.md").read_text())["model-index"][0]["results"]
    told = {"type": "bleu", "value": 61.25, "name": "bleu (n = 547, 95 % interval 60.25 to 62.25)"}
    assert result["metrics"] == [told | {"args": {"n": 547, "interval_95": [60.25, 62.25]}}]
    own = {"task": "labels", "method": "generation", "n": 5, "accuracy": 1.0, "interval": [0.5655, 1.0]}
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    content = {"format": "rankwise-bundle/1", "outtype": "q8_0", "validation": own, "files": {}}
    (bundle / "bundle.json").write_text(json.dumps(content))
    assert main(["card", str(bundle), "--out", str(tmp_path / "bundle.md")]) == 0
    text = (tmp_path / "bundle.md").read_text()
    assert "| q8_0 | labels by generation | accuracy | 100.00 | 56.55 to 100.00 | 5 |" in text
    [result] = front(text)["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == 100


def test_the_records_of_a_model_alone_lead_to_its_training(run: Path, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "card.md"
    assert main(["card", str(run / "gguf"), "--out", str(out), "--base_model", "org/base"]) == 0
    text = out.read_text()
    assert "ranks 2 to 6" in text and "compared with base + adapter" in text, "merged model and adapter are found"
    assert "No score was measured" in text and "Not validated in llama.cpp" in text
    assert front(text)["base_model"] == "org/base" and front(text)["base_model_relation"] == "quantized"
    for kind, library in (("adapter", "peft"), ("merged", "transformers")):
        assert main(["card", str(run), "--files", kind, "--out", str(out)]) == 0
        assert front(out.read_text())["library_name"] == library
        assert "gguf" not in out.read_text()
    assert main(["card", str(made / "gone"), "--out", str(out)]) == 3
    assert main(["card", str(made / "secret_place"), "--out", str(out)]) == 3
    assert main(["card", str(run), "--files", "bundle", "--out", str(out)]) == 3


def test_what_was_not_measured_is_said(run: Path) -> None:
    for name in ("after", "validation"):
        shutil.rmtree(run / name)
    assert main(["card", str(run)]) == 0
    text = (run / "README.md").read_text()
    assert "The model after training was not scored." in text and "Not validated in llama.cpp." in text
    assert "model-index" not in front(text) and "61.25" not in text


def test_another_ones_readme_is_kept(run: Path, tmp_path: Path) -> None:
    (run / "README.md").write_text("# Mine\n")
    assert main(["card", str(run)]) == 2
    assert (run / "README.md").read_text() == "# Mine\n"
    assert main(["card", str(run), "--out", str(tmp_path / "card.md")]) == 0
    assert main(["card", str(run), "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text().count(MARK) == 1


def test_text_from_files_stays_text() -> None:
    hostile = "a|b <script>\nalert `x`"
    [_, _, row] = markdown_table(Table(("h",), [(hostile,)]))
    assert row.replace("\\|", "").count("|") == 2 and "<script" not in row and "\n" not in row
    assert row.count("\\`") == row.count("`") == 2, "no code begins"
    facts = CardFacts(
        "x: [y", "merged", "../base", metrics=[Metric("t", "bleu", 1.0, None, 3)], datasets=["/home/me/data"]
    )
    assert front(model_card(facts))["model-index"][0]["name"] == "x: [y"
    assert "base_model" not in front(model_card(facts)) and "datasets" not in front(model_card(facts))


def test_a_license_is_only_what_the_base_says(tmp_path: Path) -> None:
    assert license_of(tmp_path) is None
    for said, found in (("license: mit", "mit"), ("license: unknown", None), ("tags: [x]", None)):
        (tmp_path / "README.md").write_text(f"---\n{said}\n---\n")
        assert license_of(tmp_path) == found


def recorded(tmp_path: Path, data: Path | str) -> ManifestEntry:
    """The entry of a stage that read these data."""
    folder = RunFolder(tmp_path / f"stage{len(list(tmp_path.iterdir()))}")
    with folder.recording("train", {"data": data}):
        pass
    return ManifestEntry(folder.path, folder.stages()["train"])


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose one file is, for this test, the official one of E2E."""
    (tmp_path / "e2e").mkdir()
    file = tmp_path / "e2e" / "trainset.csv"
    file.write_text("mr,ref\nname[x],x\n")
    of_hub = Download("https://hub.example/trainset.csv", sha256(file), file.stat().st_size)
    monkeypatch.setattr(table, "OFFICIAL", [of_hub])
    return file


def test_only_what_the_hub_knows_is_a_data_set_of_the_hub(official: Path, tmp_path: Path) -> None:
    for data in (official, official.parent, Path(shutil.copyfile(official, tmp_path / "mine.csv"))):
        assert hub_dataset(recorded(tmp_path, data)) == "tuetschek/e2e_nlg", data
    assert hub_dataset(recorded(tmp_path, "hf://org/rows")) == hub_dataset(recorded(tmp_path, "org/rows")) == "org/rows"
    (official.parent / "README.md").write_text("# E2E\n")
    assert hub_dataset(recorded(tmp_path, official.parent)) == "tuetschek/e2e_nlg"
    (official.parent / "devset.csv").write_text("mr,ref\nname[mine],mine\n")
    assert hub_dataset(recorded(tmp_path, official.parent)) is None, "rows of its own beside the official file"
    (official.parent / "devset.csv").unlink()
    entry = recorded(tmp_path, official.parent)
    official.write_text(official.read_text() + "name[y],y\n")
    for other in (entry, recorded(tmp_path, official), recorded(tmp_path, official.parent), None):
        assert hub_dataset(other) is None, "edited, or not recorded"


def test_a_folder_that_has_gone_is_no_hub_id(run: Path) -> None:
    """`data/rows`, which was there when it was trained on, looks like ORG/NAME."""
    manifest = run / "train" / "manifest.json"
    content = json.loads(manifest.read_text())
    content["stages"]["train"]["inputs"]["data"]["path"] = "data/rows"
    manifest.write_text(json.dumps(content))
    assert main(["card", str(run)]) == 0
    assert "datasets" not in front((run / "README.md").read_text())


def test_public_data_are_named_and_give_the_widget_its_prompt(run: Path, official: Path, tmp_path: Path) -> None:
    """The first scored prompt as the model got it; of data that are nobody else's to see, none."""
    row = {"id": "0", "prompt": "Data: name[x]\nText:", "prediction": "x.", "references": ["x"]}
    (run / "after" / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["card", str(run), "--files", "merged"]) == 0
    assert "widget" not in front((run / "README.md").read_text())
    shutil.copytree(run, tmp_path / "private")
    with RunFolder(tmp_path / "private" / "after").recording("evaluate", {"data": "hf://org/private_rows"}):
        pass
    assert main(["card", str(tmp_path / "private"), "--files", "merged"]) == 0
    text = (tmp_path / "private" / "README.md").read_text()
    assert "name[x]" not in text and "widget" not in front(text), "a hub id does not say who may see the rows"
    assert front(text)["model-index"][0]["results"][0]["dataset"]["type"] == "org/private_rows"
    with RunFolder(run / "after").recording("evaluate", {"data": official}):
        pass
    with RunFolder(run / "train").recording("train", {"data": official, "model": "org/base"}):
        pass
    assert main(["card", str(run), "--files", "merged"]) == 0
    text = (run / "README.md").read_text()
    card = ModelCard(text)  # the hub's own reader
    assert card.data.datasets == ["tuetschek/e2e_nlg"] and "e2e_nlg" in card.data.tags
    [example] = card.data.widget
    assert example == {"text": row["prompt"], "example_title": "e2e_nlg", "output": {"text": "x."}}
    [result] = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("tuetschek/e2e_nlg", "bleu", 61.25)
    assert result.metric_args == {"n": 547, "interval_95": [60.25, 62.25]}
    assert (card.data.base_model, card.data.base_model_relation) == ("org/base", "finetune")
    assert card.data.pipeline_tag == "text-generation" and card.data.library_name == "transformers"
    assert card.data.to_dict() == ModelCard(str(card)).data.to_dict(), "read and written alike"


def test_metadata_that_the_hubs_reader_takes_back() -> None:
    """Names of metrics as the hub has them, where it has them."""
    found = [Metric("samsum", name, 40.126, (39.0, 41.0), 5) for name in ("rouge_l", "rouge_1", "meteor", "bleu")]
    facts = CardFacts("x", "adapter", "org/base", task="samsum", metrics=found, widget=[WidgetExample("p", "a", "t")])
    data = ModelCard(model_card(facts)).data
    assert [one.metric_type for one in data.eval_results] == ["rouge", "rouge", "meteor", "bleu"]
    assert data.base_model_relation == "adapter" and data.model_name == "x"
    assert all(one.metric_args["interval_95"] == [39.0, 41.0] for one in data.eval_results)
