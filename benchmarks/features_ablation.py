"""What each part of `Subspace` is worth: its start, its shift, its steps, and how its bases are made.

    python benchmarks/features_ablation.py --features CACHE [--ood CACHE] [--epochs 20] [--out benchmarks/results]
    python benchmarks/features_ablation.py --model dinov2-small --image_size 224 --images coco/ --ood_images celeba/ \\
        --rank 32 --epochs 10 --no_times --name features_ablation_dinov2

Every row is the network with one thing other than the default, trained on the training split of CACHE (AdamW, 1e-4,
batch 8) where it says so, and scored on the test split. Times are per matrix, batch 64, all rows by turns in one run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from features import add_model, batches, caches, interval, scored
from torch import Tensor
from workload import machine

from rankwise.features.approximation import normalised
from rankwise.features.cache import FeatureCache
from rankwise.features.dataset import FeatureSplit, split_of
from rankwise.features.measures import GRAM, Method, baselines, network, timings
from rankwise.features.nets.base import FactorizerSettings
from rankwise.features.nets.subspace import Subspace

BATCH = 8


@dataclass(frozen=True)
class Variant:
    """prepared: the start begins near the mean subspace of the training matrices. shift: None, the learned one."""

    name: str
    steps: int = 1
    prepared: bool = False
    trained: bool = True
    shift: float | None = None
    householder: bool = False


VARIANTS = (
    Variant("as it is"),
    Variant("not trained", trained=False),
    Variant("start near the mean subspace", prepared=True),
    Variant("the same, not trained", prepared=True, trained=False),
    Variant("no shift", shift=0.0),
    Variant("shift 0.5", shift=0.5),
    Variant("shift 0.8", shift=0.8),
    Variant("shift 1", shift=1.0),
    Variant("no step", steps=0),
    Variant("2 steps", steps=2),
    Variant("3 steps", steps=3),
    Variant("Householder's QR only", householder=True),
)


class Householder(Subspace):
    """Every basis by LAPACK's QR, as in training."""

    def basis(self, gram: Tensor) -> Tensor:
        self.train()
        found = super().basis(gram)
        self.eval()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features")
    parser.add_argument("--ood")
    add_model(parser)
    parser.add_argument("--name", default="features_ablation")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    if not (options.features or options.model):
        parser.error("--features CACHE or --model MODEL --images FOLDER")
    with tempfile.TemporaryDirectory() as scratch:
        report = ablation(*caches(options, Path(scratch)), options)
    out = Path(options.out)
    (out / f"{options.name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / f"{options.name}.md").write_text(text_of(report), encoding="utf-8")
    print(text_of(report))


def ablation(cache: FeatureCache, ood: FeatureCache | None, options: argparse.Namespace) -> dict[str, Any]:
    split = split_of(cache, 42)
    nets = {variant.name: made(variant, cache, split, options) for variant in VARIANTS}
    return measured(nets, cache, split, ood, options)


def made(variant: Variant, cache: FeatureCache, split: FeatureSplit, options: argparse.Namespace) -> Subspace:
    torch.manual_seed(0)
    settings = FactorizerSettings("Subspace", cache.tokens, cache.channels, options.rank)
    net = (Householder if variant.householder else Subspace)(settings, variant.steps)
    generator = torch.Generator().manual_seed(0)
    if variant.prepared:
        with torch.no_grad():
            net.start.add_(0.01 * cache.tokens**0.5 * mean_subspace(cache, split, options.rank))
    if variant.shift is not None:
        with torch.no_grad():
            net.shifts.copy_(torch.tensor(variant.shift).clamp(1e-9, 1 - 1e-7).logit() / 100)
        net.shifts.requires_grad_(False)
    if variant.trained:
        trained(net, cache, split, options.epochs, generator)
    return net.eval()


def mean_subspace(cache: FeatureCache, split: FeatureSplit, rank: int) -> Tensor:
    """(T, r): leading eigenvectors of the mean Gram matrix of the training matrices."""
    mean = torch.stack([(batch @ batch.mT).sum(0) for batch in batches(cache, split.train)()]).sum(0)
    return torch.linalg.eigh(mean).eigenvectors[:, -rank:]


def trained(net: Subspace, cache: FeatureCache, split: FeatureSplit, epochs: int, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW([one for one in net.parameters() if one.requires_grad], lr=1e-4)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(split.train), generator=generator).tolist()
        for at in range(0, len(order), BATCH):
            places = [split.train[index] for index in order[at : at + BATCH]]
            features = normalised(torch.stack([cache[place] for place in places]))
            loss = (net(features).factors.product() - features).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def measured(
    nets: dict[str, Subspace],
    cache: FeatureCache,
    split: FeatureSplit,
    ood: FeatureCache | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    methods = [network(net, name) for name, net in nets.items()]
    gram = next(one for one in baselines(options.rank, torch.zeros(options.rank, cache.channels)) if one.name == GRAM)
    batch = torch.cat(list(batches(cache, range(min(64, len(cache))))()))
    times = {} if options.no_times else timings([gram, *methods], batch, options.repeats)
    errors = {"test images": scored(methods, cache, split.test)}
    if ood is not None:
        errors["another source"] = scored(methods, ood, range(len(ood)))
    rows = [describe(method, nets[method.name], times, errors) for method in methods]
    facts = {"tokens": cache.tokens, "channels": cache.channels, "rank": options.rank, "epochs": options.epochs}
    model = Path(cache.model.name).name if cache.model else None
    machines = {"machine": machine(), "date": str(date.today()), "source": Path(str(cache.source)).name}
    return {**machines, "model": model, **facts, "rows": rows}


def describe(method: Method, net: Subspace, times: dict[str, Any], errors: dict[str, Any]) -> dict[str, Any]:
    return {
        "variant": method.name,
        "shifts": [round(float(share), 3) for share in (100 * net.shifts).sigmoid()],
        **({"milliseconds": 1e3 * times[method.name].seconds} if times else {}),
        **({"times_gram": times[GRAM].seconds / times[method.name].seconds} if times else {}),
        **{where: found[method.name] for where, found in errors.items()},
    }


def text_of(report: dict[str, Any]) -> str:
    sources = [key for key in ("test images", "another source") if key in report["rows"][0]]
    timed = "milliseconds" in report["rows"][0]
    head = ["Subspace", "learned shift", *(["ms", "× Gram"] if timed else [])]
    head += [f"excess error, {key}" for key in sources]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in report["rows"]:
        shifts = ", ".join(f"{share:.2f}" for share in row["shifts"])
        cells = [row["variant"], shifts]
        cells += [f"{row['milliseconds']:.2f}", f"{row['times_gram']:.2f}"] if timed else []
        lines.append("| " + " | ".join([*cells, *(interval(row[key]["excess_error"]) for key in sources)]) + " |")
    shape = f"{report['tokens']} × {report['channels']}, rank {report['rank']}, features of {report['model']}"
    return "\n".join([f"{shape}, {report['epochs']} epochs; {report['machine']}, {report['date']}.", "", *lines, ""])


if __name__ == "__main__":
    main()
