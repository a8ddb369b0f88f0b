"""What each command can be told: one dataclass per command, made of sections and its own options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from rankwise.options.field import Options, option, output, reads, reads_model, reads_or_hub, reads_or_text, seeded
from rankwise.options.sections import (
    CLASSIFY,
    DEVICE,
    DTYPES,
    NO_PNG,
    NORMALISE,
    OUTTYPES,
    SEED,
    SPLITS,
    TARGETS,
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

RESUME = "checkpoint folder to resume from, or true for the newest complete one"
PARTIAL = "resume even if optimizer or random state is missing"
SPLIT = "official split"
DELTAS = "`rankwise finetune` folder: its float32 deltas"
SET = "STAGE.OPTION=VALUE, overrides the recipe; repeatable"
LIST = "list the packaged recipes and stop"


def by_reference(server: str | None, write_cases: str | None, cases: str | None) -> bool:
    """Whether `validate` compares answers with a tuned model of any trainer: the options that say so. An
    OpenAI-compatible server is known by its path."""
    return bool(write_cases or cases or (server or "").rstrip("/").endswith("/v1"))


@dataclass(frozen=True)
class FinetuneConfig(Options):
    """Fine-tune all parameters briefly: for a meaningful delta, not for quality.

    rankwise finetune --model_name runs/demo/base --data_path runs/demo/data --subset_ratio 0.1 -o runs/probe
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    towers: TowersSection = field(default_factory=TowersSection)
    output_dir: str = output("saved_models/preliminary_finetune", help="run folder")
    subset_ratio: float = option(0.01, above=0, most=1, help="share of the rows, per task type", group="data")
    max_samples: int = option(1000, least=1, help="maximum number of training rows", group="data")
    learning_rate: float = option(2e-5, least=0, help="peak learning rate", aliases=("lr",))
    batch_size: int = option(1, least=1, help="rows per device and step", aliases=("per_device_train_batch_size",))
    gradient_accumulation: int = option(8, least=1, help="steps per update", aliases=("gradient_accumulation_steps",))
    num_epochs: float = option(1, help="epochs over the subset", aliases=("num_train_epochs",))
    use_wandb: bool = option(False, help="log to Weights & Biases (extra: track)", group="output")
    seed: int = seeded(42, help=SEED)
    save: str = option(
        "deltas",
        choices=("deltas", "checkpoints", "both"),
        help="what to save: float32 deltas, or pretrained/ and finetuned/",
        group="output",
    )
    method: str = option("full", choices=("full", "lora"), help="train all parameters, or a cheap high-rank LoRA probe")
    lora_r: int = option(64, least=1, help="rank of the LoRA probe", aliases=("r",))
    target: str | None = option(choices=TARGETS, help="matrices to train alone: those of `train --target` [everything]")
    skip_shards: int = option(
        0, least=0, help="number of subsets to skip: disjoint data for a second probe", group="data"
    )
    resume_from_checkpoint: str | None = option(help=RESUME)
    allow_partial_resume: bool = option(False, help=PARTIAL)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RanksConfig(Options):
    """Compute a rank plan from the spectra of two checkpoints, of deltas or of one adapter.

    rankwise ranks --deltas runs/demo/probe --budget uniform:8 -o runs/ranks
    """

    base: str | None = reads_or_hub(help="base checkpoint: folder, file or hub id", aliases=("pretrained",))
    tuned: str | None = reads_or_hub(help="fine-tuned checkpoint", aliases=("finetuned",))
    deltas: str | None = reads(help=DELTAS, group="model")
    adapter: str | None = reads_or_hub(help="LoRA adapter, by its factors; with BASE its intruder dimensions, too")
    output_dir: str = output(".", help="folder for configs/ and analysis_outputs/svd/", aliases=("out",))
    spectrum: SpectrumSection = field(default_factory=SpectrumSection)
    sites: SitesSection = field(default_factory=SitesSection)
    signal: str = option(
        "delta",
        choices=("delta", "activation", "gradient", "uniform", "random"),
        help="what ranks are computed from: weight delta, activations, gradients, or a baseline",
    )
    metric: str = option(
        "weight",
        choices=("weight", "activation", "loss", "auto"),
        help="how singular directions are weighted: weight norm, activation, loss, or the best by gain kept",
    )
    probe2: list[str] = reads([], help="further probes (deltas or checkpoints), for repeatability", group="model")
    gain: str | None = reads(help="held-out data to measure the plan's share of the loss gain on")
    data: DataSection = field(default_factory=DataSection)
    model_name: str | None = reads_model(help="model to run for --gain, --metric and --signal [the base]")
    num_samples: int = option(256, least=1, help="number of rows for --gain, --metric and --signal", group="data")
    batch_size: int = option(16, least=1, help="rows per forward pass")
    emit: list[str] = option(
        [], choices=TRAINERS, help="also write the plan as a config for these trainers", group="output"
    )
    allow_noise: bool = option(False, help="plan even if the delta is mostly rounding noise (recorded in the plan)")
    no_plots: bool = option(False, help=NO_PNG, group="output")
    save_delta_weights: bool = option(False, help="also write the deltas as float32 safetensors", group="output")
    device: str = option("cpu", help="cpu or cuda")
    seed: int = seeded(42, help="random seed of the sketch, the null spectra and the shuffles")


