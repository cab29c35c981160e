"""`read_dataset`: whatever the user points at, as a `Dataset`.

- a folder, an archive, a table file, a Hub name, or a built-in
- the task is seen from the data: class folders of images; a text and a label column; a time and numeric columns;
  plain text
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gossamer.data.base import TASKS, DataError, Dataset, check_option, listing
from gossamer.data.builtin import BUILTINS
from gossamer.data.cache import File, Tree, archive_tree, extracted, folder_tree, is_archive
from gossamer.data.splits import SPLIT_NAMES
from gossamer.data.tables import TABLES, Table, read_table

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jfif")
TEXT = ".txt"


def read_dataset(source: str | Path, *, task: str | None = None, seed: int = 0, **options: Any) -> Dataset:
    """Reads a data set and splits it.

    Args:
        source: a folder or archive of images in class folders, with or without train, val and test folders; a CSV,
            TSV, Parquet or JSON-lines file, a plain text (.txt), or a folder with train, dev and test files of these
            kinds; `owner/name` on the Hugging Face Hub (`hub:owner/name` where a folder of that name exists); or a
            built-in: `digits`, `toy-images`, `toy-text`, `toy-series`.
        task: `image-classification`, `text-classification`, `sentence-similarity` or `forecasting`; by default seen
            from the data.
        seed: of the splits we make.
        options: of tables `encoding, header`; of images `image_size, flip`; of text `text, label, tokenizer,
            vocab_size, max_len` (of plain text without the first two); of series `time, target, features, lookback,
            horizon`; of Hub names `config`.

    Raises:
        DataError: the data cannot be used; the message names file, row and column, and what to do.
        UnknownOption: an option that the task does not have.
    """
    if task is not None:
        check_option("task", task, TASKS)
    options = {name: value for name, value in options.items() if value is not None}
    name = str(source)
    if name in BUILTINS and not Path(name).exists():
        kind, build = BUILTINS[name]
        if task not in (None, kind):
            raise DataError(f"{name} is for {kind}, not for {task}")
        return finish(build(seed=seed, **allowed(build, kind, options)), name)
    path = Path(source).expanduser()
    from gossamer.data.hub import is_hub_name

    if name.startswith("hub:") or (not path.exists() and is_hub_name(name) and not is_known_file(path)):
        return finish(read_hub(name, task, seed, options), name)
    if not path.exists():
        raise DataError(
            f"{name}: no such file or folder; built-in data are {', '.join(BUILTINS)}, Hub names have the form "
            "owner/name"
        )
    if path.is_dir():
        return finish(read_tree(folder_tree(path), path, task, seed, options), name)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    if is_archive(path):
        return finish(read_tree(archive_tree(path), path, task, seed, options), name)
    if path.suffix.lower() == TEXT:
        return finish(read_texts({"train": [path]}, task, seed, options), name)
    if path.suffix.lower() not in TABLES:
        raise DataError(
            f"{path}: unknown extension {path.suffix!r}; tables are {', '.join(TABLES)}, text is .txt, archives .zip, "
            ".tar, .tar.gz, .tgz, .tar.xz; images belong in class folders"
        )
    return finish(read_tables({"train": [path]}, task, seed, options), name)


class UnknownOption(ValueError):
    """An option that data of this kind do not have."""


def finish(dataset: Dataset, source: str) -> Dataset:
    dataset.meta = {"source": source, "task": dataset.task, **dataset.meta}
    return dataset


def is_known_file(path: Path) -> bool:
    return is_archive(path) or path.suffix.lower() in (*TABLES, TEXT)


def allowed(build: Callable[..., Any], task: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, if `build` takes them all."""
    known = set(inspect.signature(build).parameters)
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(build).parameters.values()):
        # A toy: it gives its table to the reader, and says itself which columns are which.
        known |= set(inspect.signature(_reader(task)).parameters) - {"text", "label"}
    known -= {"options", "seed", "tables", "texts", "items", "folders", "where", "problems"}
    if strange := sorted(set(options) - known):
        raise UnknownOption(f"{task} has no option {strange[0]!r}; its options are {', '.join(sorted(known))}")
    return options


def _reader(task: str) -> Callable[..., Any]:
    from gossamer.data.series import series_dataset
    from gossamer.data.text import text_dataset

    return series_dataset if task == "forecasting" else text_dataset


