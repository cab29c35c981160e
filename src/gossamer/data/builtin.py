"""Data that need no file: the digits of scikit-learn, and a generated toy for every task.

A toy is learnable only by what its task is about: shape at any place and colour, the order of words, the past of
another channel. What is easily counted (mean colour, word frequencies, the last value) tells nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gossamer.data.base import Dataset, Split
from gossamer.data.splits import digest, make_plan, split_record


def pixel_dataset(images: np.ndarray, labels: np.ndarray, classes: list[str], seed: int, flip: bool | None) -> Dataset:
    """Images uint8 `(n, h, w, c)` with class numbers, split by us."""
    from gossamer.data.images import image_meta

    keys = {"train": np.array([digest(image.tobytes()) for image in images], dtype=np.int64)}
    plan = make_plan({"train": labels}, keys, seed)
    tensor = torch.from_numpy(np.ascontiguousarray(images))
    splits = {}
    for name, (_, index) in plan.parts.items():
        at = torch.from_numpy(index)
        splits[name] = Split(
            (tensor[at].permute(0, 3, 1, 2),),
            torch.from_numpy(labels[index].astype(np.int64)),
            [f"image {i}" for i in index],
        )
    meta = image_meta(splits["train"], classes, flip)
    meta["split"] = split_record(plan, keys, seed)
    spec = {"img_size": tuple(images.shape[1:3]), "in_chans": images.shape[3], "num_classes": len(classes)}
    return Dataset("image-classification", splits["train"], splits["val"], splits["test"], spec, meta)


def digits(seed: int = 0, flip: bool | None = None) -> Dataset:
    """1,797 grey 8x8 images of handwritten digits, from scikit-learn (values 0 to 16)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images[..., None] * (255 / 16)).astype(np.uint8)
    return pixel_dataset(images, data.target.astype(np.int64), [str(i) for i in range(10)], seed, flip)


def toy_images(seed: int = 0, rows: int = 2000, flip: bool | None = None) -> Dataset:
    """Disc, square, cross or ring, of any colour at any place, on a noisy ground of any colour; 32x32 RGB.

    All four cover the same area, so that no average tells them apart.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, rows)
    y, x = np.mgrid[0:32, 0:32]
    images = np.empty((rows, 32, 32, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        area = rng.uniform(90, 200)
        reach = {
            0: (area / np.pi) ** 0.5,
            1: area**0.5 / 2,
            2: (area / 5) ** 0.5 * 1.5,
            3: (area / np.pi / 0.64) ** 0.5,
        }
        room = min(14.0, reach[int(label)])
        cy, cx = rng.uniform(room, 31 - room, 2)
        dy, dx = np.abs(y - cy), np.abs(x - cx)
        far = np.hypot(dy, dx)
        size = reach[int(label)]
        shape = (
            far <= size,
            np.maximum(dy, dx) <= size,
            (np.maximum(dy, dx) <= size) & (np.minimum(dy, dx) <= size / 3),
            (far <= size) & (far >= 0.6 * size),
        )[label]
        ground, paint = rng.uniform(40, 215, 3), rng.uniform(40, 215, 3)
        while np.abs(ground - paint).max() < 60:
            paint = rng.uniform(40, 215, 3)
        image = np.where(shape[..., None], paint, ground) + rng.normal(0, 12, (32, 32, 3))
        images[i] = image.clip(0, 255)
    return pixel_dataset(images, labels, ["disc", "square", "cross", "ring"], seed, flip)


GOOD = ("good", "fine", "lovely", "great", "bright", "sweet")
BAD = ("bad", "dull", "poor", "awful", "bleak", "sour")
OTHERS = ("weather", "food", "music", "crowd", "seat")


def toy_sentences(seed: int = 0, rows: int = 4000) -> tuple[list[str], list[str]]:
    """Sentences on a film and on something else, each praised or blamed, and their labels.

    The label is what is said of the film. One of the two judgements stands behind "not", which turns it round; praise
    and blame occur equally often under both labels, so the words without their order tell nothing.
    """
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    for _ in range(rows):
        film, other = rng.random(2) < 0.5
        turned = rng.random() < 0.5  # whether "not" stands with the film
        clauses = []
        for thing, liked, negated in (("film", film, turned), (rng.choice(OTHERS), other, not turned)):
            word = rng.choice(GOOD if liked != negated else BAD)
            clauses.append(f"the {thing} was {'not ' if negated else ''}{word}")
        if rng.random() < 0.5:
            clauses.reverse()
        texts.append(f" {rng.choice(['and', 'but', 'while'])} ".join(clauses))
        labels.append("liked" if film else "disliked")
    return texts, labels


def toy_text(seed: int = 0, rows: int = 4000, **options: Any) -> Dataset:
    """`toy_sentences` as a data set."""
    import pandas as pd

    from gossamer.data.tables import Table
    from gossamer.data.text import text_dataset

    texts, labels = toy_sentences(seed, rows)
    table = Table(Path("toy-text"), pd.DataFrame({"text": texts, "label": labels}))
    return text_dataset({"train": [table]}, seed=seed, text="text", label="label", **options)


def toy_table(seed: int = 0, rows: int = 4000) -> Any:
    """Three hourly channels: daily and weekly waves on a slow drift; waves whose period is no hour; and an echo of
    the second, 30 hours late. A data frame with `date`."""
    import pandas as pd

    rng = np.random.default_rng(seed)
    t = np.arange(rows + 30, dtype=np.float64)
    phase = rng.uniform(0, 2 * np.pi, 4)
    load = np.sin(2 * np.pi * t / 24 + phase[0]) + 0.6 * np.sin(2 * np.pi * t / 168 + phase[1]) + t / 4000
    tide = np.sin(2 * np.pi * t / 12.42 + phase[2]) * (1 + 0.5 * np.sin(2 * np.pi * t / 354.4 + phase[3]))
    echo = -np.roll(tide, 30)
    values = np.stack([load, tide, echo], 1)[30:] + rng.normal(0, 0.1, (rows, 3))
    frame = pd.DataFrame(values.round(4), columns=["load", "tide", "echo"])
    frame.insert(0, "date", pd.date_range("2020-01-01", periods=rows, freq="h"))
    return frame


def toy_series(seed: int = 0, rows: int = 4000, **options: Any) -> Dataset:
    """`toy_table` as a data set."""
    from gossamer.data.series import series_dataset
    from gossamer.data.tables import Table

    return series_dataset({"train": [Table(Path("toy-series"), toy_table(seed, rows))]}, seed=seed, **options)


BUILTINS: dict[str, tuple[str, Callable[..., Dataset]]] = {
    "digits": ("image-classification", digits),
    "toy-images": ("image-classification", toy_images),
    "toy-text": ("text-classification", toy_text),
    "toy-series": ("forecasting", toy_series),
}
