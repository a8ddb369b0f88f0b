"""A run folder as one page, runs compared, a model card, the upload to a hub."""
