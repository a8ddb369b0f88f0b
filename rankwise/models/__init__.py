"""Modules: the only place where a name becomes a model, where its sites are, and how a plan becomes adapters."""

from __future__ import annotations

import sys

from transformers.utils import logging

if not sys.stderr.isatty():  # bars belong on a terminal, not in a log file
    logging.disable_progress_bar()
