"""Log-probabilities of given answers."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_llama

from rankwise.data.render import Rendered
from rankwise.data.vision_inputs import IGNORED
from rankwise.evaluate.likelihood import forced_log_probs
from rankwise.models.load import load_model


def test_rows_padded_together_are_those_alone_and_nothing_is_cached(tmp_path: Path) -> None:
    model = load_model(str(tiny_llama(tmp_path)), torch.float32).eval()
    rows = [Rendered([5, 6, 7, 8], [IGNORED, IGNORED, 7, 8]), Rendered([9, 3], [IGNORED, 3])]
    cached = []
    hook = model.register_forward_hook(lambda _, __, found: cached.append(found.past_key_values))
    found = forced_log_probs(model, None, rows)
    last = forced_log_probs(model, None, rows, [[3], []])
    hook.remove()
    assert cached == [None, None]
    for row, places, told in ((rows[0], [1, 2], found[0]), (rows[1], [0], found[1]), (rows[0], [3], last[0])):
        with torch.no_grad():
            alone = model(torch.tensor([row.input_ids])).logits[0, places].log_softmax(-1)
        torch.testing.assert_close(told, alone, rtol=0, atol=1e-5)
    assert len(last[1]) == 0
