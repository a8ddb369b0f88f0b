"""Depth in a run: maps made once per image before anything is trained, depth.json, and a processor that gives `depth`.

    settings + images ── prepare ──▶ depth.json's settings, and a Sight that gives `depth` beside the pixels
                            └── fill: what the cache lacks, one image at a time, the work shared by the processes

    processor = with_depth_output(processor, settings, estimator)      # a model used from Python, as training saw it
    inputs = processor(text=[…], images=[…], return_tensors="pt")      # pixel_values, …, depth
    inputs = processor(text=[…], images=[…], depth=values, …)          # values of your own, one per image token

The processor's values are those of the training cache, bit for bit: the same estimator, one image at a time, rounded to
float16.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.image_utils import load_image

from rankwise.core.geometry import permuted
from rankwise.data.depth.maps import (
    NEEDS_NO_MAP,
    DepthCache,
    DepthFiles,
    DepthMaps,
    MapTask,
    at_tokens,
    image_grids,
    luminance,
    source_name,
    synthetic,
)
from rankwise.data.example import Example
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, RankwiseError, UsageError
from rankwise.files.checkpoint import resolve
from rankwise.files.processes import announce, gathered, own_share, process_index
from rankwise.models.depth.encoder import ENCODER, DepthSettings, encoder_of, read_depth, write_depth
from rankwise.models.depth.estimator import ESTIMATOR, SMALL, DepthEstimator, load_estimator
from rankwise.options.sections import DEPTH_CONTROLS, DepthSection, DepthUseSection
from rankwise.page.progress import progress

GATE_RATE = 0.03  # at an adapter's rate the gate stays near its start, 0 (benchmarks/depth_evidence.py)
CACHE = Path("~/.cache/rankwise/depth")
ESTIMATED = ("estimated", "shuffled", "permuted")  # controls that look at estimated depth
OF_A_SET = ("shuffled", "file")  # controls that need a whole data set
PATH_FREE = ("estimator", "gate_value")
SEED = 42  # of the within-image permutation, as the commands' default


def asked(section: DepthSection) -> DepthSettings | None:
    """Depth settings from a run's options, before an estimator is read; None without --use_depth.

    UsageError for maps without the control that takes them.
    """
    control = section.depth_control or "estimated"
    if not section.use_depth:
        return None
    check_maps(control, section.depth_maps)
    return DepthSettings(
        alpha=section.depth_alpha,
        input_size=section.depth_input_size,
        gate=section.depth_gate,
        layout=section.depth_layout,
        estimator=(section.depth_checkpoint_path or SMALL) if control in ESTIMATED else None,
        control=control,
    )


def gate_rate(section: DepthSection, training: Mapping[str, Any]) -> dict[str, float]:
    """The rate of the gate's tower. Under DeepSpeed, whose optimizer knows one rate, the common one by default.

    UsageError where --depth_lr is given and there is no gate to train.
    """
    rate = section.depth_lr
    if rate is not None and section.use_depth and section.depth_gate != "learned":
        raise UsageError(f"--depth_lr: with --depth_gate {section.depth_gate} there is no gate to train")
    if not section.use_depth or section.depth_gate != "learned":
        return {}
    if rate is None:
        return {} if training.get("deepspeed") else {"depth": GATE_RATE}
    return {"depth": rate}


def idle(section: DepthSection) -> list[str]:
    """A note on depth options that do nothing, as in a recipe with depth that runs with `--use_depth False`, or with
    another control than its estimator is for."""
    given = [f"--{name}" for name, value in vars(section).items() if value != getattr(DepthSection(), name)]
    if not section.use_depth:
        return [f"note: no depth: {', '.join(given)} act with --use_depth only"] if given else []
    control = section.depth_control or ESTIMATED[0]
    if control in ESTIMATED or section.depth_checkpoint_path is None:
        return []
    return [f"note: --depth_control {control} estimates no depth: --depth_checkpoint_path has no effect"]


def check_maps(control: str, maps: str | None) -> None:
    assert control in DEPTH_CONTROLS, control
    if (control == "file") != (maps is not None):
        raise UsageError("--depth_control file needs --depth_maps FOLDER_OR_TABLE, and vice versa")


def overruled(settings: DepthSettings, use: DepthUseSection) -> DepthSettings:
    """A trained model's settings with what evaluation says otherwise: another place of the same estimator, or another
    control than it was trained with."""
    control = use.depth_control or settings.control
    check_maps(control, use.depth_maps)
    estimator = use.depth_checkpoint_path or settings.estimator
    if control in ESTIMATED and estimator is None:
        raise UsageError(
            f"--depth_control {control}: this model was trained with {settings.control}, so its depth.json names no "
            "estimator; give one with --depth_checkpoint_path"
        )
    return replace(settings, control=control, estimator=estimator)


def trained_with(base: str, adapter: Path | None, use: DepthUseSection) -> DepthSettings | None:
    """How this adapter or merged model takes depth, with what `use` says otherwise; None for one without depth."""
    settings = (read_depth(adapter) if adapter else None) or read_depth(resolve(base))
    if settings is not None:
        return overruled(settings, use)
    given = [name for name, value in vars(use).items() if value is not None]
    if given:
        raise UsageError(f"--{given[0]}: {adapter or base} was not trained with depth (there is no depth.json)")
    return None


def estimator_of(settings: DepthSettings) -> DepthEstimator | None:
    """The estimator, where the control looks at estimated depth. DataError where it is not there, or is not the one
    that the model was trained with."""
    if settings.control not in ESTIMATED:
        return None
    assert settings.estimator is not None
    try:
        found = load_estimator(settings.estimator, settings.input_size)
    except DataError as error:
        raise DataError(
            f"depth needs its estimator: {error}. --depth_checkpoint_path takes a Depth Anything V2 .pth file, a "
            "Hugging Face folder or a hub id"
        ) from error
    if settings.estimator_hash not in (None, found.fingerprint):
        raise DataError(
            f"{settings.estimator} is not the estimator that this model was trained with (fingerprint "
            f"{found.fingerprint[:12]}…, not {str(settings.estimator_hash)[:12]}…); give that one with "
            "--depth_checkpoint_path"
        )
    return found


def prepared(
    settings: DepthSettings,
    use: DepthUseSection,
    sight: Sight,
    examples: Iterable[Example],
    *,
    seed: int,
    device: torch.device,
) -> tuple[DepthSettings, Sight]:
    """Depth for all images of these samples: made where the cache lacks it, and given by the returned sight.

    The settings come back with the estimator's fingerprint and a path that holds from any folder.
    """
    references = list(dict.fromkeys(reference for example in examples for reference in example.images))
    estimator = estimator_of(settings)
    source = source_name(estimator.fingerprint, settings.input_size) if estimator else ""
    maps = DepthMaps(
        sight.reader,
        sight.processor,
        DepthCache(Path(use.depth_cache) if use.depth_cache else CACHE.expanduser()),
        source,
        control="estimated" if settings.control == "shuffled" else settings.control,
        files=DepthFiles.at(Path(str(use.depth_maps))) if settings.control == "file" else None,
        seed=seed,
    )
    if settings.control == "shuffled":
        maps = maps.shuffled(references)
    if estimator:
        estimator.model.to(device)
        place = Path(estimator.name)
        name = str(place.resolve()) if place.exists() else estimator.name  # a hub id as it is
        settings = replace(settings, estimator=name, estimator_hash=estimator.fingerprint)
    fill(maps, references, lambda name: estimator.depth(sight.reader.open(name)) if estimator else maps.own_map(name))
    return settings, replace(sight, depth=maps)


def fill(maps: DepthMaps, references: Sequence[str], depth_of: Callable[[str], Tensor]) -> None:
    """Make the maps that the cache lacks, each process its share. An interrupted pass goes on where it stopped.

    Raises DataError, in every process, for an image or a map that fails in one.
    """
    absent, broken = maps.missing(references)
    for line in broken:
        announce(f"warning: {line}; made again now")
    # One list for all: by now another process may already have made what this one has seen missing.
    place = {reference: index for index, reference in enumerate(references)}
    missing = sorted(gathered({task.key: task for task in absent}).values(), key=lambda task: place[task.maker])
    mine = own_share(missing, [1.0] * len(missing))
    failed = {index: text for index, text in gathered({process_index()[0]: made(maps, mine, depth_of)}).items() if text}
    if failed:
        raise DataError(failed[min(failed)])
    if missing:
        announce(f"depth: {len(missing):,} maps made, {len(set(references)) - len(missing):,} from {maps.cache.folder}")


def made(maps: DepthMaps, tasks: Sequence[MapTask], depth_of: Callable[[str], Tensor]) -> str | None:
    """Error message for the other processes; None without an error."""
    bar = progress(tasks, desc="depth", unit="image")
    try:
        for task in bar:
            maps.store(task, depth_of(task.maker))
    except RankwiseError as error:
        return str(error)
    finally:
        bar.close()
    return None


def save_depth(settings: DepthSettings | None, folder: Path) -> dict[str, Path]:
    """depth.json in a run's or an adapter's folder, by the first process; its name and place, for the manifest."""
    if settings is None or process_index()[0] != 0:
        return {}
    file = write_depth(folder, settings)
    return {file.name: file}


def depth_lines(settings: DepthSettings | None) -> list[str]:
    """Depth lines of a dry run."""
    if settings is None:
        return []
    source = f"estimated by {settings.estimator}" if settings.control == "estimated" else f"control {settings.control}"
    return [f"add each image token's depth ({source}; alpha {settings.alpha:g}, gate {settings.gate})"]


def gate_module(model: PreTrainedModel) -> dict[str, str]:
    """Path → tower of the module that carries a learned gate: it trains in full beside the adapter."""
    encoder = encoder_of(model)
    if encoder is None or encoder.gate is None:
        return {}
    return {f"{model.base_model_prefix}.{ENCODER}": "depth"}


def depth_facts(settings: DepthSettings | None) -> dict[str, Any]:
    """Depth as part of a run's identity: the estimator by its content, not its place."""
    if settings is None:
        return {}
    return {"depth": {name: value for name, value in asdict(settings).items() if name not in PATH_FREE}}


