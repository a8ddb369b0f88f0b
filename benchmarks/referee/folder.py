"""What a study's folder holds, read for check.py: registration, rows, losses per item, and the effects of its arms.

study = Study(folder, heads=[])
study.effect(((arm, budget), (arm, budget)), seeds, "test")      # first − second, paired by seed and item
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from intervals import ALPHA, RESAMPLES, Array, Json, measured, quantile

EQUAL, OF_DELTA, SIGMAS = 0.005, 0.05, 5
NOT_RECIPE = """question arms primary primary_budgets predictions budgets smallest_effect resamples kind metric inputs
    grid_low grid_high grid_points grid_growth full_grid_low full_grid_high tuning_seeds scales lr_schedulers
    phase_states first_seeds more_seeds most_seeds assumed_seed_sd assumed_item_sd""".split()
TOLD = ("time", "why", "changed", "test_read_again", "runs_finished", "test_was_read", "sha256")  # of a deviation
RECORDED = {"eva+start": "eva", "eva": "eva-ranks"}  # an arm's name in registrations and rows
Arm = tuple[str, str]  # with its budget, which references have none of


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def digest(value: Any) -> str:
    """SHA-256 of bytes, or of a value as canonical JSON."""
    return hashlib.sha256(value if isinstance(value, bytes) else canonical(value).encode()).hexdigest()


def unlike(told: Json, own: Json, where: str) -> Iterator[str]:
    """What is not told as it is in `own`; numbers up to rounding."""
    for name, value in own.items():
        numbers = all(type(each) in (int, float) for each in (told.get(name), value))
        if not (math.isclose(told[name], value, rel_tol=1e-6, abs_tol=1e-12) if numbers else told.get(name) == value):
            yield f"{name} is {told.get(name)!r:.60} and should be {value!r:.60}, {where}"


def decided(record: Json, versions: bool) -> Json:
    """The content of a registration or deviation; with the versions that it was made by, as `changed` tells them."""
    found = record["versions"] if versions else {}
    return record["content"] | {f"version of {name}": version for name, version in found.items()}


class Study:
    """The files, and what of them belongs together. heads: files with further heads of the chain. `study` is empty
    where the study has not finished."""

    def __init__(self, folder: Path, heads: list[str]) -> None:
        def load(name: str, needed: bool = True) -> Json:
            found: Json = json.loads((folder / name).read_text()) if needed or (folder / name).is_file() else {}
            return found

        self.folder, self.first, self.items = folder, load("preregistration.json"), load("items.json")
        self.test_read, self.study = load("test_read.json", needed=False), load("study.json", needed=False)
        path = folder / "deviations.jsonl"
        deviations = path.read_text().splitlines() if path.is_file() else []
        self.records: list[Json] = [self.first, *map(json.loads, deviations)]
        self.content: Json = self.records[-1]["content"]
        if self.content["kind"] != "plans":
            raise ValueError("a study of phases; those of plans can be checked")
        self.files = {each.name: each.read_bytes().split(b"\n")[:-1] for each in sorted(folder.glob("runs*.jsonl"))}
        lines = {f"{name}, line {n}": line for name in self.files for n, line in enumerate(self.files[name], 1)}
        self.rows: dict[str, Json] = {where: json.loads(line) for where, line in lines.items()}
        self.places = {canonical(row["key"]): where for where, row in self.rows.items()}
        recipe = digest({name: value for name, value in self.content.items() if name not in NOT_RECIPE})[:16]
        self.recipe = digest([recipe, self.content["inputs"]])[:16]
        self.tuned: dict[Arm, Json] = {(row["arm"], row["budget"]): row for row in self.study.get("tuning", [])}
        self.arms: dict[Arm, Json] = {(row["arm"], row["budget"]): row for row in self.study.get("arms", [])}
        self.delta, self.seeds = self.content["smallest_effect"], self.study.get("seeds", {}).get("reported", 0)
        self.heads = [(each.name, json.loads(each.read_text())) for each in folder.glob("runs*.head.json")]
        self.heads += [(each, json.loads(Path(each).read_text())) for each in heads]
        self.file, self.effect = functools.cache(self.read), functools.cache(self.measure)

    def read(self, name: str) -> tuple[Json, bytes]:
        """Header and data of a safetensors file."""
        data = (self.folder / name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        return json.loads(data[8:end]), data[end:]

    def losses(self, where: str, part: str) -> Array:
        """(items,) of one run."""
        row, items = self.rows[where], len(self.items[part]["tokens"])
        (head, data), own = self.file(row["file"]), self.items[part]
        shape, start = head[part]["shape"], head[part]["data_offsets"][0]
        if (
            head[part]["dtype"] != "F64"
            or shape[1] != items
            or not 0 <= row["row"] < shape[0]
            or len(own["groups"]) != items
        ):
            raise ValueError(f"{row['file']} has no row {row['row']} of {items} {part} items, {where}")
        return np.frombuffer(data, "<f8", items, start + 8 * items * row["row"])

    def run(self, arm: Arm, scale: str, rate: float, seed: int, purpose: str) -> str:
        """The place of a run in the ledger."""
        key = {"arm": RECORDED.get(arm[0], arm[0]), "budget": arm[1], "scheduler": self.content["lr_schedulers"][0]}
        key |= {"state": "keep", "scale": scale, "learning_rate": rate, "purpose": purpose, "recipe": self.recipe}
        text = canonical(key | {"seed": self.content["seed"] * 1000 + seed})
        if text not in self.places:
            raise LookupError(f"no such run in runs*.jsonl: {text}")
        return self.places[text]

    def reported(self, arm: Arm, count: int) -> list[str]:
        """The places of an arm's runs; the base is the same for every seed."""
        if arm[0] == "base":
            return [self.run(arm, "constant", 0.0, 0, "report")] * count
        rest = (self.tuned[arm]["scale"], self.tuned[arm]["learning_rate"])
        return [self.run(arm, *rest, seed, "report") for seed in range(count)]

    def measure(self, pair: tuple[Arm, ...], count: int, part: str) -> Json | None:
        """The effect of the difference of two arms, or of one; None where fewer than two seeds stayed finite."""
        groups = np.unique(self.items[part]["groups"], return_inverse=True)[1]
        member, tokens = np.eye(groups.max() + 1)[groups], np.array(self.items[part]["tokens"], float)
        first, *second = (np.stack([self.losses(place, part) for place in self.reported(arm, count)]) for arm in pair)
        sums = first - second[0] if second else first
        sums = sums[np.isfinite(sums).all(1)] @ member
        return measured(sums, tokens @ member) if len(sums) > 1 else None

    def noise(self, effect: Json) -> float:
        """By what share two bootstraps of an error may differ by chance: five standard deviations."""
        return SIGMAS / 2 * math.sqrt((effect["kurtosis"] - 1) * (1 / self.content["resamples"] + 1 / RESAMPLES))

    def curve(self, arm: Arm, scale: str) -> dict[float, list[float]]:
        """Rate → loss on dev of each tuning seed: the grid, and what it had to grow by."""
        tokens, last = sum(self.items["dev"]["tokens"]), self.content["grid_points"] - 1
        low, high = (self.content["full_" * (arm[0] == "full") + name] for name in ("grid_low", "grid_high"))
        rates, curve, wanted = dict[int, float](), dict[float, list[float]](), list(range(last + 1))
        while wanted:
            for k in wanted:
                rates[k] = rate = float(f"{low * (high / low) ** (k / last):.6g}")
                runs = [self.run(arm, scale, rate, 500 + n, "tune") for n in range(self.content["tuning_seeds"])]
                losses = [float(self.losses(run, "dev").sum()) / tokens for run in runs]
                curve[rate] = [loss if math.isfinite(loss) else math.inf for loss in losses]
            k = min(rates, key=lambda k: (fmean(curve[rates[k]]), k))
            outside = -k if k == min(rates) else k - last
            grows = k in (min(rates), max(rates)) and outside < self.content["grid_growth"]
            wanted = [k - 1 if k == min(rates) else k + 1] if grows else []
        return curve

    def at(self, name: str, budget: str) -> Arm:
        return name, "" if name in ("full", "base") else budget

    def registered(self, name: str, content: Json | None = None) -> list[str]:
        """Arms or contrasts of the registration, named as study.json does."""
        names = {RECORDED.get(arm, arm): arm for arm, _ in self.arms}
        texts = (content or self.content)[name]
        return [" vs ".join(names.get(arm, arm) for arm in text.split(" vs ")) for text in texts]

    def primary(self, content: Json | None = None) -> list[tuple[Arm, Arm]]:
        """The contrasts with a verdict, as registered last, or by this content of a record."""
        content = content or self.content
        chosen = [each for each in content["budgets"] if each in (content.get("primary_budgets") or content["budgets"])]
        pairs = [text.split(" vs ") for text in self.registered("primary", content)]
        return [(self.at(first, budget), self.at(second, budget)) for first, second in pairs for budget in chosen]

    def like(self, row: Json, pair: tuple[Arm, ...], where: str) -> Iterator[str]:
        """A row of study.json against the effect that it tells."""
        own = self.effect(pair, self.seeds, "test")
        if own is None or row.get("low") is None:
            if own is not None or row.get("low") is not None:
                yield f"an effect is told without two finite seeds, or not told with them, {where}"
            return
        names = ("estimate", "degrees", "seeds", "groups", "seed_variance", "item_variance")
        yield from unlike(row, {name: own[name] for name in names if name in row}, where)
        half, expected = (row["high"] - row["low"]) / 2, quantile(1 - ALPHA / 2, own["degrees"]) * own["error"]
        yield from unlike({"middle": (row["high"] + row["low"]) / 2}, {"middle": own["estimate"]}, where)
        if "error" in row:
            yield from unlike(
                {"half-width": half}, {"half-width": quantile(1 - ALPHA / 2, row["degrees"]) * row["error"]}, where
            )
        if abs(half - expected) > max(OF_DELTA * self.delta, self.noise(own) * expected):
            yield f"the half-width is {half:.4g} and should be about {expected:.4g}, {where}"
