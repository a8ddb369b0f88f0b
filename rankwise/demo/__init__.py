"""The whole flow offline, on models and data that it makes itself.

    seed ── drawn world ──▶ base model, data ── a recipe ──▶ adapter, scores, GGUF, report

command.py  `demo`: a task and a base for it, then the recipe     tiny.py  `tiny`: a vision base and photos
base.py     how both train their bases from scratch
chat_model.py  `demo --model`: sizes that fit a time
restaurants.py, drawings.py, scenes.py  the worlds: sentences, coloured shapes, the five elements
"""
