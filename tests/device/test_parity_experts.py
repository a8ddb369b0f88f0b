"""Mixtures of experts in llama.cpp against transformers; places that a near tie of a router decides, apart."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import experts
import numpy as np
import pytest
import torch
from exported_experts import MORE, UNDECIDED
from tiny import CHAT_TEMPLATE

from rankwise.data.example import Example, Turn
from rankwise.data.render import Renderer
from rankwise.device.llama.runtime import LlamaServer
from rankwise.device.parity.cases import Case, case_of
from rankwise.device.parity.floor import Floor, Thresholds, measure_floor, run
from rankwise.device.parity.ladder import NAMES, Ladder, observe, verdict
from rankwise.device.parity.reference import HFReference, Observed
from rankwise.device.parity.routing import Choices, expert_counts
from rankwise.device.parity.rungs import OK, Rung
from rankwise.models.load import load_model, load_tokenizer

pytest.importorskip("xllamacpp")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from shipbench_gguf import Draft, altered

ASKED = ("Where is The Vaults?", "name[Alimentum], area[city centre]", "Prices start at £30.", "Café Adriatic: pub?")
TOLD = " Café Adriatic has a 5 star rating. Prices start at £30."


def side(model: Path) -> tuple[HFReference, list[Case]]:
    """The model in transformers, and cases with given answers: random weights write pieces of characters."""
    renderer = Renderer(load_tokenizer(str(model)), style="chat", max_length=512, chat_template=CHAT_TEMPLATE)
    turns = [(Turn("user", text), Turn("assistant", TOLD)) for text in ASKED]
    rows = [Example(f"{number}", f"{number}", each) for number, each in enumerate(turns)]
    loaded = load_model(str(model), torch.float32).eval()
    return HFReference(loaded, renderer, 8), [case_of(row, renderer, TOLD) for row in rows]


def climbed(reference: HFReference, cases: list[Case], file: Path) -> list[Observed]:
    with LlamaServer(file, exact="f32" in file.name) as runtime:
        return observe(reference, runtime, cases)


def ladder(seen: list[Observed], limits: Thresholds, file: Path) -> Ladder:
    class Silent:
        def detokenize(self, ids: object) -> str:
            return ""

    return Ladder.of(seen, Silent(), limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", [*experts.FAMILIES, *MORE])
def test_llama_cpp_runs_what_was_exported(family: str, mixtures: Path) -> None:
    """Float32 on both sides is equal to its rounding: the router, its scores, the shared experts and every expert."""
    reference, cases = side(mixtures / family / "model")
    file = mixtures / family / "export" / "model-f32.gguf"
    floor = measure_floor(reference, cases, names=["attention"])
    rung = ladder(climbed(reference, cases, file), floor.thresholds("f32"), file)["logprobs"]
    assert rung.status == "ok" and rung.measured["kl_max"] < 1e-10 and rung.measured["positions"] > 40
    assert "near_ties_of_routers" not in rung.measured, "every token has its experts by a clear margin"


def test_two_experts_exchanged_break_the_ladder(mixtures: Path, tmp_path: Path) -> None:
    reference, cases = side(mixtures / "mixtral" / "model")
    sound = mixtures / "mixtral" / "export" / "model-f16.gguf"
    with altered(sound, tmp_path / "model-f16.gguf") as draft:
        exchange(draft, "blk.1.ffn_down_exps.weight")
    floor = measure_floor(reference, cases)
    limits = floor.thresholds("f16")
    assert ladder(climbed(reference, cases, sound), limits, sound).holds
    broken = ladder(climbed(reference, cases, tmp_path / "model-f16.gguf"), limits, sound).first_broken
    assert broken is not None and broken.name == "logprobs"


def exchange(draft: Draft, name: str) -> None:
    data, kind = draft.tensors[name]
    draft.tensors[name] = (np.ascontiguousarray(data[[1, 0, *range(2, len(data))]]), kind)


# --- near ties -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tied(mixtures: Path) -> tuple[HFReference, list[Case], Floor]:
    reference, cases = side(mixtures / UNDECIDED / "model")
    return reference, cases, measure_floor(reference, cases)


@pytest.mark.parametrize("form", ["f32", "f16", "q8_0"])
def test_places_that_a_near_tie_decides_are_counted_apart(
    form: str, tied: tuple[HFReference, list[Case], Floor], mixtures: Path
) -> None:
    """llama.cpp takes the other of two equal experts for some tokens: that fails no rung, and is not hidden."""
    reference, cases, floor = tied
    file = mixtures / UNDECIDED / "export" / f"model-{form}.gguf"
    limits = floor.thresholds(form)
    seen = climbed(reference, cases, file)
    rung = ladder(seen, limits, file)["logprobs"]
    apart = rung.measured["positions_of_another_routing"]
    assert rung.note.endswith(f"; {apart} more places are near ties of routers")
    assert rung.status == "ok" and apart and rung.measured["near_ties_of_routers"] >= apart
    assert rung.measured["positions"] > apart / 4, "most of the answers are still compared"
    together = replace(limits, apart=frozenset())
    whole = ladder(seen, together, file)["logprobs"]
    assert whole.measured["positions"] == rung.measured["positions"] + apart
    assert (whole.status == "broken") is (form != "q8_0"), "they would fail the rung, as a fault of the weights does"


def test_a_fault_shows_beside_near_ties(
    tied: tuple[HFReference, list[Case], Floor], mixtures: Path, tmp_path: Path
) -> None:
    reference, cases, floor = tied
    sound = mixtures / UNDECIDED / "export" / "model-f16.gguf"
    with altered(sound, tmp_path / "model-f16.gguf") as draft:
        exchange(draft, "blk.0.ffn_down_exps.weight")
    found = ladder(climbed(reference, cases, tmp_path / "model-f16.gguf"), floor.thresholds("f16"), sound)
    assert found["logprobs"].status == "broken"


def test_the_other_choice_is_the_second_best(tied: tuple[HFReference, list[Case], Floor]) -> None:
    """What is altered: the last expert of the tokens in a near tie, and nothing else."""
    reference, cases, _ = tied
    counts = expert_counts(reference.model)
    with Choices(counts) as seen:
        run(reference, reference.model, cases[:1], 1)
    assert counts == {4} and len(seen.margins) == experts.LAYERS
    ids = torch.tensor([[*reference.expected(cases[0]).ids, *reference.expected(cases[0]).answer]])
    for margin, logits in zip(seen.margins, experts.router_logits(reference.model, ids).values(), strict=True):
        ordered = logits.softmax(-1).sort(descending=True).values
        assert torch.allclose(margin, ordered[:, 1] - ordered[:, 2], atol=1e-6)
    ties = [margin <= 1e-6 for margin in seen.margins]
    assert not ties[0].any() and 0 < int(ties[1].sum()) < len(ties[1])
    with Choices(counts, seen.watched, ties) as other:
        rows = run(reference, reference.model, cases[:1], 1)
    moved = (rows[0] - reference.expected(cases[0]).log_probs).abs().amax(-1)
    places = ties[1][len(reference.expected(cases[0]).ids) - 1 : -1]
    assert (moved[places] > 1e-4).all() and (moved[~places] < 1e-6).all(), "in the last layer a choice moves one place"
    assert all(map(torch.equal, other.watched, seen.watched))


def test_a_dense_model_has_no_choices(text_export: Path) -> None:
    reference, cases = side(text_export.parent / "model")
    floor = measure_floor(reference, cases[:1], names=["attention"])
    assert floor.routing == {} and floor.thresholds("f16").near_ties == 0


def test_the_verdict_says_what_near_ties_leave_unproven() -> None:
    def told(measured: dict[str, dict[str, int]]) -> list[str]:
        return verdict({"f16": Ladder(tuple(Rung(name, OK, measured.get(name, {})) for name in NAMES))})

    [_, said] = told({"logprobs": {"positions_of_another_routing": 1}, "text": {"cases": 24, "another_routing": 14}})
    assert "f16: 1 place of forced answers and 14 of 24 answers" in said
    assert len(told({"text": {"cases": 24, "another_routing": 0}})) == 1
