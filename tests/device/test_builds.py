"""Laws of llama.cpp's builds: one build has many names, and another one is said."""

from __future__ import annotations

import pytest

from rankwise.device.llama.builds import named, other_build


@pytest.mark.parametrize(
    ("stated", "package", "name"),
    [
        ("b10257-22dc605c4", None, "b10257-22dc605c4"),
        ("b10257-22dc605c4", "xllamacpp 2026.10", "b10257-22dc605c4, xllamacpp 2026.10"),
        ("b0-unknown", "xllamacpp 2026.10", "xllamacpp 2026.10"),  # what xllamacpp's wheels say
        ("unknown", None, "unknown"),
        ("", None, "unknown"),
    ],
)
def test_a_build_is_called_by_what_is_known_of_it(stated: str, package: str | None, name: str) -> None:
    assert named(stated, package) == name


@pytest.mark.parametrize(
    ("validated", "ran", "said"),
    [
        ("xllamacpp 2026.10.1", "xllamacpp 2026.10.1", ""),
        ("b10257-22dc605c4, xllamacpp 1", "b10257-22dc605c4 (llama.node)", ""),
        ("b10257-22dc605c4", "b10257", ""),
        ("b10257-22dc605c4", "b10258-22dc605c4", "answered by b10258-22dc605c4, validated on b10257-22dc605c4"),
        ("xllamacpp 2026.10.1", "xllamacpp 2026.11.2", "answered by xllamacpp 2026.11.2, validated on"),
        ("xllamacpp 2026.10.1", "b10257-22dc605c4", "ship one build, and validate on that one"),
        ("xllamacpp 2026.10.1", None, "the llama.cpp build that answered is unknown"),
        ("xllamacpp 2026.10.1", "unknown", "the llama.cpp build that answered is unknown"),
        (None, "b10257-22dc605c4", "no validated build is recorded"),
    ],
)
def test_another_build_is_said(validated: str | None, ran: str | None, said: str) -> None:
    found = other_build(validated, ran)
    assert said in found and bool(said) is bool(found)
