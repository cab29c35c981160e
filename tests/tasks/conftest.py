"""A cache of the test's own."""

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache-of-the-test"))
