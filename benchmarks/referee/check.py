"""Check a study's folder without the code that made it: are the runs as entered, do the verdicts follow from them?

    python benchmarks/referee/check.py FOLDER [HEAD.json ...]

numpy only, nothing of rankwise. One line per check, `ok` or `FAILED: what, where`; exit code 1 where one has failed, 3
for a study that is sound so far and not finished. Only heads kept elsewhere, given here, tell a folder rebuilt whole.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from folder import EQUAL, TOLD, Study, decided, digest, unlike
from intervals import ALPHA, Json, above, holm, judged, quantile, takes
from power import power


def registration(s: Study) -> Iterator[str]:
    own = {name: s.first[name] for name in ("sha256", "time")}
    own["deviations"] = [{name: row[name] for name in TOLD if name in row} for row in s.records[1:]]
    yield from unlike(s.study["registration"], own, "study.json") if s.study else []
    for number, record in enumerate(s.records):
        where = f"deviations.jsonl, line {number}" if number else "preregistration.json"
        yield from unlike(record, {"sha256": digest(record["content"])}, where)
        before = s.records[max(0, number - 1)]
        then, now = (decided(one, "versions" in before and "versions" in record) for one in (before, record))
        own = {k: [then.get(k), now.get(k)] for k in then | now if then.get(k, ...) != now.get(k, ...)}
        if record.get("changed", {}) != own:
            yield f"it changes something else than it tells, {where}"
        if record["time"] < before["time"] or record.get("runs_finished", 0) < before.get("runs_finished", 0):
            yield f"it is earlier than the record before it, {where}"


def chain(s: Study) -> Iterator[str]:
    items = {name: value for name, value in s.items.items() if name != "format"}
    for name, lines in s.files.items():
        before = digest({"file": name, "start": {"registration": s.first["sha256"], "items": digest(items)}})
        for number, line in enumerate(lines, 1):
            if json.loads(line).get("previous") != before:
                yield f"not chained to what is before it, {name}, line {number}"
            before = digest(line)


def head(s: Study) -> Iterator[str]:
    at_test = [("test_read.json", {"file": name, **head}) for name, head in s.test_read.get("heads", {}).items()]
    for where, head in [*s.heads, *at_test]:
        lines, number = s.files.get(head["file"], []), head["lines"]
        if not 0 < number <= len(lines) or digest(lines[number - 1]) != head["sha256"]:
            yield f"line {number} of {head['file']} is not the one on record, {where}"
    if {head["file"] for _, head in s.heads} != set(s.files):
        yield "a head is missing, runs*.head.json"


def losses_as_entered(s: Study) -> Iterator[str]:
    if len(s.places) < len(s.rows):
        yield f"{len(s.rows) - len(s.places)} runs are entered twice, runs*.jsonl"
    for where, row in s.rows.items():
        for part, told in row["items"].items():
            numbers = s.losses(where, part)
            if digest(numbers.tobytes()) != told:
                yield f"the {part} losses are others than were entered, {where} and {row['file']}"
            if any(map(math.isnan, numbers)) != row["diverged"]:
                yield f"diverged is {row['diverged']}, and its {part} losses say otherwise, {where}"


def parameters(s: Study) -> Iterator[str]:
    """Within half a percent of the budget, by the rank maps."""
    sizes = {path: (m + n) * max(1, experts) for path, (m, n, experts) in s.items["sites"].items()}
    whole = sum(m * n * max(1, experts) for m, n, experts in s.items["sites"].values())
    for where, row in s.rows.items():
        (arm, budget), told = (row["key"]["arm"], row["key"]["budget"]), row["parameters"]
        if arm in ("full", "base"):
            continue
        ranks = json.loads((s.folder / "ranks" / f"{row['ranks'][:16]}.json").read_text())
        if digest(ranks) != row["ranks"]:
            yield f"the ranks are others than were entered, ranks/{row['ranks'][:16]}.json and {where}"
        if arm != "compress":
            yield from unlike(row, {"parameters": sum(sizes[path] * rank for path, rank in ranks.items())}, where)
        number = float(budget.removeprefix("uniform:").removesuffix("%"))
        aim = number * sum(sizes.values()) if budget.startswith("uniform:") else int(number)
        aim = int(number / 100 * whole) if budget.endswith("%") else aim
        if abs(told - aim) > EQUAL * aim:
            yield f"{told:,} parameters are not the {aim:,.0f} of {budget}, {where}"


def tuning(s: Study) -> Iterator[str]:
    """The grid as registered and grown as the rule says; the rate and scale with the least loss on dev."""
    if set(s.arms) != {s.at(arm, budget) for arm in s.registered("arms") for budget in s.content["budgets"]}:
        yield "the arms are not those registered, study.json"
    for arm, row in s.tuned.items():
        where, best = f"study.json, tuning of {' '.join(arm)}", {}
        for scale, told in row["curves"].items():
            curve = s.curve(arm, scale)
            for point, (rate, losses) in zip(told, sorted(curve.items()), strict=True):
                own = {index: loss if math.isfinite(loss) else None for index, loss in enumerate(losses)}
                yield from unlike(dict(enumerate(point["losses"])) | point, own | {"learning_rate": rate}, where)
            rate = min(curve, key=lambda rate: (fmean(curve[rate]), rate))
            best[scale] = (fmean(curve[rate]), rate, rate in (min(curve), max(curve)))
        scale = min(best, key=lambda name: best[name][0])
        chosen = {"scale": scale, "learning_rate": best[scale][1]}
        yield from unlike(row, {**chosen, "at_edge": best[scale][2]}, where)
        yield from unlike(s.arms[arm], chosen, f"study.json, arm {' '.join(arm)}")


def stopping(s: Study) -> Iterator[str]:
    """As many seeds as the rule on dev asks for."""
    content, half, told = s.content, s.delta / 2, s.study["seeds"]["stopped"]
    counts = [*range(content["first_seeds"], content["most_seeds"], content["more_seeds"]), content["most_seeds"]]
    reasons = (f"every half-width on dev is at most δ/2 = {half:g}", f"the cap of {content['most_seeds']} seeds")
    if told not in reasons or s.seeds not in counts:
        yield f"{s.seeds} seeds, {told!r:.60}: not by the rule, study.json"
    for count in [each for each in counts if each <= s.seeds]:
        effects = [s.effect(pair, count, "dev") for pair in s.primary()]
        known = [e for e in effects if e is not None]
        widths = [quantile(1 - ALPHA / 2, e["degrees"]) * e["error"] for e in known]
        noise = max(map(s.noise, known), default=0.0)
        sharp = len(known) == len(effects) and max(widths) <= half * (1 + noise)
        wide = len(known) < len(effects) or max(widths) > half * (1 - noise)
        if not (sharp if count == s.seeds and told.startswith("every") else wide):
            yield f"the rule on dev says otherwise at {count} seeds, study.json"


def test_read_once(s: Study) -> Iterator[str]:
    places = [place for arm in s.arms for place in s.reported(arm, s.seeds)]
    keys = sorted(digest(s.rows[place]["key"]) for place in places)
    yield from unlike(s.test_read, {"runs": len(keys), "runs_sha256": digest(keys)}, "test_read.json")
    readings = [row["test_read_again"] for row in s.records if "test_read_again" in row] + [s.test_read["time"]]
    if [s.first["time"], *readings] != sorted([s.first["time"], *readings]):
        yield "test was read before the registration, test_read.json"
    lines = sum(head["lines"] for head in s.test_read["heads"].values())
    for number, row in enumerate(s.records[1:], 1):
        early = row["time"] < readings[0] or (len(readings) == 1 and row["runs_finished"] < lines)
        if early if row["test_was_read"] else row["time"] > readings[0]:
            yield f"test_was_read is {row['test_was_read']}, deviations.jsonl, line {number}"
    for name, number in (place.split(", line ") for place in places):
        if int(number) > s.test_read["heads"][name]["lines"]:
            yield f"a reported run was entered after test was read, {name}, line {number}"


def predicted(s: Study, row: Json, contrast: str, verdict: str, where: str) -> Iterator[str]:
    """What a row tells of the prediction on its contrast."""
    texts = [text.partition(": ")[2] for text in s.content.get("predictions", []) if text.startswith(f"{contrast}: ")]
    word, _, reason = (each.strip() for each in "".join(texts).partition(":"))
    opposite = word.startswith("not ") and verdict != word[4:]
    holds = verdict == word or (None if verdict in ("undecided", "diverged") else opposite)
    own = {"prediction": word, "predicted_because": reason, "as_predicted": holds}
    yield from unlike(row, own if word else dict.fromkeys(own), where)


def contrasts(s: Study) -> Iterator[str]:
    """The primary ones in their order: effects, p-values, words, predictions, δ."""
    yield from unlike(s.study, {name: s.content[name] for name in ("question", "smallest_effect")}, "study.json")
    pairs, rows = s.primary(), s.study["verdicts"]
    if [(row["first"], row["second"]) for row in rows] != [(one[0], other[0]) for one, other in pairs]:
        yield "the contrasts are not those registered, in their order, study.json"
    wheres = [f"study.json, {row['contrast']} at {row['budget']}" for row in rows]
    for row, pair, where in zip(rows, pairs, wheres, strict=True):
        yield from unlike(row, {"contrast": " vs ".join(arm for arm, _ in pair)}, where)
        yield from s.like(row, pair, where)
        yield from predicted(s, row, row["contrast"], row["verdict"], where)
    told = [row for row in rows if row["verdict"] != "diverged"]
    own = [s.effect(pair, s.seeds, "test") for pair, row in zip(pairs, rows, strict=True) if row in told]
    around = [[{**e, "error": e["error"] * (1 + sign * s.noise(e))} for e in own if e] for sign in (-1, 0, 1)]
    words = [[each["verdict"] for each in judged(effects, s.delta)] for effects in around]
    for number, (row, expected) in enumerate(zip(told, judged(told, s.delta), strict=True)):
        where = f"study.json, {row['contrast']} at {row['budget']}"
        yield from unlike(row, expected, where)
        if row["verdict"] not in (known := {each[number] for each in words}):
            yield f"{row['verdict']}, and by a bootstrap of its own {' or '.join(known)}, {where}"
        more, level = row["more_seeds"], 1 - ALPHA / len(told) / 2
        if row["verdict"] == "undecided" and not takes(row, s.delta, level, more):
            yield f"{more} more seeds are not what it takes, {where}"


def other_rows(s: Study) -> Iterator[str]:
    """Arms, exploratory differences, assay and the sizes of the data."""
    for arm, row in s.arms.items():
        where = f"study.json, arm {' '.join(arm)}"
        yield from s.like({**row, "estimate": row["loss"]}, (arm,), where)
        runs = [s.rows[place] for place in s.reported(arm, s.seeds)]
        means = {"parameters": round(fmean(run["parameters"] for run in runs)), "steps": runs[0]["steps"]}
        yield from unlike(row, means | {"diverged": sum(run["diverged"] for run in runs)}, where)
    told = set()
    for row in s.study["differences"]:
        pair = (s.at(row["first"], row["budget"]), s.at(row["second"], row["budget"]))
        where = f"study.json, difference {row['first']} − {row['second']} at {row['budget']}"
        yield from [*s.like(row, pair, where), *unlike(row, {"primary": pair in s.primary()}, where)]
        told.add(pair)
    for row in s.study["assay"]:
        where = f"study.json, assay of {row['arm']} at {row['budget']}"
        for other, effect in row["against"].items():
            yield from s.like(effect, ((row["arm"], row["budget"]), (other, row["budget"])), where)
            worse = "worse" if above(effect, effect["estimate"]) < ALPHA else "undecided"
            yield from predicted(s, row.get("predictions", {}).get(other, {}), f"{row['arm']} vs {other}", worse, where)
        p_values = holm([above(effect, effect["estimate"]) for effect in row["against"].values()])
        yield from unlike(row, {"works": min(p_values) < ALPHA}, where)
        told.add(("assay", (row["arm"], row["budget"])))
    for arm in s.arms:
        pair = (arm, ("uniform", arm[1]))
        if pair[1] in s.arms and arm[0] != "uniform" and s.effect(pair, s.seeds, "test"):
            missing = {pair, ("assay", arm)} if arm[0].startswith("inverted") else {pair}
            yield from [f"{' '.join(arm)} against uniform is missing, study.json"] if missing - told else []
    for part, own in ((part, s.items[part]) for part in ("dev", "test")):
        sizes = {"items": len(own["ids"]), "groups": len(set(own["groups"])), "tokens": sum(own["tokens"])}
        yield from unlike(s.study["data"][part], sizes, f"study.json, data of {part}")


CHECKS = {
    "the registration and its deviations are as they were made": registration,
    "the power follows from the deviations that were assumed": power,
    "every run is chained to the one before it": chain,
    "the chain ends as on record": head,
    "losses per item are as they were entered": losses_as_entered,
    "every arm has its budget's parameters": parameters,
    "tuning chose the rates that it tells": tuning,
    "seeds were added as registered": stopping,
    "test was read once, after the registration": test_read_once,
    "the verdicts follow from the losses": contrasts,
    "all other numbers follow from the losses": other_rows,
}


def main(folder: str, *heads: str) -> int:
    failed = 0
    try:
        study = Study(Path(folder), list(heads))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"FAILED: no ledger that can be read: {error!r}, {folder}")
        return 1
    for name, check in CHECKS.items():
        if not study.study and check in (tuning, stopping, test_read_once, contrasts, other_rows):
            print(f"not yet {name}")
            continue
        try:
            wrong = list(check(study))
        except (LookupError, TypeError, ValueError, ArithmeticError, OSError, AttributeError) as error:
            wrong = [f"{type(error).__name__}: {error}"]
        failed += bool(wrong)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        print(f"FAILED: {name}: {wrong[0]}{more}" if wrong else f"ok      {name}")
    return 1 if failed else 0 if study.study else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 1 else __doc__)
