"""The disk: paths in, values out, and back; whole files or none, DataError for what is broken.

Weights: `checkpoint` (any base), `adapter` (PEFT's format), `plan`, `pickled` (.pt and .bin). Records of a run:
`run_folder`, `versions`, `ledger` (the runs of a study), `lineage` (which file came from which), `log`, `monitor`.
`document`: formats of our own, JSON Lines. `atomic`: how everything is written; `processes`: which one of several
writes.
"""