def top(tree: Tree) -> Tree:
    """Goes down while there is a single folder and nothing to read beside it."""
    while True:
        inner = tree.subfolders()
        here = [f for f in tree.files if len(f.parts) == 1 and f.ending in (*IMAGE_ENDINGS, *TABLES)]
        if len(inner) != 1 or here or inner[0].lower() in SPLIT_NAMES:
            return tree
        below = tree.below(inner[0])
        if below.files and all(len(f.parts) == 1 and f.ending in IMAGE_ENDINGS for f in below.files):
            return tree  # a single class folder
        tree = below


def read_tree(tree: Tree, source: Path, task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    """A folder or archive of images in class folders, or of tables. `source` is what the user named."""
    tree = top(tree)
    images = [f for f in tree.files if f.ending in IMAGE_ENDINGS]
    tables = [f for f in tree.files if f.ending in TABLES and len(f.parts) == 1]
    if task is None and images and by_split(tables):
        raise DataError(
            f"{source}: holds {len(images)} images and the tables {listing([f.parts[-1] for f in tables])}; say "
            "--task image-classification, text-classification or forecasting"
        )
    texts = [f for f in tree.files if f.ending == TEXT]
    if task == "language-modelling" or (task is None and texts and not images and not tables):
        return read_texts(text_files(tree, source, texts), task, seed, options)
    if task == "image-classification" or (task is None and images):
        return read_images(tree, source, seed, options)
    if tables:
        if tree.root is None:  # inside an archive: table readers want files
            tree = top(folder_tree(extracted(source)))
        assert tree.root is not None
        return read_tables(table_files(tree.root, source, tables), task, seed, options)
    if task is None and tree.folders and not tree.files:
        return read_images(tree, source, seed, options)  # class folders without a picture: says which are empty
    endings = sorted({f.ending or "no extension" for f in tree.files})
    wanted = f"no {'tables' if task else 'images in class folders and no tables'} found"
    raise DataError(f"{source}: {wanted}; " + (f"its files end in {listing(endings)}" if endings else "it is empty"))


def read_images(tree: Tree, source: Path, seed: int, options: dict[str, Any]) -> Dataset:
    from gossamer.data.images import Item, image_dataset

    outer = tree.subfolders()
    named = {folder: SPLIT_NAMES[folder.lower()] for folder in outer if folder.lower() in SPLIT_NAMES}
    problems = []
    if "train" in named.values():
        folders: dict[str, list[str]] = {}
        for folder, split in named.items():
            folders.setdefault(split, []).extend(tree.subfolders(folder))
        if other := [folder for folder in outer if folder not in named]:
            problems.append(f"folders beside train and test are left out: {listing(other)}")
    else:
        named, folders = {}, {"train": outer}
    depth = 1 if named else 0
    items, loose, strange = [], [], []
    for file in tree.files:
        name = "/".join(file.parts)
        if named and file.parts[0] not in named:
            continue
        if file.ending not in IMAGE_ENDINGS:
            strange.append(name)
        elif len(file.parts) < depth + 2:
            loose.append(name)
        else:
            split = named[file.parts[0]] if named else "train"
            items.append(Item(name, file.parts[depth], split, file.load, file.stamp))
    if loose and not items:
        raise DataError(
            f"{source}: {len(loose)} images lie in no class folder ({listing(loose, 3)}); put each into a folder named "
            "for its class"
        )
    if loose:
        problems.append(f"{len(loose)} images outside class folders are left out: {listing(loose, 5)}")
    if strange:
        problems.append(f"{len(strange)} files that are no images are left out: {listing(strange, 5)}")
    options = allowed(image_dataset, "image-classification", options)
    return image_dataset(items, folders, where=source, seed=seed, problems=problems, **options)


def by_split(files: list[File]) -> dict[str, list[File]]:
    """Table files by the split their name tells, as in `train.tsv`, `sst2_dev.csv`, `test-00000-of-00001.parquet`."""
    found: dict[str, list[File]] = {}
    for file in files:
        words = re.split(r"[^a-z]+", os.path.splitext(file.parts[-1])[0].lower())
        splits = {SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES}
        if len(splits) == 1:
            found.setdefault(splits.pop(), []).append(file)
    return found


def table_files(root: Path, source: Path, tables: list[File]) -> dict[str, list[Path]]:
    """Table files of a folder, by split."""
    if len(tables) == 1:
        return {"train": [root / tables[0].parts[-1]]}
    found = by_split(tables)
    if "train" not in found:
        names = listing([f.parts[-1] for f in tables])
        raise DataError(f"{source}: holds the tables {names}; name one train (and dev, test), or give one file")
    return {split: [root / f.parts[-1] for f in files] for split, files in found.items()}


def text_files(tree: Tree, source: Path, texts: list[File]) -> dict[str, list[Path]]:
    """Text files of a folder, by the split their name tells; all of them for training where no name does."""
    if not texts:
        raise DataError(f"{source}: no .txt files found")
    root = tree.root
    if root is None:  # inside an archive: files are wanted
        root = top(folder_tree(extracted(source))).root
    assert root is not None
    found = by_split(texts) or {"train": texts}
    return {split: [root.joinpath(*f.parts) for f in files] for split, files in found.items()}


def read_texts(paths: dict[str, list[Path]], task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    """Plain text."""
    from gossamer.data.language import language_dataset
    from gossamer.data.tables import read_text

    if task not in (None, "language-modelling"):
        raise DataError(f"{paths['train'][0]}: plain text is for language-modelling, not for {task}")
    rest = dict(options)
    encoding = rest.pop("encoding", None)
    build = allowed(language_dataset, "language-modelling", rest)
    texts = {split: [read_text(path, encoding) for path in files] for split, files in paths.items()}
    return language_dataset(texts, seed=seed, **build)


def read_tables(paths: dict[str, list[Path]], task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    rest = dict(options)
    encoding, header = rest.pop("encoding", None), rest.pop("header", None)
    tables: dict[str, list[Table]] = {}
    for split in sorted(paths, key=lambda name: name != "train"):
        for path in paths[split]:
            table = read_table(path, encoding=encoding, header=header)
            header = table.header if header is None and path.suffix.lower() in (".csv", ".tsv") else header
            tables.setdefault(split, []).append(table)
    return from_tables(tables, task, seed, rest)


def from_tables(tables: dict[str, list[Table]], task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    if task is None:
        task = seen_task(tables.get("train", next(iter(tables.values())))[0], options)
    if task == "forecasting":
        from gossamer.data.series import series_dataset

        return series_dataset(tables, seed=seed, **allowed(series_dataset, task, options))
    if task == "text-classification":
        from gossamer.data.text import text_dataset

        return text_dataset(tables, seed=seed, **allowed(text_dataset, task, options))
    if task == "sentence-similarity":
        from gossamer.data.pairs import pair_dataset

        return pair_dataset(tables, seed=seed, **allowed(pair_dataset, task, options))
    path = next(iter(tables.values()))[0].path
    wanted = "images in class folders" if task == "image-classification" else "plain text (.txt)"
    raise DataError(f"{path}: a table cannot be read for {task}; give {wanted}, in a folder or an archive")


def seen_task(table: Table, options: dict[str, Any]) -> str:
    """Text where there is a text and a label column, a series where there is a time and a numeric column.

    Raises:
        DataError: both or neither.
    """
    from gossamer.data.columns import look

    columns = look(table)
    kinds = [column.kind for column in columns]
    if sorted(kinds) == ["number", "text", "text"] and "text" not in options:
        return "sentence-similarity"
    texts = "text" in kinds and "label" in kinds
    if "text" in options or "label" in options:
        texts = True
    series = "time" in kinds and any(c.kind in ("number", "label") for c in columns)
    if any(name in options for name in ("time", "target", "horizon", "lookback", "features")):
        series, texts = True, False
    if series and texts and "number" not in kinds:
        series = False  # a date beside text and label is one more fact on the text
    if texts != series:
        return "text-classification" if texts else "forecasting"
    seen = listing([str(column) for column in columns], 12)
    if texts:
        raise DataError(
            f"{table.path}: could be text or a series; say --task text-classification or forecasting; seen: {seen}"
        )
    raise DataError(
        f"{table.path}: neither a text and a label column nor a time and a numeric column; say --task "
        "text-classification (with text=COLUMN and label=COLUMN, --text-column and --label-column) or forecasting "
        f"(with time=COLUMN, --time-column); seen: {seen}"
    )


def read_hub(name: str, task: str | None, seed: int, options: dict[str, Any]) -> Dataset:
    from gossamer.data.hub import from_hub
    from gossamer.data.images import image_dataset

    rest = dict(options)
    config = rest.pop("config", None)
    items, folders, tables = from_hub(name, rest.get("label"), config)
    if folders:
        if task not in (None, "image-classification"):
            raise DataError(f"{name}: holds images, which cannot be read for {task}")
        rest.pop("label", None)
        options = allowed(image_dataset, "image-classification", rest)
        return image_dataset(items, folders, where=name, seed=seed, **options)
    return from_tables(tables, task, seed, rest)
