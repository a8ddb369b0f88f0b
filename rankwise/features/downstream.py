"""rankwise features downstream: effect on a model's answers of replacing its image features by low-rank factors.

rankwise features downstream MODEL --data_path heldout.json --results_dir results
questions with pictures ──▶ the model as it is, and with X̂ of every method and rank ──▶ downstream.json, .md, .png
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rankwise.data.sources.load import read_examples, task_of
from rankwise.errors import DataError, UsageError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.command import model_facts
from rankwise.evaluate.engines import add_depth, renderer_of, subject
from rankwise.features.answers import (
    Answers,
    Questions,
    Replacement,
    Shape,
    baselines,
    compare_answers,
    controls,
    measured,
    of_method,
    paired,
    questions,
    stretched,
    with_pictures,
)
from rankwise.features.approximation import shared_basis
from rankwise.features.dataset import cached, read_split
from rankwise.features.downstream_page import DOWNSTREAM, MARKDOWN, PICTURE, answer_blocks, answer_page
from rankwise.features.measures import PCA, SVD, network
from rankwise.features.trained import WEIGHTS, Network, is_of, networks, stretch_of
from rankwise.files.adapter import adapter_files, base_and_adapter
from rankwise.files.atomic import fingerprint, write_text
from rankwise.files.checkpoint import model_fingerprint, resolve
from rankwise.files.processes import process_index
from rankwise.files.run_folder import RunFolder
from rankwise.files.versions import LIBRARIES, installed
from rankwise.options.commands import EvaluateConfig
from rankwise.options.features import DownstreamConfig
from rankwise.options.sections import ScoredData
from rankwise.page.blocks import into, lines
from rankwise.page.template import markdown

CONFIG, STAGE = "resolved_config.downstream.json", "features downstream"
CROSSED = "each half of the pictures with a basis from the other half's features"


def run(config: DownstreamConfig) -> Mapping[str, Any]:
    """Measure, write and print; returns the content of downstream.json."""
    check(config)
    bootstrap.check_installed()
    base, adapter = base_and_adapter(str(config.model_name), config.base_model_id)
    folder = RunFolder(config.results_dir)
    with folder.lock(), folder.recording(STAGE, inputs(config, base, adapter)) as record:
        content = compared(config, base, adapter)
        folder.save_config(config, CONFIG)
        files = written(content, folder, config)
        record.outputs |= files
    print("\n".join(lines(answer_blocks(content))))
    print(f"{', '.join(path.name for path in files.values())} in {folder.path}")
    return content


def describe(config: DownstreamConfig) -> list[str]:
    nets = ", ".join(config.arch) or f"every network in {config.results_dir} that fits"
    return [
        f"put the questions of {config.data_path} to {config.model_name} as it is",
        "put them again with its pictures' features replaced, by the SVD, the randomized SVD, a shared PCA, "
        f"{nets}; and by nothing",
        f"write {DOWNSTREAM.name} in {config.results_dir}",
    ]


def check(config: DownstreamConfig) -> None:
    """Check the required inputs before a model is loaded."""
    if not config.model_name:
        raise UsageError("features downstream needs a model: rankwise features downstream MODEL --data_path ROWS")
    if not config.data_path:
        raise UsageError("--data_path is missing: give questions with images and reference answers")
    if process_index()[1] > 1:
        raise UsageError("features downstream runs in one process: start it without torchrun")


def inputs(config: DownstreamConfig, base: str, adapter: Path | None) -> dict[str, Path | str | None]:
    return {"model": base, "data": config.data_path, "adapter": adapter_files(adapter)[0] if adapter else None}


def compared(config: DownstreamConfig, base: str, adapter: Path | None) -> dict[str, Any]:
    """The content of downstream.json."""
    trained = networks(config.results_dir, config.arch)
    rows, notes = asked(config, base, adapter, stretch_of(trained))
    shapes = sorted({(matrix.shape[-2], matrix.shape[-1]) for matrix in rows.features()})
    found, left_out = fitting(trained, shapes, bool(config.arch))
    own = model_fingerprint(resolve(base))  # as a feature cache names its model
    for each in found:
        each.net.to(rows.tested.device)
    ranks = ranks_of(config.ranks, found, shapes)
    divided, source = parts(rows, [each for each in found if is_of(each, own)], ranks[-1], config.seed)
    stand_ins = [replacements(part, ranks, found, shapes, config.seed) for part in divided]
    original, results = answers(rows, divided, stand_ins)
    groups = [rows.groups[place] for part in divided for place in part.places]
    table = [measured(original, original, groups, seed=config.seed)]
    for replacement, result in zip(stand_ins[0], results, strict=True):
        table.append(measured(original, result, groups, replacement, seed=config.seed))
    return {
        "model": {"name": config.model_name, "base": base, **model_facts(base, adapter)},
        "shapes": shapes,
        "rows": [row.record() for row in table],
        "paired": against_baselines(stand_ins[0], results, groups, config.seed),
        "settings": {
            "samples": len(rows),
            "pictures": len({picture for row in rows.pictures for picture in row}),
            "answer_tokens": int(original.tokens.sum()),
            "ranks": ranks,
            "pca_basis": source,
            "networks": {each.name: fingerprint(each.folder / WEIGHTS) for each in found},
            "data": fingerprint(str(config.data_path)),
            "dtype": str(next(rows.tested.model.parameters()).dtype).removeprefix("torch."),
            "seed": config.seed,
        },
        "notes": [*notes, *left_out, *origin_notes(found, own, rows)],
        "versions": installed(LIBRARIES),
    }


def asked(
    config: DownstreamConfig, base: str, adapter: Path | None, square: int | None = None
) -> tuple[Questions, list[str]]:
    """The model with its adapter and the questions, rendered as in its training; and notes on rows left out.

    square: what pictures are stretched to unless --image_size or a device says otherwise.
    """
    how = as_evaluation(config)
    renderer = renderer_of(how, base, adapter)
    examples = read_examples(how.data, str(config.data_path), how.split, sees_images=renderer.sight is not None)
    tested = stretched(subject(how, base, adapter, renderer), config.image_size, square)
    chosen, notes = with_pictures(examples, config.num_samples, str(config.data_path))
    rows = questions(add_depth(how, tested, chosen), chosen, config.batch_size)
    return rows, [*notes, *rows.rows.notes()]


def as_evaluation(config: DownstreamConfig) -> EvaluateConfig:
    """The options under which `rankwise evaluate` would put these questions to this model."""
    data = ScoredData(data_path=config.data_path, image_folder=config.image_folder, allow_outside=config.allow_outside)
    task = task_of(data)
    if task is None:
        raise UsageError(
            f"--data_path {config.data_path}: conversations (.json, .jsonl) or the folder of a labelled data set with "
            "task.json are read here"
        )
    return EvaluateConfig(
        model_name=config.model_name,
        data=replace(data, task=task),
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
    )


def answers(
    rows: Questions, divided: Sequence[Fold], stand_ins: Sequence[Sequence[Replacement]]
) -> tuple[Answers, list[Answers]]:
    """Of the rows in the order of the parts: as the model is, and with each replacement."""
    pairs = [
        compare_answers(rows.tested.model, rows.batches(part.places), own)
        for part, own in zip(divided, stand_ins, strict=True)
    ]
    originals, results = zip(*pairs, strict=True)
    return Answers.joined(originals), [Answers.joined(same) for same in zip(*results, strict=True)]


def against_baselines(
    stand_ins: Sequence[Replacement], results: Sequence[Answers], groups: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Every network's KL minus that of the SVD and of the shared PCA of its rank, on the same rows."""
    found = {(each.method, each.rank): result for each, result in zip(stand_ins, results, strict=True)}
    return [
        {
            "method": each.method,
            "rank": each.rank,
            "against": other,
            **paired(result, found[other, each.rank], groups, seed=seed),
        }
        for each, result in zip(stand_ins, results, strict=True)
        for other in (SVD, PCA)
        if each.network and (other, each.rank) in found
    ]