class ImageDepth:
    """Depth of single images at their tokens.

    estimator: where the settings' control looks at estimated depth.
    """

    def __init__(
        self, processor: Any, settings: DepthSettings, estimator: DepthEstimator | None, seed: int = SEED
    ) -> None:
        self.processor, self.settings, self.estimator, self.seed = processor, settings, estimator, seed

    def __call__(self, image: Image.Image, name: str) -> Tensor:
        """(tokens,) float16 in [0, 1]. UsageError for controls that need a whole data set."""
        control, picture = self.settings.control, image.convert("RGB")
        grids = image_grids(self.processor, *picture.size)
        if control in NEEDS_NO_MAP:
            return synthetic(control, grids)
        if control == "luminance":
            return at_tokens(luminance(picture), grids, name)
        if control in OF_A_SET:
            raise UsageError(f"depth control {control} needs a whole data set, not one image: pass depth=values")
        assert self.estimator is not None, control
        values = at_tokens(self.estimator.depth(picture), grids, name)
        return permuted(values, grids, self.seed) if control == "permuted" else values


def with_depth_output(processor: Any, settings: DepthSettings, estimator: DepthEstimator | None) -> Any:
    """The processor, in place, with `depth` (image tokens of all images,) float32 among its outputs."""
    family: type = type(processor)
    processor.__class__ = giving_depth(family)
    processor.image_depth = ImageDepth(processor, settings, estimator)
    return processor


