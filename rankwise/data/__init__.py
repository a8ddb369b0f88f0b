"""From files on disk to batches: sources read, `render` makes tokens and labels, `collate` pads, `split` divides.

files ── sources.load ──▶ Example* ── split, subset ──▶ Example* ── Renderer ──▶ Rendered* ── Collator ──▶ batch
images ── ImageReader ── Sight ── expansion (image tokens) ──▲ · inputs (pixels) ───────────────▲
"""
