"""What depth costs: the pass that makes the maps, then training steps with cached maps against steps without depth.

    python benchmarks/depth.py [--shape small] [--out benchmarks/results]

A random Qwen2.5-VL and an estimator of Depth Anything V2 Small's own sizes (random weights, the documented input of 518
pixels). With maps in the cache an epoch with depth should take at most 3 % longer than one without. Both sides take
turns, block by block, in one run.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config
from vision import RANK, collator, place, step_seconds
from vision_workload import SHAPES, model, renderer, rows_of, write_rows
from workload import command, machine, spread, with_lora

from rankwise.data.depth.prepare import prepared
from rankwise.data.render import Renderer
from rankwise.models.depth.encoder import DepthSettings, attach_depth
from rankwise.options.sections import DepthUseSection
from rankwise.train.trainer import RankwiseTrainer


def estimator(folder: Path) -> Path:
    """Depth Anything V2 Small in size; random weights, with a head that answers above 0."""
    backbone = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        out_indices=[3, 6, 9, 12],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    torch.manual_seed(0)
    made = DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=backbone,
            reassemble_hidden_size=384,
            neck_hidden_sizes=[48, 96, 192, 384],
            fusion_hidden_size=64,
            head_hidden_size=32,
        )
    )
    with torch.no_grad():
        made.head.conv3.bias.fill_(5.0)
    made.save_pretrained(folder)
    return folder


def with_maps(options: argparse.Namespace, path: Path, folder: Path) -> tuple[DepthSettings, Renderer, float, float]:
    """A renderer that gives depth, and the seconds of making all maps and of finding all of them made."""
    plain = renderer(path.parent, options.max_pixels)
    assert plain.sight is not None
    settings = DepthSettings(estimator=str(estimator(folder / "estimator")), input_size=options.input_size)
    examples, (device, _) = rows_of(path, plain).examples, place()
    use, seconds = DepthUseSection(depth_cache=str(folder / "cache")), []
    for _ in range(2):
        started = time.perf_counter()
        settings, sight = prepared(settings, use, plain.sight, examples, seed=1, device=device)
        seconds.append(time.perf_counter() - started)
    return settings, renderer(path.parent, options.max_pixels, sight.depth), seconds[0], seconds[1]


def epochs(options: argparse.Namespace, path: Path, settings: DepthSettings, deep: Renderer) -> list[float]:
    """Time of a step with cached depth over that of a step without, for each round."""
    device, dtype = place()
    plain = renderer(path.parent, options.max_pixels)
    seeing = model(options.shape, device, dtype)
    attached = attach_depth(model(options.shape, device, dtype), settings).to(device)
    sides: dict[str, Any] = {
        "plain": (with_lora(seeing, RANK), rows_of(path, plain), collator(plain)),
        "depth": (with_lora(attached, RANK), rows_of(path, deep), collator(deep)),
    }
    how = {"steps": options.steps, "batch_size": options.batch_size, "dataloader_num_workers": options.workers}
    ratios = []
    for number in range(options.rounds + 1):
        order = list(sides)
        random.Random(number).shuffle(order)
        times = {name: statistics.median(step_seconds(RankwiseTrainer, *sides[name], **how)) for name in order}
        if number:  # the first round warms up
            ratios.append(times["depth"] / times["plain"])
            print(f"round {number}: {ratios[-1]:.3f}, steps of {times['plain']:.2f} s", flush=True)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of a block; the first is not counted")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--sides", type=int, nargs=2, default=(120, 360), help="pixels of the pictures' sides")
    parser.add_argument("--max_pixels", type=int, default=512 * 512)
    parser.add_argument("--input_size", type=int, default=518, help="of the estimator")
    parser.add_argument("--answer_words", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        path = write_rows(folder / "images", options.images, tuple(options.sides), options.answer_words)
        settings, deep, making, finding = with_maps(options, path, folder)
        ratios = epochs(options, path, settings, deep)
    lines = [
        "# What depth costs",
        "",
        f"{date.today()} · {machine()} · random Qwen2.5-VL, shape `{options.shape}`, batch {options.batch_size}, "
        f"estimator of Depth Anything V2 Small's sizes at {options.input_size} pixels · `{command()}`",
        "",
        f"A step with cached depth takes **{spread(ratios)}** times a step without, over {options.rounds} rounds "
        "(goal: at most 1.03).",
        "",
        f"Making {options.images} maps, once: {making:.1f} s ({making / options.images:.2f} s an image, loading the "
        f"estimator included). Finding them made: {finding:.1f} s.",
    ]
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "depth.md").write_text("\n".join(lines) + "\n")
    raw = {"machine": machine(), "ratios": ratios, "making_seconds": making, "finding_seconds": finding}
    (options.out / "depth.json").write_text(json.dumps(raw, indent=1))


if __name__ == "__main__":
    main()
