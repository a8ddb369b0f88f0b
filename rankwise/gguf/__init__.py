"""GGUF files: llama.cpp's own converter, and the proof that what it wrote is the checkpoint."""
