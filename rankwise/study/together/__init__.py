"""Several arms of a study trained as one batch of models."""
