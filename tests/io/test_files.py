"""Atomic files, weights and checkpoints, archives from outside."""

import argparse
import io
import os
import stat
import tarfile
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from gossamer.io import (
    atomic_write,
    claim,
    load_weights,
    read_checkpoint,
    read_json,
    safe_extract,
    save_weights,
    write_json,
)

# --- runs -----------------------------------------------------------------------------------------------------


def test_a_run_of_an_older_version_goes_on_where_what_it_did_not_know_is_off(tmp_path):
    claim(tmp_path, {"epochs": 3, "settings": {"lr": 0.1}})
    claim(tmp_path, {"epochs": 3, "settings": {"lr": 0.1, "checkpointing": False}, "pretrain": None})
    for asked in (
        {"epochs": 4, "settings": {"lr": 0.1}},
        {"epochs": 3, "settings": {"lr": 0.2}},
        {"epochs": 3, "settings": {}},
        {"epochs": 3, "settings": {"lr": 0.1, "checkpointing": True}},
        {"epochs": 3, "settings": {"lr": 0.1}, "pretrain": 2},
    ):
        with pytest.raises(ValueError, match=r"another (epochs|settings|pretrain)"):
            claim(tmp_path, asked)


# --- files ----------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with atomic_write(path) as file:
        file.write("old")

    def interrupted():
        with atomic_write(path) as file:
            file.write("half of the ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["a.txt"]
    with atomic_write(path, "wb") as file:
        file.write(b"new")
        assert path.read_text() == "old"  # not before the end
    assert path.read_text() == "new"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_json_comes_back_and_says_where_it_is_broken(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": [1, None, 2.5]})
    assert read_json(path) == {"é": [1, None, 2.5]}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": float("nan")})
    assert read_json(path) == {"é": [1, None, 2.5]}
    path.write_text('{"a": }')
    with pytest.raises(ValueError, match=r"a\.json.*column 7"):
        read_json(path)
    with pytest.raises(ValueError, match="no such file"):
        read_json(tmp_path / "b.json")


# --- weights --------------------------------------------------------------------------------------------------


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    tied = torch.randn(100, 50)
    views = torch.randn(4, 6)
    state = {
        "embed": tied,
        "head": tied,
        "row": views[0],
        "turned": views.t(),
        "half": torch.randn(3).half(),
        "empty": torch.empty(0),
        "steps": torch.tensor(7),
    }
    path = tmp_path / "w.safetensors"
    save_weights(state, path)
    assert path.stat().st_size < 2 * tied.numel() * 4
    loaded = load_weights(path)
    assert set(loaded) == set(state)
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert loaded["row"].data_ptr() != loaded["turned"].data_ptr()


def test_a_model_with_tied_weights_loads_strictly_from_its_file(tmp_path):
    def make():
        model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model, other = make(), make()
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    other.load_state_dict(load_weights(tmp_path / "w.safetensors"), strict=True)
    assert torch.equal(other["head"].weight, model["embed"].weight)


def test_weights_without_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="meta"):
        save_weights({"a": torch.empty(2, device="meta")}, tmp_path / "w")
    with pytest.raises(ValueError, match="'b'"):
        save_weights({"b": 3}, tmp_path / "w")  # type: ignore[dict-item]
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        lambda s: {"state_dict": OrderedDict(("module." + k, v) for k, v in s.items()), "best": np.float64(0.5)},
        lambda s: {"model_ema": {"state_dict": s}, "optimizer": {"state": {}}},
        lambda s: {"model": s, "model_ema": {k: v + 1 for k, v in s.items()}},
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_checkpoints_are_unwrapped(tmp_path, wrap, legacy):
    state = {"a.weight": torch.randn(2, 3), "module.b": torch.arange(4)}
    path = tmp_path / "c.pth"
    torch.save(wrap(state), path, _use_new_zipfile_serialization=not legacy)
    loaded = read_checkpoint(path)
    assert set(loaded) == set(state)
    assert all(torch.equal(loaded[key], state[key]) for key in state)


def test_safetensors_are_read_whatever_the_name(tmp_path):
    save_weights({"module.a": torch.ones(2)}, tmp_path / "w.bin")
    assert list(read_checkpoint(tmp_path / "w.bin")) == ["a"]


def test_pickled_code_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": {"a": torch.ones(1)}, "x": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="pickled code, which is not run"):
        read_checkpoint(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


def test_checkpoints_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_checkpoint(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="not a sound safetensors"):
        read_checkpoint(tmp_path / "text.safetensors")
    torch.save({"epoch": 3}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="no tensors; its keys are \\['epoch'\\]"):
        read_checkpoint(tmp_path / "bare.pth")
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="got list"):
        read_checkpoint(tmp_path / "list.pth")
    torch.save({"a": torch.ones(1000)}, tmp_path / "cut.pth")
    data = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="cut"):
        read_checkpoint(tmp_path / "cut.pth")


