"""Efficient attentions are full attention where nothing is left out, and cost what they say where something is."""

import math

import numpy as np
import pytest
import torch

from gossamer.measure import macs
from gossamer.mixers import create_mixer, list_mixers
from gossamer.ops.attention import join_heads, split_heads

N, DIM = 12, 32
OWN = dict(heads=4)
# Sequences: settings that leave nothing out, and what has to be set to leave it as it is.
SEQUENCES = {
    "local": dict(window=N),
    "longformer": dict(window=2 * N, global_tokens=0),
    "sparse": dict(block=N, last=1, global_tokens=1),
    "bigbird": dict(block=4, random=3),
    "sinkhorn": dict(block=N),
    "linformer": dict(rank=N),
    "synthesizer": dict(mode="random"),
    "prob_sparse": dict(factor=100, sampling="fixed"),
    "hard_attention": dict(top_k=N),
    "gqa": dict(kv_heads=4),
    "plain_window": dict(window=N),
    "window": dict(window=N, axes=1),
    "sliced": dict(groups=1),
}


def full(mixer, x, mask=None):
    """`softmax(q k^T / sqrt(d)) v` with the mixer's own products, head by head."""
    flat = x.flatten(1, -2)
    q, k, v = mixer.project(flat)
    logits = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        logits = logits.masked_fill(~mask[:, None, None], -math.inf)
    return mixer.proj(join_heads(logits.softmax(-1) @ v)).view(x.shape)


def exact(name, **options):
    torch.manual_seed(0)
    mixer = create_mixer(name, DIM, grid=(N,), **OWN, **options).eval()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    with torch.no_grad():
        if name == "linformer":
            mixer.slots.copy_(torch.eye(N))
        if name == "synthesizer":
            mixer.logits.zero_()
        if name == "window":
            mixer.bias_table.zero_()
    return mixer


@pytest.mark.parametrize("name", SEQUENCES)
def test_where_nothing_is_left_out_it_is_full_attention(name):
    mixer, x = exact(name, **SEQUENCES[name]), torch.randn(2, N, DIM)
    if name == "gqa":  # its products lie apart: queries, then keys and values
        plain = create_mixer("attention", DIM, **OWN).eval()
        plain.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(x), full(plain, x), atol=1e-5, rtol=1e-4)
        return
    # With one block, Sinkhorn's own block and the one put there are the same, and it adds up what it reads of both.
    times = 2 if name == "sinkhorn" else 1
    torch.testing.assert_close(mixer(x), times * full(mixer, x), atol=1e-5, rtol=1e-4)
    if "mask" in mixer.honours and name != "linformer":
        mask = torch.arange(N) < torch.tensor([N, 7])[:, None]
        wanted = times * full(mixer, x, mask)[mask]
        torch.testing.assert_close(mixer(x, mask=mask)[mask], wanted, atol=1e-5, rtol=1e-4)


LESS = {
    "local": dict(window=3),
    "longformer": dict(window=3, global_tokens=0),
    "sparse": dict(block=3, last=1, global_tokens=1),
    "bigbird": dict(block=1, random=1),
    "sinkhorn": dict(block=3),
    "linformer": dict(rank=N),
    "prob_sparse": dict(factor=1, sampling="fixed"),
    "hard_attention": dict(top_k=3),
    "plain_window": dict(window=3),
    "window": dict(window=3, axes=1),
    "sliced": dict(groups=4),
}


@pytest.mark.parametrize("name", LESS)
def test_short_of_that_it_is_not(name):
    mixer, x = exact(name, **LESS[name]), torch.randn(2, N, DIM)
    if name == "linformer":
        with torch.no_grad():
            mixer.slots.copy_(torch.randn(N, N) / N)
    times = 2 if name == "sinkhorn" else 1
    assert (mixer(x) - times * full(mixer, x)).abs().max() > 1e-2


def test_keys_that_are_not_reduced_are_those_of_full_attention():
    torch.manual_seed(0)
    mixer = create_mixer("spatial_reduction", DIM, heads=4, ratio=1).eval()
    x = torch.randn(2, 3, 4, DIM)
    plain = create_mixer("attention", DIM, heads=4).eval()
    parts = dict(mixer.named_parameters())
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat((parts["q.weight"], parts["kv.weight"])))
        plain.qkv.bias.copy_(torch.cat((parts["q.bias"], parts["kv.bias"])))
    plain.proj.load_state_dict(mixer.proj.state_dict())
    torch.testing.assert_close(mixer(x), full(plain, x), atol=1e-5, rtol=1e-4)


def ghosts(mixer, x):
    """Queries, keys and values, the second half of each a scaled copy of the first."""
    return [torch.cat((t, t * s), -1) for t, s in zip(mixer.qkv(x).chunk(3, -1), mixer.scale, strict=True)]


