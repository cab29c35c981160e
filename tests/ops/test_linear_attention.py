import functools

import pytest
import torch

from gossamer.ops import linear_attention as la

W = la.orthogonal_projection(8, 4, generator=torch.Generator().manual_seed(5), dtype=torch.double)
MAPS = {
    "elu1": la.elu1,
    "relu_eps": la.relu_eps,
    "exponential": la.exponential,
    "squared_relu": la.squared_relu,
    "pair": (la.elu1, la.relu),
    "favor": (
        functools.partial(la.softmax_features, projection=W, is_query=True),
        functools.partial(la.softmax_features, projection=W, is_query=False),
    ),
}


def draw(n_q, n_k, *, lead=(2, 3), d=4, e=5):
    g = torch.Generator().manual_seed(n_q + n_k)
    shapes = ((n_q, d), (n_k, d), (n_k, e))
    return [torch.randn(*lead, *x, generator=g, dtype=torch.double, requires_grad=True) for x in shapes]


def same(fast, slow, inputs):
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-9)
    out = torch.randn_like(slow)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, out, retain_graph=True), torch.autograd.grad(slow, inputs, out), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=1e-8)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(("n_q", "n_k"), [(2, 3), (40, 33)])  # the first is multiplied densely, the second is not
@pytest.mark.parametrize("masked", [False, True])
def test_both_orders_of_multiplication_equal_the_dense_form(name, n_q, n_k, masked):
    inputs = draw(n_q, n_k)
    mask = None
    if masked:
        mask = torch.rand(2, 1, n_k) < 0.7
        mask[..., 0] = True
    fast = la.linear_attention(*inputs, MAPS[name], mask=mask)
    same(fast, la.linear_attention_reference(*inputs, MAPS[name], mask=mask), inputs)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("n", [1, 5, 16, 37])
@pytest.mark.parametrize("normalise", [True, False])
def test_causal_chunks_equal_the_dense_lower_triangle(name, n, normalise):
    inputs = draw(n, n)
    fast, _ = la.causal_linear_attention(*inputs, MAPS[name], chunk=8, normalise=normalise)
    slow = la.linear_attention_reference(*inputs, MAPS[name], causal=True, normalise=normalise)
    same(fast, slow, inputs)


def test_causal_attention_honours_a_mask_through_the_general_call():
    inputs = draw(150, 150, lead=(2,))
    mask = torch.rand(2, 150) < 0.5
    mask[:, 0] = True
    fast = la.linear_attention(*inputs, causal=True, mask=mask)
    same(fast, la.linear_attention_reference(*inputs, causal=True, mask=mask), inputs)


def test_a_state_carries_on_where_the_last_piece_ended_and_steps_equal_the_full_pass():
    q, k, v = draw(30, 30)
    whole, final = la.causal_linear_attention(q, k, v, chunk=7)
    first, state = la.causal_linear_attention(q[..., :13, :], k[..., :13, :], v[..., :13, :], chunk=4)
    second, end = la.causal_linear_attention(q[..., 13:, :], k[..., 13:, :], v[..., 13:, :], state=state, chunk=8)
    torch.testing.assert_close(torch.cat([first, second], -2), whole, atol=1e-9, rtol=0)
    for t in range(13, 30):
        y, state = la.step(state, q[..., t, :], k[..., t, :], v[..., t, :])
        torch.testing.assert_close(y, whole[..., t, :], atol=1e-9, rtol=0)
    for a, b, c in zip(state, end, final, strict=True):
        torch.testing.assert_close(a, c, atol=1e-9, rtol=0)
        torch.testing.assert_close(b, c, atol=1e-9, rtol=0)


def test_favor_features_approach_softmax_as_their_number_grows():
    q, k, v = (t.detach() / 2 for t in draw(12, 12, lead=(), d=8))
    exact = (q @ k.mT * 8**-0.5).softmax(-1) @ v
    errors = []
    for m in (16, 4096):
        w = la.orthogonal_projection(m, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
        maps = tuple(functools.partial(la.softmax_features, projection=w, is_query=x) for x in (True, False))
        errors.append(float((la.linear_attention(q, k, v, maps) - exact).abs().mean()))
    assert errors[1] < 0.01
    assert errors[1] < errors[0] / 4


def test_projections_are_orthogonal_within_groups_and_have_gaussian_norms():
    w = la.orthogonal_projection(64 * 50, 64, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    group = w[:64]
    gram = group @ group.mT
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-9
    assert float(w.norm(dim=1).square().mean()) == pytest.approx(64, rel=0.02)


def test_feature_maps_are_their_formulas():
    x = torch.tensor([[-2.0, -0.5, 0.0, 3.0]])
    e = torch.tensor(1.0).exp()
    torch.testing.assert_close(la.elu1(x), torch.tensor([[e**-2, e**-0.5, 1, 4]]))
    torch.testing.assert_close(la.relu_eps(x), torch.tensor([[1e-3, 1e-3, 1e-3, 3.001]]))
    torch.testing.assert_close(la.squared_relu(x), torch.tensor([[0.0, 0, 0, 9]]))
    torch.testing.assert_close(la.relu(x), torch.tensor([[0.0, 0, 0, 3]]))
    torch.testing.assert_close(la.exponential(x), torch.tensor([[e**-2, e**-0.5, 1, e**3]]))
    assert la.identity(x) is x


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        la.causal_linear_attention(*draw(3, 3), chunk=0)
    with pytest.raises(ValueError, match="m and d must be at least 1"):
        la.orthogonal_projection(0, 4)
