"""Adapter into base: a base and a PEFT adapter go in, a Hugging Face checkpoint comes out, proved to be their sum.

`command.py` is the command; `plan.py` checks every name and shape before a byte is written; `write.py` writes shard by
shard, and the files beside the weights; `verify.py` proves the files and the logits; `logits.py` runs the models for
that, whole or with one layer in memory at a time.
"""
