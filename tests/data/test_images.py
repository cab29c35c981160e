"""Images in class folders: sizes, modes, splits, faults."""

import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gossamer.data import DataError, cache, images, read_dataset


def test_class_folders_become_pixels_in_their_split_and_class(class_folders) -> None:
    root = class_folders({"train/b": 12, "train/a": 15, "test/a": 3, "test/b": 4})
    data = read_dataset(root)
    assert data.task == "image-classification"
    assert data.meta["classes"] == ["a", "b"]
    assert data.spec == {"img_size": (12, 10), "in_chans": 3, "num_classes": 2}
    assert len(data.test) == 7
    assert len(data.train) + len(data.val) == 27
    for split in data.splits.values():
        for i, name in enumerate(split.names):
            stored = np.asarray(Image.open(root / name))
            assert np.array_equal(split.inputs[0][i].permute(1, 2, 0).numpy(), stored)
            assert data.meta["classes"][int(split.targets[i])] == name.split("/")[1]


@pytest.mark.parametrize("ending", [".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz"])
def test_an_archive_of_a_folder_reads_like_the_folder(class_folders, tmp_path, ending) -> None:
    root = class_folders({"train/a": 6, "train/b": 6, "val/a": 2, "val/b": 2, "test/a": 2, "test/b": 2})
    archive = tmp_path / f"pictures{ending}"
    if ending == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(root.rglob("*")):
                file.write(path, path.relative_to(root.parent))
    else:
        with tarfile.open(archive, f"w:{ending.rsplit('.')[-1].replace('tgz', 'gz').replace('tar', '')}") as file:
            file.add(root, root.name)
    folder, packed = read_dataset(root), read_dataset(archive)
    for name in ("train", "val", "test"):
        assert packed.splits[name].names == folder.splits[name].names
        assert torch.equal(packed.splits[name].inputs[0], folder.splits[name].inputs[0])
    assert packed.meta["split"]["hash"] == folder.meta["split"]["hash"]


def test_an_archive_is_read_once_and_mapped_from_the_cache_afterwards(class_folders, tmp_path, monkeypatch) -> None:
    root = class_folders({"a": 8, "b": 8})
    archive = tmp_path / "p.tar"
    with tarfile.open(archive, "w") as file:
        file.add(root, ".")
    first = read_dataset(archive)
    monkeypatch.setattr(cache, "members", lambda *_: pytest.fail("the archive was opened again"))
    monkeypatch.setattr(images, "to_array", lambda *_: pytest.fail("an image was decoded again"))
    again = read_dataset(archive)
    assert torch.equal(first.train.inputs[0], again.train.inputs[0])


def test_an_archive_too_large_for_memory_is_extracted_and_reads_the_same(class_folders, tmp_path, monkeypatch) -> None:
    root = class_folders({"a": 8, "b": 8})
    archive = tmp_path / "p.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(root, ".")
    monkeypatch.setattr(cache, "IN_MEMORY", 1000)
    assert torch.equal(read_dataset(archive).train.inputs[0], read_dataset(root).train.inputs[0])


def test_a_member_that_points_outside_is_refused(tmp_path, class_folders) -> None:
    root = class_folders({"a": 2, "b": 2})
    archive = tmp_path / "evil.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(root / "a" / "000.png", "../../escaped.png")
    with pytest.raises(DataError, match=r"evil\.zip.*escaped"):
        read_dataset(archive)
    assert not list(tmp_path.rglob("escaped.png"))


def test_a_damaged_archive_is_told(tmp_path) -> None:
    path = tmp_path / "broken.tar.xz"
    path.write_bytes(b"\xfd7zXZ\x00" + bytes(range(200)))
    with pytest.raises(DataError, match=r"broken\.tar\.xz"):
        read_dataset(path)


