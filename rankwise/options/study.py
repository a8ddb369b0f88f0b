"""What `rankwise study` can be told. The whole of it is hashed and put on record before the first run."""

from __future__ import annotations

from dataclasses import dataclass, field

from rankwise.options.field import Options, option, output, reads, seeded
from rankwise.options.sections import DEVICE, PHASE_STATES, SEED, TARGETS, DataSection, ModelSection


@dataclass(frozen=True)
class ProbeSection(Options):
    """Where the deltas come from that plans are made of: finished runs, or short full fine-tunes of the study's own."""

    group = "method"

    deltas: list[str] = reads([], help="finished `rankwise finetune` runs; seeds take turns")
    probes: int = option(1, least=1, help="own probes, on disjoint rows of the training part; seeds take turns")
    probe_rows: int = option(500, help="rows per probe")
    probe_steps: int = option(100, help="updates per probe")
    probe_batch_size: int = option(8, help="rows per update of a probe")
    probe_learning_rate: float = option(2e-5, help="learning rate of a probe")


@dataclass(frozen=True)
class GridSection(Options):
    """What is tuned for every arm alike, and on how many seeds."""

    grid_low: float = option(1e-4, above=0, help="minimum learning rate of the grid")
    grid_high: float = option(1e-1, above=0, help="maximum learning rate of the grid")
    grid_points: int = option(7, least=2, help="learning rates, evenly spaced on a log scale (3 to save compute)")
    grid_growth: int = option(4, least=0, help="maximum points added beyond an edge that is best")
    full_grid_low: float = option(1e-5, above=0, help="minimum learning rate of the arm `full`")
    full_grid_high: float = option(1e-2, above=0, help="maximum learning rate of the arm `full`")
    tuning_seeds: int = option(3, least=1, help="number of tuning seeds, disjoint from those reported")
    scales: list[str] = option(
        ["constant"],
        choices=("constant", "alpha", "rslora"),
        help="scales of B·A to tune over: constant, one alpha over r, one alpha over √r",
    )
    lr_schedulers: list[str] = option(
        ["constant"], choices=("constant", "cosine", "linear"), help="learning rate schedules to cross with phases"
    )
    phase_states: list[str] = option(["keep"], choices=PHASE_STATES, help="optimizer states to cross with phases")


@dataclass(frozen=True)
class StudyConfig(Options):
    """Compare rank plans or schedules at equal parameters, over seeds, by a registered protocol.

    rankwise study --model_name runs/demo/base --data_path runs/demo/data --task e2e_nlg
    --train_size 400 --dev_size 40 --test_size 80 --time_only
    """

    question: str | None = option(help="research question, for the report")
    kind: str = option("plans", choices=("plans", "phases"), help="kind of arms: rank plans or schedules")
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    probe: ProbeSection = field(default_factory=ProbeSection)
    grid: GridSection = field(default_factory=GridSection)
    dev_path: str | None = reads(help="rows to tune on [groups held out from the training rows]")
    test_path: str | None = reads(help="rows to report on, read once [groups held out of training rows]")
    train_size: int = option(2000, help="number of training rows", group="data")
    dev_size: int = option(250, least=2, help="number of items to tune on, one per prompt", group="data")
    test_size: int = option(250, least=2, help="number of items to report on, one per prompt", group="data")
    target: str | None = option(choices=TARGETS, help="matrices to adapt [every layer's attention, MLP and mixer]")
    budgets: list[str] = option(
        ["uniform:2", "uniform:4", "uniform:8"], help="parameter budgets: N, uniform:R, or 0.5%; one of them starved"
    )
    arms: list[str] = option([], help="arms to compare; see docs/study.md [by kind]")
    primary: list[str] = option([], help="primary contrasts, as `energy vs uniform` [every arm's own]")
    primary_budgets: list[str] = option([], help="budgets with a verdict on the primary contrasts [all of --budgets]")
    predictions: list[str] = option(
        [], commas=False, help="outcomes predicted beforehand, as `energy vs uniform: better: REASON`"
    )
    assumed_seed_sd: float | None = option(
        least=0, help="assumed standard deviation of a paired difference between seeds (nats), for the power"
    )
    assumed_item_sd: float | None = option(
        least=0, help="assumed standard deviation of a paired difference between items (nats), for the power"
    )
    metric: str = option("loss", choices=("loss",), help="nats per answer token")
    smallest_effect: float = option(0.02, above=0, help="smallest effect of interest, δ", aliases=("delta",))
    schedule_plan: str = option("uniform", help="phases: rank plan that all arms share")
    steps: int = option(200, least=1, help="optimizer steps per arm", aliases=("max_steps",))
    batch_size: int = option(8, least=1, help="rows per step")
    warmup_steps: int = option(0, help="learning rate warm-up steps")
    weight_decay: float = option(0.0, help="weight decay of AdamW")
    max_grad_norm: float = option(1.0, help="maximum gradient norm, by clipping")
    max_rank: int = option(128, help="maximum rank per site")
    first_seeds: int = option(8, least=2, help="minimum number of reported seeds")
    more_seeds: int = option(4, least=1, help="seeds per extension, until all primary half-widths are at most δ/2")
    most_seeds: int = option(30, least=2, help="maximum number of reported seeds")
    resamples: int = option(2000, help="bootstrap resamples over seeds and items")
    seed: int = seeded(42, help=SEED)
    output_dir: str = output("runs/study", help="run folder")
    batch_arms: int = option(16, least=1, help="arms trained together; changes the time, not the numbers")
    device: str = option("auto", help=DEVICE)
    deviation: str | None = option(help="reason for departing from the registration once begun; is reported")
    time_only: bool = option(False, help="train one batch of arms, print runs per hour and what is left, and stop")
