"""A stage that takes its batch in parts gives what it gives at once, and takes it at once where parts would differ."""

import pytest
import torch
from torch import nn

from gossamer.layers import BatchNorm
from gossamer.trunks import blocking


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocking, "LARGE", 100)
    monkeypatch.setattr(blocking, "PART", 50)


@pytest.mark.usefixtures("small")
def test_parts_equal_the_whole_with_gradients() -> None:
    stage = Counting(6, 6)
    x = torch.randn(5, 2, 2, 6, requires_grad=True)
    whole = stage(x)
    parts = blocking.by_parts(stage, x)
    assert stage.calls == 1 + 3
    torch.testing.assert_close(parts, whole)
    for a, b in zip(
        torch.autograd.grad(parts.square().sum(), [x, *stage.parameters()]),
        torch.autograd.grad(whole.square().sum(), [x, *stage.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("small")
def test_what_looks_across_samples_or_is_watched_is_not_parted() -> None:
    x = torch.randn(5, 2, 2, 6)
    normed = nn.Sequential(Counting(6, 6), BatchNorm(6))
    blocking.by_parts(normed, x)
    assert normed[0].calls == 1
    blocking.by_parts(normed.eval(), x)
    assert normed[0].calls == 1 + 3
    watched = Counting(6, 6)
    watched.register_forward_hook(lambda *_: None)
    blocking.by_parts(watched, x)
    assert watched.calls == 1


@pytest.mark.usefixtures("small")
def test_small_batches_are_not_parted() -> None:
    stage = Counting(6, 6)
    blocking.by_parts(stage, torch.randn(2, 2, 2, 6))
    assert stage.calls == 1
