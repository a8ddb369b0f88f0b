"""The disk: lazy checkpoints, adapters, run folders, atomic writes. Needs torch, safetensors, filelock."""
