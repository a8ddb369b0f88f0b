"""Names and shapes do not tell two models of one architecture apart: whatever was made for another one says so."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.errors import DataError
from rankwise.evaluate import command as evaluation
from rankwise.files.adapter import LoraAdapter, LoraPair, write_adapter
from rankwise.files.adapter_config import lora_config
from rankwise.files.plan import write_plan
from rankwise.merge.command import notes as merge_notes
from rankwise.merge.plan import plan_merge
from rankwise.models.load import another_base, meta_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import uniform_plan
from rankwise.options.commands import CompressConfig, EvaluateConfig, ExtractConfig, MergeConfig
from rankwise.options.sections import DataSection, LoraSection, SitesSection
from rankwise.ranks import compress
from rankwise.ranks.extract import open_pair_or_deltas, planned_ranks
from rankwise.ranks.probe import open_adapter
from rankwise.train.adapter import choose_plan


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a copy of it, another model of its shapes; a plan and an adapter made for the base."""
    folder = tmp_path_factory.mktemp("world")
    base = experts.saved("qwen3_moe", folder / "base")
    for name in ("copy", "other"):
        shutil.copytree(base, folder / name)
    tensors = load_file(base / "model.safetensors")
    moved = {name: tensor + 1e-3 for name, tensor in tensors.items()}
    save_file(moved, folder / "other" / "model.safetensors", metadata={"format": "pt"})
    sites = {path: site for path, site in model_sites(meta_model(str(base))).items() if not site.experts}
    write_plan(folder / "plan.json", uniform_plan(sites, 2, None, False, str(base)))
    pairs = {
        path: LoraPair(torch.randn(2, site.shape[1]), torch.randn(site.shape[0], 2), 1.0, peft=site.peft)
        for path, site in sites.items()
    }
    write_adapter(folder / "adapter", LoraAdapter(lora_config(str(base)), pairs))
    return folder


def merging(world: Path, base: str, out: Path) -> list[str]:
    config = MergeConfig(adapter=str(world / "adapter"), base_model=base)
    return merge_notes(config, plan_merge(base, world / "adapter"), base)


def reading(world: Path, base: str, out: Path) -> list[str]:
    notes: list[str] = []
    open_adapter(str(world / "adapter"), base, SitesSection(), notes)
    return notes


def extracting(world: Path, base: str, out: Path) -> list[str]:
    notes: list[str] = []
    config = ExtractConfig(base=base, tuned=str(world / "other"), plan=str(world / "plan.json"))
    planned_ranks(config, open_pair_or_deltas(config, []), notes)
    return notes


def compressing(world: Path, base: str, out: Path) -> None:
    config = CompressConfig(adapter=str(world / "adapter"), base_model=base, uniform=True, output_dir=str(out))
    compress.run(config)


def compressing_by_plan(world: Path, base: str, out: Path) -> None:
    chosen = {"adapter": str(world / "adapter"), "plan": str(world / "plan.json"), "output_dir": str(out)}
    compress.run(CompressConfig(base_model=base, **chosen))


def training(world: Path, base: str, out: Path) -> None:
    sites = model_sites(meta_model(base))
    choose_plan(LoraSection(lora_config=str(world / "plan.json")), sites, base)


def evaluating(world: Path, base: str, out: Path) -> None:
    """As far as the rows, which are not there."""
    data = DataSection(task="labels", data_path=str(world / "no-rows"))
    config = EvaluateConfig(model_name=str(world / "adapter"), base_model_id=base, data=data, output_dir=str(out))
    with pytest.raises(DataError):
        evaluation.evaluate_model(config)


COMMANDS: dict[Callable[..., Any], str] = {
    merging: "the adapter",
    reading: "the adapter",
    extracting: "plan.json",
    compressing: "the adapter",
    compressing_by_plan: "plan.json",
    training: "plan.json",
    evaluating: "the adapter",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_another_model_of_the_same_shapes_is_told(
    command: Callable[..., Any], world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("copy", "other"):
        found = command(world, str(world / name), tmp_path / name)
        said = "\n".join(found) if found else "".join(capfd.readouterr())
        wanted = f"{COMMANDS[command]} records the base {world / 'base'}; used with {world / 'other'}"
        assert (wanted in said) == (name == "other"), said
        assert ("records the base" in said) == (name == "other"), said


def test_what_is_not_here_cannot_be_the_same(world: Path) -> None:
    here = str(world / "base")
    assert another_base("the plan", None, here) == another_base("the plan", here, here) == []
    assert another_base("the plan", "org/elsewhere", here)
