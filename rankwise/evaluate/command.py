"""rankwise evaluate: score a task with a base model, an adapter or a merged model; measure what was forgotten.

rankwise evaluate saved_models/dynamic_lora_model --task e2e_nlg --data_path data/e2e_nlg
rankwise evaluate saved_models/dynamic_lora_model --forget other_text.txt
torchrun --nproc-per-node 2 -m rankwise.cli evaluate …    (the processes share the items)
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.data.depth.prepare import depth_facts
from rankwise.data.example import Examples
from rankwise.data.input_record import recorded, system_warning
from rankwise.data.sources.load import settle
from rankwise.errors import UsageError
from rankwise.evaluate import bootstrap, forgetting
from rankwise.evaluate.classify import class_table, confusion_table
from rankwise.evaluate.engines import (
    Subject,
    add_depth,
    compared_base,
    generator,
    refuse_for_vllm,
    renderer_of,
    subject,
)
from rankwise.evaluate.generate import fitting
from rankwise.evaluate.predictions import FORGETTING, READ_FIRST, RESULTS, EvaluationResult, earlier_answers
from rankwise.evaluate.tasks import TASKS, evaluate, part, task
from rankwise.files.adapter import adapter_files, base_and_adapter, recorded_base
from rankwise.files.atomic import fingerprint, fingerprints, write_text
from rankwise.files.checkpoint import base_files, resolve
from rankwise.files.lineage import altered, warn_of_training_rows
from rankwise.files.processes import announce, finish, gathered, process_index
from rankwise.files.run_folder import RunFolder, held
from rankwise.models.load import another_base
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import HARNESS, SCORED_TASKS, is_harness
from rankwise.page.blocks import lines
from rankwise.page.text import with_interval
from rankwise.pipeline.idle import refuse_idle

CONFUSION = "confusion.csv"
EFFECT = "adapter_effect"  # in the settings of a result: what the adapter does in vLLM
WINDOW = 1024  # tokens of a piece of text for --forget


def run(config: EvaluateConfig) -> EvaluationResult | None:
    """The whole command; the task's result, else that of --forget. Processes other than rank 0 return None."""
    config = check(config)
    check_installed(config)
    try:
        return evaluate_model(config)
    finally:
        finish()


def evaluate_model(config: EvaluateConfig) -> EvaluationResult | None:
    folder = output_folder(config)
    base, adapter = base_and_adapter(str(config.model_name), config.base_model_id)
    for note in another_base("the adapter", recorded_base(adapter), base) if adapter else []:
        announce(f"note: {note}")
    made_from = model_facts(base, adapter)
    if doubt := altered(resolve(base), "merge"):
        announce(f"warning: {doubt}")
    with held(folder, "evaluate", inputs(config, base, adapter)) as record:
        renderer = renderer_of(config, base, adapter)
        examples = read_items(config, sees_images=renderer.sight is not None)
        documents = forgetting.read_documents(config.forget) if config.forget else []
        tested = subject(config, base, adapter, renderer)
        result = score_task(config, tested, examples, folder, made_from) if config.data.task else None
        lost = measure_forgetting(config, tested, documents, folder, made_from) if config.forget else None
        if process_index()[0] == 0:
            folder.save_config(config, folder.config_name("evaluate"))
            found = {"results": (result, RESULTS.name), "forgetting": (lost, FORGETTING)}
            record.outputs |= {name: folder / file for name, (each, file) in found.items() if each}
    if result:
        announce(summary(result))
    if lost:
        announce(forgetting.in_words(lost))
    announce(f"results in {folder.path}")
    return result or lost


def earlier(config: EvaluateConfig) -> list[Path]:
    """The answers of an earlier evaluation in the folder."""
    return earlier_answers(output_folder(config).path)


def going_on(config: EvaluateConfig, *, unchanged: bool) -> EvaluateConfig:
    """The config of a recipe's stage that finds answers in its folder: those of an evaluation of something else are
    deleted, once it is sure that this one can begin."""
    if not unchanged:
        check_installed(check(config))
        base_and_adapter(str(config.model_name), config.base_model_id)
        for file in earlier(config):
            file.unlink()
    return config