@dataclass(frozen=True)
class ExtractConfig(Options):
    """Extract a LoRA adapter from a checkpoint pair, by truncated SVD of each delta.

    rankwise extract --deltas runs/demo/probe --rank 8 -o runs/extracted
    """

    base: str | None = reads_or_hub(help="base checkpoint", aliases=("pretrained",))
    tuned: str | None = reads_or_hub(help="fine-tuned checkpoint", aliases=("finetuned",))
    deltas: str | None = reads(help=DELTAS, group="model")
    plan: str | None = reads(help="rank plan", aliases=("lora_config",), group="method")
    rank: int | None = option(least=1, help="one rank for all sites, instead of a plan", aliases=("r",))
    sites: SitesSection = field(default_factory=SitesSection)
    save_modules: bool = option(False, help="copy changed embeddings, heads, norms and biases in full")
    no_verify: bool = option(False, help="skip verification: logits of base + adapter against the tuned model's")
    output_dir: str = output("extracted_adapter", help="adapter folder")
    device: str = option("cpu", help="cpu or cuda")
    seed: int = seeded(42, help="random seed of the sketch")


@dataclass(frozen=True)
class CompressConfig(Options):
    """Compress an adapter to lower ranks, exactly, through QR of its factors.

    rankwise compress runs/demo/train --energy 0.9 -o runs/compressed
    """

    adapter: str | None = reads_or_hub(help="adapter or run folder")
    energy: float | None = option(above=0, most=1, help="energy that each site keeps")
    budget: str | None = option(help="parameter budget: N, uniform:R, or 0.5%")
    normalise: str = option("none", choices=("none", "site"), help=NORMALISE)
    metric: str | None = option(
        choices=("energy", "sigma"),
        help="what --budget goes by: energy per parameter, or σ alone, one threshold for all sites [energy]",
    )
    plan: str | None = reads(help="rank plan of this adapter's sites, instead of energy or budget", group="method")
    uniform: bool = option(False, help="zero-pad to one rank, without patterns, for hot swapping and vLLM")
    intruders: float | None = option(
        least=0,
        most=1,
        help="scale intruder dimensions by this: 1 keeps them, 0 removes them; needs the base's weights",
    )
    scale: float | None = option(above=0, help="scale of an adapter without a config (loralib): lora_alpha / r")
    base_model: str | None = reads_model(help="base, for --intruders and adapters of experts [as the adapter records]")
    output_dir: str = output("compressed_adapter", help="adapter folder")


