"""A data set of the Hugging Face Hub, through the `datasets` library, as images in memory or as tables."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from gossamer.data.base import DataError
from gossamer.data.cache import read_bytes
from gossamer.data.images import Item
from gossamer.data.splits import SPLIT_NAMES
from gossamer.data.tables import Table

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(source: str) -> bool:
    """`hub:owner/name`, or `owner/name`."""
    return source.startswith("hub:") or NAME.fullmatch(source) is not None


def from_hub(
    source: str, label: str | None = None, config: str | None = None
) -> tuple[list[Item], dict[str, list[str]], dict[str, list[Table]]]:
    """Images with their class folders, or else tables, by split.

    Args:
        source: `hub:owner/name` or `owner/name`.
        label: the label column; by default the one of class labels.
        config: the configuration, where the data set has several.

    Raises:
        DataError: the data set cannot be loaded, or its splits carry no known name.
    """
    import datasets

    name = source.removeprefix("hub:")
    try:
        loaded: Any = datasets.load_dataset(name, config)
    except Exception as error:  # the library raises network, parsing and script errors of many kinds
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{source}: no such file or folder here, and not loadable from the Hub ({why})") from error
    if isinstance(loaded, datasets.Dataset):
        loaded = {"train": loaded}
    items: list[Item] = []
    folders: dict[str, list[str]] = {}
    tables: dict[str, list[Table]] = {}
    for given, part in loaded.items():
        split = SPLIT_NAMES.get(str(given).lower())
        if split is None:
            continue
        pictures = [key for key, kind in part.features.items() if isinstance(kind, datasets.Image)]
        named = {key: kind.names for key, kind in part.features.items() if isinstance(kind, datasets.ClassLabel)}
        if pictures:
            new, classes = images_of(name, str(given), split, part, pictures[0], named, label)
            items += new
            folders[split] = classes
        else:
            frame = part.to_pandas()
            for key, names in named.items():
                frame[key] = [names[k] if k >= 0 else str(k) for k in frame[key]]
            tables.setdefault(split, []).append(Table(Path(name) / str(given), frame))
    if not folders and not tables:
        raise DataError(f"{source}: no split named train, validation or test; found {', '.join(map(str, loaded))}")
    return items, folders, tables


def images_of(
    name: str, given: str, split: str, part: Any, picture: str, named: dict[str, list[str]], label: str | None
) -> tuple[list[Item], list[str]]:
    import datasets

    if label is None:
        possible = list(named) or [key for key in part.column_names if key.lower() in ("label", "class", "target")]
        if len(possible) != 1:
            raise DataError(
                f"{name}: say the label column with label=COLUMN (--label-column); columns are "
                f"{', '.join(part.column_names)}"
            )
        label = possible[0]
    if label not in part.column_names:
        raise DataError(f"{name}: no column {label!r}; the columns are {', '.join(part.column_names)}")
    raw = part.select_columns([picture, label]).cast_column(picture, datasets.Image(decode=False))
    names = named.get(label)
    items = []
    for i, row in enumerate(raw):
        value = row[label]
        text = (names[value] if value >= 0 else str(value)) if names else str(value)
        source = row[picture]["bytes"]
        load = partial(read_bytes, row[picture]["path"]) if source is None else partial(bytes, source)
        items.append(Item(f"{given}/{i}", text, split, load, part._fingerprint))
    return items, sorted({item.label for item in items})
