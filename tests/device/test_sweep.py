"""Which form to ship: the smallest that is not worse, by an interval that says so rarely when it is not true."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from served import text_gguf

from rankwise.device.llama.runtime import Runtime
from rankwise.device.scores import INFERIOR, NOT_INFERIOR, UNDECIDED, compared, paired_interval, wilson
from rankwise.device.sweep import ItemOutcome, Tried, choose, prepared, sweep
from rankwise.device.validation_page import sweep_table
from rankwise.errors import DataError, UsageError
from rankwise.options.commands import ValidateConfig
from rankwise.page.blocks import lines


def tried(form: str, size: int, right: list[bool]) -> Tried:
    return Tried(form, size, {f"i{n}": ItemOutcome(bool(value), 0.1) for n, value in enumerate(right)}, 1000)


def outcomes(n: int, wrong: int, flipped: int = 0) -> list[bool]:
    """n items, the first `wrong` of them wrong, and the last `flipped` wrong besides."""
    return [number >= wrong and number < n - flipped for number in range(n)]


# --- the interval -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "lost", "won", "n"), [(0.9, 0.05, 0.02, 150), (0.6, 0.1, 0.1, 60), (0.8, 0.02, 0.0, 80)]
)
def test_the_interval_holds_the_truth_about_as_often_as_it_says(
    accuracy: float, lost: float, won: float, n: int
) -> None:
    random = np.random.default_rng(3)
    shares = [accuracy - lost, won, lost, 1 - accuracy - won]  # both right, only the form, only the largest, neither
    inside = 0
    for both, first, second, _ in random.multinomial(n, shares, 800):
        low, high = paired_interval(int(both), int(first), int(second), n)
        inside += low <= won - lost <= high
    assert inside / 800 >= 0.93


def test_the_interval_is_about_the_difference_and_turns_round_with_it() -> None:
    low, high = paired_interval(60, 3, 9, 100)
    assert low < (3 - 9) / 100 < high
    assert paired_interval(60, 9, 3, 100) == pytest.approx((-high, -low))


def test_pairing_tells_more_than_two_separate_shares() -> None:
    low, high = paired_interval(70, 4, 6, 100)
    first, second = wilson(74, 100), wilson(76, 100)
    assert high - low < 0.7 * (first[1] - second[0] - (first[0] - second[1]))


def test_no_difference_on_few_items_is_no_proof() -> None:
    """A bootstrap of equal answers has no width at all."""
    for n, width in ((5, 0.3), (50, 0.05), (1000, 0.003)):
        low, high = paired_interval(n - n // 5, 0, 0, n)
        assert low == pytest.approx(-high) and high - low > width


# --- the verdict --------------------------------------------------------------------------------------------------


def test_verdicts() -> None:
    largest = dict(enumerate(outcomes(1000, 200)))
    names = {str(key): value for key, value in largest.items()}

    def against(flipped: int) -> str:
        form = {str(key): value for key, value in enumerate(outcomes(1000, 200, flipped))}
        return compared(form, names, margin=0.02).verdict

    assert (against(0), against(2), against(200)) == (NOT_INFERIOR, NOT_INFERIOR, INFERIOR)
    assert against(20) == UNDECIDED
    few = compared({"a": True, "b": False}, {"a": True, "b": False}, margin=0.02)
    assert few.verdict == UNDECIDED and few.needed is not None and few.needed > 100


def test_mcnemar_is_of_the_items_that_differ() -> None:
    largest = {str(n): n < 60 for n in range(100)}
    form = {str(n): 8 <= n < 62 for n in range(100)}
    found = compared(form, largest, 0.02)
    assert (found.lost, found.won) == (8, 2)
    assert found.p == pytest.approx(2 * (1 + 10 + 45) / 2**10)  # both tails of 10 fair coins


def test_the_smallest_that_is_not_inferior_is_chosen() -> None:
    forms = [
        tried("q4_0", 40, outcomes(1000, 200, 150)),
        tried("f16", 160, outcomes(1000, 200)),
        tried("q5_k_m", 60, outcomes(1000, 200, 1)),
        tried("q8_0", 90, outcomes(1000, 200)),
    ]
    found = choose(forms)
    assert [one.form for one in found.tried] == ["f16", "q8_0", "q5_k_m", "q4_0"]
    assert found.chosen == "q5_k_m" and "ship q5_k_m" in found.why
    assert choose(forms, min_accuracy=0.7995).chosen == "q8_0"
    nothing = choose(forms, min_accuracy=0.9)
    assert nothing.chosen is None and "0.9" in nothing.why


def test_too_few_items_ship_the_largest_and_say_so() -> None:
    found = choose([tried("f16", 2, outcomes(12, 3)), tried("q8_0", 1, outcomes(12, 3))])
    assert found.chosen == "f16"
    assert "undecided: q8_0: more items" in found.why


def test_forms_of_different_items_are_not_compared() -> None:
    with pytest.raises(DataError, match="q8_0: not evaluated on the same items"):
        choose([tried("f16", 2, outcomes(10, 1)), tried("q8_0", 1, outcomes(9, 1))])
    with pytest.raises(DataError, match="no quantization type was evaluated"):
        choose([])
    with pytest.raises(UsageError, match="--sweep_margin is 2; give a number above 0 and below 1"):
        ValidateConfig(sweep_margin=2)


# --- files and the whole ------------------------------------------------------------------------------------------


def test_files_that_are_there_are_taken(tmp_path: Path) -> None:
    for form in ("f16", "q8_0"):
        (tmp_path / f"m-{form}.gguf").write_bytes(b"x")
    found = prepared(tmp_path / "m-f16.gguf", ["f16", "q8_0"])
    assert found == {form: tmp_path / f"m-{form}.gguf" for form in ("f16", "q8_0")}
    with pytest.raises(UsageError, match=r"-f16\.gguf"):
        prepared(tmp_path / "m-q8_0.gguf", ["q8_0"])


def test_a_sweep_runs_every_form_and_records_what_it_took(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []

    def ask(runtime: Runtime, form: str) -> dict[str, ItemOutcome]:
        found = {}
        for number in range(3):
            answer = runtime.complete([1, 5 + number], max_new_tokens=2)
            found[str(number)] = ItemOutcome(len(answer.tokens) == 2, answer.seconds)
        asked.append((form, Path(runtime.info.model).name))
        return found

    files = {form: text_gguf(form) for form in ("f16", "f32")}
    found = sweep(files, ask, context=64, threads=1)
    assert asked == [("f16", "model-f16.gguf"), ("f32", "model-f32.gguf")]
    written = json.loads(found.save(tmp_path).read_text())
    assert [row["form"] for row in written["forms"]] == ["f32", "f16"]
    assert written["reference"] == written["chosen"] == "f32" and written["items"] == 3
    for row, path in zip(written["forms"], (text_gguf("f32"), text_gguf("f16")), strict=True):
        assert row["bytes"] == path.stat().st_size
        assert 0 < row["seconds_median"] <= row["seconds_p95"]
        assert row["peak_memory"] is None or row["peak_memory"] > 10e6
    said = "\n".join(lines([sweep_table(found.as_dict())]))
    assert "f32" in said and "undecided" in said and "ship f32" in said
