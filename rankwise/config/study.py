"""What `rankwise study` can be told. The whole of it is hashed and put on record before the first run."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.config.sections import DataSection, ModelSection
from rankwise.options import option


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
