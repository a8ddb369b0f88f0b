"""Fixtures for all tests. Nothing here or in any test uses a network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# A busy machine is not a failure.
settings.register_profile("rankwise", deadline=None)
settings.load_profile("rankwise")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: $RANKWISE_SHARED, else ../shared/data beside the repository; skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RANKWISE_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set RANKWISE_SHARED)")
    return folder
