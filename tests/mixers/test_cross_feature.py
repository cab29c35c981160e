"""Cross feature attention: linear, bounded, and not plain attention."""

import pytest
import torch

from gossamer import measure
from gossamer.mixers import create_mixer
from gossamer.mixers.cross_feature import unit


def test_it_is_the_product_written_out_in_the_dense_order() -> None:
    mixer = create_mixer("cross_feature", 24, heads=3).double()
    torch.nn.init.normal_(mixer.log_tau)
    for n in (5, 200):  # fewer and more tokens than the orders of multiplication break even at
        x = torch.randn(2, n, 24, dtype=torch.float64)
        q, k, v = (t.unflatten(-1, (3, 8)).transpose(1, 2) for t in mixer.qkv(x).chunk(3, -1))
        q, k = (t / t.square().sum(2, keepdim=True).sqrt() for t in (q, k))
        tau = (1 + mixer.log_tau.exp()).log()[:, None, None]
        y = ((q @ k.mT) / tau) @ v
        torch.testing.assert_close(mixer(x), mixer.proj(y.transpose(1, 2).flatten(2)), rtol=1e-5, atol=1e-8)


def test_the_temperature_starts_at_one() -> None:
    mixer = create_mixer("cross_feature", 8, heads=2)
    torch.testing.assert_close(torch.nn.functional.softplus(mixer.log_tau), torch.ones(2))


def test_the_cross_covariance_form_mixes_channels_by_a_softmax() -> None:
    mixer = create_mixer("cross_feature", 8, heads=2, mode="cross_covariance").double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in mixer.qkv(x).chunk(3, -1))
    weights = (unit(q).mT @ unit(k)).softmax(-1)  # a row for each channel of queries
    y = (v @ weights.mT).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer(x), mixer.proj(y), rtol=1e-6, atol=1e-8)


def test_outputs_are_bounded_by_the_values_without_a_softmax() -> None:
    mixer = create_mixer("cross_feature", 24, heads=3)
    torch.nn.init.eye_(mixer.proj.weight)
    torch.nn.init.zeros_(mixer.proj.bias)
    for n in (4, 50):
        for power in (-3, 0, 3):  # of the queries and keys, which are large or small without a bound
            torch.nn.init.normal_(mixer.qkv.weight[:48], std=10.0**power)
            x = torch.randn(2, n, 24)
            v, y = mixer.qkv(x)[..., 48:], mixer(x)
            # Lengths over the tokens: a channel of queries meets eight channels of keys, all of length one.
            assert bool((y.norm(dim=1) <= 8 * v.norm(dim=1) * 1.0001).all())
            # Unnormalised queries and keys would not keep it.
            if power == 3:
                q, k, v = (t[..., :8] for t in mixer.qkv(x).chunk(3, -1))
                assert bool(((q @ (k.mT @ v)).norm(dim=1) > 8 * v.norm(dim=1)).all())
    torch.testing.assert_close(unit(torch.randn(2, 3, 9, 8)).norm(dim=2), torch.ones(2, 3, 8))


def test_a_channel_of_zeros_gives_no_nan() -> None:
    mixer = create_mixer("cross_feature", 8, heads=2)
    with torch.no_grad():
        mixer.qkv.weight[:12] = 0
        mixer.qkv.bias[:12] = 0
    x = torch.zeros(1, 4, 4, 8, requires_grad=True)
    y = mixer(x)
    y.sum().backward()
    assert bool(y.isfinite().all())
    assert bool(x.grad.isfinite().all())


def test_cost_is_linear_in_tokens_and_quadratic_in_the_width_of_a_head() -> None:
    def cost(name: str, side: int, dim: int = 32) -> tuple[int, int]:
        with torch.device("meta"):
            mixer = create_mixer(name, dim, heads=4).eval()
            count = measure.macs(mixer, (torch.empty(1, side, side, dim),))
        products = 4 * side * side * dim * dim
        return count.total, count.total - products

    assert cost("cross_feature", 32)[0] == 4 * cost("cross_feature", 16)[0]
    assert cost("cross_feature", 64)[0] == 16 * cost("cross_feature", 16)[0]
    assert cost("attention", 32)[1] == 16 * cost("attention", 16)[1]
    assert cost("cross_feature", 32, 64)[1] == 4 * cost("cross_feature", 32, 32)[1]


def test_one_context_serves_all_tokens_in_the_score_form() -> None:
    mixer = create_mixer("context_score", 6).double()
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    y = (mixer(x) - mixer.proj.bias).flatten(1, 2)[0]
    assert torch.linalg.matrix_rank(y, rtol=1e-8) == 1
    v = mixer.qkv(x)[..., 12:].flatten(1, 2)
    q, k = (mixer.near(mixer.qkv(x)[..., :12]).chunk(2, -1)[i].mean(-1).sigmoid().flatten(1)[0] for i in (0, 1))
    context = (k @ v[0]) / k.sum()
    torch.testing.assert_close(y, q[:, None] * (mixer.proj.weight @ context), rtol=1e-6, atol=1e-8)


def test_heads_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="heads=4, dim=30"):
        create_mixer("cross_feature", 30, heads=4)
