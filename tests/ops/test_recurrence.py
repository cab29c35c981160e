import pytest
import torch

from gossamer.ops.recurrence import linear_recurrence, linear_recurrence_reference


def draw(*shape, dtype=torch.double):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("n", [1, 2, 16, 17, 50, 131])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("dtype", [torch.double, torch.cdouble])
def test_the_blocked_scan_equals_the_loop_in_value_and_gradient(n, reverse, started, dtype):
    a, b = draw(2, n, 3, 2, dtype=dtype), draw(2, n, 3, 2, dtype=dtype)
    h0 = draw(2, 3, 2, dtype=dtype) if started else None
    damped = a / (a.abs() + 0.1)  # factors below 1 in size, so that long products stay in range
    fast = linear_recurrence(damped, b, h0, reverse=reverse)
    slow = linear_recurrence_reference(damped, b, h0, reverse=reverse)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    inputs = (a, b, h0) if started else (a, b)
    out = torch.randn_like(slow)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, out, retain_graph=True), torch.autograd.grad(slow, inputs, out), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_and_their_gradients_equal_finite_differences(reverse):
    def run(a, b, h):
        return linear_recurrence(a, b, h, reverse=reverse)

    inputs = (draw(1, 19, 1), draw(1, 19, 1), draw(1, 1))
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_factors_broadcast_over_samples_and_channels():
    a, b = draw(1, 40, 1), draw(3, 40, 5)
    fast = linear_recurrence(a.sigmoid(), b)
    slow = linear_recurrence_reference(a.sigmoid(), b)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    one, two = (torch.autograd.grad(y.sum(), a, retain_graph=True)[0] for y in (fast, slow))
    assert one.shape == a.shape
    torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


def test_factors_of_zero_forget_the_past_exactly():
    a, b = torch.rand(1, 64, 2), torch.randn(1, 64, 2)
    a[:, 30] = 0
    changed = b.clone()
    changed[:, :30] += 5
    one, two = linear_recurrence(a, b), linear_recurrence(a, changed)
    assert torch.equal(one[:, 30:], two[:, 30:])
    assert not torch.equal(one[:, :30], two[:, :30])


def test_mixed_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"one dtype, got torch\.complex64, torch\.float32"):
        linear_recurrence(torch.ones(1, 3, dtype=torch.cfloat), torch.ones(1, 3))
