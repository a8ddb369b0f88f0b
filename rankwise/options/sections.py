"""The options that commands share: each section is one dataclass, used by as many commands as need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rankwise.options.field import Options, option, reads, reads_model, reads_or_hub, reads_or_text, seeded

TASKS = ("e2e_nlg", "samsum", "wikisql", "multi_nli", "labels", "cota", "conversations")
SCORED_TASKS = TASKS  # each has a scorer
CONVERSATIONS = ("conversations", "cota", "labels")  # sources whose rows are conversations, and may have images
HARNESS = "lm_eval:"
SPLITS = ("train", "dev", "test", "dev_matched", "dev_mismatched")
TOWERS = ("language", "vision", "projector", "depth", "unknown")
TRAINED_TOWERS = ("language", "vision", "projector")
TRAINERS = ("peft", "axolotl", "swift", "unsloth", "llamafactory")
TARGETS = ("attention_only", "mlp_only", "both", "all", "experts")
PHASE_STATES = ("keep", "reset")
CLASSIFY = ("likelihood", "generation")
IF_OVERLONG = ("error", "drop", "truncate_source")
DEPTH_GATES, DEPTH_LAYOUTS = ("learned", "none"), ("split", "interleaved")
DEPTH_CONTROLS = ("estimated", "off", "shuffled", "constant", "luminance", "ramp", "permuted", "file")
MAX_SEQ_LENGTH, OVERLONG = 2048, "error"  # where neither an option nor a record says otherwise
OUTTYPES = ("f32", "f16", "bf16", "q8_0")  # what llama.cpp's converter writes
OF_EXTRA_TRACK = ("trackio", "tensorboard", "wandb")  # what pip install rankwise[track] brings
DROPOUT = 0.05  # of LoRA, where nothing is said and PEFT can
DTYPES = ("auto", "float32", "bfloat16", "float16")
SEED, DEVICE, NO_PNG = "random seed", "auto, cpu or cuda", "write no PNG files"
NORMALISE = "allocate by absolute energy, or by share per site"
OUTSIDE = "allow image paths that are absolute or lead out of the image folder (.., links)"
IMAGE_FOLDER = "folder that the rows' image paths are relative to [the data file's]"


def is_harness(task: str | None) -> bool:
    return bool(task) and str(task).startswith(HARNESS)


@dataclass(frozen=True)
class ModelSection(Options):
    """Which model, and how it is loaded."""

    group = "model"

    model_name: str | None = reads_model(
        help="base model: folder, hub id or GGUF file", aliases=("model_path", "base_model", "model_name_or_path")
    )
    revision: str | None = option(help="hub revision (a commit hash where remote code is allowed)")
    trust_remote_code: bool = option(False, help="run the repository's own code; needs --revision COMMIT")
    dtype: str = option(
        "auto",
        choices=DTYPES,
        help="precision; auto: float32 for trained weights, for frozen ones bfloat16 on a GPU and float32 on a CPU",
    )
    attn_implementation: str | None = option(help="attention kernel (sdpa, eager, flash_attention_2 …)")


@dataclass(frozen=True)
class DataSection(Options):
    """Which rows, and how they become tokens."""

    group = "data"

    task: str | None = option(help="kind of data [detected from the rows]", choices=TASKS, aliases=("dataset",))
    data_path: str | None = reads_or_hub(help="data: file, folder or hub id", aliases=("dataset_dir",))
    prompt: str = option(
        "auto",
        choices=("auto", "sections", "chat", "raw"),
        help="prompt format: headed sections, chat template or plain text; auto: as trained (input.json), else the "
        "chat template if the model has one and every row is a conversation",
    )
    chat_template: str | None = reads_or_text(help="Jinja chat template, as file or text [as trained; the model's own]")
    chat_template_kwargs: dict[str, Any] | None = option(
        help='variables for the chat template, as JSON: {"enable_thinking": false} [as trained]'
    )
    max_seq_length: int | None = option(
        least=1,
        help=f"maximum tokens per sample, prompt and answer [as trained; the model's maximum, else {MAX_SEQ_LENGTH}]",
        aliases=("max_length",),
    )
    overlong: str | None = option(
        choices=IF_OVERLONG,
        help=f"what to do with samples over --max_seq_length [as trained; {OVERLONG}]",
    )
    skip_bad: bool = option(False, help="skip and count malformed rows instead of stopping at the first")
    image_folder: str | None = reads(help=IMAGE_FOLDER)
    allow_outside: bool = option(False, help=OUTSIDE)
    allow_urls: bool = option(False, help="fetch images by http(s), from public addresses only")
    repeat_image: bool = option(False, help="let one image fill several <image> placeholders of a row")
    image_first: bool = option(False, help="put images of a row without placeholders before its first question")
    roles: list[str] = option([], help="map other role names of conversations: pupil=user,coach=assistant")
    aux_reason: bool = option(False, help="labels: also train on the teacher's reason, as answer to a second question")
    download: bool = option(False, help="download official files missing from --data_path (extra: data)")
    device_target: str | None = reads_or_text(
        help="device.json, or a folder with one: preprocess images and prompts as on that device; off: ignore it [as "
        "trained; the one beside the data or the model]"
    )


@dataclass(frozen=True)
class SpectrumSection(Options):
    """From a delta to a rank."""

    svd_threshold: float = option(
        0.9, above=0, most=1, help="energy (share of Σσ²) that each rank keeps", aliases=("energy",)
    )
    min_rank: int = option(4, least=0, help="minimum rank per site")
    max_rank: int = option(128, least=1, help="maximum rank per site; also the number of singular values computed")
    smoothing_factor: float = option(
        0.8, least=0, most=1, help="smoothing across layers; 0: a rank per layer, 1: one rank per projection type"
    )
    round: str = option("none", choices=("none", "power-of-two", "multiple-of-8"), help="rank rounding, applied last")
    per: str = option("site", choices=("site", "type"), help="one rank per matrix, or per projection type")
    budget: str | None = option(help="parameter budget to allocate: N, uniform:R, or 0.5% of the analysed matrices")
    normalise: str = option("none", choices=("none", "site"), help=NORMALISE)
    noise_floor: str = option(
        "none", choices=("none", "gavish-donoho", "marchenko-pastur"), help="noise cut before the energy threshold"
    )
    exact: bool = option(False, help="compute all singular values from the Gram matrix instead of a sketch")


@dataclass(frozen=True)
class SitesSection(Options):
    """Which matrices are analysed, and how the two checkpoints' names are brought together."""

    include: str | None = option(help="regex of sites to analyse")
    exclude: str | None = option(help="regex of sites to skip")
    towers: list[str] = option(["language"], choices=TOWERS, help="towers to analyse, comma-separated")
    rename: list[str] = option([], commas=False, help="REGEX=TEXT to apply to checkpoint keys; repeatable")
    allow_unmatched: bool = option(False, help="analyse matching tensors; list and count the rest")
    flatten_conv: bool = option(False, help="analyse convolutions as (out, rest) matrices")


