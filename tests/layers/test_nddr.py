"""NDDR: what it contains as special cases, what it costs, and whom its gradient reaches."""

import pytest
import torch
from torch import nn

from gossamer import measure
from gossamer.layers.nddr import Nddr

PLAIN = {"norm": None, "act": nn.Identity}


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("tasks", [2, 3])
def test_the_mixture_is_the_product_with_all_features(grid: tuple[int, ...], tasks: int) -> None:
    layer = Nddr(4, tasks).eval()
    for p in layer.parameters():
        nn.init.normal_(p)
    features = [torch.randn(2, *grid, 4) for _ in range(tasks)]
    mixed = layer(features)
    for k in range(tasks):
        weight = layer.proj[k].weight.view(4, tasks, 4)
        y = sum(features[j] @ weight[:, j].T for j in range(tasks))
        y = y / (1 + layer.norm[k].eps) ** 0.5 * layer.norm[k].weight + layer.norm[k].bias
        torch.testing.assert_close(mixed[k], y.relu(), rtol=1e-4, atol=1e-5)


def test_without_the_others_nothing_is_shared_and_in_equal_parts_everything() -> None:
    features = [torch.randn(2, 3, 3, 6) for _ in range(3)]
    for own, y in zip(features, Nddr(6, 3, alpha=1.0, beta=0.0, **PLAIN)(features), strict=True):
        torch.testing.assert_close(y, own, rtol=1e-6, atol=1e-6)
    one, two, three = Nddr(6, 3, alpha=1 / 3, **PLAIN)(features)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one, three)


def test_each_hears_mostly_itself_at_first_and_the_shares_add_up() -> None:
    layer = Nddr(5, 3)
    weight = layer.proj[1].weight.view(5, 3, 5)
    torch.testing.assert_close(weight[:, 1], 0.9 * torch.eye(5))
    torch.testing.assert_close(weight[:, 0], 0.05 * torch.eye(5))
    torch.testing.assert_close(weight.sum(1), torch.eye(5))
    assert bool((Nddr(5, 3, start="xavier").proj[0].weight != 0).all())


def test_diagonal_products_are_cross_stitch_units() -> None:
    stitch = torch.randn(2, 2)
    layer = Nddr(4, 2, **PLAIN)
    with torch.no_grad():
        for k in range(2):
            layer.proj[k].weight.copy_(torch.cat([stitch[k, j] * torch.eye(4) for j in range(2)], 1))
    a, b = torch.randn(2, 3, 6, 4)
    for k, y in enumerate(layer([a, b])):
        torch.testing.assert_close(y, stitch[k, 0] * a + stitch[k, 1] * b)


@pytest.mark.parametrize("tasks", [2, 3])
def test_it_costs_what_its_formula_says(tasks: int) -> None:
    with torch.device("meta"):
        layer = Nddr(512, tasks)
        features = [torch.empty(1, 5, 7, 512) for _ in range(tasks)]
    assert sum(p.numel() for p in layer.parameters()) == tasks * (tasks * 512**2 + 2 * 512)
    assert measure.macs(layer, (features,)).total == tasks**2 * 512**2 * 35
    if tasks == 2:
        assert sum(p.numel() for p in layer.parameters()) == 1_050_624


@pytest.mark.parametrize(("beta", "reached"), [(0.1, True), (0.0, False)])
def test_one_tasks_gradient_reaches_the_other_network_only_through_its_share(beta: float, reached: bool) -> None:
    a, b = torch.rand(2, 3, 3, 4, requires_grad=True), torch.rand(2, 3, 3, 4, requires_grad=True)
    own, other = torch.autograd.grad(Nddr(4, 2, beta=beta).eval()([a, b])[0].sum(), [a, b])
    assert own.abs().sum() > 0
    assert bool(other.abs().sum() > 0) == reached


def test_a_gate_begins_closed_and_lets_the_mixture_in_when_it_opens() -> None:
    layer = Nddr(4, 2, norm=nn.LayerNorm, act=nn.Identity, gated=True)
    a, b = torch.randn(2, 2, 6, 4)
    assert torch.equal(layer([a, b])[0], a)
    with torch.no_grad():
        layer.gate[0].fill_(0.5)
    one, two = layer([a, b])
    mixture = nn.functional.layer_norm(0.9 * a + 0.1 * b, (4,))
    torch.testing.assert_close(one, a + 0.5 * mixture)
    assert torch.equal(two, b)
    layer([a, b])[1].sum().backward()
    assert layer.gate[1].grad.abs().sum() > 0


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2, got 1"):
        Nddr(4, 1)
    with pytest.raises(ValueError, match="one shape"):
        Nddr(4, 2)([torch.randn(1, 3, 4), torch.randn(1, 2, 4)])
    with pytest.raises(ValueError, match="with 4 channels"):
        Nddr(4, 2)([torch.randn(1, 3, 5), torch.randn(1, 3, 5)])
    with pytest.raises(ValueError, match="expected 2 features"):
        Nddr(4, 2)([torch.randn(1, 3, 4)] * 3)
