"""Depth maps beside images: computed, cached, laid onto image tokens."""
