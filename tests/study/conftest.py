"""What studies of tests are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_llama

NAMES = ("The Vaults", "Alimentum", "Cotto", "Zizzi", "Aromi", "Fitzbillies", "Strada", "Giraffe")
AREAS = ("riverside", "city centre", "north", "old town")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 meaning representations with two sentences each."""
    rows = ["mr,ref"]
    for name in NAMES:
        for area in AREAS:
            facts = f'"name[{name}], area[{area}]"'
            rows += [f"{facts},{name} is in the {area}.", f"{facts},In the {area} there is {name}."]
    file = tmp_path_factory.mktemp("data") / "trainset.csv"
    file.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return file
