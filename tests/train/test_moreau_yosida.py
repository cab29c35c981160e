"""The maps against brute force; the optimiser against AdamW, against a solved lasso, and on its own word."""

import pytest
import torch
from torch import nn

from gossamer.train.moreau_yosida import MoreauYosida, envelope, group_norms, prox

KINDS = [("l1", 1), ("l0", 1), ("rows", 1), ("rows", 2), ("columns", 3), ("blocks", 2)]


def parts(shape, penalty, size):
    """The places of each group."""
    rows, columns = shape
    high = {"rows": size, "columns": rows, "blocks": size}.get(penalty, 1)
    wide = {"rows": columns, "columns": size, "blocks": size}.get(penalty, 1)
    return [(slice(i, i + high), slice(j, j + wide)) for i in range(0, rows, high) for j in range(0, columns, wide)]


def objective(u, v, t, penalty, size):
    """`Omega(u) + ||u - v||^2 / (2 t)` of each candidate along the first axis, written out group by group."""
    total = (u - v).square().sum((1, 2)) / (2 * t)
    if penalty == "l0":
        return total + (u != 0).sum((1, 2))
    for i, j in parts(v.shape, penalty, size):
        total = total + u[:, i, j].square().sum((1, 2)).sqrt()
    return total


@pytest.mark.parametrize(("penalty", "size"), KINDS)
def test_no_point_around_the_proximal_map_is_better_and_it_is_the_numeric_minimum(penalty, size):
    v, t = torch.randn(4, 6, dtype=torch.double), 0.7
    v[:2] *= 0.1
    v[:, :3] *= 0.1
    u = prox(v, t, penalty, size)
    best = objective(u[None], v, t, penalty, size)
    # Everywhere: at random near and far, at zero, at v itself, and with single entries set to zero.
    near = u + torch.randn(4000, 4, 6, dtype=torch.double) * torch.logspace(-6, 0.5, 4000).double()[:, None, None]
    some = torch.where(torch.rand(2000, 4, 6) < 0.3, 0.0, near[:2000])
    tried = torch.cat((near, some, torch.zeros(1, 4, 6), v[None], u * torch.linspace(0, 2, 999)[:, None, None]))
    assert objective(tried, v, t, penalty, size).min() >= best - 1e-9
    for i, j in parts(v.shape, penalty, size):
        # Of all points as long as each other, the one in the direction of v is nearest to v: only the length is open.
        group = v[i, j].flatten()

        def value(s, group=group):
            return float((s * group).norm() + ((s - 1) * group).square().sum() / (2 * t))

        low, high = -1.0, 2.0
        for _ in range(100):
            third = (high - low) / 3
            low, high = (low, high - third) if value(low + third) < value(high - third) else (low + third, high)
        if penalty == "l0":  # not convex: all or nothing
            low = high = float(bool(group.square().sum() / (2 * t) > 1))
        torch.testing.assert_close(u[i, j].flatten(), (low + high) / 2 * group, atol=1e-6, rtol=0)
    assert (u == 0).any()
    assert (u != 0).any()


@pytest.mark.parametrize(("penalty", "size"), [k for k in KINDS if k[0] != "l0"])
def test_the_gradient_of_the_envelope_is_how_far_the_map_goes(penalty, size):
    v = torch.randn(4, 6, dtype=torch.double, requires_grad=True)
    (gradient,) = torch.autograd.grad(envelope(v, 0.4, penalty, size), v)
    want = (v - prox(v, 0.4, penalty, size)) / 0.4
    torch.testing.assert_close(gradient, want, atol=1e-6, rtol=0)
    assert torch.autograd.gradcheck(lambda x: envelope(x, 0.4, penalty, size), v, fast_mode=True)


def test_the_envelope_of_l1_is_hubers_function():
    v, t = torch.linspace(-3, 3, 101, dtype=torch.double), 0.8
    huber = torch.where(v.abs() <= t, v**2 / (2 * t), v.abs() - t / 2)
    torch.testing.assert_close(envelope(v, t), huber.sum())


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def follow(model, optimiser, steps, lr=None):
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    y = x[:, :3].sin()
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimiser.step()
    return nn.functional.mse_loss(model(x), y).item()


