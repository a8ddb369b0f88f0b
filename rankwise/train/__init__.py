"""Train: a model, rows and a rank plan (or one rank) in; a plain PEFT adapter, its losses and gradient norms out.

    command.py (train) | finetune.py ─▶ job: rows, identity ─▶ adapter: LoRA as planned ─▶ launch ─▶ trainer ─▶ results

What a tower trains and at which rate: towers. What freezes when: phases. Who divides the ranks: adalora. Which
checkpoint is kept: selection. What a resume needs: checkpoints. Flags of transformers: arguments. Inside a step: step,
rows, gradients, interruption. Tables and pictures: gradient_table, _summary, _plots, loss_plots. Time and memory before
the start: estimate/. Arms that train batched in one model belong here too.
"""
