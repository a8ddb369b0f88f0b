"""An adapter as llama.cpp runs it, the base's GGUF with `--lora`: is it the adapter, off, on again, and by request?

files.py       the LoRAs and the adapters in transformers that they should be
held.py        each file compared with its adapter, factor by factor
variants.py    the adapter at other scales and in part of its sites: what answers of a broken ladder are nearest to
settings.py    the ways in which a running server switches LoRAs, and a ladder for each
page.py        all of it in words and tables

All of it is imported only where a validation has LoRAs.
"""
