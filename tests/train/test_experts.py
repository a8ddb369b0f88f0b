"""Training a layer's experts: what moves, what is recorded expert by expert, and that all of it is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from experts_trained import FAMILIES, RANK, adapted, make
from peft.tuners.lora import ParamWrapper
from rows import Rows, Watch, equal, resumed, weights
from torch import nn
from transformers import TrainerCallback

from rankwise.core.phase import bind
from rankwise.core.schedule import parse_schedule
from rankwise.errors import VerificationError
from rankwise.models import adapters
from rankwise.models.adapt import ADAPTER, lora_layers, lora_pairs, site_parameters
from rankwise.models.load import load_model, meta_model
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.train import results
from rankwise.train.arguments import build_arguments
from rankwise.train.expert_norms import check_saved
from rankwise.train.expert_record import EXPERT_NORMS, expert_table, read_experts
from rankwise.train.gradient_plots import plot_gradients
from rankwise.train.gradient_table import stored
from rankwise.train.gradients import GradientNorms, trained_model
from rankwise.train.phases import PhaseKeeper
from rankwise.train.results import write_adapter_files


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {family: experts.saved(family, folder / family) for family in FAMILIES}


def expert_sites(base: Path) -> dict[str, Any]:
    return {path: site for path, site in model_sites(meta_model(str(base))).items() if site.experts}


# --- what is measured --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_each_expert_are_those_of_its_own_pair(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Rows of A and every E-th column of B are an expert's; ‖scale·B_e·A_e‖ is that of PEFT's own product."""
    model, table = adapted(bases[family]), GradientNorms(tmp_path, 1)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for half in (layer.lora_A, layer.lora_B):
                half[ADAPTER].weight.normal_(std=0.1)
    ids = torch.arange(4, 44).reshape(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    table.on_train_begin(None, type("S", (), {"is_world_process_zero": True, "global_step": 0}), None, model=model)
    table.record(1, table.values(1).tolist(), 1.0, None)
    rows = {row["site"]: row for row in expert_table(tmp_path).read()}
    sites = expert_sites(bases[family])
    assert rows.keys() == sites.keys()
    whole = {row.site: row for row in stored(tmp_path / "gradient_norms.csv")}
    for path, layer in lora_layers(model).items():
        assert isinstance(layer, ParamWrapper)
        norms = [float(norm) for norm in rows[path]["norms"].split()]
        deltas = [float(norm) for norm in rows[path]["deltas"].split()]
        a, b = (half[ADAPTER].weight for half in (layer.lora_A, layer.lora_B))
        for expert in range(sites[path].experts):
            own = a.grad[expert * RANK : (expert + 1) * RANK].norm(), b.grad[:, expert :: layer.num_experts].norm()
            assert norms[expert] == pytest.approx(math.hypot(*map(float, own)), rel=1e-3)
        dense = layer.get_delta_weight(ADAPTER).detach()
        assert deltas == pytest.approx([float(one.norm()) for one in dense], rel=1e-3)
        assert whole[path].norm == pytest.approx(math.hypot(*norms), rel=1e-3)
        assert whole[path].delta_norm == pytest.approx(float(dense.norm()), rel=1e-4)


def test_every_parameter_belongs_to_its_own_site(bases: dict[str, Path]) -> None:
    """The outer of two nested wrappers holds the inner one's parameters, too."""
    model = adapted(bases["mixtral"], "both")
    found = trained_model(model)
    by_place: dict[str, set[int]] = {}
    for one in found.parameters:
        by_place.setdefault(found.places[one.place].path, set()).add(id(one.parameter))
    wanted = {path: {id(one) for one in own} for path, own in site_parameters(model).items()}
    assert by_place == wanted
    assert len(wanted) == 2 * (4 + 2)


def only_some(base: Path) -> torch.Tensor:
    """Ids of tokens that never go to expert 0 of any layer."""
    model = load_model(str(base), torch.float32).eval()
    ids = torch.arange(4, 300)
    away = torch.ones(len(ids), dtype=torch.bool)
    for chosen in experts.routed(model, ids[None]).values():
        away &= ~(chosen == 0).any(1)
    return ids[away]


class RowsAway(Rows):
    """Rows of these ids alone."""

    def __init__(self, ids: torch.Tensor) -> None:
        super().__init__()
        self.ids = ids.tolist()

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = [self.ids[(7 * index + 3 * place) % len(self.ids)] for place in range(self.length)]
        return {"input_ids": ids, "labels": ids, "sample_index": index}


def test_experts_that_no_token_meets_are_counted_and_named(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["mixtral"]
    trainer = make(base, tmp_path, max_steps=4, gradients=GradientNorms(tmp_path), rows=RowsAway(only_some(base)))
    before = {path: pair.lora_B for path, pair in lora_pairs(trainer.model).items()}
    trainer.train()
    found = read_experts(tmp_path)
    assert [one.never for one in found.routings] == [[0], [0]]
    assert found.steps == 4
    (sentence,) = found.sentences()
    assert "2 of 8 experts (model.layers.0.mlp.experts 0; model.layers.1.mlp.experts 0)" in sentence
    written = {file.name for file in plot_gradients(tmp_path)}
    assert "expert_routing.png" in written
    assert sentence in (tmp_path / "gradient_summary.txt").read_text()
    said = json.loads((tmp_path / "gradient_summary.json").read_text())["experts"]
    assert said["without_gradient"] == {f"model.layers.{layer}.mlp.experts": [0] for layer in (0, 1)}
    for path, pair in lora_pairs(trainer.model).items():
        moved = [bool((pair.lora_B[e] != before[path][e]).any()) for e in range(4)]
        assert moved == [False, True, True, True]
    assert trainer.experts.learnt(4) == {path: [1, 2, 3] for path in before}


def test_change_below_half_an_ulp_has_no_effect_and_is_counted(bases: dict[str, Path], tmp_path: Path) -> None:
    model, table = adapted(bases["mixtral"], dtype=torch.bfloat16), GradientNorms(tmp_path, 1)
    ids = torch.arange(4, 44).reshape(2, 20)
    plain = model(input_ids=ids).logits
    table.on_train_begin(None, type("S", (), {"is_world_process_zero": True, "global_step": 0}), None, model=model)

    def share(size: float) -> tuple[float, bool]:
        with torch.no_grad():
            for layer in lora_layers(model).values():
                layer.lora_B[ADAPTER].weight.fill_(size)
        values = table.values(1)
        at = len(table.model.parameters) + len(table.model.pairs)
        return float(values[at + 8]), torch.equal(model(input_ids=ids).logits, plain)

    assert math.isnan(share(0.0)[0]), "nothing is adapted yet"
    assert share(1e-12) == (1.0, True)
    some, same = share(1e-2)
    assert 0 < some < 0.9
    assert not same
    layer = next(iter(lora_layers(model).values()))
    weight, changed = layer.get_param(), layer.get_param() + layer.get_delta_weight(ADAPTER).detach()
    assert some == pytest.approx(float((changed == weight).float().mean()), abs=0.02)


# --- what trains -------------------------------------------------------------------------------------------------


class Gradients:
    """Which sites have a gradient when a step is taken."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[set[str]] = []
        trainer.create_optimizer()
        trainer.optimizer.register_step_pre_hook(self.look)
        self.model = trainer.model

    def look(self, *_: Any) -> None:
        there = {
            path for path, own in site_parameters_of(self.model).items() if all(one.grad is not None for one in own)
        }
        none = {path for path, own in site_parameters_of(self.model).items() if all(one.grad is None for one in own)}
        assert there | none == site_parameters_of(self.model).keys()
        self.steps.append(there)


def site_parameters_of(model: Any) -> dict[str, list[nn.Parameter]]:
    return {
        path: [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight] for path, layer in lora_layers(model).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
def test_one_parameter_is_frozen_while_the_other_trains(
    bases: dict[str, Path], tmp_path: Path, family: str, order: tuple[str, str]
) -> None:
    base = bases[family]
    sites = expert_sites(base)
    first, second = ({path for path in sites if path.endswith(name)} for name in order)
    keeper = PhaseKeeper(bind(parse_schedule(f"{order[0]}:2 > {order[1]}"), sites, 1), tmp_path)
    trainer = make(base, tmp_path, max_steps=4, phases=keeper, lr_scheduler_type="constant")
    watch, seen = Watch(), Gradients(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert seen.steps == [first, first, second, second]
    assert watch.moved == [first, first, second, second]


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_is_exact(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Inside the second phase, too."""

    def trainer(name: str, *callbacks: TrainerCallback) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        keeper = PhaseKeeper(bind(parse_schedule("gate_up_proj:2 > down_proj"), expert_sites(bases[family]), 1), folder)
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        own = {"phases": keeper, "gradients": GradientNorms(folder), "callbacks": callbacks}
        return make(bases[family], folder, **own, **saving)

    whole = trainer("whole")
    whole.train()
    trainer("parts", Stop()).train()
    assert equal(weights(resumed(trainer("parts"))), weights(whole))
    tables = [(tmp_path / name / EXPERT_NORMS).read_text() for name in ("whole", "parts")]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_activations_give_the_same_weights(bases: dict[str, Path], tmp_path: Path, family: str) -> None:
    """Not reentrant where nothing is said, which transformers would have; asked for, that trains the same."""
    ways: dict[str, dict[str, Any]] = {
        "plain": {},
        "again": {"activation_checkpointing": True},
        "reentrant": {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    }
    found = {}
    for name, given in ways.items():
        trainer = make(bases[family], tmp_path / name, max_steps=2, **given)
        trainer.train()
        found[name] = weights(trainer)
    assert build_arguments(tmp_path, 1, ways["again"]).activation_checkpointing_kwargs == {"use_reentrant": False}
    for name in ("again", "reentrant"):
        for key, value in found["plain"].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-5, atol=1e-7)


# --- what is saved -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "llama4_text"])
def test_experts_that_are_lost_on_the_way_to_the_file_are_found_out(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """axolotl#3772: what one process has of a shard is saved, and the rest is zero."""
    trainer = make(bases[family], tmp_path, max_steps=2)
    trainer.train()
    plan = plan_of(bases[family])
    write_adapter_files(trainer, tmp_path, "base", plan, [])

    def first_half(_: Any) -> dict[str, torch.Tensor]:
        state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        for name, value in state.items():
            if "lora_B" in name:
                value[:, 1::4] = 0.0  # expert 1 of four
        return state

    monkeypatch.setattr(results, "whole_state", first_half)
    with pytest.raises(VerificationError, match=r"1 expert of model.layers.*\(1\) have learnt") as raised:
        write_adapter_files(trainer, tmp_path, "base", plan, [])
    assert raised.value.exit_code == 6


def plan_of(base: Path) -> Any:
    return uniform_plan(choose_sites(model_sites(meta_model(str(base))), "experts"), RANK, None, False, "x")


def test_a_pair_that_is_not_in_the_file_is_found_out(tmp_path: Path, bases: dict[str, Path]) -> None:
    model = adapted(bases["mixtral"])
    adapters.save_adapter(model, tmp_path, "base")
    check_saved(tmp_path, {path: [] for path in expert_sites(bases["mixtral"])})
    with pytest.raises(VerificationError, match=r"2 experts of model\.layers\.9"):
        check_saved(tmp_path, {"model.layers.9.mlp.experts.down_proj": [0, 3]})
