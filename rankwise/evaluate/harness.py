"""Tasks of the lm-evaluation-harness on a loaded model: its prompts, data and scores, our results file.

rankwise evaluate RUN --task lm_eval:arc_easy
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.errors import DataError, UsageError, need
from rankwise.evaluate import bootstrap
from rankwise.evaluate.engines import Subject
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.files.processes import announce
from rankwise.options.commands import EvaluateConfig
from rankwise.options.field import unknown
from rankwise.options.sections import HARNESS

EXTRA = "harness"
Z = 1.959964  # two-sided 95 % of a normal distribution: the harness gives standard errors
MORE = 3
SHARES = ("acc", "acc_norm", "exact_match")  # metrics that are a share of the items


def check_installed() -> None:
    """UsageError naming the extra where the harness is missing."""
    need("lm_eval", extra=EXTRA)
    bootstrap.check_installed()


def evaluate_subject(config: EvaluateConfig, tested: Subject, made_from: Mapping[str, Any]) -> EvaluationResult:
    """`evaluate_harness` with the command's task and chat template."""
    task, chat, tokenizer = str(config.data.task), in_chat(config), tested.renderer.tokenizer
    if tested.renderer.style == "chat" and not chat:
        announce(f"note: {task} has prompts of its own, without training's chat template: --prompt chat adds it")
    if chat:
        tokenizer.chat_template = tested.renderer.template_source
    return evaluate_harness(task, tested.model, tokenizer, config, made_from)


def in_chat(config: EvaluateConfig) -> bool:
    """Whether prompts go through the tokenizer's chat template."""
    return config.data.prompt == "chat"


def evaluate_harness(
    task: str,
    model: Any,
    tokenizer: Any,
    config: EvaluateConfig,
    made_from: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Run `lm_eval:NAME` (a task or a group of tasks) on a transformers or PEFT model.

    Metrics keep the harness's names and scales (accuracies are 0 to 1); a filter other than `none` is part of the
    name. Intervals are value ± 1.96 standard errors, where the harness gives one. n counts items. Raises UsageError
    for a task that it does not know, DataError where it cannot get the task's data.
    """
    name = task.removeprefix(HARNESS)
    manager = _manager(name, config.lm_eval_tasks_path)
    adapter = need("lm_eval.models.huggingface", extra=EXTRA).HFLM
    runner = adapter(pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size, device=str(model.device))
    try:
        found = need("lm_eval", extra=EXTRA).simple_evaluate(
            model=runner,
            tasks=[name],
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.num_samples,
            apply_chat_template=in_chat(config),
            log_samples=False,
            random_seed=config.seed,
            numpy_random_seed=config.seed,
            torch_random_seed=config.seed,
            fewshot_random_seed=config.seed,
        )
    except OSError as error:  # what `datasets` raises for a missing file, data set or network
        raise DataError(f"{task}: the harness cannot load its data: {str(error).splitlines()[0]}") from error
    return _result(task, found, model, config, dict(made_from or {}))


def _manager(name: str, tasks_path: str | None) -> Any:
    """The harness's index of tasks: the user's folder alone if the task is there, since its own takes long to read."""
    index = need("lm_eval.tasks", extra=EXTRA).TaskManager
    if tasks_path:
        own = index(include_path=tasks_path, include_defaults=False)
        if name in own.all_tasks:
            return own
    manager = index(include_path=tasks_path)
    if name not in manager.all_tasks:
        raise unknown(name, manager.all_tasks, "--task lm_eval", "task of the harness")
    return manager


def _result(
    task: str, found: Mapping[str, Any], model: Any, config: EvaluateConfig, made_from: dict[str, Any]
) -> EvaluationResult:
    name = task.removeprefix(HARNESS)
    values, errors = read_metrics(found["results"][name])
    if not values:
        raise UsageError(f"{task}: the harness reports no score for it; choose one of its tasks: {_parts(found, name)}")
    parts = {part: row["effective"] for part, row in found["n-samples"].items()}
    return EvaluationResult(
        task=task,
        metrics=values,
        intervals=intervals_of(values, errors, sum(parts.values()) if len(parts) == 1 else 0),
        n=sum(parts.values()),
        settings={
            "engine": "lm-evaluation-harness",
            "dtype": str(model.dtype).removeprefix("torch."),
            "tasks_path": config.lm_eval_tasks_path,
            "num_fewshot": config.num_fewshot,
            "limit": config.num_samples,
            "batch_size": config.batch_size,
            "chat": in_chat(config),
            "seed": config.seed,
            "scale": "as the harness gives it",
            "task_versions": dict(found["versions"]),
            "n_shot": dict(found["n-shot"]),
            "items": parts,
            "by_task": {part: read_metrics(found["results"][part])[0] for part in parts if part != name},
            "made_from": made_from,
        },
        versions={"lm_eval": str(found["lm_eval_version"]), "transformers": str(found["transformers_version"])},
    )


def intervals_of(values: Mapping[str, float], errors: Mapping[str, float], n: int) -> dict[str, tuple[float, float]]:
    """95 %: Wilson's of shares of n items (of one task; n is 0 for a group), else from the harness's standard error,
    where there is one: it is 0 where all items score alike, which says nothing."""
    found = {
        metric: (values[metric] - Z * error, values[metric] + Z * error) for metric, error in errors.items() if error
    }
    shares = [metric for metric in errors if metric in SHARES and n]
    return found | {metric: bootstrap.wilson(round(values[metric] * n), n) for metric in shares}


def read_metrics(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """(metric → value, metric → standard error) of one row of the harness, whose keys are `metric,filter`."""
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in row.items():
        metric, comma, filter_ = key.partition(",")
        if not comma or isinstance(value, str):
            continue  # its name, its alias, or "N/A"
        is_error = metric.endswith("_stderr")
        metric = metric.removesuffix("_stderr") + ("" if filter_ == "none" else f"_{filter_}")
        (errors if is_error else values)[metric] = float(value)
    return values, {metric: error for metric, error in errors.items() if metric in values}


def _parts(found: Mapping[str, Any], name: str) -> str:
    parts = list(found.get("group_subtasks", {}).get(name, ()))
    return ", ".join(parts[:MORE]) + (" …" if len(parts) > MORE else "")
