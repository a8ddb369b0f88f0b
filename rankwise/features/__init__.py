"""Visual features on the disk: a cache of matrices (T, D), their split, and rows for training.

features capture ──▶ <cache>/features-00000.safetensors … index.json ── open_cache ──▶ FeatureCache
                                                                          │
                          split_of(cache, seed) ──▶ train, val, test ── FeatureRows ──▶ normalised (T, D)

cache = open_cache("feature_cache_real")
split = split_of(cache, seed=42)
rows = FeatureRows(cache, split.train)          # a torch Dataset; `collate` makes batches
"""

from __future__ import annotations
