"""The parity ladder: a trained model and a runtime in, the first rung that fails (and why) out.

`ladder.py` climbs; `rungs.py` compares, rung by rung; `cases.py` and `reference.py` are what is put to both sides and
what is right; `floor.py` measures how close one can come by the ways of `known_good.py`, `routing.py` where a mixture's
experts are a near tie; `pixels.py` asks Skia and the app; `embed.py` is a process that embeds pictures in llama.cpp.
"""
