"""How low-rank are real changes of weights? Spectra of full fine-tuning, and the gain that survives at rank r.

    python benchmarks/how_low_rank.py --model SmolLM2-135M-Instruct --data e2e_nlg --work FOLDER
    python benchmarks/how_low_rank.py --model DINOv2-S --data tiny_coco --work FOLDER
    python benchmarks/how_low_rank.py --stage table --work FOLDER [--out benchmarks/results] [--image docs/images]

All linear weights of a tower are trained in full in float32, everything else frozen, at a constant rate: AdamW and SGD
with momentum, two probes on disjoint rows, measured at three lengths of one run. A text model learns E2E; a vision
tower, with a linear head, the supercategory of objects cut out of COCO pictures. Rates: a grid of factor √10, judged
after the middle length on rows that nothing else uses, continued while the best is at an edge. At every length: all
singular values of every site's delta, those of permuted entries for every eleventh, and held-out loss with every delta
truncated to rank r. Every measurement is entered in a ledger below --work; the same command goes on. One thread.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from how_low_rank_table import LENGTHS, RANKS, RATIO, best_rate, write_results
from PIL import Image
from torch import Tensor, nn
from transformers import Dinov2Model, PreTrainedModel

from rankwise.core.measure import exact_spectrum, from_difference, wide_side
from rankwise.core.site import Site
from rankwise.data.example import one_per_prompt
from rankwise.data.renderer_for import renderer_for
from rankwise.data.sources.load import load
from rankwise.evaluate.likelihood import batch_losses, training_batches
from rankwise.files.ledger import Ledger
from rankwise.models.load import load_config, load_model
from rankwise.models.sites import model_sites
from rankwise.options.sections import DataSection, ModelSection
from rankwise.ranks.gain import moved

START = {"AdamW": 1e-4, "SGD": 0.1}  # middle of the first three rates
WIDER = 3  # further rates at an edge
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.0),
    "SGD": partial(torch.optim.SGD, momentum=0.9),
}
CLIP, HEAD_RATE = 1.0, 1e-3
NULL_EVERY = 11  # no multiple of the sites per layer, so that every projection has its turn
SEED = 42
SIDE, SMALLEST, FEWEST = 112, 20, 10  # pixels of a picture, of an object's shorter side; pictures of a label
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARES = {"probe 0": 0.3, "probe 1": 0.3, "choose": 0.12, "report": 0.28}  # of the pictures, by image
Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Tower:
    """What is trained, and on what. `score`: of a batch, per item, `loss` (summed), `count` (tokens or pictures) and,
    of pictures, `right`. `training`: probe, steps → batches. `held`: "choose" and "report"."""

    model: PreTrainedModel
    score: Callable[[Batch], dict[str, Tensor]]
    training: Callable[[int, int], Sequence[Batch]]
    held: Mapping[str, Sequence[Batch]]
    head: nn.Linear | None = None
    about: str = ""


def text_tower(folder: str, data_path: str, steps: int, batch_size: int, choose: int = 16, report: int = 32) -> Tower:
    """A language model on E2E: one sample per meaning representation, none in two parts."""
    model = load_model(folder, torch.float32).eval()
    data = DataSection(task="e2e_nlg", data_path=data_path, overlong="drop")
    renderer = renderer_for(data, ModelSection(model_name=folder), folder, load_config(folder))

    def rows(split: str) -> list[Any]:
        found = one_per_prompt(load("e2e_nlg", data_path, split, data))
        random.Random(SEED).shuffle(found)
        return found

    train, held, each = rows("train"), rows("dev"), steps * batch_size
    assert len(train) >= 2 * each, "rows of their own for two probes"
    probes = [training_batches(train[at : at + each], renderer, batch_size) for at in (0, each)]
    return Tower(
        model,
        lambda batch: dict(zip(("loss", "count"), batch_losses(model, batch, torch.device("cpu")), strict=True)),
        lambda probe, count: probes[probe][:count],
        {
            "choose": training_batches(held[:choose], renderer),
            "report": training_batches(held[choose : choose + report], renderer),
        },
        about=f"E2E, {batch_size} rows a step, {choose} and {report} held-out prompts",
    )


def objects(folder: Path) -> tuple[list[str], dict[int, list[tuple[Tensor, int]]]]:
    """Labels, and image id → (picture (3, SIDE, SIDE), label) of its objects: squares around their boxes."""
    content = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    names = {row["id"]: row["supercategory"] for row in content["categories"]}
    files = {row["id"]: folder / "train2017" / row["file_name"] for row in content["images"]}
    wanted = [row for row in content["annotations"] if not row["iscrowd"] and min(row["bbox"][2:]) >= SMALLEST]
    counts = Counter(names[row["category_id"]] for row in wanted)
    labels = sorted(name for name, count in counts.items() if count >= FEWEST)
    found: dict[int, list[tuple[Tensor, int]]] = defaultdict(list)
    for row in wanted:
        if (name := names[row["category_id"]]) in labels:
            x, y, width, height = row["bbox"]
            x, y, side = x + width / 2, y + height / 2, 0.55 * max(width, height)
            with Image.open(files[row["image_id"]]) as opened:
                box = (max(0, x - side), max(0, y - side), min(opened.width, x + side), min(opened.height, y + side))
                cut = opened.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC, box)
            pixels = torch.tensor(np.asarray(cut), dtype=torch.float32).permute(2, 0, 1) / 255
            pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(DEVIATION)[:, None, None]
            found[row["image_id"]].append((pixels, labels.index(name)))
    return labels, found


def picture_tower(folder: str, data_path: str, batch_size: int) -> Tower:
    """DINOv2 with a linear head on objects of COCO, split by image; pictures of one image are one held-out item."""
    labels, found = objects(Path(data_path))
    images = sorted(found)
    random.Random(SEED).shuffle(images)
    parts: dict[str, list[int]] = {name: [] for name in SHARES}
    for image in images:  # to the part that lacks most
        filled = {name: sum(len(found[one]) for one in part) / SHARES[name] for name, part in parts.items()}
        parts[min(filled, key=lambda name: filled[name])].append(image)
    model = Dinov2Model.from_pretrained(folder, dtype=torch.float32).eval()
    head = nn.Linear(model.config.hidden_size, len(labels))

    def batch(rows: Sequence[tuple[Tensor, int]]) -> Batch:
        return {"pixels": torch.stack([row[0] for row in rows]), "labels": torch.tensor([row[1] for row in rows])}

    def training(probe: int, steps: int) -> list[Batch]:
        rows = [row for image in parts[f"probe {probe}"] for row in found[image]]
        rows += [(pixels.flip(-1), label) for pixels, label in rows]
        order = random.Random(SEED + probe)
        epochs = [order.sample(rows, len(rows)) for _ in range(math.ceil(steps * batch_size / len(rows)))]
        stream = [row for epoch in epochs for row in epoch]
        return [batch(stream[at * batch_size : (at + 1) * batch_size]) for at in range(steps)]

    def score(given: Batch) -> dict[str, Tensor]:
        logits = head(model(given["pixels"]).pooler_output)
        loss = nn.functional.cross_entropy(logits, given["labels"], reduction="sum").double()
        right = (logits.argmax(-1) == given["labels"]).sum()
        return {"loss": loss[None], "count": torch.tensor([len(logits)]), "right": right[None]}

    sizes = [sum(len(found[image]) for image in part) for part in parts.values()]
    about = f"{sum(sizes)} objects of {len(images)} COCO images, {len(labels)} labels ({', '.join(labels)}), "
    about += f"{batch_size} a step; {sizes[0]} and {sizes[1]} for the probes, {sizes[2]} and {sizes[3]} held out"
    batches = {name: [batch(found[image]) for image in parts[name]] for name in ("choose", "report")}
    return Tower(model, score, training, batches, head, about)


@dataclass(frozen=True)
class Change:
    """A delta (m, n) with its singular values and, of its short side, the leading singular vectors."""

    delta: Tensor
    values: Tensor
    short: Tensor

    @classmethod
    def of(cls, delta: Tensor) -> Change:
        wide = wide_side(delta).double()
        squares, vectors = torch.linalg.eigh(wide @ wide.mT)
        return cls(delta, squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)[:, : max(RANKS)].float())

    def truncated(self, rank: int) -> Tensor:
        side = self.short[:, :rank]
        tall = len(side) != len(self.delta)
        return (self.delta @ side) @ side.mT if tall else side @ (side.mT @ self.delta)


class Study:
    """One tower, its ledger, the lengths at which it is measured."""

    def __init__(self, title: str, tower: Tower, work: Path, lengths: Sequence[int] = LENGTHS) -> None:
        self.title, self.tower, self.lengths = title, tower, tuple(lengths)
        self.folder = work / title.replace(" ", "_")
        self.ledger = Ledger(self.folder)
        self.sites = list(model_sites(tower.model).values())
        tower.model.requires_grad_(False)
        self.base = {site: self.weight(site).detach().clone() for site in self.sites}
        for site in self.sites:
            self.weight(site).requires_grad_(True)

    def weight(self, site: Site) -> nn.Parameter:
        return self.tower.model.get_parameter(site.weight)

    def delta(self, site: Site) -> Tensor:
        delta = self.weight(site).detach() - self.base[site]
        return delta.T if site.transposed else delta

    def enter(self, key: Mapping[str, Any], matrices: Mapping[str, Tensor], **more: Any) -> None:
        self.ledger.add([{"key": dict(key), **more}], {name: value[None] for name, value in matrices.items()})

    def train(self, optimizer: str, rate: float, probe: int, stops: Sequence[int], state: Path) -> Iterator[int]:
        """Train from the base and pause at every stop; from a saved state where there is one. Ends early, without a
        further stop, where the loss is no longer finite."""
        parameters = [self.weight(site) for site in self.sites]
        with torch.no_grad():
            for site in self.sites:
                self.weight(site).copy_(self.base[site])
        optimizers = [OPTIMIZERS[optimizer](parameters, rate)]
        if (head := self.tower.head) is not None:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            optimizers.append(torch.optim.AdamW(head.parameters(), HEAD_RATE))
        done = 0
        if state.is_file():
            saved = torch.load(state)
            done = saved["step"]
            with torch.no_grad():
                for parameter, value in zip(parameters, saved["weights"], strict=True):
                    parameter.copy_(value)
            if head is not None:
                head.load_state_dict(saved["head"])
            for one, content in zip(optimizers, saved["optimizers"], strict=True):
                one.load_state_dict(content)
            yield done
        for step, batch in enumerate(self.tower.training(probe, max(stops)), 1):
            if step <= done:
                continue
            found = self.tower.score(batch)
            loss = found["loss"].sum() / found["count"].sum()
            if not loss.isfinite():
                return
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            for one in optimizers:
                one.step()
                one.zero_grad()
            if step in stops:
                saved = {"step": step, "weights": parameters, "optimizers": [one.state_dict() for one in optimizers]}
                if step < max(stops):
                    torch.save(saved | {"head": head and head.state_dict()}, state.with_suffix(".new"))
                    state.with_suffix(".new").replace(state)
                yield step
        state.unlink(missing_ok=True)

    @torch.no_grad()
    def evaluate(self, part: str) -> dict[str, Tensor]:
        """`score` of all held-out items (n,)."""
        found = [self.tower.score(batch) for batch in self.tower.held[part]]
        return {name: torch.cat([each[name] for each in found]).double() for name in found[0]}

    def spectra(self, matrices: Iterator[Tensor]) -> Tensor:
        """(matrices, largest full rank) float32, NaN beyond a matrix's own."""
        rows = [exact_spectrum(matrix, from_difference(matrix).energy).values for matrix in matrices]
        return padded(rows, max(site.full_rank for site in self.sites))

    def measure_base(self) -> None:
        """The spectra of the weights themselves; what else the tables need of a tower."""
        key = {"what": "base"}
        if key not in self.ledger:
            matrices = (matrix.T if site.transposed else matrix for site, matrix in self.base.items())
            found = {"values": self.spectra(matrices)}
            shapes = [[site.path, *site.shape] for site in self.sites]
            if self.tower.head is None:
                found |= {f"{name} 0": value for name, value in self.evaluate("report").items()}
            self.enter(key, found, sites=shapes, about=self.tower.about, lengths=self.lengths)

    def choose_rate(self, optimizer: str) -> float:
        """The best rate on held-out rows of its own after the middle length; the grid grows where it is at an edge."""
        losses: dict[float, float] = {}
        step = self.lengths[len(self.lengths) // 2]
        grid = [START[optimizer] * RATIO**power for power in (0, -1, 1)]
        while grid:
            rate = float(f"{grid.pop(0):.3g}")
            key = {"what": "rate", "optimizer": optimizer, "rate": rate, "step": step}
            if key not in self.ledger:
                loss = None
                for _ in self.train(optimizer, rate, 0, [step], self.folder / "none"):
                    found = self.evaluate("choose")
                    loss = float(found["loss"].sum() / found["count"].sum())
                self.enter(key, {}, loss=loss)
                say(f"{self.title}: {optimizer} {rate:g}, {step} steps: {loss}")
            found_loss = self.ledger[key]["loss"]
            losses[rate] = math.inf if found_loss is None else found_loss
            if not grid and len(losses) < 3 + WIDER:
                best = min(losses, key=lambda one: losses[one])
                grid = [best * RATIO] if best == max(losses) else [best / RATIO] if best == min(losses) else []
        return best_rate(losses)

    def run(self, optimizer: str, rate: float, probe: int) -> None:
        """One probe, measured at every length."""
        keys = {
            step: {"what": "change", "optimizer": optimizer, "rate": rate, "probe": probe, "step": step}
            for step in self.lengths
        }
        if all(key in self.ledger for key in keys.values()):
            return
        for step in self.train(optimizer, rate, probe, self.lengths, self.folder / f"{optimizer}-{probe}.pt"):
            if keys[step] not in self.ledger:
                self.measure(keys[step])
                say(f"{self.title}: {optimizer}, probe {probe + 1}, {step} steps measured")

    def measure(self, key: Mapping[str, Any]) -> None:
        """All that is known of the change at this point of a run."""
        tuned = self.evaluate("report")
        found = {f"{name} tuned": value for name, value in tuned.items()}
        changes = {site: Change.of(self.delta(site)) for site in self.sites}
        for rank in (0, *RANKS) if self.tower.head else RANKS:  # the base with a trained head differs from run to run
            moves = {site: change.truncated(rank) - change.delta for site, change in changes.items()}
            with moved(self.tower.model, {site: m.T if site.transposed else m for site, m in moves.items()}):
                found |= {f"{name} {rank}": value for name, value in self.evaluate("report").items()}
        width = max(site.full_rank for site in self.sites)
        found["values"] = padded([change.values for change in changes.values()], width)
        generator = torch.Generator().manual_seed(SEED)
        some = [change.delta for change in list(changes.values())[::NULL_EVERY]]
        orders = (torch.randperm(delta.numel(), generator=generator) for delta in some)
        found["null"] = self.spectra(d.flatten()[order].view_as(d) for d, order in zip(some, orders, strict=True))
        means = {name: float(found[name].sum() / tuned["count"].sum()) for name in found if name.startswith("loss")}
        self.enter(key, found, means=means)


def padded(rows: Sequence[Tensor], width: int) -> Tensor:
    out = torch.full((len(rows), width), math.nan)
    for row, values in zip(out, rows, strict=True):
        row[: len(values)] = values
    return out


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", help="folder of a language model, or of DINOv2")
    parser.add_argument("--title", help="[the folder's name]")
    parser.add_argument("--data", help="E2E's files, or tiny_coco")
    parser.add_argument("--work", type=Path, required=True, help="ledgers are kept here")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], default=list(LENGTHS))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--stage", choices=("run", "table"), default="run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--image", type=Path, default=Path(__file__).parents[1] / "docs" / "images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.stage == "table":
        return write_results(options.work, options.out, options.image)
    pictures = (Path(options.data) / "annotations").is_dir()
    torch.manual_seed(SEED)
    given = options.model, options.data
    steps, rows = max(options.lengths), options.batch_size
    tower = picture_tower(*given, rows) if pictures else text_tower(*given, steps, rows)
    study = Study(options.title or Path(options.model).name, tower, options.work, options.lengths)
    study.measure_base()
    rates = {optimizer: study.choose_rate(optimizer) for optimizer in OPTIMIZERS}
    for probe in range(2):
        for optimizer, rate in rates.items():
            study.run(optimizer, rate, probe)


if __name__ == "__main__":
    main()
