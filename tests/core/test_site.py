"""What a module path says."""

from __future__ import annotations

from rankwise.core.site import half_of


def test_halves_are_those_of_each_towers_own_layers() -> None:
    """A tower of 2 layers beside one of 5; what is in no layer is in both halves."""
    towers = {f"vision.encoder.layers.{number}.fc1": "vision" for number in range(2)}
    towers |= {f"text.layers.{number}.mlp.experts.7.w1": "language" for number in range(5)}
    towers |= {"projector.linear": "projector"}
    first, second = half_of(towers, second=False), half_of(towers, second=True)
    assert first & second == {"projector.linear"} and first | second == set(towers)
    assert [path.partition(".layers.")[2][0] for path in towers if path in first - second] == ["0", "0", "1", "2"]
