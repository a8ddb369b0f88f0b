"""Options that need other options: one table, checked by every command before anything is read or written.

    refuse_idle(config)     UsageError: --select_by acts only with --select accuracy; here it would have no effect …

An option counts as given where its value is not the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.core.schedule import phases_of
from rankwise.errors import UsageError
from rankwise.options import commands, features
from rankwise.options.advise import AdviseConfig
from rankwise.options.field import OUTPUTS, Option, flatten, options_of
from rankwise.options.sections import CONVERSATIONS, is_harness
from rankwise.options.study import StudyConfig


class Told(dict[str, Any]):
    """Options by name, as attributes; None for one that a command does not have or that was not given."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@dataclass(frozen=True)
class Bound:
    """An option, when it acts, and how that is said: `only` completes "--option acts only …", values in braces."""

    option: str
    only: str
    acts: Callable[[Told], bool]


def bound(names: str, only: str, acts: Callable[[Told], bool]) -> list[Bound]:
    """Options that act on one condition."""
    return [Bound(name, only, acts) for name in names.split()]


def with_(needed: str, value: Any, names: str, only: str = "") -> list[Bound]:
    """Options that need one other option, at this value (True: at any). only: its words, if not `--needed value`."""
    words = only or (f"--{needed}" if value is True else f"--{needed} {value}")
    return bound(
        names, f"with {words}", lambda told: bool(told.get(needed)) if value is True else told.get(needed) == value
    )


def without(other: str, names: str, why: str = "") -> list[Bound]:
    """Options that another option makes idle."""
    return bound(names, f"without --{other}{why}", lambda told: not told.get(other))


def phases(told: Told) -> int:
    """Number of phases of `--phase_strategy`."""
    return phases_of(told.phase_strategy or ("both-mlp-attn" if told.dynamic_lora else ""))


def saves_by_steps(told: Told) -> bool:
    """`none` is a strategy, too: nothing is saved."""
    strategy = told.eval_strategy or "epoch" if told.select or told.early_stopping else "steps"
    return bool((told.save_strategy if "save_strategy" in told else strategy) == "steps")


def hands_off(told: Told) -> bool:
    return commands.by_reference(told.server, told.write_cases, told.cases)


def asks(told: Told) -> bool:
    """Whether validate has answers to judge: not where it writes cases for others to ask."""
    return not told.write_cases or bool(told.server)


def reads_data(told: Told) -> bool:
    return told.metric != "weight" or told.signal in ("activation", "gradient")


