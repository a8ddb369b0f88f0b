"""What every command can be told: one dataclass per section, one per command, made of sections.

Standard library only, so that `rankwise --help` answers at once. `options.py` turns these into flags and reads
config files; a stage receives the finished object. Defaults are the documented ones; where a document's value
belongs to its own workflow (r 128 of the depth guide, say) it lives in that workflow's recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rankwise.options import option

TASKS = ("e2e_nlg", "samsum", "wikisql", "multi_nli", "cota", "conversations")
SCORED_TASKS = ("e2e_nlg", "samsum", "wikisql", "multi_nli")
SPLITS = ("train", "dev", "test", "dev_matched", "dev_mismatched")
TOWERS = ("language", "vision", "projector", "depth", "unknown")
TRAINERS = ("peft", "axolotl", "swift", "unsloth", "llamafactory")
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

    task: str | None = option(help="kind of data", choices=TASKS, aliases=("dataset",))
    data_path: str | None = option(help="file, folder or hub id of the data", aliases=("dataset_dir",))
    prompt: str = option("sections", choices=("sections", "chat"), help="headed sections, or the chat template")
    max_seq_length: int = option(2048, help="tokens of one sample, prompt and answer", aliases=("max_length",))
    overlong: str = option(
        "error", choices=("error", "drop", "truncate_source"), help="what happens to samples over the limit"
    )
    skip_bad: bool = option(False, help="leave broken rows out, counted, instead of stopping at the first")
    download: bool = option(False, help="fetch the official files that the folder --data_path lacks (extra: data)")


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
class FinetuneConfig:
    """Short full-parameter fine-tune: a meaningful delta, not quality."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    output_dir: str = option("saved_models/preliminary_finetune", help="where the result goes", short="-o")
    subset_ratio: float = option(0.01, help="share of the rows, per task type")
    max_samples: int = option(1000, help="most rows to train on")
    learning_rate: float = option(2e-5, help="peak learning rate", aliases=("lr",))
    batch_size: int = option(1, help="rows per device and step", aliases=("per_device_train_batch_size",))
    gradient_accumulation: int = option(8, help="steps per update", aliases=("gradient_accumulation_steps",))
    num_epochs: float = option(1, help="passes over the subset", aliases=("num_train_epochs",))
    use_wandb: bool = option(False, help="log to Weights & Biases (extra: track)")
    seed: int = option(42, help="one seed for everything")
    save: str = option(
        "deltas",
        choices=("deltas", "checkpoints", "both"),
        help="float32 deltas, or pretrained/ and finetuned/",
    )
    method: str = option("full", choices=("full", "lora"), help="full parameters, or a cheap high-rank LoRA probe")
    lora_r: int = option(64, help="rank of the LoRA probe", aliases=("r",))
    skip_shards: int = option(0, help="leave out the rows of the first N subsets: disjoint data for a second probe")
    resume_from_checkpoint: str | None = option(help="checkpoint folder, or true for the newest complete one")
    allow_partial_resume: bool = option(False, help="resume although optimizer or random state is missing")
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RanksConfig:
    """Two checkpoints (or deltas, or one adapter) → spectra → rank plan."""

    base: str | None = option(help="base checkpoint: folder, file or hub id", aliases=("pretrained",))
    tuned: str | None = option(help="fine-tuned checkpoint", aliases=("finetuned",))
    deltas: str | None = option(help="a `rankwise finetune` folder: its float32 deltas")
    adapter: str | None = option(help="a LoRA adapter: its spectrum from the factors, never the dense matrix")
    out: str = option(".", help="below it: configs/ and analysis_outputs/svd/", short="-o", aliases=("output_dir",))
    spectrum: SpectrumSection = field(default_factory=SpectrumSection)
    sites: SitesSection = field(default_factory=SitesSection)
    signal: str = option(
        "delta",
        choices=("delta", "activation", "gradient", "uniform", "random"),
        help="what ranks are decided from",
    )
    metric: str = option("weight", choices=("weight", "activation", "loss"), help="what a singular direction is worth")
    probe2: list[str] = option([], help="further probes (folders with deltas, or checkpoints): repeatability")
    gain: str | None = option(help="held-out data: the share of the loss gain that the plan keeps")
    data: DataSection = field(default_factory=DataSection)
    model_name: str | None = option(help="model to run for --gain, --metric and --signal [the base]")
    num_samples: int = option(256, help="items of the data that --gain, --metric and --signal look at")
    batch_size: int = option(16, help="items per forward pass")
    emit: list[str] = option([], choices=TRAINERS, help="the plan as a config for another trainer")
    allow_noise: bool = option(False, help="plan although the delta is mostly rounding noise (the plan says so)")
    no_plots: bool = option(False, help="no PNG files")
    save_delta_weights: bool = option(False, help="also write the deltas as float32 safetensors")
    device: str = option("cpu", help="cpu or cuda")
    seed: int = option(42, help="seed of the sketch, the null spectra and the shuffles")


