import itertools
import math

import pytest
import torch
from jaxtyping import config

from gossamer.ops import patterns as p

torch.manual_seed(0)


def qkv(n, *, b=2, h=3, d=4, e=5):
    g = torch.Generator().manual_seed(n)
    return [torch.randn(b, h, n, w, generator=g, dtype=torch.double, requires_grad=True) for w in (d, d, e)]


def same(fast, slow, inputs, tolerance=1e-9):
    """Equal, and equal in the gradient of every input."""
    torch.testing.assert_close(fast, slow, atol=tolerance, rtol=0)
    out = torch.randn_like(slow)
    for one, two in zip(
        torch.autograd.grad(fast, inputs, out, retain_graph=True), torch.autograd.grad(slow, inputs, out), strict=True
    ):
        torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


# each pattern against its definition in words, as a plain function of integers
DEFINITIONS = {
    "causal": (p.causal(), lambda q, k: k <= q),
    "window": (p.window(5), lambda q, k: q // 5 == k // 5),
    "band": (p.band(3, 2), lambda q, k: -3 <= k - q <= 2),
    "strided": (p.strided(4), lambda q, k: abs(q - k) % 4 == 0),
    "summary": (p.summary(5, 2), lambda q, k: k % 5 in (3, 4)),
    "fixed": (p.fixed(5, 2, 1), lambda q, k: q // 5 == k // 5 or k % 5 in (0, 3, 4)),
    "global": (p.global_tokens(2), lambda q, k: q < 2 or k < 2),
    "sparse transformer": (
        (p.fixed(5, 1) & p.causal()).shift(-1, -1) | p.global_tokens(1),
        lambda q, k: q == 0 or k == 0 or (k <= q and ((q - 1) // 5 == (k - 1) // 5 or (k - 1) % 5 == 4)),
    ),
    "negation": (~p.causal() & p.band(3, 3), lambda q, k: q < k <= q + 3),
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_pattern_is_its_definition_dense_and_as_a_block_mask(name):
    pattern, definition = DEFINITIONS[name]
    n_q, n_k = 23, 17
    expected = torch.tensor([[definition(q, k) for k in range(n_k)] for q in range(n_q)])
    mask = p.dense_mask(pattern, n_q, n_k)
    assert mask.shape == (1, 1, n_q, n_k)
    assert torch.equal(mask[0, 0], expected)
    blocks = p.block_mask(pattern, n_q, n_k, block=8)
    for i, j in itertools.product(range(math.ceil(n_q / 8)), range(math.ceil(n_k / 8))):
        tile = expected[8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
        assert bool(blocks.to_dense()[0, 0, i, j]) == bool(tile.any())


def test_patterns_tell_samples_and_heads_apart():
    flags = torch.tensor([[True, False, False], [False, False, True]])
    marked = p.dense_mask(p.marked_tokens(flags), 3, 3)
    valid = p.dense_mask(p.valid_keys(flags), 3, 3)
    packed = p.dense_mask(p.documents(torch.tensor([[0, 0, 1], [0, 1, 1]])), 3, 3)
    span = p.dense_mask(p.spans([0, 2], [1, 0]), 3, 3)
    for b, q, k in itertools.product(range(2), range(3), range(3)):
        assert marked[b, 0, q, k] == (flags[b, q] or flags[b, k])
        assert valid[b, 0, q, k] == flags[b, k]
        assert packed[b, 0, q, k] == ([[0, 0, 1], [0, 1, 1]][b][q] == [[0, 0, 1], [0, 1, 1]][b][k])
        assert span[0, b, q, k] == ((q <= k <= q + 1) if b == 0 else (q - 2 <= k <= q))
    both = p.valid_keys(flags) & p.spans([0, 2])
    assert (both.batch, both.heads) == (2, 2)


def test_selected_blocks_are_seen_and_no_others():
    index = torch.tensor([[[[0, 2], [1, -1], [2, 0]]]])
    mask = p.dense_mask(p.selected(index, 10, q_block=3, k_block=4), 9, 10)[0, 0]
    for q, k in itertools.product(range(9), range(10)):
        assert bool(mask[q, k]) == (k // 4 in index[0, 0, q // 3].tolist())


def test_bigbird_rows_see_ends_neighbours_and_random_blocks_of_their_own():
    index = p.bigbird_blocks(12, random=3, heads=2, reach=8, generator=torch.Generator().manual_seed(1))
    for head, row in itertools.product(range(2), range(12)):
        blocks = [i for i in index[0, head, row].tolist() if i >= 0]
        assert len(set(blocks)) == len(blocks)
        near = {0, 11, *(i for i in (row - 1, row, row + 1) if 0 <= i <= 11)}
        assert near <= set(blocks)
        drawn = set(blocks) - near
        assert len(drawn) == 3
        assert max(drawn) < 8
    assert not torch.equal(index[0, 0], index[0, 1])
    mask = p.dense_mask(p.bigbird(index, 46, 4), 46, 46)
    assert mask[:, :, :4].all()
    assert mask[:, :, 44:].all()
    assert not mask[:, :, 8:40].all()


@pytest.mark.parametrize("n", [1, 7, 12, 29])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_local_attention_equals_dense_attention_inside_windows(n, causal, padded):
    inputs = qkv(n)
    pattern = p.window(4) & p.causal() if causal else p.window(4)
    valid = torch.rand(2, n) < 0.6 if padded else None
    if padded:
        pattern = pattern & p.valid_keys(valid)
    fast = p.local_attention(*inputs, 4, causal=causal, mask=valid)
    same(fast, p.pattern_reference(*inputs, p.dense_mask(pattern, n, n)), inputs)


@pytest.mark.parametrize(("n", "back", "ahead"), [(1, 2, 2), (9, 3, 0), (40, 2, 3), (101, 20, 15), (70, 0, 0)])
@pytest.mark.parametrize("padded", [False, True])
def test_band_attention_equals_dense_attention_under_the_band(n, back, ahead, padded):
    inputs = qkv(n)
    pattern = p.band(back, ahead)
    valid = torch.rand(2, n) < 0.6 if padded else None
    if padded:
        pattern = pattern & p.valid_keys(valid)
    fast = p.band_attention(*inputs, back, ahead, mask=valid)
    same(fast, p.pattern_reference(*inputs, p.dense_mask(pattern, n, n)), inputs)


@pytest.mark.parametrize("n", [4, 29, 48])
@pytest.mark.parametrize("padded", [False, True])
def test_gathered_bigbird_equals_dense_bigbird(n, padded):
    inputs = qkv(n)
    index = p.bigbird_blocks(-(-n // 4), random=2, heads=3, generator=torch.Generator().manual_seed(2))
    pattern = p.bigbird(index, n, 4)
    valid = torch.rand(2, n) < 0.8 if padded else None
    if padded:
        pattern = pattern & p.valid_keys(valid)
    fast = p.block_attention(*inputs, index, 4, dense_rows=(0, -1), mask=valid)
    same(fast, p.pattern_reference(*inputs, p.dense_mask(pattern, n, n)), inputs)


def test_block_attention_follows_an_index_per_sample():
    inputs = qkv(15)
    index = torch.stack([torch.stack([torch.randperm(5)[:2] for _ in range(5)]) for _ in range(6)]).view(2, 3, 5, 2)
    mask = p.dense_mask(p.selected(index, 15, q_block=3, k_block=3), 15, 15)
    same(p.block_attention(*inputs, index, 3), p.pattern_reference(*inputs, mask), inputs)


def test_flex_without_gradient_and_with_it_equals_the_dense_form():
    q, k, v = (t.detach().float() for t in qkv(40, d=16, e=16))
    pattern = p.band(5, 2) | p.global_tokens(1)
    expected = p.pattern_reference(q, k, v, p.dense_mask(pattern, 40, 40))
    with torch.no_grad():
        for given in (pattern, p.block_mask(pattern, 40, 40)):
            torch.testing.assert_close(p.flex(q, k, v, given), expected, atol=1e-5, rtol=0)
    inputs = qkv(40)
    mask = p.dense_mask(pattern, 40, 40)
    for given in (pattern, p.block_mask(pattern, 40, 40)):
        same(p.flex(*inputs, given), p.pattern_reference(*inputs, mask), inputs)


def test_flex_falls_back_to_dense_where_nothing_compiles(monkeypatch):
    monkeypatch.setattr(p, "_no_compiler", lambda device: True)
    with torch.no_grad():
        inputs = qkv(9)
        out = p.flex(*inputs, p.causal())
        expected = p.pattern_reference(*inputs, p.dense_mask(p.causal(), 9, 9))
    torch.testing.assert_close(out, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: p.window(0),
        lambda: p.band(-1, 2),
        lambda: p.summary(4, 5),
        lambda: p.spans([1, 2], [1]),
        lambda: p.spans([1, -2]),
        lambda: p.spans([1, 2]) & p.spans([1, 2, 3]),
        lambda: p.selected(torch.tensor([[[[3]]]]), 12, k_block=4),
        lambda: p.block_attention(*qkv(9), torch.zeros(1, 1, 2, 1, dtype=torch.long), 4),
        lambda: p.local_attention(*qkv(9), 0),
        lambda: p.bigbird_blocks(4, random=-1),
    ],
)
def test_impossible_patterns_are_refused(call):
    with pytest.raises(ValueError, match=r"got|must"):
        call()


class Gathered(torch.nn.Module):
    def forward(self, q, k, v):
        return p.local_attention(q, k, v, 8, causal=True), p.band_attention(q, k, v, 5, 3)


@pytest.fixture
def symbolic_sizes():
    """A symbolic size is no `int`, so the run-time check of annotations is off while a graph is traced."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def test_a_graph_exported_at_a_whole_number_of_windows_serves_every_length(tmp_path, symbolic_sizes):
    ort = pytest.importorskip("onnxruntime")
    inputs = [torch.randn(1, 2, 64, 4) for _ in range(3)]
    n = torch.export.Dim("n", min=9, max=4096)
    torch.onnx.export(
        Gathered().eval(),
        tuple(inputs),
        tmp_path / "p.onnx",
        dynamo=True,
        dynamic_shapes=({2: n},) * 3,
        verbose=False,
    )
    session = ort.InferenceSession(tmp_path / "p.onnx", providers=["CPUExecutionProvider"])
    for length in (64, 77):
        inputs = [torch.randn(1, 2, length, 4) for _ in range(3)]
        out = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)})
        for one, two in zip(out, Gathered()(*inputs), strict=True):
            torch.testing.assert_close(torch.from_numpy(one), two, atol=1e-5, rtol=0)