def check(config: EvaluateConfig) -> EvaluateConfig:
    """The config with its data's task; missing options, and combinations that cannot work, are refused."""
    config = settle(config)
    name = config.data.task
    if not config.model_name:
        raise UsageError("evaluate needs a model: rankwise evaluate MODEL_OR_ADAPTER --task … --data_path …")
    tasks = f"{', '.join(SCORED_TASKS)} or {HARNESS}NAME"
    if not name and not config.forget:
        raise UsageError(f"evaluate needs --task ({tasks}), or --forget FILE, or both")
    if name and not is_harness(name):
        if name not in SCORED_TASKS:
            raise UsageError(f"--task is one of {tasks}; got {name}")
        if not config.data.data_path:
            raise UsageError(f"--data_path is missing: give the official files of {name}")
    refuse_idle(config)
    if config.lm_eval_tasks_path and not Path(config.lm_eval_tasks_path).is_dir():
        raise UsageError(f"--lm_eval_tasks_path: {config.lm_eval_tasks_path} is not a folder of task files")
    if config.data.aux_reason:
        raise UsageError("--aux_reason applies to training only; leave it out (labels alone are evaluated)")
    check_engine(config)
    return config


def check_engine(config: EvaluateConfig) -> None:
    several = process_index()[1] > 1
    if is_harness(config.data.task) and (several or config.engine != "transformers"):
        raise UsageError("--task lm_eval:NAME runs in one process and with --engine transformers")
    if config.engine == "vllm" and several:
        raise UsageError("--engine vllm runs its own processes: start it without torchrun")
    if config.engine == "vllm":
        refuse_for_vllm(config)
    if config.engine == "vllm" and config.forget:
        raise UsageError("--forget needs the logits of both models, which vLLM does not give: --engine transformers")


def check_installed(config: EvaluateConfig) -> None:
    """UsageError naming the extra, before a model is loaded and hours are spent."""
    config = settle(config)
    if config.engine == "vllm":
        part("vllm_engine").check_installed()
    if is_harness(config.data.task):
        part("harness").check_installed()
    elif config.data.task:
        task(config.data.task).check()
    if config.forget:
        bootstrap.check_installed()


def inputs(config: EvaluateConfig, base: str, adapter: Path | None) -> dict[str, str | None]:
    data = None if is_harness(config.data.task) or not config.data.task else config.data.data_path
    named = {"model": base, "data": data, "forget": config.forget}
    if adapter:
        return named | {"adapter": str(adapter_files(adapter)[0])}
    return named | ({"base": config.base_model_id} if config.forget else {})


def model_facts(base: str, adapter: Path | None) -> dict[str, Any]:
    """Fingerprints of the model. Files are listed one by one: the scores may be written into the model's own folder."""
    files = [file for file in adapter_files(adapter) if file] if adapter else []
    facts = {"model": fingerprints(base_files(resolve(base)))}
    return facts | ({"adapter": fingerprints(files)} if files else {})


def output_folder(config: EvaluateConfig) -> RunFolder:
    """evaluation/ beside the model where it is a local folder, else below the current one."""
    if config.output_dir:
        return RunFolder(config.output_dir)
    assert config.model_name is not None
    local = Path(config.model_name)
    return RunFolder((local if local.is_dir() else Path.cwd()) / "evaluation")


def score_task(
    config: EvaluateConfig,
    tested: Subject,
    examples: Examples | None,
    folder: RunFolder,
    made_from: Mapping[str, Any],
) -> EvaluationResult | None:
    """The task's scores, written into the folder."""
    if examples is None:
        result: EvaluationResult = part("harness").evaluate_subject(config, tested, made_from)
        result.save(folder.path)
        return result
    chosen = task(str(config.data.task))
    if tested.adapter:
        warn_of_training_rows(tested.adapter, examples.files[0], "scores tell")
    items = examples.items[: config.num_samples]
    tested = add_depth(config, tested, items)
    engine = generator(config, tested, chosen, items)
    usable = fitting(items, engine.renderer)
    system_warning(recorded(tested.places), usable)
    made_from = {**made_from, "data": fingerprints(examples.files), **depth_facts(tested.depth)}
    by_vllm = config.engine == "vllm" and tested.adapter is not None
    before = EvaluationResult.load(folder.path) if by_vllm and (folder / RESULTS.name).is_file() else None
    found = evaluate(chosen, engine, usable, folder.path, made_from, by=config.classify)
    if found and by_vllm:
        found = with_effect(found, getattr(engine, "effect", None), before)
        found.save(folder.path)
    if found and chosen.classifies:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(confusion_table(found.settings["scoring"]))
        write_text(folder / CONFUSION, text.getvalue())
    return found


