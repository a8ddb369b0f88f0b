"""The study of docs/how-low-rank.md at its smallest: known ranks are recovered, resuming is exact, the page's figures
are the measured ones."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_llama
from transformers import Dinov2Config, Dinov2Model

ROOT = Path(__file__).parents[2]
LENGTHS = (1, 2, 3)


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Benchmarks are scripts: they find each other in their own folder."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def low_rank(rows: int, columns: int, rank: int) -> torch.Tensor:
    """Equal singular values, `rank` of them."""
    left, right = (torch.linalg.qr(torch.randn(n, rank)).Q for n in (rows, columns))
    return left @ right.T


@pytest.mark.parametrize("shape", [(96, 128), (128, 96)])
def test_a_delta_of_known_rank_is_recovered(importable: None, shape: tuple[int, int]) -> None:
    from how_low_rank import Change, padded
    from how_low_rank_table import ranks_for, shape_of

    torch.manual_seed(0)
    delta = low_rank(*shape, 10)
    change = Change.of(delta)
    torch.testing.assert_close(change.truncated(16), delta, rtol=0, atol=1e-5)
    assert float((change.truncated(4) - delta).square().sum()) == pytest.approx(6, abs=1e-3)
    assert not change.truncated(0).any()
    noise = Change.of(torch.randn(*shape)).values
    values = padded([change.values, noise, change.values[:50]], 96)
    assert ranks_for(values, 0.9).tolist()[::2] == [9, 9], "values that a smaller matrix lacks count for nothing"
    assert shape_of(values[:1])["share_of_full_rank"] == {"50": 0.05208, "90": 0.09375, "99": 0.1042}
    assert shape_of(values[:1])["stable_rank"] == pytest.approx(10, rel=1e-3)
    assert shape_of(values[2:])["share_of_full_rank"]["90"] == 9 / 50
    of_noise = shape_of(values[1:2])
    assert of_noise["share_of_full_rank"]["90"] > 0.5 and of_noise["energy"]["4"] < 0.2


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A DINOv2 of random weights, and 24 images with two objects each: the label is the colour."""
    work = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(image_size=112, patch_size=14, **sizes)).save_pretrained(work / "model")
    (work / "data" / "annotations").mkdir(parents=True)
    (work / "data" / "train2017").mkdir()
    names, colours = ("animal", "food", "rare"), ((200, 30, 30), (30, 30, 200), (0, 0, 0))
    images, objects = [], []
    for number in range(24):
        picture, file = Image.new("RGB", (90, 70), (128, 128, 128)), f"{number}.png"
        for place in range(2):
            kind = 2 if number == place == 0 else (number + place) % 2
            picture.paste(colours[kind], (5 + 40 * place, 10, 35 + 40 * place, 50))
            box = [5 + 40 * place, 10, 30, 40]
            objects.append({"image_id": number, "category_id": kind + 1, "bbox": box, "iscrowd": 0})
        objects.append({"image_id": number, "category_id": 1, "bbox": [0, 0, 9, 60], "iscrowd": 0})
        picture.save(work / "data" / "train2017" / file)
        images.append({"id": number, "file_name": file})
    categories = [{"id": at + 1, "supercategory": name} for at, name in enumerate(names)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (work / "data" / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return str(work / "model"), str(work / "data")


def test_a_study_of_pictures_resumes_where_it_was_stopped(
    importable: None, pictures: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while its second length is measured: what comes after equals an uninterrupted run's, bit for bit."""
    from how_low_rank import Study, picture_tower
    from how_low_rank_table import Finished

    def study(folder: str) -> Study:
        torch.manual_seed(0)
        made = Study("DINOv2-S", picture_tower(*pictures, batch_size=4), tmp_path / folder, LENGTHS)
        made.measure_base()
        return made

    whole, cut = study("whole"), study("cut")
    assert "47 objects of 24 COCO images, 2 labels (animal, food)" in whole.tower.about, "small and rare ones are not"
    with monkeypatch.context() as patch:
        plain = Study.measure
        patch.setattr(
            Study, "measure", lambda self, key: plain(self, key) if key["step"] == 1 else pytest.fail("stopped")
        )
        with pytest.raises(pytest.fail.Exception):
            cut.run("AdamW", 1e-3, 0)
    cut = study("cut")
    for one in (whole, cut):
        one.ledger.add([{"key": {"what": "rate", "optimizer": "AdamW", "rate": 1e-3, "step": 2}, "loss": 1.0}], {})
        one.run("AdamW", 1e-3, 0)
    assert len(cut.ledger) == len(whole.ledger) == 5 and not list(cut.folder.glob("*.pt"))
    for key, row in Finished(whole.folder).changes.items():
        other = Finished(cut.folder)
        for name in ("values", "loss 4", "loss tuned", "right tuned"):
            assert torch.equal(
                whole.ledger.numbers(row["key"], name).nan_to_num(),
                other.numbers(other.changes[key], name).nan_to_num(),
            ), (key, name)
    base = whole.ledger.numbers(whole.ledger.rows[next(iter(whole.ledger.rows))]["key"], "values")
    assert base.shape == (12, 24)


def test_a_study_of_text_comes_to_tables_and_a_figure(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import how_low_rank
    import how_low_rank_table

    (tmp_path / "base").mkdir()
    tiny_llama(tmp_path / "base")
    names, areas = ("Aromi", "Cotto", "Zizzi", "Strada", "Clowns"), ("riverside", "centre", "north", "south", "east")
    rows = [f'"name[{name}], area[{area}]",{name} is in the {area}.' for name in names for area in areas]
    for split in ("train", "dev"):
        (tmp_path / f"{split}set.csv").write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    monkeypatch.setattr(how_low_rank, "START", {"AdamW": 3e-3, "SGD": 0.3})
    monkeypatch.setattr(how_low_rank, "WIDER", 0)
    line = ["how_low_rank.py", "--title", "stories260K", "--model", str(tmp_path / "base"), "--data", str(tmp_path)]
    line += ["--work", str(tmp_path / "work"), "--lengths", "1,2,3", "--batch_size", "2"]
    monkeypatch.setattr(sys, "argv", line)
    how_low_rank.main()
    said = capsys.readouterr().out
    assert said.count("measured") == 12 and said.count("2 steps: ") == 6
    how_low_rank.main()
    assert "stories260K" not in capsys.readouterr().out, "all of it is in the ledger"
    how_low_rank_table.write_results(tmp_path / "work", tmp_path, tmp_path)
    told = json.loads((tmp_path / "how_low_rank.json").read_text())["stories260K"]
    assert (told["measured"], told["of"], told["sites"], len(told["changes"])) == (12, 12, 14, 6)
    chosen = told["rates"]["SGD"]
    assert chosen[f"{told['chosen']['SGD']:g}"] == min(chosen.values())
    for row in told["changes"]:
        assert row["loss"]["64"] == pytest.approx(row["loss"]["tuned"], rel=1e-3), "of 32 directions nothing is cut"
        assert row["kept"] is None or row["kept"]["64"][0] == pytest.approx(1, abs=0.01)
        assert row["gain"][0] == pytest.approx(row["loss"]["0"] - row["loss"]["tuned"], rel=0.02, abs=1e-3)
    assert [len(row) for row in told["correlations"]] == [4, 6, 6]
    text = (tmp_path / "how_low_rank.md").read_text()
    assert text.count("| stories260K |") == 7 + 6 + 3 and "measured so far" not in text
    assert (tmp_path / "how_low_rank.png").is_file()


def test_the_documented_figures_are_the_measured_ones() -> None:
    """Tables and the line of every tower word for word; of the sentences what they rest on."""
    results = ROOT / "benchmarks" / "results"
    page, doc = (
        [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith(("| ", "- **"))]
        for path in (results / "how_low_rank.md", ROOT / "docs" / "how-low-rank.md")
    )
    told = json.loads((results / "how_low_rank.json").read_text(encoding="utf-8"))
    text = (ROOT / "docs" / "how-low-rank.md").read_text(encoding="utf-8").partition("## For choosing a rank")
    assert doc[: len(page)] == page and all(line in text[2] for line in doc[len(page) :])
    stories, swept = told["stories260K"], json.loads((results / "advise.json").read_text())["e2e"]["sweep"]["losses"]
    rows = {(row["optimizer"], row["step"]): row for row in stories["changes"]}
    real = [row for name in ("SmolLM2-135M", "DINOv2-S") for row in told[name]["changes"]]
    share = {
        name: [row["share_of_full_rank"]["90"] for row in real if row["optimizer"] == name] for name in ("AdamW", "SGD")
    }
    assert min(share["AdamW"]) > 0.18 and max(share["AdamW"]) < 0.22 and max(share["SGD"]) < 0.115, "a fifth, a tenth"
    assert all(0.5 < row["null"]["share_of_full_rank"]["90"] < 0.72 for row in real)
    assert all(row["kept"]["16"][0] > 0.925 for row in told["SmolLM2-135M"]["changes"])
    pictures = told["DINOv2-S"]["changes"]
    assert all(0.37 < row["accuracy"] < 0.495 for row in pictures)
    assert sum(row["loss"]["tuned"] > math.log(9) for row in pictures) == 3 and f"{math.log(9):.3f}" in text[2]
    assert {row["step"] for row in pictures if not row["kept"]} == {90}
    orders = {name: [row["optimizers"][1] for row in tower["correlations"]] for name, tower in told.items()}
    assert all(0.36 < rho < 0.41 for rho in orders["SmolLM2-135M"])
    assert min(orders["DINOv2-S"] + orders["stories260K"]) > 0.755
    probes = [row[f"probes {name}"][1] for tower in told.values() for row in tower["correlations"] for name in share]
    assert min(probes) > 0.845
    best = {rank: min(loss for loss in swept[rank].values() if loss) for rank in ("4", "16")}
    kept, gain = rows["AdamW", 90]["kept"]["4"][0], rows["AdamW", 90]["gain"][0]
    assert f"keeps {100 * kept:.0f} % of the gain" in text[2].replace("\n  ", " ")
    assert f"loses {best['4'] - best['16']:.3f} nats" in text[2].replace("\n  ", " ") and gain > 3