@pytest.mark.parametrize("weights", ["plain", "reweighted", "preconditioned"])
def test_without_a_penalty_it_is_adamw(weights):
    ours, theirs = net(), net()
    follow(ours, MoreauYosida(torch.optim.AdamW(ours.parameters(), lr=1e-2), weights=weights), 50)
    follow(theirs, torch.optim.AdamW(theirs.parameters(), lr=1e-2), 50)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_one_step_is_adamws_and_then_the_map_of_the_learning_rate_times_the_penalty():
    model, plain = net(), net()
    groups = [{"params": [model[0].weight], "shrink": 3.0}, {"params": [model[0].bias, *model[2].parameters()]}]
    follow(model, MoreauYosida(torch.optim.AdamW(groups, lr=1e-2)), 1)
    follow(plain, torch.optim.AdamW(plain.parameters(), lr=1e-2), 1)
    torch.testing.assert_close(model[0].weight, prox(plain[0].weight.detach(), 0.03), atol=1e-7, rtol=0)
    torch.testing.assert_close(model[2].weight, plain[2].weight)


def test_with_plain_gradient_steps_it_solves_the_lasso():
    n, p = 200, 100
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, p, generator=generator, dtype=torch.double)
    true = torch.zeros(p, dtype=torch.double)
    true[torch.randperm(p, generator=generator)[:10]] = torch.randn(10, generator=generator).double().sign() * 2
    y = x @ true + 0.1 * torch.randn(n, generator=generator, dtype=torch.double)
    w, shrink = nn.Parameter(torch.zeros(p, dtype=torch.double)), 0.1
    rate = 1 / float(torch.linalg.matrix_norm(x, 2) ** 2 / n)
    optimiser = MoreauYosida(torch.optim.SGD([{"params": [w], "shrink": shrink}], lr=rate))
    for _ in range(400):
        optimiser.zero_grad()
        ((x @ w - y).square().sum() / (2 * n)).backward()
        optimiser.step()
    # The same by coordinate descent: each coefficient in turn has a closed form.
    want = torch.zeros(p, dtype=torch.double)
    scale = x.square().sum(0) / n
    for _ in range(100):
        for j in range(p):
            rest = y - x @ want + x[:, j] * want[j]
            rho = x[:, j] @ rest / n
            want[j] = rho.sign() * max(float(rho.abs()) - shrink, 0.0) / scale[j]
    torch.testing.assert_close(w.detach(), want, atol=1e-6, rtol=0)
    assert torch.equal(w != 0, want != 0)
    assert torch.equal((want != 0).nonzero(), (true != 0).nonzero())


def test_zeros_are_exact_and_grow_with_the_penalty():
    shares = []
    for shrink in (0.0, 0.01, 0.05, 0.2):
        model = net()
        groups = [{"params": [model[0].weight, model[2].weight], "shrink": shrink}]
        follow(model, MoreauYosida(torch.optim.AdamW(groups, lr=1e-2)), 150)
        weight = torch.cat([model[0].weight.flatten(), model[2].weight.flatten()])
        shares.append((weight == 0).float().mean().item())
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[-1] > 0.3


@pytest.mark.parametrize("weights", ["reweighted", "preconditioned"])
def test_weighted_penalties_spare_the_large(weights):
    # One entry has a steep loss, the others none to speak of: it stays where the plain penalty would push it.
    def run(kind):
        w = nn.Parameter(torch.tensor([1.0, 0.05, 0.05]))
        pull = torch.tensor([1.0, 1e-6, 1e-6])
        optimiser = MoreauYosida(torch.optim.SGD([{"params": [w], "shrink": 0.05}], lr=0.1), weights=kind)
        if kind == "preconditioned":
            optimiser = MoreauYosida(torch.optim.Adam([{"params": [w], "shrink": 5e-3}], lr=0.02), weights=kind)
        for _ in range(60):
            optimiser.zero_grad()
            (pull * (w - 1) ** 2).sum().backward()
            optimiser.step()
        return w.detach()

    weighted = run(weights)
    assert bool((weighted[1:] == 0).all())
    assert weighted[0] > 0.85


def test_the_smooth_form_adds_the_gradient_of_the_envelope_and_makes_no_zeros():
    ours, theirs = net(), net()
    groups = [{"params": list(ours.parameters()), "shrink": 0.3}]
    follow(ours, MoreauYosida(torch.optim.SGD(groups, lr=0.1), smooth=0.05), 1)
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(2))
    loss = nn.functional.mse_loss(theirs(x), x[:, :3].sin())
    (loss + 0.3 * sum(envelope(p, 0.05) for p in theirs.parameters())).backward()
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
        assert bool((a != 0).all())


