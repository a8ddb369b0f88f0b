"""Laws of `ranks --metric auto`: rows that choose do not confirm; uniform rank wins unless a plan is shown better."""

from __future__ import annotations

import csv
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import generator
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise import cli
from rankwise.core.factors import truncate
from rankwise.core.site import Site, describe
from rankwise.data.example import Example, Examples, Turn
from rankwise.data.render import Renderer
from rankwise.errors import DataError
from rankwise.evaluate.likelihood import answer_losses, training_batches
from rankwise.files.adapter import read_adapter
from rankwise.files.plan import PLAN_FILE, read_plan
from rankwise.models.load import load_model, load_tokenizer
from rankwise.models.sites import model_sites
from rankwise.options.commands import RanksConfig
from rankwise.ranks import running
from rankwise.ranks.choice import METRICS, PURPOSE, UNIFORM, choose, per_group
from rankwise.ranks.decide import Decision, Running, decide
from rankwise.ranks.gain import at_ranks, moved, truncations
from rankwise.ranks.running import gain_halves, probe_batches
from rankwise.report.report import build_report

NAMES = ("Alimentum", "Bibimbap", "Clowns", "Cotto", "Strada", "Zizzi", "Wildwood", "Fitzbillies")
AREAS = ("riverside", "city centre")
PLACES = ("pub", "restaurant", "coffee shop")
DEAD = 8  # channels of the attention's inputs that are always zero
RAW = Path("analysis_outputs/svd/raw_data")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 restaurants with a sentence each."""
    path = tmp_path_factory.mktemp("data") / "devset.csv"
    write_rows(
        path,
        [
            (f"name[{n}], eatType[{p}], area[{a}]", f"{n} is a {p} in the {a}.")
            for n in NAMES
            for a in AREAS
            for p in PLACES
        ],
    )
    return path


def write_rows(path: Path, rows: list[tuple[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("mr", "ref"), *rows])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some channels of every attention's inputs are zero, whatever the text: weights there have no effect."""
    folder = tiny_llama(tmp_path_factory.mktemp("base"))
    model = load_model(str(folder), torch.float32)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[:DEAD] = 0
    model.save_pretrained(folder)
    return folder


def trained(base: Path, rows: Path, trains: str) -> tuple[PreTrainedModel, dict[Site, Tensor]]:
    """The base's weights after 30 steps on sites of this kind: the model, and the deltas."""
    model, before = load_model(str(base), torch.float32), load_model(str(base), torch.float32)
    config = cli.resolve("ranks", ["--task", "e2e_nlg", "--batch-size", "8", "--seed", "7"])[0]
    batches = probe_batches(config, Renderer(load_tokenizer(str(base)), positions=512), str(rows), "dev")
    sites = [site for site in model_sites(model).values() if trains in (site.kind, "all")]
    optimizer = torch.optim.AdamW([model.get_submodule(site.path).weight for site in sites], lr=5e-3)
    for step in range(30):
        batch = batches[step % len(batches)]
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {site: model.get_submodule(site.path).weight for site in sites}
    return model, {site: (w - before.get_submodule(site.path).weight).detach() for site, w in weights.items()}


@pytest.fixture(scope="module")
def decoyed(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is learnt lies in the MLPs; the largest deltas by far lie where they have no effect."""
    model, _ = trained(base, rows, "mlp")
    for index, site in enumerate(model_sites(model).values()):
        if site.projection in ("q_proj", "k_proj", "v_proj"):
            noise = torch.randn(site.shape[0], DEAD, generator=generator(index))
            model.get_submodule(site.path).weight.data[:, :DEAD] += noise
    folder = tmp_path_factory.mktemp("decoyed")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def equal(base: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every delta is of rank 2: with rank 2 everywhere every plan keeps all of the gain."""
    _, deltas = trained(base, rows, "all")
    model = load_model(str(base), torch.float32)
    for site, delta in deltas.items():
        model.get_submodule(site.path).weight.data += truncate(delta, 2, generator(0)).product()
    folder = tmp_path_factory.mktemp("equal")
    model.save_pretrained(folder)
    return folder


def auto(rows: Path, *more: str) -> list[str]:
    return ["--metric", "auto", "--task", "e2e_nlg", "--gain", str(rows), "--min-rank", "0", "--no-plots", *more]


def ranks(out: Path, *argv: object) -> None:
    assert cli.main(["ranks", *map(str, argv), "--out", str(out)]) == 0


def record(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / RAW / "gain.json").read_text())
    return found


