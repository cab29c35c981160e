"""What the tests of image pyramids share: comparison with golden tensors, manifests, published figures."""

from typing import Any

import pytest
import torch

from gossamer import catalogue, measure
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state


def equals_official(name: str, slug: str, settings: dict[str, Any], shape: tuple[int, ...], key: str) -> None:
    """Output, input gradient and the gradient of the official weight `key` equal the authors', in both precisions."""
    saved = golden(name)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        model = create_model(slug, **settings).eval().to(dtype)
        state = seeded_state(saved["shapes"], dtype)
        load_official(model, state)
        x = seeded_input(name, shape).to(dtype).requires_grad_()
        outputs = [y.movedim(-1, 1) for y in model.features(x)] if settings.get("dense") else [model(x)]
        own, weight = _find(model, slug, state, key)
        grad_x, grad_w = torch.autograd.grad(probe(*outputs), [x, weight])
        # The weight may have another shape or layout here: its gradient is found where its values lie.
        order = _order(model, slug, state, key, own)
        for i, y in enumerate(outputs):
            want = saved[f"output{i}"].to(dtype)
            torch.testing.assert_close(y[: len(want)], want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad_x, saved["grad_input"].to(dtype), rtol=tolerance, atol=tolerance)
        want = saved["grad_weight"].to(dtype).flatten()[order]
        torch.testing.assert_close(grad_w.flatten(), want, rtol=tolerance, atol=tolerance)


def _find(model: torch.nn.Module, slug: str, state: dict[str, Any], key: str) -> tuple[str, torch.Tensor]:
    marked = {k: torch.zeros_like(v) for k, v in state.items()}
    marked[key] += 1
    entry = system(slug)
    renamed = entry.convert(model, rename(marked, entry.rules))
    (own,) = [k for k, v in renamed.items() if v.numel() and bool((v == 1).all())]
    return own, dict(model.named_parameters())[own]


def _order(model: torch.nn.Module, slug: str, state: dict[str, Any], key: str, own: str) -> torch.Tensor:
    entry = system(slug)
    place = torch.arange(state[key].numel(), dtype=torch.float64).view(state[key].shape)
    return entry.convert(model, rename({**state, key: place}, entry.rules))[own].flatten().long()


def manifest_fits(slug: str, name: str) -> None:
    """The official checkpoint's keys and shapes become the model's own, nothing missing and nothing left over."""
    record = manifest(slug)[name]
    with torch.device("meta"):
        model = create_model(name)
    entry = system(slug)
    state = rename({key: torch.empty(shape, device="meta") for key, shape in record["state_dict"]}, entry.rules)
    state = entry.convert(model, state)
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in state.items()} == own
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def costs_are_published(name: str, *, params: float = 0.001, macs: float = 0.01) -> None:
    """Parameters and MACs of a variant are those of the catalogue, within the relative tolerances."""
    row = catalogue.published(name)
    assert row is not None
    assert isinstance(row.input, list)
    with torch.device("meta"):
        model = create_model(name).eval()
        image = torch.empty(1, *row.input)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row.params_m, rel=params)
    assert measure.macs(model, (image,)).total / 1e9 == pytest.approx(row.macs_g, rel=macs)
