"""Reversible blocks: what they undo, what they learn, and what they keep."""

import copy

import pytest
import torch
from torch import nn

from gossamer.layers import Block, Mlp
from gossamer.layers.norms import BatchNorm
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.trunks import Isotropic
from gossamer.trunks.reversible import Reversible, _forwards, backwards, forwards


def blocks(depth, *, dim=32, mixer="attention", drop_path=0.0, drop=0.0, scale=None, **options):
    torch.manual_seed(0)
    made = [
        Block(
            dim,
            create_mixer(mixer, dim, heads=4, **options),
            Mlp(dim, 64, drop=drop),
            drop_path=drop_path,
            layer_scale=scale,
        )
        for _ in range(depth)
    ]
    for block in made:
        for p in block.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
    return nn.ModuleList(made)


def streams(n=9, dim=32):
    torch.manual_seed(1)
    return torch.randn(3, n, dim), torch.randn(3, n, dim)


def ordinary(parts, x, mask=None):
    """The same sums with everything kept."""
    return _forwards(parts, x, mask)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_streams_before_are_found_again_from_those_after(scale):
    parts, x = blocks(12, scale=scale).eval(), streams()
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    with torch.no_grad():
        y = forwards(parts, x, mask)
        assert (y[0] - x[0]).abs().max() > 1
        for found, was in zip(backwards(parts, y, mask), x, strict=True):
            torch.testing.assert_close(found, was, atol=1e-5, rtol=0)


def gradients(parts, run, x, mask=None):
    torch.manual_seed(5)
    x = tuple(t.clone().requires_grad_() for t in x)
    y = run(parts, x, mask)
    torch.manual_seed(6)
    loss = sum((t * torch.randn_like(t)).sum() for t in y)
    return [t.detach() for t in y], torch.autograd.grad(loss, [*x, *parts.parameters()])


@pytest.mark.parametrize("chance", [0.0, 0.4])
def test_gradients_are_the_ordinary_ones_where_things_are_dropped_by_chance_too(chance):
    parts, x = blocks(6, drop=chance, drop_path=chance, scale=0.5).train(), streams()
    mask = torch.arange(9) < torch.tensor([9, 4, 7])[:, None]
    (y, found), (z, wanted) = gradients(parts, forwards, x, mask), gradients(parts, ordinary, x, mask)
    for a, b in zip(y, z, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 * float(b.abs().max()), rtol=1e-4)


def test_weights_shared_by_blocks_get_the_gradients_of_all_and_frozen_ones_none():
    parts, x = blocks(3), streams()
    parts[2].mixer = parts[0].mixer
    parts[1].mlp.fc1.weight.requires_grad_(False)
    found = {}
    for run in (forwards, ordinary):
        parts.zero_grad()
        torch.stack(run(parts, x, None)).square().sum().backward()
        found[run] = [None if p.grad is None else p.grad.clone() for p in parts.parameters()]
    assert sum(g is None for g in found[forwards]) == 1
    for a, b in zip(found[forwards], found[ordinary], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-4)


def kept(model, *inputs):
    """Numbers that are kept for the gradients."""
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.numel()
        return t

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        answer = model(*inputs)
    return sum(n for ptr, n in sizes.items() if ptr not in weights), answer


def test_what_is_kept_does_not_grow_with_depth():
    x = streams()

    class Chain(nn.Module):
        def __init__(self, depth, run):
            super().__init__()
            self.parts, self.run = blocks(depth), run

        def forward(self, *pair):
            return self.run(self.parts, pair, None)

    two, many = (kept(Chain(depth, forwards), *x)[0] for depth in (2, 12))
    assert two == many == 2 * x[0].numel()
    assert kept(Chain(12, ordinary), *x)[0] > 5 * kept(Chain(2, ordinary), *x)[0] > 5 * many


def test_autocast_in_the_backward_pass_is_that_of_the_forward_pass():
    parts, x = blocks(4), streams()
    found = []
    for run in (forwards, ordinary):
        with torch.autocast("cpu", torch.bfloat16):
            y = run(parts, x, None)
        found.append(torch.autograd.grad(torch.stack(y).float().square().sum(), list(parts.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=0.03 * float(b.abs().max()), rtol=0.03)


def test_a_batch_norm_counts_a_batch_once():
    parts = [Block(16, create_mixer("pool", 16), Mlp(16, 32), norm=BatchNorm) for _ in range(2)]
    parts = nn.ModuleList(parts).train()
    other = copy.deepcopy(parts)
    x = streams(dim=16)
    for run, net in ((forwards, parts), (ordinary, other)):
        torch.stack(run(net, x, None)).square().sum().backward()
    for (name, a), (_, b) in zip(parts.named_buffers(), other.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def models():
    image = create_model(
        "vit_tiny_patch16_224", img_size=(8, 8), in_chans=1, num_classes=10, patch=2, dim=32, depth=3, heads=4
    )
    yield "vit", image, torch.randn(2, 1, 8, 8)
    words = create_model("gpt2", dim=32, depth=3, heads=4, vocab_size=20, max_len=12, drop=0.2)
    yield "gpt2", words, torch.randint(1, 20, (2, 12))
    llama = create_model("tinyllama_1_1b", dim=32, depth=3, heads=4, kv_heads=2, hidden=48, vocab_size=20, max_len=12)
    yield "llama", llama, torch.randint(1, 20, (2, 12))
    text = create_model("bert_base", dim=32, depth=3, heads=4, vocab_size=20, max_len=12, num_classes=3, drop=0.2)
    pre = [Block(32, b.mixer, b.mlp) for b in text.blocks]
    ids = torch.randint(1, 20, (2, 12))
    ids[1, 7:] = 0
    yield "bert", Isotropic(text.stem, pre, norm=nn.LayerNorm(32), head=text.head), ids


@pytest.mark.parametrize("place", range(4), ids=["vit", "gpt2", "llama", "bert"])
def test_image_models_text_encoders_and_decoders_take_the_trunk_and_learn_the_same(place):
    name, plain, x = list(models())[place]
    net = Reversible(plain.stem, list(plain.blocks), norm=plain.norm, head=plain.head).train()
    assert net.state_dict().keys() == plain.state_dict().keys()

    class Kept(Reversible):
        def _encode(self, x):
            x, mask = self.stem(x)
            one, two = ordinary(self.blocks, (x, x), mask)
            x = (one + two) / 2
            return (x if self.norm is None else self.norm(x)), mask, None

    twin = copy.deepcopy(net)
    twin.__class__ = Kept
    for part in (net, twin):
        torch.manual_seed(3)
        part(x).square().sum().backward()
    for (key, a), b in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4 * float(b.grad.abs().max()) + 1e-7, rtol=1e-4, msg=key)
    net.eval()
    if name in ("gpt2", "llama"):
        later = x.clone()
        later[:, 6:] = 1
        torch.testing.assert_close(net(later)[:, :6], net(x)[:, :6], atol=1e-5, rtol=1e-4)
    if name == "bert":
        torch.testing.assert_close(net(x)[1], net(x[1:, :7])[0], atol=1e-5, rtol=1e-4)


def test_blocks_that_cannot_be_undone_are_refused():
    text = create_model("bert_base", dim=32, depth=1, heads=4, vocab_size=20, max_len=12)
    with pytest.raises(ValueError, match="block 0 is post"):
        Reversible(text.stem, list(text.blocks), norm=None, head=text.head)
    with pytest.raises(ValueError, match="block 0 is Linear"):
        Reversible(text.stem, [nn.Linear(2, 2)], norm=None, head=text.head)
