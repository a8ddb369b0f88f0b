"""Fixtures for all tests. Nothing here or in any test uses a network."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from rankwise.page import canvas

if TYPE_CHECKING:
    from rankwise.gguf.converter import Converter

gc.disable()  # while modules are imported, up to the end of the collection: nothing of them is garbage

# Helpers, and test modules whose cases other rooms' tests share, are imported by name.
sys.path[:0] = [str(folder) for folder in sorted(Path(__file__).parent.iterdir()) if folder.is_dir()]

# Threads of llama.cpp that wait for each other sleep: on busy cores they would spin for most of the suite's time.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What tests write need not outlive a power cut: most of the time of a small write is waiting for the disk.
os.fsync = lambda _: None

# A busy machine is not a failure.
settings.register_profile("rankwise", deadline=None)
settings.load_profile("rankwise")


def pytest_collection_finish() -> None:
    """What is imported by now stays: `gc.collect()`, which the Trainer calls after every run, need not walk it."""
    gc.enable()
    settle()


@pytest.fixture(scope="module", autouse=True)
def settled() -> Iterator[None]:
    """What a module's tests have imported stays as well; what they have left behind does not."""
    yield
    settle()


def settle() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let go at the end, where libraries in C count what was not given back to them."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def blank_pictures() -> Iterator[None]:
    """Plots are composed and saved as one pixel; `processes.py` does the same in its processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(canvas, "every_glyph", importlib.import_module("pictures").blank)
        yield


@pytest.fixture
def drawn_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are rendered: for the tests of what they look like, one or more for each plot."""
    monkeypatch.setattr(canvas, "every_glyph", importlib.import_module("pictures").DRAWN)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real data: $RANKWISE_SHARED, else ../shared/data beside the repository; skips where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RANKWISE_SHARED", beside))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set RANKWISE_SHARED)")
    return folder


# exported.py imports transformers, so only the tests that ask for it pay for that.


@pytest.fixture(scope="session")
def converter() -> Converter:
    """llama.cpp's converter as `rankwise export --install-converter` leaves it; skips where there is none."""
    return importlib.import_module("exported").installed_converter()


@pytest.fixture(scope="session")
def family_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """model_type → the folder of a family's tiny model and processor; read only."""
    exported, families = (importlib.import_module(name) for name in ("exported", "families"))
    root = exported.session_root(tmp_path_factory) / "families"
    root.mkdir(exist_ok=True)
    return lambda name: exported.once(root / name, families.FAMILIES[name])


@pytest.fixture(scope="session")
def text_export(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama exported as f32, f16 and q8_0; its checkpoint is in ../model, tuned from ../base."""
    exported = importlib.import_module("exported")
    return exported.once(exported.session_root(tmp_path_factory) / "text", exported.exported_text) / "export"


@pytest.fixture(scope="session")
def mixtures(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny mixtures of experts: FAMILY/export (f32, f16, q8_0) of FAMILY/model, tuned from FAMILY/base."""
    exported, made = (importlib.import_module(name) for name in ("exported", "exported_experts"))
    return exported.once(exported.session_root(tmp_path_factory) / "mixtures", made.exported_mixtures)


@pytest.fixture(scope="session")
def vision_export(converter: Converter, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SmolVLM exported as f32, f16 and q8_0, with mmproj files; checkpoint in ../model, its base in ../base."""
    exported = importlib.import_module("exported")
    return exported.once(exported.session_root(tmp_path_factory) / "vision", exported.exported_vision) / "export"


@pytest.fixture(scope="session")
def trained_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base that `rankwise tiny` makes, with all of its training."""
    exported, tiny = (importlib.import_module(name) for name in ("exported", "rankwise.demo.tiny"))
    folder = exported.session_root(tmp_path_factory) / "trained-base"
    return exported.once(folder, lambda place: tiny.make_base(place, tiny.COURSE, seed=1))


@pytest.fixture(scope="session")
def shipped(vision_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with export/, dataset/ and validation/: as the three commands before `bundle` leave them."""
    pytest.importorskip("xllamacpp")
    return importlib.import_module("bundled").shipped_in(tmp_path_factory.mktemp("shipped"), vision_export)


@pytest.fixture(scope="session")
def made(shipped: Path) -> Path:
    """The bundle of it."""
    importlib.import_module("rankwise.device.bundle").run(importlib.import_module("bundled").asked(shipped))
    return shipped / "bundle"
