"""MACs against counts by hand, across kernels and devices."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.measure import macs, parameter_table, parameters, register_macs, weight_bytes
from gossamer.measure import macs as count_macs


class Attention(nn.Module):
    def __init__(self, dim=16, heads=4, masked=False):
        super().__init__()
        self.heads, self.masked = heads, masked
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mask = torch.ones(n, n, dtype=torch.bool, device=x.device).tril() if self.masked else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Vision(nn.Module):
    def __init__(self, masked=False):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.norm = nn.LayerNorm(16)
        self.mixer = Attention(masked=masked)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mixer(self.norm(x))).mean(1))


EMBED, QKV, ATTEND, PROJ, HEAD = 16 * 16 * 48, 16 * 16 * 48, 2 * 16 * 16 * 16, 16 * 16 * 16, 16 * 5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_attention_counts_the_same_fused_plain_and_without_weights(masked, gradient):
    expected = EMBED + QKV + ATTEND + PROJ + HEAD
    model, x = Vision(masked).requires_grad_(gradient), torch.randn(1, 3, 16, 16)
    fused = macs(model, x)
    assert any("flash" in op or "efficient" in op for op in fused.by_op)
    with sdpa_kernel(SDPBackend.MATH):
        plain = macs(model, x)
    assert not any("scaled_dot" in op for op in plain.by_op)
    with torch.device("meta"):
        weightless = macs(Vision(masked), x)
    for count in (fused, plain, weightless):
        assert count.total == count.second == expected
        assert count.warning == ""


def test_tensors_of_inference_mode_count_the_same():
    with torch.inference_mode():
        model, x = Vision(), torch.randn(2, 3, 16, 16)
        assert macs(model, x).total == 2 * (EMBED + QKV + ATTEND + PROJ + HEAD)


def test_modules_hold_the_macs_of_their_children():
    count = macs(Vision(), torch.randn(1, 3, 16, 16), per_layer=True)
    assert count.by_module == {
        "": count.total,
        "embed": EMBED,
        "norm": 0,
        "mixer": QKV + ATTEND + PROJ,
        "mixer.qkv": QKV,
        "mixer.proj": PROJ,
        "head": HEAD,
    }
    assert sum(count.by_op.values()) == count.total


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), (2, 8, 9, 9), 2 * 12 * 5 * 5 * 2 * 9),
        (nn.Conv2d(8, 8, 7, padding=3, groups=8), (1, 8, 6, 6), 8 * 36 * 49),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5), 2 * 4 * 25 * 3 * 9),
        (nn.Conv1d(4, 8, 5, dilation=2), (3, 4, 20), 3 * 8 * 12 * 4 * 5),
        (nn.Linear(6, 7), (2, 3, 5, 6), 30 * 42),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Softmax(1)), (2, 4, 8, 8), 0),
    ],
)
def test_layers_count_as_by_hand(layer, shape, expected):
    count = macs(layer, torch.randn(shape))
    assert count.total == count.second == expected


def test_einsum_and_grouped_attention_count_their_products():
    class Model(nn.Module):
        def forward(self, q, k):
            y = F.scaled_dot_product_attention(q, k, k, enable_gqa=True)
            return torch.einsum("bhnd,bhmd->bhnm", y, y)

    count = macs(Model(), (torch.randn(2, 4, 6, 8), torch.randn(2, 2, 10, 8)))
    assert count.total == 2 * 4 * 6 * 10 * 16 + 2 * 4 * 6 * 6 * 8


def test_blocks_that_a_mask_skips_are_not_counted():
    flex = pytest.importorskip("torch.nn.attention.flex_attention")
    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, 1, 1, 256, 256, device="cpu")

    class Model(nn.Module):
        def __init__(self, block_mask):
            super().__init__()
            self.block_mask = block_mask

        def forward(self, q):
            return flex.flex_attention(q, q, q, block_mask=self.block_mask)

    q = torch.randn(1, 2, 256, 8)
    dense, causal = macs(Model(None), q), macs(Model(mask), q)
    assert dense.total == 2 * 256 * 256 * 16
    assert causal.total == dense.total * 3 // 4  # three of four blocks of 128 by 128


def test_difference_between_the_counters_is_told_with_its_cause():
    lstm = nn.LSTM(8, 16)
    count = macs(lstm, torch.randn(5, 2, 8))
    assert count.total == 5 * 2 * 64 * (8 + 16)
    assert count.second is not None
    if count.second != count.total:
        assert "rnn" in count.warning
        assert "%" in count.warning


def test_whole_layer_kernels_do_not_hide_their_products():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    n, d = 3, 8
    assert macs(layer, torch.randn(1, n, d)).total == n * (4 * d * d + 2 * d * 16) + 2 * n * n * d


def test_custom_operations_count_by_their_own_formula_and_are_named_without_one():
    @torch.library.custom_op("gossamer_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Model(nn.Module):
        def forward(self, x):
            return torch.ops.gossamer_test.double(x)

    x = torch.randn(3, 4)
    assert macs(Model(), x).uncounted == ("gossamer_test.double",)

    @register_macs(torch.ops.gossamer_test.double)
    def _(x, *, out):
        return out.numel()

    count = macs(Model(), x)
    assert count.total == count.second == 12
    with pytest.raises(ValueError, match="already"):
        register_macs(torch.ops.gossamer_test.double)(lambda *a, out: 0)


def test_fourier_transforms_are_named_not_counted():
    class Model(nn.Module):
        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x))

    count = macs(Model(), torch.randn(2, 8))
    assert count.total == 0
    assert count.uncounted == ("_fft_c2r", "_fft_r2c")


def test_counting_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[1].eval()
    before = model[1].running_mean.clone()
    with contextlib.suppress(ValueError):
        count_macs(model, torch.randn(2, 3, 8, 8), per_layer=True)
    assert [m.training for m in model] == [True, False, True]
    assert torch.equal(model[1].running_mean, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tied_weights_are_counted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 4)
            self.head = nn.Linear(4, 10, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3))

    with torch.device("meta"):
        weightless = Tied()
    for model in (Tied(), weightless):
        assert parameters(model) == 40
        assert parameter_table(model) == {"": 40, "embed": 40, "head": 40}
        assert weight_bytes(model) == 4 * 43
    frozen = Tied()
    frozen.embed.weight.requires_grad_(False)
    assert parameters(frozen, trainable=True) == 0