IMAGES = "image_folder allow_outside allow_urls repeat_image image_first device_target"
OF_IMAGES = bound(
    IMAGES,
    f"on rows that may have images: --task {', '.join(CONVERSATIONS)}",
    lambda told: told.task in (None, *CONVERSATIONS),
)
ROWS = [
    *OF_IMAGES,
    *bound("roles", "on conversations: --task conversations", lambda told: told.task in (None, "conversations")),
    *with_("task", "labels", "aux_reason"),
]
TRAINING = [
    *with_("resume_from_checkpoint", True, "allow_partial_resume"),
    *with_("fsdp", True, "fsdp_config"),
    *with_("activation_checkpointing", True, "activation_checkpointing_kwargs", "--gradient_checkpointing"),
]
TWO_CHECKPOINTS = "two checkpoints, BASE TUNED"
TABLES: Mapping[type, list[Bound]] = {
    commands.TrainConfig: [
        *ROWS,
        *TRAINING,
        *without("lora_config", "lora_r", ": a plan has a rank for every matrix"),
        *without("lora_config", "lora_alpha use_rslora", ": the plan owns the scale"),
        *bound(
            "val_fraction",
            "where no validation rows exist; here they do: {val_path} (--val_path, or val.jsonl in a labelled data "
            "set)",
            lambda told: not told.val_path,
        ),
        *bound(
            "max_val_samples",
            "where rows validate: --val_path, or a --val_fraction above 0",
            lambda told: bool(told.val_path) or told.val_fraction != 0,
        ),
        *with_("warm_start", "delta", "deltas"),
        *with_("deltas", True, "warm_start", "--deltas FINETUNE_RUN"),
        *with_("select", "accuracy", "select_by"),
        *with_(
            "allocator",
            "adalora",
            "allocator_keep_ratio allocator_init_warmup allocator_final_warmup allocator_mask_interval allocator_orth",
        ),
        *with_("estimate", True, "gpu usd_per_hour utilisation estimate_out"),
        *bound(
            "yes",
            "with --load_in_4bit or --load_in_8bit",
            lambda told: bool(told.load_in_4bit or told.load_in_8bit),
        ),
        *bound(
            "phase1_end",
            "with --dynamic_lora or a --phase_strategy of several phases (both-mlp-attn, …)",
            lambda told: phases(told) > 1,
        ),
        *bound(
            "phase2_end",
            "with --dynamic_lora or a --phase_strategy of three phases (both-mlp-attn, …)",
            lambda told: phases(told) > 2,
        ),
        *bound(
            "phase_state",
            "with phases: --dynamic_lora, --phase_strategy or --schedule",
            lambda told: bool(told.dynamic_lora or told.phase_strategy or told.schedule),
        ),
        *with_("eval_strategy", "steps", "eval_steps"),
        *bound(
            "save_steps",
            "with --save_strategy steps (and --eval_strategy steps where a checkpoint is chosen)",
            saves_by_steps,
        ),
        *bound(
            "metric_for_best_model",
            "where a checkpoint is chosen: --load_best_model_at_end, --select or --early_stopping",
            lambda told: (
                bool(told.load_best_model_at_end or told.select or told.early_stopping)
                or told.lr_scheduler_type == "reduce_lr_on_plateau"
            ),
        ),
    ],
    commands.FinetuneConfig: [
        *ROWS,
        *TRAINING,
        *with_("method", "lora", "lora_r"),
        *with_("save_strategy", "steps", "save_steps"),
    ],
    commands.RanksConfig: [
        *bound(
            "num_samples batch_size prompt chat_template chat_template_kwargs max_seq_length overlong skip_bad "
            f"download {IMAGES}",
            "on rows: with --gain, --metric or --signal activation|gradient",
            lambda told: bool(told.gain) or reads_data(told),
        ),
        *ROWS,
        *bound(
            "data_path",
            "with --metric activation|loss or --signal activation|gradient; --gain has rows of its own",
            reads_data,
        ),
        *bound(
            "smoothing_factor",
            "with a threshold, without --budget, and with --per site",
            lambda told: not told.budget and told.per == "site",
        ),
        *without("budget", "per", ", which gives every matrix its own rank"),
        *bound(
            "normalise",
            "with --budget, on spectra of deltas or gradients",
            lambda told: bool(told.budget) and told.metric != "loss" and told.signal in ("delta", "gradient"),
        ),
        *bound(
            "min_rank round",
            "with ranks that differ: --signal uniform has the budget's one rank",
            lambda told: told.signal != "uniform",
        ),
        *without("adapter", "exact allow_noise", ": the factors' spectrum is exact"),
        *bound("rename", f"on {TWO_CHECKPOINTS}", lambda told: bool(told.tuned or told.probe2)),
        *with_("tuned", True, "allow_unmatched flatten_conv", TWO_CHECKPOINTS),
    ],
    commands.ExtractConfig: with_("tuned", True, "rename allow_unmatched", TWO_CHECKPOINTS),
    StudyConfig: [
        *ROWS,
        *without("deltas", "probes probe_rows probe_steps probe_batch_size probe_learning_rate", ", the probes"),
        *bound(
            "full_grid_low full_grid_high",
            "with the arm `full`",
            lambda told: "full" in told.arms or (not told.arms and told.kind == "plans"),
        ),
        *with_("kind", "phases", "phase_states schedule_plan"),
    ],
    features.FactorTrainConfig: [
        *with_(
            "use_rank_allocator",
            True,
            "allocator_init_warmup allocator_final_warmup allocator_mask_interval allocator_keep_ratio",
        ),
        *bound(
            "use_rank_allocator",
            "with --arch AdaLoRA, whose lora_E has channels to mask",
            lambda told: features.canonical(told.arch) == "AdaLoRA",
        ),
        *bound(
            "activation_orth_regu_A",
            "with --arch AdaLoRA; elsewhere --lambda_ortho weights that term",
            lambda told: features.canonical(told.arch) == "AdaLoRA",
        ),
        *bound(
            "dropout",
            "with --arch ResMLP, MLP or AdaLoRA, or with --refine",
            lambda told: features.canonical(told.arch) != "Subspace" or told.refine,
        ),
    ],
    features.CaptureConfig: [
        *with_("synthetic", True, "tokens channels spectrum smooth shared seed", "--synthetic N"),
        *without("synthetic", "image_size native num_images revision skip_bad", ", on pictures"),
    ],
    AdviseConfig: ROWS,
    commands.EvaluateConfig: [
        *OF_IMAGES,
        *with_("do_sample", True, "temperature top_p"),
        *bound("length_penalty", "with --num_beams above 1", lambda told: told.num_beams > 1),
        *bound("num_fewshot lm_eval_tasks_path", "with --task lm_eval:NAME", lambda told: is_harness(told.task)),
    ],
    commands.CheckConfig: [
        *ROWS,
        *with_("model_name", True, "run_model prompt chat_template chat_template_kwargs max_seq_length overlong"),
        *with_("model_name", True, "compare revision trust_remote_code"),
        *with_("run_model", True, "attn_implementation"),
    ],
    commands.ValidateConfig: [
        *OF_IMAGES,
        *bound("served_model api", "with --server http://HOST/v1", lambda told: hands_off(told) and bool(told.server)),
        *bound(
            "export mmproj adapter_gguf parity_samples app_pixels min_accuracy min_agreement sweep context threads "
            "batch_size seed",
            "on files or a server of llama.cpp, without --server http://HOST/v1, --write_cases and --cases",
            lambda told: not hands_off(told),
        ),
        *without("cases", "reference base_model data_path num_samples write_cases max_new_tokens", ", which has them"),
        *without("cases", "split device", ": the rows and the models are not read again"),
        *bound("output_dir outtype tolerance", "on what answers: --write_cases alone asks nobody", asks),
        *bound(
            "top",
            "where a server or a file is run: --write_cases and --answers ask none",
            lambda told: not told.answers and asks(told),
        ),
        *without("adapter_gguf", "sweep", ": it makes smaller files of a whole model"),
        *with_("sweep", True, "sweep_margin llama_cpp_dir imatrix calibration_samples"),
        *with_("calibration_samples", True, "calibration_data"),
    ],
}