def written(content: Mapping[str, Any], folder: RunFolder, config: DownstreamConfig) -> dict[str, Path]:
    page = answer_page(content, None if config.no_plots else into(folder.path))
    files = {
        "downstream": DOWNSTREAM.write(folder, content),
        "table": write_text(folder / MARKDOWN, markdown(page, folder.path)),
    }
    return files if config.no_plots else {**files, "plot": folder / PICTURE}


@dataclass(frozen=True)
class Fold:
    """Rows that share a basis (r, D) of the shared PCA; None where there are too few pictures for one."""

    places: Sequence[int]
    basis: Tensor | None


def fitting(found: Sequence[Network], shapes: Sequence[Shape], asked: bool) -> tuple[list[Network], list[str]]:
    """The networks that take these shapes, and notes on the others.

    asked: they were named; then DataError for one that does not fit.
    """
    usable, notes = [], []
    for each in found:
        wanted = (each.net.settings.tokens, each.net.settings.channels)
        if all(shape == wanted for shape in shapes):
            usable.append(each)
            continue
        line = f"{each.name} takes {sized(wanted)}, and these pictures give {', '.join(map(sized, shapes))}"
        if asked:
            raise DataError(f"{each.folder}: {line}; leave it out of --arch, or capture and train at that size")
        notes.append(f"{line}: left out")
    return usable, notes


