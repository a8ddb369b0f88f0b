"""The independent checker of a study's folder: sound ledgers pass, each single edit of one is found."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats
from test_study import small

from rankwise.options.study import GridSection, ProbeSection
from rankwise.study import command as stage
from rankwise.study import execution
from rankwise.train.together.train import TrainedArm

REFEREE = Path(__file__).parents[2] / "benchmarks" / "referee"
MODULES = ("intervals.py", "folder.py", "power.py", "check.py")
Edit = Callable[[Path], object]


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, REFEREE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def referee() -> Iterator[Mapping[str, Any]]:
    """The checker's modules, imported as a script beside them would."""
    before = dict(sys.modules)
    found = {name: module(name) for name in ("intervals", "folder", "power", "check")}
    yield found
    for name in found:
        sys.modules.pop(name)
        if name in before:
            sys.modules[name] = before[name]


# --- Studies with losses that are drawn, made by the product's own code but for training and scoring ------------------


class Drawn:
    """In place of training and scoring: losses per item, by arm, rate, seed and item.

    effects: arm → nats per token above the others. best: learning rate with the least loss. diverging: whether a run
    diverges.
    """

    def __init__(
        self, effects: Mapping[str, float], best: float, diverging: Callable[[execution.Run], bool], spread: float
    ) -> None:
        self.effects, self.best, self.diverging, self.spread = effects, best, diverging, spread
        self.runs: Sequence[execution.Run] = ()

    def trained(self, _: execution.Bench, runs: Any, arms: Any, settings: Any) -> tuple[list[TrainedArm], list[Any]]:
        self.runs = runs
        lost = [self.diverging(run) for run in runs]
        losses = [[math.nan if gone else 2.0] * settings.steps for gone in lost]
        return [TrainedArm(arm.start, *each) for arm, *each in zip(arms, losses, losses, lost, strict=True)], [
            {}
        ] * len(runs)

    def score(self, _: Any, results: Any, __: Any, parts: Mapping[str, Any], in_turn: bool) -> dict[str, torch.Tensor]:
        return {name: torch.stack([self.row(run, batches) for run in self.runs]) for name, batches in parts.items()}

    def row(self, run: execution.Run, batches: Any) -> torch.Tensor:
        tokens = torch.cat([(batch["labels"][:, 1:] != -100).sum(1) for batch in batches]).double()
        if self.diverging(run):
            return torch.full_like(tokens, math.nan)
        items = np.random.default_rng(len(tokens)).normal(2.0, 0.3, len(tokens))
        own = np.random.default_rng([*run.contender.arm.encode(), *run.contender.budget.encode(), run.seed])
        mean = self.effects.get(run.contender.arm, 0.0) + 0.05 * math.log(run.learning_rate / self.best) ** 2
        return tokens * torch.from_numpy(
            items + mean + own.normal(0, self.spread) + own.normal(0, self.spread, len(items))
        )


GRID = GridSection(grid_low=1e-3, grid_high=1e-2, grid_points=3, grid_growth=1, tuning_seeds=1)
ARMS = ["uniform", "attention", "mlp"]
TWO = {"budgets": ["uniform:5", "uniform:7"], "arms": ["uniform", "mlp"]}


