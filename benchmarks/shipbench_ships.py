"""What ShipBench damages: trained tiny models, merged and exported, with the cases of their parity ladder.

    work/drawings/   rankwise demo --vision   an adapter that answers questions about drawings
    work/elements/   rankwise tiny            a base that names what a photo shows
    work/texts/      rankwise demo            an adapter that puts facts into words
        └── merged/, export/ (f32, f16, q8_0), photos/ (the cases: pictures of any shape, some stored on their side)

Trained, because with random weights hardly anything that is wrong changes an answer.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from rankwise.data.device import DeviceTarget
from rankwise.data.label_task import load_task
from rankwise.demo import command as demo
from rankwise.demo import tiny
from rankwise.demo.scenes import ON_ITS_SIDE, ORIENTATION, SHADES, paint
from rankwise.device.parity.cases import Case
from rankwise.device.parity.floor import Floor
from rankwise.device.sides import Shipment, Shipped, TrainedSide, trained_side
from rankwise.gguf import command as export
from rankwise.gguf.converter import Converter
from rankwise.gguf.plan import ExportPlan, plan_export
from rankwise.gguf.reading import Exported, read_export
from rankwise.merge import command as merge
from rankwise.options.commands import DemoConfig, ExportConfig, MergeConfig, TinyConfig, ValidateConfig
from rankwise.options.sections import ScoredData

FORMS = ("f32", "f16", "q8_0")
SHAPES = ((200, 130), (120, 210), (150, 150), (64, 64), (310, 96))  # only one is the device's own
SEEN, TURNED = 60, 3  # pictures to choose from; every third lies on its side in the file
PARITY = 32


@dataclass(frozen=True)
class Ship:
    """A sound export with its ladder. base, adapter: what was merged; None where the base itself is shipped."""

    name: str
    trained: TrainedSide
    exported: Exported
    plan: ExportPlan
    base: Path | None = None
    adapter: Path | None = None

    @cached_property
    def floor(self) -> Floor:
        found = self.trained.floor()
        assert found
        return found

    @property
    def cases(self) -> list[Case]:
        return self.trained.cases

    @property
    def sees(self) -> bool:
        return self.trained.renderer.sight is not None

    def other_model(self, which: str) -> Path:
        """`base`: before tuning; `alpha`: the adapter merged at twice its scale; else the name of another ship's model
        beside this one's export."""
        if which == "base":
            assert self.base
            return self.base
        if which != "alpha":
            return self.exported.folder.parent / f"{which}-42" / "base"
        assert self.adapter
        doubled, merged = (
            self.exported.folder.parent / f"{self.name}-{what}" for what in ("doubled", "doubled-merged")
        )
        if not merged.is_dir():
            double(self.adapter, doubled)
            merge.run(MergeConfig(adapter=str(doubled), output_dir=str(merged), base_model=str(self.base)))
        return merged

    def on(self, part: int, parts: int) -> Ship:
        """The same export with one of `parts` sets of its items on the ladder; no item is in two of them."""
        items = list(self.trained.items)[part::parts][:PARITY]
        return replace(self, trained=replace(self.trained, items=items))


def drawings(work: Path, converter: Converter) -> Ship:
    """Questions about drawings; tuned with an adapter."""
    run = made_by_demo(work / "drawings", vision=True)
    rows = json.loads((run / "data" / "heldout.json").read_text(encoding="utf-8"))
    data = work / "drawings-photos"
    write_photos(data, [(run / "data" / row["image"], row) for row in rows[:SEEN]])
    return shipped(work, "drawings", run, data / "rows.json", "conversations", converter)


def texts(work: Path, converter: Converter) -> Ship:
    """Facts into words; tuned with an adapter."""
    run = made_by_demo(work / "texts", vision=False)
    return shipped(work, "texts", run, run / "data", "e2e_nlg", converter)


