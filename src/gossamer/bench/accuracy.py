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
from collections.abc import Callable, Sequence
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


def compare_accuracy(
    names: Sequence[str],
    source: str,
    *,
    seconds: float,
    epochs: int | None,
    seed: int,
    note: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Trains the small network with each mixer.

    Returns:
        How all were trained; and for each name its `accuracy` on test images with one standard `error`, the `loss` of
        the last steps, the network's `network_ms` for one image and `network_parameters`, or `train_why`.

    Raises:
        ValueError: `source` holds no images.
    """
    data = read_dataset(source, seed=seed)
    if data.task != "image-classification":
        raise ValueError(f"train= wants images in class folders, {source} is for {data.task}")
    end = time.perf_counter() + seconds * (1 - LATENCY_SHARE)
    settings = _settings(data, seed)
    scores: dict[str, dict[str, Any]] = {name: {"accuracy": None, "train_why": ""} for name in names}
    step_s: dict[str, float] = {}
    for name in names:
        note(f"first steps with {name}")
        try:
            step_s[name] = _step_seconds(name, data, settings)
        except Exception as error:  # a mixer may be bound to other grids than the network's
            scores[name]["train_why"] = reason(error)
    count = min(MOST_TESTED, len(data.test))
    per_epoch = max(1, len(data.train) // settings.batch_size)
    if epochs is not None:
        steps = epochs * per_epoch
    else:
        left = max(0.0, end - time.perf_counter()) / max(sum(step_s.values()), 1e-9)
        steps = max(1, int(left - TEST_STEP * count / settings.batch_size))
    networks: dict[str, nn.Module] = {}
    for i, name in enumerate(step_s):
        note(f"training with {name} ({i + 1} of {len(step_s)}, {steps} steps)")
        trainer = _trainer(name, data, settings)
        try:
            losses: list[float] = []
            trainer.train(steps=steps, schedule="cosine", on_step=losses.append)
        except Diverged as error:
            scores[name]["train_why"] = str(error)
            continue
        right = trainer.evaluate(data.test, limit=MOST_TESTED)["accuracy"]
        scores[name] |= {
            "accuracy": right,
            "error": math.sqrt(max(right * (1 - right), 1 / count) / count),
            "loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
            "network_parameters": sum(p.numel() for p in trainer.model.parameters()),
        }
        networks[name] = trainer.model.cpu().eval()
    _time(networks, data, scores, max(0.1, seconds * LATENCY_SHARE))
    variant, sizes = _sizes(data.spec)
    training = {
        "data": source,
        "images": len(data.train),
        "tested": count,
        "network": {"model": variant, **sizes, "grid": list(_grid(sizes))},
        "steps": steps,
        "epochs": steps / per_epoch,
        "settings": settings.to_dict(),
    }
    return training, scores


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


def _time(networks: dict[str, nn.Module], data: Dataset, scores: dict[str, dict[str, Any]], seconds: float) -> None:
    """Adds the latency of each trained network for one image, all interleaved."""
    if not networks:
        return
    x = torch.randn(1, data.spec["in_chans"], *data.spec["img_size"])
    with torch.inference_mode():
        forms = {name: (lambda n=network: n(x)) for name, network in networks.items()}
        for name, took in latency(forms, budget_s=seconds).items():
            scores[name]["network_ms"] = took.median_ms
