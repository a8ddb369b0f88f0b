"""Generate, score, and how sure: generators give texts, tasks turn them into numbers with intervals.

Example* ── Generator ──▶ predictions.jsonl ── Task.score ──▶ EvaluationResult ──▶ evaluation_results.json
"""

from __future__ import annotations

from rankwise.score.classify import ByLikelihood, score_labels
from rankwise.score.generate import Generated, GenerationSettings, Generator, HFGenerator, LabelScores
from rankwise.score.likelihood import answer_losses, training_batches
from rankwise.score.predictions import Prediction, predict
from rankwise.score.result import EvaluationResult, Scores
from rankwise.score.tasks import TASKS, Task, evaluate, task
from rankwise.score.text import score_text

__all__ = [
    "TASKS",
    "ByLikelihood",
    "EvaluationResult",
    "Generated",
    "GenerationSettings",
    "Generator",
    "HFGenerator",
    "LabelScores",
    "Prediction",
    "Scores",
    "Task",
    "answer_losses",
    "evaluate",
    "predict",
    "score_labels",
    "score_text",
    "task",
    "training_batches",
]
