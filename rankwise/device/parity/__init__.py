"""The parity ladder: the same cases in transformers and in llama.cpp, rung by rung."""
