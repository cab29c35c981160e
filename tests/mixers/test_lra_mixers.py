"""The attentions of Long Range Arena: each equal to dense attention, or to its definition, written out."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import measure
from gossamer.mixers import create_mixer
from gossamer.mixers.base import Mixer
from gossamer.mixers.sequence import SequenceMixer, head_tensors

TOKENS = (1, 7, 40, 53)
SMALL = {
    "local": {"window": 10},
    "sparse": {"block": 10, "last": 2},
    "longformer": {"window": 8},
    "bigbird": {"block": 4, "random": 2},
    "linear": {},
    "performer": {},
    "linformer": {"rank": 4},
    "sinkhorn": {"block": 10},
    "synthesizer": {},
}
ALL = [
    *SMALL.items(),
    ("longformer", {"window": 5, "global_tokens": 0}),
    ("longformer", {"window": 6, "global_tokens": 3, "qkv_bias": True}),
    ("performer", {"kernel": "softmax"}),
    ("sinkhorn", {"block": 7, "iterations": 3}),
    ("synthesizer", {"mode": "factorized", "rank": 3}),
    ("synthesizer", {"mode": "dense"}),
]


def build(name: str, options: dict, longest: int = 64, dim: int = 12) -> SequenceMixer:
    """Three heads of width 5, which is not `dim / heads`."""
    return create_mixer(name, dim, heads=3, head_dim=5, grid=(longest,), **options).double()


def tokens(n: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, n, 12, dtype=torch.float64)
    mask = torch.rand(2, n) > 0.3
    mask[0], mask[:, 0] = True, True
    return x, mask


def heads_of(mixer: SequenceMixer, x: Tensor, linear: torch.nn.Linear | None = None) -> list[Tensor]:
    q, k, v = (linear or mixer.qkv)(x).chunk(3, -1)
    return [t.unflatten(-1, (3, 5)).transpose(1, 2) for t in (q, k, v)]


def dense(mixer: SequenceMixer, x: Tensor, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """`W_o softmax(q k^T / sqrt(d) + bias where seen) v`, with every logit written out."""
    q, k, v = heads_of(mixer, x)
    logits = (q @ k.mT / math.sqrt(5) + bias).masked_fill(~seen, float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)
    return mixer.proj((weights @ v).transpose(1, 2).flatten(2))


def rule(name: str, mixer: SequenceMixer, n: int) -> Tensor:
    """Who may see whom, by the papers' words, pair by pair."""
    seen = torch.zeros(3, n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            if name == "local":
                seen[:, i, j] = i // 10 == j // 10
            elif name == "sparse":
                seen[:, i, j] = i // 10 == j // 10 or j % 10 in (0, 8, 9) or i == 0 or j == 0
            elif name == "longformer":
                seen[:, i, j] = -3 <= j - i <= 4
            elif name == "bigbird":
                row, column, last = i // 4, j // 4, (n - 1) // 4
                seen[:, i, j] = row in (0, last) or column in (0, last) or abs(row - column) <= 1
                for head in range(3):
                    seen[head, i, j] |= column in mixer.table(last + 1)[0, head, row].tolist()
    return seen


@pytest.mark.parametrize("n", TOKENS)
@pytest.mark.parametrize("name", ["local", "sparse", "longformer", "bigbird"])
def test_sparse_patterns_equal_dense_attention_under_their_mask(name: str, n: int) -> None:
    mixer = build(name, SMALL[name] | ({"global_tokens": 0} if name == "longformer" else {}))
    x, mask = tokens(n)
    seen = rule(name, mixer, n)
    torch.testing.assert_close(mixer(x), dense(mixer, x, seen))
    torch.testing.assert_close(mixer(x, mask=mask), dense(mixer, x, seen & mask[:, None, None]))


@pytest.mark.parametrize("window", [6, 200])
def test_global_tokens_of_longformer_read_all_with_products_of_their_own(window: int) -> None:
    mixer = build("longformer", {"window": window, "global_tokens": 2})
    x, mask = tokens(53)
    place = torch.arange(53)
    offset = place - place[:, None]
    seen = ((offset >= -((window - 1) // 2)) & (offset <= window // 2)) | (place < 2)
    near = dense(mixer, x, seen & mask[:, None, None])
    q, k, v = heads_of(mixer, x, mixer.qkv_global)
    weights = (q @ k.mT / math.sqrt(5)).masked_fill(~mask[:, None, None], float("-inf")).softmax(-1)
    far = mixer.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, mask=mask), torch.cat((far[:, :2], near[:, 2:]), 1))


@pytest.mark.parametrize("kernel", ["linear", "relu", "softmax"])
@pytest.mark.parametrize("n", TOKENS)
def test_linear_attentions_equal_their_quadratic_form(kernel: str, n: int) -> None:
    mixer = build("linear", {}) if kernel == "linear" else build("performer", {"kernel": kernel, "features": 9})
    x, mask = tokens(n)
    q, k, v = heads_of(mixer, x)
    if kernel == "linear":
        weights = (F.elu(q) + 1) @ (F.elu(k) + 1).mT
    elif kernel == "relu":
        weights = (q.relu() + 1e-3) @ (k.relu() + 1e-3).mT
    else:

        def phi(t: Tensor) -> Tensor:
            return (t / 5**0.25 @ mixer.projection.mT - t.square().sum(-1, keepdim=True) / 5**0.5 / 2).exp()

        weights = phi(q) @ phi(k).mT
    weights = weights * mask[:, None, None]
    y = weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v
    want = mixer.proj(y.transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, mask=mask), want, atol=1e-3 if kernel == "softmax" else 1e-5, rtol=1e-4)


def test_random_softmax_features_approach_softmax_attention() -> None:
    x = 0.5 * torch.randn(1, 30, 12, dtype=torch.float64)

    def error(features: int) -> float:
        mixer = build("performer", {"kernel": "softmax", "features": features})
        return (mixer(x) - dense(mixer, x, torch.ones(30, 30, dtype=torch.bool))).norm().item()

    assert error(4000) < 0.3 * error(5)


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_linear_attention_decodes_step_by_step(name: str) -> None:
    mixer = build(name, {"causal": True})
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    state = mixer.initial_state(2, dtype=torch.float64)
    for t, want in enumerate(mixer(x).unbind(1)):
        got, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(got, want)


def test_linformer_is_attention_over_projected_keys_and_values() -> None:
    mixer = build("linformer", SMALL["linformer"])
    x, mask = tokens(53)
    q, k, v = heads_of(mixer, x)
    k, v = (torch.einsum("rn,bhnd,bn->bhrd", mixer.slots[:, :53], t, mask.double()) for t in (k, v))
    y = (q @ k.mT / math.sqrt(5)).softmax(-1) @ v
    torch.testing.assert_close(mixer(x, mask=mask), mixer.proj(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("mode", ["random", "factorized", "dense"])
def test_synthesizer_adds_its_own_logits_to_the_dot_products(mode: str) -> None:
    mixer = build("synthesizer", {"mode": mode, "rank": 3})
    x, mask = tokens(40)
    if mode == "random":
        bias = mixer.logits[:, :40, :40]
    elif mode == "factorized":
        bias = torch.einsum("hir,hrj->hij", mixer.left[:, :40], mixer.right[:, :, :40])
    else:
        hidden = (torch.einsum("bnc,hdc->bhnd", x, mixer.inner_weight) + mixer.inner_bias[:, None]).relu()
        bias = torch.einsum("bhid,hjd->bhij", hidden, mixer.row_weight[:, :40]) + mixer.row_bias[:, None, :40]
    torch.testing.assert_close(mixer(x, mask=mask), dense(mixer, x, mask[:, None, None], bias))


def test_sinkhorn_reads_its_own_block_and_the_block_the_permutation_puts_there() -> None:
    mixer = build("sinkhorn", SMALL["sinkhorn"])
    x, _ = tokens(40)
    q, k, v = (t.unflatten(2, (4, 10)) for t in heads_of(mixer, x))
    permute = (k.sum(3) @ mixer.sort_weight[:, :4].mT + mixer.sort_bias[:, None, :4]).softmax(-1)
    y = torch.zeros_like(q)
    for i in range(4):
        moved_k, moved_v = (sum(permute[:, :, i, j, None, None] * t[:, :, j] for j in range(4)) for t in (k, v))
        own = (q[:, :, i] @ k[:, :, i].mT / math.sqrt(5)).softmax(-1) @ v[:, :, i]
        y[:, :, i] = own + (q[:, :, i] @ moved_k.mT / math.sqrt(5)).softmax(-1) @ moved_v
    torch.testing.assert_close(mixer(x), mixer.proj(y.flatten(2, 3).transpose(1, 2).flatten(2)))


def test_sinkhorn_iterations_balance_rows_and_columns() -> None:
    mixer = build("sinkhorn", {"block": 10, "iterations": 30})
    sums = torch.randn(2, 3, 6, 5, dtype=torch.float64)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    permute = mixer._permutation(sums, valid)
    torch.testing.assert_close(permute[:, :, :4].sum(-1), torch.ones(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(
        permute[:, :, :4, :4].sum(-2), torch.ones(2, 3, 4, dtype=torch.float64), atol=1e-3, rtol=0
    )
    assert permute[..., 4:].abs().max() == 0


@pytest.mark.parametrize(("name", "options"), ALL)
def test_what_the_mask_leaves_out_is_never_read(name: str, options: dict) -> None:
    mixer = build(name, options)
    x, mask = tokens(40)
    want = mixer(x, mask=mask)
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    # BigBird lays its blocks over the whole sequence, so more padding is another pattern.
    more = 0 if name == "bigbird" else 13
    longer = F.pad(other, (0, 0, 0, more), value=0.7)
    got = mixer(longer, mask=F.pad(mask, (0, more)))[:, :40]
    torch.testing.assert_close(got[mask], want[mask], atol=1e-5, rtol=1e-5)
    if name not in ("linear", "performer"):
        nothing = mixer(x, mask=torch.zeros_like(mask))
        assert nothing.isfinite().all()


@pytest.mark.parametrize(("name", "options"), ALL)
def test_every_mixer_reads_more_than_the_token_itself(name: str, options: dict) -> None:
    mixer = build(name, options)
    x = torch.randn(1, 20, 12, dtype=torch.float64, requires_grad=True)
    mixer(x)[0, 11].sum().backward()
    assert x.grad[0, 10].abs().max() > 0


@pytest.mark.parametrize(("name", "options"), ALL)
def test_maps_times_values_is_the_output(name: str, options: dict) -> None:
    mixer = build(name, options)
    x, mask = tokens(40)
    values = heads_of(mixer, x)[2]
    y = mixer.maps(x, mask) @ values
    if name == "longformer" and mixer.global_tokens:
        g = mixer.global_tokens
        y[:, :, :g] = (mixer.maps(x, mask) @ heads_of(mixer, x, mixer.qkv_global)[2])[:, :, :g]
    torch.testing.assert_close(mixer.proj(y.transpose(1, 2).flatten(2)), mixer(x, mask=mask))


@pytest.mark.parametrize(("name", "options"), ALL)
def test_heads_add_up_and_a_pruned_mixer_is_the_sum_of_the_kept(name: str, options: dict) -> None:
    mixer = build(name, options | {"out_bias": True})
    x, mask = tokens(40)
    whole = mixer(x, mask=mask)
    parts = []
    for head in range(3):
        tensors = head_tensors(mixer, torch.tensor([head]))
        single = copy.copy(mixer)
        single.heads = 1
        parts.append(torch.func.functional_call(single, tensors, (x,), {"mask": mask}))
    torch.testing.assert_close(sum(parts), whole)
    mixer.keep("heads", torch.tensor([0, 2]))
    assert mixer.widths() == {"heads": 2}
    torch.testing.assert_close(mixer(x, mask=mask), parts[0] + parts[2])


@pytest.mark.parametrize("name", ["local", "longformer", "linear", "performer", "linformer", "bigbird"])
def test_macs_grow_linearly_with_tokens(name: str) -> None:
    with torch.device("meta"):
        mixer = create_mixer(name, 32, heads=2, grid=(8192,), **({"window": 64} if name == "longformer" else {}))
    counts = [measure.macs(mixer, torch.zeros(1, n, 32)).total for n in (4096, 8192)]
    assert counts[1] / counts[0] == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("name", ["linformer", "synthesizer", "sinkhorn"])
def test_mixers_bound_to_a_length_say_so(name: str) -> None:
    with pytest.raises(ValueError, match="bound to"):
        build(name, SMALL[name])(torch.randn(1, 71, 12, dtype=torch.float64))
    with pytest.raises(ValueError, match="grid"):
        create_mixer(name, 12)


@pytest.mark.parametrize(
    ("name", "options", "word"),
    [
        ("local", {"window": 0}, "window"),
        ("sparse", {"last": 99}, "last"),
        ("longformer", {"window": 0}, "window"),
        ("bigbird", {"block": 0}, "block"),
        ("sinkhorn", {"block": 0}, "block"),
        ("performer", {"kernel": "cosine"}, "kernel"),
        ("performer", {"kernel": "softmax", "causal": True}, "causal"),
        ("synthesizer", {"mode": "clever"}, "mode"),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        build(name, options)


def test_bigbird_draws_other_blocks_for_another_seed_and_the_same_for_the_same() -> None:
    one, same, other = (build("bigbird", {"block": 4, "seed": s}).table(16) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", SMALL)
def test_they_take_the_keywords_of_the_benchmark(name: str) -> None:
    mixer: Mixer = build(name, SMALL[name])
    assert {"heads", "head_dim", "qkv_bias", "out_bias"} <= set(inspect.signature(type(mixer)).parameters)
    assert mixer.qkv.bias is None
    assert mixer.proj.bias is None
