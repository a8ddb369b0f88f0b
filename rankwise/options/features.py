"""The options of `rankwise features …`: low-rank factors of visual features."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.errors import UsageError
from rankwise.options.field import Options, option, output, reads, reads_model, reads_or_hub, seeded, unknown
from rankwise.options.sections import DEVICE, DTYPES, IMAGE_FOLDER, NO_PNG, OUTSIDE

# The names that `--arch` takes, each with its other names.
ARCHITECTURES = {
    "ResMLP": ("LowRankProjSymmetric",),
    "MLP": ("LowRankProjMLP",),
    "AdaLoRA": ("AdaptiveLowRankProjAdaLoRA", "adaptive_adalora", "adaptive"),
    "Subspace": (),
}


def canonical(name: str) -> str:
    """The architecture that `--arch` names, in any case; UsageError with near names for anything else."""
    answers = {other.lower(): known for known, others in ARCHITECTURES.items() for other in (known, *others)}
    if name.lower() not in answers:
        near = str(unknown(name.lower(), answers, "--arch", "network"))
        raise UsageError(f"{near}{'' if near.endswith('?') else '.'} There are {', '.join(ARCHITECTURES)}")
    return answers[name.lower()]


ARCH_HELP = "network: ResMLP, MLP, AdaLoRA (documented), Subspace (ours: close to the optimum, faster than exact)"
CACHE = "feature_cache_real"
TRAINED_ON = "feature cache [the training cache]"


@dataclass(frozen=True)
class AllocatorSection(Options):
    """AdaLoRA's rank allocator: how many ranks act, from all of them down to a share."""

    use_rank_allocator: bool = option(False, help="mask rank channels during training (AdaLoRA)")
    allocator_init_warmup: int = option(1000, least=0, help="optimizer steps at full rank before the first mask")
    allocator_final_warmup: int = option(1000, least=0, help="last optimizer steps, at the final ranks")
    allocator_mask_interval: int = option(20, least=1, help="optimizer steps between masks")
    allocator_keep_ratio: float = option(0.25, above=0, most=1, help="final share of the ranks")


@dataclass(frozen=True)
class CaptureConfig(Options):
    """Capture visual features, from a model's projector or an encoder, into a cache.

    rankwise features capture --synthetic 64 --tokens 64 --channels 256 -o runs/features/cache
    """

    model_name: str | None = reads_model(
        help="vision-language model, or vision encoder (DINOv2, SigLIP, CLIP, ViT …): folder or hub id",
        aliases=("model", "model_path", "base_model"),
    )
    revision: str | None = option(help="hub revision", group="model")
    images: str | None = reads_or_hub(
        help="folder, parquet file with an image column, `datasets` folder or id", group="data"
    )
    output_dir: str = output(CACHE, help="feature cache: sharded safetensors with an index")
    image_size: int | None = option(
        least=1,
        help="side of the square to stretch images to [448; as the model's device.json; an encoder's own]",
        group="data",
    )
    native: bool = option(
        False, help="pass images to the processor unresized (token counts must be equal)", group="data"
    )
    num_images: int | None = option(least=1, help="number of images, in name order [all]", group="data")
    batch_size: int = option(8, least=1, help="images per forward pass")
    shard_size: int = option(64, least=1, help="images per file", group="output")
    dtype: str = option("auto", choices=DTYPES, help="precision of the model", group="model")
    cache_dtype: str = option("float32", choices=DTYPES[1:], help="precision on disk", group="output")
    synthetic: int | None = option(
        least=1, help="number of random matrices with a known spectrum, instead of a model", group="data"
    )
    tokens: int = option(256, least=2, help="--synthetic: tokens per matrix", group="data")
    channels: int = option(2048, least=3, help="--synthetic: channels per token", group="data")
    spectrum: str = option(
        "power:0.7", help="--synthetic: power:A (σᵢ = i^-A), exp:A (σᵢ = e^-Ai), flat, rank:R", group="data"
    )
    smooth: bool = option(
        False, help="--synthetic: make neighbouring tokens alike, the same way in every matrix", group="data"
    )
    shared: float = option(
        0.5, least=0, most=1, help="--synthetic: share of the energy in common directions", group="data"
    )
    skip_bad: bool = option(False, help="skip unreadable images, listed in the index", group="data")
    overwrite: bool = option(False, help="delete an earlier capture in the folder and start over", group="output")
    device: str = option("auto", help=DEVICE)
    seed: int = seeded(42, help="random seed of --synthetic")


