"""rankwise advise: learning rate, rank and matrices for a LoRA run, answered by short runs within a time limit.

rankwise advise MODEL train.jsonl --minutes 30

    split by groups ─ short runs, rung by rung (`climb`) ─ conclusions (`advice`) ─ advice.json, advice.yaml, one screen
"""

from __future__ import annotations

import random
import signal
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankwise.core.plan import RankPlan
from rankwise.core.site import Site
from rankwise.data.example import Examples, one_per_prompt
from rankwise.data.render import Renderer
from rankwise.data.renderer_for import renderer_for, sees
from rankwise.data.sources.load import check_data, read_examples, settle
from rankwise.data.split import Parts, Sizes, divided
from rankwise.errors import DataError, Interrupted, UsageError
from rankwise.files.atomic import digest
from rankwise.files.processes import announce, finish, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.load import load_structure, torch_dtype
from rankwise.models.targets import adaptable_sites, choose_sites
from rankwise.options.advise import AdviseConfig
from rankwise.page.blocks import lines
from rankwise.page.text import command_line, duration, plural
from rankwise.pipeline.idle import refuse_idle
from rankwise.ranks.emit import unplaced, write_configs
from rankwise.study.advice import first_grid, prior_of
from rankwise.study.advice_content import conclude, frozen_lines, frozen_towers
from rankwise.study.advice_page import CONFIG, advised_plan, run_options, screen_table, write_advice
from rankwise.study.arms import PARTS, part_of
from rankwise.study.climb import Rungs, climb
from rankwise.study.design import hashed_options
from rankwise.study.footprint import Footprint, footprint, free_memory, most_learnt, refuse_too_large
from rankwise.study.material import inputs_of, load_material, own_device
from rankwise.study.trials import ShortRuns, median_seconds, rows_of, short_runs, why_in_turn

RANKS, RATIO = (16, 4, 1), 2.5
CHOOSE, CONFIRM, SHARE, LEAST = 100, 150, 5, 20  # held-out items by default, at most a fifth of the prompts each
NOT_THE_RUNS = ("output_dir", "minutes", "ranks", "rates", "rate_points", "placements", "delta", "num_epochs", "emit")
NOT_THE_NUMBERS = ("batch_arms", "no_plots", "device")
# In every recipe's hash; an option that is added later only where it is not at its default, so that finished short runs
# stay of use (`hashed_options`).
FIRST_OPTIONS = frozenset(
    """model_name revision trust_remote_code dtype attn_implementation task data_path prompt chat_template
    chat_template_kwargs max_seq_length overlong skip_bad image_folder allow_outside allow_urls repeat_image image_first
    roles aux_reason download device_target steps batch_size target train_size choose_size confirm_size
    lr_scheduler_type warmup_ratio weight_decay max_grad_norm seed""".split()
)


def run(config: AdviseConfig) -> Path:
    """Run the command. Returns the run folder."""
    config = check(config)
    folder, refused = RunFolder(config.output_dir), list[str]()
    try:
        with held(folder, "advise", inputs(config)) as record:
            bench, rungs, rows = prepare(config, folder.path)
            if process_index()[0] == 0:
                folder.save_config(config, folder.config_name("advise"))
            announce(f"advise: {counts_line(rungs)}")
            for line in frozen_lines(frozen_towers(bench.material.model)):
                announce(line)
            if bench.in_turn:
                announce(f"short runs train one after the other: {bench.in_turn}")
            with kept_when_interrupted(config, bench):
                found = climb(rungs, bench)
            if process_index()[0] == 0:
                advice = conclude(config, rungs, bench, found, rows)
                plan = advised_plan(config, advice, bench.ranks(found.advised))
                record.outputs |= write_advice(folder.path, config, advice, plan)
                record.facts |= {"runs": len(bench.ledger), "rung": found.rung}
                print("\n".join(lines([screen_table(advice)])))
                if found.learnt:
                    refused = write_emitted(config, advice, plan)
                    print(f"next: {next_command(config)}")
    finally:
        finish()
    if refused:
        raise UsageError(f"{'; '.join(refused)}. The advice and everything else is written")
    return folder.path


