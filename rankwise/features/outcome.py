"""What `rankwise features train` leaves: the best network on the test matrices, the picture, the last words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.features.dataset import SPLIT, FeatureSplit
from rankwise.features.history import HISTORY, Row, best_row
from rankwise.features.job import LOG, PLOT, RESULTS, FactorJob, RunLog
from rankwise.features.measures import OF_REFINED, Closeness, excess_error, measure, network, optimum
from rankwise.features.nets.files import SETTINGS, WEIGHTS, load_factorizer
from rankwise.features.objective import refuse_not_finite
from rankwise.features.plots import plot_factor_training
from rankwise.features.rank_masks import TABLE
from rankwise.features.trained import cached
from rankwise.files.atomic import write_json
from rankwise.files.run_folder import Record
from rankwise.options.features import FactorTrainConfig
from rankwise.page.canvas import drawable
from rankwise.page.text import command_line, duration, percent
from rankwise.train.gradient_table import TRAINING_LOG

OF_PRODUCT = ("mse", "relative_error", "explained_energy", "cosine")
EXACT = 1e-6  # relative error of the optimum below which "how far above it" means nothing


def finish(
    job: FactorJob, split: FeatureSplit, rows: Sequence[Row], record: Record, log: RunLog, seconds: float
) -> None:
    """Test the best network, enter the run in its manifest, and say in a few lines what came out and what is next."""
    folder, best = job.folder, best_row(rows)
    results = tested(job, split.test) | {"best_epoch": best["epoch"]}
    write_json(folder / RESULTS, results)
    drawn = plotted(rows, folder, best["epoch"])
    names = [WEIGHTS, SETTINGS, HISTORY, RESULTS, SPLIT, TRAINING_LOG, TABLE, *([PLOT] if drawn else [])]
    record.outputs |= {name: folder / name for name in names if (folder / name).is_file()}
    record.facts |= {
        "arch": results["arch"],
        "epochs": rows[-1]["epoch"],
        "best_epoch": best["epoch"],
        "parameters": results["parameters"],
        "training_seconds": round(seconds, 2),
    }
    summary = {"epochs": rows[-1]["epoch"], "best": best, "test": results, "seconds": round(seconds, 2)}
    log.summary(summary | {"run_folder": str(folder), "features": job.config.features})
    for line in last_words(folder, rows, results, seconds):
        log.line(line)
    if log.folder is not None:
        print(f"log in {log.folder / LOG}")
    print(f"next: {next_command(job.config)}")


def next_command(config: FactorTrainConfig) -> str:
    return command_line("features", "compare", results_dir=config.results_dir)


def tested(job: FactorJob, places: tuple[int, ...]) -> dict[str, Any]:
    """Means over the test matrices: of the best network's product of rank r, and apart of the refined output.

    `excess_error` is against the truncated SVD of the rank that was asked for, as `features compare` has it, and
    `excess_error_at_effective_rank` against that of the channels left; null where that SVD is exact.
    """
    device = job.arguments.device
    net = load_factorizer(job.folder).to(device)

    def batches() -> Iterator[Tensor]:
        for features in cached(job.cache, places):
            yield features.to(device)

    best = optimum(batches)
    product, *refined = measure([network(net)], batches, best)
    refuse_not_finite(product.values["mse"][:, None].numpy(), [job.cache.ids[place] for place in places], "test")
    effective = net.settings.rank if net.rank_mask is None else int(net.rank_mask.sum())
    at_rank = best[:, net.settings.rank - 1]
    return {
        "arch": net.settings.arch,
        "rank": net.settings.rank,
        "effective_rank": effective,
        "features": job.cache.fingerprint,
        "images": len(places),
        "parameters": sum(one.numel() for one in net.parameters()),
        **means_of(product, OF_PRODUCT),
        "excess_error": excess_over(product, at_rank),
        "excess_error_at_effective_rank": excess_over(product, best[:, effective - 1]),
        "svd_relative_error": float(at_rank.mean()),
        "refined": means_of(refined[0], OF_REFINED) if refined else None,
    }


def excess_over(row: Closeness, best: Tensor) -> float | None:
    """Mean of how far the relative errors (n,) lie above the optimum's."""
    if float(best.min()) <= EXACT:
        return None
    return float(excess_error(row.values["relative_error"], best).mean())


def means_of(row: Closeness, names: Sequence[str]) -> dict[str, float]:
    return {name: float(row.values[name].mean()) for name in names}


def plotted(rows: Sequence[Row], folder: Path, best_epoch: int) -> bool:
    """Draw the curves; without matplotlib a note says why they are missing."""
    if not drawable(f"{PLOT} is"):
        return False
    plot_factor_training(rows, folder / PLOT, best_epoch)
    return True


def last_words(folder: Path, rows: Sequence[Row], results: dict[str, Any], seconds: float) -> list[str]:
    best, excess = best_row(rows), results["excess_error"]
    trained = f"features train: {results['arch']} at epoch {rows[-1]['epoch']} after {duration(seconds)}"
    against = "which is exact" if excess is None else f"{percent(excess)} above it"
    acts = "" if best["effective_rank"] == results["rank"] else f" ({best['effective_rank']} channels act)"
    return [
        f"{trained}; best epoch {best['epoch']}, validation MSE {best['val_mse']:.5g}, rank {results['rank']}{acts}",
        f"test: {results['images']} images, relative error {results['relative_error']:.4f}, explained energy "
        f"{results['explained_energy']:.4f}; truncated SVD of rank {results['rank']}: "
        f"{results['svd_relative_error']:.4f}, {against}",
        f"network in {folder / WEIGHTS}, history in {folder / HISTORY}, results in {folder / RESULTS}",
    ]
