"""From a rank plan to a PEFT model whose every shape is the plan's.

    model = adapt(load_model(name, dtype), plan, LoraSettings())

PEFT matches `rank_pattern` keys with a free prefix and condenses long target lists to bare suffixes; hence
anchored full paths, one regex for all targets, and a comparison of what was built with what was planned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import PEFT_PREFIX, Site, nearest
from rankwise.errors import UsageError, VerificationError
from rankwise.files.adapter import LoraPair, completed

ADAPTER = "default"
MOVES_BASE = ("pissa", "olora")
TENSOR_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "fan_in_fan_out")


@dataclass(frozen=True)
class LoraSettings:
    """What a plan does not say. `init`: default, gaussian, orthogonal, pissa, olora, eva.

    full: modules (paths) of which a copy trains in full beside the adapter, and is saved with it.
    """

    dropout: float = 0.05
    bias: str = "none"
    use_dora: bool = False
    init: str = "default"
    full: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.init == "loftq":
            raise UsageError(
                "--init_lora_weights loftq replaces the base by a quantized one that the adapter then depends on: that "
                "cannot be saved as plain LoRA; train on a quantized base with --load_in_4bit instead"
            )
        if self.init in MOVES_BASE and (self.use_dora or self.bias != "none"):
            raise UsageError(
                f"--init_lora_weights {self.init} changes the base; with --use_dora or --lora_bias it cannot be saved "
                "as one plain adapter"
            )


def scales(plan: RankPlan) -> dict[str, float]:
    """Path → factor of B·A."""
    return {path: plan.scale(rank) for path, rank in plan.ranks.items()}


def lora_config(plan: RankPlan, settings: LoraSettings | None = None) -> LoraConfig:
    """PEFT's config for the plan: largest rank as `r`, anchored patterns for the others, one regex of targets."""
    settings = settings or LoraSettings()
    transposed = {row.site.transposed for row in plan.sites if row.rank}
    fields = completed({"use_rslora": plan.use_rslora}, plan.ranks, scales(plan), transposed == {True})
    return LoraConfig(
        **{name: fields[name] for name in TENSOR_FIELDS},
        use_rslora=plan.use_rslora,
        lora_dropout=settings.dropout,
        bias=settings.bias,
        use_dora=settings.use_dora,
        init_lora_weights=True if settings.init in ("default", "eva") else settings.init,
        modules_to_save=list(settings.full) or None,
        task_type="CAUSAL_LM",
    )


def adapt(model: PreTrainedModel, plan: RankPlan, settings: LoraSettings) -> PeftModel:
    """The model with LoRA pairs at the plan's sites and copies of the `full` modules, float32; the rest is frozen.

    Random initial values come from torch's global generator: seed it before. Raises UsageError for initialisations
    that do not go with the plan or the model, VerificationError where PEFT built other shapes than planned, or copied
    other modules (it takes every module whose path ends like a given one).
    """
    check_init(model, plan, settings)
    adapted = wrapped(model, lora_config(plan, settings), settings.full)
    check_built(adapted, plan)
    return adapted


def wrapped(model: PreTrainedModel, config: PeftConfig, full: Iterable[str] = ()) -> PeftModel:
    """The model in PEFT's wrapping, a quantized one made ready to train; copies of the `full` modules are float32."""
    if getattr(model, "quantization_method", None):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        keep_trainable_layout(model)
    with quiet_peft():
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    check_copied(adapted, full)
    for module in full_copies(adapted).values():
        module.float()
    return adapted