def prepare(config: AdviseConfig, folder: Path) -> tuple[ShortRuns, Rungs, int]:
    """The bench, what is climbed on it, and the number of rows of the data set."""
    skeleton = load_structure(config.model, str(config.model.model_name))
    rungs, ledger = rungs_of(config, skeleton), short_runs(folder)
    parts, files, count = parts_of(config, skeleton)
    known: dict[str, Any] = {}

    def before_loading(renderer: Renderer, rows: list[dict[str, Any]]) -> None:
        known["in_turn"] = why_in_turn(skeleton, renderer, parts, rows)
        known["needs"] = fitting_needs(config, skeleton, rungs.ranks[0], rows, whole=bool(known["in_turn"]))

    material = load_material(config.model, config.data, config.target, config.device, (parts, files), before_loading)
    recipe, told = recipe_of(config, material.renderer, files), Reach(config, rungs)
    return ShortRuns(config, material, ledger, recipe, rungs.ranks[0], told=told, **known), rungs, count


def fitting_needs(
    config: AdviseConfig, skeleton: PreTrainedModel, rank: int, rows: Sequence[Mapping[str, Any]], *, whole: bool
) -> Footprint:
    """Memory of a short run. whole: logits of all tokens are computed, not of those learnt alone.

    UsageError where the base or a run does not fit.
    """
    device = torch.device(config.device if config.device != "auto" else own_device())
    dtype = torch_dtype(config.model.dtype, trained=True, device=device)
    lengths = [len(row["input_ids"]) for row in rows]
    learnt = max(lengths) if whole else most_learnt([row["labels"] for row in rows])
    sites = choose_sites(adaptable_sites(skeleton, config.target), config.target).values()
    needs = footprint(skeleton, sites, rank, dtype, lengths, learnt, config.batch_size)
    refuse_too_large(needs, free_memory(device), "the GPU" if device.type == "cuda" else "this machine")
    return needs


@dataclass
class Reach:
    """Says how far the time reaches, by the seconds of a run, and again where that has changed."""

    config: AdviseConfig
    rungs: Rungs
    said: str | None = None

    def __call__(self, seconds: float) -> None:
        minutes = self.config.minutes * process_index()[1]
        reached = "".join(reached_rungs(self.rungs, seconds, minutes))
        if reached != self.said:
            self.said = reached
            announce(f"a short run takes {duration(seconds)}: {rung_lines(self.rungs, seconds, minutes)[1]}")


@contextmanager
def kept_when_interrupted(config: AdviseConfig, bench: ShortRuns) -> Iterator[None]:
    """Interrupted with what is kept and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else stop.exit_code - 128
        kept, folder = plural(len(bench.finished), "finished short run"), RunFolder(config.output_dir)
        again = folder / folder.config_name("advise")
        raise Interrupted(
            f"interrupted: {kept} kept in {config.output_dir}, what was in training is lost; go on with: "
            f"{command_line('advise', again)}",
            number,
        ) from None


def write_emitted(config: AdviseConfig, advice: Mapping[str, Any], plan: RankPlan) -> list[str]:
    """Configs for other trainers, with what they have no place for said; why the others cannot take the advice."""
    options = run_options(config, advice)
    files, refused = write_configs(Path(config.output_dir), config.emit, plan, options)
    for trainer, file in files.items():
        print(": ".join(filter(None, [str(file), unplaced(trainer, options)])))
    return refused


def next_command(config: AdviseConfig) -> str:
    return command_line("train", Path(config.output_dir) / CONFIG)


def check(config: AdviseConfig) -> AdviseConfig:
    """The config with its data's task; invalid values are refused before anything is read."""
    config = settle(config)
    check_data(config.data, "advise")
    refuse_idle(config)
    if not config.model.model_name:
        raise UsageError("advise needs a model: rankwise advise MODEL ROWS")
    if len(set(config.ranks)) == 1:
        raise UsageError(f"--ranks {','.join(map(str, config.ranks))}: give at least two different ranks to compare")
    if len(set(config.rates)) in (1, 2):
        raise UsageError(
            "--rates: give at least three different learning rates, or none (they then lie around the prior)"
        )
    return config


