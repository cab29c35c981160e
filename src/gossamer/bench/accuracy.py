"""What mixers are worth, not only what they cost: one small network with each in turn, trained equally long.

- the network is a ViT of the `xs` size that `gossamer fit` would take for the data, without a class token: patches,
  positions, blocks, the mean of all tokens, one linear layer
- all weights but the mixers' start equal; order and augmentation of the images are the same for all
- the number of steps is fixed before the first network is trained
- the test split is read once for each network, at the end; nothing is chosen by it
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from gossamer.bench.block import make_mixer, reason
from gossamer.data import read_dataset
from gossamer.data.base import Dataset
from gossamer.layers.init import init_by_width
from gossamer.measure import latency
from gossamer.models import create_model
from gossamer.models.registry import system
from gossamer.tasks import create_task
from gossamer.train import Diverged, Settings, Trainer

LR = 2e-3
TRIED = 4  # steps whose time tells how many there is time for; the first is not counted
LAST = 20  # steps whose mean loss is told
MOST_TESTED = 2000
TEST_STEP = 1 / 3  # what an image costs in a test, as a share of what it costs in a training step
LATENCY_SHARE = 0.05


def read_images(source: str, seed: int) -> Dataset:
    """The data to compare on.

    Raises:
        ValueError: `source` holds no images.
    """
    data = read_dataset(source, seed=seed)
    if data.task != "image-classification":
        raise ValueError(f"train= wants images in class folders, {source} is for {data.task}")
    return data


def compare_accuracy(
    rows: Mapping[str, dict[str, Any]],
    data: Dataset,
    training: dict[str, Any] | None,
    *,
    seconds: float,
    epochs: int | None,
    seed: int,
    note: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Trains the small network with each mixer.

    Args:
        rows: for each name what is known of it, to which are added its `accuracy` on test images with one standard
            `error`, the `loss` of the last steps, the network's `network_ms` for one image and `network_parameters`,
            or `train_why`. What has its accuracy is not trained again.
        training: how an earlier call trained, which this one goes on with.
        keep: called with how all are trained whenever there is more in `rows`.
    """
    end = time.perf_counter() + seconds * (1 - LATENCY_SHARE)
    settings = _settings(data, seed)
    count = min(MOST_TESTED, len(data.test))
    if training is None:
        steps, per_epoch = _steps(rows, data, settings, count, end, epochs, note)
        variant, sizes = _sizes(data.spec)
        training = {
            "images": len(data.train),
            "tested": count,
            "network": {"model": variant, **sizes, "grid": list(_grid(sizes))},
            "steps": steps,
            "epochs": steps / per_epoch,
            "settings": settings.to_dict(),
        }
    keep(training)
    for i, (name, row) in enumerate(rows.items()):
        if "accuracy" in row:
            continue
        note(f"training with {name} ({i + 1} of {len(rows)}, {training['steps']} steps)")
        trainer = _trainer(name, data, settings)
        try:
            losses: list[float] = []
            trainer.train(steps=training["steps"], schedule="cosine", on_step=losses.append)
        except Diverged as error:
            row |= {"accuracy": None, "train_why": str(error)}
        else:
            right = trainer.evaluate(data.test, limit=MOST_TESTED)["accuracy"]
            row |= {
                "accuracy": right,
                "train_why": "",
                "error": math.sqrt(max(right * (1 - right), 1 / count) / count),
                "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
                "network_parameters": sum(p.numel() for p in trainer.model.parameters()),
            }
        keep(training)
    _time({name: row for name, row in rows.items() if row["accuracy"] is not None}, data, seed, seconds)


def _steps(
    rows: Mapping[str, dict[str, Any]],
    data: Dataset,
    settings: Settings,
    tested: int,
    end: float,
    epochs: int | None,
    note: Callable[[str], None],
) -> tuple[int, int]:
    """Steps for each network, that all end in time or after `epochs`; and those of an epoch. Says what cannot train."""
    took: dict[str, float] = {}
    for name, row in rows.items():
        note(f"first steps with {name}")
        try:
            took[name] = _step_seconds(name, data, settings)
        except Exception as error:  # a mixer may be bound to other grids than the network's
            row |= {"accuracy": None, "train_why": reason(error)}
    per_epoch = max(1, len(data.train) // settings.batch_size)
    if epochs is not None:
        return epochs * per_epoch, per_epoch
    left = max(0.0, end - time.perf_counter()) / max(sum(took.values()), 1e-9)
    return max(1, int(left - TEST_STEP * tested / settings.batch_size)), per_epoch


def small_network(mixer: str, spec: dict[str, Any], seed: int) -> nn.Module:
    """The network for images of `spec`, every weight but the mixers' the same for every `mixer`."""
    variant, sizes = _sizes(spec)
    torch.manual_seed(seed)
    network: Any = create_model(variant, **sizes, mixer="identity")
    init_by_width(network)
    for block in network.blocks:
        block.mixer = make_mixer(mixer, sizes["dim"], _grid(sizes), sizes["heads"])
        init_by_width(block.mixer)
    return network


def _sizes(spec: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    scale = system("deit").scale
    assert scale is not None
    found = scale(spec, "xs")
    assert found is not None
    return found


def _grid(sizes: dict[str, Any]) -> tuple[int, ...]:
    return tuple(-(-side // sizes["patch"]) for side in sizes["img_size"])


def _settings(data: Dataset, seed: int) -> Settings:
    batch = int(min(128, max(32, 2 ** round(math.log2(max(len(data.train), 80) / 80)))))
    return Settings(lr=LR, batch_size=batch, smoothing=0.1, warmup=20, precision="float32", seed=seed)


def _trainer(name: str, data: Dataset, settings: Settings) -> Trainer:
    task = create_task(data.task, data.spec, data.meta)
    return Trainer(small_network(name, data.spec, settings.seed), task, data, settings)


def _step_seconds(name: str, data: Dataset, settings: Settings) -> float:
    trainer = _trainer(name, data, settings)
    trainer.train(steps=1)
    before = trainer.phase_seconds
    trainer.train(steps=TRIED)
    return (trainer.phase_seconds - before) / (TRIED - 1)


def _time(rows: Mapping[str, dict[str, Any]], data: Dataset, seed: int, seconds: float) -> None:
    """Adds the latency of each network for one image, all interleaved; what was learned does not change it."""
    if not rows:
        return
    x = torch.randn(1, data.spec["in_chans"], *data.spec["img_size"])
    networks = {name: small_network(name, data.spec, seed).eval() for name in rows}
    with torch.inference_mode():
        forms = {name: (lambda n=network: n(x)) for name, network in networks.items()}
        for name, took in latency(forms, budget_s=max(0.1, seconds * LATENCY_SHARE)).items():
            rows[name]["network_ms"] = took.median_ms
