"""Training: TrainingArguments' flags, one Trainer subclass, and checkpoints that can be trusted.

stage ──▶ build_arguments ──▶ RankwiseTrainer(model, data).train(checkpoint) ──▶ weights, training_log.csv, checkpoints
"""
