"""The model card says what the records say and nothing else, and nothing leaves the machine unasked or unproven."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fake_hub import FakeHub
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from test_merge import adapter_on
from tiny import tiny_llama

from rankwise.cli import main
from rankwise.data.sources import table
from rankwise.data.sources.official import Download
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.atomic import sha256
from rankwise.files.run_folder import SITES, RunFolder
from rankwise.merge.command import run as merge
from rankwise.options.commands import MergeConfig
from rankwise.page.blocks import Table
from rankwise.page.template import markdown_table
from rankwise.report import hub
from rankwise.report.card import MARK, CardFacts, model_card
from rankwise.report.card_facts import ManifestEntry
from rankwise.report.hub import Upload, upload
from rankwise.report.metadata import Metric, WidgetExample, hub_dataset, license_of
from rankwise.train.arguments import build_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub, uploading by LFS
]

TRAINED = {"task": "e2e_nlg", "learning_rate": 2e-4, "num_train_epochs": 3.0, "lora_dropout": 0.05, "use_dora": False}
RUNGS = ("pixels", "image tokens", "token ids", "embeddings", "logprobs", "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run: a trained adapter, scores before and after, merged, exported, validated."""
    root = tmp_path_factory.mktemp("made")
    base = tiny_llama(root / "secret_place" / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    (root / "rows.json").write_text("[]")
    train = adapter_on(base, root / "run" / "train")
    with RunFolder(train).recording("train", {"model": str(base), "data": str(root / "rows.json")}) as record:
        RunFolder(train).save_config({**TRAINED, "hub_token": "hf_abcdefgh"})
        record.facts |= {"trainable_parameters": 1234, "total_parameters": 50_000, "steps": 40, "training_seconds": 61}
    (train / "checkpoint-40").mkdir()
    (train / "checkpoint-40" / "optimizer.pt").write_bytes(b"state")
    for name, value in (("before", 10.0), ("after", 61.25)):
        (root / "run" / name).mkdir()
        intervals = {"bleu": (value - 1, value + 1)}
        EvaluationResult("e2e_nlg", {"bleu": value}, intervals, 547).save(root / "run" / name)
    merge(MergeConfig(adapter=str(train), output_dir=str(root / "run" / "merged"), dtype="bfloat16"))
    sites = [{"path": f"s{rank}", "rank": rank, "shape": [32, 32]} for rank in (2, 6)]
    SITES.write(train, {"sites": sites, "left_out": []})
    exported(root / "run" / "gguf", root / "run" / "merged")
    validated(root / "run" / "validation")
    return root


def exported(folder: Path, model: Path, verification: Any = None) -> None:
    folder.mkdir()
    (folder / "tiny-q8_0.gguf").write_bytes(b"G" * 5_000_000)
    (folder / "device.json").write_text("{}")
    files = {"text": "tiny-q8_0.gguf", "mmproj": None, "bytes": {"text": 5_000_000}, "sha256": {"text": "c0ffee" * 9}}
    content = {
        "format": "rankwise-export/1",
        "model": {"path": str(model), "fingerprint": "0"},
        "converter": {"version": "0.3.36", "sha256": "832d"},
        "files": {"q8_0": files},
        "verification": {"errors": {}} if verification is None else verification,
    }
    (folder / "export.json").write_text(json.dumps(content))


def validated(folder: Path, broken: str | None = None) -> None:
    folder.mkdir(exist_ok=True)
    rungs = [{"name": name, "status": "broken" if name == broken else "ok"} for name in RUNGS]
    rungs[3]["status"] = "not measured"
    one = {"task": "labels", "method": "generation", "accuracy": 0.871, "interval": [0.801, 0.922], "n": 120}
    content = {
        "format": "rankwise-validation/1",
        "outtype": "q8_0",
        **one,
        "reference": one,
        "verdict": ["q8_0: as trained"],
        "by_outtype": {"q8_0": one},
        "parity": {"q8_0": {"first_broken": broken, "rungs": rungs}},
        "failures": [f"q8_0: the rung `{broken}` is broken"] if broken else [],
    }
    (folder / "validation.json").write_text(json.dumps(content))


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "phone"))


