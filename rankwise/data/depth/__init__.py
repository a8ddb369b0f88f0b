"""Depth maps beside images: computed once, cached, pooled onto image tokens.

In: images and an estimator (or files). Out: `depth`, one value per image token, beside the pixels of a batch.
`prepare`: a run's settings, the pass that fills the cache, the processor of a model used from Python; `maps`: where an
image's tokens lie, the cache, measured depth from files. The encoder that takes the values is models/depth/.
"""
