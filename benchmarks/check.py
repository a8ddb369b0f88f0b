"""What does comparing every sample with `apply_chat_template` cost `rankwise check`?

python benchmarks/check.py --model MODEL --data e2e_nlg [--chat_template FILE]

Both are timed in one run, in turns, on the same rows: rendering alone, and rendering with the comparison. CPU seconds
of the process, so that other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

from rankwise.data.check.examine import examine
from rankwise.data.dataset import outcomes
from rankwise.data.example import Examples
from rankwise.data.render import Renderer
from rankwise.data.sources.load import load
from rankwise.data.template import template_text
from rankwise.models.load import load_tokenizer


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--data", required=True, help="folder of the E2E data set")
    parser.add_argument("--chat_template", help="where the tokenizer has none")
    parser.add_argument("--rows", type=int, default=42_061)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    rows = load("e2e_nlg", given.data, "train")
    rows = replace(rows, items=rows.items[: given.rows])

    def renderer() -> Renderer:
        return Renderer(tokenizer, style="chat", chat_template=template_text(given.chat_template))

    def rendered(examples: Examples) -> None:
        made = renderer()
        for example in examples:
            outcomes(example, made)

    pairs = [
        (seconds(lambda: rendered(rows)), seconds(lambda: examine(rows, None, renderer(), 0)))
        for _ in range(given.repeats)
    ]
    plain, compared = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"{len(rows):,} rows: rendering {plain:.1f} s, with the comparison {compared:.1f} s, ×{compared / plain:.2f}")


if __name__ == "__main__":
    main()