SECRET = "hf_TestOnlyNotAToken"


class StandIn:
    """Keeps what the hub would have been told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create", {"repo_id": repo_id, **options}))
        return f"https://hub.example/{repo_id}"

    def get_paths_info(self, repo_id: str, paths: Sequence[str]) -> list[Any]:
        return []

    def create_commit(self, repo_id: str, operations: Sequence[CommitOperationAdd], **options: Any) -> None:
        self.calls.append(("commit", {one.path_in_repo: one.path_or_fileobj for one in operations}))

    @property
    def sent(self) -> Mapping[str, Any]:
        return dict(self.calls)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    monkeypatch.setattr(hub, "get_token", lambda: SECRET)
    return stand_in


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


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


FILES = {
    "export": {"tiny-q8_0.gguf", "device.json"},
    "adapter": {"adapter_model.safetensors", "adapter_config.json", "sites.json"},
    "merged": {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"},
}


@pytest.mark.parametrize("kind", FILES)
def test_exactly_the_named_files_are_uploaded(kind: str, run: Path, api: StandIn) -> None:
    words = ["card", str(run), "--files", kind, "--push_to_hub", "org/tiny", "--private"]
    assert main(words) == 0
    assert [name for name, _ in api.calls] == ["create", "commit"]
    assert api.sent["create"] == {"repo_id": "org/tiny", "repo_type": "model", "private": True, "exist_ok": True}
    sent = api.sent["commit"]
    assert set(sent) == FILES[kind] | {"README.md"}
    assert all(isinstance(sent[name], bytes) or Path(sent[name]).is_file() for name in FILES[kind])
    assert sent["README.md"] == (run / "README.md").read_bytes()
    assert "# tiny\n" in sent["README.md"].decode()


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """The hub's own client against a fake hub, without waiting between its attempts."""
    with FakeHub() as fake:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        monkeypatch.setattr(hub, "HfApi", partial(HfApi, endpoint=fake.url, token=SECRET))
        monkeypatch.setattr(hub, "get_token", lambda: SECRET)
        monkeypatch.setattr(hub, "LARGE", 1000)
        yield fake


