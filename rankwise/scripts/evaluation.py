"""Scores of a model as the documented functions give them: `rankwise evaluate`, one call per task.

result = evaluate_wikisql("results/experiment/final_model", "org/base", num_samples=100, batch_size=8)
result["exact_match"], result["num_samples"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from rankwise.data.dataset import Collator, RenderedDataset
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.evaluate import command as stage
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.models.adapt import adapt
from rankwise.models.load import load_model, load_tokenizer, torch_dtype
from rankwise.models.sites import model_sites
from rankwise.models.targets import choose_sites, uniform_plan
from rankwise.options.commands import EvaluateConfig
from rankwise.options.sections import MAX_SEQ_LENGTH, LoraSection
from rankwise.pipeline.table import configured
from rankwise.scripts.experiment import DataConfig, DatasetType, LoRAConfig, ModelConfig, usual_path

BATCH = EvaluateConfig().batch_size


@dataclass(frozen=True)
class ModelEvaluator:
    """A model or adapter under test.

    generation: further options of `rankwise evaluate` (max_new_tokens, num_beams, temperature, top_p, do_sample …).
    Prompts are padded on the left.
    """

    model_path: str | Path
    base_model_id: str | None = None
    batch_size: int = BATCH
    generation: dict[str, Any] = field(default_factory=dict)

    def evaluate(
        self,
        task: str,
        num_samples: int | None = None,
        *,
        data_path: str | Path | None = None,
        split: str = "dev",
        output_dir: str | Path | None = None,
    ) -> EvaluationResult:
        """Answer the first items of a split and score them.

        Args:
            task: e2e_nlg, samsum, wikisql, multi_nli.
            num_samples: items, in file order [all].
            data_path: the official files [data/<task>].
            output_dir: where predictions and scores go [evaluation/<task> beside the model].
        """
        local = Path(self.model_path)
        folder = output_dir or (local if local.is_dir() else Path.cwd()) / "evaluation" / task
        options = {
            "model_path": str(self.model_path),
            "base_model_id": self.base_model_id,
            "batch_size": self.batch_size,
            "task": str(task),
            "num_samples": num_samples,
            "data_path": str(data_path or usual_path(task)),
            "split": split,
            "output_dir": str(folder),
            **self.generation,
        }
        given = {name: value for name, value in options.items() if value is not None}
        result = stage.run(configured("evaluate", given, "ModelEvaluator"))
        assert result is not None, "one process"
        return result


def task_function(task: DatasetType, scores: str) -> Callable[..., EvaluationResult]:
    """`ModelEvaluator.evaluate` for one task as a plain function."""

    def evaluate(
        model_path: str | Path,
        base_model_id: str | None = None,
        num_samples: int | None = None,
        batch_size: int = BATCH,
        **options: Any,
    ) -> EvaluationResult:
        return ModelEvaluator(model_path, base_model_id, batch_size).evaluate(task, num_samples, **options)

    evaluate.__doc__ = f"{scores}. Reads like a mapping. Options: data_path [{usual_path(task)}], split, output_dir."
    return evaluate


evaluate_e2e = task_function(DatasetType.E2E_NLG, "BLEU-1 to BLEU-4, ROUGE and METEOR on E2E NLG")
evaluate_samsum = task_function(DatasetType.SAMSUM, "BLEU, ROUGE and METEOR on SAMSum")
evaluate_wikisql = task_function(DatasetType.WIKISQL, "Exact match on WikiSQL, and what else its scorer finds")
evaluate_multi_nli = task_function(DatasetType.MULTI_NLI, "Accuracy over entailment, neutral and contradiction")


def setup_model_with_lora(model_config: ModelConfig, lora_config: LoRAConfig) -> tuple[PeftModel, Any]:
    """The base, frozen, with an adapter of one rank at the named projections; and its tokenizer.

    The adapter's random start comes from torch's global generator: seed it before. Gradient checkpointing is on
    unless the config turns it off.
    """
    name = model_config.model_name
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = load_model(name, torch_dtype(model_config.dtype, trained=False, device=device))
    sites = choose_sites(model_sites(base), names=lora_config.target_modules)
    plan = uniform_plan(sites, lora_config.r, lora_config.alpha, False, name)
    model = adapt(base, plan, LoraSection(lora_dropout=lora_config.dropout))
    if model_config.gradient_checkpointing:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.disable_input_require_grads()  # or backward would pass through every frozen layer
    return model, load_tokenizer(name)


def load_and_preprocess_dataset(
    data_config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str = "train"
) -> RenderedDataset:
    """The rows of a task as token ids and labels, rendered as training and evaluation render them.

    Args:
        data_config: `max_samples` takes the first rows here; `run_experiment` draws them.
        split: train, dev or test, of the official files. No share is held out for validation here: `run_experiment`
            does that, by group.
    """
    examples = load(data_config.dataset_type, data_config.path, split)
    rows = examples.items[: data_config.max_samples]
    return RenderedDataset(rows, Renderer(tokenizer, max_length=data_config.max_length or MAX_SEQ_LENGTH))


def get_data_collator(tokenizer: PreTrainedTokenizerBase) -> Collator:
    """Pads a batch on the right; labels are masked by length, never by comparing ids with the pad token."""
    return Collator.of(tokenizer)
