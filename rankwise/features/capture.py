"""rankwise features capture: images → a cache of the features that a language model receives, or an encoder outputs.

rankwise features capture photos/ --model Qwen/Qwen2.5-VL-3B-Instruct -o feature_cache_real
rankwise features capture photos/ --model facebook/dinov2-small -o feature_cache_dinov2
rankwise features capture --synthetic 512 --spectrum power:0.7 -o known/
torchrun --nproc-per-node 2 -m rankwise.cli features capture …      (the processes share the shards)

pictures ── shards of --shard_size ── missing ones, each process its share ──▶ features-00000.safetensors …  index.json

Stopped and started again, it makes what is missing; the result is the same to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from rankwise.data.device import read_target
from rankwise.data.images import ImageReader
from rankwise.data.vision_inputs import Sight
from rankwise.errors import DataError, RankwiseError, UsageError
from rankwise.features.approximation import best_errors, normalised, singular_values
from rankwise.features.cache import FeatureCache, ModelOrigin
from rankwise.features.cache_writer import CacheWriter, replaceable
from rankwise.features.encoder import (
    SQUARE,
    EncoderEye,
    Eye,
    ModelEye,
    Preparation,
    is_encoder,
    load_image_processor,
    own_side,
    unresized,
)
from rankwise.features.measures import explained_energy
from rankwise.features.pictures import PictureShards, open_pictures
from rankwise.features.synthetic import Synthetic, SyntheticShards
from rankwise.files.adapter import is_adapter
from rankwise.files.checkpoint import model_fingerprint, resolve
from rankwise.files.processes import announce, finish, gathered, own_share, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.depth.encoder import read_depth
from rankwise.models.load import load_config, load_processor, main_input
from rankwise.options.features import CaptureConfig
from rankwise.page.progress import progress
from rankwise.page.text import command_line, memory, percent, plural
from rankwise.pipeline.idle import refuse_idle

STAGE = "features capture"
LOOKED_AT = 8  # matrices that the last lines' energy is the median of
Result = TypeVar("Result")
Shards = SyntheticShards | PictureShards


def run(config: CaptureConfig) -> FeatureCache | None:
    """Run the command. Processes other than rank 0 make their share and return None."""
    check(config)
    try:
        return captured(config)
    finally:
        finish()


def check(config: CaptureConfig) -> None:
    """Refuse invalid combinations of options before anything is read."""
    if config.synthetic is None and not (config.model_name and config.images):
        raise UsageError("features capture needs IMAGES and --model, or --synthetic N")
    if config.synthetic is not None and (config.model_name or config.images):
        raise UsageError("--synthetic N needs no model: leave --model and the images out")
    refuse_idle(config)
    if config.native and config.image_size is not None:
        raise UsageError("--native keeps image sizes, --image_size stretches images: give one of them")


def captured(config: CaptureConfig) -> FeatureCache | None:
    folder = RunFolder(config.output_dir)
    with held(folder, STAGE, {"model": config.model_name, "images": config.images}) as record:
        shards = shards_of(config)
        writer = CacheWriter(folder.path, shards.recipe)
        with until_a_shard_is_made(writer, config.overwrite) as made:
            agreed(writer.begin if process_index()[0] == 0 else lambda: None)
            missing = gathered({0: agreed(writer.missing)})[0]
            agreed(lambda: make(shards, writer, own_share(missing, [shards.size(shard) for shard in missing]), made))
        if process_index()[0] != 0:
            return None
        cache = writer.finish()
        folder.save_config(config)
        record.outputs["index"] = writer.index
        record.facts |= {"matrices": len(cache), "shards_made": len(missing), "fingerprint": cache.fingerprint}
    report(config, writer, cache, len(missing))
    return cache


@contextmanager
def until_a_shard_is_made(writer: CacheWriter, overwrite: bool) -> Iterator[Callable[[], None]]:
    """With --overwrite the earlier cache lies aside until the first process calls what this gives: a model that cannot
    be loaded, or a first picture that cannot be seen, costs nothing."""
    if process_index()[0] != 0:
        yield lambda: None
        return
    earlier = replaceable(writer.folder)
    earlier.put_back()
    with earlier.until_dropped():
        if overwrite:
            earlier.take()
        yield earlier.drop


def agreed(action: Callable[[], Result]) -> Result:
    """What the action gives in this process; where it failed in any process, an error in all of them."""
    error, result = None, None
    try:
        result = action()
    except RankwiseError as caught:
        error = caught
    told = {process_index()[0]: (error.exit_code, str(error)) if error else None}
    failed = {rank: entry for rank, entry in gathered(told).items() if entry}
    if error:
        raise error
    if failed:
        code, text = failed[min(failed)]
        raise (UsageError if code == UsageError.exit_code else DataError)(text)
    return result  # type: ignore[return-value]


def make(shards: Shards, writer: CacheWriter, mine: list[int], made: Callable[[], None]) -> None:
    """These shards, in order, each written as soon as it is whole; `made` is called after each."""
    total = sum(shards.size(shard) for shard in mine)
    bar = progress(total=total, desc="capture", unit="image", leave=True)
    try:
        for shard in sorted(mine):
            writer.write(shard, shards.made(shard, bar.update))
            made()
    finally:
        bar.close()


def report(config: CaptureConfig, writer: CacheWriter, cache: FeatureCache, made: int) -> None:
    size = sum(file.stat().st_size for file in writer.folder.glob("features-*.safetensors"))
    kept = writer.recipe.shards - made
    grid = f" ({cache.grid[0]} × {cache.grid[1]} grid)" if cache.grid else ""
    announce(
        f"captured {plural(len(set(cache.groups)), 'picture')}: {len(cache)} matrices of {cache.tokens} tokens{grid} × "
        f"{cache.channels:,} channels, {config.cache_dtype}, {memory(size)} in {cache.path}"
    )
    if kept:
        announce(f"{plural(kept, 'shard')} of {writer.recipe.shards} were there already")
    for name, reason in cache.left_out:
        announce(f"left out: {name}: {reason}")
    announce(energy_line(cache))
    announce(f"next: {next_command(config)}")


def next_command(config: CaptureConfig) -> str:
    return command_line("features", "train", features=config.output_dir)


def energy_line(cache: FeatureCache) -> str:
    """Energy that the best factors of half the rank keep: whether there is room for improvement."""
    step = max(1, len(cache) // LOOKED_AT)
    rank = max(1, min(cache.tokens, cache.channels) // 2)
    values = singular_values(
        normalised(torch.stack([cache[place] for place in range(0, len(cache), step)][:LOOKED_AT]))
    )
    kept = float(explained_energy(best_errors(values)[:, rank - 1]).median())
    return f"at rank {rank} the best factors keep {kept:.2%} of a matrix's energy (median of {len(values)})"


def earlier(config: CaptureConfig) -> list[Path]:
    """What an earlier capture has left in the folder."""
    cache = replaceable(Path(config.output_dir))
    cache.put_back()  # where a process was killed
    return cache.there()


def going_on(config: CaptureConfig, *, unchanged: bool) -> CaptureConfig:
    """The config of a recipe's stage that finds something in its folder: a capture of other things is made anew."""
    return config if unchanged else replace(config, overwrite=True)


