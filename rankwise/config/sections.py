"""The options that commands share: each section is one dataclass, used by as many commands as need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.options import option

TASKS = ("e2e_nlg", "samsum", "wikisql", "multi_nli", "labels", "cota", "conversations")
SCORED_TASKS = ("e2e_nlg", "samsum", "wikisql", "multi_nli", "labels", "cota", "conversations")
SPLITS = ("train", "dev", "test", "dev_matched", "dev_mismatched")
TOWERS = ("language", "vision", "projector", "depth", "unknown")
TRAINED_TOWERS = ("language", "vision", "projector")
TRAINERS = ("peft", "axolotl", "swift", "unsloth", "llamafactory")
DEPTH_CONTROLS = ("estimated", "off", "shuffled", "constant", "luminance", "ramp", "permuted", "file")
MAX_SEQ_LENGTH, OVERLONG = 2048, "error"  # where neither an option nor a record says otherwise
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSection:
    """Which model, and how it is loaded."""

    model_name: str | None = option(
        help="base model: folder or hub id", aliases=("model_path", "base_model", "model_name_or_path")
    )
    revision: str | None = option(help="hub revision (a commit hash where remote code is allowed)")
    trust_remote_code: bool = option(False, help="run the repository's own code; needs --revision COMMIT")
    dtype: str = option(
        "auto",
        choices=DTYPES,
        help="auto: trained weights float32, frozen ones bf16 on a GPU and float32 on a CPU",
    )
    attn_implementation: str | None = option(help="attention kernel (sdpa, eager, flash_attention_2 …)")


@dataclass(frozen=True)
class DataSection:
    """Which rows, and how they become tokens."""

    task: str | None = option(help="kind of data [as the data show it]", choices=TASKS, aliases=("dataset",))
    data_path: str | None = option(help="file, folder or hub id of the data", aliases=("dataset_dir",))
    prompt: str = option(
        "auto",
        choices=("auto", "sections", "chat", "raw"),
        help="headed sections, the chat template, or the texts alone; auto: as trained (input.json), else the "
        "template where the model has one and every row is a conversation",
    )
    chat_template: str | None = option(
        help="Jinja chat template, a file or the text itself [as trained; the model's own]"
    )
    chat_template_kwargs: dict[str, Any] | None = option(
        help='variables for the chat template, as JSON: {"enable_thinking": false} [as trained]'
    )
    max_seq_length: int | None = option(
        help=f"tokens of one sample, prompt and answer [as trained; the model's own, else {MAX_SEQ_LENGTH}]",
        aliases=("max_length",),
    )
    overlong: str | None = option(
        choices=("error", "drop", "truncate_source"), help=f"samples over the limit [as trained; {OVERLONG}]"
    )
    skip_bad: bool = option(False, help="leave broken rows out, counted, instead of stopping at the first")
    image_folder: str | None = option(help="where the rows' image paths start [the folder of the data file]")
    allow_outside: bool = option(False, help="read images by absolute paths, `..` and links out of the image folder")
    allow_urls: bool = option(False, help="fetch images by http(s) from public addresses")
    repeat_image: bool = option(False, help="one image may fill several <image> placeholders of a row")
    image_first: bool = option(False, help="images of a row without placeholders come before its first question")
    roles: list[str] = option(
        [], help="who speaks in conversations, where rows have other names: pupil=user,coach=assistant"
    )
    aux_reason: bool = option(
        False, help="labels: learn the teacher's reason too, as the answer to a second question; never in the prompt"
    )
    download: bool = option(False, help="fetch the official files that the folder --data_path lacks (extra: data)")
    device_target: str | None = option(
        help="device.json or a folder with one: images and prompts as on that device; off: without one [as trained; "
        "the one beside the data or the model, where there is one]"
    )


@dataclass(frozen=True)
class SpectrumSection:
    """From a delta to a rank."""

    svd_threshold: float = option(0.9, help="energy (share of Σσ²) that a rank must keep", aliases=("energy",))
    min_rank: int = option(4, help="smallest rank of a site")
    max_rank: int = option(128, help="largest rank of a site; also how many singular values are computed")
    smoothing_factor: float = option(0.8, help="0: each layer its own rank; 1: one rank per projection type")
    round: str = option("none", choices=("none", "power-of-two", "multiple-of-8"), help="applied last")
    per: str = option("site", choices=("site", "type"), help="one rank per matrix, or per projection type")
    budget: str | None = option(help="N parameters, uniform:R, or 0.5% of the analysed matrices: the allocator")
    normalise: str = option("none", choices=("none", "site"), help="budget by absolute energy or by each site's share")
    noise_floor: str = option(
        "none", choices=("none", "gavish-donoho", "marchenko-pastur"), help="cut noise before the energy rule"
    )
    exact: bool = option(False, help="every singular value from the Gram matrix, no sketch")


@dataclass(frozen=True)
class SitesSection:
    """Which matrices are analysed, and how the two checkpoints' names are brought together."""

    include: str | None = option(help="regex of site paths to analyse")
    exclude: str | None = option(help="regex of site paths to leave out")
    towers: list[str] = option(["language"], choices=TOWERS, help="comma-separated")
    rename: list[str] = option([], commas=False, help="REGEX=TEXT applied to the checkpoints' keys; repeatable")
    allow_unmatched: bool = option(False, help="analyse what matches, list and count the rest")
    flatten_conv: bool = option(False, help="analyse convolutions as (out, rest) matrices")


