"""Image classification: images in class folders to one uint8 tensor.

- upright by EXIF; transparency over white; CMYK, palette and 16-bit images become 8-bit RGB or grey
- images of one size up to 224 keep it; others get a common size: the median of the shorter sides, rounded to a
  multiple of 32, at most 224, less where memory would not hold them
- an image whose shape differs from that size by less than a quarter is squashed; else the shorter side is fitted and
  the centre cut out
- one channel where every image is grey, else three
- decoded pixels are kept in the cache and mapped into memory by the next run
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from gossamer.data.base import DataError, Dataset, Split, class_names, class_numbers, listing
from gossamer.data.cache import cached, key_of
from gossamer.data.splits import digest, duplicate_problems, make_plan, split_record

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jfif")
LARGEST_SIDE = 224
MOST_PIXELS = 100_000_000  # of one image; larger ones are damage or attack
GREY_MODES = ("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N")


@dataclass
class Item:
    """One image: its class, its split, and how to read its bytes."""

    name: str
    label: str
    split: str
    load: Callable[[], bytes]
    stamp: str = ""


@dataclass
class Pixels:
    """Decoded images, channels last, with the content key of each and what went wrong."""

    values: np.ndarray
    keys: np.ndarray
    good: np.ndarray
    bad: dict[int, str]


def open_image(data: bytes) -> Image.Image:
    """The image, upright, not yet decoded.

    Raises:
        OSError, ValueError: not an image, or too large a one.
    """
    image = Image.open(io.BytesIO(data))
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels are too many; {MOST_PIXELS:,} is the most")
    return image


def header_size(data: bytes) -> tuple[int, int]:
    """Height and width, upright, from the header alone."""
    image = open_image(data)
    turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return (image.width, image.height) if turned else (image.height, image.width)


def to_array(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """One image as uint8 `(h, w, 3)`, or `(h, w, 1)` if it is stored as grey.

    Raises:
        OSError, ValueError: the image cannot be decoded.
    """
    height, width = size
    image = open_image(data)
    if image.format == "JPEG" and min(image.size) >= 4 * max(size):
        image.draft(image.mode, (2 * max(size), 2 * max(size)))  # decode large photographs at a fraction
    if image.format in ("JPEG", "TIFF", "PNG", "WEBP"):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = eight_bit(image)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("LA", "La", "L")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L" if grey else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if image.size != (width, height):
        image = fitted(image, height, width)
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array


def complaint(error: Exception) -> str:
    """What is wrong with a file that cannot be decoded, in one line."""
    if isinstance(error, UnidentifiedImageError):  # Pillow names the bytes by their address in memory
        return "no image of a known kind, or a damaged one"
    return " ".join(str(error).split())[:120] or type(error).__name__


def eight_bit(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float images in 8 bits: the high byte of 16; floats up to 1 are taken as fractions."""
    values = np.asarray(image, dtype=np.float64)
    if image.mode == "F":
        values = values * 255 if values.max() <= 1 else values
    elif image.mode != "I" or values.max() > 255:
        values = values // 256
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def fitted(image: Image.Image, height: int, width: int) -> Image.Image:
    """Squashed to the size where the shape is near, else the shorter side fitted and the centre cut out."""
    shape = (image.width / image.height) / (width / height)
    if 0.8 <= shape <= 1.25:
        return image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=3.0)
    return ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)


def common_size(items: Sequence[Item]) -> tuple[int, int]:
    """The size all images get, seen from up to 1,000 headers spread over the set."""
    import psutil

    sizes = []
    for i in np.unique(np.linspace(0, len(items) - 1, min(len(items), 1000)).astype(int)):
        try:
            sizes.append(header_size(items[i].load()))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
    if not sizes:
        return (32, 32)  # every one is damaged, which the decoder reports by name
    if len(set(sizes)) == 1:
        height, width = sizes[0]
        if (longest := max(height, width)) > LARGEST_SIDE:
            scale = LARGEST_SIDE / longest
            height, width = (max(32, 32 * round(side * scale / 32)) for side in (height, width))
    else:
        side = float(np.median([min(size) for size in sizes]))
        height = width = int(min(LARGEST_SIDE, max(32, 32 * round(side / 32))))
    room = min(8 * 2**30, psutil.virtual_memory().available * 0.3)
    while len(items) * 3 * height * width > room and max(height, width) > 32:
        height, width = max(32, height - 32), max(32, width - 32)
    return height, width


