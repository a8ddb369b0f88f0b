"""Every rung of the parity ladder turns red on the command's own path: the product or a file is damaged, and
`rankwise validate` (or the replay of a bundle) ends with exit 6 and names the rung.

The pictures are labelled by `rankwise label`, which keeps their originals, or are themselves those of a data set.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from parity_models import LONGEST, TARGET, exported_pair, renderer_of, scene_in
from PIL import Image
from test_parity import Embeds
from test_parity_faults import edited

from rankwise.cli import main
from rankwise.core.geometry import letterbox
from rankwise.data import device, pixels, renderer_for
from rankwise.data.device import encoded
from rankwise.data.label_task import read_task
from rankwise.device import sides
from rankwise.device.parity import pixels as pixel_rung
from rankwise.device.parity.cases import case_of
from rankwise.device.parity.ladder import Embedder
from rankwise.device.parity.pixels import unavailable
from rankwise.device.parity.reference import HFReference
from rankwise.evaluate.tasks import task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
pytest.importorskip("xllamacpp")
SIDE = TARGET.image_size


# --- pictures as people have them ------------------------------------------------------------------------------------


def draw(folder: Path) -> None:
    """Wide, tall and large photos, stored on their side or with an alpha channel, in three classes."""
    noise = np.random.default_rng(0)
    for number, label in enumerate(["water", "land", "fire"] * 2):
        width, height = ((96, 40), (40, 90), (150, 190))[number % 3]
        values = noise.integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
        photo = Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST)
        (folder / label).mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        if number % 3 == 1:
            photo.save(folder / label / f"{number}.jpeg", quality=95, exif=exif)
        elif number % 3 == 2:
            mask = np.where(np.indices((height, width)).sum(0) // 20 % 2, 255, 0).astype(np.uint8)
            photo.putalpha(Image.fromarray(mask))
            photo.save(folder / label / f"{number}.png")
        else:
            photo.save(folder / label / f"{number}.png")


@pytest.fixture(scope="module")
def ship(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_pair(tmp_path_factory)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of `rankwise label`, and photos/ that it was made from."""
    folder = tmp_path_factory.mktemp("red")
    draw(folder / "photos")
    arguments = ["--from_folders", "--val_fraction", "0.5", "--image_size", str(SIDE), "-o", str(folder / "dataset")]
    assert main(["label", str(folder / "photos"), *arguments]) == 0
    TARGET.save(folder / "dataset")  # with the tiny model's own longest edge
    return folder / "dataset"


@pytest.fixture(scope="module")
def loose(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same photos as a data set whose pictures are the files themselves."""
    folder = tmp_path_factory.mktemp("loose")
    shutil.copytree(labelled.parent / "photos", folder / "photos")
    read_task(labelled).save(folder)
    TARGET.save(folder)
    files = sorted(path for path in (folder / "photos").rglob("*") if path.is_file())
    rows = [
        {"image_id": path.stem, "image_path": path.relative_to(folder).as_posix(), "label": path.parent.name}
        for path in files
    ]
    for name in ("train.jsonl", "val.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Validating:
    """`rankwise validate` of the f16 file, or of another in its place."""

    def __init__(self, ship: Path, out: Path) -> None:
        self.ship, self.out = ship, out

    def __call__(self, data: Path, *more: str, text: Path | None = None) -> tuple[int, dict[str, Any]]:
        """Exit code, and the rungs by name."""
        export = self.ship / "tuned" / "export"
        files = [str(text), "--mmproj", str(export / "mmproj-model-f16.gguf")] if text else [str(export)]
        files += ["--reference", str(self.ship / "tuned" / "model")] if text else ["--outtype", "f16"]
        shutil.rmtree(self.out, ignore_errors=True)
        few = [] if more else ["--num_samples", "3"]  # one picture of each kind or more
        asked = ["--task", "labels", "--data_path", str(data), "--threads", "1", "-o", str(self.out), *few, *more]
        code = main(["validate", *files, *asked])
        rungs = json.loads((self.out / "validation.json").read_text())["parity"]["f16"]["rungs"]
        return code, {rung["name"]: rung for rung in rungs}


@pytest.fixture
def validate(ship: Path, tmp_path: Path) -> Validating:
    return Validating(ship, tmp_path / "validation")


def skia_here() -> None:
    if unavailable():
        pytest.skip(unavailable())


# --- pixels ----------------------------------------------------------------------------------------------------------


def lanczos_on_white(image: Image.Image, size: int = SIDE) -> Image.Image:
    """In the place of the product's `resize_for_device`."""
    image = pixels.flattened(image, pixels.BLACK)
    place, square = letterbox(*image.size, size), Image.new("RGB", (size, size), "white")
    square.paste(image.resize((place.width, place.height), Image.Resampling.LANCZOS), (place.left, place.top))
    return square


DAMAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "LANCZOS on white": lambda patch: patch.setattr(device, "resize_for_device", lanczos_on_white),
    "EXIF ignored": lambda patch: patch.setattr(pixels, "_orientation", lambda image: 1),
    "alpha on white": lambda patch: patch.setattr(device, "BLACK", pixels.WHITE),
}