def test_a_checkpoint_that_unpacks_too_large_is_refused(tmp_path):
    torch.save({"a": torch.zeros(10**6)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "packed.pth").stat().st_size < 10**5
    for name in ("plain.pth", "packed.pth"):
        with pytest.raises(ValueError, match="max_bytes"):
            read_checkpoint(tmp_path / name, max_bytes=10**6)


# --- archives -------------------------------------------------------------------------------------------------


def make_tar(path, members, mode="w"):
    """Members are (name, bytes) or (name, type by name, link target)."""
    with tarfile.open(path, mode) as tar:
        for name, *rest in members:
            info = tarfile.TarInfo(name)
            if isinstance(rest[0], bytes):
                info.size = len(rest[0])
                info.mode = 0o4777
                tar.addfile(info, io.BytesIO(rest[0]))
            else:
                info.type = getattr(tarfile, rest[0])
                info.linkname = rest[1] if len(rest) > 1 else ""
                tar.addfile(info)
    return path


def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content, *mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = (mode[0] if mode else stat.S_IFREG | 0o644) << 16
            file.writestr(info, content)
    return path


FILES = [("top/a.txt", b"one"), ("top/deep/b.txt", b"two" * 1000), ("./c.txt", b"")]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz", "zip"])
def test_archives_unpack_whatever_they_are_called(tmp_path, mode):
    path = tmp_path / "archive"
    if mode == "zip":
        make_zip(path, FILES)
    else:
        make_tar(path, [*FILES, ("empty", "DIRTYPE")], mode)
    out = tmp_path / "out"
    out.mkdir()  # an empty folder may be there
    assert safe_extract(path, out) == out
    assert (out / "top/a.txt").read_bytes() == b"one"
    assert (out / "top/deep/b.txt").read_bytes() == b"two" * 1000
    assert (out / "c.txt").read_bytes() == b""
    assert not (out / "top/a.txt").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)
    assert (out / "empty").is_dir() or mode == "zip"


ESCAPES = {
    "absolute": [("/tmp/evil", b"x")],
    "parent": [("a/../../evil", b"x")],
    "windows": [("..\\evil", b"x")],
    "drive": [("C:\\evil", b"x")],
    "link up": [("evil", "SYMTYPE", "../secret")],
    "link absolute": [("evil", "SYMTYPE", "/etc/passwd")],
    "hard link up": [("evil", "LNKTYPE", "../secret")],
    "link through link": [
        ("x/evil", "SYMTYPE", "a/../.."),
        ("x/a", "SYMTYPE", ".."),
    ],
    "hard link through link": [
        ("x/a", "SYMTYPE", ".."),
        ("x/b", "SYMTYPE", "a/.."),
        ("evil", "LNKTYPE", "x/b/secret"),
    ],
    "device": [("evil", "CHRTYPE")],
    "pipe": [("evil", "FIFOTYPE")],
}


