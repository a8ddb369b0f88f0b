"""Adapter into base: planned, written shard by shard, compared with base + adapter."""