@pytest.mark.parametrize("penalty", ["l1", "rows"])
def test_what_is_longer_than_the_trim_is_not_shrunk(penalty):
    model, plain = net(), net()
    before = model[0].weight.detach().clone()
    lengths = before.abs() if penalty == "l1" else before.norm(dim=1, keepdim=True)
    trim = float(lengths.median())
    groups = [{"params": [model[0].weight], "shrink": 5.0, "penalty": penalty, "trim": trim}]
    follow(model, MoreauYosida(torch.optim.SGD(groups, lr=1e-3)), 1)
    follow(plain, torch.optim.SGD(plain.parameters(), lr=1e-3), 1)
    after = plain[0].weight.detach()
    long = ((after.abs() if penalty == "l1" else after.norm(dim=1, keepdim=True)) > trim).expand_as(after)
    torch.testing.assert_close(model[0].weight, torch.where(long, after, prox(after, 5e-3, penalty)))
    assert bool(long.any())
    assert not bool(long.all())


@pytest.mark.parametrize(("penalty", "size"), [("rows", 1), ("columns", 2), ("blocks", 2)])
def test_whole_groups_go_and_the_compact_matrix_gives_the_same(penalty, size):
    model = net()
    layer = model[2] if penalty == "columns" else model[0]
    shrink = 1.6 if penalty == "blocks" else 2.5
    groups = [{"params": [layer.weight], "shrink": shrink, "penalty": penalty, "size": size}]
    follow(model, MoreauYosida(torch.optim.AdamW(groups, lr=1e-2)), 60)
    weight = layer.weight.detach()
    lengths = group_norms(weight, penalty, size)
    assert 0 < int((lengths == 0).sum()) < lengths.numel()
    assert torch.equal(weight != 0, (lengths > 0).repeat_interleave(weight.shape[0] // lengths.shape[0], 0)
                       .repeat_interleave(weight.shape[1] // lengths.shape[1], 1))  # fmt: skip
    x = torch.randn(5, weight.shape[1])
    rows, columns = weight.any(1), weight.any(0)
    compact = torch.zeros(5, weight.shape[0]).index_add_(
        1, rows.nonzero()[:, 0], x[:, columns] @ weight[rows][:, columns].T
    )
    torch.testing.assert_close(compact, x @ weight.T, atol=1e-6, rtol=0)


def test_what_is_frozen_keeps_its_zeros_while_the_rest_goes_on():
    model = net()
    groups = [{"params": [model[0].weight], "shrink": 0.1}, {"params": list(model[2].parameters())}]
    optimiser = MoreauYosida(torch.optim.AdamW(groups, lr=1e-2))
    follow(model, optimiser, 100)
    before = model[0].weight.detach().clone()
    optimiser.param_groups[0].update(shrink=0.0, frozen=True)
    follow(model, optimiser, 30)
    assert 0 < int((before == 0).sum()) < before.numel()
    assert torch.equal(model[0].weight == 0, before == 0)
    assert not torch.equal(model[0].weight, before)
    optimiser.param_groups[0]["frozen"] = False
    follow(model, optimiser, 30)
    assert not torch.equal(model[0].weight == 0, before == 0)


def test_a_run_goes_on_from_its_state():
    def make(model):
        groups = [{"params": list(model.parameters()), "shrink": 0.02}]
        return MoreauYosida(torch.optim.AdamW(groups, lr=1e-2), weights="reweighted")

    whole, cut = net(), net()
    follow(whole, make(whole), 30)
    first = make(cut)
    follow(cut, first, 15)
    second = make(cut)
    second.load_state_dict(first.state_dict())
    follow(cut, second, 15)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedulers_drive_it():
    model = net()
    optimiser = MoreauYosida(torch.optim.SGD(model.parameters(), lr=1.0))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.5)
    follow(model, optimiser, 1)
    schedule.step()
    assert optimiser.base.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("group", "options", "message"),
    [
        ({"shrink": -1.0}, {}, "shrink must be at least 0, got -1"),
        ({"shrink": 1.0, "penalty": "l3"}, {}, "penalty must be one of l1, l0, rows"),
        ({"shrink": 1.0, "penalty": "blocks", "size": 5}, {}, "needs a matrix that it divides"),
        ({"shrink": 1.0, "penalty": "rows"}, {"weights": "preconditioned"}, "need penalty l1 or l0"),
        ({}, {"weights": "heavy"}, "weights must be one of"),
        ({}, {"smooth": 0.0}, "smooth must be above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(group, options, message):
    weight = nn.Parameter(torch.randn(4, 6))
    with pytest.raises(ValueError, match=message):
        MoreauYosida(torch.optim.SGD([{"params": [weight], **group}], lr=1.0), **options)
    with pytest.raises(ValueError, match="t must be above 0"):
        prox(torch.randn(3), 0.0)
    adam = MoreauYosida(torch.optim.SGD([{"params": [weight], "shrink": 1.0}], lr=1.0), weights="preconditioned")
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="Adam's second moment"):
        adam.step()
