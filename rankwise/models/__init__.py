"""A name → a model, its sites, its adapters: the only room where a string becomes a model (`load.py`).

`sites.py`: what can be adapted, its tower, its place in the files. `targets.py`: which of it, at which rank.
`adapt.py`: a plan → PEFT. `adapters.py`, `vocabulary.py`: an adapter from the disk onto a model. `vision_features.py`:
what the language part gets of images. `cut_down.py`, `tiny.py`: small models. depth/, isaac/: architectures of our own.
`expert_files.py`: a layer's experts in files; `per_expert.py`: adapters of single experts on today's parameters.
"""

from __future__ import annotations

from transformers.utils import logging

from rankwise.page.progress import adopted, terminal

if not terminal() and not adopted():  # bars belong on a terminal, not in a log file
    logging.disable_progress_bar()
