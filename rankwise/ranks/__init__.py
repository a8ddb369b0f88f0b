"""Ranks from spectra: what fine-tuning changed, and the rank to train of each matrix.

In: two checkpoints, saved deltas of `rankwise finetune`, or an adapter. Out: a rank plan with evidence (`ranks`), or
an adapter (`extract`, `compress`). Start with `command.py`; `probe.py` opens sources, `spectra.py` measures them,
`decide.py` makes plans, `gain.py` measures by running the model, `summary.py` and `plots.py` show it, `emit.py` writes
other trainers' configs, `fidelity.py` reports what an adapter keeps, `proof.py` checks it against the model's logits.
"""
