"""Faults of real GGUF files in a real llama.cpp, each named by the rung that it breaks; sound files break none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader
from parity_models import Scene, exported_pair, scene_in

from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.floor import Floor, measure_floor
from rankwise.device.parity.ladder import Ladder, climb
from rankwise.device.parity.pixels import unavailable
from rankwise.gguf.reading import read_export

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp")
FORMS = ("f16", "q8_0")


@pytest.fixture(scope="module")
def ship(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_pair(tmp_path_factory)


@pytest.fixture(scope="module")
def scene(ship: Path) -> Scene:
    return scene_in(ship / "tuned")


@pytest.fixture(scope="module")
def floor(scene: Scene) -> Floor:
    return measure_floor(scene.reference, scene.cases)


def files(folder: Path, form: str = "f16") -> tuple[Path, Path]:
    exported = read_export(folder / "export")
    mmproj = exported.mmproj(form)
    assert mmproj
    return exported.text(form), mmproj


def ladder_of(scene: Scene, floor: Floor, text: Path, mmproj: Path, form: str = "f16") -> Ladder:
    with LlamaServer(text, mmproj, context=512, threads=1) as runtime:
        return climb(scene.reference, runtime, scene.cases, floor.thresholds(form))


def edited(source: Path, target: Path, edit: Callable[[GGUFReader], None]) -> Path:
    """A copy of a GGUF, changed in place."""
    shutil.copyfile(source, target)
    reader = GGUFReader(target, "r+")
    edit(reader)
    reader.data.flush()
    return target


def named(ladder: Ladder) -> str | None:
    return ladder.first_broken.name if ladder.first_broken else None


@pytest.mark.parametrize("form", FORMS)
def test_sound_files_hold_every_rung(scene: Scene, floor: Floor, form: str) -> None:
    ladder = ladder_of(scene, floor, *files(scene.folder, form), form)
    assert ladder.holds, ladder.first_broken
    assert [rung.status for rung in ladder.rungs].count("ok") == (4 if unavailable() else 5)
    assert ladder["logprobs"].measured["kl_mean"] > 0
    assert ladder["logprobs"].measured["positions"] >= 6 * 4  # the given answers at least


def test_q8_0_is_farther_than_f16_and_not_within_f16_s_limits(scene: Scene, floor: Floor) -> None:
    exact = ladder_of(scene, floor, *files(scene.folder))["logprobs"].measured["kl_mean"]
    as_if_f16 = ladder_of(scene, floor, *files(scene.folder, "q8_0"), "f16")
    assert as_if_f16["logprobs"].measured["kl_mean"] > exact
    assert named(as_if_f16) == "logprobs"


def test_the_base_instead_of_the_tuned_model(ship: Path, scene: Scene, floor: Floor) -> None:
    ladder = ladder_of(scene, floor, files(ship / "base")[0], files(scene.folder)[1])
    assert named(ladder) == "logprobs"
    assert "not from its base" in ladder["logprobs"].why


def test_the_mmproj_of_the_base(ship: Path, scene: Scene, floor: Floor) -> None:
    ladder = ladder_of(scene, floor, files(scene.folder)[0], files(ship / "base")[1])
    assert named(ladder) == "logprobs"
    assert "mmproj" in ladder["logprobs"].why


def tensor(reader: GGUFReader, name: str):
    return next(one for one in reader.tensors if one.name == name).data


def test_query_rows_that_were_not_reordered(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    """transformers' order of rows, halves of a head, where llama.cpp rotates neighbours."""
    heads = scene.model.config.text_config.num_attention_heads

    def undo(reader: GGUFReader) -> None:
        data = tensor(reader, "blk.0.attn_q.weight")
        pairs = data.reshape(heads, data.shape[0] // heads // 2, 2, data.shape[1])
        data[:] = pairs.swapaxes(1, 2).reshape(data.shape).copy()

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, edited(text, tmp_path / "rows.gguf", undo), mmproj)
    assert named(ladder) == "logprobs"


def test_swapped_projections(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    def swap(reader: GGUFReader) -> None:
        first, second = tensor(reader, "blk.1.ffn_gate.weight"), tensor(reader, "blk.1.ffn_up.weight")
        kept = first.copy()
        first[:] = second
        second[:] = kept

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, edited(text, tmp_path / "swapped.gguf", swap), mmproj)
    assert named(ladder) == "logprobs"


def test_another_chat_template_in_the_file(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    def rename(reader: GGUFReader) -> None:
        part = reader.fields["tokenizer.chat_template"].parts[-1]
        part[:] = memoryview(bytes(part).replace(b"Assistant:", b"assistant:"))

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, edited(text, tmp_path / "template.gguf", rename), mmproj)
    assert named(ladder) == "token ids"
    assert "assistant:" in ladder["token ids"].why


def test_special_tokens_that_are_words(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    """Typed as ordinary tokens: the delimiters of a picture are cut into pieces."""

    def ordinary(reader: GGUFReader) -> None:
        field = reader.fields["tokenizer.ggml.token_type"]
        for place in field.data:
            if field.parts[place][0] in (3, 4):
                field.parts[place][0] = 1

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, edited(text, tmp_path / "words.gguf", ordinary), mmproj)
    assert named(ladder) in ("image tokens", "token ids")


def test_another_size_of_tiles_in_the_mmproj(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    def double(reader: GGUFReader) -> None:
        reader.fields["clip.vision.preproc_image_size"].parts[-1][0] *= 2

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, text, edited(mmproj, tmp_path / "tiles.gguf", double))
    assert named(ladder) == "image tokens"


def test_another_normalisation_in_the_mmproj(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    def shift(reader: GGUFReader) -> None:
        field = reader.fields["clip.vision.image_mean"]
        for place in field.data:
            field.parts[place][0] = 0.5

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, text, edited(mmproj, tmp_path / "mean.gguf", shift))
    assert named(ladder) == "logprobs"
    assert "mmproj" in ladder["logprobs"].why


def test_another_end_token_in_the_file(scene: Scene, floor: Floor, tmp_path: Path) -> None:
    """A token that the model writes early ends its answers in llama.cpp."""
    early = scene.reference.expected(scene.cases[0]).answer[1]

    def end(reader: GGUFReader) -> None:
        reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = early

    text, mmproj = files(scene.folder)
    ladder = ladder_of(scene, floor, edited(text, tmp_path / "eos.gguf", end), mmproj)
    assert named(ladder) == "text"
    assert "eos_token_id" in ladder["text"].why
