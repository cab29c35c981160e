"""Learning from images without labels: paint back what was taken away, and know an image again in another view.

Source: Ahmed et al. 2021, "SiT: Self-supervised vIsion Transformer".

- two views of each image; the student sees them corrupted, its teacher, a moving average of it, sees them whole
- `L = contrast + weight * reconstruction`: the student's answer to one view picks the teacher's answer to the other
  out of the batch; the pixels that were taken away are painted back
- `rotations=True` turns each view by a random number of quarter turns and asks for it too, as the paper's first version
  did; the three losses are then weighted by what is learned of their uncertainty, `sum_i exp(-s_i) L_i + s_i` (Kendall
  et al. 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses")
- the loop is `Trainer`'s: devices, precision, order and resuming are those of every run
- what is kept is the student's backbone: its learning rate has fallen to 0, while the teacher of a short run still
  remembers the initial weights; how good it is without labels is told by its nearest neighbours
- radii of the blur are those of 224 pixels, in proportion for other sizes; hue is turned in the YIQ plane; images are
  mirrored only where the data set allows it, as in all training here
- the learning rate falls to 0, not to 1e-6
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.data.base import Dataset, Split
from gossamer.io import load_weights, read_json, save_weights, write_json
from gossamer.layers.blocks import DropPath
from gossamer.layers.embed import pair
from gossamer.models.sit import TURNS, SiT
from gossamer.tasks.image_classification import ImageClassification
from gossamer.train.corrupt import mixed_corruption
from gossamer.train.ema import MovingAverage
from gossamer.train.settings import Settings
from gossamer.train.trainer import Trainer

TEMPERATURE = 0.2
MOMENTUM = 0.996
DECAY = (0.04, 0.1)  # weight decay at the start and at the end
BATCH = 256
LR = 5e-4  # for a batch of 256
WARMUP_EPOCHS = 10
SMALLEST = 0.2  # share of the image that a view shows at least
NEIGHBOURS = 20
SEEN = 2000  # images whose neighbours are looked at
CHECKPOINT_EVERY_S = 60.0

# Rows: grey, and the two axes of colour.
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def contrast(
    q: Float[Tensor, "b k"], k: Float[Tensor, "m k"], *, temperature: float = TEMPERATURE, first: int = 0
) -> Float[Tensor, ""]:
    """`-2 t mean_i log softmax_j(q_i . k_j / t)` at `j = first + i`, of vectors of length one (InfoNCE).

    Args:
        first: where in `k` the answers to the images of `q` begin.
    """
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T / temperature
    target = torch.arange(first, first + len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(logits, target)


def reconstruction(
    painted: Float[Tensor, "b c h w"], image: Float[Tensor, "b c h w"], changed: Bool[Tensor, "b 1 h w"]
) -> Float[Tensor, ""]:
    """Mean absolute difference over the pixels that had been changed; 0 where none were."""
    off = (painted - image).abs() * changed
    return off.sum() / (changed.sum() * image.shape[1]).clamp(min=1)


def momentum(progress: float) -> float:
    """`1 - (1 - 0.996) (cos(pi progress) + 1) / 2`: of the teacher, from 0.996 to 1 over the run."""
    return 1 - (1 - MOMENTUM) * (math.cos(math.pi * min(progress, 1.0)) + 1) / 2


class Pretrainer(nn.Module):
    """Student and teacher; its answers to a batch of views are the two losses.

    Args:
        student: the network that learns.
        weight: of the reconstruction in the sum; the authors suggest 5 for small data. With rotations, all weights are
            learned.
    """

    def __init__(self, student: SiT, *, weight: float = 1.0) -> None:
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        for part in self.teacher.modules():
            if isinstance(part, DropPath):
                part.rate = 0.0
        self.weight = weight
        # Logarithms of the losses' variances: of contrast, reconstruction and rotation.
        self.spread = nn.Parameter(torch.zeros(3)) if student.turn is not None else None
        self.losses: dict[str, float] = {}

    def forward(
        self,
        views: Float[Tensor, "b 2 c h w"],
        corrupted: Float[Tensor, "b 2 c h w"],
        changed: Bool[Tensor, "b 2 1 h w"],
        turns: Int[Tensor, "b 2"] | None = None,
    ) -> Float[Tensor, ""]:
        with torch.no_grad():
            # A view at a time: batch norms look at one view.
            keys = [self.teacher.compare(views[:, i]) for i in (0, 1)]
        answers = [self.student(corrupted[:, i]) for i in (0, 1)]
        compared = _compared(answers[0][0], keys[1]) + _compared(answers[1][0], keys[0])
        painted = torch.stack([answer[1] for answer in answers], 1)
        restored = reconstruction(painted.flatten(0, 1), views.flatten(0, 1), changed.flatten(0, 1))
        self.losses = {"contrast": float(compared.detach()), "reconstruction": float(restored.detach())}
        if self.spread is None or turns is None:
            return compared + self.weight * restored
        scores = torch.cat([answer[2] for answer in answers]).float()
        turned_by = F.cross_entropy(scores, turns.T.flatten())
        self.losses["rotation"] = float(turned_by.detach())
        parts = torch.stack((compared, restored.float(), turned_by))
        return ((-self.spread).exp() * parts + self.spread).sum()


def _compared(q: Tensor, k: Tensor) -> Tensor:
    q, k = q.float(), k.float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [torch.empty_like(k) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, k.contiguous())
        return contrast(q, torch.cat(parts), first=len(q) * torch.distributed.get_rank())
    return contrast(q, k)


class Views(ImageClassification):
    """The images of a classification task without their labels: two views of each, whole and corrupted.

    Args:
        share: of the pixels that are taken away.
        replaced: share that is exchanged with another image, in half of the images; 0 for none.
        align: grid of the corrupted blocks' borders, in pixels.
        rotations: turn each view, and say by how many quarter turns.

    Raises:
        ValueError: rotations of images that are not square.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        meta: dict[str, Any],
        *,
        share: float = 0.5,
        replaced: float = 0.3,
        align: int = 1,
        rotations: bool = False,
    ) -> None:
        super().__init__(spec, meta)
        height, width = pair(spec["img_size"])
        if rotations and height != width:
            raise ValueError(f"only square images can be turned by quarters (rotations), got {height}x{width}")
        self.share, self.replaced, self.align, self.rotations = share, replaced, align, rotations

    def batch(  # type: ignore[override]
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """`(b, 2, …)` views, corrupted views, masks and turns; the target is not used.

        Without `train`, as labels are read.
        """
        if not train:
            return super().batch(split, index)
        x = split.inputs[0][index].float() / 255
        flip = bool(self.meta.get("flip"))
        views, bad, changed, turns = [], [], [], []
        for second in (False, True):
            view = view_of(x, second=second, flip=flip, generator=generator)
            view = self.normalise_unit(view)
            if self.rotations:
                turns.append(torch.randint(TURNS, (len(x),), generator=generator))
                view = turned(view, turns[-1])
            y, mask = mixed_corruption(
                view, share=self.share, replaced=self.replaced, align=self.align, generator=generator
            )
            views.append(view)
            bad.append(y)
            changed.append(mask)
        inputs = [torch.stack(parts, 1) for parts in (views, bad, changed, turns) if parts]
        return tuple(inputs), split.targets[index]

    def normalise_unit(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`(x - mean) / std` of images in [0, 1]."""
        mean, std = (torch.tensor(self.meta[name]).view(-1, 1, 1) for name in ("mean", "std"))
        return (x - mean) / std

    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """The network's answer is its loss already."""
        return output


def view_of(
    x: Float[Tensor, "b c h w"], *, second: bool, flip: bool, generator: torch.Generator | None = None
) -> Float[Tensor, "b c h w"]:
    """A random view of images in [0, 1]: cut out, mirrored, other colours, grey, blurred; the second also solarised."""
    b, c, _, side = x.shape

    def chance(p: float) -> Bool[Tensor, "b 1 1 1"]:
        return (torch.rand(b, generator=generator) < p).view(b, 1, 1, 1)

    x = cut_out(x, flip, generator)
    x = torch.where(chance(0.8), coloured(x, generator), x)
    if c == 3:
        grey = (x * torch.tensor(_YIQ[0]).view(1, 3, 1, 1)).sum(1, keepdim=True).expand_as(x)
        x = torch.where(chance(0.2), grey, x)
    radius = (0.1 + 1.9 * torch.rand(b, generator=generator)) * (side / 224)
    x = torch.where(chance(0.1 if second else 1.0), blurred(x, radius), x)
    if second:
        x = torch.where(chance(0.2) & (x >= 0.5), 1 - x, x)
    return x


def turned(x: Float[Tensor, "b c s s"], turns: Int[Tensor, " b"]) -> Float[Tensor, "b c s s"]:
    """Each image turned counter-clockwise by as many quarters as its entry of `turns` says."""
    y = x
    for quarters in range(1, TURNS):
        y = torch.where((turns == quarters).view(-1, 1, 1, 1), x.rot90(quarters, (2, 3)), y)
    return y


def cut_out(x: Float[Tensor, "b c h w"], flip: bool, generator: torch.Generator | None) -> Float[Tensor, "b c h w"]:
    """A random 20 to 100 % of each image, of sides 3:4 to 4:3, brought back to full size; half of them mirrored."""
    b, _, h, w = x.shape
    area = SMALLEST + (1 - SMALLEST) * torch.rand(b, generator=generator)
    ratio = (torch.rand(b, generator=generator) * 2 - 1) * math.log(4 / 3)
    tall = (area.sqrt() * (ratio / 2).exp()).clamp(max=1)
    wide = (area.sqrt() * (-ratio / 2).exp()).clamp(max=1)
    place = torch.rand(2, b, generator=generator) * 2 - 1
    theta = torch.zeros(b, 2, 3)
    mirrored = torch.where((torch.rand(b, generator=generator) < 0.5) & flip, -1.0, 1.0)
    theta[:, 0, 0], theta[:, 0, 2] = wide * mirrored, place[0] * (1 - wide)
    theta[:, 1, 1], theta[:, 1, 2] = tall, place[1] * (1 - tall)
    points = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    y = F.grid_sample(x, points, mode="bicubic", padding_mode="border", align_corners=False)
    return y.clamp(0, 1)


def coloured(x: Float[Tensor, "b c h w"], generator: torch.Generator | None) -> Float[Tensor, "b c h w"]:
    """Brightness and contrast within 40 %; of colour images saturation within 20 % and hue within a tenth turn."""
    b, c = x.shape[:2]
    draw = torch.rand(4, b, 1, 1, 1, generator=generator) * 2 - 1
    x = (x * (1 + 0.4 * draw[0])).clamp(0, 1)
    x = torch.lerp(x.mean((1, 2, 3), keepdim=True).expand_as(x), x, 1 + 0.4 * draw[1]).clamp(0, 1)
    if c != 3:
        return x
    yiq = torch.tensor(_YIQ)
    much, turn = 1 + 0.2 * draw[2].flatten(), 0.1 * 2 * math.pi * draw[3].flatten()
    inner = torch.zeros(b, 3, 3)
    inner[:, 0, 0] = 1
    inner[:, 1, 1] = inner[:, 2, 2] = much * turn.cos()
    inner[:, 1, 2], inner[:, 2, 1] = -much * turn.sin(), much * turn.sin()
    matrix = torch.linalg.inv(yiq) @ inner @ yiq
    return (matrix @ x.flatten(2)).view_as(x).clamp(0, 1)


def blurred(x: Float[Tensor, "b c h w"], radius: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
    """Each image filtered by a Gaussian of its own deviation, in pixels."""
    b, c, h, w = x.shape
    reach = min(max(1, math.ceil(3 * float(radius.max()))), h - 1, w - 1)
    if reach < 1:
        return x
    place = torch.arange(-reach, reach + 1)
    kernel = (-0.5 * (place / radius[:, None].clamp(min=1e-3)) ** 2).exp()
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    y = F.pad(x, (reach,) * 4, mode="reflect").view(1, b * c, h + 2 * reach, w + 2 * reach)
    y = F.conv2d(F.conv2d(y, kernel[:, :, :, None], groups=b * c), kernel[:, :, None], groups=b * c)
    return y.view(b, c, h, w)


def pretrain(
    model: nn.Module,
    data: Dataset,
    out: str | Path,
    *,
    epochs: int,
    seconds: float | None = None,
    seed: int = 0,
    weight: float = 1.0,
    share: float = 0.5,
    replaced: float = 0.3,
    align: int = 1,
    rotations: bool = False,
    hidden: int = 4096,
    settings: dict[str, Any] | None = None,
    note: Callable[[int, int, dict[str, float]], None] = lambda step, total, losses: None,
) -> dict[str, Any]:
    """Pre-trains `model`, a ViT with a class token, in place on the training images of `data`; labels are not read.

    Args:
        out: folder for the state; the same call goes on with it, and gives the finished weights where it is done.
        epochs: passes over the images, fewer where `seconds` end first.
        weight: of the reconstruction loss.
        share, replaced, align: of the corruption, see `Views`.
        rotations: ask for the turns of rotated views too.
        hidden: inner width of the contrast head.
        settings: further fields of `Settings`.
        note: told step, steps in all and the losses.

    Returns:
        Steps, seconds, the losses at the start and at the end, and the accuracy of nearest neighbours (on validation
        images, by features of training images) before and after.

    Raises:
        ValueError: `model` is no such ViT, the data are no images, or images that are not square are to be rotated.
    """
    out = Path(out)
    if data.task != "image-classification":
        raise ValueError(f"self-supervised pre-training reads images, not {data.task}")
    if (out / "results.json").exists():
        model.load_state_dict({**model.state_dict(), **load_weights(out / "backbone.safetensors")})
        return read_json(out / "results.json")
    began = time.perf_counter()
    torch.manual_seed(seed)
    head: Any = model.head
    asked = [p.requires_grad for p in head.parameters()]
    head.requires_grad_(False)  # it does not take part
    network = Pretrainer(SiT(model, hidden=hidden, rotations=rotations), weight=weight)
    for name, part in network.student.named_children():
        for module in part.modules() if name != "backbone" else ():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
    network.teacher.load_state_dict(network.student.state_dict())
    task = Views(data.spec, data.meta, share=share, replaced=replaced, align=align, rotations=rotations)
    batch = min(BATCH, max(16, len(data.train) // 8))
    base = Settings(batch_size=batch, weight_decay=DECAY[0], clip=3.0, ema=0.0, seed=seed)
    chosen = replace(base, **(settings or {}))
    if "lr" not in (settings or {}):
        chosen = replace(chosen, lr=LR * chosen.batch_size / 256)
    trainer = Trainer(network, task, data, chosen)
    total = epochs * trainer.steps_per_epoch
    if "warmup" not in (settings or {}):
        warmup = min(WARMUP_EPOCHS * trainer.steps_per_epoch, total // 10)
        trainer.settings = replace(chosen, warmup=warmup)
    average = MovingAverage(network.student, MOMENTUM, into=network.teacher)
    checkpoint = out / "last.pt"
    first: dict[str, float] = {}
    spent, last_save = 0.0, began
    if checkpoint.exists():
        extra = trainer.load(checkpoint)
        first, spent, before = extra["first"], extra["spent"], extra["before"]
    else:
        before = neighbours_accuracy(model, task, data)
    recent: list[dict[str, float]] = []

    def save() -> None:
        trainer.save(checkpoint, first=first, spent=spent + time.perf_counter() - began, before=before)

    def on_step(_: float) -> None:
        nonlocal last_save
        done = max(trainer.phase_steps / total, trainer.phase_seconds / seconds if seconds else 0.0)
        average.update(momentum(done))
        # Only the groups that decay at all; the others are biases and norms.
        for group in trainer.optimiser.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = DECAY[1] - (DECAY[1] - DECAY[0]) * (math.cos(math.pi * done) + 1) / 2
        first.update({} if first else network.losses)
        recent.append(network.losses)
        del recent[:-20]
        note(trainer.steps, total, network.losses)
        if time.perf_counter() - last_save > CHECKPOINT_EVERY_S:
            last_save = time.perf_counter()
            save()

    trainer.train(steps=total, seconds=seconds, schedule="cosine", on_step=on_step)
    if trainer.accelerator.is_main_process:
        weights = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
        save_weights(weights, out / "backbone.safetensors")
    trainer.accelerator.wait_for_everyone()
    for parameter, wanted in zip(head.parameters(), asked, strict=True):
        parameter.requires_grad_(wanted)
    result = {
        "steps": trainer.steps,
        "epochs": trainer.steps / trainer.steps_per_epoch,
        "seconds": round(spent + time.perf_counter() - began, 1),
        "first": first,
        "last": {name: sum(r[name] for r in recent) / len(recent) for name in first} if recent else first,
        "neighbours": {"before": before, "after": neighbours_accuracy(model, task, data)},
        "settings": trainer.settings.to_dict(),
    }
    if trainer.accelerator.is_main_process:
        write_json(out / "results.json", result)
        checkpoint.unlink(missing_ok=True)
    return result


@torch.no_grad()
def neighbours_accuracy(model: nn.Module, task: ImageClassification, data: Dataset, *, k: int = NEIGHBOURS) -> float:
    """Share of validation images that the `k` nearest training images by class token, weighted by likeness, name right.

    `vote(class) = sum_i exp(cos(f, f_i) / 0.07)` over the neighbours of that class; at most 2,000 images of each split.
    """
    encoder: Any = model
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    known, asked = (
        torch.linspace(0, len(split) - 1, min(SEEN, len(split))).round().long() for split in (data.train, data.val)
    )

    def features(split: Split, index: Tensor) -> Tensor:
        parts = [encoder.encode(task.batch(split, part)[0][0].to(device))[0][:, 0].cpu() for part in index.split(256)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    likeness = features(data.val, asked) @ features(data.train, known).T
    model.train(was_training)
    near, place = likeness.topk(min(k, len(known)), dim=1)
    labels = data.train.targets[known][place]
    votes = torch.zeros(len(asked), int(data.spec["num_classes"])).scatter_add_(1, labels, (near / 0.07).exp())
    return float((votes.argmax(1) == data.val.targets[asked]).float().mean())
