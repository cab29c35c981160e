"""Two dense tasks with few images: networks that hear each other (NDDR) beside networks that do not.

    python benchmarks/multi_task.py                     # five seeds

Source of the experiment: Gao et al. 2019, "NDDR-CNN", whose protocol it follows: single-task networks are trained
first, then fused and trained on. The single tasks are trained on for as many steps, on the same batches. What the
fusion's own layers add without the other task is not told apart. The scenes are rendered: spheres, cones, half
cylinders and pyramids on a table, in one light; to be told are the kind of solid and the surface normal of each pixel.
Figures go to `benchmarks/results/multi_task.json`.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer import measure
from gossamer.io.files import write_json
from gossamer.models import create_model
from gossamer.models.nddr_cnn import loss, parameter_groups

HERE = Path(__file__).parent
KINDS = ("table", "sphere", "cone", "cylinder", "pyramid")
SIDE, SOLIDS, BATCH = 48, 3, 10
SIZES = dict(outputs=(len(KINDS), 3), widths=(12, 24, 32, 48, 48), depths=(1, 1, 1, 2, 2), hidden=48)
ROUGH = 22.5  # degrees that a normal may be off

# ---- data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """Images `(n, 3, h, w)`, kinds `(n, h, w)` and unit normals `(n, 3, h, w)`."""

    images: Tensor
    kinds: Tensor
    normals: Tensor


def scenes(count: int, draw: torch.Generator) -> Scenes:
    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=draw)

    rows, columns = (grid.float() for grid in torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"))
    height = torch.zeros(count, SIDE, SIDE)
    kinds = torch.zeros(count, SIDE, SIDE, dtype=torch.long)
    colour = uniform(0.4, 1, count, 3, 1, 1).expand(count, 3, SIDE, SIDE)
    for _ in range(SOLIDS):
        kind = torch.randint(1, len(KINDS), (count, 1, 1), generator=draw)
        radius, turn = uniform(6, 12, count, 1, 1), uniform(0, torch.pi, count, 1, 1)
        y, x = (grid - uniform(8, SIDE - 8, count, 1, 1) for grid in (rows, columns))
        # Each solid in its own axes, in units of its radius.
        u, v = (turn.cos() * x + turn.sin() * y) / radius, (turn.cos() * y - turn.sin() * x) / radius
        far, square = (u**2 + v**2).sqrt(), torch.maximum(u.abs(), v.abs())
        round_, barrel = (1 - far**2).clamp(min=0).sqrt(), (1 - v**2).clamp(min=0).sqrt() * (u.abs() < 1)
        forms = torch.stack([round_, 1 - far, barrel, 1 - square]).clamp(min=0)
        top = radius * forms.gather(0, (kind - 1).expand(count, SIDE, SIDE)[None])[0]
        seen = top > height
        height, kinds = torch.where(seen, top, height), torch.where(seen, kind, kinds)
        colour = torch.where(seen[:, None], uniform(0.4, 1, count, 3, 1, 1), colour)
    dy, dx = torch.gradient(height, dim=(1, 2))
    normals = F.normalize(torch.stack([-dx, -dy, torch.ones_like(dx)], 1), dim=1)
    light = F.normalize(torch.cat([uniform(-1, 1, count, 2), uniform(0.5, 1, count, 1)], 1), dim=1)[..., None, None]
    shade = 0.2 + 0.8 * (normals * light).sum(1, keepdim=True).clamp(min=0)
    images = colour * shade + 0.05 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
    return Scenes((images - 0.5) / 0.25, kinds, normals)


# ---- training and scores -------------------------------------------------------------------------------------


def train(model: nn.Module, data: Scenes, steps: int, lr: float, seed: int) -> None:
    """The authors' optimiser, groups and schedule; every network sees the same batches."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD(parameter_groups(model, lr), momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, steps, 0.9)
    valid = torch.ones(BATCH, SIDE, SIDE, dtype=torch.bool)
    model.train()
    for _ in range(steps):
        index = torch.randint(len(data.images), (BATCH,), generator=draw)
        total = loss(model(data.images[index]), data.kinds[index], data.normals[index], valid)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def scores(model: nn.Module, data: Scenes) -> dict[str, float]:
    """Mean intersection over union of the kinds, mean angle and share of normals within `ROUGH` degrees; their mean."""
    answers = [model(images) for images in data.images.split(50)]
    kinds = torch.cat([kinds for kinds, _ in answers]).argmax(1)
    vectors = torch.cat([F.normalize(normals, dim=1) for _, normals in answers])
    angles = (vectors * data.normals).sum(1).clamp(-1, 1).acos().rad2deg()
    both = torch.bincount((len(KINDS) * data.kinds + kinds).flatten(), minlength=len(KINDS) ** 2)
    both = both.view(len(KINDS), -1).double()
    iou = float((both.diag() / (both.sum(0) + both.sum(1) - both.diag())).mean())
    near = float((angles < ROUGH).double().mean())
    return {"miou": iou, "mean_angle": float(angles.mean()), "within_22.5": near, "score": (iou + near) / 2}


def compare(images: int, steps: int, lr: float, seed: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    data, test = scenes(images, draw), scenes(300, draw)
    torch.manual_seed(seed)
    alone = create_model("nddr_cnn_vgg16", fused=False, **SIZES)
    train(alone, data, steps, lr, seed)
    fused = create_model("nddr_cnn_vgg16", **SIZES)
    absent = fused.load_state_dict(alone.state_dict(), strict=False)
    assert not absent.unexpected_keys
    assert all(key.startswith("nddr.") for key in absent.missing_keys)
    row: dict[str, Any] = {"seed": seed, "first": scores(alone, test)}
    for name, model in (("single", alone), ("nddr", fused)):
        train(model, data, steps, lr, seed + 1000)
        row[name] = scores(model, test)
    print(seed, {name: {k: round(v, 3) for k, v in row[name].items()} for name in ("first", "single", "nddr")})
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=40, help="training images")
    parser.add_argument("--steps", type=int, default=400, help="steps before fusion, and again after it")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "multi_task.json")
    given = parser.parse_args()
    rows = [compare(given.images, given.steps, given.lr, seed) for seed in range(given.seeds)]
    means = {
        name: {key: statistics.mean(row[name][key] for row in rows) for key in rows[0][name]}
        for name in ("first", "single", "nddr")
    }
    settings = {"images": given.images, "steps": given.steps, "lr": given.lr, "side": SIDE}
    write_json(given.out, {"settings": settings, "means": means, "rows": rows, "device": measure.device_info()})
    print(means)


if __name__ == "__main__":
    main()
