"""llama.cpp, asked: GGUF files or an address in, answers with log-probabilities out.

`runtime.py` starts a server of its own (`serve.py` is that process) or reaches one elsewhere; `client.py` is what is
said to it; `generator.py` makes it an engine of evaluation.
"""