def decode_all(items: Sequence[Item], size: tuple[int, int]) -> Pixels:
    """Every image at one size, decoded in threads (Pillow decodes outside the interpreter lock)."""
    Image.init()
    values = np.zeros((len(items), *size, 3), dtype=np.uint8)
    keys = np.zeros(len(items), dtype=np.int64)
    grey = np.ones(len(items), dtype=bool)
    bad: dict[int, str] = {}

    def work(rows: range) -> None:
        for i in rows:
            try:
                data = items[i].load()
                array = to_array(data, size)
            except Exception as error:  # a damaged file can raise nearly anything inside Pillow's decoders
                bad[i] = complaint(error)
                continue
            values[i] = array
            keys[i] = digest(data)
            if array.shape[-1] == 3:
                grey[i] = bool((array[..., 0] == array[..., 1]).all() and (array[..., 1] == array[..., 2]).all())

    chunks = [range(i, min(i + 128, len(items))) for i in range(0, len(items), 128)]
    with ThreadPoolExecutor(max(2, os.cpu_count() or 2)) as pool:
        list(pool.map(work, chunks))
    good = np.array([i not in bad for i in range(len(items))], dtype=bool)
    if grey.all():
        values = values[..., :1]
    return Pixels(values, keys, good, bad)


def decoded(items: Sequence[Item], size: tuple[int, int] | None, where: object) -> Pixels:
    """`decode_all` at `size` or the common size, kept in the cache.

    The key covers every file's name, size and time of change.
    """
    key = key_of("images 1", where, size, *(f"{item.name}\0{item.stamp}" for item in items))

    def fill(folder: Path) -> None:
        pixels = decode_all(items, size or common_size(items))
        np.save(folder / "values.npy", np.ascontiguousarray(pixels.values))
        np.save(folder / "keys.npy", pixels.keys)
        (folder / "bad.json").write_text(json.dumps(pixels.bad), encoding="utf-8")

    try:
        folder = cached("images", key, fill)
    except OSError:  # a full disk must not stop the run
        return decode_all(items, size or common_size(items))
    # Copy-on-write: torch wants writable memory, the file must never change.
    values = np.load(folder / "values.npy", mmap_mode="c", allow_pickle=False)
    keys = np.load(folder / "keys.npy", allow_pickle=False)
    bad = {int(i): str(why) for i, why in json.loads((folder / "bad.json").read_text(encoding="utf-8")).items()}
    good = np.ones(len(items), dtype=bool)
    good[list(bad)] = False
    return Pixels(values, keys, good, bad)


