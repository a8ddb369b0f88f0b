"""From the contents of a run folder to the sections of its report: what was found, in order of time.

    contents ── artefacts ──▶ (kinds of stage, folder, blocks)* ── sections_of ──▶ Section*

How an artefact looks is its room's: `*_blocks`. It belongs to the stage of its kind whose folder holds it; without a
manifest it gets a section of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from rankwise.core.plan import RankPlan
from rankwise.files.run_folder import MANIFEST, MARKS, SITES, STATE
from rankwise.page.blocks import Block, Folded, Picture, Plot, Section, Sourced, SourceFile, Table, Words, each
from rankwise.page.canvas import can_draw
from rankwise.page.grid import CellMap
from rankwise.page.svg import Curves
from rankwise.page.text import clip, duration, is_number, memory, number, plural, printable
from rankwise.pipeline.times import time_table
from rankwise.ranks.page import plan_blocks, rank_map
from rankwise.report.contents import Adapted, Contents, StageRun
from rankwise.train.gradient_plots import gradient_blocks
from rankwise.train.gradient_summary import boundaries
from rankwise.train.gradient_table import GROUPS, LAYERS, NORMS, TRAINING_LOG
from rankwise.train.loss_plots import loss_blocks

Found = tuple[tuple[str, ...], str, list[Block]]  # kinds of stage that make it, folder, what is shown


ORDER = (
    *("label", "check", "finetune", "ranks", "advise", "extract", "compress", "train", "evaluate", "study"),
    *("merge", "export", "validate", "bundle"),
    *("features capture", "features train", "features compare", "features downstream"),
)
STAGE_KEYS = {"stage", "energy_kept", "started", "finished", "seconds", "python", "versions", "inputs", "outputs"}
MOST_PICTURES, MOST_FACTS = 8, 16
Owned = tuple[StageRun | None, str]


def sections_of(contents: Contents, drawn: Set[str]) -> list[Section]:
    """Every stage with what it left behind, in order of time; pieces without a stage follow in the flow's order.

    drawn: names of the plots that the page has elsewhere.
    """
    stages = sorted(contents.stages, key=lambda stage: (stage.started, position(stage.name)))  # times are in seconds
    pieces: dict[Owned, list[Block]] = {(stage, stage.name): [] for stage in stages}
    found = list(artefacts(contents))
    names = {name for _, _, blocks in found for name in shown_names(blocks)}
    for kinds, where, blocks in [*found, *loose_pictures(contents, names | drawn)]:
        if blocks:
            stage = owner(contents.stages, kinds, where)
            pieces.setdefault((stage, stage.name if stage else kinds[0]), []).extend(blocks)
    timed = [key for key in pieces if key[0] is not None]
    loose = sorted((key for key in pieces if key[0] is None), key=lambda key: position(key[1]))
    spent = Sourced([time_table(contents.times)], [contents.source(STATE, MARKS)])
    return [
        *(section(contents, stage, name, pieces[stage, name]) for stage, name in [*timed, *loose]),
        *([Section("time and memory", [spent])] if contents.times else []),
    ]


def shown_names(blocks: Sequence[Block]) -> set[str]:
    """Names of what these blocks draw, which is also that of the picture that the room's own command leaves."""
    kinds = (Plot, Curves, CellMap) if can_draw() else (Curves, CellMap)
    return {block.name for block in each(blocks) if isinstance(block, kinds)}


def artefacts(contents: Contents) -> Iterator[Found]:
    """What each artefact looks like, in its room's blocks, with its file; the scores have the headline."""
    for path, plan in contents.plans:
        norms = contents.norms(plan)[0]
        untrained = [] if contents.was_trained(plan) else [rank_map(plan, norms)]  # else it leads the page
        blocks = [*untrained, *plan_blocks(plan, norms)]
        yield ("ranks",), Path(path).parent.as_posix(), [Sourced(blocks, plan_sources(contents, path, plan))]
    for where, adapted in contents.sites:
        yield ("train",), where, [Sourced([Words(adapted_sites(adapted))], [contents.source(where, SITES.name)])]
    for where, log in contents.logs:
        blocks = loss_blocks(log, boundaries(dict(contents.phases).get(where, ())))
        yield ("train", "finetune"), where, sourced(blocks, contents.source(where, TRAINING_LOG))
    for where, tables in contents.gradients:
        files = [contents.source(where, name) for name in (GROUPS, LAYERS, NORMS)]
        there = [one for one in files if one.path.is_file()]
        yield ("train", "finetune"), where, sourced(gradient_blocks(tables), *there)
    for finding, where, content in contents.findings:
        yield finding.commands, where, sourced(finding.blocks(content), contents.source(where, finding.file))


