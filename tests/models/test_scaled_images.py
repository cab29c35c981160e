"""Small models of every image system, as `gossamer fit` builds them: any small image, and a cost that is its size's."""

from typing import Any

import pytest
import torch

from gossamer import catalogue, measure
from gossamer.models import create_model
from gossamer.models.registry import system

SYSTEMS = [
    entry.slug
    for entry in catalogue.systems()
    if entry.status != "planned" and "image-classification" in entry.tasks and system(entry.slug).scale
]
# Least and most million multiply-adds of each size on 32x32 pixels.
MMACS = {"xs": (3, 9), "s": (17, 50), "m": (60, 130), "l": (200, 420)}
IMAGES = [((8, 8), 1), ((28, 40), 3), ((37, 61), 4), ((96, 96), 3)]


def scaled(slug: str, size: str, img_size: tuple[int, int], chans: int) -> tuple[str, dict[str, Any]]:
    made = system(slug).scale
    assert made is not None
    found = made({"img_size": img_size, "in_chans": chans, "num_classes": 5}, size)
    assert found is not None
    return found


@pytest.mark.parametrize(("img_size", "chans"), IMAGES, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize("slug", SYSTEMS)
def test_any_small_image_is_classified_and_every_weight_learns(
    slug: str, img_size: tuple[int, int], chans: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.mixers.hashed_linear.ROUNDS", 3)  # fits of a hash function
    name, settings = scaled(slug, "xs", img_size, chans)
    assert name in system(slug).variants
    model = create_model(name, **settings)
    y = model(torch.randn(2, chans, *img_size))
    assert y.shape == (2, 5)
    y.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("size", MMACS)
@pytest.mark.parametrize("slug", SYSTEMS)
def test_a_size_costs_about_the_same_in_every_system(slug: str, size: str) -> None:
    name, settings = scaled(slug, size, (32, 32), 3)
    with torch.device("meta"):
        model = create_model(name, **settings).eval()
        cost = measure.macs(model, (torch.empty(1, 3, 32, 32),)).total / 1e6
    least, most = MMACS[size]
    assert least < cost < most


@pytest.mark.parametrize("slug", SYSTEMS)
def test_larger_images_do_not_make_a_size_dearer_by_much(slug: str) -> None:
    name, settings = scaled(slug, "s", (224, 160), 3)
    with torch.device("meta"):
        model = create_model(name, **settings).eval()
        cost = measure.macs(model, (torch.empty(1, 3, 224, 160),)).total / 1e6
    assert 10 < cost < 80