@dataclass(frozen=True)
class LoraSection:
    """What is adapted, with which rank and scale."""

    lora_config: str | None = option(help="rank plan (lora_rank_config.json)", aliases=("plan",))
    lora_r: int = option(16, help="rank where no plan is given", aliases=("r",))
    lora_alpha: float | None = option(
        help="scale numerator [2·r; with rsLoRA 2·(largest rank)]; with a plan the plan owns the scale"
    )
    lora_dropout: float = option(0.05, help="dropout on the adapter's input")
    lora_bias: str = option("none", choices=("none", "all", "lora_only"), help="which biases train")
    target: str | None = option(
        choices=("attention_only", "mlp_only", "both", "all"),
        help="q, v · gate, up, down · all seven · every linear",
    )
    target_modules: list[str] = option([], help="projection names or full paths, in the trained towers only")
    use_rslora: bool = option(False, help="scale alpha/√r instead of alpha/r (where no plan is given)")
    use_dora: bool = option(False, help="weight-decomposed variant")
    init_lora_weights: str = option(
        "default",
        choices=("default", "gaussian", "pissa", "olora", "eva", "loftq", "orthogonal"),
        help="PEFT's initialisations",
    )
    loraplus_lr_ratio: float | None = option(help="LoRA+: learning rate of B over that of A")
    warm_start: str = option("none", choices=("none", "delta"), help="start from the preliminary run's delta")
    deltas: str | None = option(help="the preliminary run, for --warm_start delta")
    load_in_8bit: bool = option(False, help="8-bit base (extra: quant)")
    load_in_4bit: bool = option(False, help="4-bit base, NF4 (extra: quant)")


@dataclass(frozen=True)
class AllocationSection:
    """Training divides the ranks among the matrices. The names are those of the feature networks' allocator."""

    allocator: str = option(
        "none",
        choices=("none", "adalora"),
        help="adalora: training moves rank to where it counts (AdaLoRA); --lora_r is the mean rank that comes out",
    )
    allocator_keep_ratio: float = option(
        0.5, help="share of the ranks that is left at the end: every matrix starts with --lora_r ÷ it"
    )
    allocator_init_warmup: int | None = option(
        help="optimizer steps with all ranks before the first mask [a tenth of all steps]"
    )
    allocator_final_warmup: int | None = option(
        help="optimizer steps at the end with the final ranks [three tenths of all steps]"
    )
    allocator_mask_interval: int | None = option(help="optimizer steps between masks [a hundredth of all steps]")
    allocator_orth: float = option(0.5, help="weight of AdaLoRA's orthogonality term in the training loss")


@dataclass(frozen=True)
class TowersSection:
    """What happens to each tower of a vision-language model. A tower that is named in no list keeps its default."""

    freeze: list[str] = option([], choices=TRAINED_TOWERS, help="towers that stay as they are: vision and projector do")
    lora: list[str] = option([], choices=TRAINED_TOWERS, help="towers that get an adapter (train: language does)")
    full: list[str] = option([], choices=TRAINED_TOWERS, help="towers trained in full (finetune: language is)")
    language_lr: float | None = option(help="learning rate of the language tower [--learning_rate]")
    vision_lr: float | None = option(help="learning rate of the vision tower [--learning_rate]")
    projector_lr: float | None = option(help="learning rate of the projector [--learning_rate]")