def inputs(config: AdviseConfig) -> dict[str, Path | str]:
    found = {"model": config.model.model_name, "data": config.data.data_path}
    return {name: value for name, value in found.items() if value}


def parts_of(config: AdviseConfig, skeleton: PreTrainedModel) -> tuple[Parts, tuple[Path, ...], int]:
    """Rows to train on, items that decide (dev) and items kept back for the last comparison (test); the files; and the
    number of all rows."""
    pool = pool_of(config, skeleton)
    prompts = len(one_per_prompt(pool.items))
    share = prompts // SHARE
    if share < LEAST and None in (config.choose_size, config.confirm_size):
        raise DataError(
            f"{config.data.data_path}: {prompts:,} different prompts are too few to hold out items; advise needs "
            f"{LEAST * SHARE:,}, or give --choose_size and --confirm_size (at least {LEAST} each)"
        )
    choose = config.choose_size or min(CHOOSE, share)
    confirm = config.confirm_size or min(CONFIRM, share)
    train = config.train_size or config.steps * config.batch_size
    sizes = Sizes(train, choose, confirm, config.batch_size, ("--batch_size", "--choose_size", "--confirm_size"))
    return divided(pool, None, None, sizes, random.Random(config.seed)), tuple(pool.files), len(pool.items)


def pool_of(config: AdviseConfig, skeleton: PreTrainedModel) -> Examples:
    return read_examples(config.data, str(config.data.data_path), sees_images=sees(config.data, skeleton.config))


def trial_settings(config: AdviseConfig) -> dict[str, Any]:
    """What decides how a trial trains and is scored: trials of other settings are not reused."""
    return hashed_options(config, FIRST_OPTIONS, (*NOT_THE_RUNS, *NOT_THE_NUMBERS))


def recipe_of(config: AdviseConfig, renderer: Renderer, files: Sequence[Path]) -> str:
    """Hash of everything that decides how a trial trains, beside its key."""
    return digest([trial_settings(config), inputs_of(config.model, files, renderer)])[:16]


def rungs_of(config: AdviseConfig, skeleton: PreTrainedModel) -> Rungs:
    """What is climbed, from the model's sizes. UsageError where the matrices do not fit what is asked."""
    ranks = ranks_of(config, choose_sites(adaptable_sites(skeleton, config.target), config.target).values())
    prior, _ = prior_of(skeleton.config)
    seeds = (config.seed * 1000, config.seed * 1000 + 1, config.seed * 1000 + 2, config.seed * 1000 + 3)
    grid = sorted(set(config.rates)) or first_grid(prior, config.rate_points, RATIO)
    return Rungs(tuple(grid), RATIO, ranks, tuple(config.placements), seeds, config.delta)


