"""What each command can be told: one dataclass per command, made of sections and its own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from rankwise.config.sections import (
    DTYPES,
    SPLITS,
    TRAINERS,
    AllocationSection,
    DataSection,
    DepthSection,
    DepthUseSection,
    EstimateSection,
    GenerationSection,
    LoraSection,
    ModelSection,
    PhasesSection,
    ScoredData,
    SelectionSection,
    SitesSection,
    SpectrumSection,
    TowersSection,
)
from rankwise.options import option


@dataclass(frozen=True)
class FinetuneConfig:
    """Short full-parameter fine-tune: a meaningful delta, not quality."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    towers: TowersSection = field(default_factory=TowersSection)
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
    output_dir: str = option(".", help="below it: configs/ and analysis_outputs/svd/", short="-o", aliases=("out",))
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
    save_modules: bool = option(False, help="carry changed embeddings, heads, norms and biases as they are, whole")
    no_verify: bool = option(False, help="skip the comparison of base + adapter's logits with the tuned model's")
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


@final
@dataclass(frozen=True)
class TrainConfig:
    """LoRA/QLoRA training, with a rank plan or a uniform rank, in phases or not."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    lora: LoraSection = field(default_factory=LoraSection)
    allocation: AllocationSection = field(default_factory=AllocationSection)
    towers: TowersSection = field(default_factory=TowersSection)
    depth: DepthSection = field(default_factory=DepthSection)
    phases: PhasesSection = field(default_factory=PhasesSection)
    selection: SelectionSection = field(default_factory=SelectionSection)
    estimate: EstimateSection = field(default_factory=EstimateSection)
    output_dir: str = option("saved_models/dynamic_lora_model", help="adapter and run folder", short="-o")
    adapter_folder: str = option(
        ".", choices=(".", "final_model", "lora_adapter"), help="where in the run folder the adapter goes"
    )
    val_path: str | None = option(help="validation rows [a share of the training groups]")
    val_fraction: float = option(0.05, help="share of the groups held out where no --val_path is given")
    max_samples: int | None = option(
        help="most rows to draw, for training and validation together (--val_path has rows of its own)",
        aliases=("num_samples",),
    )
    max_val_samples: int | None = option(help="most rows to validate on")
    packing: bool = option(False, help="several samples in a row of up to --max_seq_length tokens, kept apart")
    seed: int = option(42, help="one seed for everything")
    resume_from_checkpoint: str | None = option(help="checkpoint folder, or true for the newest complete one")
    allow_partial_resume: bool = option(False, help="resume although optimizer or random state is missing")
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckConfig:
    """A data set gone over before a GPU is touched: rows, images, tokens, labels."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    split: str = option("train", choices=SPLITS, help="which official split")
    workers: int | None = option(help="processes that decode images, 0 for none [one per core, 8 at most]")
    compare: int = option(8, help="samples with images whose ids and pixels are compared with the processor's own")
    run_model: bool = option(False, help="run a few samples through the model's own weights [a cut-down, random copy]")
    output_dir: str = option("check", help="where check.json and bad_samples.jsonl go", short="-o")


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a task with a base model, an adapter or a merged model; measure what was forgotten."""

    model_name: str | None = option(
        help="base model, merged model, adapter or run folder", aliases=("model_path", "adapter")
    )
    base_model_id: str | None = option(help="base of an adapter [as recorded in it]", aliases=("base_model",))
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="which official split; MultiNLI's dev is dev_matched")
    num_samples: int | None = option(help="first N items, in file order")
    batch_size: int = option(16, help="prompts per step")
    generation: GenerationSection = field(default_factory=GenerationSection)
    depth: DepthUseSection = field(default_factory=DepthUseSection)
    classify: str = option(
        "likelihood",
        choices=("likelihood", "generation"),
        help="labels by log-likelihood, or as the generated text names them",
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
class MergeConfig:
    """Adapter into base, shard by shard, checked."""

    adapter: str | None = option(help="adapter or run folder", aliases=("adapter_path", "lora_path"))
    base_model: str | None = option(help="base model [as recorded in the adapter]", aliases=("model_name",))
    output_dir: str = option("merged_model", help="Hugging Face checkpoint", short="-o", aliases=("output_path",))
    dtype: str = option(
        "auto", choices=DTYPES, help="precision on disk [the base's own]; float16 is the one for export"
    )
    max_shard_size: str = option("5GB", help="size of one file")
    data: DataSection = field(default_factory=DataSection)
    split: str = option("dev", choices=SPLITS, help="which official split the prompts of --data_path come from")
    num_samples: int = option(8, help="prompts of --data_path to compare on; without it, random tokens")
    max_memory: str | None = option(help="memory of the comparison; a larger model goes layer by layer [what is free]")
    no_verify: bool = option(False, help="skip the comparison of the merged tensors and logits with base + adapter")


@dataclass(frozen=True)
class ReportConfig:
    """One self-contained page for a run folder."""

    run: str | None = option(help="run folder")
    out: str | None = option(help="page to write [report.html in the run folder]", short="-o")
    title: str | None = option(help="heading of the page")


@dataclass(frozen=True)
class DemoConfig:
    """The whole flow on a model and data that it makes itself, offline, on a CPU."""

    output_dir: str | None = option(help="run folder [runs/demo, or runs/demo-vision]", short="-o")
    vision: bool = option(False, help="a model that sees, and questions about pictures that it draws itself")
    seed: int = option(42, help="one seed for everything")
    quick: bool = option(False, help="a few steps of everything: for tests; the scores mean nothing")


@dataclass(frozen=True)
class TinyConfig:
    """A tiny model that sees and a few drawn photos: what `rankwise run quickstart` starts from."""

    output_dir: str = option("runs/tiny", help="base/ and photos/ go here", short="-o")
    seed: int = option(42, help="one seed for everything")
    quick: bool = option(False, help="a few steps of everything: for tests; the base has learnt nothing")


@dataclass(frozen=True)
class RunConfig:
    """A pipeline of stages from one file."""

    recipe: str | None = option(help="recipe file, or the name of one that comes with the package")
    output_dir: str | None = option(help="run folder [runs/<recipe>]", short="-o")
    set: list[str] = option([], commas=False, help="STAGE.OPTION=VALUE, over the recipe; repeatable")
    only: list[str] = option([], help="these stages only")
    from_: str | None = option(help="run this stage and all after it again", aliases=("from",))
    force: bool = option(False, help="run every stage again")
    log_file: str | None = option(help="write what is printed to this file too; auto: logs/TIME.log in the run folder")
    background: bool = option(False, help="start it as a process that outlives the terminal, and say where its log is")
    list_: bool = option(False, help="list the recipes that come with the package, and stop", aliases=("list",))


@dataclass(frozen=True)
class BatchConfig:
    """Several recipes, one after the other, each in a folder of its own."""

    recipes: list[str] = option([], commas=False, help="recipe files, or names of those that come with the package")
    output_dir: str = option("runs/batch", help="folder of the run folders", short="-o")
    set: list[str] = option([], commas=False, help="STAGE.OPTION=VALUE, over every recipe; repeatable")
    force: bool = option(False, help="run every stage again")
    list_: bool = option(False, help="list the recipes that come with the package, and stop", aliases=("list",))


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
