"""Phases in several processes: gradients of frozen sites are dropped, and the weights are those of one process."""

from __future__ import annotations

import textwrap
from pathlib import Path

import processes
import pytest
import torch
from rows import make_trainer, weights
from tiny import tiny_llama

from rankwise.core.phase import bind
from rankwise.core.schedule import parse_schedule
from rankwise.models.load import meta_model
from rankwise.models.sites import model_sites
from rankwise.train.phases import PhaseKeeper

SCHEDULES = ("both:2 > mlp:2 > attention", "early:3 > late", "norm:2")
SCRIPT = """
    import sys
    from pathlib import Path
    from types import SimpleNamespace

    import torch
    import torch.distributed as dist
    from rows import Rows, adapted_base, make_trainer, weights
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    from rankwise.core.phase import bind
    from rankwise.core.schedule import parse_schedule
    from rankwise.models.load import meta_model
    from rankwise.models.sites import model_sites
    from rankwise.files.processes import finish, process_index
    from rankwise.train.phases import PhaseKeeper

    base, folder, *texts = sys.argv[1:]
    sites = model_sites(meta_model(base))
    rank, results = process_index()[0], {}

    def keeper_of(text, name):
        place = Path(folder) / name
        place.mkdir(exist_ok=True)
        return PhaseKeeper(bind(parse_schedule(text), sites, 1), place)

    def ddp(text, name):
        keeper = keeper_of(text, name)
        given = {"max_steps": 6, "per_device_train_batch_size": 1, "dropout": 0.0}
        trainer = make_trainer(Path(base), keeper.table.path.parent, phases=keeper, **given)
        assert trainer.accelerator.distributed_type == "MULTI_CPU"
        trainer.train()
        return weights(trainer), list(keeper.table.read())

    def fsdp2(text, name):
        keeper = keeper_of(text, name)
        model = adapted_base(Path(base), 0.0)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for layer in model.get_base_model().model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trained = [value for value in model.parameters() if value.requires_grad]
        assert all(isinstance(value, DTensor) for value in trained)
        optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, foreach=False)
        arguments = SimpleNamespace(world_size=2, activation_checkpointing=False)
        state = SimpleNamespace(global_step=0, max_steps=6, is_world_process_zero=rank == 0)
        keeper.on_train_begin(arguments, state, None, model=model)
        for step in range(6):
            state.global_step = step
            keeper.on_step_begin(arguments, state, None, optimizer=optimizer)
            ids = torch.tensor([Rows()[2 * step + rank]["input_ids"]])
            model(input_ids=ids, labels=ids).loss.backward()
            keeper.before_clipping(step)
            optimizer.step()
            optimizer.zero_grad()
        whole = {name: value.full_tensor() for name, value in model.named_parameters() if isinstance(value, DTensor)}
        trained = {name: value.detach().clone() for name, value in whole.items() if "lora_" in name}
        return trained, list(keeper.table.read())

    for number, text in enumerate(texts):
        results[text] = ddp(text, f"ddp-{number}")
    results["fsdp2"] = fsdp2(texts[0], "fsdp2")
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    finish()
"""
Result = tuple[dict[str, torch.Tensor], list[dict[str, str]]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def in_two_processes(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("two")
    file = folder / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    done = processes.run(file, base, folder, *SCHEDULES, count=2)
    assert done.returncode == 0, done.stderr[-3000:]
    results: dict[str, Result] = torch.load(folder / "results.pt")
    return results


def alone(base: Path, folder: Path, text: str, **given: object) -> Result:
    """The same schedule in one process, with the two processes' rows in one batch."""
    keeper = PhaseKeeper(bind(parse_schedule(text), model_sites(meta_model(str(base))), 1), folder)
    trainer = make_trainer(base, folder, phases=keeper, max_steps=6, dropout=0.0, **given)
    trainer.train()
    return weights(trainer), list(keeper.table.read())


def assert_same(found: Result, wanted: Result) -> None:
    assert found[1] == wanted[1]
    assert found[0].keys() == wanted[0].keys()
    for name, value in found[0].items():
        torch.testing.assert_close(value, wanted[0][name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("text", SCHEDULES)
def test_ddp_trains_what_one_process_trains(
    base: Path, tmp_path: Path, in_two_processes: dict[str, Result], text: str
) -> None:
    assert_same(in_two_processes[text], alone(base, tmp_path, text))


@pytest.mark.slow
def test_sharded_parameters_train_what_one_process_trains(
    base: Path, tmp_path: Path, in_two_processes: dict[str, Result]
) -> None:
    """FSDP2 proper (fully_shard over gloo): accelerate's FSDP on a CPU silently is DDP."""
    settings = {
        "gradient_accumulation_steps": 1,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "train_sampling_strategy": "sequential",
    }
    assert_same(in_two_processes["fsdp2"], alone(base, tmp_path, SCHEDULES[0], **settings))
