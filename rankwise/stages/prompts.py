"""The prompts that `rankwise merge` compares models on: the first rows of a data set, rendered as in training.

--task … --data_path …  ── read_examples ── renderer_for ──▶ one batch, images included
"""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

from rankwise.data.dataset import check_samples
from rankwise.data.reading import read_examples, task_of
from rankwise.data.renderer_for import renderer_for
from rankwise.errors import UsageError
from rankwise.models.load import load_config
from rankwise.options.commands import MergeConfig
from rankwise.options.sections import ModelSection
from rankwise.page.text import plural
from rankwise.ship.merging.samples import Batch, prompt_batch


def check_prompts(config: MergeConfig) -> None:
    """UsageError for half of what prompts need."""
    data = config.data
    if data.task and not data.data_path:
        raise UsageError("merge: --task says how rows become prompts; --data_path is missing: where are the rows?")
    if data.data_path and not task_of(data):
        raise UsageError("merge: --data_path says where the rows are; --task is missing: how do they become prompts?")


def compared_on(config: MergeConfig) -> str:
    if not config.data.data_path:
        return "random tokens"
    return f"{plural(config.num_samples, 'prompt')} of {config.data.data_path}"


def prompts_of(config: MergeConfig, base: str, adapter: Path) -> Batch | None:
    """The first --num_samples prompts that fit; None without --data_path."""
    if not config.data.data_path:
        return None
    data = replace(config.data, task=task_of(config.data), overlong="drop")
    renderer = renderer_for(data, ModelSection(model_name=base), base, load_config(base), [adapter])
    found = read_examples(data, config.data.data_path, config.split, sees_images=renderer.sight is not None)
    first = list(islice(found.items, config.num_samples))
    usable = check_samples(first, renderer, prompts=True).usable
    return prompt_batch(renderer, [first[index] for index in usable])