@dataclass(frozen=True)
class LoraSection(Options):
    """What is adapted, with which rank and scale."""

    group = "method"

    lora_config: str | None = reads(help="rank plan (lora_rank_config.json)", aliases=("plan",))
    lora_r: int = option(16, least=1, help="rank without a plan", aliases=("r",))
    lora_alpha: float | None = option(
        help="alpha, the scale's numerator [2·r; with rsLoRA 2·(maximum rank)]; a plan sets its own"
    )
    lora_dropout: float | None = option(
        least=0, below=1, help=f"dropout on the adapter input [{DROPOUT}; 0 where experts are adapted]"
    )
    lora_bias: str = option("none", choices=("none", "all", "lora_only"), help="biases to train")
    target: str | None = option(
        choices=TARGETS,
        help="matrices to adapt: q, v · gate, up, down · every layer's attention, MLP, mixer · all linear · experts",
    )
    target_modules: list[str] = option([], help="projection names or full paths to adapt, in the trained towers")
    use_rslora: bool = option(False, help="scale by alpha/√r instead of alpha/r (without a plan)")
    use_dora: bool = option(False, help="train weight-decomposed adapters (DoRA)")
    init_lora_weights: str = option(
        "default",
        choices=("default", "gaussian", "pissa", "olora", "eva", "loftq", "orthogonal"),
        help="initialisation, by PEFT",
    )
    loraplus_lr_ratio: float | None = option(help="LoRA+: ratio of B's learning rate to A's")
    warm_start: str = option("none", choices=("none", "delta"), help="initialise from the preliminary run's delta")
    deltas: str | None = reads(help="preliminary run for --warm_start delta")
    load_in_8bit: bool = option(False, help="quantize the base to 8 bit (extra: quant)")
    load_in_4bit: bool = option(False, help="quantize the base to 4 bit, NF4 (extra: quant)")

    @property
    def dropout(self) -> float:
        """Of layers, where nothing is said; PEFT has none for parameters."""
        return DROPOUT if self.lora_dropout is None else self.lora_dropout