@dataclass(frozen=True)
class ExtractConfig:
    """Checkpoint pair → LoRA adapter, by truncated SVD of each delta."""

    base: str | None = option(help="base checkpoint", aliases=("pretrained",))
    tuned: str | None = option(help="fine-tuned checkpoint", aliases=("finetuned",))
    deltas: str | None = option(help="a `rankwise finetune` folder: its float32 deltas")
    plan: str | None = option(help="rank plan", aliases=("lora_config",))
    rank: int | None = option(help="one rank everywhere, instead of a plan", aliases=("r",))
    sites: SitesSection = field(default_factory=SitesSection)
    output_dir: str = option("extracted_adapter", help="adapter folder", short="-o")
    device: str = option("cpu", help="cpu or cuda")
    seed: int = option(42, help="seed of the sketch")


@dataclass(frozen=True)
class CompressConfig:
    """Adapter → smaller adapter, exact through QR of its factors."""

    adapter: str | None = option(help="adapter or run folder")
    energy: float | None = option(help="energy that every site keeps, 0 to 1")
    budget: str | None = option(help="N parameters, uniform:R, or 0.5%")
    normalise: str = option("none", choices=("none", "site"), help="budget by absolute energy or by each site's share")
    uniform: bool = option(False, help="zero-pad to one rank, no patterns: what hot swap and vLLM take")
    scale: float | None = option(help="scale of an adapter that comes without a config (loralib)")
    output_dir: str = option("compressed_adapter", help="adapter folder", short="-o")


@dataclass(frozen=True)
class LoraSection:
    """What is adapted, with which rank and scale."""

    lora_config: str | None = option(help="rank plan (lora_rank_config.json)", aliases=("plan",))
    lora_r: int = option(16, help="rank where no plan is given", aliases=("r",))
    lora_alpha: float | None = option(help="scale numerator [2·r]; with a plan the plan owns the scale")
    lora_dropout: float = option(0.05, help="dropout on the adapter's input")
    lora_bias: str = option("none", choices=("none", "all", "lora_only"), help="which biases train")
    target: str | None = option(
        choices=("attention_only", "mlp_only", "both", "all"),
        help="q, v · gate, up, down · all seven · every linear",
    )
    target_modules: list[str] = option([], help="projection names or full paths, in the trained towers only")
    use_rslora: bool = option(False, help="scale alpha/√r (where no plan is given)")
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
    log_frequency: int = option(1, help="gradient norms every N optimizer steps; 0: none")
    no_plots: bool = option(False, help="no PNG files")


