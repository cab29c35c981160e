"""Shared parts: residual styles, norms, pruning and folding are exact; tokenisers and positions do what they say."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.layers import BatchNorm, Block, ConvNorm, DropPath, GroupNorm1, Mlp, PatchEmbed, sinusoid
from gossamer.layers.conv import SqueezeExcite
from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.mlp import ConvMlp
from gossamer.layers.tokenizer import ConvTokenizer, TextTokenizer


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def settle(module: nn.Module) -> nn.Module:
    """Gives every batch norm statistics and weights that are not those it starts with."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return module.eval()


def test_the_four_residual_styles_are_four_functions() -> None:
    x = torch.randn(2, 5, 8)
    mlp = Mlp(8, 16)
    for style in ("pre", "post", "stream", "single"):
        block = Block(8, Double(), mlp, residual=style)
        norm = block.norm1
        expected = {
            "pre": lambda a, norm=norm: (b := a + 2 * norm(a)) + mlp(norm(b)),
            "post": lambda a, norm=norm: norm((b := norm(a + 2 * a)) + mlp(b)),
            "stream": lambda a, norm=norm: (b := norm(a + 2 * norm(a))) + mlp(b),
            "single": lambda a, norm=norm: a + mlp(norm(2 * a)),
        }[style]
        torch.testing.assert_close(block(x), expected(x))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    drop = DropPath(0.25)
    y = drop.train()(torch.ones(4000, 3))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert bool((y == y[:, :1]).all())
    assert y.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(drop.eval()(y), y)
    with pytest.raises(ValueError, match="1"):
        DropPath(1.0)


def test_norms_are_those_of_channels_first_code() -> None:
    x = torch.randn(3, 4, 5, 6)
    first = x.movedim(-1, 1)
    torch.testing.assert_close(BatchNorm(6)(x), nn.BatchNorm2d(6)(first).movedim(1, -1))
    torch.testing.assert_close(GroupNorm1(6)(x), nn.GroupNorm(1, 6)(first).movedim(1, -1))


def test_cutting_hidden_units_that_contribute_nothing_changes_nothing() -> None:
    for norm in (None, BatchNorm):
        mlp = settle(Mlp(6, 10, norm=norm))
        with torch.no_grad():
            mlp.fc2.weight[:, 3:7] = 0
        x = torch.randn(4, 3, 6)
        before = mlp(x)
        assert set(mlp.importance("hidden").argsort()[:4].tolist()) == {3, 4, 5, 6}
        mlp.keep("hidden", torch.tensor([0, 1, 2, 7, 8, 9]))
        assert mlp.widths() == {"hidden": 6}
        torch.testing.assert_close(mlp(x), before)
        with pytest.raises(ValueError, match="hidden"):
            mlp.keep("heads", torch.tensor([0]))


@pytest.mark.parametrize("bias", [True, False])
def test_folded_parts_equal_the_parts_they_came_from(bias: bool) -> None:
    cases = [
        (Mlp(6, 10, norm=BatchNorm, bias=bias), torch.randn(2, 3, 4, 6)),
        (ConvNorm(6, 9, 3, stride=2, bias=bias, act=nn.ReLU), torch.randn(2, 7, 6, 6)),
        (ConvNorm(6, 6, 3, groups=6, bias=bias), torch.randn(2, 7, 6, 6)),
        (PatchEmbed(3, 8, 2, norm=BatchNorm, bias=bias), torch.randn(2, 3, 6, 4)),
    ]
    for part, x in cases:
        settle(part)
        with torch.no_grad():
            before = part(x)
            assert not torch.allclose(before, fold_batch_norm(part)(2 * x))
            torch.testing.assert_close(part(x), before, atol=1e-5, rtol=1e-5)
        assert not any(isinstance(m, nn.BatchNorm1d) for m in part.modules())


def test_norms_that_do_not_follow_a_product_at_once_are_left_alone() -> None:
    block = settle(Block(6, Double(), Mlp(6, 8), norm=BatchNorm))
    fold_batch_norm(block)
    assert isinstance(block.norm1, BatchNorm)
    part = ConvNorm(3, 4, 1)
    part.norm = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ValueError, match="running statistics"):
        fold_batch_norm(part)


def test_conv_tokeniser_pools_before_the_relu_and_gets_the_same_as_after() -> None:
    for channels in (1, 3):
        tokens = ConvTokenizer(channels, 8, 3, convs=2, hidden=4).double()
        image = torch.randn(2, channels, 13, 17, dtype=torch.float64, requires_grad=True)
        expected = image
        for conv in tokens.convs:
            expected = F.max_pool2d(F.relu(conv(expected)), 3, 2, 1)
        found = tokens(image)
        assert tuple(found.shape[1:3]) == tokens.grid((13, 17))
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected.movedim(1, -1))
        mine, theirs = (torch.autograd.grad(y.sin().sum(), image)[0] for y in (found, expected))
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("pool", [True, False])
def test_text_tokens_are_real_where_their_window_holds_a_real_word(pool: bool) -> None:
    tokens = TextTokenizer(4, 6, 4, 16, pool=pool)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, :5] = True
    found, real = tokens(torch.randn(1, 16, 4), mask)
    assert real.shape == found.shape[:2] == (1, tokens.length(16))
    starts = [i * tokens.stride - tokens.padding for i in range(17 if pool else 4)]
    seen = [any(0 <= j < 5 for j in range(s, s + 4)) for s in starts]
    if pool:
        seen = [any(seen[max(2 * i - 1, 0) : 2 * i + 1]) for i in range(tokens.length(16))]
    assert real[0].tolist() == seen


def test_sinusoids_of_far_positions_are_exact() -> None:
    table = sinusoid(5000, 6)
    angle = torch.tensor(4999.0, dtype=torch.float64) / 10000 ** (2 / 6)
    torch.testing.assert_close(table[4999, 2:4], torch.stack((angle.sin(), angle.cos())).float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("residual", [False, True])
def test_conv_mlp_keeps_the_units_it_is_told_to(residual) -> None:
    mlp = ConvMlp(4, 10, before=nn.ReLU, residual=residual)
    cut = copy.deepcopy(mlp)
    index = torch.tensor([1, 4, 8])
    cut.keep("hidden", index)
    with torch.no_grad():
        rest = [i for i in range(10) if i not in index]
        mlp.fc2.weight[:, rest] = 0
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(cut(x), mlp(x))
    assert cut.widths() == {"hidden": 3}


def test_conv_mlp_reads_its_neighbours_and_no_further() -> None:
    mlp = ConvMlp(4, 8)
    x = torch.randn(1, 7, 7, 4, requires_grad=True)
    mlp(x)[0, 3, 3].sum().backward()
    seen = x.grad.abs().sum(-1)[0] > 0
    assert seen[2:5, 2:5].all()
    assert seen.sum() == 9


def test_squeeze_excite_weighs_channels_by_what_all_places_say() -> None:
    part = SqueezeExcite(6, 3)
    x = torch.randn(2, 4, 5, 6)
    gate = torch.sigmoid(part.fc2(nn.functional.silu(part.fc1(x.mean((1, 2))))))
    torch.testing.assert_close(part(x), x * gate[:, None, None])