@dataclass(frozen=True)
class ArmSection(Options):
    """One adapter of `train --arms`; what it does not say is as the command says."""

    name: str = option("", help="name: its folder within the run folder")
    rank: int | None = option(least=1, help="rank at every adapted matrix [--lora_r]", aliases=("lora_r", "r"))
    plan: str | None = reads(help="rank plan [--lora_config]", aliases=("lora_config",))
    learning_rate: float | None = option(above=0, help="learning rate [--learning_rate]", aliases=("lr",))
    seed: int | None = seeded(None, help="seed of initialisation and order of the rows [--seed]")
    scale: float | None = option(above=0, help="scale of B·A: alpha/r, with rsLoRA alpha/√r [2, or the plan's]")


@dataclass(frozen=True)
class AllocationSection(Options):
    """Training divides the ranks among the matrices. The names are those of the feature networks' allocator."""

    allocator: str = option(
        "none",
        choices=("none", "adalora"),
        help="adalora: reallocate rank during training (AdaLoRA); --lora_r is the mean final rank",
    )
    allocator_keep_ratio: float = option(
        0.5, above=0, below=1, help="final share of the ranks: every matrix starts with --lora_r ÷ it"
    )
    allocator_init_warmup: int | None = option(least=0, help="optimizer steps before the first mask [a tenth of all]")
    allocator_final_warmup: int | None = option(
        least=0, help="last optimizer steps, at the final ranks [three tenths of all steps]"
    )
    allocator_mask_interval: int | None = option(least=1, help="optimizer steps between masks [a hundredth of all]")
    allocator_orth: float = option(0.5, least=0, help="weight of AdaLoRA's orthogonality loss")


@dataclass(frozen=True)
class TowersSection(Options):
    """What happens to each tower of a vision-language model. A tower that is named in no list keeps its default."""

    freeze: list[str] = option([], choices=TRAINED_TOWERS, help="towers to freeze [vision, projector]")
    lora: list[str] = option(
        [],
        choices=(*TRAINED_TOWERS, "router"),
        help="towers to adapt [train: language]; router: routers of experts, too",
    )
    full: list[str] = option([], choices=TRAINED_TOWERS, help="towers to train in full [finetune: language]")
    language_lr: float | None = option(least=0, help="learning rate of the language tower [--learning_rate]")
    vision_lr: float | None = option(least=0, help="learning rate of the vision tower [--learning_rate]")
    projector_lr: float | None = option(least=0, help="learning rate of the projector [--learning_rate]")


@dataclass(frozen=True)
class DepthUseSection(Options):
    """Where a depth-aware model gets depth from."""

    group = "method"

    depth_checkpoint_path: str | None = reads_or_text(
        help="Depth Anything V2: .pth, Hugging Face folder or id [Small, Apache-2.0; a trained model's own]"
    )
    depth_control: str | None = option(
        choices=DEPTH_CONTROLS,
        help="control condition instead of estimated depth, same parameters; file: --depth_maps [as trained]",
    )
    depth_maps: str | None = reads(help="16-bit PNG depth (far = large): folder, or CSV of image_path,depth_path")
    depth_cache: str | None = reads_or_text(help="cache folder for computed maps [~/.cache/rankwise/depth]")


