"""rankwise report: a run folder → one self-contained page, report.html, and report.md beside it.

rankwise report runs/demo

The headline comes first (scores, parameters, the rank heatmap), then every stage in order of time, then versions
and settings. The page holds its images, asks nothing of the network, and everything from files is escaped.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rankwise.errors import UsageError
from rankwise.evaluate.predictions import FORGETTING_TASK
from rankwise.files.atomic import write_text
from rankwise.files.run_folder import MANIFEST, SITES
from rankwise.options.commands import ReportConfig
from rankwise.page.blocks import Figure, Gallery, Page, Plot, Section, Sourced, SourceFile, Words, drawn, each
from rankwise.page.canvas import can_draw
from rankwise.page.svg import Curves
from rankwise.page.template import html, markdown
from rankwise.page.text import amount, duration, is_number, metric_name, percent, plural, printable, score
from rankwise.report.contents import Contents, Scored, read_run
from rankwise.report.scores import gallery, score_blocks
from rankwise.report.sections import appendix, ranks_block, sections_of, shown_names
from rankwise.train.loss_plots import leading_metrics

HEADLINE_METRICS = 3


def build_report(run: Path, out: Path | None = None, title: str | None = None) -> Path:
    """Write the page of a run folder and its Markdown twin.

    Args:
        run: folder that rankwise commands wrote; whatever it holds is shown, what is missing is left out.
        out: the page [report.html in the run folder]; Markdown and pictures lie beside it.
        title: heading [the folder's name].

    Returns:
        The path of the HTML page.

    Raises:
        DataError: no such folder, nothing in it to report, or a broken file (named).
    """
    run = Path(run)
    out = Path(out) if out else run / "report.html"
    contents = read_run(run)
    tasks = by_task(contents.scores)
    files = out.with_name(f"{out.stem}_files")
    seen = {task: gallery(results, run, files) for task, results in tasks.items()}
    page = with_pictures(compose(contents, tasks, seen, title or run.resolve().name), files)
    write_text(out.with_suffix(".md"), markdown(page, out.parent))
    return write_text(out.with_suffix(".html"), html(page, out.parent))


def by_task(scores: Sequence[Scored]) -> dict[str, list[Scored]]:
    """Results by task and method, in order; what was forgotten comes after what was learnt."""
    tasks: dict[str, list[Scored]] = {}
    for one in sorted(scores, key=lambda one: one.result.task == FORGETTING_TASK):
        tasks.setdefault(one.result.title, []).append(one)
    return tasks


def compose(contents: Contents, tasks: dict[str, list[Scored]], seen: dict[str, Gallery | None], title: str) -> Page:
    """The page in no format yet, its plots not drawn."""
    lead = [ranks_block(contents, path, plan) for path, plan in contents.plans if contents.was_trained(plan)]
    scored = [
        Section(
            f"Scores · {task}" if task else "Scores",
            [Sourced(score_blocks(results, seen[task]), [score_source(contents, one) for one in results])],
        )
        for task, results in tasks.items()
    ]
    names = shown_names([*lead, *(block for section in scored for block in section.blocks)])
    return Page(
        title=printable(title, 120),
        subtitle=subtitle(contents),
        headline=headline(contents, tasks),
        lead=lead,
        sections=[*scored, *sections_of(contents, names)],
        appendix=appendix(contents),
    )


def score_source(contents: Contents, one: Scored) -> SourceFile:
    return contents.source(one.folder, one.file)


def with_pictures(page: Page, folder: Path) -> Page:
    """The page with its plots drawn into the folder; a sentence where a library for them is missing."""
    possible, count = can_draw(), itertools.count()

    def target(plot: Plot | Curves) -> Path | None:
        drawable = possible or isinstance(plot, Curves)
        return folder / f"{next(count):02d}_{plot.name}{plot.suffix}" if drawable else None

    lost = not possible and any(isinstance(one, Plot) for section in page.sections for one in each(section.blocks))
    missing = "Some pictures are not drawn: matplotlib is not installed (pip install 'rankwise[plots]')."
    lead = [*drawn(page.lead, target), *([Words(missing)] if lost else [])]
    return replace(page, lead=lead, sections=[replace(one, blocks=drawn(one.blocks, target)) for one in page.sections])


def subtitle(contents: Contents) -> str:
    """Which model, how long, when."""
    models = dict.fromkeys(plan.model_name for _, plan in contents.plans if plan.model_name)
    parts = [printable(Path(name).name if Path(name).is_absolute() else name, 80) for name in models]
    times = [stage.seconds for stage in contents.stages if stage.seconds is not None]
    if times:
        parts.append(f"{plural(len(times), 'stage')} in {duration(sum(times))}")
    parts.append(datetime.now(UTC).strftime("%Y-%m-%d"))
    return " · ".join(parts)


def headline(contents: Contents, tasks: dict[str, list[Scored]]) -> list[Figure]:
    """Scores before → after, and trainable parameters against full fine-tuning."""
    figures = []
    for results in list(tasks.values())[:1]:
        leading = leading_metrics(one.result for one in results)
        source = score_source(contents, results[-1])
        figures += [score_figure(name, results, source) for name in leading[:HEADLINE_METRICS]]
    return [*figures, *parameters_figure(contents)]


def score_figure(metric: str, results: Sequence[Scored], source: SourceFile) -> Figure:
    """The last result's score, and the first one's where it is what came before."""
    first, last = results[0], results[-1].result
    compared = len(results) > 1 and (first.is_before or len(results) == 2)
    interval = last.intervals.get(metric)
    how = f"by {last.method}, n = {last.n:,}" if last.method else f"n = {last.n:,}"
    return Figure(
        name=printable(metric_name(metric), 40),
        value=score(last.metrics[metric]),
        before=score(first.result.metrics[metric]) if compared else "",
        detail=how + (f" · 95 %: {score(interval[0])} to {score(interval[1])}" if interval else ""),
        source=source,
    )


def parameters_figure(contents: Contents) -> list[Figure]:
    """From the training stage's own count where it left one, else the plan against the analysed matrices."""
    trained, where = fact(contents, "train", "trainable_parameters")
    if trained is None and contents.sites:
        folder, adapted = contents.sites[-1]
        trained, where = adapted.parameters, contents.source(folder, SITES.name)
    full = fact(contents, "train", "total_parameters")[0] or fact(contents, "finetune", "trainable_parameters")[0]
    whole = "of full fine-tuning"
    if contents.plans and (trained is None or full is None):
        path, plan = contents.plans[-1]
        trained, full = plan.parameters, sum(row.site.size for row in plan.sites)
        whole, where = "of the adapted matrices", contents.source(".", path)
    if not trained or not full:
        return []
    detail = f"{percent(trained / full)} {whole} ({amount(full)})"
    return [Figure("trainable parameters", amount(trained), "", detail, where)]


def fact(contents: Contents, kind: str, name: str) -> tuple[float | None, SourceFile | None]:
    """The number of the last stage of this kind that has it, and its manifest."""
    for stage in reversed(contents.stages):
        if stage.name.startswith(kind) and is_number(stage.entry.get(name)):
            return float(stage.entry[name]), contents.source(stage.folder, MANIFEST)
    return None, None


def run(config: ReportConfig) -> Path:
    """Write the page and say where it is."""
    page = build_report(run_folder(config), out_path(config), config.title)
    print(f"report: {page} and {page.with_suffix('.md').name}, {page.stat().st_size / 2**20:.1f} MiB")
    return page


def describe(config: ReportConfig) -> list[str]:
    return [f"write {out_path(config) or run_folder(config) / 'report.html'} and its Markdown twin"]


def run_folder(config: ReportConfig) -> Path:
    if not config.run:
        raise UsageError("report needs a run folder: rankwise report RUN")
    return Path(config.run)


def out_path(config: ReportConfig) -> Path | None:
    if config.out and Path(config.out).suffix not in (".html", ".htm", ""):
        raise UsageError(f"--out {config.out}: the page is HTML; give a name that ends in .html")
    return Path(config.out) if config.out else None
