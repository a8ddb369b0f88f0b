"""What `rankwise advise` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.options.field import Options, option, output, seeded
from rankwise.options.sections import DEVICE, NO_PNG, SEED, TARGETS, TRAINERS, DataSection, ModelSection

PLACEMENTS = ("attention", "mlp", "experts", "energy", "eva")


@dataclass(frozen=True)
class AdviseConfig(Options):
    """Recommend learning rate, rank and matrices for a LoRA run, from short runs within a time limit.

    rankwise advise runs/demo/base runs/demo/data --minutes 2 --ranks 8,4 -o runs/advise
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    minutes: float = option(30, above=0, help="time limit; rungs that do not fit are not begun")
    steps: int = option(40, least=8, help="optimizer steps per short run", aliases=("max_steps",))
    batch_size: int = option(
        8, least=1, help="rows per step, as in the real run", aliases=("per_device_train_batch_size",)
    )
    ranks: list[int] = option(
        [], least=1, help="ranks to compare, the largest is the reference [16, 4, 1 as far as the matrices allow]"
    )
    rates: list[float] = option([], above=0, help="learning rates to begin with [--rate_points around the prior]")
    rate_points: int = option(5, least=3, help="number of learning rates to begin with, each 2.5 times the one before")
    placements: list[str] = option(
        ["attention", "mlp", "energy"],
        choices=PLACEMENTS,
        help="placements to compare with one rank everywhere, at equal parameters",
    )
    delta: float | None = option(
        above=0,
        help="smallest difference that matters, nats per answer token [1 % of the gain, at least 0.01]",
        aliases=("smallest_effect",),
    )
    target: str | None = option(choices=TARGETS, help="matrices to adapt [every layer's attention, MLP and mixer]")
    train_size: int | None = option(
        least=1, help="maximum number of training rows [as many as the steps take]", group="data"
    )
    choose_size: int | None = option(
        least=20,
        help="number of held-out items that decide, one per prompt [100, at most a fifth of the prompts]",
        group="data",
    )
    confirm_size: int | None = option(
        least=20,
        help="number of held-out items for the last comparison and the expected loss [150, at most a fifth]",
        group="data",
    )
    lr_scheduler_type: str = option(
        "linear", choices=("constant", "cosine", "linear"), help="learning rate schedule, over each run's own steps"
    )
    warmup_ratio: float = option(0.0, least=0, below=1, help="share of the steps to warm up")
    weight_decay: float = option(0.0, least=0, help="weight decay of AdamW")
    max_grad_norm: float = option(1.0, least=0, help="maximum gradient norm, by clipping; 0: none")
    num_epochs: float = option(
        3, above=0, help="epochs of the real run, for advice.yaml", aliases=("num_train_epochs",)
    )
    emit: list[str] = option(
        [], choices=TRAINERS, help="also write the advice as a config for these trainers", group="output"
    )
    batch_arms: int = option(16, least=1, help="maximum runs trained together; changes the time, not the numbers")
    no_plots: bool = option(False, help=NO_PNG, group="output")
    output_dir: str = output("runs/advise", help="run folder")
    device: str = option("auto", help=DEVICE)
    seed: int = seeded(42, help=SEED)