def test_damaged_images_are_skipped_counted_and_listed(class_folders) -> None:
    root = class_folders({"a": 10, "b": 10})
    (root / "a" / "bad.jpg").write_bytes(b"no picture")
    whole = (root / "b" / "000.png").read_bytes()
    (root / "b" / "cut.png").write_bytes(whole[: len(whole) // 2])
    data = read_dataset(root)
    assert sum(len(s) for s in data.splits.values()) == 20
    assert any(line.startswith("2 of 22 images could not be read") for line in data.problems)
    assert any("a/bad.jpg" in line for line in data.problems)
    assert any("b/cut.png" in line for line in data.problems)
    assert "no image of a known kind" in str(data.problems)
    assert "BytesIO" not in str(data.problems)


@pytest.mark.parametrize("broken", [False, True])
def test_an_empty_class_stops_the_reading(class_folders, broken) -> None:
    root = class_folders({"train/a": 4, "train/b": 4, "train/hollow": 0, "test/a": 2, "test/b": 2})
    if broken:
        (root / "train" / "hollow" / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="train/hollow holds no images"):
        read_dataset(root)


def test_a_class_never_seen_in_training_is_named(class_folders) -> None:
    root = class_folders({"train/a": 4, "train/b": 4, "test/a": 2, "test/zebra": 2})
    with pytest.raises(DataError, match="test holds the class 'zebra', which is never seen in training"):
        read_dataset(root)


def test_one_class_is_not_enough(class_folders) -> None:
    with pytest.raises(DataError, match="two or more class folders"):
        read_dataset(class_folders({"a": 5}))


def test_loose_images_are_told_to_need_class_folders(class_folders) -> None:
    root = class_folders({".": 4, "x": 0, "y": 0})
    with pytest.raises(DataError, match="in no class folder"):
        read_dataset(root)


def test_a_folder_without_training_split_is_refused(class_folders) -> None:
    with pytest.raises(DataError, match=r"train|two or more class folders"):
        read_dataset(class_folders({"test/a": 3}))


def save(root: Path, name: str, image: Image.Image, **options: object) -> None:
    for label in ("a", "b"):
        (root / label).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.new("RGB", image.size, (i * 80, 20, 200 - i * 90)).save(root / label / f"{i}.png")
    image.save(root / "a" / name, **options)


def pixel(root: Path, name: str) -> list[int]:
    data = read_dataset(root)
    for split in data.splits.values():
        if f"a/{name}" in split.names:
            return split.inputs[0][split.names.index(f"a/{name}")][:, 2, 2].tolist()
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("see-through.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)), [255, 255, 255]),
        ("half.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)), [127, 127, 127]),
        ("palette.png", Image.new("RGB", (8, 8), (10, 200, 30)).quantize(4), [10, 200, 30]),
        ("print.tif", Image.new("CMYK", (8, 8), (0, 255, 255, 0)), [255, 0, 0]),
        ("deep.png", Image.fromarray(np.full((8, 8), 0x80FF, dtype=np.uint16)), [128, 128, 128]),
        ("bits.png", Image.new("1", (8, 8), 1), [255, 255, 255]),
        ("grey.png", Image.new("L", (8, 8), 77), [77, 77, 77]),
    ],
)
def test_every_mode_becomes_eight_bit_rgb(tmp_path, name, image, expected) -> None:
    save(tmp_path / "modes", name, image)
    assert pixel(tmp_path / "modes", name) == pytest.approx(expected, abs=1)


def test_images_lying_on_their_side_are_turned_upright(tmp_path) -> None:
    image = Image.new("RGB", (8, 8), "black")
    image.paste((255, 255, 255), (0, 0, 8, 4))  # the upper half is white; orientation 3 says: upside down
    exif = Image.Exif()
    exif[0x0112] = 3
    save(tmp_path / "turned", "turned.png", image, exif=exif)
    assert pixel(tmp_path / "turned", "turned.png") == [0, 0, 0]


def test_grey_images_keep_one_channel(tmp_path) -> None:
    rng = np.random.default_rng(1)
    for label in ("a", "b"):
        (tmp_path / "grey" / label).mkdir(parents=True)
        for i in range(6):
            values = Image.fromarray(rng.integers(0, 256, (9, 9), dtype=np.uint8))
            # One is stored as colour, but holds none.
            (values.convert("RGB") if i == 0 else values).save(tmp_path / "grey" / label / f"{i}.png")
    data = read_dataset(tmp_path / "grey")
    assert data.spec["in_chans"] == 1
    assert data.train.inputs[0].shape[1] == 1
    assert len(data.meta["mean"]) == 1


def test_unlike_sizes_meet_at_the_median_rounded_to_32(tmp_path) -> None:
    for label in ("a", "b"):
        (tmp_path / "sizes" / label).mkdir(parents=True)
        for i, size in enumerate([(60, 70), (65, 66), (300, 70), (71, 68)]):
            Image.new("RGB", size, (i * 60, 9, 9)).save(tmp_path / "sizes" / label / f"{i}.png")
    assert read_dataset(tmp_path / "sizes").spec["img_size"] == (64, 64)
    assert read_dataset(tmp_path / "sizes", image_size=24).spec["img_size"] == (24, 24)


def test_large_images_of_one_size_shrink_to_224_and_keep_their_shape(class_folders) -> None:
    root = class_folders({"a": 3, "b": 3}, size=(240, 320))
    assert read_dataset(root).spec["img_size"] == (160, 224)


def test_a_long_image_is_cut_at_the_centre_and_a_near_square_one_is_squashed() -> None:
    long = Image.new("RGB", (90, 30), "black")
    long.paste((255, 255, 255), (30, 0, 60, 30))
    assert np.asarray(images.fitted(long, 30, 30)).mean() > 250
    near = Image.new("RGB", (36, 30), "black")
    near.paste((255, 255, 255), (0, 0, 2, 30))
    assert np.asarray(images.fitted(near, 30, 30))[:, 0].mean() > 200  # the edge is still there


def test_letters_are_not_mirrored_and_photographs_are() -> None:
    """Left and right arrows lose their class in the mirror; blobs of a colour's brightness do not."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 2
    noise = torch.rand(600, 1, 16, 16, generator=generator) * 100
    ramp = torch.linspace(0, 100, 16).expand(600, 1, 16, 16)
    arrows = torch.where(labels[:, None, None, None] == 1, ramp, ramp.flip(-1)) + noise
    blobs = labels[:, None, None, None] * 60.0 + noise
    assert not images.mirror_symmetric(arrows.byte(), labels, 2)
    assert images.mirror_symmetric(blobs.byte(), labels, 2)


def test_mean_and_deviation_are_those_of_the_training_pixels(class_folders) -> None:
    data = read_dataset(class_folders({"a": 10, "b": 10}))
    x = data.train.inputs[0].double() / 255
    assert data.meta["mean"] == pytest.approx(x.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert data.meta["std"] == pytest.approx(x.std((0, 2, 3), correction=0).tolist(), abs=1e-5)


def test_cifar10_has_its_published_sizes(shared_data, monkeypatch) -> None:
    monkeypatch.delenv("GOSSAMER_CACHE")  # the user's cache: unpacked once, not in every test run
    data = read_dataset(shared_data("cifar10.tar.xz"))
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 45_000, "val": 5_000, "test": 5_000}
    assert data.spec == {"img_size": (32, 32), "in_chans": 3, "num_classes": 10}
    assert data.meta["mean"] == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.003)
    assert data.meta["flip"] is True
    assert torch.bincount(data.val.targets).tolist() == [500] * 10
