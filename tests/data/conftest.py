"""Fixtures for the tests of rows and what models are given of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictured import SIZES
from tiny_vision import drawn_image


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of `pictured`'s conversations; read only."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate(SIZES):
        drawn_image(number, size).save(folder / f"{number}.png")
    return folder
