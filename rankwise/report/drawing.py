"""The pictures that a report draws itself from the tables and plans of a run folder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.device.validation_page import CONFUSION
from rankwise.evaluate.classify import plot_confusion
from rankwise.page.blocks import Picture
from rankwise.page.text import printable
from rankwise.ranks.plots import plot_energy_heatmap, plot_gain, plot_ranks_heatmap
from rankwise.report.contents import Contents, Scored, feature_pictures
from rankwise.study.plots import PLOTS as STUDY_PLOTS
from rankwise.train.gradient_plots import gradient_pictures
from rankwise.train.gradient_summary import boundaries
from rankwise.train.loss_plots import plot_loss, plot_scores, points, shared_metrics


@dataclass(frozen=True)
class Drawings:
    """What was drawn: (folder or task, name) → picture. Empty where matplotlib is not installed."""

    pictures: dict[tuple[str, str], Picture]
    possible: bool

    @property
    def names(self) -> set[str]:
        return {name for _, name in self.pictures}

    def of(self, where: str, name: str) -> Sequence[Picture]:
        found = self.pictures.get((where, name))
        return () if found is None else (found,)


def draw(contents: Contents, tasks: dict[str, list[Scored]], folder: Path) -> Drawings:
    """Draw every plan, training log, table of gradient norms, gain and task of scores into `folder`."""
    if importlib.util.find_spec("matplotlib") is None:
        return Drawings({}, possible=False)
    found: dict[tuple[str, str], Picture] = {}

    def target(where: str, name: str, caption: str) -> Path:
        path = folder / f"{len(found):02d}_{name}.png"
        found[where, name] = Picture(path, caption)
        return path

    for where, plan in contents.plans:
        plot_ranks_heatmap(plan, target(where, "ranks_heatmap", "Rank of every site: projection types × layers"))
        if any(row.energy_retained is not None for row in plan.sites):
            caption = "Share of each delta's energy that its rank keeps"
            plot_energy_heatmap(plan, target(where, "energy_heatmap", caption))
    for where, gain in contents.gains:
        if gain.get("defined") is False:
            continue
        caption = "Share of the loss gain kept: the plan against uniform rank and shuffles of its own ranks"
        plot_gain(gain, target(where, "gain", caption))
    for where, rows in contents.logs:
        if points(rows, "loss") or points(rows, "eval_loss"):
            path = target(where, "training_loss", "Training and validation loss, minima marked")
            plot_loss(rows, path, boundaries(dict(contents.phases).get(where, ())))
    for where, tables in contents.gradients:
        for name, caption, plot in gradient_pictures(tables):
            plot(target(where, name, caption))
    for where, study in contents.studies:
        for name, (plot_study, caption) in STUDY_PLOTS.items():
            plot_study(study, target(where, name, caption))
    for where, validation in contents.validations:
        if CONFUSION in validation:
            path = target(where, CONFUSION, "What was taken for what: rows are true classes, columns answers")
            plot_confusion(validation["labels"], validation[CONFUSION], path, printable(validation["outtype"], 20))
    for where, name, caption, plot in feature_pictures(contents):
        plot(target(where, name, caption))
    for task, results in tasks.items():
        if shared_metrics(one.result for one in results):
            caption = "Scores with 95 % intervals, each metric on its own scale"
            plot_scores({one.label: one.result for one in results}, target(task, "scores", caption))
    return Drawings(found, possible=True)
