"""Generate, score, and how sure: generators give texts, tasks turn them into numbers with intervals.

Example* ── Generator ──▶ predictions.jsonl ── Task.score ──▶ EvaluationResult ──▶ evaluation_results.json
"""