# Maps: settings that leave nothing out, and the mixer's own queries, keys, values and output product.
MAP = (3, 4)
MAPS = {
    "hilo": (dict(window=1), lambda m, x: (m.low.q(x), *m.low.kv(x).chunk(2, -1), m.low.proj)),
    "strip_attention": (dict(ratio=1, qk_dim=8), lambda m, x: (m.q(x), *m.kv(x).chunk(2, -1), m.proj)),
    "cross_shaped": (dict(stripe=None), lambda m, x: (*m.qkv(x).chunk(3, -1), m.proj)),
    "grid_attention": (dict(window=4, grid=(4, 4)), lambda m, x: (*m.qkv(x).chunk(3, -1), m.proj)),
    "offset_bias_attention": (
        dict(key_dim=8, value_dim=8, grid=MAP),
        lambda m, x: (*(t.flatten(-2) for t in m.qkv(x).unflatten(-1, (4, 3, 8)).unbind(-2)), m.proj),
    ),
    "ghost_attention": ({}, lambda m, x: (*ghosts(m, x), m.proj)),
    "spatial_reduction": (dict(ratio=1), lambda m, x: (m.q(x), *m.kv(x).chunk(2, -1), m.proj)),
}


@pytest.mark.parametrize("name", MAPS)
def test_on_maps_too_it_is_full_attention_where_nothing_is_left_out(name):
    options, products = MAPS[name]
    torch.manual_seed(0)
    mixer = create_mixer(name, DIM, heads=4, **options).eval()
    for part, p in mixer.named_parameters():
        torch.nn.init.normal_(p, std=0.3)
        if part.startswith("lepe") or part == "bias_table":  # positions, of which full attention knows nothing
            torch.nn.init.zeros_(p)
    x = torch.randn(2, *options.get("grid", MAP), DIM)
    *qkv, proj = products(mixer, x.flatten(1, 2))
    q, k, v = (split_heads(t, 4) for t in qkv)
    weights = (q @ k.mT / math.sqrt(8)).softmax(-1)
    torch.testing.assert_close(mixer(x), proj(join_heads(weights @ v)).view(x.shape), atol=1e-5, rtol=1e-4)


def test_rotary_attention_that_does_not_turn_is_full_attention():
    torch.manual_seed(0)
    mixer = create_mixer("rotary_gqa", DIM, heads=4, kv_heads=4).eval()
    x = torch.randn(2, N, DIM)
    assert (mixer(x) - full(mixer, x)).abs().max() < 1e-5  # its own products turn, and so do these
    turned = mixer(x)
    mixer.frequencies.zero_()
    plain = create_mixer("gqa", DIM, heads=4, kv_heads=4, qkv_bias=False, out_bias=False).eval()
    plain.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x), plain(x), atol=1e-5, rtol=1e-4)
    assert (turned - mixer(x)).abs().max() > 1e-3


# What has no setting at which it is softmax attention over all tokens, and why.
WITHOUT = {
    "kernels in place of the softmax": ("performer", "linear", "simplified_linear", "hashed_linear"),
    "other weights than a softmax of products": ("cross_feature", "context_score", "auto_correlation"),
    "positions that are part of it": ("polyline",),
    "slots of its own beside the tokens": ("prefix_attention", "gam"),
    "few keys of other grains": ("factorized",),
    "heads by chance or by the norms of keys": ("kdgqa", "dgqa", "pgqa"),
    "a state, or long convolutions": ("mamba2", "hyena"),
    "no attention": ("pool", "identity", "depthwise", "spatial_fc", "window_mlp", "local_aggregator"),
}


def test_every_mixer_is_held_to_full_attention_or_is_known_to_have_no_such_limit():
    held = {*SEQUENCES, *MAPS, "rotary_gqa", "attention"}
    without = {name for names in WITHOUT.values() for name in names}
    assert not held & without
    assert held | without == set(list_mixers())


def slope(name, **options):
    """Of log MACs on log tokens, from 1024 tokens on."""
    tokens = [1024, 2048, 4096]
    counted = []
    for n in tokens:
        with torch.device("meta"):
            mixer = create_mixer(name, 32, grid=(n,), **OWN, **options).eval()
            counted.append(macs(mixer, torch.empty(1, n, 32)).total)
    return float(np.polyfit(np.log(tokens), np.log(counted), 1)[0])


def test_full_attention_grows_with_the_square_of_tokens_and_what_replaces_it_with_their_number():
    assert slope("attention") == pytest.approx(2, abs=0.15)
    for name, options in (
        ("local", dict(window=64)),
        ("longformer", dict(window=64, global_tokens=0)),
        ("linformer", dict(rank=64)),
        ("linear", {}),
        ("performer", {}),
        ("window", dict(window=64, axes=1)),
    ):
        assert slope(name, **options) == pytest.approx(1, abs=0.15), name
