"""A rank plan as a config for the trainer that people already use, or the word that this trainer cannot take it.

What each can take was read off its sources (August 2026): PEFT and axolotl (`lora_rank_pattern`, since May 2026)
take a rank per matrix; ms-swift clears `rank_pattern`, unsloth and LLaMA-Factory never pass one on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import yaml

from rankwise.core.plan import RankPlan
from rankwise.errors import UsageError

ONE_RANK = "takes one rank for all matrices; train the plan with `rankwise train --lora-config` or PEFT or axolotl"


def target_regex(plan: RankPlan) -> str:
    """All sites of the plan as one anchored regex, which is how PEFT takes full paths without shortening them."""
    return "^(" + "|".join(key[1:-1] for key in plan.rank_pattern) + ")$"


def largest(plan: RankPlan) -> int:
    return max(plan.ranks.values(), default=1)


def peft(plan: RankPlan) -> str:
    """`LoraConfig(**json.load(open(...)))`."""
    return json.dumps(
        {
            "r": largest(plan),
            "lora_alpha": whole(plan.alpha(largest(plan))),
            "target_modules": target_regex(plan),
            "rank_pattern": plan.rank_pattern,
            "alpha_pattern": plan.alpha_pattern,
            "use_rslora": plan.use_rslora,
            "task_type": "CAUSAL_LM",
        },
        indent=1,
    )


def axolotl(plan: RankPlan) -> str:
    """Axolotl's patterns take whole numbers only, which alpha = c·r with a whole c always gives."""
    alphas = {key: whole(alpha) for key, alpha in plan.alpha_pattern.items()}
    if any(not isinstance(alpha, int) for alpha in alphas.values()):
        raise UsageError("axolotl takes whole alphas only; this plan's alpha_over_rank gives fractions")
    config: dict[str, Any] = {
        "base_model": plan.model_name,
        "adapter": "lora",
        "lora_r": largest(plan),
        "lora_alpha": whole(plan.alpha(largest(plan))),
        "lora_target_modules": target_regex(plan),
        "lora_rank_pattern": plan.rank_pattern,
        "peft_use_rslora": plan.use_rslora,
    }
    if alphas:
        config["lora_alpha_pattern"] = alphas
    return yaml.safe_dump(config, sort_keys=False, width=1000)


def whole(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def one_rank(plan: RankPlan, trainer: str) -> int:
    ranks = set(plan.ranks.values())
    if len(ranks) != 1:
        raise UsageError(f"{trainer} {ONE_RANK}")
    return ranks.pop()


def swift(plan: RankPlan) -> str:
    rank = one_rank(plan, "ms-swift")
    config = {"model": plan.model_name, "train_type": "lora", "lora_rank": rank}
    return yaml.safe_dump(
        config | {"lora_alpha": whole(plan.alpha(rank)), "target_regex": target_regex(plan)}, width=1000
    )


def unsloth(plan: RankPlan) -> str:
    rank = one_rank(plan, "unsloth")
    config = {"r": rank, "lora_alpha": whole(plan.alpha(rank)), "target_modules": sorted(plan.layer_ranks)}
    return json.dumps(config, indent=1)


def llamafactory(plan: RankPlan) -> str:
    rank = one_rank(plan, "LLaMA-Factory")
    config = {"model_name_or_path": plan.model_name, "finetuning_type": "lora", "lora_rank": rank}
    return yaml.safe_dump(
        config | {"lora_alpha": whole(plan.alpha(rank)), "lora_target": ",".join(sorted(plan.layer_ranks))},
        sort_keys=False,
    )


TRAINERS: dict[str, tuple[Callable[[RankPlan], str], str]] = {
    "peft": (peft, "json"),
    "axolotl": (axolotl, "yaml"),
    "swift": (swift, "yaml"),
    "unsloth": (unsloth, "json"),
    "llamafactory": (llamafactory, "yaml"),
}


def emit(plan: RankPlan, trainer: str) -> tuple[str, str]:
    """(text, file suffix) of the plan for one trainer. Raises UsageError where it cannot take the plan."""
    if trainer not in TRAINERS:
        raise UsageError(f"--emit {trainer}: known trainers are {', '.join(TRAINERS)}")
    write, suffix = TRAINERS[trainer]
    return write(plan), suffix
