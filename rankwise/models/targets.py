"""Adapted sites and their ranks: sites by part (`--target`) or by name (`--target_modules`), rank plans.

    sites = choose_sites(adaptable_sites(model, "attention_only"), "attention_only")
    plan = uniform_plan(sites, rank=8, alpha=None, use_rslora=False, model_name="org/base")
    plan_fields(plan)                  # r, lora_alpha, rank_pattern, target_modules … as PEFT's LoraConfig takes them

Towers that were not asked for are never adapted: names are looked up in the asked ones only, and every asked one must
get an adapter. PEFT matches `rank_pattern` keys with a free prefix and condenses long target lists to bare suffixes;
hence anchored full paths, and one regex for all targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from rankwise.core.plan import PlannedSite, RankPlan
from rankwise.core.site import ROUTER, Site, nearest
from rankwise.errors import UsageError
from rankwise.files.adapter_config import AdaptedSite, complete_config, config_name
from rankwise.models.sites import flat_experts, model_sites
from rankwise.options.sections import TARGETS

QUERY_VALUE = frozenset("q_proj v_proj query value q_lin v_lin q v to_q to_v q_b_proj".split())
# what holds keys and values in one, or queries, too; JetMoE's queries are experts
FUSED_QUERY_VALUE = frozenset(
    "qkv_proj qkv c_attn query_key_value Wqkv in_proj kv_proj kv_b_proj to_kv input_linear".split()
)
PARTS = {
    "attention_only": ("attention",),
    "mlp_only": ("mlp",),
    "both": ("attention", "mlp", "mixer"),  # every layer's: of a state-space model the mixers are all there is
}
LANGUAGE = ("language",)
TENSOR_FIELDS = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "fan_in_fan_out",
)


def adaptable_sites(
    model: PreTrainedModel, target: str | None = None, names: Sequence[str] = (), routers: bool = False
) -> dict[str, Site]:
    """`model_sites` for what is to be adapted; with `routers` (`--lora router`) those of its experts, too.

    UsageError for experts that PEFT has no pairs for, unless the attention alone or named matrices are asked for; and
    for routers of a model without any.
    """
    flat = flat_experts(model)
    if flat and not names and target != "attention_only":
        raise UsageError(
            f"{type(model).__name__} keeps the experts of a layer below one another in one matrix ({flat[0]} …), and "
            "PEFT has no adapter for each of them: take `--target attention_only`, or --target_modules"
        )
    sites = model_sites(model, routers)
    if routers and all(site.kind != ROUTER for site in sites.values()):
        raise UsageError(f"--lora router: {type(model).__name__} has no router")
    return sites


def choose_sites(
    sites: Mapping[str, Site], target: str | None = None, names: Sequence[str] = (), towers: Sequence[str] = LANGUAGE
) -> dict[str, Site]:
    """The sites to adapt, in model order; routers, where they are among the sites, always. Where nothing is said: every
    linear layer and expert of the asked towers of a model with several, attention, MLP and mixers of a language model.

    Args:
        target: attention_only (queries and values, or the fused matrix that holds them), mlp_only, both, all, experts.
        names: projection names or full paths, instead of a target.

    Raises:
        UsageError: names that match nothing in the asked towers (with near names), or nothing to adapt in one of them.
    """
    if target and names:
        raise UsageError("--target and --target_modules both select the sites to adapt; give one of them")
    within = {path: site for path, site in sites.items() if site.tower in towers}
    if names == ["all-linear"]:
        target, names = "all", ()
    target = target or ("both" if {site.tower for site in sites.values()} <= set(LANGUAGE) else "all")
    found = by_name(sites, within, names, towers) if names else by_part(within, target)
    for tower in towers:
        if all(site.tower != tower or site.kind == ROUTER for site in found.values()):
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
        raise UsageError(f"--target must be one of {', '.join(TARGETS)}; got {target!r}")
    return {path: site for path, site in sites.items() if site.kind == ROUTER or is_part(site, target)}


def is_part(site: Site, target: str) -> bool:
    if target == "experts":
        return site.experts > 0
    if target == "attention_only" and site.projection not in QUERY_VALUE | FUSED_QUERY_VALUE:
        return False
    return target == "all" or site.kind in PARTS[target]


def by_name(
    sites: Mapping[str, Site], within: Mapping[str, Site], names: Sequence[str], towers: Sequence[str]
) -> dict[str, Site]:
    """Sites with one of these projection names or full paths; every name must match."""
    for name in names:
        if name not in within and name not in {site.projection for site in within.values()}:
            raise UsageError(explain_unmatched(name, sites, within, towers))
    return {
        path: site for path, site in within.items() if path in names or site.projection in names or site.kind == ROUTER
    }


def explain_unmatched(name: str, sites: Mapping[str, Site], within: Mapping[str, Site], towers: Sequence[str]) -> str:
    """Explain an unmatched name, with the nearest names."""
    elsewhere = sorted({site.tower for path, site in sites.items() if name in (path, site.projection)})
    if elsewhere:
        return (
            f"--target_modules {name}: only the {' and '.join(elsewhere)} tower has it, and the adapted towers are "
            f"{', '.join(towers)}"
        )
    known = [*dict.fromkeys(site.projection for site in within.values()), *within]
    near = ", ".join(nearest(name, known)) or ", ".join(known[:7])
    return f"--target_modules {name} matches no matrix of the model; nearest: {near}"


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


def restrict_plan(plan: RankPlan, chosen: Iterable[str]) -> tuple[RankPlan, list[str]]:
    """The plan within the chosen paths, and the paths that this leaves out. UsageError where nothing is left."""
    kept = set(chosen)
    part = plan.within(kept)
    if not part.ranks:
        raise UsageError("--target excludes every site of the rank plan; leave it out, or make a plan for that part")
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


def scales(plan: RankPlan) -> dict[str, float]:
    """Path → factor of B·A."""
    return {path: plan.scale(rank) for path, rank in plan.ranks.items()}


def plan_fields(plan: RankPlan) -> dict[str, Any]:
    """The fields of PEFT's config that a plan decides: largest rank as `r`, anchored patterns for others, and one regex
    for all sites; lists where the model has fused experts."""
    adapted = plan.adapted
    transposed = {site.transposed for site in adapted.values() if not site.experts}
    sites = [
        AdaptedSite(plan.ranks[path], scale, config_name(path, site.peft, site.experts), site.peft)
        for (path, scale), site in zip(scales(plan).items(), adapted.values(), strict=True)
    ]
    fields = complete_config({"use_rslora": plan.use_rslora}, sites, transposed == {True})
    return {name: fields[name] for name in TENSOR_FIELDS} | {"use_rslora": plan.use_rslora}