def written(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / PLAN_FILE).read_text())
    return found


# --- the choice itself ------------------------------------------------------------------------------------------------

SITES = [describe(f"layers.{index}.q_proj", (8, 8)) for index in range(4)]


class Scored(nn.Module):
    """A model whose loss falls with the deltas that are added: by how much per site is the item's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8, bias=False)}) for _ in SITES)
        for site in SITES:
            nn.init.zeros_(self.get_parameter(f"{site.path}.weight"))


def items(worth: Tensor, seed: int, spread: float = 0.05) -> Any:
    """Losses of 40 items: 10 − Σ worth of the sites' energies, with noise of each item and site."""
    noise = 1 + spread * torch.randn(40, len(SITES), generator=generator(seed), dtype=torch.float64)

    def losses(model: nn.Module) -> tuple[Tensor, Tensor]:
        weights = [model.get_parameter(f"{site.path}.weight").detach() for site in SITES]
        energies = torch.stack([weight.double().square().sum() for weight in weights])
        return 10 - (noise * worth * energies).sum(1), torch.ones(40)

    return losses


PLANS = {
    "weight": dict(zip(SITES, (4, 0, 0, 0), strict=True)),
    "activation": dict(zip(SITES, (0, 4, 0, 0), strict=True)),
    "loss": dict(zip(SITES, (0, 0, 4, 0), strict=True)),
    UNIFORM: dict.fromkeys(SITES, 1),
}
DELTAS = {site: torch.diag(torch.tensor([0.5] * 4 + [0.0] * 4)) for site in SITES}
FIRST, SECOND, EVEN = (torch.tensor(w, dtype=torch.float64) for w in ([3, 1, 1, 1], [1, 5, 1, 1], [1, 1, 1, 1]))


def test_the_metric_is_chosen_on_the_rows_that_choose_alone() -> None:
    """The other half would choose `activation`, and would confirm it: it must not be asked."""
    choice = choose(Scored(), DELTAS, PLANS, items(FIRST, 0), items(SECOND, 1), seed=0)
    assert choice.best == "weight"
    assert (choice.metric, choice.confirmed) == (UNIFORM, False)
    assert "not confirmed" in choice.reason
    assert choose(Scored(), DELTAS, PLANS, items(SECOND, 1), items(SECOND, 1), seed=0).metric == "activation"


def test_it_is_confirmed_on_the_other_rows_alone() -> None:
    confirmed = choose(Scored(), DELTAS, PLANS, items(FIRST, 0), items(FIRST, 1), seed=0)
    assert (confirmed.metric, confirmed.facts()["purpose"]) == ("weight", PURPOSE)
    assert confirmed.choosing.arm("weight").kept == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("choosing", "confirming"), [(EVEN, FIRST), (FIRST, EVEN)])
def test_uniform_rank_wins_a_tie_on_either_half(choosing: Tensor, confirming: Tensor) -> None:
    halves = items(choosing, 0, spread=0), items(confirming, 1, spread=0)
    assert choose(Scored(), DELTAS, PLANS, *halves, seed=0).metric == UNIFORM


def test_without_a_gain_nothing_is_confirmed() -> None:
    nothing = choose(Scored(), DELTAS, PLANS, items(FIRST, 0), items(-FIRST, 1), seed=0)
    assert (nothing.metric, nothing.confirming.defined) == (UNIFORM, False)
    assert "touches 0" in nothing.reason


def test_chance_rarely_beats_uniform_rank() -> None:
    """Where every site is worth the same on average, one of the metrics leads by chance on the items that choose."""
    found = [
        choose(Scored(), DELTAS, PLANS, items(EVEN, 2 * seed, 0.5), items(EVEN, 2 * seed + 1, 0.5), seed)
        for seed in range(60)
    ]
    assert sum(choice.leads for choice in found) > 30
    assert sum(choice.confirmed for choice in found) <= 4


