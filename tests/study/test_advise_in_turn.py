"""`rankwise advise` where runs cannot share a forward pass: rows with pictures, models with fused experts."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import experts
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_llama
from tiny_vision import tiny_qwen25vl, tiny_smolvlm

from rankwise import cli
from rankwise.core.allocate import spent
from rankwise.errors import UsageError
from rankwise.evaluate.likelihood import answer_losses
from rankwise.files.ledger import Ledger
from rankwise.models.adapt import lora_layers, lora_pairs, quiet_peft
from rankwise.models.load import load_model
from rankwise.models.sites import model_sites, tower_of, tower_prefixes
from rankwise.options.advise import AdviseConfig
from rankwise.options.sections import TOWERS, DataSection, ModelSection
from rankwise.study import advise
from rankwise.study.advice import TrialRun
from rankwise.study.material import PicturedBatches
from rankwise.study.trials import TOLERANCES, why_in_turn
from rankwise.train.together.alone import adapted, twin_of
from rankwise.train.together.starts import random_start

COLOURS = {"red": (250, 10, 10), "green": (10, 250, 10), "blue": (10, 10, 250), "white": (250, 250, 250)}
QUESTIONS = ("<image>\nWhat colour?", "Which colour is this? <image>", "<image> Name its colour.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """84 pictures of one colour each: few questions, which alone would be near-duplicates of one another."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    rows = []
    for number in range(84):
        name, file = list(COLOURS)[number % 4], f"{number}.png"
        Image.new("RGB", (40 + number % 3 * 16, 48), COLOURS[name]).save(folder / "images" / file)
        turns = [{"from": "human", "value": QUESTIONS[number % 3]}, {"from": "gpt", "value": name}]
        rows.append({"id": str(number), "conversations": turns, "image": file})
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def small(model: Path, data: DataSection, out: Path, **changes: Any) -> AdviseConfig:
    given = {"steps": 8, "batch_size": 4, "ranks": [2, 1], "rates": [1e-3, 1e-2, 3e-2], "choose_size": 20}
    given |= {"confirm_size": 20, "no_plots": True, "device": "cpu", "output_dir": str(out), "delta": 0.1}
    return AdviseConfig(model=ModelSection(model_name=str(model)), data=data, **given | changes)


def about_pictures(model: Path, rows: Path, out: Path, **changes: Any) -> AdviseConfig:
    data = DataSection(task="conversations", data_path=str(rows), image_folder=str(rows.parent / "images"))
    return small(model, data, out, **changes)


