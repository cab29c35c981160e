"""Integer arithmetic beside the functions it stands for, and beside its own floating simulation."""

import math

import pytest
import torch

from gossamer.ops import integer as op


def test_a_dyadic_number_is_a_ratio_to_thirty_bits():
    ratio = (0.1 + torch.rand(2000, dtype=torch.float64)) * 10.0 ** torch.randint(-8, 7, (2000,))
    ratio = torch.cat((ratio, -ratio, torch.tensor([1 - 2.0**-40], dtype=torch.float64)))
    mantissa, shift = op.dyadic(ratio)
    assert (mantissa.abs() < 2**31).all()
    back = torch.ldexp(mantissa.double(), -shift)
    assert ((back - ratio).abs() < ratio.abs() * 2.0**-30).all()
    with pytest.raises(ValueError, match="finite"):
        op.dyadic(torch.tensor([1.0, math.inf]))


def test_requantising_multiplies_and_shifts_to_the_nearest_integer():
    x = torch.randint(-(2**26), 2**26, (5000,), dtype=torch.int32)
    ratio = torch.tensor(3.7e-6, dtype=torch.float64)
    y = op.requantise(x, *op.dyadic(ratio), bits=8)
    want = (x.double() * ratio + 0.5).floor().clamp(-128, 127)
    assert torch.equal(y, want.long())
    assert y.min() == -128
    simulated = op.requantise_simulated(x.double() * 1e-4, 1e-4 / ratio, 8) / (1e-4 / ratio)
    torch.testing.assert_close(simulated, want)


@pytest.mark.parametrize("bits", [0, 1, 17, 8.0, "8", True])
def test_bits_that_are_not_supported_are_refused(bits):
    with pytest.raises(ValueError, match="bits must be"):
        op.check_bits(bits)


def test_the_scale_reaches_the_largest_value():
    top = torch.tensor([2.54, 0.0])
    assert torch.allclose(op.scale_of(top, 8)[0] * 127, top[0])
    assert (op.scale_of(top, 8) > 0).all()


@pytest.mark.parametrize(("scale", "tolerance"), [(0.1, 0.1), (1 / 64, 0.07)])
def test_exponentials_are_shifts_close_to_the_exponential(scale, tolerance):
    below = torch.arange(0, int(12 / scale))
    unit = op.unit_of(scale)
    y = op.shift_exp(below, unit, 15).double() * scale / 2**15
    # The first value is one to the rounding of the unit; all others follow from it.
    assert ((y / y[0] - (-below * scale).double().exp()).abs() <= tolerance).all()
    simulated = op.shift_exp_simulated(-below.double() * scale, scale, 15)
    torch.testing.assert_close(y, simulated)


@pytest.mark.parametrize("keys", [3, 17, 197])
@pytest.mark.parametrize("reciprocal", [op.NARROW, op.WIDE])
def test_shiftmax_is_softmax_within_the_known_error_and_equals_its_simulation(keys, reciprocal):
    scale = 1 / 16
    x = torch.randint(-127, 128, (64, keys))
    p = op.shiftmax(x, op.unit_of(scale), reciprocal=reciprocal)
    assert ((p >= 0) & (p < 2**15)).all()
    value = p.double() / 2**15
    assert (value - (x * scale).double().softmax(-1)).abs().max() <= 0.07
    total = value.sum(-1)
    assert ((total > 0.99 - (keys > 100) * 0.005) & (total <= 1)).all()
    simulated = op.shiftmax_simulated(x.double() * scale, scale, reciprocal=reciprocal)
    assert torch.equal(simulated * 2**15, p.double())


def test_eight_bits_are_too_few_for_attention_over_many_keys():
    x = torch.randint(-20, 21, (64, 197))
    total = op.shiftmax(x, 16, bits=8).sum(-1).double() / 2**7
    assert total.max() < 0.95
    assert op.shiftmax(x, 16, bits=16).sum(-1).min() > 0.97 * 2**15


def test_shiftmax_does_not_read_masked_keys():
    x = torch.randint(-100, 100, (4, 9))
    mask = torch.rand(4, 9) < 0.6
    mask[0], mask[1, 0] = False, True
    p = op.shiftmax(x, 32, mask=mask)
    assert (p[~mask] == 0).all()
    assert (p[0] == 0).all()
    assert torch.equal(p, op.shiftmax(torch.where(mask, x, 77), 32, mask=mask))
    assert torch.equal(p[1][mask[1]], op.shiftmax(x[1][mask[1]][None], 32)[0])
    simulated = op.shiftmax_simulated(x.double() / 32, 1 / 32, mask=mask)
    assert torch.equal(simulated * 2**15, p.double())


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 0.27), ({"bits": 16, "reciprocal": op.WIDE}, 0.13), ({"bits": 16, "reciprocal": op.WIDE, "finer": 6}, 0.05)],
)
def test_shift_gelu_is_gelu_within_the_known_error_and_equals_its_simulation(options, tolerance):
    x = torch.arange(-128, 128)[None]
    scale = 4 / 127
    unit = op.unit_of(1.702 * scale / 2 ** options.get("finer", 0))
    y = op.shift_gelu(x, unit, **options)
    step = scale / 2 ** (options.get("bits", 8) - 1)
    assert (y.double() * step - torch.nn.functional.gelu(x.double() * scale)).abs().max() <= tolerance
    simulated = op.shift_gelu_simulated(x.double() * scale, scale, **options)
    assert ((simulated / step).round().long() == y).all()
    assert (simulated / step - y).abs().max() < 1e-3