@dataclass(frozen=True)
class FactorTrainConfig(Options):
    """Train a network that predicts low-rank factors of a feature matrix.

    rankwise features train --features runs/features/cache --arch MLP --rank 8 -o runs/features
    """

    arch: str = option("ResMLP", help=ARCH_HELP)
    features: str = reads(CACHE, help="feature cache, or folder of features_{i}.pt", aliases=("cache", "data_path"))
    epochs: int = option(20, least=0, help="epochs; with --resume, additional epochs", aliases=("num_train_epochs",))
    lr: float = option(1e-4, above=0, help="learning rate of AdamW", aliases=("learning_rate",))
    rank: int = option(128, least=1, help="rank of the factors", aliases=("r",))
    batch_size: int = option(8, least=1, help="matrices per step", aliases=("per_device_train_batch_size",))
    lambda_B: float = option(1e-4, least=0, help="weight of mean(B²) in the loss", aliases=("lambda_b",))
    lambda_ortho: float = option(1e-3, least=0, help="weight of ‖AᵀA/T − I‖²/r² in the loss (AdaLoRA: of its layers')")
    activation_orth_regu_A: float = option(
        0.0,
        least=0,
        help="AdaLoRA: weight of ‖AᵀA/T − I‖²/r² beside its layers' orthogonality",
        aliases=("activation_orth_regu_a",),
    )
    weight_decay: float = option(1e-5, least=0, help="weight decay of AdamW")
    patience: int = option(10, least=0, help="epochs without a better validation MSE before stopping; 0: off")
    dropout: float = option(0.1, least=0, below=1, help="dropout in the networks")
    refine: bool = option(False, help="refine A·B afterwards; scored separately, as its rank may be higher")
    allocator: AllocatorSection = field(default_factory=AllocatorSection)
    results_dir: str = output("results", help="parent of the run folder, <results_dir>/<arch>", aliases=("output_dir",))
    log_dir: str = option("log", path="folder", help="parent of logs_<time>/ (config, training.log, final_summary)")
    resume: bool = option(False, help="continue from the last complete checkpoint for --epochs more")
    overwrite: bool = option(False, help="delete an earlier run in the folder and start over", group="output")
    bf16: bool = option(False, help="use bf16 autocast")
    device: str = option("auto", help=DEVICE)
    num_workers: int = option(0, least=0, help="processes that read features")
    seed: int = seeded(42, help="random seed of the 80/10/10 split by image, initial values and order")


@dataclass(frozen=True)
class FactorCompareConfig(Options):
    """Compare trained networks with three SVDs and a shared PCA, on the test images, at equal rank.

    rankwise features compare --results_dir runs/features
    """

    arch: list[str] = option([], help="networks [all in --results_dir]", group="model")
    rank: int | None = option(least=1, help="rank of the baselines [the networks']", aliases=("r",))
    results_dir: str = output("results", help="folder of the networks", aliases=("output_dir",))
    features: str | None = reads(help=TRAINED_ON, aliases=("cache", "data_path"))
    ood: str | None = reads(help="out-of-distribution cache: other images, same model", aliases=("ood_features",))
    sweep: list[int] = option([8, 16, 32, 64, 128], least=1, help="ranks of the sweep, of leading channels")
    batch_size: int = option(64, least=1, help="matrices per timed batch")
    repeats: int = option(3, least=1, help="timed passes; the fastest counts")
    no_plots: bool = option(False, help=NO_PNG, group="output")
    device: str = option("auto", help=DEVICE)
    seed: int = seeded(42, help="random seed of the randomized SVD")


@dataclass(frozen=True)
class FactorShowConfig(Options):
    """Plot one image's channels: original, network, SVD, and the errors of both.

    rankwise features show --results_dir runs/features --arch MLP
    """

    arch: str = option("ResMLP", help=ARCH_HELP, group="model")
    image_idx: int = option(0, help="index of the test image")
    rank: int | None = option(least=1, help="maximum rank of network and SVD [the network's]", aliases=("r",))
    results_dir: str = output("results", help="folder of the networks", aliases=("output_dir",))
    features: str | None = reads(help=TRAINED_ON, aliases=("cache", "data_path"))
    channels: int = option(8, least=1, most=32, help="number of leading channels")
    device: str = option("auto", help=DEVICE)


@dataclass(frozen=True)
class DownstreamConfig(Options):
    """Score a model's answers with factors in place of its visual features.

    rankwise features downstream runs/tiny/base --data_path runs/labelled -o runs/downstream
    """

    model_name: str | None = reads_or_hub(
        help="vision-language model (or an adapter or run folder) that the features came from",
        aliases=("model", "model_path", "base_model"),
    )
    base_model_id: str | None = reads_or_hub(help="base of an adapter [as recorded in it]")
    data_path: str | None = reads_or_hub(
        help="conversations with images: questions and reference answers", group="data"
    )
    image_folder: str | None = reads(help=IMAGE_FOLDER)
    allow_outside: bool = option(False, help=OUTSIDE, group="data")
    image_size: int | None = option(
        least=1,
        help="side of the square to stretch images to [as in the networks' cache, else unresized]",
        group="data",
    )
    arch: list[str] = option(
        [], help="networks [all in --results_dir; if there are none, baselines only]", group="model"
    )
    results_dir: str = output(
        "results", help="folder of the networks, and for downstream.json", aliases=("output_dir",)
    )
    ranks: list[int] = option([], least=1, help="ranks of the baselines [the networks', or a quarter, half and all]")
    num_samples: int | None = option(least=1, help="number of rows, in file order [all]", group="data")
    batch_size: int = option(16, least=1, help="rows per forward pass")
    dtype: str = option("auto", choices=DTYPES, help="precision of the model", group="model")
    no_plots: bool = option(False, help=NO_PNG, group="output")
    device: str = option("auto", help=DEVICE)
    seed: int = seeded(42, help="random seed of the bootstrap")
