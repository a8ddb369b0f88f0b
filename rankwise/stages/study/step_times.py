"""Static at matched wall clock: as many steps as take the time of a schedule, by its measured step time."""

from __future__ import annotations

import time
from dataclasses import replace

from rankwise.core.phase import bind
from rankwise.files.atomic import read_object, write_json
from rankwise.files.processes import gathered, process_index
from rankwise.stages.study.arms import STATIC, schedule_of, timed_like
from rankwise.stages.study.design import Design
from rankwise.stages.study.plans import Plans
from rankwise.train.arms import random_start, row_order, scales_of
from rankwise.train.batched import Arm, ArmSettings, train_together

STEP_TIMES = "step_times.json"


def matched_steps(design: Design, plans: Plans) -> dict[str, int]:
    """Steps of the `static@SCHEDULE` arms: as many as take the schedule's measured time.

    Measured once, one arm at a time, by the first process, and kept beside the plans: a time is never twice the same.
    """
    path = plans.folder / STEP_TIMES
    timed = [arm for arm in design.arms if timed_like(arm) is not None]
    if timed and process_index()[0] == 0:
        times = read_object(path) if path.is_file() else {STATIC: step_time(design, plans, None)}
        new = [arm for arm in timed if arm not in times]
        write_json(path, times | {arm: step_time(design, plans, timed_like(arm)) for arm in new})
    gathered({})  # the others wait for the first
    times = read_object(path) if timed else {}
    return {arm: max(1, round(design.config.steps * times[arm] / times[STATIC])) for arm in timed}


def step_time(design: Design, plans: Plans, schedule: str | None) -> float:
    """Seconds per step of one arm alone over the whole schedule, after a few steps of warming up."""
    config, material = design.config, plans.material
    ranks = plans.uniform(config.budgets[0])
    start, scales = random_start(ranks, config.seed, plans.max_rank), scales_of(ranks, "constant", ranks)
    form = schedule_of(schedule, config.steps, config.seed) if schedule else None
    active = bind(form, {site.path: site for site in ranks}, config.seed).active if form else None
    order = row_order(len(material.rows), config.steps * config.batch_size, config.seed)
    arm = Arm(start, scales, design.grid(design.contenders[0]).low, order, active)
    settings = ArmSettings(config.steps, config.batch_size)
    train_together(
        material.model, [arm], material.rows, material.collate, replace(settings, steps=min(5, config.steps))
    )
    started = time.perf_counter()
    train_together(material.model, [arm], material.rows, material.collate, settings)
    return (time.perf_counter() - started) / config.steps
