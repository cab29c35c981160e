"""The fused linear layer equals the plain one, and stands aside wherever something else is meant."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.layers import linear as module
from gossamer.layers.linear import linear


class Spy:
    """Counts how often a layer itself was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        plain = nn.Linear.forward

        def forward(this: nn.Linear, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return plain(this, x)

        monkeypatch.setattr(nn.Linear, "forward", forward)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST", 0)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch was built without oneDNN")


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [None, nn.GELU(), nn.GELU("tanh"), nn.ReLU()])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (1, 7)])
def test_fused_equals_plain(shape, act, bias) -> None:
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(shape) * 3
    want = layer(x) if act is None else act(layer(x))
    with torch.no_grad():
        torch.testing.assert_close(linear(layer, x, act), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
def test_the_layer_itself_is_called_in_training_and_when_watched_counted_or_exchanged(monkeypatch) -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 7)
    spy = Spy(monkeypatch)
    with torch.no_grad():
        linear(layer, x)
        assert spy.calls == 0
        with torch.autocast("cpu"):
            linear(layer, x)
        assert spy.calls == 1
        with FlopCounterMode(display=False) as counter:
            linear(layer, x)
        assert counter.get_total_flops() == 2 * 3 * 7 * 5
        assert spy.calls == 2
        linear(layer.double(), x.double())
        assert spy.calls == 3
        layer.float().register_forward_hook(lambda *_: None)
        linear(layer, x)
        assert spy.calls == 4
    assert linear(nn.Linear(7, 5), x).requires_grad
    assert spy.calls == 5


def test_small_products_are_left_to_the_layer(monkeypatch) -> None:
    spy = Spy(monkeypatch)
    with torch.no_grad():
        linear(nn.Linear(7, 5), torch.randn(3, 7))
    assert spy.calls == 1
