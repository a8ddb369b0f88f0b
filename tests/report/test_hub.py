"""Nothing leaves the machine unasked or unproven; what is interrupted goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from published import exported, validated

from rankwise.cli import main
from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.report import hub
from rankwise.report.hub import Upload, upload
from rankwise.train.arguments import build_arguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # of huggingface_hub, uploading by LFS
]

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
