"""One case on both sides: what the reference expects, and what the runtime did with the same prompt and pictures.

    case ── complete(top=k) ───────────────▶ free: the runtime's own greedy answer
         ── complete(force=answer, top=k) ─▶ tops: log p at every place of the reference's answer
         ── tokenize, part by part ────────▶ text_ids: what stands around the pictures

Where the runtime's own answer is the reference's, it was forced along it already, and is not asked again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rankwise.errors import DataError, ServiceError, UsageError
from rankwise.ship.llama.runtime import Completion, Runtime
from rankwise.ship.llama.server_api import NotTold
from rankwise.ship.llama.talk import Refusal
from rankwise.ship.parity.cases import Case
from rankwise.ship.parity.embedder import Rows
from rankwise.ship.parity.reference import Expected, Pixels


@dataclass(frozen=True)
class Observed:
    """What was seen of one case. refused: why the runtime did not take it; `free` is then None.

    text_ids: ids of the prompt's text parts as the runtime cuts them, its own BOS included, pictures left out. tops:
    token → log p at the places of the reference's answer; fewer than these where the runtime ends an answer inside it.
    wanted: the expected ids, pictures' own left out, as the runtime writes them. embeddings: (tokens, width) of all the
    case's pictures; None where nothing can tell them. handed: what the app says it sent, picture by picture (pixels, or
    a hash of them); empty where it says nothing.
    """

    case: Case
    expected: Expected
    text_ids: tuple[tuple[int, ...], ...]
    wanted: str
    free: Completion | None = None
    tops: tuple[Mapping[int, float], ...] = ()
    refused: str = ""
    embeddings: Rows | None = None
    handed: tuple[Pixels | str | None, ...] = ()

    @classmethod
    def of(cls, expected: Expected, runtime: Runtime, case: Case, top: int) -> Observed:
        parts, wanted = text_ids(runtime, case), runtime.detokenize(expected.written)
        try:
            free = runtime.complete(case.prompt, case.images, max_new_tokens=len(expected.answer) + 1, top=top)
        except (DataError, UsageError, Refusal) as error:
            return cls(case, expected, parts, wanted, refused=str(error))
        return cls(case, expected, parts, wanted, free, forced_tops(expected, runtime, case, free, top))

    @property
    def whole_ids(self) -> list[int]:
        """The prompt as the runtime reads it, with the pictures laid out as the reference has them."""
        found = list(self.text_ids[0])
        for expansion, part in zip(self.expected.expansions, self.text_ids[1:], strict=False):
            found += [*expansion, *part]
        return found

    @property
    def span(self) -> int:
        """Tokens that the runtime put in place of all pictures; of the reference: `sum(map(len, expansions))`."""
        return self.free.prompt_tokens - sum(map(len, self.text_ids)) if self.free else 0


def forced_tops(
    expected: Expected, runtime: Runtime, case: Case, free: Completion, top: int
) -> tuple[Mapping[int, float], ...]:
    """log p along the reference's answer, as far as the runtime tells: not of pieces of characters and what follows
    them. Where it ends answers with another token, no farther than one place behind what its own answer shares."""
    answer, shared = expected.answer, common(free.tokens, expected.answer)
    if shared == len(answer) and free.top:
        return free.top[:shared]
    whole = answer[: whole_characters(answer, runtime)]
    if not whole:
        return ()
    try:
        return runtime.complete(case.prompt, case.images, force=whole, top=top).top
    except NotTold:
        return ()
    except ServiceError:
        runtime.tokenize("a")  # raises where the server is gone, which is another matter
        return free.top[: shared + 1]


def whole_characters(answer: Sequence[int], runtime: Runtime) -> int:
    """How many of the ids come before the first that is a piece of a character."""
    pieces = (number for number, token in enumerate(answer) if "\ufffd" in runtime.detokenize([token]))
    return next(pieces, len(answer))


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the beginning that both share."""
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def text_ids(runtime: Runtime, case: Case) -> tuple[tuple[int, ...], ...]:
    """The prompt's text around its pictures as the runtime reads it: special tokens parsed, BOS before the first part
    where it puts one by itself."""
    info = runtime.info
    text = case.prompt.removeprefix(info.begin_text) if info.begin_text else case.prompt
    parts = text.split(case.marker)
    ids = [runtime.tokenize(part, add_special=not number) if part else [] for number, part in enumerate(parts)]
    if not parts[0] and info.begin_id is not None:
        ids[0] = [info.begin_id]
    return tuple(map(tuple, ids))
