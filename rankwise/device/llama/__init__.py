"""llama.cpp as an engine: a server in a child process or elsewhere, spoken to over HTTP."""
