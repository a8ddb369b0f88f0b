"""Rows of a data set → token ids, labels and pixels, the same for training, evaluation and the device.

    files ── sources/load ──▶ Example* ── split ──▶ Example* ── Renderer ──▶ Rendered* ── Collator ──▶ batch
    images ── ImageReader ── Sight: image tokens of a prompt ──────▲   its pixels ──────────▲

`example` (one sample), `sources/` (readers), `split`; `renderer_for` builds the `render.Renderer` of a run from
`template`, `chat`, `vision_inputs`; `dataset` checks, packs, pads. `images`, `pixels`: a reference → RGB. `device`:
device.json; `input_record`: input.json; `label_task`, `label_answer`: the labels' task. check/ is `rankwise check`.
"""
