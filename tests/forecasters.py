"""What the tests of forecasters share: golden tensors, manifests, toy series, export."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.io import export_onnx
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state

# Rows of the calendar tables that the golden files' integer columns were drawn for.
COLUMNS = (13, 32, 7, 24, 4)
# Series of every shape that `gossamer fit` may meet: channels, steps, horizon, frequency.
SPECS = [
    {"channels": 7, "seq_len": 96, "pred_len": 96, "freq": "h", "marks": 4},
    {"channels": 1, "seq_len": 336, "pred_len": 24, "freq": "t", "marks": 5},
    {"channels": 30, "seq_len": 7, "pred_len": 3, "freq": "d", "marks": 3},
    {"channels": 2, "seq_len": 3, "pred_len": 1, "freq": "m", "marks": 1},
]


def golden_marks(name: str, steps: int, freq: str) -> Tensor:
    """The calendar features that the golden file `name` was computed from: noise, or integer columns for tables."""
    if not name.endswith("tables"):
        return seeded_input(name + "marks", (3, steps, 4)) / 4
    columns = COLUMNS if freq == "t" else COLUMNS[:4]
    drawn = [seeded_input(f"{name}{n}", (3, steps)).mul(100).long().remainder(n) for n in columns]
    return torch.stack(drawn, -1).float()


def equals_official(name: str, slug: str, settings: dict[str, Any]) -> None:
    """Forecast, input gradient and three weight gradients equal the authors', in both precisions."""
    saved = golden(name)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.float32, 1e-4)):
        model = load_official(create_model(slug, **settings), seeded_state(saved["shapes"])).to(dtype)
        model.train(name.endswith("train"))
        x = seeded_input(name, (3, model.seq_len, 3)).to(dtype).requires_grad_()
        marks = golden_marks(name, model.seq_len + model.pred_len, settings.get("freq", "h")).to(dtype)
        torch.manual_seed(5)  # the authors draw the sampled keys from the global generator
        y = model(x, marks)
        probe(y).backward()
        own, dim = dict(model.named_parameters()), settings["d_model"]
        first = next(key for key in own if key.endswith(".mixer.qkv.weight"))
        last = [key for key in own if key.endswith(".cross.qkv.weight")][-1]
        for got, key in (
            (y, "output"),
            (x.grad, "input_grad"),
            (own[first].grad[dim : 2 * dim], "key_grad"),
            (own[last].grad[dim : 2 * dim], "cross_grad"),
            (own["source.token.weight"].grad, "token_grad"),
        ):
            torch.testing.assert_close(got, saved[key].to(dtype), atol=tolerance, rtol=tolerance)


def manifest_fits(slug: str, name: str) -> None:
    """Official keys and shapes become the model's own, and the parameters are as many, to the last one."""
    record = manifest(slug)[name]
    with torch.device("meta"):
        model = create_model(name)
        state = {key: torch.empty(shape) for key, shape in record["state_dict"]}
    entry = system(slug)
    state = entry.convert(model, rename(state, entry.rules))
    assert {k: tuple(v.shape) for k, v in state.items()} == {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def scales(slug: str, spec: dict[str, Any], size: str) -> nn.Module:
    """The scaled model, after its forecast was seen to have the right shape and all its gradients to be finite."""
    name, settings = system(slug).scale(spec, size)
    model = create_model(name, **settings)
    x = torch.randn(2, spec["seq_len"], spec["channels"])
    y = model(x, torch.rand(2, spec["seq_len"] + spec["pred_len"], spec["marks"]) - 0.5)
    assert y.shape == (2, spec["pred_len"], spec["channels"])
    y.square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    return model


def exports(model: nn.Module, path: Path, marks: int = 4) -> None:
    """ONNX Runtime agrees to 1e-4 at two batch sizes of one file."""
    inputs = (torch.randn(2, model.seq_len, 3), torch.rand(2, model.seq_len + model.pred_len, marks) - 0.5)
    certificate = export_onnx(model, inputs, path / "model.onnx", dynamic="batch", tolerance=1e-4)
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
    assert len({shape[0][0] for shape in certificate.shapes}) == 2


class Toy:
    """Windows of a series: two sinusoids and noise, and a trend if asked; 96 steps known, 24 to forecast."""

    def __init__(self, trend: float = 0.0) -> None:
        noise = torch.randn(1200, 2, generator=torch.Generator().manual_seed(1))
        t = torch.arange(1200.0)[:, None] + torch.tensor([0.0, 5.0])
        wave = (t * (2 * math.pi / 24)).sin() + 0.5 * (t * (2 * math.pi / 31)).sin()
        self.values = wave + 0.1 * noise + trend * t / 1200
        hour = (torch.arange(1200) % 24 / 23 - 0.5)[:, None]
        self.marks = torch.cat((hour, torch.zeros(1200, 3)), 1)

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = starts[:, None] + torch.arange(120)
        x, marks = self.values[rows], self.marks[rows]
        return x[:, :96], marks, x[:, 96:]

    def test_error(self, model: nn.Module) -> float:
        x, marks, y = self.windows(torch.arange(960, 1080, 5))
        with torch.no_grad():
            return float((model.eval()(x, marks) - y).square().mean())

    def repeat_error(self) -> float:
        """Of the forecast that nothing changes."""
        x, _, y = self.windows(torch.arange(960, 1080, 5))
        return float((x[:, -1:] - y).square().mean())

    def train(self, model: nn.Module, steps: int, lr: float = 2e-3) -> float:
        """The test error after `steps` steps of Adam."""
        optimiser = torch.optim.Adam(model.parameters(), lr)
        generator = torch.Generator().manual_seed(2)
        model.train()
        for _ in range(steps):
            x, marks, y = self.windows(torch.randint(0, 800, (16,), generator=generator))
            loss = (model(x, marks) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return self.test_error(model)


def refuses(match: str, slug: str, **settings: Any) -> None:
    """Building raises a ValueError whose message holds `match`."""
    with pytest.raises(ValueError, match=match):
        create_model(slug, **settings)
