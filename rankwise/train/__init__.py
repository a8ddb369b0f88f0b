"""Train: a model, rows and a rank plan (or one rank) in; a plain PEFT adapter, its losses and gradient norms out.

    command.py (train) | finetune.py ─▶ job ─▶ adapter: LoRA as planned ─▶ launch ─▶ trainer ─▶ results

`job.py`: the rows, and the facts that a resume must match. What a tower trains and at which rate: `towers.py`. What
freezes when: `phases.py`. Rank allocation during training: `adalora.py`. Which checkpoint is kept: `selection.py`.
What a resume needs: `checkpoints.py`. Flags of transformers: `arguments.py`. Inside a step: `step.py`, `rows.py`,
`gradients.py`, `interruption.py`. Tables and plots: `gradient_table.py`, `gradient_summary.py`, `gradient_plots.py`,
`loss_plots.py`. Time and memory before the start: estimate/. Many adapters at a time: together/.
"""