def depth_processor(processor: Any, model: Any) -> Any:
    """The processor, in place, for a model with depth that was put together by hand (plain PEFT, say): settings and
    estimator are the model's own, at `model.depth_model`. UsageError for a model without depth or estimator."""
    encoder = encoder_of(model)
    if encoder is None:
        raise UsageError(f"{type(model).__name__} has no depth encoder; load it with use_depth=True")
    estimator = getattr(model, ESTIMATOR, None)
    if estimator is None and encoder.settings.control in ESTIMATED:
        raise UsageError(f"{type(model).__name__} has no depth estimator; load it with depth_checkpoint_path=…")
    return with_depth_output(processor, encoder.settings, estimator)


@cache
def giving_depth(family: type) -> type:
    """The family's processor that gives depth. It keeps the family's name, which is saved with it."""
    assert issubclass(family, ProcessorMixin)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        depth = kwargs.pop("depth", None)
        images = inspect.signature(family.__call__).bind(self, *args, **kwargs).arguments.get("images")
        found = family.__call__(self, *args, **kwargs)
        if depth is None and images is not None:
            values = [self.image_depth(image, f"{index + 1}") for index, image in enumerate(pictures(images))]
            depth = torch.cat(values)
        if depth is not None:
            found["depth"] = depth.float()
        return found

    names = {"__module__": family.__module__, "__qualname__": family.__qualname__, "__doc__": family.__doc__}
    return type(family.__name__, (family,), {**names, "__call__": call})


def pictures(images: Any) -> Iterator[Image.Image]:
    """All images of a batch in order, as the family's processor takes them: nested lists, files, URLs."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from pictures(image)
    elif isinstance(images, Image.Image):
        yield images
    elif isinstance(images, str):
        yield load_image(images)
    else:
        raise UsageError(f"depth needs images as PIL images, paths or URLs, not as {type(images).__name__}")
