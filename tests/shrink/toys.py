"""Small problems and models that learn them in a second or two: what passes are tried on."""

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.data import read_dataset
from gossamer.data.base import Dataset, Split
from gossamer.models import create_model
from gossamer.shrink.base import Calibration
from gossamer.tasks import create_task

WORDS, LENGTH = 24, 12


def sentences(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Padded texts over `WORDS` words, and whether word 2 comes (1) or not (0)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, WORDS, (count, LENGTH), generator=generator)
    target = torch.randint(0, 2, (count,), generator=generator)
    length = torch.randint(4, LENGTH + 1, (count,), generator=generator)
    place = (torch.rand(count, generator=generator) * length).long()
    said = torch.where(target == 1, 2, ids[torch.arange(count), place])
    ids[torch.arange(count), place] = said
    return ids.masked_fill(torch.arange(LENGTH) >= length[:, None], 0), target


def texts(seconds: float = float("inf")) -> Calibration:
    """Two classes of short texts with padding."""
    splits = [Split((ids,), target) for ids, target in (sentences(n, i) for i, n in enumerate((512, 128, 128)))]
    spec = {"vocab_size": WORDS, "max_len": LENGTH, "num_classes": 2, "pad_id": 0}
    data = Dataset("text-classification", *splits, spec, {"classes": ["without", "with"]})
    return Calibration(create_task(data.task, spec, data.meta), data, seconds)


def digits(seconds: float = float("inf")) -> Calibration:
    """The 8x8 digits."""
    data = read_dataset("digits")
    return Calibration(create_task(data.task, data.spec, data.meta), data, seconds)


def encoder(**settings: Any) -> nn.Module:
    """A small post-norm encoder for `texts`."""
    sizes = {"dim": 32, "depth": 2, "heads": 4, "hidden": 64, "vocab_size": WORDS, "max_len": LENGTH, "num_classes": 2}
    torch.manual_seed(0)
    return create_model("bert_base", **{**sizes, "drop": 0.0, "head_act": "tanh", **settings})


def vision(**settings: Any) -> nn.Module:
    """A small ViT for `digits`."""
    sizes = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10, "patch": 2, "dim": 32, "depth": 2, "heads": 4}
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **{**sizes, **settings})
    # The usual small first weights take long to grow in so narrow a model.
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return model


def learned(model: nn.Module, calibration: Calibration, steps: int = 60, lr: float = 3e-3) -> nn.Module:
    """`model`, trained on the problem."""
    calibration.trainer(model, lr=lr, ema=0.0, warmup=5).train(steps=steps, schedule="linear")
    return model.eval()
