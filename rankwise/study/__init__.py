"""Experiments by a protocol: arms compared at equal parameters (`study`), and what to train with (`advise`).

In: a model, rows, arms. Out: a verdict per contrast, or advice for `train`. Both: `material.py` loads what runs share,
`evidence.py` turns losses into verdicts, `train/together/` makes many runs at a time.

`study`: start with `command.py`; `design.py` registers what will be done, `arms.py` and `plans.py` turn an arm's name
into ranks and starts, `execution.py` makes runs, `protocol.py` tunes and adds seeds, `results.py` and `page.py` report.
`advise`: start with `advise.py`; `climb.py` says which short runs come next, `trials.py` makes them, `advice.py` draws
conclusions, `advice_page.py` shows them.
"""