def test_label_keeps_originals_that_the_device_changes(labelled: Path) -> None:
    rows = [json.loads(line) for line in (labelled / "val.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for row in rows:
        source, seen = labelled / row["source_path"], labelled / row["image_path"]
        assert source.read_bytes() != seen.read_bytes()
        assert (
            next((labelled.parent / "photos").rglob(f"{source.stem.split('_')[1]}.*")).read_bytes()
            == source.read_bytes()
        )
    assert {Path(row["source_path"]).suffix for row in rows} == {".png", ".jpeg"}
    assert not any("source_path" in line for line in (labelled / "train.jsonl").read_text().splitlines())


@pytest.mark.parametrize("fault", DAMAGES)
def test_what_is_sent_is_held_to_what_was_labelled(
    validate: Validating, labelled: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data set was labelled by a sound program; needs no Skia."""
    monkeypatch.setattr(pixel_rung, "unavailable", lambda: "Skia is not asked")
    DAMAGES[fault](monkeypatch)
    code, rungs = validate(labelled)
    assert code == 6
    assert rungs["pixels"]["status"] == "broken"
    assert "what is sent differs" in rungs["pixels"]["why"]


@pytest.mark.parametrize("fault", DAMAGES)
def test_skia_is_the_other_side_where_everything_else_agrees_with_itself(
    validate: Validating, loose: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training's pixels and those sent come from the same damaged code."""
    skia_here()
    DAMAGES[fault](monkeypatch)
    code, rungs = validate(loose)
    assert code == 6
    assert rungs["pixels"]["status"] == "broken"
    assert "what Skia makes of the source differs" in rungs["pixels"]["why"]
    assert rungs["pixels"]["measured"]["sent_largest_difference"] == 0


@pytest.mark.parametrize("data", ["labelled", "loose"])
def test_a_sound_program_agrees_with_skia(
    validate: Validating, data: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    skia_here()
    code, rungs = validate(request.getfixturevalue(data))
    found = rungs["pixels"]
    assert (code, found["status"], found["note"]) == (0, "ok", "Skia")
    assert found["measured"]["Skia_pictures"] == found["measured"]["changed_by_the_device"] > 0
    assert found["measured"]["Skia_largest_difference"] <= 1 < found["measured"]["android_canvas_largest_difference"]
    said = capsys.readouterr().out
    assert "ok (Skia)" in said


def test_limits_of_few_places_are_called_weak(
    validate: Validating, loose: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two places hold no file to ten floors."""
    code, rungs = validate(loose, "--num_samples", "1", "--max_new_tokens", "1")
    assert code == 0
    assert rungs["logprobs"]["threshold"]["k"] == pytest.approx(199, abs=1)
    assert rungs["logprobs"]["note"] == rungs["text"]["note"] == "weak: k = 199"
    said = capsys.readouterr().out
    assert "ok (weak: k = 199)" in said
    assert "logprobs, text weak" in said


def test_nothing_independent_is_not_measured(
    validate: Validating, loose: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_rung, "unavailable", lambda: "skia is not installed, and takes libGL")
    code, rungs = validate(loose)
    assert code == 0
    assert rungs["pixels"]["status"] == "not measured"
    said = capsys.readouterr().out
    assert "no rung is broken (pixels" in said
    assert "pixels not measured: nothing independent to compare with: skia is not installed, and takes libGL" in said


def test_pictures_that_any_resizer_passes_on_are_not_measured(
    validate: Validating, labelled: Path, tmp_path: Path
) -> None:
    """The data set without its originals: what the documented workflow had."""
    skia_here()
    bare = shutil.copytree(labelled, tmp_path / "bare")
    for name in ("train.jsonl", "val.jsonl"):
        rows = [json.loads(line) for line in (bare / name).read_text().splitlines()]
        kept = [{key: value for key, value in row.items() if key != "source_path"} for row in rows]
        (bare / name).write_text("".join(json.dumps(row) + "\n" for row in kept))
    code, rungs = validate(bare)
    assert code == 0
    assert rungs["pixels"]["status"] == "not measured"
    assert "the device's size already" in rungs["pixels"]["why"]


# --- what the app hands over -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app(loose: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's pictures, by Android's software canvas: not those of training to the bit."""
    folder = tmp_path_factory.mktemp("app")
    reader = pixel_rung.canvas_pixels
    for file in (loose / "photos").rglob("*.*"):
        with Image.open(file) as picture:
            upright = pixels.flattened(picture, pixels.BLACK)
        Image.fromarray(reader(upright, SIDE)).save(folder / f"{file.stem}.png")
    return folder


def test_the_apps_pixels_measure_the_rung_without_skia(
    validate: Validating, loose: Path, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixel_rung, "unavailable", lambda: "Skia is not asked")
    code, rungs = validate(loose, "--app_pixels", str(app))
    assert (code, rungs["pixels"]["status"], rungs["pixels"]["note"]) == (0, "ok", "app")
    assert rungs["pixels"]["measured"]["app_pictures"] == 6
    hashes = {file.name: pixel_rung.sha256_rgb(np.asarray(Image.open(file))) for file in app.iterdir()}
    (tmp_path / "hashes").mkdir()
    (tmp_path / "hashes" / "sha256_rgb.json").write_text(json.dumps(hashes))
    code, rungs = validate(loose, "--app_pixels", str(tmp_path / "hashes"))
    assert (code, rungs["pixels"]["note"]) == (0, "app")
    (tmp_path / "hashes" / "sha256_rgb.json").write_text(json.dumps(hashes | {"0.png": "0" * 64}))
    code, rungs = validate(loose, "--app_pixels", str(tmp_path / "hashes"))
    assert code == 6
    assert "what the app sends differs" in rungs["pixels"]["why"]


def test_an_app_with_another_filter_is_found_out(validate: Validating, loose: Path, tmp_path: Path) -> None:
    for file in (loose / "photos").rglob("*.*"):
        with Image.open(file) as picture:
            lanczos_on_white(picture).save(tmp_path / f"{file.stem}.png")
    code, rungs = validate(loose, "--app_pixels", str(tmp_path))
    assert code == 6
    assert "what the app sends differs" in rungs["pixels"]["why"]
    assert "filter" in rungs["pixels"]["why"]


def test_a_folder_without_the_apps_pictures_is_refused(
    ship: Path, loose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "nothing").mkdir()
    export = str(ship / "tuned" / "export")
    asked = ["--task", "labels", "--data_path", str(loose), "-o", str(tmp_path / "out"), "--app_pixels"]
    assert main(["validate", export, *asked, str(tmp_path / "nothing")]) == 3
    assert "no image from the app" in capsys.readouterr().err
    assert not (tmp_path / "out" / "trained").exists()
    assert main(["validate", export, *asked, str(tmp_path / "nowhere")]) == 2


# --- the rungs above -------------------------------------------------------------------------------------------------


def test_another_layout_of_tiles_breaks_the_image_tokens(
    validate: Validating, loose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training laid a picture out as transformers does, where llama.cpp always adds the whole of it."""
    monkeypatch.setattr(renderer_for, "device_processor", lambda processor, target: processor)
    code, rungs = validate(loose)
    assert code == 6
    assert rungs["image tokens"]["status"] == "broken"


def test_another_template_in_the_file_breaks_the_token_ids(validate: Validating, loose: Path, tmp_path: Path) -> None:
    def rename(reader: GGUFReader) -> None:
        part = reader.fields["tokenizer.chat_template"].parts[-1]
        part[:] = memoryview(bytes(part).replace(b"Assistant:", b"assistant:"))

    source = validate.ship / "tuned" / "export" / "model-f16.gguf"
    code, rungs = validate(loose, text=edited(source, tmp_path / "template.gguf", rename))
    assert code == 6
    assert [name for name, rung in rungs.items() if rung["status"] == "broken"] == ["token ids"]


def test_another_prompt_of_the_product_breaks_the_token_ids(
    validate: Validating, loose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text that is sent is not the one that training cut into ids."""
    own = sides.Renderer.prompt_text
    monkeypatch.setattr(sides.Renderer, "prompt_text", lambda self, *given: own(self, *given) + " ")
    code, rungs = validate(loose)
    assert code == 6
    assert rungs["token ids"]["status"] == "broken"


def test_another_tower_breaks_the_embeddings(
    validate: Validating, loose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's embeddings by transformers, of this model and of another: the bindings are rarely installed."""

    def embedding(name: str) -> type:
        scene = scene_in(validate.ship / name, seed=0 if name == "tuned" else 1)

        class Installed(Embedder):
            @staticmethod
            def available() -> bool:
                return True

            def of(self, images: Sequence[bytes]) -> list[np.ndarray]:
                return Embeds(scene.model, scene.renderer).of(images)

        return Installed

    monkeypatch.setattr(sides, "Embedder", embedding("tuned"))
    code, rungs = validate(loose)
    assert (code, rungs["embeddings"]["status"]) == (0, "ok")
    monkeypatch.setattr(sides, "Embedder", embedding("base"))
    code, rungs = validate(loose)
    assert code == 6
    assert rungs["embeddings"]["status"] == "broken"


def test_the_bases_weights_break_the_logprobs(validate: Validating, loose: Path) -> None:
    code, rungs = validate(loose, text=validate.ship / "base" / "export" / "model-f16.gguf")
    assert code == 6
    assert rungs["logprobs"]["status"] == "broken"


def test_another_end_token_breaks_the_text(validate: Validating, loose: Path, tmp_path: Path) -> None:
    """A token that the model writes early ends its answers in llama.cpp."""
    scene = scene_in(validate.ship / "tuned")
    renderer = renderer_of(scene.folder / "model", loose, TARGET)
    item = task("labels").examples(loose, "dev").items[0]
    early = HFReference(scene.model, renderer, LONGEST).expected(case_of(item, renderer)).answer[1]

    def end(reader: GGUFReader) -> None:
        reader.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = early

    source = validate.ship / "tuned" / "export" / "model-f16.gguf"
    code, rungs = validate(loose, text=edited(source, tmp_path / "eos.gguf", end))
    assert code == 6
    assert rungs["text"]["status"] == "broken"


# --- a bundle's golden vectors ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(ship: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Validated with 50 floors, and bundled."""
    folder = tmp_path_factory.mktemp("bundled")
    export = shutil.copytree(ship / "tuned" / "export", folder / "export")
    asked = ["--task", "labels", "--data_path", str(labelled), "--outtype", "q8_0", "--threads", "1"]
    assert main(["validate", str(export), *asked, "--tolerance", "50", "-o", str(folder / "validation")]) == 0
    out = ["--validation", str(folder / "validation"), "--threads", "1", "-o", str(folder / "bundle")]
    assert main(["bundle", str(export), *out, "--allow_unverified"]) == 0
    return folder / "bundle"


def test_golden_vectors_start_from_originals(bundled: Path) -> None:
    cases = json.loads((bundled / "golden" / "golden.json").read_text())["cases"]
    pictured = [row["images"][0] for row in cases if row["images"]]
    assert len(pictured) == 3
    for one in pictured:
        source, seen = bundled / "golden" / one["source"], bundled / "golden" / one["device"]
        assert source.read_bytes() != seen.read_bytes()
        assert device.changes(source.read_bytes(), SIDE)
        with Image.open(source) as picture:
            assert np.array_equal(device.resize_for_device(picture, SIDE), Image.open(seen))
        assert one["sha256_rgb"] != one["sha256_android_canvas"]


def test_the_bundle_is_held_to_the_validations_limit(bundled: Path) -> None:
    assert json.loads((bundled.parent / "validation" / "validation.json").read_text())["tolerance"] == 50
    assert json.loads((bundled / "golden" / "golden.json").read_text())["tolerance"]["k"] >= 50


def test_a_damaged_program_fails_the_replay(
    bundled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGES["LANCZOS on white"](monkeypatch)
    assert main(["bundle", "--replay", str(bundled), "--threads", "1"]) == 6
    assert "the rung `pixels` differs" in capsys.readouterr().err


def test_an_app_hands_its_pixels_to_the_replay(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pixel_rung, "unavailable", lambda: "Skia is not asked")
    assert main(["bundle", "--replay", str(bundled), "--threads", "1"]) == 0
    assert "pixels not measured" in capsys.readouterr().out
    cases = json.loads((bundled / "golden" / "golden.json").read_text())["cases"]
    pictured = [row["images"][0] for row in cases if row["images"]]
    (tmp_path / "sha256_rgb.json").write_text(
        json.dumps({one["device"]: one["sha256_android_canvas"] for one in pictured})
    )
    asked = ["bundle", "--replay", str(bundled), "--threads", "1", "--app_pixels", str(tmp_path)]
    assert main(asked) == 0
    assert "ok (app)" in capsys.readouterr().out
    with Image.open(bundled / "golden" / pictured[0]["source"]) as source:
        (tmp_path / pictured[0]["device"]).write_bytes(encoded(lanczos_on_white(source), "PNG"))
    assert main(asked) == 6
    assert "what the app sends differs" in capsys.readouterr().err