def test_an_interrupted_upload_goes_on_with_what_is_missing(
    loopback: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The connection drops in the middle of the second of three large files; small files and the card come last."""
    shards = [f"model-{number}.safetensors" for number in (1, 2, 3)]
    content = {name: bytes([65 + number]) * 5000 for number, name in enumerate(shards)} | {"config.json": b"{}"}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    what = Upload("org/tiny", tmp_path, tuple(content), "the card")
    loopback.drop_at = 2
    with pytest.raises(ServiceError, match="run it again: only what is missing is sent") as caught:
        upload(what)
    assert SECRET not in str(caught.value)
    assert loopback.commits == [shards[:1]] and set(loopback.files) == set(shards[:1])
    loopback.drop_at, loopback.down = 0, False
    assert upload(what) == f"{loopback.url}/org/tiny"
    assert "already there: 1 of 5 files" in capsys.readouterr().out
    assert loopback.commits == [[shards[0]], [shards[1]], [shards[2]], ["config.json", "README.md"]]
    assert len(loopback.puts) == 3, "no large file was sent twice"
    assert loopback.files == content | {"README.md": b"the card"}
    upload(what)
    assert len(loopback.commits) == 4 and len(loopback.puts) == 3, "nothing is missing"
    (tmp_path / "config.json").write_bytes(b"[]")
    upload(what)
    assert loopback.commits[4:] == [["config.json"]], "of the same size, other content"


@pytest.mark.parametrize("kind", FILES)
def test_nothing_of_this_machine_is_in_what_is_sent(
    kind: str, run: Path, made: Path, loopback: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(run), "--files", kind, "--push_to_hub", "org/tiny"]) == 0
    sent = b"".join([*loopback.sent, *loopback.files.values()])
    for secret in (SECRET, "hf_abcdefgh", "secret_place", str(made), str(run)):
        assert secret.encode() not in sent, secret
    assert set(loopback.files) == FILES[kind] | {"README.md"}
    if kind == "adapter":
        assert json.loads(loopback.files["adapter_config.json"])["base_model_name_or_path"] == "base"
        assert "give --base_model ORG/NAME" in capsys.readouterr().out
        assert main(["card", str(run), "--files", kind, "--push_to_hub", "org/tiny", "--base_model", "org/base"]) == 0
        assert json.loads(loopback.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
        assert "secret_place" in (run / "train" / "adapter_config.json").read_text(), "the file here is as it was"


def test_a_base_named_by_a_relative_path_is_not_sent_as_a_hub_id(
    run: Path, api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = run / "train" / "adapter_config.json"
    words = ["card", str(run), "--files", "adapter", "--push_to_hub", "org/tiny"]
    for named, more, sent in (
        ("models/base", [], b'"base"'),
        ("models/base", ["--base_model", "org/base"], b'"org/base"'),
        ("org/old_name", ["--base_model", "org/base"], b'"org/base"'),
    ):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
        assert main([*words, *more]) == 0
        assert b'"base_model_name_or_path": ' + sent in api.sent["commit"]["adapter_config.json"]


def test_a_file_that_cannot_be_read_is_not_the_hubs_fault(
    api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    what = Upload("org/tiny", tmp_path, ("config.json",), "the card")
    with pytest.raises(DataError, match=r"config\.json"):
        upload(what)
    assert api.calls == [], "before the repository is made"
    (tmp_path / "config.json").write_text("{}")

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied", "config.json")

    monkeypatch.setattr(hub, "is_same", refuse)
    with pytest.raises(DataError, match=r"Permission denied.*make the file readable"):
        upload(what)


def test_without_a_token_nothing_is_made(
    run: Path, loopback: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    for more in ([], ["--dry-run"]):
        assert main(["card", str(run), "--push_to_hub", "org/tiny", *more]) == 2
        assert "hf auth login" in capsys.readouterr().err
    assert not (run / "README.md").exists() and not loopback.sent


BROKEN = {
    "ladder": lambda run: validated(run / "validation", "logprobs"),
    "export": lambda run: (shutil.rmtree(run / "gguf"), exported(run / "gguf", run / "merged", {})),
    "merge": lambda run: edit_merge(run / "merged" / "manifest.json"),
}


def edit_merge(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    del content["stages"]["merge"]["verification"]
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_proven_is_not_uploaded(
    what: str, run: Path, api: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[what](run)
    words = ["card", str(run), "--push_to_hub", "org/tiny"]
    assert main(words) == 6
    assert api.calls == [] and "--allow_unverified" in capsys.readouterr().err
    assert main([*words, "--files", "adapter"]) == 0, "the adapter is not what failed"
    assert main([*words, "--allow_unverified"]) == 0
    text = (run / "README.md").read_text()
    assert {"ladder": "`logprobs` is broken", "export": "not verified", "merge": "not verified"}[what] in text
    if what == "ladder":
        assert "logprobs **broken**" in text


@pytest.mark.usefixtures("no_network")
def test_nothing_is_uploaded_unasked(run: Path, api: StandIn) -> None:
    assert main(["card", str(run)]) == 0
    assert main(["card", str(run), "--push_to_hub", "org/tiny", "--dry-run"]) == 0
    assert main(["card", str(run), "--private"]) == 2
    assert main(["card", str(run), "--push_to_hub", "no name"]) == 2
    assert main(["card"]) == 2
    assert api.calls == []


@pytest.mark.parametrize("error", [LocalTokenNotFoundError, ConnectionError, OSError])
def test_a_hub_that_refuses_is_a_services_error_without_the_token(
    error: type[Exception], api: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error("401 for token hf_abcDEF123 with Bearer xyz\nmore")

    monkeypatch.setattr(api, "create_repo", refuse)
    with pytest.raises(ServiceError, match=r"org/tiny.*hf auth login") as caught:
        upload(Upload("org/tiny", tmp_path, (), "card"))
    assert "hf_abc" not in str(caught.value) and "xyz" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert issubclass(HfHubHTTPError, OSError)


def test_training_uploads_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rankwise card RUN --push_to_hub"):
        build_arguments(tmp_path, 0, {"push_to_hub": True})
    assert not build_arguments(tmp_path, 0, {"use_cpu": True}).push_to_hub


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