@pytest.fixture(scope="module")
def deltas(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that was trained, with every kind of arm that needs a probe; its probe is the others' too."""
    out = tmp_path_factory.mktemp("trained")
    stage.run(small(base, data, out, arms=["uniform", "energy", "shuffled", "inverted", "compress", "full", "base"]))
    return out


def study(
    base: Path,
    data: Path,
    out: Path,
    world: Mapping[str, Any] | None = None,
    *,
    probe: ProbeSection | None = None,
    **changes: Any,
) -> Path:
    drawn = Drawn(**{"effects": {}, "best": 3e-3, "diverging": lambda run: False, "spread": 0.01} | (world or {}))
    settings = {
        "arms": ARMS,
        "budgets": ["uniform:5"],
        "grid": GRID,
        "dev_size": 8,
        "test_size": 12,
        "train_size": 20,
        "smallest_effect": 0.02,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution.Bench, "trained", lambda bench, *rest: drawn.trained(bench, *rest))
        patch.setattr(execution, "score", drawn.score)
        config = small(base, data, out, **settings | changes)
        return stage.run(replace(config, probe=probe or config.probe))


def told(referee: Mapping[str, Any], folder: Path, capsys: pytest.CaptureFixture[str], *heads: str) -> tuple[int, str]:
    capsys.readouterr()
    code = referee["check"].main(str(folder), *heads)
    return code, capsys.readouterr().out


SOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal arms": ({}, {}),
    "other seeds": ({}, {"seed": 7}),
    "a better arm": ({"effects": {"mlp": -0.2}}, {"first_seeds": 3}),
    "a worse arm": ({"effects": {"mlp": 0.2, "attention": 0.01}}, {"first_seeds": 3}),
    "stopped early": ({"spread": 0.001}, {"first_seeds": 4, "most_seeds": 9}),
    "added in uneven steps": ({"spread": 0.1}, {"first_seeds": 2, "more_seeds": 3, "most_seeds": 6}),
    "undecided": ({"spread": 0.3}, {"first_seeds": 4, "most_seeds": 4, "resamples": 2000}),
    "without the uniform arm": ({}, {"arms": ["mlp", "attention"], "primary": ["mlp vs attention"]}),
    "two budgets": ({}, TWO),
    "verdicts at one of two budgets": ({}, TWO | {"primary_budgets": ["uniform:7"]}),
    "a budget in percent": ({}, {"budgets": ["40%"], "arms": ["uniform", "mlp"]}),
    "a diverged seed": ({"diverging": lambda run: run.seed == 42001 and run.contender.arm == "mlp"}, {}),
    "an arm without finite seeds": (
        {"diverging": lambda run: run.purpose == "report" and run.contender.arm == "mlp"},
        {},
    ),
    "diverged rates": ({"diverging": lambda run: run.learning_rate > 5e-3}, {}),
    "a grid grown down": ({"best": 3e-4}, {}),
    "a grid grown up twice": ({"best": 5e-2}, {"grid": replace(GRID, grid_growth=2)}),
    "scales and tuning seeds": ({}, {"grid": replace(GRID, scales=["constant", "alpha"], tuning_seeds=2)}),
    "another scheduler": ({}, {"grid": replace(GRID, lr_schedulers=["cosine"])}),
    "predictions": (
        {"effects": {"mlp": -0.2}},
        {"predictions": ["mlp vs uniform: worse: a guess", "attention vs uniform: not worse: another"]},
    ),
}


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_ledger_passes(
    case: str,
    base: Path,
    data: Path,
    referee: Mapping[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    world, changes = SOUND[case]
    code, text = told(referee, study(base, data, tmp_path, world, **changes), capsys)
    assert code == 0, text
    assert text.count("ok ") == len(text.splitlines()) == len(referee["check"].CHECKS)


# --- One ledger with all that there can be, and edits of it -----------------------------------------------------------


@pytest.fixture(scope="module")
def rich(base: Path, data: Path, deltas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Resumed, a diverged seed, a deviation before test was read and one to read it again."""
    out, whole, left = tmp_path_factory.mktemp("rich"), execution.Bench.make, [2]
    world = {
        "effects": {"energy": -0.2, "inverted": 0.3},
        "diverging": lambda run: run.seed == 42001 and run.contender.arm == "mlp",
    }
    settings: dict[str, Any] = {
        "arms": ["uniform", "attention", "mlp", "energy", "inverted", "base"],
        "primary": ["energy vs uniform", "mlp vs attention"],
        "predictions": ["energy vs uniform: better: found before", "inverted vs uniform: worse: it has to be"],
        "probe": ProbeSection(deltas=[str(deltas / "probe" / "0")]),
        "first_seeds": 3,
        "most_seeds": 4,
        "batch_arms": 3,
    }

    def interrupted(bench: execution.Bench, runs: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        whole(bench, runs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution.Bench, "make", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study(base, data, out, world, **settings)
    shutil.copytree(out, out.parent / "unfinished")
    study(base, data, out, world, **settings, question="does it?", deviation="the question was missing")
    settings |= {"most_seeds": 5, "question": "does it?"}
    return study(base, data, out, world, **settings, deviation="a seed more")


def row_of(folder: Path, name: str, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the JSON of one line (from 0) of a file of lines."""
    lines = (folder / name).read_text().splitlines()
    row = json.loads(lines[number])
    change(row)
    lines[number] = json.dumps(row, ensure_ascii=False)
    (folder / name).write_text("\n".join(lines) + "\n")


def lines_of(folder: Path, name: str, change: Callable[[list[str]], list[str]]) -> None:
    (folder / name).write_text("\n".join(change((folder / name).read_text().splitlines())) + "\n")


def document(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def place(folder: Path, wanted: Callable[[dict[str, Any]], bool]) -> int:
    """The line (from 0) of the first run of this kind."""
    lines = map(json.loads, (folder / "runs.jsonl").read_text().splitlines())
    return next(number for number, row in enumerate(lines) if wanted(row))


def a_loss(folder: Path, number: int) -> None:
    """A tenth less for one test item of a run."""
    row = json.loads((folder / "runs.jsonl").read_text().splitlines()[number])
    matrices = load_file(folder / row["file"])
    matrices["test"][row["row"], 0] *= 0.9
    save_file(matrices, folder / row["file"])


def with_hashes(folder: Path, number: int) -> None:
    """A loss, and in the run's line all that is told of it."""
    a_loss(folder, number)

    def told(row: dict[str, Any]) -> None:
        row["sha256"] = sha256((folder / row["file"]).read_bytes()).hexdigest()
        row["items"]["test"] = sha256(load_file(folder / row["file"])["test"][row["row"]].numpy().tobytes()).hexdigest()

    row_of(folder, "runs.jsonl", number, told)


def with_heads(folder: Path) -> None:
    """The last run's loss, all that is told of it, and the end of the chain."""
    with_hashes(folder, -1)
    head = sha256((folder / "runs.jsonl").read_bytes().splitlines()[-1]).hexdigest()
    document(folder, "runs.head.json", lambda content: content.update(sha256=head))
    document(folder, "test_read.json", lambda content: content["heads"]["runs.jsonl"].update(sha256=head))


def registered(folder: Path, deeper: int, **changes: Any) -> None:
    """Edit the registration: its content, then its own hash, then the one that study.json tells."""
    record = json.loads((folder / "preregistration.json").read_text())
    record["content"] |= changes
    text = json.dumps(record["content"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    record["sha256"] = sha256(text.encode()).hexdigest() if deeper else record["sha256"]
    (folder / "preregistration.json").write_text(json.dumps(record))
    if deeper > 1:
        document(folder, "study.json", lambda content: content["registration"].update(sha256=record["sha256"]))


def swapped(folder: Path) -> None:
    first = place(folder, lambda row: row["key"]["arm"] == "attention")
    second = place(folder, lambda row: row["key"]["arm"] == "mlp")
    row_of(folder, "runs.jsonl", first, lambda row: row["key"].update(arm="mlp"))
    row_of(folder, "runs.jsonl", second, lambda row: row["key"].update(arm="attention"))


def ranks_edited(folder: Path) -> None:
    file = min((folder / "ranks").iterdir())
    document(file.parent, file.name, lambda ranks: ranks.update({next(iter(ranks)): 1 + next(iter(ranks.values()))}))


def ranks_exchanged(folder: Path) -> None:
    first, second = sorted((folder / "ranks").iterdir())[:2]
    text = first.read_text()
    first.write_text(second.read_text())
    second.write_text(text)


def of_study(*path: Any, add: float = 0.0, put: Any = None) -> Edit:
    """Add to a number of study.json, or replace a value."""

    def edit(folder: Path) -> None:
        def change(content: Any) -> None:
            for name in path[:-1]:
                content = content[name]
            content[path[-1]] = content[path[-1]] + add if put is None else put

        document(folder, "study.json", change)

    return edit


def shifted(folder: Path) -> None:
    """A verdict's estimate and both bounds by the same."""
    for name in ("estimate", "low", "high"):
        of_study("verdicts", 0, name, add=-0.004)(folder)


def wider(folder: Path) -> None:
    """A verdict's error, and its bounds with it."""
    row = json.loads((folder / "study.json").read_text())["verdicts"][1]
    half = row["high"] - row["estimate"]
    of_study("verdicts", 1, "error", put=2 * row["error"])(folder)
    of_study("verdicts", 1, "low", put=row["estimate"] - 2 * half)(folder)
    of_study("verdicts", 1, "high", put=row["estimate"] + 2 * half)(folder)


def undeviated(folder: Path) -> None:
    """The last deviation, in both files."""
    lines_of(folder, "deviations.jsonl", lambda lines: lines[:-1])
    document(folder, "study.json", lambda content: content["registration"]["deviations"].pop())


def is_diverged(row: dict[str, Any]) -> bool:
    return bool(row["diverged"])


def runs(change: Callable[[list[str]], list[str]]) -> Edit:
    return lambda folder: lines_of(folder, "runs.jsonl", change)


REGISTRATION, POWER, CHAIN, END, LOSSES, PARAMETERS, TUNING, SEEDS, TEST, VERDICTS, NUMBERS = (
    *("registration and its", "power follows", "chained to", "chain ends", "losses per item", "budget's parameters"),
    *("tuning chose", "seeds were added", "test was read once", "verdicts follow", "other numbers follow"),
)
DOCTORED: dict[str, tuple[Edit, str]] = {
    "a row dropped": (runs(lambda lines: [*lines[:5], *lines[6:]]), CHAIN),
    "the last row dropped": (runs(lambda lines: lines[:-1]), END),
    "two rows exchanged": (runs(lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]]), CHAIN),
    "a row duplicated": (runs(lambda lines: [*lines[:6], lines[5], *lines[6:]]), CHAIN),
    "a row appended once more": (runs(lambda lines: [*lines, lines[-1]]), LOSSES),
    "a loss": (lambda folder: a_loss(folder, -3), LOSSES),
    "a loss and its row": (lambda folder: with_hashes(folder, -3), CHAIN),
    "the last loss and its row": (lambda folder: with_hashes(folder, -1), END),
    "the last loss, its row and the heads": (with_heads, NUMBERS),
    "a seed relabelled": (lambda folder: row_of(folder, "runs.jsonl", 8, lambda row: row["key"].update(seed=1)), CHAIN),
    "arm names swapped": (swapped, CHAIN),
    "a learning rate of a row": (
        lambda folder: row_of(folder, "runs.jsonl", -2, lambda row: row["key"].update(learning_rate=1e-3)),
        CHAIN,
    ),
    "a diverged row deleted": (
        lambda folder: lines_of(
            folder, "runs.jsonl", lambda lines: [line for line in lines if '"diverged": true' not in line]
        ),
        CHAIN,
    ),
    "a diverged row called finite": (
        lambda folder: row_of(folder, "runs.jsonl", place(folder, is_diverged), lambda row: row.update(diverged=False)),
        LOSSES,
    ),
    "parameters of a row": (
        lambda folder: row_of(folder, "runs.jsonl", 4, lambda row: row.update(parameters=row["parameters"] + 100)),
        PARAMETERS,
    ),
    "a rank map edited": (ranks_edited, PARAMETERS),
    "two rank maps exchanged": (ranks_exchanged, PARAMETERS),
    "tokens of an item": (
        lambda folder: document(folder, "items.json", lambda items: items["test"]["tokens"].__setitem__(0, 3)),
        CHAIN,
    ),
    "the registration": (lambda folder: registered(folder, 0, most_seeds=9), REGISTRATION),
    "the registration and its hash": (lambda folder: registered(folder, 1, smallest_effect=0.05), REGISTRATION),
    "the registration and all that tell its hash": (lambda folder: registered(folder, 2, most_seeds=9), CHAIN),
    "a version of the registration": (
        lambda folder: document(folder, "preregistration.json", lambda record: record["versions"].update(torch="1.0")),
        REGISTRATION,
    ),
    "a version of a deviation": (
        lambda folder: row_of(folder, "deviations.jsonl", 1, lambda row: row["versions"].update(peft="0.1")),
        REGISTRATION,
    ),
    "power that nothing was assumed for": (
        lambda folder: document(folder, "preregistration.json", lambda record: record.update(power=[])),
        POWER,
    ),
    "predictions of the registration": (
        lambda folder: registered(folder, 2, predictions=["energy vs uniform: worse: of course"]),
        REGISTRATION,
    ),
    "a deviation removed": (lambda folder: lines_of(folder, "deviations.jsonl", lambda lines: lines[:1]), REGISTRATION),
    "a deviation not told": (
        lambda folder: document(folder, "study.json", lambda content: content["registration"]["deviations"].pop()),
        REGISTRATION,
    ),
    "a deviation removed everywhere": (undeviated, TEST),
    "the reason of a deviation": (
        lambda folder: row_of(folder, "deviations.jsonl", 0, lambda row: row.update(why="planned")),
        REGISTRATION,
    ),
    "test read before the registration": (
        lambda folder: document(folder, "test_read.json", lambda content: content.update(time="2020-01-01T00:00:00")),
        TEST,
    ),
    "test read for fewer runs": (
        lambda folder: document(folder, "test_read.json", lambda content: content.update(runs=5)),
        TEST,
    ),
    "the chain's head": (
        lambda folder: document(folder, "runs.head.json", lambda content: content.update(sha256="0" * 64)),
        END,
    ),
    "δ": (of_study("smallest_effect", put=0.1), VERDICTS),
    "a verdict": (of_study("verdicts", 1, "verdict", put="better"), VERDICTS),
    "an estimate": (of_study("verdicts", 0, "estimate", add=-0.002), VERDICTS),
    "a bound": (of_study("verdicts", 0, "high", add=-0.001), VERDICTS),
    "an estimate and its interval": (shifted, VERDICTS),
    "an error and its interval": (wider, VERDICTS),
    "p of a difference": (of_study("verdicts", 1, "p_difference", put=0.01), VERDICTS),
    "p of equivalence": (of_study("verdicts", 1, "p_equivalence", put=0.01), VERDICTS),
    "more seeds": (of_study("verdicts", 1, "more_seeds", put=1), VERDICTS),
    "a prediction": (of_study("verdicts", 0, "prediction", put="not worse"), VERDICTS),
    "the order of contrasts": (
        lambda folder: document(folder, "study.json", lambda content: content["verdicts"].reverse()),
        VERDICTS,
    ),
    "a difference": (of_study("differences", 0, "low", add=-0.01), NUMBERS),
    "an arm's loss": (of_study("arms", 0, "loss", add=-0.01), NUMBERS),
    "an arm's parameters": (of_study("arms", 1, "parameters", add=20), NUMBERS),
    "the assay": (of_study("assay", 0, "works", put=False), NUMBERS),
    "the chosen rate": (of_study("tuning", 0, "learning_rate", put=1e-2), TUNING),
    "a loss of tuning": (of_study("tuning", 1, "curves", "constant", 0, "losses", 0, add=-0.01), TUNING),
    "the number of seeds": (of_study("seeds", "reported", put=4), TEST),
    "why it stopped": (
        of_study("seeds", "stopped", put="every half-width on dev is at most δ/2 = 0.01"),
        SEEDS,
    ),
}


def test_the_rich_ledger_is_sound(rich: Path, referee: Mapping[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (rich / "runs.jsonl").read_text().splitlines()]
    assert sum(row["diverged"] for row in rows) == 1
    assert len((rich / "deviations.jsonl").read_text().splitlines()) == 3
    code, text = told(referee, rich, capsys)
    assert code == 0, text


def test_a_ledger_that_was_trained_is_sound(
    deltas: Path, referee: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = told(referee, deltas, capsys)
    assert code == 0, text


def test_a_ledger_that_grows_is_checked_as_far_as_it_goes(
    rich: Path, referee: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    shutil.copytree(rich.parent / "unfinished", folder)
    code, text = told(referee, folder, capsys)
    assert code == 3 and (text.count("ok "), text.count("not yet ")) == (6, 5), text
    kept = str(folder / "runs.head.json")
    assert told(referee, rich, capsys, kept)[0] == 0
    row_of(folder, "runs.jsonl", 1, lambda row: row.update(train_loss=1.0))
    assert told(referee, folder, capsys)[0] == 1


@pytest.mark.parametrize("case", DOCTORED)
def test_an_edit_is_found(
    case: str, rich: Path, referee: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, check = DOCTORED[case]
    folder = tmp_path / "study"
    shutil.copytree(rich, folder, ignore=shutil.ignore_patterns("probe", "plots"))
    edit(folder)
    code, text = told(referee, folder, capsys)
    assert code == 1
    assert [line for line in text.splitlines() if line.startswith("FAILED: ") and check in line], text


def row_of_power(**changes: Any) -> Edit:
    return lambda folder: document(folder, "preregistration.json", lambda record: record["power"][1].update(changes))


def shares_moved(folder: Path) -> None:
    """A quarter of the studies from one word to another: the shares still add up."""

    def move(record: dict[str, Any]) -> None:
        row = record["power"][1]
        low, high = sorted(("better", "worse", "equivalent", "undecided"), key=lambda word: row[word])[::3]
        row[low], row[high] = row[low] + 0.25, row[high] - 0.25

    document(folder, "preregistration.json", move)


POWER_EDITS: dict[str, Edit] = {
    "a share": row_of_power(better=0.991),
    "shares that add up": shares_moved,
    "the number of contrasts": row_of_power(contrasts=7),
    "the difference that is there": row_of_power(true=-0.1),
    "a row dropped": lambda folder: document(folder, "preregistration.json", lambda record: record["power"].pop()),
    "all of it": lambda folder: document(folder, "preregistration.json", lambda record: record.pop("power")),
    "what was assumed": lambda folder: registered(folder, 2, assumed_seed_sd=0.5),
}


def test_an_edit_of_the_power_is_found(
    base: Path, data: Path, referee: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"assumed_seed_sd": 0.01, "assumed_item_sd": 0.05, "arms": ["uniform", "mlp"]}
    folder = study(base, data, tmp_path / "study", **changes)
    file = folder / "preregistration.json"
    content = file.read_bytes()
    assert told(referee, folder, capsys)[0] == 0
    for case, edit in POWER_EDITS.items():
        edit(folder)
        code, text = told(referee, folder, capsys)
        assert code == 1, case
        assert [line for line in text.splitlines() if line.startswith("FAILED: ") and POWER in line], (case, text)
        file.write_bytes(content)


def test_only_a_kept_head_tells_a_rebuilt_ledger(
    base: Path,
    data: Path,
    referee: Mapping[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = study(base, data, tmp_path / "first")
    again = study(base, data, tmp_path / "again", {"effects": {"mlp": -0.2}})
    kept = str(first / "runs.head.json")
    assert [told(referee, folder, capsys, kept)[0] for folder in (first, again)] == [0, 1]
    assert told(referee, again, capsys)[0] == 0


def test_a_folder_that_is_no_study_fails(
    referee: Mapping[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = told(referee, tmp_path, capsys)
    assert code == 1 and text.startswith("FAILED: no ledger that can be read")
    (tmp_path / "items.json").write_text("{}")
    (tmp_path / "preregistration.json").write_text(json.dumps({"content": {"kind": "phases"}}))
    code, text = told(referee, tmp_path, capsys)
    assert code == 1 and "a study of phases" in text


def test_it_shares_no_code_and_fits_on_few_pages() -> None:
    sources = {name: (REFEREE / name).read_text() for name in MODULES}
    found = {name for text in sources.values() for name in re.findall(r"^\s*(?:from|import) +([\w.]+)", text, re.M)}
    own = {name.removesuffix(".py") for name in MODULES}
    assert found - set(sys.stdlib_module_names) - {"collections.abc"} - own == {"numpy"}
    assert len(sources["check.py"].splitlines()) <= 250


def test_its_own_students_t_is_that_of_scipy(referee: Mapping[str, Any]) -> None:
    for degrees in (1.0, 1.002, 1.7, 7.0, 49.3, 1e5):
        for t in (-1.3, 0.0, 0.1, 2.0, 9.0, 60.0):
            expected = stats.t.sf(t, degrees)
            assert referee["intervals"].tail(t, degrees) == pytest.approx(expected, rel=1e-6, abs=1e-12)
        for level in (0.95, 0.975, 0.9917):
            assert referee["intervals"].quantile(level, degrees) == pytest.approx(stats.t.ppf(level, degrees), rel=1e-6)
