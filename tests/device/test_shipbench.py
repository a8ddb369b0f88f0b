"""ShipBench's faults on a tiny random model: one for every rung, each named by the first rung that it breaks.

The whole bench needs trained models and many minutes (benchmarks/shipbench.py); these take the exported models of the
suite. A sound export must stay quiet, and every fault must really change something.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from parity_models import GIVEN, LONGEST, TARGET, draw, renderer_of

from rankwise.data.device import read_target
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.cases import Case, blind, case_of
from rankwise.device.parity.floor import measure_floor
from rankwise.device.parity.ladder import NAMES, climb
from rankwise.device.parity.reference import HFReference
from rankwise.gguf.converter import Converter
from rankwise.gguf.plan import plan_export
from rankwise.gguf.reading import read_export
from rankwise.models.load import load_model
from rankwise.options.commands import ExportConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TOP = 32
# Of every kind one, and no second conversion. Faults that only training makes visible stay with the benchmark.
TRIED = (
    "filter",
    "EXIF",
    "literal marker",
    "picture size",
    "trailing space",
    "chat template",
    "layers swapped",
    "rope theta",
    "projector rows",
    "overwritten",
    "cut answer",
    "truncated",
)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Benchmarks are scripts: they find each other in their own folder."""
    pytest.importorskip("gguf")
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def faults() -> dict[str, Any]:
    from shipbench import FAULTS

    return {fault.name: fault for fault in FAULTS}


class Bench:
    """What `shipbench.climbed` needs of a ship, for the suite's random model."""

    def __init__(self, export: Path) -> None:
        model = export.parent / "model"
        self.exported = read_export(export)
        self.sees = True
        examples = draw(export.parent / "photos")
        renderer = renderer_of(model, export.parent / "photos", TARGET)
        self.renderer = replace(renderer, reserve=LONGEST)
        self.reference = HFReference(load_model(str(model), torch.float32).eval(), self.renderer, LONGEST)
        examples = examples[:2]  # one of them on its side
        asked = [case_of(one, self.renderer) for one in examples] + [blind(examples[0], self.renderer)]
        self.cases = [*asked, *(replace(case, id=f"{case.id}, given", answer=GIVEN) for case in asked)]
        self.trained = self  # shipbench asks ship.trained.renderer and .reference
        self.floor = measure_floor(self.reference, self.cases, TOP)


@pytest.fixture(scope="module")
def ship(vision_export: Path) -> Bench:
    pytest.importorskip("xllamacpp")
    return Bench(vision_export)


def rung_of(delivery: Any, ship: Bench) -> str:
    from shipbench import climbed

    return str(climbed(delivery, ship, threads=1).rung)


# --- the bench itself ------------------------------------------------------------------------------------------------


def test_there_are_twenty_faults_and_more_with_expectations_that_exist(faults: dict[str, Any]) -> None:
    assert len(faults) >= 20
    from shipbench import FAULTS

    assert len(FAULTS) == len(faults), "names are unique"
    assert {fault.rung for fault in FAULTS} <= {*NAMES, "file", None}
    ways = [(bool(one.change), bool(one.edit), bool(one.cut), bool(one.model)) for one in FAULTS]
    assert all(sum(way) == 1 for way in ways), "a fault is made in exactly one way"
    assert all((one.proof is None) == bool(one.change) for one in FAULTS), "what changes a file can be verified"
    assert set(TRIED) <= set(faults)


@pytest.mark.slow
def test_a_file_taken_apart_and_put_together_is_the_same(vision_export: Path, tmp_path: Path) -> None:
    """So that a fault is the one thing that differs."""
    from shipbench_gguf import altered

    for file in sorted(vision_export.glob("*.gguf")):
        with altered(file, tmp_path / file.name):
            pass
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
def test_an_edit_changes_what_it_names_and_nothing_else(vision_export: Path, tmp_path: Path) -> None:
    from shipbench_gguf import Draft, altered

    source = vision_export / "model-q8_0.gguf"
    with altered(source, tmp_path / "m.gguf") as draft:
        draft["llama.rope.freq_base"] = 5e5
        draft.put("blk.0.ffn_up.weight", 2 * draft.floats("blk.0.ffn_up.weight"))
    before, after = Draft(source), Draft(tmp_path / "m.gguf")
    assert {key for key in before.values if before.values[key] != after.values[key]} == {"llama.rope.freq_base"}
    differ = {name for name in before.tensors if not np.array_equal(before.floats(name), after.floats(name))}
    assert differ == {"blk.0.ffn_up.weight"}


# --- the faults ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_sound_exports_raise_no_alarm(ship: Bench) -> None:
    from shipbench_fault import sound

    assert {form: rung_of(sound(ship, form), ship) for form in ("f16", "q8_0")} == {"f16": "holds", "q8_0": "holds"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRIED)
def test_a_fault_is_named_by_the_rung_that_was_foretold(
    ship: Bench, faults: dict[str, Any], name: str, tmp_path: Path
) -> None:
    from shipbench_fault import delivered

    fault = faults[name]
    assert rung_of(delivered(fault, ship, tmp_path), ship) == fault.rung


@pytest.mark.slow
def test_verification_finds_the_faults_of_files_that_it_must_find(
    vision_export: Path, converter: Converter, faults: dict[str, Any], tmp_path: Path
) -> None:
    from shipbench import proven

    target = read_target(vision_export)
    config = ExportConfig(model=str(vision_export.parent / "model"), outtype=["f16"])
    plan = plan_export(config, converter, target=target)
    ship: Any = SimpleNamespace(plan=plan, exported=read_export(vision_export))
    of_files = {name: fault for name, fault in faults.items() if (fault.edit or fault.cut) and fault.proof}
    assert len(of_files) > 20
    silent = [name for name, fault in of_files.items() if not proven(fault, ship, tmp_path / name.replace("/", "-"))]
    assert silent == ["norm scale"], "whose scale is 1 in a model that was never trained"
    harmless = replace(faults["rope theta"], edit=lambda draft: None)
    assert proven(harmless, ship, tmp_path / "sound") == ""


@pytest.mark.slow
def test_what_the_ladder_is_told_of_an_app_is_what_the_app_does(ship: Bench) -> None:
    """A changed request reaches the server for free answers, and never for given ones."""
    from shipbench import changed

    asked: list[dict[str, Any]] = []

    def request(body: dict[str, Any]) -> dict[str, Any]:
        asked.append(body)
        return body | {"n_predict": 1}

    text, mmproj = ship.exported.text("q8_0"), ship.exported.mmproj("q8_0")
    case: Case = ship.cases[0]
    with LlamaServer(text, mmproj, 512, 1) as runtime:
        app = changed(runtime, request)
        given = ship.renderer.tokenizer(" red", add_special_tokens=False)["input_ids"]
        assert len(app.complete(case.prompt, case.images, force=given).tokens) == len(given)
        assert not asked
        assert len(app.complete(case.prompt, case.images, max_new_tokens=8).tokens) == 1
        assert len(asked) == 1
        assert climb(ship.reference, runtime, [case], ship.floor.thresholds("q8_0"), TOP).holds
