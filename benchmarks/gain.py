"""Gain kept by energy plans and by loss-share plans against uniform and shuffled ranks, at two budgets.

    python benchmarks/gain.py --deltas runs/svd_ranks/finetune --data e2e_nlg [--out benchmarks/results]

The deltas are those of the finetune stage of `rankwise run svd_ranks` (the README's command line).
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from datetime import date
from pathlib import Path

from rankwise.files.atomic import read_object
from rankwise.options.commands import RanksConfig
from rankwise.options.sections import DataSection, SpectrumSection
from rankwise.ranks import command as ranks

HEADER = [
    "| ranks from | budget | parameters | plan | uniform | 8 shuffles | plan − uniform [95 %] |",
    "|---|---|---:|---:|---:|---:|---:|",
]


def row(config: RanksConfig, budget: str, metric: str, out: Path) -> str:
    spectrum = replace(SpectrumSection(), budget=budget, min_rank=1)
    ranks.run(replace(config, spectrum=spectrum, metric=metric, output_dir=str(out)))
    gain = read_object(out / "analysis_outputs" / "svd" / "raw_data" / "gain.json")
    arms = {arm["name"]: arm for arm in gain["arms"]}
    shuffled = [arm["kept"] for name, arm in arms.items() if name.startswith("shuffled")]
    plan, uniform = arms["plan"]["kept"], arms["uniform"]["kept"]
    low, high = gain["margin"]
    return (
        f"| {'energy' if metric == 'weight' else 'loss shares'} | {budget} | {arms['plan']['parameters']:,} | "
        f"{plan:.1%} | {uniform:.1%} | {min(shuffled):.1%} to {max(shuffled):.1%} | "
        f"{100 * (plan - uniform):+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--deltas", required=True, help="a `rankwise finetune` folder")
    parser.add_argument("--data", required=True, help="folder of the official E2E NLG files")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    config = RanksConfig(
        deltas=options.deltas,
        data=DataSection(task="e2e_nlg", data_path=options.data),
        gain=options.data,
        num_samples=128,
        no_plots=True,
    )
    with tempfile.TemporaryDirectory() as work:
        rows = [
            row(config, f"uniform:{rank}", metric, Path(work) / f"{rank}{metric}")
            for rank in (4, 8)
            for metric in ("weight", "loss")
        ]
    title = f"# Gain kept on held-out text\n\n{date.today()} · `python benchmarks/gain.py`, 128 development items\n\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gain.md").write_text(title + "\n".join([*HEADER, *rows]) + "\n")
    print("\n".join([*HEADER, *rows]))


if __name__ == "__main__":
    main()