def test_groups_are_what_is_resampled() -> None:
    values, tokens = torch.arange(4.0, dtype=torch.float64), torch.tensor([1, 2, 3, 4])
    summed = per_group(lambda _: (values, tokens), ["a", "b", "a", "c"])(nn.Identity())
    assert [part.tolist() for part in summed] == [[2.0, 1.0, 3.0], [4, 2, 4]]


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_metric_that_is_truly_better_is_found_and_confirmed(
    base: Path, decoyed: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(tmp_path, base, decoyed, *auto(rows, "--budget", "uniform:1"))
    shown, choice = " ".join(capsys.readouterr().out.split()), record(tmp_path)["choice"]
    assert choice["metric"] == choice["best"] in ("activation", "loss")
    assert choice["margin"][0] > 0
    kept = {arm["name"]: arm["kept"] for arm in choice["choosing"]["arms"]}
    assert set(kept) == {*METRICS, UNIFORM}
    assert kept["weight"] < 0.1 < kept["uniform"] < kept[choice["best"]]
    assert written(tmp_path)["analysis_metadata"]["choice"] == choice
    plan = read_plan(tmp_path)
    assert sum(row.rank for row in plan.sites if row.site.kind == "mlp") > sum(plan.ranks.values()) / 2
    assert f"`--metric {choice['best']}` keeps more than uniform" in shown
    assert PURPOSE in shown and "rankwise extract" in shown
    page = build_report(tmp_path, tmp_path / "report.html").read_text()
    assert f"Metric by gain kept: {choice['best']}" in page and page.count("for training from scratch use") == 2


def test_where_all_are_equal_uniform_rank_wins(
    base: Path, equal: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks(tmp_path, base, equal, *auto(rows, "--budget", "uniform:2", "--min-rank", "2"))
    shown, choice = " ".join(capsys.readouterr().out.split()), record(tmp_path)["choice"]
    kept = {arm["kept"] for arm in choice["choosing"]["arms"]}
    assert len(kept) == 1 and kept.pop() == pytest.approx(1, abs=1e-3)
    assert (choice["metric"], choice["margin"]) == (UNIFORM, [0, 0])
    assert set(read_plan(tmp_path).ranks.values()) == {2}
    assert "one rank everywhere" in shown and PURPOSE in shown
    assert written(tmp_path)["analysis_metadata"]["metric"] == "auto"


def test_the_command_chooses_and_confirms_on_halves_that_share_no_group(
    base: Path, decoyed: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are those of the right half, computed here with the models; metrics see the half that chooses."""
    seen = {}

    def watched(config: RanksConfig, spectra: Any, read: Any, model: Running | None) -> Decision:
        seen[config.metric, config.signal] = model.batches if model else []
        return decide(config, spectra, read, model)

    monkeypatch.setattr(running, "decide", watched)
    argv = [str(base), str(decoyed), *auto(rows, "--budget", "uniform:1")]
    ranks(tmp_path / "auto", *argv)
    halves = gain_halves(cli.resolve("ranks", argv)[0])
    choosing, confirming = halves.train, halves.val
    assert not {item.group for item in choosing} & {item.group for item in confirming}
    assert len(choosing) == len(confirming) == 24

    found = record(tmp_path / "auto")
    model, renderer = load_model(str(base), torch.float32), Renderer(load_tokenizer(str(base)), positions=512)
    batches = [training_batches(half, renderer, 16) for half in (choosing, confirming)]
    scored = [functools.partial(answer_losses, batches=each) for each in batches]
    assert set(seen) == {(name, "delta") for name in METRICS} | {("weight", UNIFORM)}
    for name in METRICS:
        for ours, asked in zip(seen[name, "delta"], batches[0], strict=True):
            assert torch.equal(ours["input_ids"], asked["input_ids"])
    for half, losses in zip((found["choice"]["choosing"], found), scored, strict=True):
        for name, folder in (("base_loss", base), ("tuned_loss", decoyed)):
            sums, tokens = losses(load_model(str(folder), torch.float32))
            assert half[name] == pytest.approx(float(sums.sum() / tokens.sum()), rel=1e-4)
    plan = read_plan(tmp_path / "auto")
    after = load_model(str(decoyed), torch.float32)
    deltas = {
        row.site: (after.get_submodule(row.site.path).weight - model.get_submodule(row.site.path).weight).detach()
        for row in plan.sites
    }
    taken = {row.site: row.rank for row in plan.sites}
    with moved(model, at_ranks(truncations(deltas, {"plan": taken}), taken)):
        for half, name, losses in zip(
            (found["choice"]["choosing"], found), (found["choice"]["best"], "plan"), scored, strict=True
        ):
            sums, tokens = losses(model)
            assert half["losses"][name] == pytest.approx(float(sums.sum() / tokens.sum()), rel=1e-4)


def test_whole_groups_choose_or_confirm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three prompts of each of 45 tables."""
    items = [
        Example(f"{table}-{row}", f"table {table}", (Turn("user", f"{table}, {row}"), Turn("assistant", "yes")))
        for table in range(45)
        for row in range(3)
    ]
    monkeypatch.setattr(running, "read_rows", lambda *_: Examples(items))
    config = cli.resolve("ranks", ["BASE", "TUNED", *auto(Path("rows"))])[0]
    halves = gain_halves(config)
    groups = [{item.group for item in half} for half in (halves.train, halves.val)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 45
    assert len(halves.train) + len(halves.val) == 135
    monkeypatch.setattr(running, "read_rows", lambda *_: Examples(items[: 3 * 39]))
    with pytest.raises(DataError, match="117 items of 39 groups"):
        gain_halves(config)


def test_the_seed_decides_the_halves(base: Path, equal: Path, rows: Path) -> None:
    halves = [
        gain_halves(cli.resolve("ranks", [str(base), str(equal), *auto(rows), "--seed", seed])[0]) for seed in "112"
    ]
    assert halves[0] == halves[1] != halves[2]


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--budget", "uniform:1"], 2, "--metric auto needs --gain DATA:"),
        (["--gain", "ROWS"], 2, "--metric auto needs --budget:"),
        ([], 2, "--metric auto needs --gain DATA and --budget:"),
        (["--gain", "ROWS", "--budget", "uniform:1", "--signal", "gradient"], 2, "alternatives"),
        (["--gain", "ROWS", "--budget", "uniform:1", "--num-samples", "30"], 3, "needs 40 groups"),
    ],
)
def test_what_it_cannot_do_without_is_refused_by_name(
    base: Path,
    equal: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    code: int,
    message: str,
    dry: list[str],
) -> None:
    given = [str(rows) if word == "ROWS" else word for word in more]
    task = ["--task", "e2e_nlg"] if "ROWS" in more else []
    argv = ["ranks", str(base), str(equal), "--metric", "auto", *task, *given, *dry, "--out", str(tmp_path / "out")]
    assert cli.main(argv) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_every_command_that_a_chosen_plan_is_for_takes_it(base: Path, rows: Path, tmp_path: Path) -> None:
    """Chosen from a preliminary run's deltas; extraction and warm start then hold the same truncation at its ranks."""
    probe, out, task = tmp_path / "probe", tmp_path / "ranks", f"--task e2e_nlg --data_path {rows}"
    line = f"finetune --model_name {base} {task} -o {probe} --subset_ratio 1 --max_steps 8 --lr 3e-3"
    assert cli.main(line.split()) == 0
    ranks(out, "--deltas", probe, *auto(rows, "--budget", "uniform:2"))
    plan = out / PLAN_FILE
    extracted = f"extract --deltas {probe} --plan {plan} -o {tmp_path / 'extracted'}"
    warm = f"train --model_name {base} {task} -o {tmp_path / 'warm'} --lora_config {plan} --warm_start delta"
    assert cli.main(extracted.split()) == 0
    assert cli.main([*warm.split(), "--deltas", str(probe), "--lr", "0", "--max_steps", "1"]) == 0
    ours, started = (read_adapter(tmp_path / name).pairs for name in ("extracted", "warm"))
    assert {path: pair.rank for path, pair in ours.items()} == {
        path: rank for path, rank in read_plan(out).ranks.items() if rank
    }
    assert ours.keys() == started.keys()
    for path, pair in ours.items():
        torch.testing.assert_close(started[path].factors().product(), pair.factors().product(), atol=1e-5, rtol=1e-3)
