"""Where archives and decoded images wait for the next run, and the files of a folder or archive as one tree.

- the cache folder is `GOSSAMER_CACHE`, else `gossamer` in the user's cache folder; deleting it is always safe
- an entry is filled in a folder beside it and renamed, so that it is whole or absent
- an archive is known by path, size and time of change; one without links that unpacks to at most 1 GiB is read in
  memory (writing 50,000 small files takes far longer than decoding them), others are unpacked into the cache
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from gossamer.data.base import DataError
from gossamer.io import safe_extract
from gossamer.io.archive import members, safe_parts

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2")
IN_MEMORY = 2**30  # bytes

Parts = tuple[str, ...]


@dataclass
class File:
    """A file of a tree: its path parts, what tells its state, and how to read it."""

    parts: Parts
    stamp: str
    load: Callable[[], bytes]
    ending: str = ""

    def __post_init__(self) -> None:
        self.ending = os.path.splitext(self.parts[-1])[1].lower()


@dataclass
class Tree:
    """The files, sorted, and the folders (empty ones too) below one place. `root` is None inside an archive."""

    root: Path | None
    files: list[File]
    folders: set[Parts] = field(default_factory=set)

    def subfolders(self, *parts: str) -> list[str]:
        depth = len(parts)
        return sorted(f[depth] for f in self.folders if len(f) == depth + 1 and f[:depth] == parts)

    def below(self, name: str) -> Tree:
        """The tree below one of the top folders."""
        files = [File(f.parts[1:], f.stamp, f.load) for f in self.files if f.parts[0] == name and len(f.parts) > 1]
        folders = {f[1:] for f in self.folders if f[0] == name and len(f) > 1}
        return Tree(None if self.root is None else self.root / name, files, folders)


def hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def folder_tree(root: Path) -> Tree:
    """Every file and folder below `root` but hidden ones."""
    tree = Tree(root, [])

    def walk(folder: str, parts: Parts) -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                if hidden(entry.name):
                    continue
                here = (*parts, entry.name)
                if entry.is_dir():
                    tree.folders.add(here)
                    walk(entry.path, here)
                elif entry.is_file():
                    stat = entry.stat()
                    stamp = f"{stat.st_size} {stat.st_mtime_ns}"
                    tree.files.append(File(here, stamp, partial(read_bytes, entry.path)))

    walk(str(root), ())
    tree.files.sort(key=lambda file: file.parts)
    return tree


def read_bytes(path: str | Path) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def cache_folder() -> Path:
    """The cache folder, made if need be; a fresh temporary one where the user's cannot be written."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("GOSSAMER_CACHE") or Path(home) / "gossamer")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="gossamer-"))


def key_of(*facts: object) -> str:
    """A short name for an entry made from these facts."""
    return hashlib.sha256("\n".join(map(str, facts)).encode(errors="surrogateescape")).hexdigest()[:24]


def cached(kind: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The entry `kind/key`; `fill(folder)` makes it if it is not there."""
    entry = cache_folder() / kind / key
    if entry.is_dir():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=entry.parent))
    try:
        fill(work)
        with contextlib.suppress(OSError):  # another process was first: its entry serves as well
            work.rename(entry)
        if not entry.is_dir():
            raise OSError(f"cannot write the cache entry {entry}")
        return entry
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ARCHIVES)


def archive_key(archive: Path) -> str:
    stat = archive.stat()
    return key_of(archive.resolve(), stat.st_size, stat.st_mtime_ns)


def extracted(archive: Path) -> Path:
    """The folder with the archive's files; extracted once for each state of the archive.

    Raises:
        DataError: a damaged archive, or a member that points outside its folder.
    """

    def fill(folder: Path) -> None:
        try:
            safe_extract(archive, folder)
        except ValueError as error:
            raise DataError(told(archive, error)) from error

    return cached("archives", archive_key(archive), fill)


def told(archive: Path, error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if str(archive) in text else f"{archive}: {text}"


class Packed:
    """The content of an archive in memory, read when it is first asked for."""

    def __init__(self, archive: Path) -> None:
        self.archive = archive
        self.content: dict[Parts, bytes] | None = None
        self.folders: set[Parts] = set()
        self.lock = threading.Lock()

    def read(self) -> bool:
        """Reads it all; False if it has links or is too large for memory.

        Raises:
            DataError: a damaged archive, or a member that points outside its folder.
        """
        content: dict[Parts, bytes] = {}
        left = IN_MEMORY
        try:
            for member in members(self.archive, IN_MEMORY):
                parts = tuple(safe_parts(member.name))
                if member.kind == "folder":
                    self.folders.add(parts)
                elif member.kind != "file" or member.content is None:
                    return False
                else:
                    content[parts] = member.content.read(left + 1)
                    left -= len(content[parts])
                    if left < 0:
                        return False
        except ValueError as error:
            raise DataError(told(self.archive, error)) from error
        except Exception as error:  # each format has errors of its own for damaged content
            raise DataError(f"{self.archive}: the archive is damaged ({error or type(error).__name__})") from error
        self.content = content
        return True

    def load(self, parts: Parts) -> bytes:
        with self.lock:
            if self.content is None:
                self.read()
        assert self.content is not None
        return self.content[parts]


def archive_tree(archive: Path) -> Tree:
    """The files of an archive: in memory where that is possible, else extracted into the cache.

    Raises:
        DataError: a damaged archive, or a member that points outside its folder.
    """
    packed, key = Packed(archive), archive_key(archive)

    def fill(folder: Path) -> None:
        if packed.read():
            assert packed.content is not None
            listing = [[list(parts), len(data)] for parts, data in packed.content.items()]
            text = json.dumps({"files": listing, "folders": sorted(map(list, packed.folders))})
        else:
            text = json.dumps(None)
        (folder / "listing.json").write_text(text, encoding="utf-8")

    entry = cached("listings", key, fill)
    listing = json.loads((entry / "listing.json").read_text(encoding="utf-8"))
    if listing is None:
        return folder_tree(extracted(archive))
    tree = Tree(None, [])
    for names, size in listing["files"]:
        parts = tuple(names)
        if not any(map(hidden, parts)):
            tree.files.append(File(parts, f"{size} {key}", partial(packed.load, parts)))
            tree.folders.update(parts[:depth] for depth in range(1, len(parts)))
    tree.folders |= {tuple(names) for names in listing["folders"] if names and not any(map(hidden, names))}
    tree.folders |= {f[:depth] for f in tree.folders for depth in range(1, len(f))}
    tree.files.sort(key=lambda file: file.parts)
    return tree
