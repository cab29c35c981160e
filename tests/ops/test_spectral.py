import pytest
import torch
import torch.nn.functional as F
from jaxtyping import config

from gossamer.ops import spectral as s


def draw(*shape):
    return torch.randn(*shape, dtype=torch.double, requires_grad=True)


def same(fast, slow, inputs):
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=0)
    out = torch.randn_like(slow)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, out, retain_graph=True), torch.autograd.grad(slow, inputs, out), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 24, 25])
@pytest.mark.parametrize("form", s.FORMS)
def test_circular_products_equal_the_direct_sums(n, form):
    q, k = draw(2, n, 3, 2), draw(2, n, 3, 2)
    same(s.circular_correlation(q, k, form=form), s.circular_correlation_reference(q, k), (q, k))
    k = draw(1, n, 1, 2)
    same(s.circular_convolution(q, k, form=form), s.circular_convolution_reference(q, k), (q, k))


def test_correlation_finds_the_delay():
    k = torch.randn(1, 31, 1)
    assert int(s.circular_correlation(k.roll(5, 1), k).argmax(1)) == 5


@pytest.mark.parametrize("form", s.FORMS)
@pytest.mark.parametrize(
    ("grid", "size"),
    [
        ((1,), (1,)),
        ((13,), (13,)),
        ((16,), (5,)),
        ((7,), (11,)),
        ((5, 8), (5, 8)),
        ((6, 5), (3, 7)),
        ((3, 4, 2), (3, 4, 2)),
    ],
)
def test_long_convolution_equals_the_direct_causal_sum(grid, size, form):
    x, k = draw(2, *grid, 3), draw(*size, 3)
    same(s.long_convolution(x, k, form=form), s.long_convolution_reference(x, k), (x, k))


def test_long_convolution_is_a_depthwise_convolution_padded_in_front():
    x, k = draw(2, 9, 6, 3), draw(9, 6, 3)
    kernel = k.permute(2, 0, 1).flip(1, 2)[:, None]
    expected = F.conv2d(F.pad(x.movedim(-1, 1), (5, 0, 8, 0)), kernel, groups=3).movedim(1, -1)
    torch.testing.assert_close(s.long_convolution(x, k), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", s.FORMS)
@pytest.mark.parametrize("grid", [(1,), (8,), (33,), (4, 5), (3, 2, 4)])
def test_toeplitz_products_equal_the_written_out_matrix(grid, form):
    axes = len(grid)
    x = draw(2, 3, *grid, 4)
    table = draw(3, *(2 * n - 1 for n in grid), 1)
    same(s.toeplitz(x, table, axes=axes, form=form), s.toeplitz_reference(x, table, axes=axes), (x, table))


def test_toeplitz_reads_its_table_by_key_minus_query():
    table = torch.zeros(9, 1)
    table[4 + 2] = 1  # offset +2: the key two steps ahead
    y = s.toeplitz(torch.tensor([10.0, 11, 12, 13, 14])[None, :, None], table)
    torch.testing.assert_close(y[0, :, 0], torch.tensor([12.0, 13, 14, 0, 0]), atol=1e-5, rtol=0)


def test_half_precision_goes_through_float32():
    x, k = torch.randn(1, 40, 2), torch.randn(40, 2)
    y = s.long_convolution(x.bfloat16(), k.bfloat16())
    assert y.dtype == torch.bfloat16
    expected = s.long_convolution_reference(x.bfloat16().double(), k.bfloat16().double())
    assert float((y.double() - expected).abs().max()) < 0.01 * float(expected.abs().max())


def test_wrong_shapes_and_forms_are_refused():
    with pytest.raises(ValueError, match="k must have 3 axes"):
        s.long_convolution(torch.randn(1, 4, 4, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"table must hold \(7,\) offsets"):
        s.toeplitz(torch.randn(1, 4, 2), torch.randn(1, 8, 1))
    with pytest.raises(ValueError, match="form must be one of"):
        s.circular_correlation(torch.randn(1, 4, 2), torch.randn(1, 4, 2), form="slow")


class Spectral(torch.nn.Module):
    def forward(self, q, k):
        n = q.shape[1]
        decay = torch.exp(-torch.arange(n, dtype=q.dtype)[:, None] * torch.ones(q.shape[-1]))
        table = torch.cat([decay.flip(0), decay[1:]])
        return s.circular_correlation(q, k), s.long_convolution(q, decay), s.toeplitz(k, table[None])


@pytest.fixture
def symbolic_sizes():
    """A symbolic size is no `int`, so the run-time check of annotations is off while a graph is traced."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_an_exported_graph_serves_every_length(tmp_path, symbolic_sizes):
    ort = pytest.importorskip("onnxruntime")
    q, k = torch.randn(2, 24, 3), torch.randn(2, 24, 3)
    n = torch.export.Dim("n", min=4, max=512)
    torch.onnx.export(
        Spectral().eval(), (q, k), tmp_path / "s.onnx", dynamo=True, dynamic_shapes=({1: n}, {1: n}), verbose=False
    )
    session = ort.InferenceSession(tmp_path / "s.onnx", providers=["CPUExecutionProvider"])
    for length in (24, 37):
        q, k = torch.randn(2, length, 3), torch.randn(2, length, 3)
        out = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), (q, k), strict=True)})
        for one, two in zip(out, Spectral()(q, k), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), two, atol=1e-4, rtol=1e-5)