def keep_trainable_layout(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for inference, as it does at the first evaluation on a CPU with
    AVX512-BF16: what is packed has no gradient, and training would silently go on wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def check_init(model: PreTrainedModel, plan: RankPlan, settings: LoraSettings) -> None:
    if settings.init in MOVES_BASE and getattr(model, "quantization_method", None):
        raise UsageError(
            f"--init_lora_weights {settings.init} changes base weights, and this base is quantized; leave it out"
        )
    odd = [path for path, rank in plan.ranks.items() if rank % 2]
    if settings.init == "orthogonal" and odd:
        raise UsageError(f"--init_lora_weights orthogonal needs even ranks; {odd[0]} has {plan.ranks[odd[0]]}")


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that PEFT causes in transformers ≥ 5.20 by asking for an attribute's old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def lora_layers(model: PeftModel) -> dict[str, LoraLayer]:
    """Path (in the base model) → adapted layer."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def factor_weights(layer: LoraLayer) -> tuple[Tensor, Tensor]:
    """A (r, n) and B (m, r) of an adapted layer; an embedding's lie under other names, AdaLoRA's are no modules."""
    if ADAPTER in layer.lora_embedding_A:
        return layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
    a, b = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    return (a, b) if isinstance(a, Tensor) else (a.weight, b.weight)


def site_parameters(model: PeftModel) -> dict[str, list[nn.Parameter]]:
    """Path → what trains at that site: A, B, DoRA's magnitudes, a bias that trains with them."""
    return {
        path: [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for path, layer in lora_layers(model).items()
    }


def full_copies(model: PeftModel) -> dict[str, nn.Module]:
    """Path (in the base model) → the copy that trains, of every module that is trained in full."""
    return {
        name.removeprefix(PEFT_PREFIX): module.modules_to_save[ADAPTER]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }


def full_parameters(model: PeftModel) -> dict[str, list[nn.Parameter]]:
    """Path → parameters of its own, of every module inside the copies: the places of `towers.full_sites`."""
    return {
        f"{path}.{name}".rstrip("."): own
        for path, copy in full_copies(model).items()
        for name, module in copy.named_modules()
        if (own := list(module.parameters(recurse=False)))
    }


def built_shapes(model: PeftModel) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Path → shapes of (A, B) as PEFT made them."""
    return {
        path: (tuple(a.shape), tuple(b.shape))
        for path, layer in lora_layers(model).items()
        for a, b in [factor_weights(layer)]
    }


def check_built(model: PeftModel, plan: RankPlan) -> None:
    """Exactly the planned sites, each with A (r, n) and B (m, r)."""
    built = built_shapes(model)
    wanted = {
        row.site.path: ((row.rank, row.site.shape[1]), (row.site.shape[0], row.rank)) for row in plan.sites if row.rank
    }
    wrong = [path for path in {**wanted, **built} if built.get(path) != wanted.get(path)]
    if wrong:
        shown = "; ".join(f"{path}: planned {wanted.get(path)}, built {built.get(path)}" for path in wrong[:3])
        raise VerificationError(f"PEFT built {len(wrong)} sites otherwise than planned: {shown}")


def check_copied(model: PeftModel, full: Iterable[str]) -> None:
    """Exactly these modules are trained in full."""
    copied, wanted = set(full_copies(model)), set(full)
    if copied != wanted:
        raise VerificationError(
            f"to be trained in full: {', '.join(sorted(wanted)) or 'nothing'}; PEFT copied "
            f"{', '.join(sorted(copied)) or 'nothing'}"
        )


def lora_pairs(model: PeftModel) -> dict[str, LoraPair]:
    """Path → a copy of the pair (float32, on the CPU) with its scale."""
    return {
        path: LoraPair(
            layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
            layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
            float(layer.scaling[ADAPTER]),
            bool(layer.fan_in_fan_out),
        )
        for path, layer in lora_layers(model).items()
    }


def trainable_parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit ones counted as what they hold."""
    trainable, total = model.get_nb_trainable_parameters()
    return int(trainable), int(total)


def print_trainable_parameters(model: PeftModel) -> None:
    """One line: trainable parameters, all parameters, and the share."""
    trainable, total = trainable_parameters(model)
    print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")


TARGETS = ("attention_only", "mlp_only", "both", "all")
QUERY_VALUE = frozenset(["q_proj", "v_proj", "query", "value", "q_lin", "v_lin"])
FUSED_QUERY_VALUE = frozenset(["qkv_proj", "qkv", "c_attn", "query_key_value", "Wqkv", "in_proj"])
LANGUAGE = ("language",)


def choose_sites(
    sites: Mapping[str, Site], target: str | None = None, names: Sequence[str] = (), towers: Sequence[str] = LANGUAGE
) -> dict[str, Site]:
    """The sites to adapt, in model order. Where nothing is said: every linear layer of the asked towers of a model with
    several, attention and MLP of a language model.

    Args:
        target: attention_only (queries and values, or the fused matrix that holds them), mlp_only, both, all.
        names: projection names or full paths, instead of a target.

    Raises:
        UsageError: names that match nothing in the asked towers (with near names), or nothing to adapt in one of them.
    """
    if target and names:
        raise UsageError("--target and --target_modules both say what is adapted; give one of them")
    within = {path: site for path, site in sites.items() if site.tower in towers}
    if names == ["all-linear"]:
        target, names = "all", ()
    target = target or ("both" if {site.tower for site in sites.values()} <= set(LANGUAGE) else "all")
    found = by_name(sites, within, names, towers) if names else by_part(within, target)
    for tower in towers:
        if all(site.tower != tower for site in found.values()):
            kinds = sorted({f"{site.projection} ({site.kind})" for site in within.values() if site.tower == tower})
            asked = f"--target_modules {','.join(names)}" if names else f"--target {target}"
            if not kinds:
                raise UsageError(f"the {tower} tower has no linear layer to adapt; --full {tower} trains what it has")
            raise UsageError(
                f"{asked} matches no matrix of the {tower} tower; it has {', '.join(kinds)}: name them with "
                "--target_modules, or take `--target all`"
            )
    return found


def by_part(sites: Mapping[str, Site], target: str) -> dict[str, Site]:
    """Sites of a part of every layer, by kind and by the field's names of queries and values."""
    if target not in TARGETS:
        raise UsageError(f"--target {target!r} is none of {', '.join(TARGETS)}")
    kinds = {"mlp_only": ("mlp",), "both": ("attention", "mlp"), "attention_only": ("attention",)}.get(target)
    kept = {path: site for path, site in sites.items() if kinds is None or site.kind in kinds}
    if target != "attention_only":
        return kept
    return {path: site for path, site in kept.items() if site.projection in QUERY_VALUE | FUSED_QUERY_VALUE}


def by_name(
    sites: Mapping[str, Site], within: Mapping[str, Site], names: Sequence[str], towers: Sequence[str]
) -> dict[str, Site]:
    """Sites with one of these projection names or full paths; every name must match."""
    for name in names:
        if name not in within and name not in {site.projection for site in within.values()}:
            raise UsageError(unmatched(name, sites, within, towers))
    return {path: site for path, site in within.items() if path in names or site.projection in names}


def unmatched(name: str, sites: Mapping[str, Site], within: Mapping[str, Site], towers: Sequence[str]) -> str:
    """Why a name matches nothing, and what is near it."""
    elsewhere = sorted({site.tower for path, site in sites.items() if name in (path, site.projection)})
    if elsewhere:
        return (
            f"--target_modules {name}: only the {' and '.join(elsewhere)} tower has it, and what is adapted is "
            f"{', '.join(towers)}"
        )
    known = [*dict.fromkeys(site.projection for site in within.values()), *within]
    near = ", ".join(nearest(name, known)) or ", ".join(known[:7])
    return f"--target_modules {name} matches no matrix of the model; near it: {near}"


def uniform_plan(
    sites: Mapping[str, Site], rank: int, alpha: float | None, use_rslora: bool, model_name: str
) -> RankPlan:
    """One rank everywhere, cut to min(m, n) where a matrix is smaller. alpha: 2·rank unless given; with rsLoRA one for
    all sites."""
    rows = tuple(
        PlannedSite(
            site,
            min(rank, site.full_rank),
            clipped=None if rank <= site.full_rank else f"{rank} is above min(m, n) = {site.full_rank}",
            method="uniform",
        )
        for site in sites.values()
    )
    plan = RankPlan(rows, model_name, use_rslora, description=f"rank {rank} everywhere")
    return plan if alpha is None else replace(plan, alpha_over_rank=alpha / (plan.largest if use_rslora else rank))


def restricted(plan: RankPlan, chosen: Iterable[str]) -> tuple[RankPlan, list[str]]:
    """The plan within the chosen paths, and the paths that this leaves out. UsageError where nothing is left."""
    kept = set(chosen)
    part = plan.within(kept)
    if not part.ranks:
        raise UsageError("--target leaves nothing of the rank plan; leave --target out, or make a plan for that part")
    return part, [path for path in plan.ranks if path not in kept]


def check_plan(plan: RankPlan, towers: Sequence[str] = LANGUAGE) -> None:
    """A plan must keep to the towers that are asked for, and train something."""
    frozen = [row.site.path for row in plan.sites if row.rank and row.site.tower not in towers]
    if frozen:
        raise UsageError(
            f"the rank plan adapts {len(frozen)} sites outside the {', '.join(towers)} tower ({frozen[0]} …), and "
            "those stay frozen; make a plan with --towers " + ",".join(towers)
        )
    plan.require_ranks()
