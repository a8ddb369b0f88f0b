"""Forgetting: KL divergence and perplexity of a model on other text, against its base.

    plain text ── documents ──▶ windows of token ids ──▶ base logits, adapted logits ──▶ KL, perplexities

KL(base ‖ adapted) in nats per token is 0 where the adapter changes nothing, and counts a lost certainty wherever it
was, not only at the token that happens to follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from rankwise.data.dataset import pad
from rankwise.errors import DataError
from rankwise.evaluate import bootstrap
from rankwise.evaluate.predictions import FORGETTING_TASK, EvaluationResult
from rankwise.files.processes import gathered, own_share
from rankwise.files.versions import LIBRARIES, installed
from rankwise.page.progress import progress

LINES = (".jsonl", ".ndjson")
METRICS = ("kl", "perplexity_base", "perplexity_adapted", "perplexity_ratio")
Logits = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ForgettingSettings:
    """window: most tokens of a piece of a document, each predicted from those before it in the piece.

    Memory: the logits of both models for `tokens_per_pass` positions in their own precision, twice, and a few float32
    copies of `rows` of them at a time.
    """

    window: int = 1024
    tokens_per_pass: int = 2048
    rows: int = 64
    seed: int = 42


def read_documents(path: str | Path) -> list[str]:
    """Texts of a file: the `text` of each line of .jsonl, else paragraphs (blank lines between)."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{file}: no such file; --forget takes plain text (.txt) or JSON Lines with `text` (.jsonl)")
    try:
        content = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    if file.suffix.lower() in LINES:
        texts = [_text_of(line, file, n) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    else:
        texts = re.split(r"\n\s*\n", content)
    found = [text.strip() for text in texts if text.strip()]
    if not found:
        raise DataError(f"{file}: the file has no text")
    return found


def _text_of(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise DataError(f'{file}, line {number}: expected {{"text": "…"}} ({error})') from error
    if not isinstance(text, str):
        raise DataError(f"{file}, line {number}: text must be a string, found {text!r:.60}")
    return text


def logits_of(model: nn.Module) -> Logits:
    """(ids, mask) → logits (batch, length, vocabulary) of a model."""
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


def logits_without_adapter(model: Any) -> Logits:
    """Logits of a PEFT model's base: the adapter is disabled meanwhile.

    DataError for an adapter that trained biases of the base: switched off, they stay.
    """
    kept = [name for name, config in model.peft_config.items() if getattr(config, "bias", "none") != "none"]
    if kept:
        advice = "which cannot be switched off; merge it, and give the base with --base_model_id"
        raise DataError(f"the adapter ({', '.join(kept)}) trained biases of the base, {advice}")

    def base(ids: Tensor, mask: Tensor) -> Tensor:
        with model.disable_adapter():
            logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
            return logits

    return base


def forgetting(
    base: Logits,
    adapted: Logits,
    tokenizer: PreTrainedTokenizerBase,
    documents: Sequence[str],
    device: torch.device,
    settings: ForgettingSettings = ForgettingSettings(),
    made_from: Mapping[str, Any] | None = None,
) -> EvaluationResult:
    """Mean KL(base ‖ adapted) in nats per token, and both perplexities, with 95 % intervals over documents.

    Both models must be in evaluation mode: with dropout a model would differ from itself.
    Several processes share the documents. n counts documents; those of one token predict nothing and are left out
    (`settings["left_out"]`). Means are over tokens, so long documents weigh more.
    """
    pieces = [_pieces(tokenizer, text, settings.window) for text in documents]
    used = [number for number, parts in enumerate(pieces) if parts]
    if not used:
        raise DataError("every document is shorter than two tokens, so no token can be predicted")
    mine = own_share(used, [sum(map(len, pieces[number])) for number in used])
    sums = gathered(_sums(base, adapted, {number: pieces[number] for number in mine}, device, settings))
    rows = np.array([sums[number] for number in used])
    spread = bootstrap.intervals(lambda positions: _metrics(rows[positions].sum(axis=1)), len(rows), seed=settings.seed)
    values = _metrics(rows.sum(axis=0)[None])[:, 0]
    return EvaluationResult(
        task=FORGETTING_TASK,
        metrics=dict(zip(METRICS, map(float, values), strict=True)),
        intervals=bootstrap.named(METRICS, spread),
        n=len(rows),
        settings={
            **{name: asdict(settings)[name] for name in ("window", "seed")},
            "unit": "kl: nats per token, KL(base || adapted)",
            "tokens": int(rows[:, 0].sum()),
            "left_out": len(documents) - len(used),
            "made_from": dict(made_from or {}),
        },
        versions=installed(LIBRARIES),
    )


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[list[int]]:
    """Token ids of a document as the tokenizer begins it, cut into windows; a piece of one id predicts nothing."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    return [piece for start in range(0, len(ids), window) if len(piece := ids[start : start + window]) > 1]


def _sums(
    base: Logits,
    adapted: Logits,
    documents: Mapping[int, Sequence[Sequence[int]]],
    device: torch.device,
    settings: ForgettingSettings,
) -> dict[int, list[float]]:
    """Document → predicted tokens, summed KL, summed loss of the base, summed loss of the adapted model."""
    pieces = [(number, piece) for number, parts in documents.items() for piece in parts]
    pieces.sort(key=lambda item: -len(item[1]))
    totals = torch.zeros(max(documents, default=0) + 1, 4, dtype=torch.float64)
    bar = progress(total=len(pieces), desc="forgetting", unit="piece")
    with torch.inference_mode(), bar:
        while pieces:
            count = max(1, settings.tokens_per_pass // len(pieces[0][1]))
            batch, pieces = pieces[:count], pieces[count:]
            owners, values = _pass(base, adapted, batch, device, settings.rows)
            totals.index_add_(0, owners, values)
            bar.update(len(batch))
    return {number: totals[number].tolist() for number in documents}


def _pass(
    base: Logits, adapted: Logits, batch: Sequence[tuple[int, Sequence[int]]], device: torch.device, rows: int
) -> tuple[Tensor, Tensor]:
    """One forward pass of each model: the document of every predicted token (tokens,), and its four addends."""
    numbers, pieces = zip(*batch, strict=True)
    width = max(map(len, pieces))
    ids = pad(pieces, width, 0).to(device)
    mask = pad([[1] * len(piece) for piece in pieces], width, 0).to(device)
    predicted = mask[:, 1:].bool()
    first, second = (logits(ids, mask)[:, :-1][predicted] for logits in (base, adapted))
    if first.shape != second.shape:
        raise DataError(f"the base has a vocabulary of {first.shape[-1]}, the tuned model one of {second.shape[-1]}")
    targets = ids[:, 1:][predicted]
    chunks = zip(first.split(rows), second.split(rows), targets.split(rows), strict=True)
    values = torch.cat([_addends(*chunk) for chunk in chunks])
    owners = torch.tensor(numbers)[predicted.nonzero()[:, 0].cpu()]
    return owners, values.double().cpu()


def _addends(base: Tensor, adapted: Tensor, targets: Tensor) -> Tensor:
    """(tokens, 4): 1, KL, loss of the base, loss of the adapted model."""
    first, second = (F.log_softmax(logits.float(), dim=-1) for logits in (base, adapted))
    kl = (first.exp() * (first - second)).sum(dim=-1)
    losses = [F.nll_loss(part, targets, reduction="none") for part in (first, second)]
    return torch.stack([torch.ones_like(kl), kl, *losses], dim=-1)


def _metrics(sums: bootstrap.Array) -> bootstrap.Array:
    """(batch, 4) sums → (4, batch) metrics."""
    tokens, kl, base, adapted = sums.T
    return np.stack([kl / tokens, np.exp(base / tokens), np.exp(adapted / tokens), np.exp((adapted - base) / tokens)])


def in_words(result: EvaluationResult) -> str:
    """One line for the terminal."""
    span = "" if "kl" not in result.intervals else " [{:.4f}, {:.4f}]".format(*result.intervals["kl"])
    return (
        f"forgetting, {result.n} documents, {result.settings['tokens']} tokens: KL(base || adapted) "
        f"{result['kl']:.4f} nats per token{span} · perplexity {result['perplexity_base']:.2f} -> "
        f"{result['perplexity_adapted']:.2f}"
    )
