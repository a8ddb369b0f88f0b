"""Does the vision demo's model still answer, with factors in place of its features?

    python benchmarks/features_downstream.py --demo runs/demo-vision [--rank 4] [--epochs 10] [--out benchmarks/results]

Features of the demo's training pictures are captured, every network is trained on them, and the held-out questions are
asked with each method's approximation (`rankwise features downstream`). `rankwise demo --vision` makes the demo.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from workload import machine

from rankwise.data.sources.load import load
from rankwise.features import capture, downstream, train
from rankwise.features.nets import ARCHITECTURES
from rankwise.options.features import CaptureConfig, DownstreamConfig, FactorTrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", required=True)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    demo, out = Path(options.demo), Path(options.out)
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        cache = captured(demo, Path(scratch))
        for arch in ARCHITECTURES:
            train.run(training(arch, cache, results, options))
        downstream.run(
            DownstreamConfig(
                model_name=str(demo / "train"),
                data_path=str(demo / "data" / "heldout.json"),
                results_dir=str(results),
                ranks=[1, 2, 4, 8, 16],
            )
        )
        shutil.copy(results / "downstream.png", Path("docs/images/features_downstream.png"))
        for suffix, first in ((".json", ""), (".md", f"{machine()}; {options.epochs} epochs.\n\n")):
            told = (results / f"downstream{suffix}").read_text(encoding="utf-8")
            told = told.replace(str(demo), "demo").replace(f"{scratch}/", "")
            (out / f"features_downstream{suffix}").write_text(first + told, encoding="utf-8")


def captured(demo: Path, scratch: Path) -> Path:
    """A cache of the pictures of the training questions alone."""
    pictures = scratch / "pictures"
    pictures.mkdir()
    for example in load("conversations", demo / "data" / "train.json"):
        for image in example.images:
            shutil.copy(demo / "data" / image, pictures / Path(image).name)
    capture.run(CaptureConfig(model_name=str(demo / "base"), images=str(pictures), output_dir=str(scratch / "cache")))
    return scratch / "cache"


def training(arch: str, cache: Path, results: Path, options: argparse.Namespace) -> FactorTrainConfig:
    return FactorTrainConfig(
        arch=arch,
        features=str(cache),
        rank=options.rank,
        epochs=options.epochs,
        lr=1e-3,
        batch_size=32,
        results_dir=str(results),
        log_dir=str(results / "log"),
    )


if __name__ == "__main__":
    main()