def test_a_row_with_a_long_tail_spoils_shift_gelu_and_a_limit_mends_it():
    # Eight bits over a tail of 60 deviations leave four steps for what nearly all values are.
    x = torch.randn(1, 4096, dtype=torch.float64)
    x[0, 0] = 60.0
    want = torch.nn.functional.gelu(x)
    errors = []
    for lam in (None, 4.0):
        top = op.limit_of(x.abs().max(), x.std(), lam)
        scale = op.scale_of(top, 8)
        i = (x / scale).round().clamp(-128, 127).long()
        y = op.shift_gelu(i, op.unit_of(1.702 * scale)).double() * scale / 2**7
        errors.append(float((y - want)[0, 1:].pow(2).mean()))
    assert errors[1] < 0.25 * errors[0]


def test_shift_tanh_is_tanh():
    scale = 4 / 2047
    x = torch.arange(-2048, 2048, 3)[None]
    y = op.shift_tanh(x, op.unit_of(2 * scale)).double() / 2**15
    assert (y - (x * scale).double().tanh()).abs().max() < 0.06
    assert torch.equal(op.shift_tanh_simulated(x.double() * scale, scale) * 2**15, y * 2**15)


def test_the_integer_root_is_the_floor_of_the_root():
    n = torch.cat((torch.arange(0, 5000), torch.randint(1, 2**31, (10_000,)), torch.randint(1, 2**44, (10_000,))))
    squares = torch.randint(1, 2**22, (1000,)) ** 2
    n = torch.cat((n, squares, squares - 1, squares + 1, torch.tensor([2**44 - 1])))
    want = torch.tensor([math.isqrt(int(i)) for i in n])
    assert torch.equal(op.integer_sqrt(n), want)
    # As in the papers: ten steps from 2^16 do for large numbers only.
    large = torch.randint(2**20, 2**31, (10_000,))
    assert torch.equal(op.integer_sqrt(large, steps=10, start=2**16), op.integer_sqrt(large))
    assert op.integer_sqrt(torch.tensor([9]), steps=10, start=2**16) != 3


@pytest.mark.parametrize(("top", "tolerance"), [(127, 0.04), (2**15 - 1, 3e-4)])
def test_the_integer_norm_is_a_layer_norm_and_equals_its_simulation(top, tolerance):
    x = (torch.randn(50, 96).double() * 0.3 + 0.2).clamp(-1, 1)
    i = (x * top).round().long()
    y = op.integer_norm(i).double() / 2**30 * 96**0.5
    want = torch.nn.functional.layer_norm(i.double(), (96,), eps=0)
    assert (y - want).abs().max() < tolerance
    assert torch.equal(op.integer_norm_simulated(i.double() * 0.01, 0.01) * 2**30, op.integer_norm(i).double())
    still = torch.full((1, 96), 7)
    assert (op.integer_norm(still) == 0).all()
    assert (
        op.integer_norm(i, eps=96 * int(i.double().var(1, correction=0)[0]))[0].abs().sum()
        < 0.8 * op.integer_norm(i)[0].abs().sum()
    )


def test_a_unit_vector_has_length_one():
    x = torch.randint(-30000, 30000, (10, 64))
    y = op.unit_vector(x).double() / 2**30
    torch.testing.assert_close(y, torch.nn.functional.normalize(x.double(), dim=-1), atol=1e-4, rtol=1e-4)


def test_products_of_integers_are_exact():
    a = torch.randint(-128, 128, (2, 5, 300), dtype=torch.int8)
    b = torch.randint(-128, 128, (300, 7), dtype=torch.int8)
    y = op.product(a, b)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), a.long() @ b.long())
    p = torch.randint(0, 2**15, (2, 3, 5, 9))
    v = torch.randint(-128, 128, (2, 3, 9, 4), dtype=torch.int8)
    assert torch.equal(op.product(p, v).long(), p @ v.long())


def test_gradients_go_straight_through_the_roundings():
    for run in (
        lambda x: op.shiftmax_simulated(op.requantise_simulated(x, 1 / 64, 16), 1 / 64)[:, 0].sum(),
        lambda x: op.shift_gelu_simulated(op.requantise_simulated(x, 0.03), 0.03).sum(),
        lambda x: op.integer_norm_simulated(op.requantise_simulated(x, 1e-4, 16), 1e-4)[:, 0].sum(),
    ):
        x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
        run(x).backward()
        assert torch.isfinite(x.grad).all()
    x = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    op.shiftmax_simulated(op.requantise_simulated(x, 1 / 64, 16), 1 / 64, reciprocal=op.WIDE)[:, 0].sum().backward()
    z = x.detach().clone().requires_grad_()
    z.softmax(-1)[:, 0].sum().backward()
    assert torch.nn.functional.cosine_similarity(x.grad.flatten(), z.grad.flatten(), 0) > 0.9
