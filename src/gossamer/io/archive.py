"""Unpack archives from outside: nothing leaves the folder, nothing grows without bound.

- zip, and tar plain or packed by gzip, bzip2 or xz, told apart by content, not by name
- one pass: every member is checked before it is written, and the whole goes to a temporary folder that is renamed
  at the end, so that a refused or interrupted archive leaves nothing behind
- links are made last, so that no member is ever written through one
- rights and owners of the archive are not taken over
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30
_CHUNK = 2**20
_TAR_CHUNK = 2**16  # tarfile copies what is left of a chunk at every read, and small files are many reads


@dataclass
class Member:
    """One entry of an archive, as it is come to."""

    name: str
    kind: str  # "file", "folder", "symlink", "hardlink"
    target: str = ""
    content: Any = None  # a readable file object


def safe_extract(
    archive: str | Path, folder: str | Path, *, max_bytes: int = 64 * GIB, max_members: int = 5_000_000
) -> Path:
    """Unpack `archive` into `folder` and return the folder.

    Args:
        archive: a zip, tar, tar.gz, tar.bz2 or tar.xz file.
        folder: a folder that does not exist yet, or is empty.
        max_bytes: most bytes that may be unpacked.
        max_members: most members.

    Raises:
        ValueError: not an archive or a damaged one; `folder` holds files; a member has an absolute path, climbs
            with "..", links to the outside, is a device or a pipe; or a bound is passed. The member is named.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise ValueError(f"no such file: {archive}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be new or empty, got {folder}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        _unpack(archive, temporary, max_bytes, max_members)
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(temporary, folder)
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError, NotImplementedError) as error:
        raise ValueError(f"{archive} cannot be unpacked: {str(error) or type(error).__name__}") from error
    except RuntimeError as error:  # zipfile's word for a member under a password
        raise ValueError(f"{archive} cannot be unpacked: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _unpack(archive: Path, root: Path, max_bytes: int, max_members: int) -> None:
    written = 0
    links: list[tuple[Path, Member]] = []
    made = {root}

    def make(path: Path) -> None:
        if path not in made:
            path.mkdir(parents=True, exist_ok=True)
            made.add(path)

    for number, member in enumerate(members(archive, max_bytes), start=1):
        if number > max_members:
            raise ValueError(f"{archive} has more than max_members={max_members:,} members")
        path = root.joinpath(*safe_parts(member.name))
        if member.kind == "folder":
            make(path)
        elif member.kind == "file":
            make(path.parent)
            with open(path, "wb") as file:
                while chunk := member.content.read(_CHUNK):
                    written += len(chunk)
                    if written > max_bytes:
                        raise ValueError(f"member {member.name!r} brings it over max_bytes={max_bytes:,}")
                    file.write(chunk)
        else:
            # A symbolic link is read from where it stands, a hard link from the top of the archive.
            base = safe_parts(member.name)[:-1] if member.kind == "symlink" else []
            _stays_inside(member, base)
            links.append((path, member))
    _make_links(root, links)


def safe_parts(name: str) -> list[str]:
    """The folders and the file of a member's name, none of which leads out.

    Both kinds of separator count, so that an archive is judged alike on every system.
    """
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or (len(parts[0]) > 1 and parts[0][1] == ":"):
        raise ValueError(f"member has an absolute path: {name!r}")
    if ".." in parts:
        raise ValueError(f"member points outside its folder: {name!r}")
    if "\0" in name:
        raise ValueError(f"member has a null character in its name: {name!r}")
    return [part for part in parts if part not in ("", ".")]


def _stays_inside(member: Member, base: list[str]) -> None:
    target = member.target.replace("\\", "/")
    depth = len(base)
    if target.startswith("/") or target[1:2] == ":":
        raise ValueError(f"member {member.name!r} links to an absolute path: {member.target!r}")
    for part in target.split("/"):
        depth += -1 if part == ".." else part not in ("", ".")
        if depth < 0:
            raise ValueError(f"member {member.name!r} links outside its folder: {member.target!r}")


def _make_links(root: Path, links: list[tuple[Path, Member]]) -> None:
    """Symbolic links first, then, when all can be followed, the hard ones as copies.

    Links through links can climb further than each of them alone: what they resolve to decides.
    """
    top = root.resolve()

    def check(path: Path, member: Member) -> Path:
        resolved = path.resolve()
        if not resolved.is_relative_to(top):
            raise ValueError(f"member {member.name!r} links outside its folder: {member.target!r}")
        return resolved

    symbolic = [(path, member) for path, member in links if member.kind == "symlink"]
    for path, member in symbolic:
        check(path.parent, member).mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(member.target)
    for path, member in symbolic:
        check(path, member)
    for path, member in links:
        if member.kind == "hardlink":
            source = check(root.joinpath(*safe_parts(member.target)), member)
            if not source.is_file():
                raise ValueError(f"member {member.name!r} links to what is not there: {member.target!r}")
            check(path.parent, member).mkdir(parents=True, exist_ok=True)
            if check(path, member) != source:
                path.unlink(missing_ok=True)
                shutil.copyfile(source, path)


# --- readers --------------------------------------------------------------------------------------------------


def members(archive: Path, max_bytes: int) -> Iterator[Member]:
    """The entries of a zip or tar, in order; a file's content can be read until the next one is asked for."""
    with open(archive, "rb") as file:
        head = file.read(6)
    if head.startswith(b"PK"):
        return _zip_members(archive)
    return _tar_members(archive, head, max_bytes)


def _zip_members(archive: Path) -> Iterator[Member]:
    with zipfile.ZipFile(archive) as file:
        for info in file.infolist():
            mode = info.external_attr >> 16
            if info.is_dir():
                yield Member(info.filename, "folder")
            elif stat.S_ISLNK(mode):
                with file.open(info) as content:
                    yield Member(info.filename, "symlink", content.read(4096).decode("utf-8", "replace"))
            elif stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise ValueError(f"member is neither file, folder nor link: {info.filename!r}")
            else:
                with file.open(info) as content:
                    yield Member(info.filename, "file", content=content)


def _tar_members(archive: Path, head: bytes, max_bytes: int) -> Iterator[Member]:
    with closing(_decompressed(archive, head)) as raw:
        # Headers come on top of the content, so the stream may be longer than the files in it.
        stream: Any = _Bounded(raw, 2 * max_bytes + 64 * _CHUNK)
        try:
            tar = tarfile.open(fileobj=stream, mode="r|", bufsize=_TAR_CHUNK)  # noqa: SIM115
        except tarfile.ReadError:
            raise ValueError(f"{archive} is neither a zip nor a tar archive") from None
        with tar:
            last = ""
            for info in tar:
                if info.isdir():
                    yield Member(info.name, "folder")
                elif info.issym():
                    yield Member(info.name, "symlink", info.linkname)
                elif info.islnk():
                    yield Member(info.name, "hardlink", info.linkname)
                elif info.isreg():
                    yield Member(info.name, "file", content=tar.extractfile(info))
                else:
                    raise ValueError(f"member is neither file, folder nor link: {info.name!r}")
                last = info.name
                # The list is for random access, which a stream has not; it would grow by every member.
                tar.members.clear()  # type: ignore[attr-defined]
            # tarfile takes a header it cannot read for the end; after the true end there are only zeros.
            if tar.fileobj is not None and any(tar.fileobj.read(_CHUNK)):
                raise ValueError(f"{archive} is damaged after member {last!r}")


def _decompressed(archive: Path, head: bytes) -> Any:
    if head.startswith(b"\x1f\x8b"):
        return gzip.open(archive)
    if head.startswith(b"BZh"):
        return bz2.open(archive)
    if head.startswith(b"\xfd7zXZ\x00"):
        return lzma.open(archive)
    return open(archive, "rb")


class _Bounded:
    """A stream that ends in an error instead of going on past `limit` bytes."""

    def __init__(self, stream: Any, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError("the archive unpacks to more than max_bytes allows")
        return data
