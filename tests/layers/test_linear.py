"""The fused linear layer equals the plain one, and stands aside wherever something else is meant."""

import subprocess
import sys

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
    monkeypatch.setattr(module, "INTEL", False)
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
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (2, 3, 4, 7), (1, 7)])
def test_gradients_and_their_gradients_equal_those_of_the_layer(shape, bias) -> None:
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]
    results = []
    for y in (linear(layer, x, nn.GELU()), nn.GELU()(layer(x))):
        mix = torch.linspace(-1, 1, y.numel()).view(y.shape)
        plain = torch.autograd.grad((y * mix).sum(), inputs, retain_graph=True)
        first = torch.autograd.grad((y.square() * mix).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *plain, *first, *second])
    assert "_Linear" in type(linear(layer, x).grad_fn).__name__
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("always")
def test_frozen_weights_get_no_gradient() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(3, 7, requires_grad=True)
    layer.requires_grad_(False)
    linear(layer, x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


@pytest.mark.usefixtures("always")
def test_the_layer_itself_is_called_when_watched_counted_or_exchanged(monkeypatch) -> None:
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


def test_small_products_are_left_to_the_layer(monkeypatch) -> None:
    spy = Spy(monkeypatch)
    with torch.no_grad():
        linear(nn.Linear(7, 5), torch.randn(3, 7))
    assert spy.calls == 1


@pytest.mark.usefixtures("always")
def test_on_intels_cpus_only_narrow_layers_of_many_rows_go_another_way(monkeypatch) -> None:
    monkeypatch.setattr(module, "INTEL", True)
    spy = Spy(monkeypatch)
    with torch.no_grad():
        for rows, dim, out, layers in ((2048, 128, 128, 0), (2047, 128, 128, 1), (2048, 129, 129, 1), (2048, 64, 8, 1)):
            spy.calls = 0
            linear(nn.Linear(dim, out), torch.randn(rows, dim))
            assert spy.calls == layers, (rows, dim, out)


def test_a_compiler_sees_one_graph_and_the_same_numbers() -> None:
    # In a process of its own: a compiler cannot trace the checks that the tests put around every function.
    program = """
import torch
from torch import nn
from gossamer.layers import linear as module
from gossamer.layers.linear import _gains, linear
module.INTEL = False
layer, act = nn.Linear(256, 512), nn.GELU()
x = torch.randn(2**23 // (256 * 512) + 1, 256, requires_grad=True)
assert _gains(layer, x)
compiled = torch.compile(lambda x: linear(layer, x, act), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), act(layer(x)))
with torch.no_grad():
    torch.testing.assert_close(compiled(x), act(layer(x)))
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    torch.compiler.reset()
    compiled(x)
    assert seen == [1], "a hook was passed by"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
