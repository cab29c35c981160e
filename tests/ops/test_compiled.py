"""The operators that compilers call: they keep the rules of operators and give what the library's own give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.ops import compiled

CONVS = [
    # channels in and out, kernel, stride, padding, dilation, groups, bias
    (6, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1, True),
    (6, 6, (5, 3), (1, 1), (2, 1), (1, 1), 6, True),
    (6, 4, (2, 2), (2, 2), (0, 0), (1, 1), 2, False),
    (3, 8, (3, 3), (2, 1), (2, 2), (2, 2), 1, False),
]


@pytest.mark.parametrize("case", CONVS)
def test_convolution_keeps_the_rules_and_equals_the_library_forward_and_gradient(case) -> None:
    dim, out, kernel, *how, groups, bias = case
    x = torch.randn(2, 9, 7, dim, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    weight = torch.randn(out, dim // groups, *kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(out, dtype=torch.float64, requires_grad=True) if bias else None
    given = (x, weight, b, *how, groups)
    torch.library.opcheck(torch.ops.gossamer.conv2d.default, given)
    inputs = [t for t in given[:3] if t is not None]
    y, expected = torch.ops.gossamer.conv2d.default(*given), F.conv2d(*given)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(z, inputs, dy) for z in (y, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["none", "gelu"])
def test_linear_keeps_the_rules_and_equals_the_library(act: str, bias: bool) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    x, weight = torch.randn(3, 5, 16), torch.randn(24, 16)
    b = torch.randn(24) if bias else None
    torch.library.opcheck(torch.ops.gossamer.linear.default, (x, weight, b, act))
    expected = F.linear(x, weight, b)
    expected = nn.GELU()(expected) if act == "gelu" else expected
    torch.testing.assert_close(compiled.linear(x, weight, b, act), expected, atol=1e-5, rtol=1e-5)