@pytest.mark.parametrize("kind", ESCAPES)
def test_what_leaves_the_folder_is_refused_by_name_and_leaves_nothing(tmp_path, kind):
    (tmp_path / "secret").write_text("secret")
    path = make_tar(tmp_path / "evil.tar", [("good.txt", b"good"), *ESCAPES[kind]])
    with pytest.raises(ValueError, match=r"evil|x/b"):
        safe_extract(path, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["evil.tar", "secret"]


@pytest.mark.parametrize(
    "member",
    [("../evil", b"x"), ("/evil", b"x"), ("evil", b"../secret", stat.S_IFLNK | 0o777), ("evil", b"", stat.S_IFIFO)],
)
def test_zips_are_held_to_the_same(tmp_path, member):
    path = make_zip(tmp_path / "evil.zip", [("good.txt", b"good"), member])
    with pytest.raises(ValueError, match="evil"):
        safe_extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["evil.zip"]


def test_nothing_is_written_through_a_link(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = make_tar(
        tmp_path / "a.tar",
        [("real/f", b"1"), ("link", "SYMTYPE", "real"), ("link/g", b"2"), ("hard", "LNKTYPE", "real/f")],
    )
    # A file below a link's name makes a folder there, and then the link cannot take its place.
    with pytest.raises(ValueError, match="cannot be unpacked"):
        safe_extract(path, tmp_path / "out")
    path = make_tar(
        tmp_path / "b.tar",
        [("real/f", b"1"), ("link", "SYMTYPE", "real"), ("hard", "LNKTYPE", "real/f")],
    )
    out = safe_extract(path, tmp_path / "out")
    assert (out / "link" / "f").read_bytes() == (out / "hard").read_bytes() == b"1"
    (out / "hard").write_bytes(b"2")
    assert (out / "real/f").read_bytes() == b"1"


def test_bounds_hold_against_what_the_archive_says_of_itself(tmp_path):
    bomb = make_tar(tmp_path / "bomb.tar.gz", [("zeros", bytes(10**7))], "w:gz")
    zipped = make_zip(tmp_path / "bomb.zip", [("zeros", bytes(10**7))])
    assert bomb.stat().st_size < 10**5
    for path in (bomb, zipped):
        with pytest.raises(ValueError, match="max_bytes"):
            safe_extract(path, tmp_path / "out", max_bytes=10**6)
    many = make_tar(tmp_path / "many.tar", [(f"{i}", b"") for i in range(20)])
    with pytest.raises(ValueError, match="max_members=10"):
        safe_extract(many, tmp_path / "out", max_members=10)
    assert not (tmp_path / "out").exists()


def test_damaged_archives_are_told_and_leave_nothing(tmp_path):
    for mode in ("w", "w:xz", "w:gz"):
        path = make_tar(tmp_path / "a", [("a", os.urandom(10**5)), ("b", os.urandom(10**5))], mode)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match="cannot be unpacked"):
            safe_extract(path, tmp_path / "out")
    path = make_tar(tmp_path / "a", [("a", b"1" * 512), ("b", b"2" * 512)])
    data = bytearray(path.read_bytes())
    data[1024 : 1024 + 200] = os.urandom(200)  # the second header
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged after member 'a'"):
        safe_extract(path, tmp_path / "out")
    (tmp_path / "a").write_text("not an archive at all" * 100)
    with pytest.raises(ValueError, match="neither a zip nor a tar"):
        safe_extract(tmp_path / "a", tmp_path / "out")
    path = make_zip(tmp_path / "a", [("f", os.urandom(1000))])
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        safe_extract(path, tmp_path / "out")
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_with_files_in_it_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="new or empty"):
        safe_extract(make_tar(tmp_path / "a.tar", FILES), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]
    with pytest.raises(ValueError, match="no such file"):
        safe_extract(tmp_path / "none.tar", tmp_path / "new")
