"""Options that act only beside others: one table, asked by every command's check before anything is read or made.

    refuse_idle(config)     UsageError: --select_by acts only with --select accuracy; here it would have no effect …

An option counts as given where its value is not the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rankwise.core.phase import phases_of
from rankwise.errors import UsageError
from rankwise.options.commands import (
    CheckConfig,
    EvaluateConfig,
    ExtractConfig,
    FinetuneConfig,
    RanksConfig,
    TrainConfig,
    ValidateConfig,
)
from rankwise.options.features import CaptureConfig, FactorTrainConfig, canonical
from rankwise.options.field import flatten
from rankwise.options.sections import CONVERSATIONS, is_harness
from rankwise.options.study import StudyConfig


class Told(dict[str, Any]):
    """Options by name, as attributes; None for one that a command does not have or that was not given."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@dataclass(frozen=True)
class Bound:
    """An option with the options that it depends on.

    only: completes "--option acts only …", with values of other options in braces. acts: whether it does among these
    options. acting, idle: options among which it does, and among which it does not.
    """

    option: str
    only: str
    acts: Callable[[Told], bool]
    acting: Mapping[str, Any]
    idle: Mapping[str, Any] = field(default_factory=dict)


def with_(
    needed: str, value: Any, names: str, *, only: str = "", beside: Mapping[str, Any] | None = None
) -> list[Bound]:
    """Options that all need one other option, at this value (True: at any).

    only: how that is said, where it is not `--needed value`. beside: what that one needs itself.
    """

    def acts(told: Told) -> bool:
        return bool(told.get(needed)) if value is True else told.get(needed) == value

    said = only or (f"--{needed}" if value is True else f"--{needed} {value}")
    return [Bound(name, f"with {said}", acts, {needed: value, **(beside or {})}) for name in names.split()]


def without(other: str, example: Any, names: str, why: str = "") -> list[Bound]:
    """Options that another option makes idle, here at an example of its values."""

    def acts(told: Told) -> bool:
        return not told.get(other)

    return [Bound(name, f"without --{other}{why}", acts, {}, {other: example}) for name in names.split()]


def phases(told: Told) -> int:
    """How many phases the options of `--phase_strategy` have."""
    if told.phase_strategy:
        return phases_of(told.phase_strategy)
    return phases_of("both-mlp-attn") if told.dynamic_lora else 0


def saves_by_steps(told: Told) -> bool:
    """`none` is a strategy, too: nothing is saved."""
    strategy = told.eval_strategy or "epoch" if told.select or told.early_stopping else "steps"
    return (told.save_strategy if "save_strategy" in told else strategy) == "steps"


def runs_the_model(told: Told) -> bool:
    return bool(told.gain) or reads_data(told)


def reads_data(told: Told) -> bool:
    return told.metric != "weight" or told.signal in ("activation", "gradient")


OF_IMAGES = "image_folder allow_outside allow_urls repeat_image image_first device_target"


def of_images(**beside: Any) -> list[Bound]:
    """What is about pictures, for rows that may have some. beside: what reading rows at all needs."""
    return [
        Bound(
            name,
            f"on rows that may have images: --task {', '.join(CONVERSATIONS)}",
            lambda told: told.task in (None, *CONVERSATIONS),
            {"task": "conversations", **beside},
            {"task": "e2e_nlg"},
        )
        for name in OF_IMAGES.split()
    ]


def of_rows(**beside: Any) -> list[Bound]:
    speakers = Bound(
        "roles",
        "on conversations: --task conversations",
        lambda told: told.task in (None, "conversations"),
        {"task": "conversations", **beside},
        {"task": "e2e_nlg"},
    )
    return [*of_images(**beside), speakers, *with_("task", "labels", "aux_reason", beside=beside)]