@pytest.mark.parametrize("family", [tiny_smolvlm, tiny_qwen25vl])
def test_rows_with_pictures_train_in_turn_and_the_pictures_are_seen(
    family: Any, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = family(tmp_path / "model")
    config = about_pictures(model, pictures, tmp_path / "run", minutes=1e-6)
    advise.run(config)
    told = capsys.readouterr().out
    assert told.count("one after the other: rows have pictures") == 2, "before the runs, and on the screen"
    assert told.count("adapters in the language tower only; frozen: vision") == 1
    assert told.count("the real run, of the language tower only: ") == 1
    assert "adapters in the language tower only; frozen: vision" in "\n".join(advise.describe(config))
    bench, _, rows = advise.prepare(config, tmp_path / "run")
    assert (rows, len(bench.material.rows)) == (84, 32), "pictures of one question are no duplicates of one another"
    ledger = Ledger(tmp_path / "run")
    assert {row["batch"] for row in ledger.rows.values()} == {1}
    kept = load_file(next((tmp_path / "run" / "factors").rglob("*.safetensors")))
    towers = tower_prefixes(bench.material.model)
    assert {tower_of(name[:-2], towers) for name in kept} == {"language"}

    (row, *_) = ledger.rows.values()
    (file,) = (tmp_path / "run" / "factors").rglob(f"rank2-{row['key']['learning_rate']:g}.safetensors")
    tensors = load_file(file)
    pairs = {name[:-2]: (tensors[name], tensors[f"{name[:-2]}.B"]) for name in tensors if name.endswith(".A")}
    base = load_model(str(model), torch.float32)
    scored = bench.material.dev
    assert isinstance(scored.batches, PicturedBatches) and "pixel_values" in scored.batches[0]
    losses, tokens = answer_losses(adapted(base, pairs, dict.fromkeys(pairs, 2.0)), scored.batches)
    assert torch.allclose(losses, ledger.numbers(row["key"], "dev").double(), atol=1e-4)
    assert tokens.tolist() == scored.tokens.tolist()
    other = [dict(batch) | {"pixel_values": -0.5 * batch["pixel_values"]} for batch in scored.batches]
    seen, unlike = (answer_losses(base, batches)[0] for batches in (scored.batches, other))
    assert not torch.allclose(seen, unlike, atol=1e-3), "pixels decide the losses"


def test_the_whole_ladder_of_rows_with_pictures_ends_in_an_advice_that_train_runs(
    pictures: Path, tmp_path: Path
) -> None:
    model = tiny_smolvlm(tmp_path / "model", longest_edge=32)
    advise.run(about_pictures(model, pictures, tmp_path / "run", placements=["mlp", "eva"]))
    advice = json.loads((tmp_path / "run" / "advice.json").read_text())
    assert (advice["rung"], advice["in_turn"]) == ("E", "rows have pictures")
    assert set(advice["placements"]) == {"mlp", "eva"}
    assert cli.main(["train", str(tmp_path / "run" / "advice.yaml"), "-o", str(tmp_path / "train")]) == 0
    adapted = load_file(tmp_path / "train" / "adapter_model.safetensors")
    assert adapted and not any("vision" in name or "connector" in name for name in adapted)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_is_no_target(tower: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "model", "rows.json", "--target", tower, "-o", str(tmp_path / "run")]) == 2
    assert f"--target takes attention_only, mlp_only, both, all, experts; got '{tower}'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    names, areas = ("Cotto", "Zizzi", "Aromi", "Strada", "Giraffe", "Clowns", "Alimentum"), range(12)
    rows = [f'"name[{name}], area[{area}]",{name} is in area {area}.' for name, area in product(names, areas)]
    file = tmp_path_factory.mktemp("data") / "trainset.csv"
    file.write_text("\n".join(["mr,ref", *rows]) + "\n", encoding="utf-8")
    return DataSection(task="e2e_nlg", data_path=str(file))