@dataclass(frozen=True)
class TrainConfig:
    """LoRA/QLoRA training, with a rank plan or a uniform rank, in phases or not."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    lora: LoraSection = field(default_factory=LoraSection)
    phases: PhasesSection = field(default_factory=PhasesSection)
    output_dir: str = option("saved_models/dynamic_lora_model", help="adapter and run folder", short="-o")
    adapter_folder: str = option(
        ".", choices=(".", "final_model", "lora_adapter"), help="where in the run folder the adapter goes"
    )
    val_path: str | None = option(help="validation rows [a share of the training groups]")
    val_fraction: float = option(0.05, help="share of the groups held out where no --val_path is given")
    max_samples: int | None = option(help="most rows to train on", aliases=("num_samples",))
    packing: bool = option(False, help="several samples in a row of up to --max_seq_length tokens, kept apart")
    seed: int = option(42, help="one seed for everything")
    resume_from_checkpoint: str | None = option(help="checkpoint folder, or true for the newest complete one")
    allow_partial_resume: bool = option(False, help="resume although optimizer or random state is missing")
    training: dict[str, Any] = field(default_factory=dict)


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
        help="e2e_nlg, samsum, wikisql, multi_nli, or lm_eval:NAME of the evaluation harness", aliases=("dataset",)
    )
    overlong: str = option(
        "truncate_source", choices=("error", "drop", "truncate_source"), help="what happens to samples over the limit"
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a task with a base model, an adapter or a merged model; measure what was forgotten."""

    model_path: str | None = option(help="base model, merged model, adapter or run folder", aliases=("adapter",))
    base_model_id: str | None = option(help="base of an adapter [as recorded in it]", aliases=("base_model",))
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="which official split; MultiNLI's dev is dev_matched")
    num_samples: int | None = option(help="first N items, in file order")
    batch_size: int = option(16, help="prompts per step")
    generation: GenerationSection = field(default_factory=GenerationSection)
    classify: str = option(
        "likelihood", choices=("likelihood", "generation"), help="labels by log-likelihood, or the first one generated"
    )
    engine: str = option("transformers", choices=("transformers", "vllm"), help="what runs the model (extra: vllm)")
    forget: str | None = option(help="other text (.txt, .jsonl): KL from the base and perplexities on it")
    lm_eval_tasks_path: str | None = option(help="folder with task files of one's own, for lm_eval:NAME")
    num_fewshot: int | None = option(help="worked examples in a prompt, for lm_eval:NAME [the task's own number]")
    dtype: str = option("auto", choices=DTYPES, help="precision of the model")
    output_dir: str | None = option(help="where the scores go [evaluation/ below the model]", short="-o")
    device: str = option("auto", help="auto, cpu or cuda")
    seed: int = option(42, help="seed of sampling and of the bootstrap")


@dataclass(frozen=True)
class ProbeSection:
    """Where the deltas come from that plans are made of: finished runs, or short full fine-tunes of the study's own."""

    deltas: list[str] = option([], help="folders of finished `rankwise finetune` runs; seeds take them in turn")
    probes: int = option(1, help="own probes, each on rows of its own drawn from the training part; seeds take turns")
    probe_rows: int = option(500, help="rows of a probe")
    probe_steps: int = option(100, help="updates of a probe")
    probe_batch_size: int = option(8, help="rows per update of a probe")
    probe_learning_rate: float = option(2e-5, help="learning rate of a probe")


@dataclass(frozen=True)
class GridSection:
    """What is tuned for every arm alike, and on how many seeds."""

    grid_low: float = option(1e-4, help="smallest learning rate of the grid")
    grid_high: float = option(1e-1, help="largest learning rate of the grid")
    grid_points: int = option(7, help="learning rates, evenly spaced on a log scale (3 where compute is short)")
    grid_growth: int = option(4, help="most points added beyond an edge that is best")
    full_grid_low: float = option(1e-5, help="smallest learning rate of the arm `full`")
    full_grid_high: float = option(1e-2, help="largest learning rate of the arm `full`")
    tuning_seeds: int = option(3, help="seeds of the tuning, disjoint from those that are reported")
    scales: list[str] = option(
        ["constant"],
        choices=("constant", "alpha", "rslora"),
        help="factor of B·A: the same everywhere (alpha/r constant), one alpha over r, one alpha over √r; tuned too",
    )
    lr_schedulers: list[str] = option(["constant"], choices=("constant", "cosine", "linear"), help="crossed for phases")
    phase_states: list[str] = option(["keep"], choices=("keep", "reset"), help="crossed for phases")


