"""What `extract` and `compress` say they keep is what they keep: factors that go wrong on the way are exit 6."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compress import random_adapter
from test_extract import tuned_from
from tiny import tiny_llama

from rankwise.cli import main
from rankwise.core.factors import Factors
from rankwise.files.adapter import LoraPair, write_adapter
from rankwise.ranks import compress, extract

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tiny_llama(tmp_path_factory.mktemp("base"))
    return base, tuned_from(base, tmp_path_factory.mktemp("tuned"))


def turned(factors: Factors) -> Factors:
    """As much energy, in other directions."""
    return Factors(factors.left.flip(0), factors.right)


def a_little_larger(factors: Factors) -> Factors:
    return Factors(1.0002 * factors.left, factors.right)


@pytest.mark.parametrize("wrong", [turned, a_little_larger])
def test_factors_that_are_not_the_leading_directions(
    wrong: Callable[[Factors], Factors],
    pair: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their own energy alone does not show it."""
    words = ["extract", *map(str, pair), "--rank", "3", "-o", str(tmp_path / "out")]
    assert main(words) == 0
    (tmp_path / "out" / "adapter_config.json").unlink()
    own = extract.truncate
    monkeypatch.setattr(extract, "truncate", lambda *given: wrong(own(*given)))
    assert main(words) == 6
    assert "they are not the leading directions of what they were made from" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_config.json").exists()


def another_scale(found: Any) -> Any:
    pairs = {path: LoraPair(pair.lora_A, pair.lora_B, pair.scale) for path, pair in found.pairs.items()}
    pairs["a.q"] = replace(pairs["a.q"], scale=1.01 * pairs["a.q"].scale)
    return replace(found, pairs=pairs)


def exchanged(found: Any) -> Any:
    return replace(found, pairs={"a.q": found.pairs["b.q"], "b.q": found.pairs["a.q"]})


def one_less(found: Any) -> Any:
    return replace(found, pairs={"a.q": found.pairs["a.q"]})


def rounded(found: Any) -> Any:
    """To float16, as the original may have been: no longer exact."""
    pairs = {path: replace(pair, lora_A=pair.lora_A.half()) for path, pair in found.pairs.items()}
    return replace(found, pairs=pairs)


@pytest.mark.parametrize("wrong", [another_scale, exchanged, one_less, rounded])
@pytest.mark.parametrize("how", [("--energy", "0.9"), ("--uniform",)])
def test_a_smaller_adapter_that_is_not_the_larger_ones(
    wrong: Callable[[Any], Any],
    how: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is compared is what lies on the disk, with the scale that its config gives."""
    write_adapter(tmp_path / "large", random_adapter({"a.q": 6, "b.q": 6}))
    words = ["compress", str(tmp_path / "large"), *how, "-o", str(tmp_path / "out")]
    assert main(words) == 0
    (tmp_path / "out" / "adapter_config.json").unlink()
    write = compress.write_adapter
    monkeypatch.setattr(compress, "write_adapter", lambda folder, adapter: write(folder, wrong(adapter)))
    assert main(words) == 6
    assert "of the energy, and by their singular values it would be" in capsys.readouterr().err
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert torch.is_grad_enabled()
