"""Strip self-attention: rank one, plain attention as its widest form, cost by the formula."""

import pytest
import torch
from torch import nn

from gossamer import measure
from gossamer.layers.fold import fold_batch_norm
from gossamer.mixers import create_mixer
from gossamer.ops.attention import attention_maps, split_heads
from gossamer.ops.grid import pad_to_multiple


def test_with_full_width_and_no_reduction_it_is_multi_head_attention() -> None:
    mixer = create_mixer("strip_attention", 24, heads=3, ratio=1, qk_dim=8)
    plain = nn.MultiheadAttention(24, 3, batch_first=True)
    plain.in_proj_weight.data = torch.cat((mixer.q.weight, mixer.kv.weight)).detach()
    plain.in_proj_bias.data = torch.cat((mixer.q.bias, mixer.kv.bias)).detach()
    plain.out_proj.load_state_dict(mixer.proj.state_dict())
    x = torch.randn(2, 5, 7, 24)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(mixer(x).flatten(1, 2), plain(tokens, tokens, tokens)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("qk_dim", "rank"), [(1, 1), (3, 3)])
def test_the_logits_of_a_head_have_the_rank_of_its_strips(qk_dim: int, rank: int) -> None:
    mixer = create_mixer("strip_attention", 16, heads=2, ratio=2, qk_dim=qk_dim).double().eval()
    x = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    q = split_heads(mixer.q(x.flatten(1, 2)), 2)
    k = split_heads(mixer.kv(mixer.reduced(x).flatten(1, 2))[..., : 2 * qk_dim], 2)
    assert k.shape[2] == 16
    _, _, logits = attention_maps(q, k, k)
    assert torch.linalg.matrix_rank(logits, rtol=1e-9).tolist() == [[rank, rank]]


def test_maps_that_fill_no_whole_cells_are_padded_with_zeros() -> None:
    mixer = create_mixer("strip_attention", 8, heads=2, ratio=4).eval()
    x = torch.randn(1, 5, 7, 8)
    assert mixer.reduced(x).shape == (1, 2, 2, 8)
    torch.testing.assert_close(mixer.reduced(x), mixer.reduced(pad_to_multiple(x, (4, 4))))


def test_cost_is_that_of_the_formula() -> None:
    for side, c, h, r in ((16, 32, 2, 4), (32, 64, 4, 8), (12, 24, 3, 1)):
        with torch.device("meta"):
            mixer = create_mixer("strip_attention", c, heads=h, ratio=r).eval()
            count = measure.macs(mixer, (torch.empty(1, side, side, c),)).total
        n, m = side * side, (side // r) ** 2
        reduction = n * c if r > 1 else 0
        assert count == n * c * h + m * c * h + m * c * c + n * m * h + n * m * c + n * c * c + reduction


def test_affinities_grow_with_the_square_of_the_tokens_unless_the_cells_grow_too() -> None:
    def affinities(side: int, ratio: int) -> int:
        with torch.device("meta"):
            mixer = create_mixer("strip_attention", 16, heads=2, ratio=ratio).eval()
            count = measure.macs(mixer, (torch.empty(1, side, side, 16),))
        return count.by_op["bmm"]

    assert affinities(16, 2) == 16 * affinities(8, 2)
    assert affinities(16, 4) == 4 * affinities(8, 2)


@pytest.mark.parametrize("ratio", [1, 2])
def test_its_batch_norm_folds_away(ratio: int) -> None:
    mixer = create_mixer("strip_attention", 8, heads=2, ratio=ratio).eval()
    if mixer.norm is not None:
        nn.init.normal_(mixer.norm.running_mean)
        nn.init.uniform_(mixer.norm.running_var, 0.5, 2)
    x = torch.randn(1, 5, 6, 8)
    y = mixer(x)
    torch.testing.assert_close(fold_batch_norm(mixer)(x), y, rtol=1e-5, atol=1e-6)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in mixer.modules())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"heads": 3}, "heads=3, dim=8"),
        ({"ratio": 0}, "ratio must be at least 1, got 0"),
        ({"qk_dim": 0}, "qk_dim must be at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_mixer("strip_attention", 8, **options)
