"""Depth-aware models. In: a vision-language model and a map of depths; out: the same model with `depth` as an input.

`encoder.py`: the encoding that joins the image features, and `depth.json`; `estimator.py`: Depth Anything V2, which
makes the maps.
"""
