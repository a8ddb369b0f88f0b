"""Visual features on the disk: a cache of matrices (T, D), their split, and rows for training.

features capture ──▶ <cache>/features-00000.safetensors … index.json ── open_cache ──▶ FeatureCache
                                                                          │
                          split_of(cache, seed) ──▶ train, val, test ── FeatureRows ──▶ normalised (T, D)

cache = open_cache("feature_cache_real")
split = split_of(cache, seed=42)
rows = FeatureRows(cache, split.train)          # a torch Dataset; `collate` makes batches
"""

from __future__ import annotations

from rankwise.data.features.cache import FeatureCache, ModelOrigin, open_cache
from rankwise.data.features.measurable import check_measurable, measurable
from rankwise.data.features.rows import FeatureRows, collate
from rankwise.data.features.split import FeatureSplit, read_split, split_of
from rankwise.data.features.writer import CacheRecipe, CacheWriter, Matrices, shard_places, write_cache

__all__ = [
    "CacheRecipe",
    "CacheWriter",
    "FeatureCache",
    "FeatureRows",
    "FeatureSplit",
    "Matrices",
    "ModelOrigin",
    "check_measurable",
    "collate",
    "measurable",
    "open_cache",
    "read_split",
    "shard_places",
    "split_of",
    "write_cache",
]