def describe(config: CaptureConfig) -> list[str]:
    if config.synthetic is not None:
        return [
            f"make {config.synthetic} matrices of {config.tokens} × {config.channels} with spectrum {config.spectrum}, "
            f"{percent(config.shared)} of the energy in shared directions"
        ]
    what = f"the first {plural(config.num_images, 'picture')}" if config.num_images else "all pictures"
    side = config.image_size or SQUARE
    device = "" if config.image_size else ", or as its device.json or an encoder's own processor says"
    shown = "as they are" if config.native else f"stretched to {side} × {side}{device}"
    return [f"show {what} in {config.images} to {config.model_name}, {shown}"]


def shards_of(config: CaptureConfig) -> Shards:
    if config.synthetic is not None:
        settings = Synthetic(config.tokens, config.channels, config.spectrum, config.shared, config.seed, config.smooth)
        return SyntheticShards(settings, config.synthetic, config.shard_size, config.cache_dtype)
    assert config.model_name and config.images
    folder = seeing_model(config.model_name, config.revision)
    preparation, eye = eye_of(config, folder)
    pictures = open_pictures(config.images, background=preparation.background)
    origin = ModelOrigin(config.model_name, model_fingerprint(folder))
    return PictureShards(config, pictures, preparation, eye, origin)


def eye_of(config: CaptureConfig, folder: Path) -> tuple[Preparation, Eye]:
    """The image preparation and the vision encoder: a vision-language model's, or a plain one."""
    name = str(config.model_name)
    known = load_config(name, config.revision)
    if is_encoder(known):
        processor = load_image_processor(name, config.revision)
        if config.native:
            return Preparation(None), EncoderEye(name, processor, config.revision)
        side = config.image_size or own_side(processor, known)
        return Preparation(side), EncoderEye(name, unresized(processor), config.revision)
    preparation = preparation_of(config, folder)
    processor = preparation.processor(load_processor(name, config.revision))
    # The reader is never asked: pictures come prepared.
    return preparation, ModelEye(name, Sight(processor, ImageReader(folder)), config.revision)


def seeing_model(name: str, revision: str | None) -> Path:
    """The folder of a whole model that takes images. UsageError for an adapter, a text model, a model with depth."""
    folder = resolve(name, revision)
    if is_adapter(folder):
        raise UsageError(f"{name} is an adapter; `rankwise merge` makes a model of it, whose features can be captured")
    config = load_config(name, revision)
    if not hasattr(config, "vision_config") and not is_encoder(config):
        told = main_input(config)
        raise UsageError(
            f"{name} is a text model: it has no image features"
            if told == "input_ids"
            else f"{name} takes {told}, not pictures: it has no image features"
        )
    if read_depth(folder):
        raise UsageError(f"{name} adds depth to its image features, and features are captured without; give its base")
    return folder


def preparation_of(config: CaptureConfig, folder: Path) -> Preparation:
    if config.native:
        return Preparation(None)
    target = read_target(folder) if config.image_size is None else None
    return Preparation(None, target) if target else Preparation(config.image_size or SQUARE)