def as_said(default: Any) -> str:
    """A default, formatted as a command-line value."""
    return "none" if default in (None, []) else ",".join(default) if isinstance(default, list) else str(default)


def idle_among(config: Any) -> list[Bound]:
    """The options that were given and have no effect among the others."""
    values, defaults = flatten(config), flatten(type(config)())
    return [row for row in idle_rows(config) if values.get(row.option) != defaults.get(row.option)]


def idle_rows(config: Any) -> list[Bound]:
    """Those of all options that have no effect among the others, given or not."""
    told = Told(flatten(config))
    return [row for row in TABLES.get(type(config), ()) if not row.acts(told)]


def written(config: Any) -> list[Option]:
    """The options that say where a command writes, less those that have no effect among the others."""
    idle = {row.option for row in idle_rows(config)}
    return [item for item in options_of(config) if item.path in OUTPUTS and item.default and item.name not in idle]


def refuse_idle(config: Any) -> None:
    """UsageError naming every option that was given and has no effect among the others."""
    found = idle_among(config)
    if found:
        defaults = flatten(type(config)())
        off = " ".join(f"--{row.option} {as_said(defaults.get(row.option))}" for row in found)
        it, them = ("it", "it") if len(found) == 1 else ("they", "them")
        raise UsageError(
            f"{sentences(found, config)}; here {it} would have no effect: leave {them} out, or where a file sets "
            f"{them}, say {off}"
        )


def sentences(found: Sequence[Bound], config: Any) -> str:
    values = flatten(config)
    return "; ".join(f"--{row.option} acts only {row.only.format(**values)}" for row in found)
