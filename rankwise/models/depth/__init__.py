"""Models that see depth: an encoder beside the vision tower, and the estimator that makes the maps."""
