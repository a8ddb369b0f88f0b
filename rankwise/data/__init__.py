"""Rows of a data set → token ids, labels and pixels, the same for training, evaluation and the device.

    files ── sources/load ──▶ Example* ── split ──▶ Example* ── Renderer ──▶ Rendered* ── Collator ──▶ batch
    images ── ImageReader ── Sight: image tokens of a prompt ──────▲   pixels of its images ─▲

`example.py`: one sample. sources/: readers of files. `render.py` turns an example into tokens and labels, with
`template.py`, `chat.py` and `vision_inputs.py`; `renderer_for.py` builds it for a run. `dataset.py` checks, packs and
pads. `images.py`, `pixels.py`: a reference → RGB. `device.py`: device.json. `input_record.py`: input.json.
`label_task.py`, `label_answer.py`: prompts and answers of `--task labels`. check/ is `rankwise check`.
"""
