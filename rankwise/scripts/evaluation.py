"""Scores of a model as the documented functions give them: `rankwise evaluate`, one call per task.

result = evaluate_wikisql("results/experiment/final_model", "org/base", num_samples=100, batch_size=8)
result["exact_match"], result["num_samples"]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rankwise.evaluate import command as stage
from rankwise.evaluate.predictions import EvaluationResult
from rankwise.options.commands import EvaluateConfig
from rankwise.pipeline.table import configured
from rankwise.scripts.experiment import DatasetType, usual_path

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