@dataclass(frozen=True)
class DepthSection(DepthUseSection):
    """Depth of each image token, added to the projector's output."""

    use_depth: bool = option(False, help="train with depth (models with image tokens on a grid)")
    depth_alpha: float = option(100.0, above=0, help="factor on depth in [0, 1] before the encoding")
    depth_input_size: int = option(518, least=14, help="shorter image side for the depth estimator, in pixels")
    depth_gate: str = option("learned", choices=DEPTH_GATES, help="scalar gate: learned from 0, or constant 1")
    depth_lr: float | None = option(least=0, help="learning rate of the learned gate [0.03: it has far to go from 0]")
    depth_layout: str = option(
        "split", choices=DEPTH_LAYOUTS, help="sine and cosine channels in two blocks, or interleaved"
    )


@dataclass(frozen=True)
class EstimateSection(Options):
    """Memory, time and cost of a run, before anything of it runs."""

    group = "output"

    estimate: bool = option(False, help="print memory, time, cost and the maximum batch size, and stop")
    gpu: str | None = option(help="GPU (rtx4090, a100-80gb, …) or memory size (24GB) [this machine]")
    usd_per_hour: float | None = option(least=0, help="machine price in US dollars per hour")
    utilisation: float | None = option(
        above=0,
        most=1,
        help="utilisation: share of the GPU's peak rate that training reaches [0.6 of a data sheet's]",
        aliases=("utilization",),
    )
    estimate_out: str | None = option(path="file", help="JSON file to write the estimate to")


@dataclass(frozen=True)
class PhasesSection(Options):
    """Which sites train when, and what is recorded of their gradients."""

    dynamic_lora: bool = option(False, help="train in phases, by --phase_strategy")
    phase_strategy: str | None = option(
        help="both-mlp-attn (recommended), attn-mlp-both, both-mlp-both, early-late[@LAYER], lisa:K@N, norm:N"
    )
    phase1_end: int = option(300, help="optimizer step at which the first phase ends")
    phase2_end: int = option(600, help="optimizer step at which the second of three phases ends")
    schedule: str | None = option(help="phases in the general form: 'both:300 > mlp layers 0-10:300 > attention'")
    phase_state: str = option("keep", choices=PHASE_STATES, help="optimizer state of a site that is active again")
    log_frequency: int | None = option(
        least=0, help="optimizer steps between gradient norms, 0: none [1; per site at steps 1 % apart]"
    )
    no_plots: bool = option(False, help=NO_PNG)


@dataclass(frozen=True)
class SelectionSection(Options):
    """Which checkpoint is kept, when training has gone on long enough, and how often rare classes are seen."""

    select: str | None = option(
        choices=("loss", "accuracy"),
        help="keep the checkpoint with the best validation loss, or accuracy on rows with a class [the last one]",
    )
    select_by: str = option(
        "likelihood",
        choices=CLASSIFY,
        help="accuracy of the most likely label, or of the label in up to 32 generated tokens",
    )
    early_stopping: int | None = option(least=0, help="evaluations without improvement, by loss or --select [0: off]")
    balance: str = option(
        "none", choices=("none", "oversample", "sqrt"), help="oversample rare classes: fully, or by square root"
    )


@dataclass(frozen=True)
class GenerationSection(Options):
    """How answers are generated."""

    max_new_tokens: int = option(128, least=1, help="maximum tokens per answer")
    num_beams: int = option(1, least=1, help="number of beams")
    length_penalty: float = option(1.0, help="length penalty of beam search")
    do_sample: bool = option(False, help="sample instead of greedy decoding")
    temperature: float = option(1.0, above=0, help="sampling temperature")
    top_p: float = option(1.0, above=0, most=1, help="top-p of sampling")


@dataclass(frozen=True)
class ScoredData(DataSection):
    """Rows of a task that has scores."""

    task: str | None = option(
        help="e2e_nlg, samsum, wikisql, multi_nli, labels, cota, conversations, or lm_eval:NAME of the evaluation "
        "harness [detected from the rows]",
        aliases=("dataset",),
    )
    max_seq_length: int | None = option(
        least=1,
        help=f"maximum prompt tokens; the answer's come on top [as trained; {MAX_SEQ_LENGTH}]",
        aliases=("max_length",),
    )
    overlong: str | None = option(
        "truncate_source",
        choices=IF_OVERLONG,
        help="what to do with prompts over --max_seq_length",
    )
