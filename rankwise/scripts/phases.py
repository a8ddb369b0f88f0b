"""Phases as the documented scripts write them: steps from and to, modules or layers, and a callback that acts on them.

    phases = create_phased_lora_config(phase1_steps=(0, 300), phase2_steps=(300, 600), phase3_steps=(600, None))
    callback = DynamicLoRACallback(phases, verbose=True)

The result is a schedule of `core.phase`, and `train.phases.PhaseKeeper` does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankwise.core.phase import Form, Norm, Phase, bind
from rankwise.core.schedule import parse_schedule
from rankwise.core.site import Site, describe
from rankwise.errors import UsageError
from rankwise.models.adapt import lora_layers
from rankwise.models.sites import tower_of, tower_prefixes
from rankwise.scripts.experiment import DynamicLoRAConfig, Steps
from rankwise.train.phases import PhaseKeeper

EVERYTHING = ("attention", "mlp")  # what the scripts name so is `both`, which trains mixers, too


def create_phased_lora_config(
    phase1_steps: Steps = (0, 300),
    phase2_steps: Steps = (300, 600),
    phase3_steps: Steps | None = (600, None),
    phase1_modules: Sequence[str] = ("attention", "mlp"),
    phase2_modules: Sequence[str] = ("mlp",),
    phase3_modules: Sequence[str] = ("attention",),
) -> Form:
    """Phases of kinds of modules, `attention` and `mlp`; the defaults are the recommended order at 300 and 600 steps.

    Args:
        phase1_steps: (0, end); each phase begins at the step at which the one before ends.
        phase3_steps: None for two phases. The last phase ends with None: it runs to the end of training.

    Raises:
        UsageError: a gap, an overlap, an end of the last phase, or a name that is no kind of modules.
    """
    names = [phase_name(modules) for modules in (phase1_modules, phase2_modules, phase3_modules)]
    steps = [phase1_steps, phase2_steps, *([] if phase3_steps is None else [phase3_steps])]
    return contiguous(names[: len(steps)], steps)


def create_layerwise_lora_config(
    phase1_steps: Steps = (0, 300),
    phase2_steps: Steps = (300, None),
    phase1_layers: tuple[int, int] | None = None,
    phase2_layers: tuple[int, int] | None = None,
) -> Form:
    """First some layers, then others, to the end; layers as (first, last), counted from 0.

    Without layers: the first half, then the second (0-10 and 11-21 of TinyLlama's 22).
    """
    halves = ("early", "late")
    names = [
        half if layers is None else f"layers {layers[0]}-{layers[1]}"
        for half, layers in zip(halves, (phase1_layers, phase2_layers), strict=True)
    ]
    return contiguous(names, [phase1_steps, phase2_steps])


def phase_name(modules: Sequence[str]) -> str:
    """A schedule's name for the union of these kinds."""
    kinds = [modules] if isinstance(modules, str) else list(modules)
    if not kinds:
        raise UsageError("a phase without modules trains nothing; name attention, mlp, or both")
    return "both" if set(kinds) == set(EVERYTHING) else " + ".join(kinds)


def phase_modules(phase: Phase) -> list[str]:
    """The kinds that `phase_name` gives this phase's name."""
    return list(EVERYTHING) if phase.name == "both" else [kind for part in phase.parts for kind in part.kinds]


def contiguous(names: Sequence[str], steps: Sequence[Steps]) -> Form:
    """The schedule of these phases, once each begins where the one before ends and the last one has no end."""
    expected: int | None = 0
    written = []
    for number, (name, (start, end)) in enumerate(zip(names, steps, strict=True), start=1):
        if expected is None:
            raise UsageError(
                f"phase {number} begins at {start}, but the one before runs to the end; give that one an end, or "
                f"leave phase {number} out (phase{number}_steps=None)"
            )
        if start != expected:
            raise UsageError(f"phase {number} begins at step {start}; it must begin at {expected}")
        if end is not None and end <= start:
            raise UsageError(f"phase {number} ends at step {end}, before it has begun at {start}")
        written.append(name if end is None else f"{name}:{end - start}")
        expected = end
    if expected is not None:
        raise UsageError(
            f"the last phase ends at step {expected}, and nothing would train after it; let it run to the end: "
            f"phase{len(steps)}_steps=({steps[-1][0]}, None)"
        )
    return parse_schedule(" > ".join(written))


def schedule_of(config: DynamicLoRAConfig) -> Form | None:
    """The schedule of an experiment; None where everything trains all the time."""
    if not config.enabled:
        return None
    if config.phase1_layers or config.phase2_layers:
        return create_layerwise_lora_config(
            config.phase1_steps, config.phase2_steps, config.phase1_layers, config.phase2_layers
        )
    return create_phased_lora_config(
        config.phase1_steps,
        config.phase2_steps,
        config.phase3_steps,
        config.phase1_modules,
        config.phase2_modules,
        config.phase3_modules,
    )


def adapted_sites(model: PeftModel) -> dict[str, Site]:
    """Path → site of everything that carries LoRA in this model."""
    towers = tower_prefixes(model.get_base_model())
    return {
        path: describe(path, (layer.out_features, layer.in_features), tower_of(path, towers))
        for path, layer in lora_layers(model).items()
    }


class DynamicLoRACallback(TrainerCallback):
    """Trains the adapters of a PEFT model in phases.

    With GradientMeasuringTrainer it works as in `rankwise train`. With transformers' own Trainer it works in one
    process: adapters out of phase do not require gradients.

    Args:
        phase_configs: of `create_phased_lora_config` or `create_layerwise_lora_config`, or any schedule.
        verbose: print a line when a phase begins.
        reset: forget the optimizer's state of an adapter when it becomes active again.
        seed: of schedules that draw.

    Raises (when training begins): UsageError for a phase that trains nothing in this model, for several processes
    under a plain Trainer, and there for schedules that choose by gradient norms.
    """

    def __init__(self, phase_configs: Form, verbose: bool = True, *, reset: bool = False, seed: int = 42) -> None:
        self.phase_configs = phase_configs
        self.verbose, self.reset, self.seed = verbose, reset, seed
        self._keeper: PhaseKeeper | None = None

    def keeper(self, model: PeftModel, output_dir: Path) -> PhaseKeeper:
        """The phase keeper of this model."""
        schedule = bind(self.phase_configs, adapted_sites(model), self.seed)
        return PhaseKeeper(schedule, output_dir, reset=self.reset, verbose=self.verbose)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **rest: Any
    ) -> None:
        if args.world_size > 1 or isinstance(self.phase_configs, Norm):
            raise UsageError(
                f"DynamicLoRACallback with {str(self.phase_configs)!r} in {args.world_size} processes needs "
                "GradientMeasuringTrainer, which sees gradients before they are clipped"
            )
        self._keeper = self.keeper(model, Path(args.output_dir))
        self._keeper.on_train_begin(args, state, control, model=model, **rest)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        assert self._keeper is not None
        self._keeper.on_step_begin(args, state, control, **rest)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        assert self._keeper is not None
        self._keeper.on_save(args, state, control, **rest)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        assert self._keeper is not None
        self._keeper.on_train_end(args, state, control, **rest)
