"""Made-up data for the readers, and a cache of their own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache-of-the-test"
    monkeypatch.setenv("GOSSAMER_CACHE", str(folder))
    return folder


@pytest.fixture
def class_folders(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of images: `class_folders({"train/cat": 5, ...})`; each image differs from all others."""

    def make(counts: dict[str, int], *, size: tuple[int, int] = (12, 10), name: str = "pictures") -> Path:
        root = tmp_path / name
        rng = np.random.default_rng(0)
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / f"{i:03}.png")
        return root

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Writes a file below the test's folder: `write("a/b.csv", text)`."""

    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make


@pytest.fixture
def reviews() -> Callable[..., str]:
    """The text of a table of reviews, all different."""

    def make(rows: int = 40, *, mark: str = ",", head: bool = True, start: int = 0) -> str:
        lines = [mark.join(("text", "label"))] if head else []
        for i in range(start, start + rows):
            word = ("good", "bad")[i % 2]
            lines.append(mark.join((f"a {word} film number {i} indeed", ("pos", "neg")[i % 2])))
        return "\n".join(lines) + "\n"

    return make


@pytest.fixture
def hourly() -> Callable[..., list[str]]:
    """Lines of an hourly series with two channels, the header first."""

    def make(rows: int = 200) -> list[str]:
        import pandas as pd

        stamps = pd.date_range("2024-01-01", periods=rows, freq="h")
        return ["when,load,heat"] + [f"{t},{i % 24},{(i * 7) % 13}.5" for i, t in enumerate(stamps)]

    return make
