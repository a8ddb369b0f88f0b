"""Is what runs on the device what was trained? An export in, a verdict with its proof out, or a folder for an app.

validate.py    `rankwise validate`: every item answered by llama.cpp and by the trained model, and the parity ladder
sides.py       those two sides; scores.py, validation_page.py, sweep.py: validation.json, its page, the form to ship
bundle.py      `rankwise bundle`: files, prompt, labels, threshold, clients and golden vectors; their replay
handoff/       any trainer's model, any server or app: is what answers the tuned model?
parity/        the ladder, from the picture to the answer, rung by rung, against a measured floor
lora/          an adapter on its base's GGUF: scale 1, 0, switched and by request, against transformers
llama/         llama.cpp in a process of its own, or a server elsewhere
"""
