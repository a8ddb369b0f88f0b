"""Experiments with a protocol: rank plans or phase schedules compared at equal parameters, fixed before the first run.

In: a model, rows, the names of arms. Out: study.json and study.md with a verdict per contrast. Start with `command.py`;
`design.py` says what will be done and registers it, `arms.py` and `plans.py` turn an arm's name into ranks and starts,
`material.py` loads what runs share, `execution.py` makes runs (many at a time: `train/together/`), `protocol.py` tunes
and adds seeds, `evidence.py` gives verdicts, `results.py` and `page.py` write them down. `advise` belongs here.
"""
