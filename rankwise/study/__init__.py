"""Experiments with a protocol: arms, seeds, evidence."""
