"""Laws of texts in llama.cpp: a GGUF splits them as transformers does, or is not written."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rankwise.cli import main
from rankwise.device.llama.runtime import LlamaServer
from rankwise.errors import VerificationError
from rankwise.files.atomic import read_object, write_json
from rankwise.files.gguf import GGUFFile
from rankwise.gguf import export
from rankwise.gguf.command import split
from rankwise.gguf.converter import Converter
from rankwise.gguf.reading import read_export
from rankwise.gguf.splitting import SCORES, ScoredPieces, check_texts, merge_scores, probing_texts

pytest.importorskip("gguf")

STORIES = Path("tiny_weights/stories260K/hf_converted")
ODD = ("", "a</s>b", "a </s> b", "  lead", "<s>x", "\u200a z", "tab\tnew\nline ", "<0x41>", "東京🙂")


def without_model(model: Path, folder: Path) -> Path:
    """A copy of a model folder that has tokenizer.json alone."""
    shutil.copytree(model, folder)
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return folder


@pytest.mark.usefixtures("converter")
def test_a_tokenizer_json_alone_is_split_as_transformers_does(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real model for which the converter knows no scores: it writes the same one for every piece."""
    pytest.importorskip("xllamacpp")
    model = shared_data / STORIES
    assert main(["export", str(model), "-o", str(tmp_path / "out"), "--outtype", "f16"]) == 0
    said = capsys.readouterr().out
    assert "the tokenizer's 512 tokens; 93 texts split as transformers splits them" in said
    found = read_export(tmp_path / "out")
    tokenizer, pieces = AutoTokenizer.from_pretrained(model), ScoredPieces.of(GGUFFile(found.text("f16")))
    with (shared_data / "e2e_nlg" / "devset.csv").open(encoding="utf-8") as file:
        rows = list(dict.fromkeys(f"{row['mr']} => " for row in csv.DictReader(file)))
    with LlamaServer(found.text("f16"), threads=1) as runtime:
        for text in (*rows[:24], *probing_texts(pieces.ordinary)):
            own = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert runtime.tokenize(text) == pieces.ids(text) == own
        for text in ODD:
            assert runtime.tokenize(text) == pieces.ids(text)


def test_a_real_vocabulary_of_32000_by_its_merges_alone(shared_data: Path) -> None:
    """Scores of merges do what those of SentencePiece do."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "model_configs" / "TinyLlama-1.1B-Chat-v1.0")
    ids = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    special = frozenset(tokenizer.all_special_tokens)
    ordinary = tuple(token.replace("▁", " ") for token in ids if token not in special and not token.startswith("<0x"))
    pieces = ScoredPieces(ids, merge_scores(tokenizer), special, ordinary, spaced=True)
    texts = list(probing_texts(ordinary))[:800]
    assert [pieces.ids(text) for text in texts] == tokenizer(texts, add_special_tokens=False)["input_ids"]


def test_scores_that_are_all_the_same_are_found(
    text_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the converter writes without a tokenizer.model."""
    model = without_model(text_export.parent / "model", tmp_path / "model")
    words = ["export", str(model), "-o", str(tmp_path / "out"), "--outtype", "f16"]
    monkeypatch.setattr(export, "score", lambda *_: None)
    assert main(words) == 6 and "other scores than the tokenizer's" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(words) == 0
    stated = GGUFFile(tmp_path / "out" / "model-f16.gguf")
    assert len(set(stated.metadata[SCORES])) > 100 and check_texts(stated, model, None)[0] > 50


def test_merges_that_no_scores_give_are_refused(
    converter: Converter, text_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A BPE that was not made from SentencePiece joins few of the pairs that its pieces allow; llama.cpp joins all."""
    model = without_model(text_export.parent / "model", tmp_path / "model")
    content = read_object(model / "tokenizer.json")
    pairs = {"".join(pair): pair for pair in content["model"]["merges"][::-1]}  # one way to make each piece
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if pairs["".join(pair)] == pair]
    write_json(model / "tokenizer.json", content)
    assert main(["export", str(model), "-o", str(tmp_path / "out"), "--outtype", "f16"]) == 6
    error = capsys.readouterr().err
    assert "llama.cpp would split '" in error and "no scores give this tokenizer's order" in error
    assert not (tmp_path / "out").exists()


def test_what_unigram_states_is_not_joined_as_unigram_splits(text_export: Path, tmp_path: Path) -> None:
    """Each key right by itself: tokens, kinds, and scores, in another order."""
    file, model = GGUFFile(text_export / "model-f16.gguf"), text_export.parent / "model"
    assert check_texts(file, model, None)[0] > 50
    file.metadata[SCORES][:] = file.metadata[SCORES][::-1]
    with pytest.raises(VerificationError, match=r"would split .* into \[.*transformers into \["):
        check_texts(file, model, None)


def test_texts_around_special_tokens_are_a_note(text_export: Path) -> None:
    """llama.cpp puts a space behind each, transformers 5 before the first text alone."""
    file, model = GGUFFile(text_export / "model-f16.gguf"), text_export.parent / "model"
    plain, chat = (check_texts(file, model, one)[1] for one in (None, "{{ message }}{{ eos_token }}\n"))
    (leading,) = plain
    assert "begins with a space" in leading and chat[:1] == plain
    assert "around special tokens of the chat template" in chat[1] and "'a</s>b'" in chat[1]


def test_texts_of_another_kind_of_tokenizer_are_not_said_to_be_compared(text_export: Path) -> None:
    file = GGUFFile(text_export / "model-f16.gguf")
    file.metadata["tokenizer.ggml.model"] = "gpt2"
    assert check_texts(file, text_export.parent / "model", None) == (0, [])
    compared = {"tokens": 400, "chat_template": True, "texts": 0}
    assert (
        split(compared) == "the tokenizer's 400 tokens and template (`rankwise validate` compares how texts are split)"
    )
