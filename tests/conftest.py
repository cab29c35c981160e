"""What all tests share: one seed, and where the data sets lie."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

import shapes

shapes.install()

DATA = Path(os.environ.get("GOSSAMER_DATA", Path(__file__).parents[2] / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flight: a whole run of the command, half a minute or more")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: a process that runs out of tests takes others' last ones, and would repeat what they share."""
    items.sort(key=lambda item: item.get_closest_marker("flight") is None)


def pytest_collection_finish() -> None:
    """What is loaded stays: it need not be gone through for garbage again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state; tests that use no torch do not load it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def exported_as_by_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are written without the checks of shapes: those would be traced too, slowly, with sizes as constants."""
    if "torch" not in sys.modules:
        return
    onnx = sys.modules["torch"].onnx
    export = onnx.export

    def unchecked(*args: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
            return export(*args, **kwargs)

    monkeypatch.setattr(onnx, "export", unchecked)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """The path of a data set that is not part of the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{name} is not in {DATA}; set GOSSAMER_DATA")
        return path

    return find
