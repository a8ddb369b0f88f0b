"""The referee's study of one model on a GPU: at most eight minutes a call, resumed by its ledger, checked at the end.

    benchmarks/referee/gpu.sh MODEL --data trainset.csv --test devset.csv [--work FOLDER] [--minutes 24] [--tiny] […]

    model       a folder of pieces is joined first
    speed.json  in the first 90 s: 1, 4 and 16 arms together, against one at a time and against the Trainer
    seeds.json  as many seeds as fit into --minutes at that speed, at most 8; arms are never cut. Fixed before the
                registration, then kept
    study/      `rankwise study referee`: base in bfloat16, adapters in float32; goes on where it was stopped
    pieces/     the ledger, registration and results in pieces of at most 40 MB; a call on another machine that has them
                and no study goes on from them. Without the probe, which is trained again; its ranks are kept

The base computes in bfloat16 on a GPU and in float32 on a CPU (`--tiny`), adapters in float32 on both.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import check
import pieces
import torch
import yaml
from arms import by_the_trainer, measured, prepared, together
from workload import machine

from rankwise import cli
from rankwise.models.load import load_model

CALL, SPEED = 430, 90  # seconds of a call, of which the first ones measure the speed
SEEDS, LEAST, GOAL = 8, 2, 5.0
INTERRUPTED = 130  # exit code of a command that was
ERROR = 2  # exit code where the study failed, whose own codes mean other things (3: its data)
SHARE = 0.7  # of the minutes that are planned for; the rest is loading, the probe, scoring
STUDY = cli.RECIPES / "studies" / "referee.yaml"
TINY = {
    "budgets": "uniform:5",
    "steps": 2,
    "dev_size": 5,
    "test_size": 6,
    "train_size": 20,
    "probe_rows": 16,
    "probe_steps": 2,
}
LEFT_OUT = ("study/probe/", "study/plots/")


def speed(options: argparse.Namespace, model: str, until: float) -> dict[str, Any]:
    """Seconds per arm: by the Trainer, alone by the code of the batches, and in batches of 1, 4 and 16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_model(model, torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    settings = {"data": str(options.data), "task": "e2e_nlg", "model": model, "rank": 4}
    settings |= {"rows": 64, "steps": 2 if options.tiny else 10, "batch_size": 4}
    work = prepared(argparse.Namespace(**settings), base, 0)
    arms = [work.arm(seed) for seed in range(max(options.counts))]
    by_the_trainer(work, arms[0])  # the first call of everything is slow
    together(work, arms[:1])
    found: dict[str, Any] = {"machine": machine(), "steps": settings["steps"], "rows": 4, "tokens": work.tokens}
    found["trainer"] = measured(lambda: by_the_trainer(work, arms[0]), base.device)[0].seconds
    for count in options.counts:
        if time.monotonic() > until:
            print(f"{count} arms together: not measured, the {SPEED} s are over")
            continue
        cost = measured(lambda count=count: together(work, arms[:count]), base.device)[0]
        found[str(count)] = cost.seconds / count
        against = f"{found['1'] / found[str(count)]:.1f} × one at a time, {found['trainer'] / found[str(count)]:.1f} ×"
        print(f"{count} arms together: {found[str(count)]:.3f} s an arm, {against} the Trainer")
    reached = found["trainer"] / found[str(options.counts[-1])] if str(options.counts[-1]) in found else None
    if reached is not None:
        print(f"goal of {GOAL:g} × the Trainer at {options.counts[-1]} arms: {'met' if reached >= GOAL else 'not met'}")
    return found | {"met": reached is not None and reached >= GOAL}


def affordable(options: argparse.Namespace, study: dict[str, Any], found: dict[str, Any]) -> int:
    """Seeds that fit into the minutes. Arms are never cut: SystemExit where not even two seeds fit."""
    own = [found[str(count)] for count in options.counts if str(count) in found] or [found["trainer"]]
    run = min(own) * study["steps"] / found["steps"]
    tuning = len(study["arms"]) * study["grid_points"] * study["tuning_seeds"]
    fit = int((SHARE * 60 * options.minutes / run - tuning) / len(study["arms"]))
    if fit < LEAST:
        needed = (tuning + LEAST * len(study["arms"])) * run / SHARE / 60
        sys.exit(f"{fit} seeds fit into {options.minutes:g} minutes, {LEAST} are needed: --minutes {needed:.0f}")
    seeds = min(SEEDS, fit)
    print(f"{seeds} of {SEEDS} seeds at {run:.2f} s a run, {tuning + seeds * len(study['arms'])} runs in all")
    return seeds


def kept(path: Path, make: Any) -> Any:
    """What a file holds, or what is made and kept in it."""
    if not path.is_file():
        path.write_text(json.dumps(make(), indent=1))
    return json.loads(path.read_text())


def go_on(options: argparse.Namespace, model: str, seeds: int, left: float) -> int:
    """The study as far as the seconds go; its exit code, or INTERRUPTED where they were not enough."""
    out = options.work / "study"
    words = ["study", "referee", "--model_name", model, "--data_path", str(options.data), "-o", str(out)]
    words += ["--test_path", str(options.test)] if options.test else []
    words += ["--dtype", "bfloat16" if torch.cuda.is_available() else "float32"]
    words += ["--first_seeds", str(seeds), "--most_seeds", str(seeds)]
    words += [word for name, value in TINY.items() for word in (f"--{name}", str(value))] if options.tiny else []
    words += options.more
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, left))
    try:
        return cli.main(words)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="file of training rows")
    parser.add_argument("--test", type=Path, help="file of test rows [groups held out of the training rows]")
    parser.add_argument("--work", type=Path, default=Path("runs/referee"))
    parser.add_argument("--minutes", type=float, default=24.0, help="of the GPU, in all calls together")
    parser.add_argument("--counts", default="1,4,16", help="arms trained together, for the speed")
    parser.add_argument("--tiny", action="store_true", help="a study in small, on a CPU too")
    options, options.more = parser.parse_known_args(argv)
    options.counts = [int(count) for count in options.counts.split(",")]
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU here; --tiny runs the same in small", file=sys.stderr)
        return 2
    work, packed = options.work, options.work / "pieces"
    work.mkdir(parents=True, exist_ok=True)
    model = options.model
    if pieces.are_here(Path(model)):
        if not (work / "model").is_dir():
            pieces.join(Path(model), work / "model")
        model = str(work / "model")
    if pieces.are_here(packed) and not (work / "study").is_dir():
        pieces.join(packed, work)
    study = yaml.safe_load(STUDY.read_text()) | (TINY if options.tiny else {})
    found = kept(work / "speed.json", lambda: speed(options, model, started + SPEED))
    gc.collect()
    torch.cuda.empty_cache()
    seeds = kept(work / "seeds.json", lambda: affordable(options, study, found))
    code = go_on(options, model, seeds, CALL - (time.monotonic() - started))
    pieces.split(work, packed, lambda name: not name.startswith((*LEFT_OUT, "pieces/", "model/")))
    if code == INTERRUPTED:
        runs = sum(len(path.read_bytes().splitlines()) for path in (work / "study").glob("runs*.jsonl"))
        print(f"{runs} runs are done; call again to go on")
        return 3
    return ERROR if code else check.main(str(work / "study"))


if __name__ == "__main__":
    sys.exit(main())