def origin_notes(found: Sequence[Network], fingerprint: str, rows: Questions) -> list[str]:
    """Caveats about the networks' training data: another model, or images that are evaluated here."""
    notes = []
    for each in found:
        if each.cache is None:
            notes.append(f"{each.name}: which model its features came from is not known: {each.lost}")
            continue
        origin = each.cache.model
        if origin is None:
            notes.append(f"{each.name} was trained on {each.cache.source}, which names no model")
        elif origin.fingerprint != fingerprint:
            notes.append(
                f"warning: {each.name} was trained on features of {origin.name}, whose files are not this model's "
                f"({origin.fingerprint[:12]}… against {fingerprint[:12]}…): unless they see alike, its numbers are not "
                "those of a network for this model"
            )
        notes += seen_in_training(each, rows)
    return notes


def seen_in_training(each: Network, rows: Questions) -> list[str]:
    assert each.cache is not None
    trained = {each.cache.groups[place] for place in read_split(each.folder, each.cache).train}
    shown = {picture for row in rows.pictures for picture in row}
    known = len(shown & trained)
    if not known:
        return []
    return [
        f"warning: {each.name} was trained on {known} of these {len(shown)} pictures: it does better than on new ones"
    ]


def sized(shape: Shape) -> str:
    return f"{shape[0]} tokens × {shape[1]} channels"


def ranks_of(asked: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape]) -> list[int]:
    """Ranks of the baselines, ascending. UsageError for one that no matrix has."""
    most = max(min(shape) for shape in shapes)
    default = [each.rank for each in found] or [max(1, most // 4), max(1, most // 2), most]
    ranks = sorted(set(asked or default))
    if not 1 <= ranks[0] <= ranks[-1] <= most:
        raise UsageError(f"--ranks: matrices of {sized(max(shapes))} have ranks 1 to {most}; got {ranks}")
    return ranks


def parts(rows: Questions, found: Sequence[Network], rank: int, seed: int) -> tuple[list[Fold], str]:
    """The rows with the bases of the shared PCA, and where those come from: the training matrices of a cache, else,
    crosswise, the rows' own pictures. found: networks whose caches hold features of this model."""
    whole = list(range(len(rows)))
    for each in found:
        if each.cache is not None:
            split = read_split(each.folder, each.cache)
            basis = shared_basis(cached(each.cache, split.train), rank).to(rows.tested.device)
            return [Fold(whole, basis)], f"basis from the {len(split.train)} training matrices of {each.cache.path}"
    halves = rows.halves(seed)
    if len(halves) < 2:
        return [Fold(whole, None)], "left out, since there is only one picture and no cache to take a basis from"
    first, second = (shared_basis(rows.features(places), rank) for places in halves)
    return [Fold(halves[0], second), Fold(halves[1], first)], CROSSED


def replacements(
    part: Fold, ranks: Sequence[int], found: Sequence[Network], shapes: Sequence[Shape], seed: int
) -> list[Replacement]:
    """All replacements, in the table's order: no image, baselines by method and rank, networks, all ranks."""
    whole, nothing = controls(*max(shapes, key=min))
    by_rank = [baselines(rank, part.basis, seed) for rank in ranks]
    ordered = [method for same in zip(*by_rank, strict=True) for method in same]
    learned = [one for each in found for one in of_method(network(each.net, each.name), each.rank)]
    return [nothing, *ordered, *learned, whole]
