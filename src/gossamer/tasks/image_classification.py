"""Image classification: uint8 pixels to normalised, augmented batches, and class scores to words and pictures.

- a batch is float32 `(b, c, h, w)` in torch's channels_last memory format
- augmentation is pure torch over the whole batch at once; `strength` says how much of everything:

| strength | 0 | 0.25 | 0.5 | 0.75 | 1 |
|---|---|---|---|---|---|
| shift, share of the side, rounded to pixels; what enters is black | 0 | 1/16 | 1/8 | 1/8 | 1/8 |
| contrast and brightness, +- | 0 | 10 % | 20 % | 30 % | 40 % |
| cut-out square, share of the side | 0 | 1/8 | 1/4 | 3/8 | 1/2 |
| share of batches mixed (mixup or cutmix, soft targets) | 0 | 0 | 0 | 1/2 | all |

- mirroring (half of the images, at any strength above 0) only where the data set's `meta["flip"]` allows it, which
  the reader measures: digits and letters are never mirrored
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from gossamer.data import DataError, Split
from gossamer.tasks.base import Figure, check_strength, new_plot, to_svg
from gossamer.tasks.classification import Classification


class ImageClassification(Classification):
    name = "image-classification"

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        super().__init__(spec, meta)
        self.size = (int(spec["img_size"][0]), int(spec["img_size"][1]))
        # One value a pixel and channel, so that the product runs over whole rows.
        pixels = self.size[0] * self.size[1]
        mean, std = torch.tensor(meta["mean"]) * 255, torch.tensor(meta["std"]) * 255
        self.mean, self.factor = mean.repeat(pixels), (1 / std).repeat(pixels)

    def batch(
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Float[Tensor, "b c h w"]], Tensor]:
        """Images `(b, c, h, w)`; targets are class numbers `(b,)`, or probabilities `(b, k)` of a mixed batch."""
        check_strength(strength)
        x = split.inputs[0].permute(0, 2, 3, 1)[index]
        target = split.targets[index]
        if not train or strength == 0:
            return (self.normalise(x),), target
        if self.meta.get("flip"):
            turned = torch.rand(len(x), generator=generator) < 0.5
            x[turned] = x[turned].flip(2)
        y = self.normalise(shifted(x, strength, generator)).permute(0, 2, 3, 1)
        y = jittered(y, strength, generator)
        y = with_holes(y, strength, generator)
        if torch.rand((), generator=generator) < 2 * strength - 1:
            y, target = mixed(y, target, len(self.classes), generator)
        return (y.permute(0, 3, 1, 2),), target

    def normalise(self, x: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b c h w"]:
        """`(x / 255 - mean) / std` of each channel."""
        flat = x.reshape(len(x), -1).float().sub_(self.mean).mul_(self.factor)
        return flat.view(x.shape).permute(0, 3, 1, 2)

    def read(self, inputs: list[str]) -> tuple[Float[Tensor, "b c h w"]]:
        """Image files of any size, brought to the run's size as the training images were."""
        from pathlib import Path

        from gossamer.data.images import complaint, luma, to_array

        arrays = []
        for name in inputs:
            try:
                array = torch.from_numpy(to_array(Path(name).read_bytes(), self.size).copy())
            except FileNotFoundError as error:
                raise DataError(f"{name}: no such file") from error
            except Exception as error:  # a damaged file can raise nearly anything inside Pillow's decoders
                raise DataError(f"{name}: not a readable image ({complaint(error)})") from error
            if array.shape[-1] != self.spec["in_chans"]:
                one = array.movedim(-1, 0)[None]
                array = (one.expand(-1, 3, -1, -1) if len(one[0]) == 1 else luma(one))[0].movedim(0, -1)
            arrays.append(array)
        if not arrays:
            raise DataError("no input: give one image file or more")
        self.names = list(inputs)
        return (self.normalise(torch.stack(arrays)),)

    def figures(self, output: Tensor, target: Tensor, split: Split) -> list[Figure]:
        """The confusion matrix, and images told right and wrong."""
        figures = [self.confusion_figure(output, target)]
        right, wrong = self.some(output, target, 12)
        chance = output.float().softmax(1).max(1).values
        for title, rows in (("Told right", right), ("Told wrong", wrong)):
            if rows:
                caption = "Predicted class and its probability" + (
                    "; the true class in brackets. The surest errors first." if title == "Told wrong" else "."
                )
                figures.append(Figure(title, self.thumbnails(rows, output, target, chance, split), caption))
        return figures

    def thumbnails(self, rows: list[int], output: Tensor, target: Tensor, chance: Tensor, split: Split) -> bytes:
        columns = min(6, len(rows))
        lines = -(-len(rows) // columns)
        plot, axes = new_plot(1.45 * columns, 1.75 * lines, lines, columns)
        for axis in axes.flat:
            axis.set_axis_off()
        for axis, i in zip(axes.flat, rows, strict=False):
            image = split.inputs[0][i].permute(1, 2, 0)
            guess, truth = self.classes[int(output[i].argmax())], self.classes[int(target[i])]
            axis.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            words = f"{guess[:16]} {float(chance[i]):.0%}" + ("" if guess == truth else f"\n({truth[:16]})")
            axis.set_title(words, fontsize=8, parse_math=False)
        return to_svg(plot)


def shifted(
    x: UInt8[Tensor, "b h w c"], strength: float, generator: torch.Generator | None
) -> UInt8[Tensor, "b h w c"]:
    """Each image moved by up to an eighth of its sides (from strength 0.5 on); what enters is black.

    Rows are copied whole: the window of an image at shift `(i, j)` is a strided view of the padded batch.
    """
    b, h, w, c = x.shape
    up, side = (round(n / 8 * min(1.0, 2 * strength)) for n in (h, w))
    padded = F.pad(x, (0, 0, side, side, up, up))
    row = (w + 2 * side) * c
    windows = padded.as_strided((b, h + 2 * up, 2 * side + 1, w * c), ((h + 2 * up) * row, row, c, 1))
    i = torch.randint(2 * up + 1, (b, 1), generator=generator) + torch.arange(h)
    j = torch.randint(2 * side + 1, (b, 1), generator=generator)
    return windows[torch.arange(b)[:, None], i, j].view(b, h, w, c)


def jittered(
    x: Float[Tensor, "b h w c"], strength: float, generator: torch.Generator | None
) -> Float[Tensor, "b h w c"]:
    """`x * contrast + brightness` with one pair an image, `1 +- 0.4 strength` and `+- 0.4 strength` deviations."""
    contrast, brightness = (torch.rand(2, len(x), 1, generator=generator) * 2 - 1) * (0.4 * strength)
    return (x.reshape(len(x), -1) * (contrast + 1)).add_(brightness).view(x.shape)


def with_holes(
    x: Float[Tensor, "b h w c"], strength: float, generator: torch.Generator | None
) -> Float[Tensor, "b h w c"]:
    """A rectangle of half the sides times `strength`, at any centre, becomes the mean colour (0)."""
    b, h, w, c = x.shape
    rows, columns = rectangles(b, h, w, 0.5 * strength, generator)
    # One float a channel too: a product over whole rows is several times faster than one over triples.
    hole = rows.float()[:, :, None] * columns.float().repeat_interleave(c, 1)[:, None, :]
    return x * (1 - hole).view(x.shape)


def rectangles(
    b: int, h: int, w: int, share: float, generator: torch.Generator | None
) -> tuple[Bool[Tensor, "b h"], Bool[Tensor, "b w"]]:
    """Rows and columns of one rectangle an image, of `share` of each side around any centre, cut off at the border."""
    inside = []
    for n in (h, w):
        centre = torch.rand(b, 1, generator=generator) * n
        inside.append(((torch.arange(n) + 0.5) - centre).abs() < share * n / 2)
    return inside[0], inside[1]


def mixed(
    x: Float[Tensor, "b h w c"], target: Int[Tensor, " b"], classes: int, generator: torch.Generator | None
) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b k"]]:
    """Each image with its neighbour in a shuffled batch, as mixup (Zhang et al. 2017) or cutmix (Yun et al. 2019).

    The share of the first is uniform in [0, 1] for both, that is Beta(1, 1); targets are mixed in the same share.
    """
    order = torch.randperm(len(x), generator=generator)
    share = torch.rand((), generator=generator).item()
    if torch.rand((), generator=generator) < 0.5:
        x = torch.lerp(x[order], x, share)
    else:
        rows, columns = rectangles(1, x.shape[1], x.shape[2], (1 - share) ** 0.5, generator)
        box = rows[:, :, None] & columns[:, None, :]
        x = torch.where(box[..., None], x[order], x)
        share = 1 - box.float().mean().item()
    soft = F.one_hot(target, classes).float()
    return x, torch.lerp(soft[order], soft, share)