def elements(work: Path, converter: Converter, seed: int = 42) -> Ship:
    """What a photo shows; a base that no adapter was merged into."""
    name = f"elements-{seed}"
    folder = work / name
    if not (folder / "base").is_dir():
        tiny.run(TinyConfig(output_dir=str(folder), seed=seed))
    data = work / f"{name}-photos"
    if not data.is_dir():
        data.mkdir(parents=True)
        write_scenes(data, random.Random(seed))
    target = DeviceTarget(image_size=SHAPES[3][0])
    target.save(data)
    return ready(work, name, folder / "base", data / "rows.json", "conversations", converter, target=data)


def made_by_demo(folder: Path, vision: bool) -> Path:
    """The run folder of the demo; made where it is not there yet (four minutes on two cores)."""
    if not (folder / "train" / "adapter_config.json").is_file():
        demo.run(DemoConfig(output_dir=str(folder), vision=vision))
    return folder


def shipped(work: Path, name: str, run: Path, data: Path, task: str, converter: Converter) -> Ship:
    """A demo's adapter merged, exported, and read back."""
    merged = work / f"{name}-merged"
    if not merged.is_dir():
        merge.run(MergeConfig(adapter=str(run / "train"), output_dir=str(merged)))
    return ready(work, name, merged, data, task, converter, base=run / "base", adapter=run / "train")


def ready(
    work: Path,
    name: str,
    model: Path,
    data: Path,
    task: str,
    converter: Converter,
    target: Path | None = None,
    **origin: Path,
) -> Ship:
    folder = work / f"{name}-export"
    if not (folder / "export.json").is_file():
        given = str(target) if target else None
        export.run(
            ExportConfig(
                model=str(model),
                output_dir=str(folder),
                outtype=list(FORMS),
                target=given,
                llama_cpp_dir=str(converter.folder),
            )
        )
    section = ScoredData(task=task, data_path=str(data), device_target=str(target) if target else None)
    config = ValidateConfig(export=str(folder), data=section, parity_samples=PARITY, num_samples=SEEN)
    exported = read_export(folder)
    base = str(origin["base"]) if origin else None
    plan = plan_export(ExportConfig(model=str(model), outtype=["f16"], base_model=base), converter)
    trained = trained_side(config, Shipment((Shipped("f16"),), folder, str(model)))
    return Ship(name, trained, exported, plan, **origin)


def double(adapter: Path, out: Path) -> None:
    """A copy of an adapter with every alpha twice as large."""
    shutil.copytree(adapter, out, ignore=shutil.ignore_patterns("checkpoint-*", "plots"), dirs_exist_ok=True)
    file = out / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["lora_alpha"] *= 2
    config["alpha_pattern"] = {name: 2 * value for name, value in config.get("alpha_pattern", {}).items()}
    file.write_text(json.dumps(config), encoding="utf-8")


# --- pictures as people have them --------------------------------------------------------------------------------


def write_photos(folder: Path, rows: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Drawings scaled to several shapes, every third stored on its side with an EXIF note, and the questions."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for number, (file, row) in enumerate(rows):
        with Image.open(file) as drawing:
            photo = drawing.convert("RGB").resize(SHAPES[number % len(SHAPES)], Image.Resampling.BICUBIC)
        name = f"{number:03d}.png"
        save_photo(photo, folder / name, number % TURNED == 0)
        kept.append(row | {"image": name})
    (folder / "rows.json").write_text(json.dumps(kept), encoding="utf-8")


def write_scenes(folder: Path, state: random.Random) -> None:
    """Drawn scenes of the elements with the task's question."""
    task = load_task("elements")
    rows = []
    for number in range(SEEN // 2):
        element = list(SHADES)[number % len(SHADES)]
        name = f"{number:03d}.png"
        save_photo(paint(element, *SHAPES[number % len(SHAPES)], state), folder / name, number % TURNED == 0)
        said = [{"from": "human", "value": f"<image>\n{task.student_prompt}"}, {"from": "gpt", "value": element}]
        rows.append({"id": name, "image": name, "conversations": said})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


def save_photo(photo: Image.Image, path: Path, on_its_side: bool) -> None:
    if not on_its_side:
        photo.save(path)
        return
    exif = Image.Exif()
    exif[ORIENTATION] = ON_ITS_SIDE
    photo.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