def sourced(blocks: list[Block], *sources: SourceFile) -> list[Block]:
    return [Sourced(blocks, sources)] if blocks else []


def ranks_block(contents: Contents, path: str, plan: RankPlan) -> Block:
    """The map of a plan's ranks."""
    return Sourced([rank_map(plan, contents.norms(plan)[0])], plan_sources(contents, path, plan))


def plan_sources(contents: Contents, path: str, plan: RankPlan) -> list[SourceFile]:
    """The plan, and the table of gradient norms where one is of its sites."""
    norms, where = contents.norms(plan)
    return [contents.source(".", path), *([contents.source(where, NORMS)] if norms else [])]


def owner(stages: Sequence[StageRun], kinds: Sequence[str], where: str) -> StageRun | None:
    """The stage of one of these kinds in the deepest folder that holds `where`."""
    fitting = [
        stage
        for stage in stages
        if stage.name.startswith(tuple(kinds)) and (stage.folder == "." or f"{where}/".startswith(f"{stage.folder}/"))
    ]
    rank = {kind: -i for i, kind in enumerate(kinds)}
    return max(
        fitting,
        key=lambda stage: (stage.folder != ".", len(stage.folder), rank.get(stage.name, -len(kinds))),
        default=None,
    )


def position(name: str) -> int:
    return ORDER.index(name) if name in ORDER else len(ORDER)


def section(contents: Contents, stage: StageRun | None, name: str, blocks: list[Block]) -> Section:
    if stage is None:
        return Section(name, blocks)
    manifest = contents.source(stage.folder, MANIFEST)
    aside = "" if stage.seconds is None else duration(stage.seconds)
    title = name if stage.folder in (".", name) else f"{name} · {stage.folder}"
    return Section(title, [*sourced(stage_facts(stage.entry), manifest), *blocks], stage.started, aside, manifest)


def stage_facts(entry: Mapping[str, Any]) -> list[Block]:
    """The stage's plain facts (numbers, words) and where its outputs are."""
    rows = []
    for name, value in entry.items():
        if name in STAGE_KEYS or isinstance(value, (dict, list)) or value is None:
            continue
        shown = memory(value) if name.endswith("_bytes") and is_number(value) else plain(value)
        rows.append((name.replace("_memory_bytes", "_bytes").replace("_bytes", "_memory").replace("_", " "), shown))
    outputs = entry.get("outputs")
    if isinstance(outputs, dict) and outputs:
        paths = [str(row.get("path", name)) if isinstance(row, dict) else str(row) for name, row in outputs.items()]
        rows.append(("written", clip(", ".join(paths), 160)))
    return [Table((), rows[:MOST_FACTS])] if rows else []


def plain(value: Any) -> str:
    return number(value) if is_number(value) else clip(str(value), 120)


def adapted_sites(adapted: Adapted) -> str:
    if not adapted.ranks:
        return "No site was adapted."
    said = f"{plural(len(adapted.ranks), 'site')} adapted with {adapted.span()}: {adapted.parameters:,} parameters."
    return said + (f" {plural(adapted.left_out, 'site')} of the plan left out." if adapted.left_out else "")


def loose_pictures(contents: Contents, drawn: Set[str]) -> Iterator[Found]:
    """Plots of the run that the report does not draw itself, a few of each folder."""
    folders: dict[str, list[str]] = {}
    for picture in contents.pictures:
        if Path(picture).stem not in drawn:
            folders.setdefault(Path(picture).parent.as_posix(), []).append(picture)
    for where, names in folders.items():
        step = -(-len(names) // MOST_PICTURES)
        kept = [
            Sourced([Picture(contents.run / name, clip(Path(name).stem, 90))], [contents.source(".", name)])
            for name in names[::step]
        ]
        title = f"{plural(len(names), 'plot')} in {where}" + (f", {len(kept)} shown" if step > 1 else "")
        yield ("ranks",) if "analysis_outputs" in where else ("train", *ORDER), where, [Folded(title, kept)]


def appendix(contents: Contents) -> list[Block]:
    """Versions and settings, for reproduction."""
    found: list[Block] = []
    versions = {f"{name} {version}" for stage in contents.stages for name, version in known_versions(stage)}
    if versions:
        found.append(Folded("Versions", [Words(", ".join(sorted(versions)))]))
    for path, settings in contents.settings:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        shown = Folded(f"Settings · {path}", verbatim=printable(text, 8000))
        found.append(Sourced([shown], [contents.source(".", path)]))
    return found


def known_versions(stage: StageRun) -> list[tuple[str, str]]:
    listed = stage.entry.get("versions")
    found = [(name, version) for name, version in (listed if isinstance(listed, dict) else {}).items() if version]
    return found + ([("Python", stage.entry["python"])] if stage.entry.get("python") else [])
