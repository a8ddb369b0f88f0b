"""Rounding noise of a weight delta: the number format that its values were rounded to, and the noise energy.

    before, after = Digits(base.dtype), Digits(tuned.dtype)
    after.see(block, changed)                       # block by block, while the delta is computed
    rounding_energy(tuned, after.format)            # expected ‖·‖²_F of one rounding

Model. Rounding to p significant bits moves w by an error e of at most ulp(w)/2, ulp(w) = 2^(⌊log₂|w|⌋ + 1 − p). Where
the change of w spreads over a good part of an ulp, e is uniform and uncorrelated with it: mean 0, variance ulp²/12
(Bennett 1948; Widrow and Kollár 2008, "Quantization Noise", chapter 5: for a Gaussian change exact to 1 % from 0.5 ulp
on). Two histories give the same pair of files:

    only the tuned weights were rounded     the base is where the run started, exactly      Σ ulp²/12 of the tuned
    both were rounded                       copies of float32 weights, errors independent   the sum of both

An entry that comes out unchanged has the error −Δ. With few of them the sums hold; from half of all entries on they
are upper bounds, which is why `ranks` corrects nothing there (Gaussian changes of Gaussian weights: 0.65 of the first
sum is real at 55 % unchanged, 0.8 of the second at 49 %, 0.9 of either at a third). Given the change, the error of
the second history has mean 0 and variance ulp²·f(1 − f), f the fractional part of |Δ|/ulp: on average over f, ulp²/6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SAMPLE = 1 << 18  # entries that the estimate looks at: its relative error is far below 1 %
WINDOWS, ROWS = (32, 256), 16  # entries of a row in which 4-bit and 8-bit values repeat themselves; rows looked at
REPEATED = 0.65  # distinct ÷ all values in a window: bfloat16 weights have more, 8-bit integers 0.25 to 0.6
QUANTIZED = "quantized"
FEW = 32  # values that may be round numbers by chance
FORMATS = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16)  # coarsest first
SIGNIFICAND, EXPONENT = 24, 0x7F800000  # of float32: its significant bits, the mask of its exponent


def significant_bits(dtype: torch.dtype) -> int:
    """p of a floating-point format, the implicit bit included: 8 for bfloat16, 11 for float16."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


class Digits:
    """The coarsest format whose significant bits reproduce every value seen, whatever type holds the values.

    Values scaled by a power of two keep their digits, so the range is not looked at. Zeros fit every format, and where
    nothing has changed nothing was rounded: `format` is None until a changed value other than zero was seen, and until
    there were FEW, the type that holds them.
    """

    def __init__(self, stored: torch.dtype) -> None:
        self.stored = stored
        self._place = 0
        self._changed = 0

    @property
    def format(self) -> torch.dtype | None:
        if self._changed < FEW:
            return self.stored if self._changed else None
        return FORMATS[self._place] if self._place < len(FORMATS) else torch.float32

    def see(self, block: Tensor, changed: Tensor) -> None:
        """`block`: float32 values; `changed`: the same entries' change, zero where there is none."""
        if self._changed < FEW:
            self._changed += int(((block != 0) & (changed != 0)).sum())
        bits = block.view(torch.int32)
        while self._place < len(FORMATS) and not self._fits(bits, FORMATS[self._place]):
            self._place += 1

    def _fits(self, bits: Tensor, candidate: torch.dtype) -> bool:
        if significant_bits(candidate) >= significant_bits(self.stored):
            return True  # the stored type has no more digits than that
        below = (1 << (SIGNIFICAND - significant_bits(candidate))) - 1
        return not bool(torch.bitwise_and(bits, below).any())


def sample_rows(matrix: Tensor) -> Tensor:
    """Evenly spaced rows, SAMPLE entries in all, as float32."""
    wanted = max(1, SAMPLE // max(1, matrix.shape[1]))
    step = max(1, matrix.shape[0] // wanted)
    return matrix[::step].float()


def ulp_of(values: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Tensor:
    """Spacing of `dtype` at these float32 values, float64; not below float16's smallest number where that is one of
    both types."""
    power = torch.bitwise_and(values.view(torch.int32), EXPONENT).view(torch.float32).double()
    least = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    return (power * torch.finfo(dtype).eps).clamp(min=least if torch.float16 in (dtype, stored) else 0.0)


def rounding_energy(matrix: Tensor, dtype: torch.dtype | None) -> float:
    """Expected squared norm of rounding these values to `dtype` once: Σ ulp²/12, from a sample of the rows."""
    if dtype not in FORMATS:
        return 0.0
    sample = sample_rows(matrix)
    ulp = ulp_of(sample, dtype, matrix.dtype)
    return float(ulp.square().sum()) / 12 * matrix.numel() / max(1, sample.numel())


def quantized_energy(matrix: Tensor, dtype: torch.dtype | None) -> float:
    """The same for integers or 4-bit codes times a scale, by the distance of the few values that a row has; 0 where
    rows have as many as `dtype` explains.

    The scale hides them from `Digits`. 8-bit blocks of 32 with a scale each cannot be told from bfloat16 this way.
    """
    rows = matrix[:: max(1, matrix.shape[0] // ROWS), : max(WINDOWS)].float()
    found = (step_of(rows.reshape(-1, width), dtype, matrix.dtype) for width in WINDOWS if rows.shape[1] % width == 0)
    return max(found, default=0.0) ** 2 / 12 * matrix.numel()


def step_of(windows: Tensor, dtype: torch.dtype | None, stored: torch.dtype) -> float:
    """Median distance of neighbouring values in windows (n, width) that repeat themselves; 0 in others."""
    ordered = windows.sort(dim=1).values
    lower, upper = ordered[:, :-1], ordered[:, 1:]
    told = (upper != 0) | (lower != 0)  # pruned entries repeat each other and say nothing
    distinct = (upper > lower) & told
    if dtype is None or not bool(distinct.any()) or float(distinct.sum()) > REPEATED * float(told.sum()):
        return 0.0
    gaps = (upper - lower)[distinct].double()
    finest = torch.maximum(ulp_of(upper, dtype, stored), ulp_of(lower, dtype, stored))[distinct]
    return float(gaps.median()) if float((gaps / finest).median()) >= 2 else 0.0  # else neighbours in a narrow range


def rounded(matrix: Tensor, dtype: torch.dtype | None) -> tuple[str | None, float]:
    """The name of what the values went through (None: nothing tells), and the expected squared norm of its noise."""
    if dtype is None:
        return None, 0.0
    quantized = quantized_energy(matrix, dtype)
    if quantized:
        return QUANTIZED, quantized
    return str(dtype).removeprefix("torch."), rounding_energy(matrix, dtype)
