"""The options of `rankwise features …`: low-rank factors of visual features."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.options import option

ARCHITECTURES = ("ResMLP", "MLP", "AdaLoRA", "Subspace")
ARCH_HELP = "network: ResMLP, MLP, AdaLoRA (documented), Subspace (ours: close to the optimum, faster than exact)"
CACHE = "feature_cache_real"


@dataclass(frozen=True)
class AllocatorSection:
    """AdaLoRA's rank allocator: how many ranks act, from all of them down to a share."""

    use_rank_allocator: bool = option(False, help="mask rank channels during training (AdaLoRA)")
    allocator_init_warmup: int = option(1000, help="optimizer steps with all ranks before the first mask")
    allocator_final_warmup: int = option(1000, help="optimizer steps at the end with the final ranks")
    allocator_mask_interval: int = option(20, help="optimizer steps between masks")
    allocator_keep_ratio: float = option(0.25, help="share of the ranks that is left at the end")


@dataclass(frozen=True)
class CaptureConfig:
    """Visual features of images, as a model's language part gets them or an encoder gives them, into a cache."""

    model_name: str | None = option(
        help="vision-language model, or vision encoder (DINOv2, SigLIP, CLIP, ViT …): folder or hub id",
        aliases=("model", "model_path", "base_model"),
    )
    revision: str | None = option(help="hub revision")
    images: str | None = option(
        help="folder of images, parquet file with an image column, or a `datasets` folder or id"
    )
    output_dir: str = option(CACHE, help="feature cache: sharded safetensors with an index", short="-o")
    image_size: int | None = option(
        help="pictures are stretched to a square of this side [448; as the model's device.json; an encoder's own size]"
    )
    native: bool = option(False, help="pictures go to the processor as they are (they must give equal token counts)")
    num_images: int | None = option(help="first N images, in name order")
    batch_size: int = option(8, help="images per forward pass")
    shard_size: int = option(64, help="images per file")
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the model")
    cache_dtype: str = option("float32", choices=("float32", "bfloat16", "float16"), help="precision on disk")
    synthetic: int | None = option(help="no model: N matrices with a known spectrum")
    tokens: int = option(256, help="of --synthetic: tokens of a matrix")
    channels: int = option(2048, help="of --synthetic: channels of a token")
    spectrum: str = option("power:0.7", help="of --synthetic: power:A (σᵢ = i^-A), exp:A (σᵢ = e^-Ai), flat, rank:R")
    smooth: bool = option(
        False, help="of --synthetic: tokens that lie together are alike, in the same way in every matrix"
    )
    shared: float = option(0.5, help="of --synthetic: share of the energy in directions that all matrices share")
    skip_bad: bool = option(False, help="leave out pictures that cannot be read, and list them in the index")
    overwrite: bool = option(False, help="delete an earlier capture in the folder and start over")
    device: str = option("auto", help="auto, cpu or cuda")
    seed: int = option(42, help="seed of --synthetic")


@dataclass(frozen=True)
class FactorTrainConfig:
    """Train a network that predicts low-rank factors of a feature matrix."""

    arch: str = option("ResMLP", help=ARCH_HELP)
    features: str = option(CACHE, help="feature cache, or a folder of features_{i}.pt", aliases=("cache", "data_path"))
    epochs: int = option(20, help="epochs; with --resume, additional epochs", aliases=("num_train_epochs",))
    lr: float = option(1e-4, help="learning rate of AdamW", aliases=("learning_rate",))
    rank: int = option(128, help="rank of the factors", aliases=("r",))
    batch_size: int = option(8, help="matrices per step", aliases=("per_device_train_batch_size",))
    lambda_B: float = option(1e-4, help="weight of mean(B²) in the loss", aliases=("lambda_b",))
    lambda_ortho: float = option(1e-3, help="weight of ‖AᵀA/T − I‖²/r² in the loss; AdaLoRA: of its layers' own")
    activation_orth_regu_A: float = option(
        0.0, help="AdaLoRA: weight of ‖AᵀA/T − I‖²/r² beside its layers'", aliases=("activation_orth_regu_a",)
    )
    weight_decay: float = option(1e-5, help="of AdamW")
    patience: int = option(10, help="stop after so many epochs without a better validation MSE; 0: off")
    dropout: float = option(0.1, help="inside the networks")
    refine: bool = option(False, help="a refinement after A·B; it is scored apart, since its rank may be higher")
    allocator: AllocatorSection = field(default_factory=AllocatorSection)
    results_dir: str = option(
        "results", help="the run folder is <results_dir>/<arch>", short="-o", aliases=("output_dir",)
    )
    log_dir: str = option("log", help="logs_<time>/ with config, training.log and final_summary go here")
    resume: bool = option(False, help="go on from the last complete checkpoint for --epochs more")
    overwrite: bool = option(False, help="delete an earlier run in the folder and start over")
    bf16: bool = option(False, help="bf16 autocast")
    device: str = option("auto", help="auto, cpu or cuda")
    num_workers: int = option(0, help="processes that read features")
    seed: int = option(42, help="split 80/10/10 by image, initial values, order")