def image_dataset(
    items: Sequence[Item],
    folders: Mapping[str, Sequence[str]],
    *,
    where: object,
    seed: int,
    problems: list[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    flip: bool | None = None,
) -> Dataset:
    """Images in class folders as one data set.

    Args:
        items: the images, in a fixed order.
        folders: class folders of each given split, empty ones too.
        where: the source, for messages and the cache.
        seed: of the splits we make.
        image_size: side, or height and width, of all images; by default seen from the data.
        flip: whether training may mirror images; by default measured (`mirror_symmetric`).

    Raises:
        DataError: an empty class, one class only, a class unknown to training.
    """
    problems = [] if problems is None else problems
    check_folders(where, items, folders)
    size = None
    if image_size is not None:
        size = (image_size, image_size) if isinstance(image_size, int) else (int(image_size[0]), int(image_size[1]))
        if min(size) < 1:
            raise ValueError(f"image_size must be positive, got {image_size}")
    pixels = decoded(items, size, where)
    if pixels.bad:
        problems.append(f"{len(pixels.bad)} of {len(items)} images could not be read and are skipped")
        problems += [f"skipped {items[i].name}: {pixels.bad[i]}" for i in sorted(pixels.bad)[:50]]
        check_folders(where, [item for i, item in enumerate(items) if pixels.good[i]], folders, pixels, items)
    classes = class_names({item.label for item in items if item.split == "train"})
    numbers = class_numbers([item.label for item in items], classes).numpy()
    of_split = np.array([item.split for item in items])
    rows = {name: np.flatnonzero((of_split == name) & pixels.good) for name in folders}
    labels = {name: numbers[index] for name, index in rows.items()}
    keys = {name: pixels.keys[index] for name, index in rows.items()}
    plan = make_plan(labels, keys, seed)
    problems += duplicate_problems(labels, keys, classes)
    tensor = torch.from_numpy(pixels.values)
    splits = {}
    for name, (given, index) in plan.parts.items():
        chosen = rows[given][index]
        # Stored channels last and shown as (n, c, h, w): batches are cut out without a transposition.
        images = tensor[torch.from_numpy(chosen)].permute(0, 3, 1, 2)
        names = [items[i].name for i in chosen]
        splits[name] = Split((images,), torch.from_numpy(numbers[chosen].astype(np.int64)), names)
    meta = image_meta(splits["train"], classes, flip)
    meta["split"] = split_record(plan, keys, seed)
    spec = {"img_size": tuple(tensor.shape[1:3]), "in_chans": tensor.shape[-1], "num_classes": len(classes)}
    return Dataset("image-classification", splits["train"], splits["val"], splits["test"], spec, meta, problems)


def luma(images: UInt8[Tensor, "n 3 h w"]) -> UInt8[Tensor, "n 1 h w"]:
    """Colours as grey, as Pillow weighs them."""
    weights = torch.tensor([0.299, 0.587, 0.114])
    parts = [(part.movedim(1, -1).float() @ weights).round().byte() for part in images.split(500)]
    return torch.cat(parts)[:, None]


def check_folders(
    where: object,
    items: Sequence[Item],
    folders: Mapping[str, Sequence[str]],
    pixels: Pixels | None = None,
    every: Sequence[Item] = (),
) -> None:
    """DataError for a class without images, one class only, and classes unknown to training."""
    if "train" not in folders:
        raise DataError(f"{where}: no training split: found only {', '.join(folders)}; name one folder train")
    held = {name: {item.label for item in items if item.split == name} for name in folders}
    alone = len(folders) == 1
    for name, labels in folders.items():
        for label in labels:
            if label not in held[name]:
                place = label if alone else f"{name}/{label}"
                why = ""
                if pixels is not None:
                    lost = [i for i in pixels.bad if every[i].split == name and every[i].label == label]
                    why = f" (none of its {len(lost)} files can be read: {pixels.bad[lost[0]]})" if lost else ""
                raise DataError(f"{where}: class folder {place} holds no images{why}; add some or remove the folder")
    classes = class_names(held["train"])
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "none"
        raise DataError(f"{where}: two or more class folders are needed; found {found}")
    for name, found_labels in held.items():
        if strange := sorted(found_labels - held["train"]):
            raise DataError(
                f"{where}: {name} holds the class {strange[0]!r}, which is never seen in training; known are "
                f"{listing(classes)}; rename or remove {name}/{strange[0]}"
            )


def image_meta(train: Split, classes: list[str], flip: bool | None) -> dict[str, Any]:
    """Classes, per-channel mean and deviation of [0, 1] pixels (from up to 5,000 images), and whether to mirror."""
    images = train.inputs[0]
    sample = torch.linspace(0, len(train) - 1, min(len(train), 5000)).long()
    total = square = torch.zeros(images.shape[1], dtype=torch.float64)
    count = 0
    for part in sample.split(500):
        x = images[part].double() / 255
        total, square = total + x.sum((0, 2, 3)), square + x.square().sum((0, 2, 3))
        count += x.shape[0] * x.shape[2] * x.shape[3]
    mean = total / count
    std = (square / count - mean**2).clamp(min=0).sqrt().clamp(min=1 / 255)
    return {
        "classes": classes,
        "mean": [round(float(m), 6) for m in mean],
        "std": [round(float(s), 6) for s in std],
        "size": [images.shape[2], images.shape[3]],
        "channels": images.shape[1],
        "flip": mirror_symmetric(images, train.targets, len(classes)) if flip is None else bool(flip),
    }


def mirror_symmetric(images: Tensor, targets: Tensor, classes: int) -> bool:
    """Whether a mirrored image keeps its class, as far as a linear classifier can tell.

    A ridge classifier on small grey images is fitted on one half of up to 4,000 training images and asked about the
    other half, upright and mirrored. Photographs lose nothing; digits and letters do. Mirroring is refused when more
    right answers are lost than gained, by three standard deviations and by a tenth of all right answers.
    """
    index = torch.linspace(0, len(images) - 1, min(len(images), 4000)).long()
    order = torch.randperm(len(index), generator=torch.Generator().manual_seed(0))
    index = index[order]
    x = images[index].float().mean(1, keepdim=True)
    side = [min(n, 12) for n in x.shape[2:]]
    x = torch.nn.functional.interpolate(x, size=side, mode="area").squeeze(1)
    x = (x - x.mean()) / x.std().clamp(min=1e-6)
    y = torch.nn.functional.one_hot(targets[index], classes).float()
    y = y - y.mean(0)
    half, lost, gained, right = len(index) // 2, 0, 0, 0
    if half < 10:
        return True
    for fit, ask in ((slice(0, half), slice(half, None)), (slice(half, None), slice(0, half))):
        a = x[fit].flatten(1)
        weights = torch.linalg.solve(a.T @ a + 0.1 * len(a) * torch.eye(a.shape[1]), a.T @ y[fit])
        truth = targets[index][ask]
        upright = (x[ask].flatten(1) @ weights).argmax(1) == truth
        mirrored = (x[ask].flip(-1).flatten(1) @ weights).argmax(1) == truth
        lost, gained = lost + int((upright & ~mirrored).sum()), gained + int((~upright & mirrored).sum())
        right += int(upright.sum())
    return not (lost - gained > 3 * (lost + gained) ** 0.5 and lost - gained > 0.1 * right)