@dataclass(frozen=True)
class StudyConfig:
    """Arms with equal parameters, compared by a protocol that is fixed and hashed before the first run."""

    question: str | None = option(help="what the study asks, for the report")
    kind: str = option("plans", choices=("plans", "phases"), help="what the arms are")
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    probe: ProbeSection = field(default_factory=ProbeSection)
    grid: GridSection = field(default_factory=GridSection)
    dev_path: str | None = option(help="rows to tune on [groups held out from the training rows]")
    test_path: str | None = option(help="rows to report on, read once [groups held out from the training rows]")
    train_size: int = option(2000, help="training rows")
    dev_size: int = option(250, help="items to tune on, one per prompt")
    test_size: int = option(250, help="items to report on, one per prompt")
    target: str | None = option(
        choices=("attention_only", "mlp_only", "both", "all"), help="which matrices [all attention and MLP]"
    )
    budgets: list[str] = option(
        ["uniform:2", "uniform:4", "uniform:8"], help="N parameters, uniform:R, or 0.5%; one of them starved"
    )
    arms: list[str] = option([], help="what is compared; see docs/study.md [by kind]")
    primary: list[str] = option([], help="contrasts that get a verdict, as `energy vs uniform` [every arm's own]")
    metric: str = option("loss", choices=("loss",), help="nats per answer token")
    smallest_effect: float = option(0.02, help="δ: differences below it are of no interest", aliases=("delta",))
    schedule_plan: str = option("uniform", help="phases: the plan whose ranks all arms share")
    steps: int = option(200, help="optimizer steps of every arm", aliases=("max_steps",))
    batch_size: int = option(8, help="rows per step")
    warmup_steps: int = option(0, help="steps in which the learning rate rises")
    weight_decay: float = option(0.0, help="of AdamW")
    max_grad_norm: float = option(1.0, help="gradients are clipped to it")
    max_rank: int = option(128, help="largest rank of a site")
    first_seeds: int = option(8, help="seeds that are reported at least")
    more_seeds: int = option(4, help="seeds added at a time, until every primary half-width is at most δ/2")
    most_seeds: int = option(30, help="seeds that are reported at most")
    resamples: int = option(2000, help="of the bootstrap over seeds and items")
    seed: int = option(42, help="one seed for everything")
    output_dir: str = option("runs/study", help="run folder", short="-o")
    batch_arms: int = option(16, help="arms that are trained together; changes the time, not the numbers")
    device: str = option("auto", help="auto, cpu or cuda")
    deviation: str | None = option(help="why a study that has begun goes on otherwise than registered; is reported")
    time_only: bool = option(False, help="train one batch of arms, print runs per hour and what is left, and stop")


@dataclass(frozen=True)
class MergeConfig:
    """Adapter into base, shard by shard, checked."""

    adapter: str | None = option(help="adapter or run folder", aliases=("adapter_path", "lora_path"))
    base_model: str | None = option(help="base model [as recorded in the adapter]", aliases=("model_name",))
    output_dir: str = option("merged_model", help="Hugging Face checkpoint", short="-o", aliases=("output_path",))
    dtype: str = option("auto", choices=DTYPES, help="precision on disk [the base's own]")
    max_shard_size: str = option("5GB", help="size of one file")
    no_verify: bool = option(False, help="skip the comparison of merged and adapter logits")


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained page for a run folder."""

    run: str | None = option(help="run folder")
    out: str | None = option(help="page to write [report.html in the run folder]", short="-o")
    title: str | None = option(help="heading of the page")


@dataclass(frozen=True)
class DemoConfig:
    """The whole flow on a model and data that it makes itself, offline, on a CPU."""

    output_dir: str = option("runs/demo", help="run folder", short="-o")
    seed: int = option(42, help="one seed for everything")
    quick: bool = option(False, help="a few steps of everything: for tests; the scores mean nothing")


@dataclass(frozen=True)
class RunConfig:
    """A pipeline of stages from one file."""

    recipe: str | None = option(help="recipe file, or the name of one that comes with the package")
    output_dir: str | None = option(help="run folder [runs/<recipe>]", short="-o")
    set: list[str] = option([], commas=False, help="STAGE.OPTION=VALUE, over the recipe; repeatable")
    only: list[str] = option([], help="these stages only")
    from_: str | None = option(help="run this stage and all after it again", aliases=("from",))
    force: bool = option(False, help="run every stage again")


@dataclass(frozen=True)
class BatchConfig:
    """Several recipes, one after the other, each in a folder of its own."""

    recipes: list[str] = option([], commas=False, help="recipe files, or names of those that come with the package")
    output_dir: str = option("runs/batch", help="folder of the run folders", short="-o")
    set: list[str] = option([], commas=False, help="STAGE.OPTION=VALUE, over every recipe; repeatable")
    force: bool = option(False, help="run every stage again")


@dataclass(frozen=True)
class CompareConfig:
    """Finished runs side by side: parameters, time, losses, gradient norms, scores."""

    runs: list[str] = option([], commas=False, help="run folders")
    output_dir: str = option("comparison", help="where the tables and the picture go", short="-o")
    no_plots: bool = option(False, help="no PNG file")


@dataclass(frozen=True)
class DiffConfig:
    """What two rank plans disagree on."""

    first: str | None = option(help="a lora_rank_config.json")
    second: str | None = option(help="another one")
