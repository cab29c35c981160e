"""What all tests share: one seed, and where the data sets lie."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(os.environ.get("GOSSAMER_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state; tests that use no torch do not load it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """The path of a data set that is not part of the repository; the test is skipped where it is absent."""

    def find(name: str) -> Path:
        path = DATA / name
        if not path.exists():
            pytest.skip(f"{name} is not in {DATA}; set GOSSAMER_DATA")
        return path

    return find
