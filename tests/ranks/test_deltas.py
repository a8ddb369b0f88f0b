"""Laws of deltas from the disk: two checkpoints match by name, shape and type or say where not; foreign files too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from torch import Tensor

from rankwise import cli
from rankwise.core.site import describe
from rankwise.errors import DataError, UsageError
from rankwise.options.sections import SitesSection
from rankwise.ranks.deltas import DELTAS, CheckpointPair, deltas, open_deltas
from rankwise.ranks.foreign import rename_keys
from rankwise.ranks.probe import open_pair, open_source, other_probe

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def tuned_of(base: Path, folder: Path, change: Change, shards: int = 1) -> Path:
    """A checkpoint made from the base's tensors by `change`."""
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    tensors = change(load_file(base / "model.safetensors"))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    places = {}
    for index in range(shards):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[index::shards]}, folder / file)
        places |= dict.fromkeys(names[index::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def added(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix moved by a change that is known: its own row index."""
    return {name: t + torch.arange(len(t))[:, None] if t.dim() == 2 else t for name, t in tensors.items()}


def without(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if name != UP}


def reshaped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {UP: torch.zeros(50, 32)}


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {UP: torch.zeros(48, 32, dtype=torch.int8)}


def pair(base: Path, tuned: Path, **filters: Any) -> tuple[CheckpointPair, list[str]]:
    notes: list[str] = []
    return open_pair(str(base), str(tuned), SitesSection(**filters), notes), notes


@pytest.mark.parametrize("shards", [1, 3])
def test_deltas_are_the_difference_whatever_the_files(base: Path, tmp_path: Path, shards: int) -> None:
    found, notes = pair(base, tuned_of(base, tmp_path / "tuned", added, shards))
    assert len(found.sites) == 14
    assert notes == []
    for site, delta in deltas(found, list(found.sites.values())):
        expected = torch.arange(site.shape[0]).float()[:, None].expand(site.shape)
        assert torch.allclose(delta.matrix, expected, atol=1e-5), site.path
        assert delta.base_energy > 0


def test_half_of_a_pair_may_be_in_16_bits(base: Path, tmp_path: Path) -> None:
    halved = tuned_of(base, tmp_path / "tuned", lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    found, _ = pair(base, halved)
    site = next(iter(found.sites.values()))
    assert found.read(site).stored_as == "bfloat16"
    back, _ = pair(halved, base)
    assert back.read(site).stored_as == "float32"
    assert torch.equal(back.read(site).matrix, -found.read(site).matrix)


def test_bare_files_take_their_folder_s_config(base: Path, tmp_path: Path) -> None:
    tuned = tuned_of(base, tmp_path / "tuned", added)
    found, _ = pair(base / "model.safetensors", tuned / "model.safetensors")
    assert {site.tower for site in found.sites.values()} == {"language"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without, "model.layers.1.mlp.up_proj is missing in the tuned checkpoint"),
        (reshaped, r"model.layers.1.mlp.up_proj is \(48, 32\) in the base and \(50, 32\) in the tuned checkpoint"),
        (quantized, "model.layers.1.mlp.up_proj is stored as int8"),
    ],
)
def test_what_does_not_match_is_listed_and_refused_unless_allowed(
    base: Path, tmp_path: Path, change: Change, reason: str
) -> None:
    tuned = tuned_of(base, tmp_path / "tuned", change)
    with pytest.raises(DataError, match=reason):
        pair(base, tuned)
    found, notes = pair(base, tuned, allow_unmatched=True)
    assert len(found.sites) == 13
    assert "1 tensors do not match and were left out" in notes[0]


def test_another_model_is_refused_even_where_gaps_are_allowed(base: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=16, intermediate_size=24)
    for allowed in (False, True):
        with pytest.raises(DataError, match="in common" if allowed else "do not match"):
            pair(base, other, allow_unmatched=allowed)


def test_files_that_cannot_be_read_end_with_exit_code_three(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Row 15 and 19: a pickle with code, a cut shard, a missing one; each named, and nothing half-written."""
    code = tmp_path / "code.bin"
    torch.save({"weight": torch.ones(2, 2), "hook": describe}, code)
    cut = tuned_of(base, tmp_path / "cut", added, 2)
    shard = cut / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    gone = tuned_of(base, tmp_path / "gone", added, 2)
    (gone / "model-00001-of-00002.safetensors").unlink()
    for tuned, named in ((code, "code.bin"), (cut, shard.name), (gone, "model-00001-of-00002.safetensors")):
        assert cli.main(["ranks", str(base), str(tuned), "--out", str(tmp_path / "out")]) == 3
        assert named in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.json"))


def plain(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


FOREIGN = {
    "module.body.0.weight": torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
    "module.body.1.weight": torch.ones(6, 3, 3, 3),
    "module.body.1.bias": torch.ones(6),
    "module.body.2.running_mean": torch.ones(6, 6),
    "module.body.2.num_batches_tracked": torch.tensor(3),
    "module.head.weight": torch.ones(5, 6),
}


def test_foreign_pairs_are_brought_together_by_rename_and_the_rest_is_counted(tmp_path: Path) -> None:
    before = plain(tmp_path / "before.pth", FOREIGN)
    after = plain(
        tmp_path / "after.pth",
        {k.replace("module.body", "trunk"): v + 1 for k, v in FOREIGN.items()} | {"head.weight": torch.ones(7, 6)},
    )
    with pytest.raises(DataError, match=r"no matrix in common.*--rename"):
        pair(before, after)
    renames = {"rename": (r"^body=trunk",)}
    with pytest.raises(DataError, match=r"head.weight is of another shape"):
        pair(before, after, **renames)
    found, notes = pair(before, after, allow_unmatched=True, **renames)
    assert list(found.sites) == ["trunk.0"]
    assert found.sites["trunk.0"].tower == "unknown"
    assert torch.allclose(found.read(found.sites["trunk.0"]).matrix, torch.ones(8, 4))
    assert any("4 tensors of the base are not matrices" in note for note in notes)
    assert any("`train` refuses the plan" in note for note in notes)
    flat, _ = pair(before, after, allow_unmatched=True, flatten_conv=True, **renames)
    assert flat.sites["trunk.1"].shape == (6, 27)
    assert flat.read(flat.sites["trunk.1"]).matrix.shape == (6, 27)


def test_renames_that_cannot_work_are_refused() -> None:
    with pytest.raises(UsageError, match="REGEX=TEXT"):
        rename_keys(["a"], ["b"])
    with pytest.raises(UsageError, match="--rename"):
        rename_keys(["a"], ["(=b"])
    with pytest.raises(DataError, match="gives b and a the same name c"):
        rename_keys(["a", "b"], ["[ab]=c"])
    assert rename_keys(["x.a", "y"], ["^x\\.=z.", "a$=b"]) == {"z.b": "x.a", "y": "y"}


@pytest.mark.parametrize(
    ("before", "after", "filters", "sites"),
    [
        (
            "m2man/mobilenetV1X0.25_pretrain.tar",
            "m2man/mobilenet0.25_Final.pth",
            {"rename": ("^module\\.=", "^body\\.=")},
            27,
        ),
        ("m2man/mobilenet0.25_Final.pth", "m2man/mobilenet0.25_epoch_245.pth", {}, 56),
        ("license_plate/mobilenet0.25_Final.pth", "license_plate/mobilenet0.25_epoch_20_ccpd.pth", {}, 53),
    ],
)
def test_real_pairs(shared_data: Path, before: str, after: str, filters: dict[str, Any], sites: int) -> None:
    folder = shared_data / "checkpoint_pairs" / "retinaface_mobilenet025"
    found, _ = pair(folder / before, folder / after, flatten_conv=True, allow_unmatched=True, **filters)
    assert len(found.sites) == sites
    changes = [found.read(site).relative_change for site in found.sites.values()]
    assert all(0 < change < 2 for change in changes)


def save_deltas(folder: Path, rows: list[dict[str, Any]], tensors: dict[str, Tensor]) -> Path:
    """A finetune run's deltas, as `rankwise finetune` leaves them."""
    (folder / "deltas").mkdir(parents=True)
    save_file(tensors, folder / "deltas" / "model.safetensors")
    content = {"model_name": "org/base", "num_samples": 7, "base_energy": {"a.q_proj": 4.0}, "sites": rows}
    DELTAS.write(folder / "deltas", content)
    return folder


def row(path: str, shape: list[int], transposed: bool = False) -> dict[str, Any]:
    return {"path": path, "shape": shape, "tower": "language", "transposed": transposed}


def test_saved_deltas_are_read_in_the_orientation_of_the_module(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(3, 2)
    rows = [row("a.q_proj", [3, 2]), row("a.c_attn", [3, 2], transposed=True)]
    tensors = {"a.q_proj.weight": matrix, "a.c_attn.weight": matrix.T.contiguous()}
    folder = save_deltas(tmp_path / "run", rows, tensors)
    for path in (folder, folder / "deltas"):
        saved = open_deltas(path)
        assert all(torch.equal(saved.read(site).matrix, matrix) for site in saved.sites.values())
        assert saved.read(saved.sites["a.q_proj"]).base_energy == 4.0
    source = open_source(SitesSection(include="q_proj"), [], deltas=str(folder))
    assert list(source.sites) == ["a.q_proj"]


@pytest.mark.parametrize(
    ("rows", "tensors", "message"),
    [
        ([row("a.q_proj", [3, 3])], {"a.q_proj.weight": torch.ones(3, 2)}, r"\(3, 2\) in the weights and \(3, 3\)"),
        ([row("b.q_proj", [3, 2])], {"a.q_proj.weight": torch.ones(3, 2)}, "no tensor 'b.q_proj.weight'"),
        ([{"path": "a.q_proj"}], {"a.q_proj.weight": torch.ones(3, 2)}, "not what `rankwise finetune` writes"),
        ([row("a.q_proj", [3])], {"a.q_proj.weight": torch.ones(3)}, "not what `rankwise finetune` writes"),
    ],
)
def test_deltas_that_do_not_fit_their_list_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], tensors: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_deltas(save_deltas(tmp_path / "run", rows, tensors))


def test_a_folder_without_deltas_says_who_writes_them(base: Path) -> None:
    with pytest.raises(DataError, match="rankwise finetune"):
        open_deltas(base)


def test_a_second_probe_without_its_base_is_refused(base: Path) -> None:
    """It would be compared with itself: no change anywhere."""
    with pytest.raises(UsageError, match="give it as BASE"):
        other_probe(str(base), None, SitesSection(), [])
