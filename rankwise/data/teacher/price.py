"""What the teacher costs: tokens, dollars, and a budget that is not exceeded.

spending = Spending(prices_of("gpt-4o", None, None), budget_usd=5.0, max_output_tokens=600, text_bytes=2400)
await spending.admit()                # waits where the open requests might use up the budget; raises where none is open
spending.enter(812, 97, spending.cost(812, 97))
spending.release()
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from rankwise.errors import ServiceError, UsageError

MILLION = 1_000_000
DEFAULT_BUDGET = 10.0  # dollars, where prices are known: some 1,500 pictures of gpt-4o
# US dollars per million tokens (input, output), list prices of June 2026; exact names only: dated versions differ.
PRICES = {"gpt-4o": (2.50, 10.00), "gpt-4o-mini": (0.15, 0.60)}
# Before the first answer has said how many: above gpt-4o-mini's 8,500 tokens for a picture of one tile.
IMAGE_TOKENS = 10_000


class BudgetReached(ServiceError):
    """The next request could exceed the budget."""


@dataclass(frozen=True)
class Prices:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        return (input_tokens * self.input + output_tokens * self.output) / MILLION


def prices_of(model: str, per_million_input: float | None, per_million_output: float | None) -> Prices | None:
    """The given prices, else the list's; None for a model that is not on it. Both are given or neither."""
    if (per_million_input is None) != (per_million_output is None):
        raise UsageError("give both --usd_per_million_input and --usd_per_million_output, or neither")
    if per_million_input is not None and per_million_output is not None:
        return Prices(per_million_input, per_million_output)
    return Prices(*PRICES[model]) if model in PRICES else None


@dataclass
class Spending:
    """Tokens and dollars of one data set, earlier runs included, and what the open requests may still add.

    budget_usd: None for no limit. max_output_tokens: the longest answer that a request asks for. text_bytes: size of
    the prompt and the schema; no tokenizer makes more tokens of a text than it has bytes. Input tokens of a request are
    taken to be at most what any answer has reported so far (all images have one size), before that IMAGE_TOKENS more
    than the text's bytes. uncounted: answers of which the service did not say the tokens; each costs the most that a
    request can cost, where prices are known.

    may_be_charged: requests that were sent and have neither an answer nor an error status (a timeout, a cut
    connection). The service may charge for them, so the budget counts each at the most that a request can cost.
    """

    prices: Prices | None
    budget_usd: float | None = None
    max_output_tokens: int = 0
    text_bytes: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    spent: float = 0.0
    answers: int = 0
    uncounted: int = 0
    may_be_charged: int = 0
    open: int = 0
    most_input: int = 0
    _change: asyncio.Event = field(default_factory=asyncio.Event, repr=False)

    def __post_init__(self) -> None:
        if self.budget_usd is not None and self.prices is None:
            raise UsageError(
                "--budget_usd needs prices, and this model's are not known: give --usd_per_million_input and "
                "--usd_per_million_output"
            )

    @property
    def usd(self) -> float | None:
        """What the answers have cost; None where the prices are not known."""
        return self.spent if self.prices else None

    @property
    def most_per_request(self) -> float:
        """The most that one more request can cost, in dollars."""
        expected = self.most_input or IMAGE_TOKENS + self.text_bytes
        return self.cost(expected, self.max_output_tokens) or 0.0

    def cost(self, input_tokens: int | None, output_tokens: int | None) -> float | None:
        """Dollars of an answer; None where the prices are not known."""
        if self.prices is None:
            return None
        if input_tokens is None or output_tokens is None:
            return self.most_per_request
        return self.prices.cost(input_tokens, output_tokens)

    def enter(self, input_tokens: int | None, output_tokens: int | None, usd: float | None) -> None:
        """Count an answer: a new one, or one of an earlier run at the price of its time."""
        self.answers += 1
        self.spent += usd or 0.0
        self.uncounted += input_tokens is None or output_tokens is None
        self.input_tokens += input_tokens or 0
        self.output_tokens += output_tokens or 0
        self.most_input = max(self.most_input, input_tokens or 0)

    async def admit(self) -> None:
        """Return once one more request is sure to stay within the budget. BudgetReached where that cannot be."""
        while not self._fits():
            if not self.open:
                raise BudgetReached(
                    f"the next request could cost up to ${self.most_per_request:.4f} and exceed the budget of "
                    f"${self.budget_usd:.2f} (--budget_usd)"
                )
            self._change.clear()
            await self._change.wait()
        self.open += 1

    def _fits(self) -> bool:
        if self.budget_usd is None:
            return True
        unsettled = self.open + self.may_be_charged + 1
        return self.spent + unsettled * self.most_per_request <= self.budget_usd

    def release(self) -> None:
        """One request less is open."""
        self.open -= 1
        self._change.set()

    def words(self) -> str:
        """The cost so far, for people."""
        tokens = f"{self.input_tokens:,} + {self.output_tokens:,} tokens"
        cost = "cost unknown (no prices for this model)" if self.usd is None else f"${self.usd:.4f}"
        lost = f", and {self.may_be_charged} without an answer that may be charged" if self.may_be_charged else ""
        uncounted = f" ({self.uncounted} answers without a number of tokens)" if self.uncounted else ""
        return f"{self.answers} answers, {tokens}{uncounted}, {cost}{lost}"

    def as_dict(self) -> dict[str, object]:
        return {
            "answers": self.answers,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "usd": self.usd,
            "usd_per_million": [self.prices.input, self.prices.output] if self.prices else None,
            "requests_that_may_be_charged": self.may_be_charged,
            "answers_without_token_counts": self.uncounted,
        }