def ranks_of(config: AdviseConfig, sites: Collection[Site]) -> tuple[int, ...]:
    """Ranks to compare, descending. UsageError for a placement without matrices or inputs, and for a rank above
    ⌊mn/(m+n)⌋ of a matrix: there a LoRA pair has more parameters than the matrix."""
    for part in PARTS:
        if part in config.placements and not part_of(sites, part):
            raise UsageError(f"--placements {part}: none of the matrices to adapt is of that kind; leave it out")
    experts = part_of(sites, "experts")
    if experts and "eva" in config.placements:
        raise UsageError(
            f"--placements eva: it measures inputs of modules, and {experts[0].path} is a parameter of experts; leave "
            "it out, or give --target attention_only"
        )
    narrow = min(sites, key=lambda site: site.largest_rank)
    if config.ranks and max(config.ranks) > narrow.largest_rank:
        raise UsageError(
            f"--ranks {max(config.ranks)} is above ⌊mn/(m+n)⌋ = {narrow.largest_rank} of {narrow.path} "
            f"{narrow.shape[0]}×{narrow.shape[1]}; give ranks up to {narrow.largest_rank}"
        )
    ranks = set(config.ranks) or {min(rank, narrow.largest_rank) for rank in RANKS}
    return tuple(sorted(ranks, reverse=True))


def counts_line(rungs: Rungs) -> str:
    total, words = 0, []
    for rung, count in rungs.counts().items():
        total += count
        words.append(f"{rung} {total}")
    return f"short runs up to each rung: {', '.join(words)} (more where a grid grows)"


def rung_ends(rungs: Rungs, seconds: float) -> dict[str, float]:
    """Seconds to the end of each rung."""
    counts = rungs.counts()
    return dict(zip(counts, accumulate(count * seconds for count in counts.values()), strict=True))


def reached_rungs(rungs: Rungs, seconds: float, minutes: float) -> list[str]:
    return [rung for rung, end in rung_ends(rungs, seconds).items() if end <= 60 * minutes]


def rung_lines(rungs: Rungs, seconds: float, minutes: float) -> list[str]:
    """How far the time reaches, by the time of a run that is known; nothing is guessed."""
    if not seconds:
        return [counts_line(rungs), "how long that takes is not known before the first run"]
    counts, reached = rungs.counts(), reached_rungs(rungs, seconds, minutes)
    times = ", ".join(f"{rung} {duration(end)}" for rung, end in rung_ends(rungs, seconds).items())
    if not reached:
        short = f"{minutes:g} minutes are too short for rung A, which is climbed all the same"
        return [counts_line(rungs), f"{short} ({times})"]
    left = [rung for rung in counts if rung not in reached]
    more = f"; rung {left[0]} takes {duration(counts[left[0]] * seconds)} more" if left else ""
    return [counts_line(rungs), f"{minutes:g} minutes reach rung {reached[-1]} ({times}){more}"]


def known_seconds(config: AdviseConfig, skeleton: PreTrainedModel) -> float:
    """Of a run of these settings, by those in the folder; 0 where there are none."""
    ledger = short_runs(Path(config.output_dir))
    if not ledger.rows or not Path(str(config.data.data_path)).exists():
        return 0.0
    with redirect_stdout(sys.stderr):  # what is said of the rows is no part of the config
        settled = settle(config)
        renderer = renderer_for(settled.data, config.model, str(config.model.model_name), skeleton.config)
        files = tuple(pool_of(settled, skeleton).files)
    return median_seconds(rows_of(ledger, recipe_of(settled, renderer, files)))


def describe(config: AdviseConfig) -> list[str]:
    """The lines of --dry-run."""
    first = f"short runs of {config.model.model_name}: {config.steps} steps of {config.batch_size} rows each"
    last = f"write advice.json, advice.yaml, plots in {config.output_dir}"
    if not Path(str(config.model.model_name), "config.json").is_file():  # on the hub, or an earlier stage makes it
        return [first, "rates, ranks and the number of runs depend on the model's sizes", last]
    skeleton = load_structure(config.model, str(config.model.model_name))
    rungs, seconds = rungs_of(config, skeleton), known_seconds(config, skeleton)
    rates = ", ".join(f"{rate:.3g}" for rate in rungs.grid)
    return [
        first,
        *frozen_lines(frozen_towers(skeleton)),
        f"rung A: learning rates {rates} at rank {rungs.ranks[0]}, then one between the best two",
        *rung_lines(rungs, seconds, config.minutes),
        last,
    ]