def with_effect(result: EvaluationResult, effect: Any, before: EvaluationResult | None) -> EvaluationResult:
    """The result with what its adapter does in vLLM: as measured now, or where nothing was left to answer, then."""
    then = before.settings.get(EFFECT) if before else None
    return replace(result, settings={**result.settings, EFFECT: effect.as_dict() if effect else then})


def read_items(config: EvaluateConfig, *, sees_images: bool) -> Examples | None:
    """The task's items; None of the harness, which has its own. Of several processes the first one downloads; the
    others read when it has read."""
    if not config.data.task or is_harness(config.data.task):
        return None
    first = process_index()[0] == 0
    if not first:
        gathered({})
    how = replace(config.data, download=config.data.download and first)
    examples = task(config.data.task).examples(str(config.data.data_path), config.split, how)
    if first:
        gathered({})
    for note in examples.notes(sees_images=sees_images):
        announce(note)
    return examples


def measure_forgetting(
    config: EvaluateConfig,
    tested: Subject,
    documents: Sequence[str],
    folder: RunFolder,
    made_from: Mapping[str, Any],
) -> EvaluationResult | None:
    """Forgetting of the model on other text, against its base; written into the folder by the first process."""
    if tested.adapter:
        base = forgetting.logits_without_adapter(tested.model)
    else:
        base = forgetting.logits_of(compared_base(config, tested, documents))
    result = forgetting.forgetting(
        base,
        forgetting.logits_of(tested.model),
        tested.renderer.tokenizer,
        documents,
        tested.device,
        forgetting.ForgettingSettings(window=window(config, tested), seed=config.seed),
        {**made_from, "text": fingerprint(str(config.forget))},
    )
    if process_index()[0] != 0:
        return None
    result.save(folder.path, FORGETTING)
    return result


def window(config: EvaluateConfig, tested: Subject) -> int:
    """Tokens of a piece of other text: what training was limited to does not shorten it."""
    return min(filter(None, (config.data.max_seq_length, tested.renderer.positions, WINDOW)))


def summary(result: EvaluationResult) -> str:
    """One line of scores with their 95 % intervals, the classes, and what could not be computed and why."""
    headline = TASKS[result.task].headline if result.task in TASKS else ""
    names = [name for name in dict.fromkeys((headline, *READ_FIRST)) if name in result.metrics]
    shown = [named_score(result, name) for name in names or result.metrics]
    said = [f"{result.title}, n = {result.n}: " + " · ".join(shown)]
    details = result.settings.get("scoring", {})
    said += lines([class_table(details)]) if "by_class" in details else []
    said += [f"not computed: {name}: {why}" for name, why in result.unavailable.items()]
    return "\n".join(said)


def named_score(result: EvaluationResult, name: str) -> str:
    form = "{:.2f}" if result.task in TASKS else "{:.4f}"
    return f"{name} {with_interval(result.metrics[name], result.intervals.get(name), form.format)}"


def describe(config: EvaluateConfig) -> list[str]:
    config = settle(config)
    folder, task, model = output_folder(config), config.data.task, config.model_name
    items = f"answer the {config.split} items of {config.data.data_path} with {model}"
    items = f"run {task} of lm-evaluation-harness on {model}" if is_harness(task) else items
    lines = [items, f"score them as {task} and write {folder / RESULTS.name}"] if task else []
    if config.forget:
        lines.append(f"compare it with its base on {config.forget} and write {folder / FORGETTING}")
    return lines