@final
@dataclass(frozen=True)
class TrainConfig(Options):
    """Train LoRA or QLoRA, with a rank plan or a uniform rank, in phases or not.

    rankwise train --model_name runs/demo/base --data_path runs/demo/data --lr 4e-3 --num_epochs 2 -o runs/train
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    lora: LoraSection = field(default_factory=LoraSection)
    allocation: AllocationSection = field(default_factory=AllocationSection)
    towers: TowersSection = field(default_factory=TowersSection)
    depth: DepthSection = field(default_factory=DepthSection)
    phases: PhasesSection = field(default_factory=PhasesSection)
    selection: SelectionSection = field(default_factory=SelectionSection)
    estimate: EstimateSection = field(default_factory=EstimateSection)
    arms: str | None = reads(
        help="adapters to train in one batch: YAML or JSON list of {name, rank | plan, learning_rate, seed, scale}",
        group="method",
    )
    output_dir: str = output("saved_models/dynamic_lora_model", help="run folder, with the adapter")
    adapter_folder: str = option(
        ".", choices=(".", "final_model", "lora_adapter"), help="adapter folder within the run folder", group="output"
    )
    val_path: str | None = reads(help="validation rows [a share of the training groups]")
    val_fraction: float = option(
        0.05, least=0, below=1, help="validation share of the groups without --val_path", group="data"
    )
    max_samples: int | None = option(
        least=1,
        help="maximum number of rows, for training and validation together (without those of --val_path)",
        aliases=("num_samples",),
        group="data",
    )
    max_val_samples: int | None = option(least=1, help="maximum number of validation rows", group="data")
    packing: bool = option(False, help="pack samples into rows of up to --max_seq_length tokens, kept apart")
    yes: bool = option(False, help="quantize a base of which most stays in 16 bits: fused experts")
    seed: int = seeded(42, help=SEED)
    resume_from_checkpoint: str | None = option(help=RESUME)
    allow_partial_resume: bool = option(False, help=PARTIAL)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckConfig(Options):
    """Check a data set before training: rows, images, tokens, labels.

    rankwise check --model_name runs/demo/base --data_path runs/demo/data -o runs/check
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    split: str = option("train", choices=SPLITS, help=SPLIT, group="data")
    workers: int | None = option(least=0, help="processes that decode images, 0: none [one per core, maximum 8]")
    compare: int = option(8, least=0, help="samples with images to compare with the processor's own ids and pixels")
    run_model: bool = option(False, help="run samples through the model's own weights [a cut-down, random copy]")
    output_dir: str = output("check", help="folder for check.json and bad_samples.jsonl")


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Score a base model, an adapter or a merged model on a task; measure forgetting.

    rankwise evaluate runs/demo/train --data_path runs/demo/data --num_samples 20 -o runs/scores
    """

    model_name: str | None = reads_or_hub(
        help="base model, merged model, adapter or run folder", aliases=("model_path", "adapter")
    )
    base_model_id: str | None = reads_or_hub(help="base of an adapter [as it records]", aliases=("base_model",))
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="official split; dev is dev_matched for MultiNLI", group="data")
    num_samples: int | None = option(least=1, help="number of rows, in file order [all]", group="data")
    batch_size: int = option(16, least=1, help="prompts per step")
    generation: GenerationSection = field(default_factory=GenerationSection)
    depth: DepthUseSection = field(default_factory=DepthUseSection)
    classify: str = option(
        "likelihood",
        choices=CLASSIFY,
        help="classify by log-likelihood, or by the label in the generated text",
    )
    engine: str = option("transformers", choices=("transformers", "vllm"), help="inference engine (extra: vllm)")
    forget: str | None = reads(help="other text (.txt, .jsonl) for KL from the base and perplexities")
    lm_eval_tasks_path: str | None = reads(help="folder with your own task files, for lm_eval:NAME")
    num_fewshot: int | None = option(least=0, help="few-shot examples, for lm_eval:NAME [the task's default]")
    dtype: str = option("auto", choices=DTYPES, help="precision of the model", group="model")
    output_dir: str | None = output(help="folder for the scores [evaluation/ in the model's folder]")
    device: str = option("auto", help=DEVICE)
    seed: int = seeded(42, help="random seed of sampling and bootstrap")


@dataclass(frozen=True)
class MergeConfig(Options):
    """Merge an adapter into its base, shard by shard, verified.

    rankwise merge runs/demo/train -o runs/merged
    """

    adapter: str | None = reads_or_hub(help="adapter or run folder", aliases=("adapter_path", "lora_path"))
    base_model: str | None = reads_model(help="base model [as the adapter records]", aliases=("model_name",))
    output_dir: str = output("merged_model", help="Hugging Face checkpoint", aliases=("output_path",))
    dtype: str = option(
        "auto", choices=DTYPES, help="precision on disk [the base's]; float16 for export", group="output"
    )
    max_shard_size: str = option("5GB", help="maximum size per file", group="output")
    data: DataSection = field(default_factory=DataSection)
    split: str = option("dev", choices=SPLITS, help="official split of --data_path for the prompts", group="data")
    num_samples: int = option(
        8, least=1, help="prompts of --data_path to compare on; without it, random tokens", group="data"
    )
    max_memory: str | None = option(help="memory of the comparison; larger models go layer by layer [free memory]")
    no_verify: bool = option(False, help="skip verification: merged tensors and logits against base + adapter")


@dataclass(frozen=True)
class ReportConfig(Options):
    """Write one self-contained page for a run folder.

    rankwise report runs/demo
    """

    run: str | None = reads(help="run folder")
    out: str | None = output(help="page to write [report.html in the run folder]", path="file")
    title: str | None = option(help="page title", group="output")


@dataclass(frozen=True)
class DemoConfig(Options):
    """Run the whole flow on a model and data created here, offline, on a CPU, in about four minutes.

    rankwise demo
    """

    output_dir: str | None = output(help="run folder [runs/demo, runs/demo-vision, -experts or -MODEL]")
    model: str | None = reads_model(help="use this chat model: folder, hub id or GGUF file", aliases=("model_name",))
    minutes: float | None = option(above=0, help="for --model: time that the sizes are chosen for [15]")
    vision: bool = option(False, help="use a vision-language model and questions about generated images")
    experts: bool = option(False, help="use a mixture of experts; ranks are planned for each layer's experts")
    seed: int = seeded(42, help=SEED)
    quick: bool = option(False, help="take a few steps only, for tests; scores are meaningless")


@dataclass(frozen=True)
class TinyConfig(Options):
    """Create a tiny vision-language model and sample images: input of `rankwise run quickstart`.

    rankwise tiny
    """

    output_dir: str = output("runs/tiny", help="folder for base/ and photos/")
    seed: int = seeded(42, help=SEED)
    quick: bool = option(False, help="take a few steps only, for tests; the base has learnt nothing")


@dataclass(frozen=True)
class DoctorConfig(Options):
    """Check this installation: one line per finding, with the command that mends it.

    rankwise doctor
    """

    json: bool = option(False, help="print JSON")


@dataclass(frozen=True)
class RunConfig(Options):
    """Run a pipeline of stages from one file.

    rankwise run quickstart
    """

    recipe: str | None = reads_or_text(help="recipe file, or name of a packaged recipe", group="method")
    output_dir: str | None = output(help="run folder [runs/<recipe>]")
    set: list[str] = option([], commas=False, help=SET)
    only: list[str] = option([], help="stages to run, no others")
    from_: str | None = option(help="first stage to rerun, with all after it", aliases=("from",))
    force: bool = option(False, help="rerun all stages")
    log_file: str | None = option(path="file", help="copy the output here; auto: logs/TIME.log in the run folder")
    background: bool = option(False, help="run in a process that outlives the terminal, and print its log's path")
    list_: bool = option(False, help=LIST, aliases=("list",))


@dataclass(frozen=True)
class BatchConfig(Options):
    """Run several recipes, one after the other, each in its own folder.

    rankwise batch quickstart features -o runs/batch
    """

    recipes: list[str] = reads_or_text(
        [], commas=False, help="recipe files, or names of packaged recipes", group="method"
    )
    output_dir: str = output("runs/batch", help="parent of the run folders")
    set: list[str] = option([], commas=False, help=SET)
    force: bool = option(False, help="rerun all stages")
    list_: bool = option(False, help=LIST, aliases=("list",))


@dataclass(frozen=True)
class CompareConfig(Options):
    """Compare finished runs: parameters, time, losses, gradient norms, scores.

    rankwise compare runs/demo/train runs/train -o runs/comparison
    """

    runs: list[str] = reads([], commas=False, help="run folders")
    output_dir: str = output("comparison", help="folder for tables and plot")
    no_plots: bool = option(False, help=NO_PNG, group="output")


@dataclass(frozen=True)
class DiffConfig(Options):
    """Compare two rank plans.

    rankwise ranks diff runs/demo/ranks runs/ranks
    """

    first: str | None = reads(help="rank plan (lora_rank_config.json)")
    second: str | None = reads(help="rank plan to compare it with")


@dataclass(frozen=True)
class BundleConfig(Options):
    """Bundle all that an app needs to run the model, with golden vectors to replay.

    rankwise bundle runs/demo/gguf --validation runs/demo/validation -o runs/bundle
    """

    export: str | None = reads(help="export folder", aliases=("model_path",), group="model")
    output_dir: str = output("bundle", help="bundle folder", aliases=("output_path",))
    outtype: str | None = option(help="quantization type to ship [q8_0 if exported, else the smallest]")
    validation: str | None = reads_or_text(
        "validation", help="`rankwise validate` folder: its items, verdict and confidences"
    )
    reference: str | None = option(
        help="merged model the files were made from [as recorded in the export]; of a hand-off the tuned model, merged "
        "or an adapter, of any trainer",
        group="model",
    )
    data: ScoredData = field(default_factory=ScoredData)
    split: str | None = option(
        help="split to take golden vectors from [the validation's]", choices=SPLITS, group="data"
    )
    num_golden: int = option(8, least=1, help="number of golden vectors, spread over kinds of images")
    top: int = option(64, least=2, help="top-k log-probabilities to record per position")
    tolerance: float | None = option(
        above=0,
        help="allowed KL divergence as a multiple of the measured noise floor [the validation's; 10 without one]",
        aliases=("k",),
    )
    min_precision: float = option(
        0.9, above=0, below=1, help="precision the app must reach on answers it does not abstain from"
    )
    allow_unverified: bool = option(False, help="bundle even if export or validation is missing or failed")
    replay: str | None = reads(help="bundle whose golden vectors to replay instead; exit 6 if a rung differs")
    server: str | None = option(address=True, help="llama.cpp server to replay on [started here]")
    answers: str | None = reads(help="for --replay: an app's answers to the golden vectors, one JSON line each")
    app_pixels: str | None = reads(
        help="for --replay: folder with the app's pixels for golden/*-source.*: *-device.png, or sha256_rgb.json"
    )
    context: int | None = option(help="context size of llama.cpp in tokens [as the longest sample needs]")
    threads: int | None = option(help="CPU threads for llama.cpp [llama.cpp's default]")
    seed: int = seeded(42, help="random seed of the reference")


@dataclass(frozen=True)
class SchemaConfig(Options):
    """Print the JSON Schema of a command's config files, or of recipes, for editors.

    rankwise schema -o recipe.schema.json
    """

    command: list[str] = option([], commas=False, help="command whose config files it describes [recipes]")
    out: str | None = output(help="file to write [standard output]", path="file")


SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionConfig(Options):
    """Print a script that lets the shell complete commands, options, choices and files.

    rankwise completion bash -o rankwise.bash
    """

    shell: str | None = option(choices=SHELLS, help="shell that completes")
    out: str | None = output(help="file to write [standard output]", path="file")


FILES = ("auto", "adapter", "merged", "export", "bundle")


@dataclass(frozen=True)
class CardConfig(Options):
    """Write a model card from a run's records; upload card and files to the Hugging Face hub.

    rankwise card runs/demo --title Restaurants
    """

    run: str | None = reads(help="run folder, or an adapter, merged model or export alone")
    files: str = option("auto", choices=FILES, help="files to describe [the last product of the run]")
    out: str | None = output(help="card to write [README.md in the run folder]", path="file")
    title: str | None = option(help="model name [the repository's, else the run folder's]", group="output")
    license: str | None = option(help="license of the result [from the base's own card]", group="output")
    base_model: str | None = reads_model(help="hub id of the base, if the run names a local folder")
    push_to_hub: str | None = option(help="ORG/NAME to upload files and card to", group="output")
    private: bool = option(False, help="make the repository private", group="output")
    allow_unverified: bool = option(False, help="upload even if a verification failed or was skipped")


@dataclass(frozen=True)
class ExportConfig(Options):
    """Export a merged checkpoint to GGUF files for llama.cpp, verified tensor by tensor.

    rankwise export runs/demo/merged --outtype f16,q8_0 -o runs/gguf
    """

    model: str | None = reads_model(
        help="merged model folder (with --adapter_gguf: the base)", aliases=("model_name", "model_path")
    )
    output_dir: str = output("exported_model", help="folder of the GGUF files", aliases=("output_path",))
    outtype: list[str] = option(["f16", "q8_0"], choices=OUTTYPES, help="quantization types", group="output")
    mmproj: bool | None = option(
        help="also export vision tower and projector [for vision-language models]", group="output"
    )
    name: str | None = option(
        help="base of the file names, <name>-<outtype>.gguf [the model folder's name]",
        aliases=("file_name",),  # in a recipe `name` is the stage's
        group="output",
    )
    base_model: str | None = reads_model(help="base to measure the kept tuning against [as the merge records]")
    target: str | None = option(help="device.json, or a folder with one [the model folder's]")
    adapter_gguf: str | None = reads(help="export this LoRA adapter instead, each site's scale in B", group="model")
    llama_cpp_dir: str | None = reads(
        help="llama.cpp with its converter [$LLAMA_CPP_DIR, else the cache]", group="method"
    )
    install_converter: bool = option(False, help="download llama.cpp's converter into the cache first")
    no_verify: bool = option(False, help="skip verification of the files against the checkpoint")


@dataclass(frozen=True)
class ValidateConfig(Options):
    """Score under the device's conditions, and prove that llama.cpp runs what was trained.

    rankwise validate runs/demo/gguf --data_path runs/demo/data -o runs/validation
    """

    export: str | None = reads(help="export folder, or one GGUF file", aliases=("gguf", "model_path"), group="model")
    mmproj: str | None = reads(help="vision part of a single GGUF file", group="model")
    adapter_gguf: list[str] = reads(
        [],
        help="LoRAs on top of the export, which is their base; the first is validated, the others loaded beside it",
        group="model",
    )
    reference: str | None = option(
        help="merged model the files were made from, or with --adapter_gguf their adapters, in its order [as recorded "
        "in the export]",
        group="model",
    )
    server: str | None = option(
        address=True,
        help="llama.cpp server that runs the files, on the phone for example; or, http://HOST/v1, any "
        "OpenAI-compatible server, which is asked whether it is --reference that answers",
        group="model",
    )
    served_model: str | None = option(
        help="name of the model at an OpenAI-compatible server [the only one there]", group="model"
    )
    api: str | None = option(
        choices=("completions", "chat"),
        help="the only API of an OpenAI-compatible server to ask [all that it has]",
        group="model",
    )
    write_cases: str | None = option(
        path="folder", help="folder for prompts, forced answers and both models' log-probabilities, to ask elsewhere"
    )
    cases: str | None = reads(help="folder that --write_cases made, in place of the models")
    answers: str | None = reads(help="what an app answered to --cases, as JSON Lines")
    data: ScoredData = field(default_factory=ScoredData)
    split: str = option("dev", choices=SPLITS, help="official split", group="data")
    num_samples: int | None = option(least=1, help="number of rows, in file order [all]", group="data")
    outtype: list[str] = option(
        [], help="quantization types to validate; the last one is the one you ship [all exported]"
    )
    base_model: str | None = reads_model(help="model before training, to measure the gain kept on the device")
    parity_samples: int = option(
        32, least=0, help="number of items on the parity ladder, spread over kinds of images; 0: no ladder"
    )
    top: int = option(64, least=2, help="top-k log-probabilities to compare per position")
    tolerance: float = option(
        10.0, above=0, help="allowed KL divergence as a multiple of the measured noise floor", aliases=("k",)
    )
    app_pixels: str | None = reads(
        help="folder with the app's pixels: PNG files of the images' names, or sha256_rgb.json"
    )
    min_accuracy: float | None = option(above=0, most=1, help="minimum accuracy; below it exit 6")
    min_agreement: float | None = option(above=0, most=1, help="minimum top-1 token agreement; below it exit 6")
    max_new_tokens: int | None = option(least=1, help="maximum tokens per answer [the device's; 128 without one]")
    sweep: list[str] = option([], help="quantization types to try as well, made from f16: q5_k_m, q4_0 …")
    sweep_margin: float = option(0.02, above=0, below=1, help="non-inferiority margin of --sweep (accuracy)")
    imatrix: str | None = reads(
        help="importance matrix (GGUF of llama-imatrix) for --sweep; iq1 to iq3 need one", group="method"
    )
    calibration_samples: int | None = option(
        least=1, help="number of training rows, pictures included, to compute an importance matrix from", group="data"
    )
    calibration_data: str | None = reads(help="file of the calibration rows [the training part of --data_path]")
    llama_cpp_dir: str | None = reads(
        help="llama.cpp with llama-quantize, for --sweep [$LLAMA_CPP_DIR]", group="method"
    )
    context: int | None = option(help="context size of llama.cpp in tokens [as the longest sample needs]")
    threads: int | None = option(help="CPU threads for llama.cpp [llama.cpp's default]")
    batch_size: int = option(8, least=1, help="prompts per step of the reference")
    device: str = option("auto", help="device of the float32 reference: auto, cpu or cuda")
    output_dir: str = output("validation", help="folder for validation.json, plots and predictions")
    seed: int = seeded(42, help="random seed of the bootstrap")

    @property
    def by_reference(self) -> bool:
        """Whether any server, or an app, is compared with the tuned model: no GGUF files and no llama.cpp needed."""
        return by_reference(self.server, self.write_cases, self.cases)
