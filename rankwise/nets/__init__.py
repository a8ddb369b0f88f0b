"""Modules: the only place where a name becomes a model, where its sites are, and how a plan becomes adapters."""