@dataclass(frozen=True)
class DepthUseSection:
    """Where a depth-aware model gets depth from."""

    depth_checkpoint_path: str | None = option(
        help="Depth Anything V2: .pth, Hugging Face folder or id [Small, Apache-2.0; of a trained model: its own]"
    )
    depth_control: str | None = option(
        choices=DEPTH_CONTROLS,
        help="what stands in for estimated depth, with the same parameters; file: --depth_maps [as trained]",
    )
    depth_maps: str | None = option(help="16-bit PNG depth (far = large): a folder, or a CSV image_path,depth_path")
    depth_cache: str | None = option(help="folder of computed maps [~/.cache/rankwise/depth]")


@dataclass(frozen=True)
class DepthSection(DepthUseSection):
    """Depth of each image token, added to the projector's output."""

    use_depth: bool = option(False, help="train with depth (models with image tokens on a grid)")
    depth_alpha: float = option(100.0, help="depth in [0, 1] is multiplied by it before the encoding")
    depth_input_size: int = option(518, help="shorter side of an image as the estimator sees it, in pixels")
    depth_gate: str = option(
        "learned", choices=("learned", "none"), help="learned: a scalar that starts at 0; none: 1, as first documented"
    )
    depth_lr: float | None = option(help="learning rate of the learned gate [0.03: it has far to go from 0]")
    depth_layout: str = option("split", choices=("split", "interleaved"), help="sines before cosines, or by turns")


@dataclass(frozen=True)
class EstimateSection:
    """Memory, time and cost of a run, before anything of it runs."""

    estimate: bool = option(False, help="print memory, time, cost and the largest batch that fits, and stop")
    gpu: str | None = option(help="a card (rtx4090, a100-80gb, …) or a memory size (24GB) [this machine]")
    usd_per_hour: float | None = option(help="price of the machine, for the cost")
    utilisation: float | None = option(
        help="share of the card's rates that training reaches [0.6 of a data sheet's]", aliases=("utilization",)
    )
    estimate_out: str | None = option(help="also write the estimate to this JSON file")


@dataclass(frozen=True)
class PhasesSection:
    """Which sites train when, and what is recorded of their gradients."""

    dynamic_lora: bool = option(False, help="train in phases, by --phase_strategy")
    phase_strategy: str | None = option(
        help="both-mlp-attn (recommended), attn-mlp-both, both-mlp-both, early-late[@LAYER], lisa:K@N, norm:N"
    )
    phase1_end: int = option(300, help="optimizer steps after which the first phase ends")
    phase2_end: int = option(600, help="optimizer steps after which the second phase ends, where there is a third")
    schedule: str | None = option(help="phases in the general form: 'both:300 > mlp layers 0-10:300 > attention'")
    phase_state: str = option(
        "keep", choices=("keep", "reset"), help="a site's optimizer state when it becomes active again"
    )
    log_frequency: int | None = option(
        help="gradient norms every N optimizer steps, 0: none [every step; site by site at steps 1 % apart]"
    )
    no_plots: bool = option(False, help="no PNG files")


@dataclass(frozen=True)
class SelectionSection:
    """Which checkpoint is kept, when training has gone on long enough, and how often rare classes are seen."""

    select: str | None = option(
        choices=("loss", "accuracy"),
        help="keep the checkpoint with the best validation loss, or accuracy on rows with a class [the last one]",
    )
    select_by: str = option(
        "likelihood",
        choices=("likelihood", "generation"),
        help="accuracy of the likeliest label, or of the one that up to 32 generated tokens name",
    )
    early_stopping: int | None = option(
        help="stop after N evaluations without a better one, by loss or by --select [0: off]"
    )
    balance: str = option(
        "none",
        choices=("none", "oversample", "sqrt"),
        help="rows of rarer classes again: until all classes are equal, or half-way there",
    )


@dataclass(frozen=True)
class GenerationSection:
    """How answers are generated."""

    max_new_tokens: int = option(128, help="longest answer")
    num_beams: int = option(1, help="beams")
    length_penalty: float = option(1.0, help="of beam search")
    do_sample: bool = option(False, help="sample instead of greedy")
    temperature: float = option(1.0, help="of sampling")
    top_p: float = option(1.0, help="of sampling")


@dataclass(frozen=True)
class ScoredData(DataSection):
    """Rows of a task that has scores."""

    task: str | None = option(
        help="e2e_nlg, samsum, wikisql, multi_nli, labels, cota, conversations, or lm_eval:NAME of the evaluation "
        "harness [as the data show it]",
        aliases=("dataset",),
    )
    max_seq_length: int | None = option(
        help=f"tokens of a prompt; room for the answer comes on top [as trained; {MAX_SEQ_LENGTH}]",
        aliases=("max_length",),
    )
    overlong: str | None = option(
        "truncate_source", choices=("error", "drop", "truncate_source"), help="prompts over the limit"
    )
