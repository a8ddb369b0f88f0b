"""Export: a merged checkpoint in, GGUF files for llama.cpp out, each proven before it is named.

command.py                    `rankwise export`; plan.py: what it will do, view.py: what the converter is shown
export.py                     conversion and proof; provenance.py: where each tensor comes from; metadata.py: what
                              the file states of config, processor and tokenizer
stacks.py, mixture.py         a mixture's experts: which is where, and how a file says that they are chosen
converter.py, quantize.py     llama.cpp's own converter and quantizer; lora.py: an adapter as GGUF
reading.py                    a GGUF file and an export folder, read back
"""
