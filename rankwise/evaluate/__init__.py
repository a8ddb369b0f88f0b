"""Scores with intervals: a model and samples go in, predictions.jsonl and evaluation_results.json come out.

    samples ── engine (generate, vllm_engine) ──▶ predictions ── Task.score ──▶ EvaluationResult

command.py      `evaluate`                         tasks.py   the table of tasks and `evaluate(task, …)` for Python
engines.py      a name → model, renderer, engine   text, answers, classify, sql   the scorers; bootstrap: intervals
forgetting.py   KL and perplexity on other text    likelihood.py   loss of given answers   harness.py   lm_eval:NAME
"""
