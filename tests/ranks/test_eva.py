"""EVA against PEFT as oracle: the same explained-variance ratios, and by PEFT's own counting the same ranks."""

from __future__ import annotations

import types
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_eva_state_dict
from peft.tuners.lora import EvaConfig, eva
from planted import generator
from tiny import tiny_llama
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import Site
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites
from rankwise.ranks.gain import input_moments, input_spectra
from rankwise.study.arms import Probed, gains_of
from rankwise.train.adapter import input_directions

RANK, RHO = 4, 4.0
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return load_model(str(tiny_llama(tmp_path_factory.mktemp("llama"))), torch.float32).eval()


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    """16 rows, of which a third is padding; labels on the second half of each."""
    draw, places = generator(0), torch.arange(24)[None]
    mask = (places < torch.randint(6, 25, (16, 1), generator=draw)).long()
    ids = torch.randint(3, 40, (16, 24), generator=draw).where(mask.bool(), torch.tensor(2))
    labels = ids.masked_fill((mask == 0) | (places < 3), -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass(frozen=True)
class OfPeft:
    """Ratios of the sites whose inputs PEFT decomposes (those with equal inputs share one), and its ranks."""

    ratios: dict[str, Tensor]
    ranks: dict[str, int]


def of_peft(model: PreTrainedModel, batch: dict[str, Tensor], label_mask: bool = False) -> OfPeft:
    seen = {}

    class Recorded(eva.SVDHook):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            seen[self.name] = self.svd

    settings = EvaConfig(rho=RHO, use_label_mask=label_mask, whiten=False)
    modules = sorted({site.projection for site in model_sites(model).values()})
    config = LoraConfig(r=RANK, target_modules=modules, init_lora_weights="eva", eva_config=settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eva, "SVDHook", Recorded)
        state = get_eva_state_dict(model, [batch], config, show_progress_bar=False)
    ratios = {name: svd.explained_variance_ratio_.double() for name, svd in seen.items()}
    return OfPeft(ratios, {path: len(rows) for path, rows in state.items()})


def decomposed(path: str) -> str:
    """The site whose inputs are those of this one."""
    parent, _, name = path.rpartition(".")
    return f"{parent}.{SAME_INPUT.get(name, name)}"


def peft_count(ratios: dict[str, Tensor], paths: list[str]) -> dict[str, int]:
    """PEFT's own function, which is nested in another."""
    constants = eva._get_eva_state_dict.__code__.co_consts
    code = next(each for each in constants if getattr(each, "co_name", "") == "_get_rank_distribution")
    count = types.FunctionType(code, vars(eva))
    hooks = {name: (SimpleNamespace(svd=SimpleNamespace(explained_variance_ratio_=r)),) for name, r in ratios.items()}
    equal = {path: decomposed(path) for path in paths if path not in ratios}
    found = count(hooks, {name: name for name in ratios} | equal, equal, RANK * len(paths), dict.fromkeys(paths, 16))
    return {path: int(rank) for path, rank in found.items()}


def ratios_of(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> dict[Site, Tensor]:
    spectra = input_spectra(model, list(model_sites(model).values()), batches)
    return {site: spectrum.values.square() / spectrum.energy_total for site, spectrum in spectra.items()}


def test_explained_variance_ratios_and_ranks_are_pefts(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    oracle, ours = of_peft(model, batch), ratios_of(model, [batch])
    assert len(oracle.ratios) == 8, "two layers of q, o, gate and down"
    for site, ratios in ours.items():
        expected = oracle.ratios[decomposed(site.path)]
        torch.testing.assert_close(ratios[: len(expected)], expected, atol=1e-3, rtol=0)
    assert len(set(oracle.ranks.values())) > 2, "ranks that differ"
    by_path = {site.path: ratios for site, ratios in ours.items()}
    assert peft_count({name: by_path[name] for name in oracle.ratios}, list(by_path)) == oracle.ranks


def test_what_pefts_ratios_depend_on_is_in_this_batch(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """Centring, padding and masked labels each move a ratio by more than the tolerance above."""
    oracle, sites = of_peft(model, batch), list(model_sites(model).values())
    second = {site: torch.linalg.eigvalsh(m.second).flip(0) for site, m in input_moments(model, sites, [batch]).items()}
    uncentred = {site: values / values.sum() for site, values in second.items()}
    padded = ratios_of(model, [batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}])
    labelled = of_peft(model, batch, label_mask=True).ratios
    for site in sites:
        if site.path in oracle.ratios:
            expected = oracle.ratios[site.path]
            others = (uncentred[site], padded[site], labelled[site.path])
            assert all(float((other[:16] - expected[:16]).abs().max()) > 1e-3 for other in others), site.path


def test_batches_are_one_sample(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """In parts as in one: nothing depends on where a batch ends."""
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(5), slice(5, 16))]
    for whole, apart in zip(ratios_of(model, [batch]).values(), ratios_of(model, parts).values(), strict=True):
        torch.testing.assert_close(whole, apart, atol=1e-6, rtol=0)


def test_the_rule_of_a_study_is_by_these_ratios(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    sites = model_sites(model).values()
    probed = Probed(model, {}, {site: torch.zeros(site.shape) for site in sites}, [batch])
    expected = ratios_of(model, [batch])
    for site, gains in gains_of("eva", probed, 16).items():
        torch.testing.assert_close(gains, expected[site])


def test_the_start_of_train_keeps_as_much_variance(model: PreTrainedModel, batch: dict[str, Tensor]) -> None:
    """`--init_lora_weights eva` takes the directions from PEFT: those of the same covariance."""
    sites = list(model_sites(model).values())
    plan = RankPlan(tuple(PlannedSite(site, RANK) for site in sites))
    directions = input_directions(model, plan, [{name: batch[name] for name in ("input_ids", "attention_mask")}])
    expected = ratios_of(model, [batch])
    for site, moments in input_moments(model, sites, [batch]).items():
        rows = directions[site.path].double()
        kept = (rows @ moments.covariance @ rows.T).trace() / moments.covariance.trace()
        assert float(kept) == pytest.approx(float(expected[site][:RANK].sum()), abs=1e-3)