def test_a_model_with_fused_experts_trains_in_turn(
    texts: DataSection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = experts.saved("mixtral", tmp_path / "model")
    rates = [1e-3, 1e-2, 3e-2, 1e30]
    advise.run(small(model, texts, tmp_path / "run", minutes=1e-6, placements=[], rates=rates))
    told = capsys.readouterr().out
    assert "one after the other: the model has fused experts" in told and "tower" not in told
    rows = Ledger(tmp_path / "run").rows.values()
    left = {row["key"]["learning_rate"]: row["train_losses"].count(None) for row in rows if row["diverged"]}
    assert set(left) == {1e30} and left[1e30] > 0, "it leaves after an eighth"
    kept = load_file(next((tmp_path / "run" / "factors").rglob("*.safetensors")))
    assert {name[:-2] for name in kept} == set(model_sites(load_model(str(model), torch.float32)))


@pytest.fixture(scope="module")
def advised(texts: DataSection, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdviseConfig, Path]:
    """An advice on a mixture that has a shared expert and a dense first layer, up to the placements."""
    folder = tmp_path_factory.mktemp("mixture")
    model = experts.saved("deepseek_v3", folder / "model")
    config = small(
        model,
        texts,
        folder / "run",
        placements=["attention", "experts", "energy"],
        emit=["peft", "unsloth"],
        delta=10.0,
    )
    with pytest.raises(UsageError, match=r"--emit unsloth: .* The advice and everything else is written"):
        advise.run(config)
    return config, folder / "run"


def test_placements_of_a_mixture_spend_the_same_parameters_where_they_say(advised: tuple[AdviseConfig, Path]) -> None:
    config, folder = advised
    advice = json.loads((folder / "advice.json").read_text())
    assert set(advice["placements"]) == {"attention", "experts", "energy"} and not advice["too_small"]
    bench, rungs, _ = advise.prepare(config, folder)
    uniform = TrialRun(advice["advised"]["rank"], advice["advised"]["learning_rate"], seed=rungs.seeds[0])
    ranks = {name: bench.ranks(replace(uniform, placement=name)) for name in ("uniform", "attention", "experts")}
    adapted = {name: [site for site in found if found[site]] for name, found in ranks.items()}
    assert {site.kind for site in adapted["attention"]} == {"attention"}
    assert all(site.experts for site in adapted["experts"])
    assert {bool(site.experts) for site in adapted["uniform"] if site.kind == "mlp"} == {True, False}
    budget = spent(ranks["uniform"])
    assert all(abs(spent(found) - budget) <= TOLERANCES[-1] * budget for found in ranks.values())
    for row in Ledger(folder).rows.values():
        trial = TrialRun(**{name: value for name, value in row["key"].items() if name != "recipe"})
        assert row["batch"] == 1
        if trial.placement in ranks and trial.rank == uniform.rank:
            assert row["parameters"] == spent(ranks[trial.placement])


def test_the_energy_of_experts_is_the_sum_over_them(advised: tuple[AdviseConfig, Path]) -> None:
    config, folder = advised
    bench, _, _ = advise.prepare(config, folder)
    trials = [TrialRun(**{n: v for n, v in row["key"].items() if n != "recipe"}) for row in bench.ledger.rows.values()]
    bench.asked = dict.fromkeys(trials, "A")
    gains, kept = bench.energy_gains(), load_file(bench.factors(bench.best_of_largest))
    for site, found in gains.items():
        product = (2.0 * kept[f"{site.path}.B"] @ kept[f"{site.path}.A"]).double()
        values = torch.linalg.svdvals(product if site.experts else product[None])[:, : len(found)]
        assert torch.allclose(found, values.square().sum(0), rtol=1e-4, atol=1e-12), site.path
        assert product.shape[:-2] == ((site.experts,) if site.experts else ())


def test_the_advice_on_a_mixture_is_trained_by_train_and_by_peft(advised: tuple[AdviseConfig, Path]) -> None:
    config, folder = advised
    assert cli.main(["train", str(folder / "advice.yaml"), "-o", str(folder / "train"), "--max_steps", "2"]) == 0
    emitted = json.loads((folder / "configs" / "peft.json").read_text())
    model = load_model(str(config.model.model_name), torch.float32)
    with quiet_peft():
        built = get_peft_model(model, LoraConfig(**emitted))
    sites = json.loads((folder / "train" / "sites.json").read_text())["sites"]
    assert set(lora_layers(built)) == {site["path"] for site in sites}


@pytest.mark.parametrize("family", sorted(experts.FAMILIES))
def test_a_run_in_turn_begins_where_it_is_told_to(family: str) -> None:
    model = experts.built(family)
    ranks = {site: 1 + number % 2 for number, site in enumerate(model_sites(model).values())}
    start = random_start(ranks, 3, largest=4)
    start = {path: (a, torch.randn_like(b)) for path, (a, b) in start.items()}
    with twin_of(model) as twin:
        found = lora_pairs(adapted(twin, start, dict.fromkeys(start, 0.5)))
    assert set(found) == set(start)
    for path, (a, b) in start.items():
        assert torch.equal(found[path].lora_A, a) and torch.equal(found[path].lora_B, b), path
        assert found[path].scale == 0.5
    wider = random_start(dict.fromkeys(ranks, 2), 3, largest=4)
    for site, rank in ranks.items():
        assert torch.equal(wider[site.path][0][..., :rank, :], start[site.path][0]), "leading rows are shared"


def test_what_no_run_of_experts_can_be_is_refused(
    texts: DataSection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, dense = experts.saved("mixtral", tmp_path / "mixture"), tiny_llama(tmp_path / "dense")
    for model, placement, said in ((mixture, "eva", "a parameter of experts"), (dense, "experts", "none of the")):
        with pytest.raises(UsageError, match=f"--placements {placement}: .*{said}"):
            advise.run(small(model, texts, tmp_path / "run", placements=[placement]))


def test_text_rows_of_a_language_model_share_a_forward_pass(texts: DataSection, tmp_path: Path) -> None:
    config = small(tiny_llama(tmp_path / "model"), texts, tmp_path / "run")
    bench, _, _ = advise.prepare(config, tmp_path / "run")
    material = bench.material
    assert bench.in_turn == ""
    assert why_in_turn(material.model, material.renderer, material.parts, material.rows) == ""


def test_text_rows_of_a_model_that_takes_more_than_tokens_train_in_turn(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": f"{n + 1}"}]}
        for n in range(60)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = DataSection(task="conversations", data_path=str(tmp_path / "rows.json"))
    model = tiny_qwen25vl(tmp_path / "model")
    bench, _, _ = advise.prepare(small(model, data, tmp_path / "run"), tmp_path / "run")
    assert bench.in_turn == "the model takes mm_token_type_ids beside the tokens"