@dataclass(frozen=True)
class FactorCompareConfig:
    """Trained networks against the SVD three ways and a shared PCA, on the test images, at equal rank."""

    arch: list[str] = option([], help="networks [all in --results_dir]")
    rank: int | None = option(help="rank of the baselines [the networks' own]", aliases=("r",))
    results_dir: str = option("results", help="where the networks are", short="-o", aliases=("output_dir",))
    features: str | None = option(help="feature cache [the one trained on]", aliases=("cache", "data_path"))
    ood: str | None = option(
        help="a feature cache of another image source, of the same model", aliases=("ood_features",)
    )
    sweep: list[int] = option([8, 16, 32, 64, 128], help="ranks of the sweep; a network gives its leading channels")
    batch_size: int = option(64, help="matrices per batch while timing")
    repeats: int = option(3, help="timed passes; the fastest counts")
    no_plots: bool = option(False, help="no PNG files")
    device: str = option("auto", help="auto, cpu or cuda")
    seed: int = option(42, help="of the randomized SVD")


@dataclass(frozen=True)
class FactorShowConfig:
    """Pictures of one image's channels: original, network, SVD, and what each of the two misses."""

    arch: str = option("ResMLP", help=ARCH_HELP)
    image_idx: int = option(0, help="number of the test image")
    rank: int | None = option(help="rank of network and SVD, at most [the network's own]", aliases=("r",))
    results_dir: str = option("results", help="where the networks are", short="-o", aliases=("output_dir",))
    features: str | None = option(help="feature cache [the one trained on]", aliases=("cache", "data_path"))
    channels: int = option(8, help="first N channels")
    device: str = option("auto", help="auto, cpu or cuda")


@dataclass(frozen=True)
class DownstreamConfig:
    """Does the answer survive? The features inside the model are replaced by their factors' product."""

    model_name: str | None = option(
        help="vision-language model (or an adapter or run folder): the one the features came from",
        aliases=("model", "model_path", "base_model"),
    )
    base_model_id: str | None = option(help="base of an adapter [as recorded in it]")
    data_path: str | None = option(help="conversations with images: questions and right answers")
    image_folder: str | None = option(help="where the rows' image paths start [the folder of the data file]")
    allow_outside: bool = option(False, help="read images by absolute paths, `..` and links out of the image folder")
    image_size: int | None = option(
        help="pictures are stretched to a square of this side [as the networks' cache was captured, else as they are]"
    )
    arch: list[str] = option([], help="networks [all in --results_dir; none there: the baselines alone]")
    results_dir: str = option(
        "results", help="where the networks are, and downstream.json goes", short="-o", aliases=("output_dir",)
    )
    ranks: list[int] = option([], help="ranks of the baselines [the networks' own, or a quarter, half and all]")
    num_samples: int | None = option(help="first N rows")
    batch_size: int = option(16, help="rows per forward pass")
    dtype: str = option("auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the model")
    no_plots: bool = option(False, help="no PNG files")
    device: str = option("auto", help="auto, cpu or cuda")
    seed: int = option(42, help="of the bootstrap")
