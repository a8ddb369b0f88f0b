"""rankwise evaluate: generate and score a task with a base model, an adapter or a merged model.

rankwise evaluate saved_models/dynamic_lora_model --task e2e_nlg --data_path data/e2e_nlg
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rankwise.config import SCORED_TASKS, EvaluateConfig
from rankwise.data import Example, Renderer, check_samples
from rankwise.errors import DataError, UsageError
from rankwise.nets.adapters import load_adapter
from rankwise.nets.load import load_model, load_tokenizer
from rankwise.nets.sites import torch_dtype
from rankwise.score.generate import GenerationSettings, HFGenerator
from rankwise.score.result import FILE, EvaluationResult
from rankwise.score.tasks import evaluate, task
from rankwise.show.curves import READ_FIRST
from rankwise.store.adapter import adapter_files, is_adapter, read_adapter
from rankwise.store.checkpoint import resolve
from rankwise.store.files import fingerprint
from rankwise.store.run import RunFolder


def run(config: EvaluateConfig) -> EvaluationResult:
    model_path, data_path = check(config)
    folder = output_folder(config)
    base, adapter = base_and_adapter(config, model_path)
    inputs: dict[str, Path | str] = {"model": base, "data": data_path} | ({"adapter": adapter} if adapter else {})
    with folder.lock(), folder.recording("evaluate", inputs) as record:
        examples = task(config.data.task or "").examples(data_path, config.split, skip_bad=config.data.skip_bad)
        for note in examples.notes():
            print(note)
        model, renderer = model_and_renderer(config, base, adapter)
        chosen = fitting(examples.items[: config.num_samples], renderer)
        generator = HFGenerator(model, renderer, decoding(config))
        made_from = {name: fingerprint(Path(value)) for name, value in inputs.items() if Path(value).exists()}
        result = evaluate(task(config.data.task or ""), generator, chosen, folder.path, made_from)
        folder.save_config(config)
        record.outputs["results"] = folder / FILE
    print(summary(result, folder.path))
    return result


def check(config: EvaluateConfig) -> tuple[str, str]:
    """The two paths that nothing works without, and a task that has scores."""
    if not config.model_path:
        raise UsageError("evaluate needs a model: rankwise evaluate MODEL_OR_ADAPTER --task … --data_path …")
    if config.data.task not in SCORED_TASKS:
        raise UsageError(f"--task: scores exist for {', '.join(SCORED_TASKS)}; got {config.data.task}")
    if not config.data.data_path:
        raise UsageError(f"--data_path is missing: where are the official files of {config.data.task}?")
    return config.model_path, config.data.data_path


def output_folder(config: EvaluateConfig) -> RunFolder:
    """evaluation/ beside the model where it is a local folder, else below the current one."""
    if config.output_dir:
        return RunFolder(config.output_dir)
    assert config.model_path is not None
    local = Path(config.model_path)
    return RunFolder((local if local.is_dir() else Path.cwd()) / "evaluation")


def base_and_adapter(config: EvaluateConfig, model_path: str) -> tuple[str, Path | None]:
    """(base model, adapter folder or None). Whatever takes an adapter accepts the run folder."""
    folder = resolve(model_path)
    if not is_adapter(folder):
        return model_path, None
    base = config.base_model_id or read_adapter(folder).base_model
    if not base:
        raise DataError(f"{folder}: the adapter doesn't say what its base model is; give it with --base_model_id")
    return base, adapter_files(folder)[0].parent


def model_and_renderer(config: EvaluateConfig, base: str, adapter: Path | None) -> tuple[Any, Renderer]:
    device = pick_device(config.device)
    tokenizer = load_tokenizer(base)
    model = load_model(base, torch_dtype(config.dtype, trained=False, device=device))
    positions, eos = model.config.get_text_config().max_position_embeddings, model.generation_config.eos_token_id
    if adapter:
        model = load_adapter(model, adapter)
    renderer = Renderer(
        tokenizer,
        style=config.data.prompt,
        max_length=config.data.max_seq_length,
        overlong=config.data.overlong,
        positions=positions,
        reserve=config.generation.max_new_tokens,
        generation_eos=eos,
    )
    return model.to(device).eval(), renderer


def fitting(examples: Sequence[Example], renderer: Renderer) -> list[Example]:
    """The items whose prompts fit; the others are counted aloud."""
    checked = check_samples(examples, renderer, prompts=True)
    for note in checked.notes():
        print(note)
    return [examples[index] for index in checked.usable]


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch here")
    return torch.device(name)


def decoding(config: EvaluateConfig) -> GenerationSettings:
    return GenerationSettings(batch_size=config.batch_size, seed=config.seed, **vars(config.generation))


def summary(result: EvaluationResult, folder: Path) -> str:
    """One line of scores with their 95 % intervals, then what could not be computed and why."""
    shown = []
    for name in dict.fromkeys((task(result.task).headline, *READ_FIRST)):
        if name in result.metrics:
            low, high = result.intervals.get(name, (None, None))
            span = "" if low is None else f" [{low:.2f}, {high:.2f}]"
            shown.append(f"{name} {result.metrics[name]:.2f}{span}")
    lines = [f"{result.task}, n = {result.n}: " + " · ".join(shown)]
    lines += [f"not computed: {name}: {why}" for name, why in result.unavailable.items()]
    return "\n".join([*lines, f"scores and predictions in {folder}"])


def describe(config: EvaluateConfig) -> list[str]:
    check(config)
    return [
        f"generate answers to the {config.split} items of {config.data.data_path} with {config.model_path}",
        f"score them as {config.data.task} and write {output_folder(config) / FILE}",
    ]
