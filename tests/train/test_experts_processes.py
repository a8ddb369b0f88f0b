"""Experts trained in two processes: what is saved is what one process saves, and every expert has learnt."""

from __future__ import annotations

import textwrap
from pathlib import Path

import experts
import processes
import pytest
import torch
from experts_trained import FAMILIES, make
from safetensors.torch import load_file

from rankwise.files.adapter import read_adapter
from rankwise.models.adapters import save_adapter
from rankwise.train.expert_norms import check_saved, zero_at_start

SCRIPT = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from experts_trained import adapted, make
    from rows import Rows
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from rankwise.files.processes import finish, process_index
    from rankwise.models.adapters import save_adapter
    from rankwise.train.expert_norms import LearntExperts, check_saved, expert_pairs, expert_values

    folder, *families = sys.argv[1:]
    rank = process_index()[0]

    def ddp(family, place):
        trainer = make(Path(folder) / family, place, max_steps=4, per_device_train_batch_size=1, learning_rate=1e-3)
        assert trainer.accelerator.distributed_type == "MULTI_CPU"
        trainer.train()
        learnt = trainer.experts.learnt(4)
        if rank == 0:
            save_adapter(trainer.accelerator.unwrap_model(trainer.model), place, "base")
            check_saved(place, learnt)

    def fsdp2(family, place):
        model = adapted(Path(folder) / family)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = [value for value in model.parameters() if value.requires_grad]
        assert all(isinstance(value, DTensor) for value in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, foreach=False)
        learnt = LearntExperts()
        learnt.on_train_begin(None, None, None, model=model)
        for step in range(4):
            ids = torch.tensor([Rows()[2 * step + rank]["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
            values = expert_values(expert_pairs(model))
            learnt.see(step + 1, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        found = learnt.learnt(4)
        if rank == 0:
            place.mkdir()
            torch.save(values, place / "values.pt")
            save_adapter(model, place, "base", None, state)
            check_saved(place, found)

    for family in families:
        ddp(family, Path(folder) / f"{family}-ddp")
        fsdp2(family, Path(folder) / f"{family}-fsdp2")
    finish()
"""
SETTINGS = {"max_grad_norm": 0, "lr_scheduler_type": "constant", "weight_decay": 0.0}


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for family in FAMILIES:
        experts.saved(family, folder / family)
    file = folder / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    done = processes.run(file, folder, *FAMILIES, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def assert_same(found: Path, wanted: Path, atol: float) -> None:
    both = [load_file(folder / "adapter_model.safetensors") for folder in (found, wanted)]
    assert both[0].keys() == both[1].keys()
    for name, value in both[0].items():
        torch.testing.assert_close(
            value, both[1][name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    for path, pair in read_adapter(found).pairs.items():
        assert pair.experts
        assert all(bool(zero_at_start(pair, expert).any()) for expert in range(pair.experts)), path


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_ddp_saves_what_one_process_saves(in_two_processes: Path, tmp_path: Path, family: str) -> None:
    trainer = make(in_two_processes / family, tmp_path, max_steps=4, learning_rate=1e-3)
    trainer.train()
    save_adapter(trainer.model, tmp_path, "base")
    assert_same(in_two_processes / f"{family}-ddp", tmp_path, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_parameters_are_saved_whole(in_two_processes: Path, tmp_path: Path, family: str) -> None:
    """FSDP2 proper (fully_shard over gloo): accelerate's FSDP on a CPU silently is DDP."""
    sequential = {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential"}
    trainer = make(in_two_processes / family, tmp_path, max_steps=4, learning_rate=1e-3, **SETTINGS, **sequential)
    trainer.train()
    save_adapter(trainer.model, tmp_path, "base")
    assert_same(in_two_processes / f"{family}-fsdp2", tmp_path, 1e-6)
    check_saved(in_two_processes / f"{family}-fsdp2", trainer.experts.learnt(4))