ROWS = of_rows()
RESUMED = with_("resume_from_checkpoint", True, "allow_partial_resume")
TRAINING = [
    *with_("fsdp", True, "fsdp_config"),
    *with_("activation_checkpointing", True, "activation_checkpointing_kwargs", only="--gradient_checkpointing"),
]
TRAIN = [
    *ROWS,
    *RESUMED,
    *TRAINING,
    *without("lora_config", "plan.json", "lora_r", ": a plan has a rank for every matrix"),
    *without("lora_config", "plan.json", "lora_alpha use_rslora", ": the plan owns the scale"),
    Bound(
        "val_fraction",
        "where no validation rows exist; here they do: {val_path} (--val_path, or val.jsonl in a labelled data set)",
        lambda told: not told.val_path,
        {},
        {"val_path": "dev.csv"},
    ),
    Bound(
        "max_val_samples",
        "where rows validate: --val_path, or a --val_fraction above 0",
        lambda told: bool(told.val_path) or told.val_fraction != 0,
        {},
        {"val_fraction": 0},
    ),
    *with_("warm_start", "delta", "deltas"),
    Bound("warm_start", "with --deltas FINETUNE_RUN", lambda told: bool(told.deltas), {"deltas": "probe"}),
    *with_("select", "accuracy", "select_by"),
    *with_(
        "allocator",
        "adalora",
        "allocator_keep_ratio allocator_init_warmup allocator_final_warmup allocator_mask_interval allocator_orth",
    ),
    *with_("estimate", True, "gpu usd_per_hour utilisation estimate_out"),
    Bound(
        "phase1_end",
        "with --dynamic_lora or a --phase_strategy of several phases (both-mlp-attn, …)",
        lambda told: phases(told) > 1,
        {"phase_strategy": "early-late"},
    ),
    Bound(
        "phase2_end",
        "with --dynamic_lora or a --phase_strategy of three phases (both-mlp-attn, …)",
        lambda told: phases(told) > 2,
        {"dynamic_lora": True},
        {"phase_strategy": "early-late"},
    ),
    Bound(
        "phase_state",
        "with phases: --dynamic_lora, --phase_strategy or --schedule",
        lambda told: bool(told.dynamic_lora or told.phase_strategy or told.schedule),
        {"schedule": "mlp"},
    ),
    *with_("eval_strategy", "steps", "eval_steps"),
    Bound(
        "save_steps",
        "with --save_strategy steps (and --eval_strategy steps where a checkpoint is chosen)",
        saves_by_steps,
        {"early_stopping": 2, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1},
        {"early_stopping": 2},
    ),
    Bound(
        "metric_for_best_model",
        "where a checkpoint is chosen: --load_best_model_at_end, --select or --early_stopping",
        lambda told: bool(
            told.load_best_model_at_end
            or told.select
            or told.early_stopping
            or told.lr_scheduler_type == "reduce_lr_on_plateau"
        ),
        {"load_best_model_at_end": True},
    ),
]
FINETUNE = [
    *ROWS,
    *RESUMED,
    *TRAINING,
    *with_("method", "lora", "lora_r"),
    *with_("save_strategy", "steps", "save_steps"),
]
RANKS = [
    *(
        Bound(name, "on rows: with --gain, --metric or --signal activation|gradient", runs_the_model, {"gain": "dev"})
        for name in "num_samples batch_size prompt chat_template chat_template_kwargs max_seq_length overlong skip_bad "
        f"download {OF_IMAGES}".split()
    ),
    *of_rows(gain="dev"),
    Bound(
        "data_path",
        "with --metric activation|loss or --signal activation|gradient; --gain has rows of its own",
        reads_data,
        {"metric": "activation"},
    ),
    Bound(
        "smoothing_factor",
        "with a threshold, without --budget, and with --per site",
        lambda told: not told.budget and told.per == "site",
        {},
        {"budget": "uniform:4"},
    ),
    *without("budget", "uniform:4", "per", ", which gives every matrix its own rank"),
    Bound(
        "normalise",
        "with --budget, on spectra of deltas or gradients",
        lambda told: bool(told.budget) and told.metric != "loss" and told.signal in ("delta", "gradient"),
        {"budget": "uniform:4"},
    ),
    *(
        Bound(
            name,
            "with ranks that differ: --signal uniform has the budget's one rank",
            lambda told: told.signal != "uniform",
            {},
            {"signal": "uniform", "budget": "uniform:4"},
        )
        for name in ("min_rank", "round")
    ),
    *without("adapter", "run", "exact allow_noise", ": the factors' spectrum is exact"),
    Bound(
        "rename",
        "on two checkpoints, BASE TUNED",
        lambda told: bool(told.tuned or told.probe2),
        {"base": "a", "tuned": "b"},
    ),
    *with_("tuned", True, "allow_unmatched flatten_conv", only="two checkpoints, BASE TUNED"),
]
EXTRACT = with_("tuned", True, "rename allow_unmatched", only="two checkpoints, BASE TUNED")
STUDY = [
    *ROWS,
    *without("deltas", "probe", "probes probe_rows probe_steps probe_batch_size probe_learning_rate", ", the probes"),
    *(
        Bound(
            name,
            "with the arm `full`",
            lambda told: "full" in told.arms or (not told.arms and told.kind == "plans"),
            {"arms": ["uniform", "energy", "full"]},
            {"arms": ["uniform", "energy"]},
        )
        for name in ("full_grid_low", "full_grid_high")
    ),
    *with_("kind", "phases", "phase_states schedule_plan"),
]
FEATURES_TRAIN = [
    *with_(
        "use_rank_allocator",
        True,
        "allocator_init_warmup allocator_final_warmup allocator_mask_interval allocator_keep_ratio",
        beside={"arch": "AdaLoRA"},
    ),
    *(
        Bound(name, f"with --arch AdaLoRA{why}", lambda told: canonical(told.arch) == "AdaLoRA", {"arch": "AdaLoRA"})
        for name, why in (
            ("use_rank_allocator", ", whose lora_E has channels to mask"),
            ("activation_orth_regu_A", "; elsewhere --lambda_ortho weights that term"),
        )
    ),
    Bound(
        "dropout",
        "with --arch ResMLP, MLP or AdaLoRA, or with --refine",
        lambda told: canonical(told.arch) != "Subspace" or told.refine,
        {"arch": "MLP"},
        {"arch": "Subspace"},
    ),
]
CAPTURE = [
    *with_("synthetic", True, "tokens channels spectrum smooth shared seed", only="--synthetic N"),
    *without("synthetic", 8, "image_size native num_images revision skip_bad", ", on pictures"),
]
EVALUATE = [
    *of_images(),
    *with_("do_sample", True, "temperature top_p"),
    Bound("length_penalty", "with --num_beams above 1", lambda told: told.num_beams > 1, {"num_beams": 2}),
    *(
        Bound(name, "with --task lm_eval:NAME", lambda told: is_harness(told.task), {"task": "lm_eval:arc"})
        for name in ("num_fewshot", "lm_eval_tasks_path")
    ),
]
CHECK = [
    *ROWS,
    *with_("model_name", True, "run_model prompt chat_template chat_template_kwargs max_seq_length overlong"),
    *with_("model_name", True, "compare revision trust_remote_code"),
    *with_("run_model", True, "attn_implementation", beside={"model_name": "base"}),
]
VALIDATE = [*of_images(), *with_("sweep", True, "sweep_margin llama_cpp_dir")]
TABLES: Mapping[type, list[Bound]] = {
    TrainConfig: TRAIN,
    FinetuneConfig: FINETUNE,
    RanksConfig: RANKS,
    ExtractConfig: EXTRACT,
    StudyConfig: STUDY,
    FactorTrainConfig: FEATURES_TRAIN,
    CaptureConfig: CAPTURE,
    EvaluateConfig: EVALUATE,
    CheckConfig: CHECK,
    ValidateConfig: VALIDATE,
}


def as_said(default: Any) -> str:
    """A default as a command line takes it."""
    return "none" if default in (None, []) else ",".join(default) if isinstance(default, list) else str(default)


def idle_among(config: Any) -> list[Bound]:
    """The options that were given and have no effect among the others."""
    told, defaults = Told(flatten(config)), flatten(type(config)())
    return [
        bound
        for bound in TABLES.get(type(config), ())
        if told.get(bound.option) != defaults.get(bound.option) and not bound.acts(told)
    ]


def refuse_idle(config: Any) -> None:
    """UsageError naming every option that was given and has no effect among the others."""
    found = idle_among(config)
    if found:
        defaults = flatten(type(config)())
        off = " ".join(f"--{bound.option} {as_said(defaults.get(bound.option))}" for bound in found)
        it, them = ("it", "it") if len(found) == 1 else ("they", "them")
        raise UsageError(
            f"{sentences(found, config)}; here {it} would have no effect: leave {them} out, or where a file sets "
            f"{them}, say {off}"
        )


def sentences(found: Sequence[Bound], config: Any) -> str:
    values = flatten(config)
    return "; ".join(f"--{bound.option} acts only {bound.only.format(**values)}" for bound in found)
