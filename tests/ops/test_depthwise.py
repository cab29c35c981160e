"""The depth-wise convolution's own gradients are the library's, to any order."""

import pytest
import torch
import torch.nn.functional as F

from gossamer.ops import depthwise


@pytest.mark.parametrize(("kernel", "shape"), [((7, 7), (2, 3, 9, 6)), ((5, 9), (1, 4, 3, 12)), ((3, 3), (2, 2, 5, 5))])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_depthwise_convolution_and_its_gradients_equal_the_plain_one(kernel, shape, layout) -> None:
    x = torch.randn(shape, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w = torch.randn(shape[1], 1, *kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(shape[1], dtype=torch.float64, requires_grad=True)
    y = depthwise.depthwise_conv(x, w, b)
    plain = F.conv2d(x, w, b, padding=(kernel[0] // 2, kernel[1] // 2), groups=shape[1])
    torch.testing.assert_close(y, plain)
    mix = torch.randn_like(y)
    got = torch.autograd.grad((y * mix).sum(), [x, w, b])
    for one, other in zip(got, torch.autograd.grad((plain * mix).sum(), [x, w, b]), strict=True):
        torch.testing.assert_close(one, other)


def test_depthwise_convolution_can_be_differentiated_twice() -> None:
    x = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, w: depthwise.depthwise_conv(x, w, None), (x, w))


def test_the_own_gradient_is_used_where_it_gains_and_only_there() -> None:
    x = torch.randn(1, 4, 8, 8)
    w = torch.randn(4, 1, 7, 7, requires_grad=True)
    name = "_Depthwise"
    assert name in type(depthwise.depthwise_conv(x, w, None).grad_fn).__name__
    assert name not in type(depthwise.depthwise_conv(x, w[..., 2:5, 2:5], None).grad_fn).__name__
    with torch.no_grad():
        assert depthwise.depthwise_conv(x, w, None).grad_fn is None


def test_what_compilers_call_keeps_the_rules_and_equals_the_library_forward_and_gradient() -> None:
    x = torch.randn(2, 9, 7, 6, dtype=torch.float64).movedim(-1, 1).requires_grad_()
    w = torch.randn(6, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    b = torch.randn(6, dtype=torch.float64, requires_grad=True)
    ops = torch.ops.gossamer
    torch.library.opcheck(ops.depthwise_conv.default, (x, w, b))
    torch.library.opcheck(ops.depthwise_weight_gradient.default, (x.detach(), torch.randn_like(x), [5, 7]))
    y, plain = ops.depthwise_conv.default(x, w, b), F.conv2d(x, w, b, padding=(2, 3), groups=6)
    torch.testing.assert_close(y, plain)
    dy = torch.randn_like(y)
    mine, theirs = (torch.autograd.grad(z, [x, w, b], dy) for z in (y, plain))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
