"""Key patches and one for the rest; what a text asks for; the decoder that sums up; and the pass."""

import pytest
import torch
from torch import nn

from gossamer.layers import Block, Mlp
from gossamer.layers.class_attention import attend
from gossamer.layers.reduce import second_branch
from gossamer.layers.summary import (
    PatchAbstraction,
    PatchSelector,
    SummaryBlock,
    box_labels,
    fused,
    matching_loss,
    summarise,
    text_vector,
)
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.passes.bus import place
from shrink.toys import vision


def block(alpha, residual="pre", dim=16, **options):
    torch.manual_seed(0)
    made = Block(dim, create_mixer("attention", dim, heads=4), Mlp(dim, 32), residual=residual)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return SummaryBlock(made, alpha, **options).eval()


def naive(summary, x, alpha):
    """One sample: the block, key patches best first, the others as one."""
    inner = summary.block
    q, k, _ = inner.mixer.project(inner.norm1(x) if inner.residual in ("pre", "stream") else x)
    row = (q[0, :, 0] @ k[0].transpose(1, 2) / q.shape[-1] ** 0.5).diagonal(dim1=0, dim2=1).T
    c = row.softmax(-1).mean(0)[1:]
    y = inner(x)[0]
    order = sorted(range(len(c)), key=lambda i: -float(c[i]))
    count = -(-round(alpha * 100 * len(c)) // 100)
    gone = order[count:]
    weights = torch.stack([c[i] for i in gone]).softmax(0)
    f = sum(w * y[1 + i] for w, i in zip(weights, gone, strict=True))
    return torch.stack([y[0], *(y[1 + i] for i in order[:count]), f])


@pytest.mark.parametrize("residual", ["pre", "post", "stream"])
@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_key_patches_stay_best_first_and_the_others_become_one(alpha, residual):
    summary, x = block(alpha, residual), torch.randn(1, 12, 16)
    with torch.no_grad():
        y, mask, _ = summary(x)
        assert mask is None
        torch.testing.assert_close(y[0], naive(summary, x, alpha), atol=1e-5, rtol=1e-5)


def test_weights_of_the_fused_token_are_positive_and_sum_to_one():
    patches, others = torch.eye(6)[None], torch.tensor([[False, True, True, False, True, True]])
    weights = fused(patches, torch.randn(1, 6), others)[0, 0]
    assert bool((weights[others[0]] > 0).all())
    assert bool((weights[~others[0]] == 0).all())
    assert float(weights.sum()) == pytest.approx(1)
    patches = torch.randn(1, 6, 4)
    torch.testing.assert_close(fused(patches, torch.ones(1, 6), others)[0, 0], patches[0, others[0]].mean(0))
    assert float(fused(patches, torch.ones(1, 6), others & False).abs().max()) == 0


@pytest.mark.parametrize("n", [10, 13, 16])
def test_counts_are_rounded_up(n):
    summary = block(0.7)
    y, _, _ = summary(torch.randn(2, 1 + n, 16))
    u = -(-7 * n // 10)
    assert y.shape[1] == 1 + u + 1
    z, _, _ = PatchAbstraction(16, 4, u, beta=0.3)(y)
    assert z.shape[1] == 1 + -(-3 * u // 10)
    assert block(0.7, fuse=False)(torch.randn(2, 1 + n, 16))[0].shape[1] == 1 + u


def test_a_masked_model_equals_the_one_that_gathers():
    summary, behind, x = block(0.5, "post", fuse=False), block(1.0, "post"), torch.randn(3, 13, 16)
    with torch.no_grad():
        y = behind(summary(x)[0])[0][:, 0]
        h, heads = attend(summary.block, x, None, None)
        mask = torch.ones(3, 13, dtype=torch.bool)
        gone = heads.row.mean(1)[:, 1:].topk(6, largest=False).indices + 1
        mask.scatter_(1, gone, False)
        torch.testing.assert_close(y, behind(second_branch(summary.block, h), mask=mask)[0][:, 0], atol=1e-5, rtol=1e-5)


def test_a_padded_batch_equals_each_sample_alone():
    summary, behind, x = block(0.5, "post"), block(1.0, "post"), torch.randn(3, 12, 16)
    mask = torch.arange(12) < torch.tensor([[12], [8], [2]])
    y, left, _ = summary(x, mask=mask)
    z = behind(y, mask=left)[0]
    for i, n in enumerate((12, 8, 2)):
        alone, own, _ = summary(x[i : i + 1, :n])
        own = torch.ones(1, alone.shape[1], dtype=torch.bool) if own is None else own
        torch.testing.assert_close(y[i][left[i]], alone[0][own[0]], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(z[i, 0], behind(alone, mask=own)[0][0, 0], atol=1e-5, rtol=1e-5)


# ---- with a text -----------------------------------------------------------------------------------------------------


def test_the_text_decides_which_patches_stay_and_always_the_same_ones():
    net = vision(depth=3).eval()
    recipe.apply(net, {"step": "bus", "layer": 2, "alpha": 0.25, "protect": 1})
    # A selector that answers the first word with the first channel, the second with the second.
    selector = PatchSelector(32, 2)
    for p in selector.parameters():
        nn.init.zeros_(p)
    with torch.no_grad():
        for word in (0, 1):
            selector.text.weight[word, word] = 20
            for sign in (0, 1):
                unit = 2 * word + sign
                selector.fc1.weight[unit, word] = 1 - 2 * sign
                selector.fc1.weight[unit, 32 + word] = 1.0
                selector.fc1.bias[unit] = -10
                selector.fc2.weight[0, unit] = 0.2 * (1 - 2 * sign)
    net.blocks[1].selector = selector
    x = torch.randn(1, 1, 8, 8)
    one, other = torch.eye(2)[:1], torch.eye(2)[1:]
    seen = []
    net.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 1:5]))
    with torch.no_grad():
        summarise(net, x, one), summarise(net, x, other), summarise(net, x, one), summarise(net, x)
        patches = net.blocks[1].block(net.blocks[0](net.stem(x)[0]))[0, 1:]
    for word, kept in zip((0, 1, 0), seen, strict=False):
        torch.testing.assert_close(kept, patches[patches[:, word].topk(4).indices])
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[3], seen[0])
    assert net.blocks[1].guide is None


def test_patch_labels_equal_a_search_over_pixels():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        corners = torch.randint(0, 24, (2, 2, 2), generator=generator).sort(1).values
        boxes = [(*box[0].tolist(), *(box[1] + 1).tolist()) for box in corners]
        pixels = torch.zeros(24, 24, dtype=torch.bool)
        for x0, y0, x1, y1 in boxes:
            pixels[y0:y1, x0:x1] = True
        want = pixels.view(4, 6, 6, 4).any(3).any(1)  # patches of 6 rows and 4 columns
        assert torch.equal(box_labels(boxes, (4, 6), (24, 24)), want.flatten())
    with pytest.raises(ValueError, match="a box is"):
        box_labels([(5, 0, 2, 3)], (4, 4), (16, 16))


def test_matching_patches_and_words_finds_what_is_named():
    torch.manual_seed(0)
    stem, selector = nn.Conv2d(3, 24, 4, 4), PatchSelector(24, 3)
    optimiser = torch.optim.Adam([*stem.parameters(), *selector.parameters()], lr=5e-3)

    def scene(count):
        """A red, a green and a blue square on noise, and which of them the word names."""
        images = 0.3 * torch.rand(count, 3, 24, 24)
        word = torch.randint(0, 3, (count,))
        labels = torch.zeros(count, 36, dtype=torch.bool)
        for i in range(count):
            for colour, cell in enumerate(torch.randperm(9)[:3].tolist()):
                y, x = 8 * (cell // 3), 8 * (cell % 3)
                images[i, :, y + 1 : y + 7, x + 1 : x + 7] = torch.eye(3)[colour][:, None, None]
                if colour == word[i]:
                    labels[i] = box_labels([(x + 1, y + 1, x + 7, y + 7)], (6, 6), (24, 24))
        return stem(images).flatten(2).transpose(1, 2), torch.eye(3)[word], labels

    for _ in range(120):
        patches, said, labels = scene(32)
        matching_loss(selector.logits(patches, said), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    with torch.no_grad():
        patches, said, labels = scene(100)
        scores = selector(patches, said)
    on, off = scores[labels], scores[~labels]
    assert float((on[:, None] > off).float().mean()) > 0.95


def test_a_text_without_tokens_is_refused():
    tokens = torch.randn(2, 3, 4)
    assert torch.equal(text_vector(tokens, torch.ones(2, 3) > 0), tokens[:, 0])
    with pytest.raises(ValueError, match="mask of sample 1 is empty"):
        text_vector(tokens, torch.tensor([[True, False, False], [False, False, False]]))


# ---- the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "keep", "layer"), [(12, 0.85, None), (12, 0.6, None), (4, 0.5, 1), (2, 0.7, None)])
def test_layer_and_share_leave_what_was_asked_for(depth, keep, layer):
    k, alpha = place(depth, keep, layer)
    assert (k + (depth - k) * alpha) / depth == pytest.approx(keep, abs=1e-4)
    assert (depth, keep, k, round(alpha, 2)) != (12, 0.85, 6, 0.7) or layer is None
    assert place(12, 0.85) == (6, 0.7)


def test_macs_follow_the_formula():
    net = create_model("vit_small_patch16_224").to("meta")
    x = torch.empty(1, 3, 224, 224, device="meta")
    recipe.apply(net, {"step": "bus", "layer": 6, "alpha": 0.7, "protect": 1})
    n, u, d = 197, 1 + 138 + 1, 384
    blocks = 6 * (12 * n * d**2 + 2 * n * n * d) + 6 * (12 * u * d**2 + 2 * u * u * d)
    assert macs(net, x).total == pytest.approx(blocks + 196 * 768 * d + d * 1000, rel=0.01)


def test_the_decoder_costs_what_its_products_do_and_what_reads_the_summary_is_linear_in_it():
    d, n, layers = 64, 140, 2
    for beta in (0.1, 0.3, 1.0):
        r = 1 + -(-round(1000 * beta * 138) // 1000)  # the class token, and as many of the 138 patches
        own = 4 * r * d**2 + 2 * r * r * d
        cross = 2 * r * d**2 + 2 * (n - r) * d**2 + 2 * r * (n - r) * d
        counted = macs(PatchAbstraction(d, 4, 138, beta=beta, depth=layers), torch.randn(1, n, d)).total
        assert counted == pytest.approx(layers * (own + cross + 8 * r * d**2), rel=0.01)
    fusion, words = create_mixer("attention", d, heads=4), torch.randn(1, 12, d)

    class Fused(nn.Module):
        """Words that read a summary."""

        def forward(self, summary):
            return fusion(words, context=summary)

    spent = [macs(Fused(), torch.randn(1, r, d)).total for r in (10, 20, 40)]
    assert spent[2] - spent[1] == 2 * (spent[1] - spent[0]) == 20 * (2 * d**2 + 2 * 12 * d)


def test_a_new_decoder_passes_the_queries_on_and_a_trained_one_reads_the_rest():
    decoder, y = PatchAbstraction(16, 4, 10, beta=0.3).eval(), torch.randn(2, 12, 16)
    z, _, _ = decoder(y)
    assert torch.equal(z, y[:, :4])
    for p in decoder.parameters():
        nn.init.normal_(p, std=0.2)
    other = torch.cat((y[:, :-1], torch.randn(2, 1, 16)), 1)
    assert not torch.allclose(decoder(y)[0], decoder(other)[0])
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, -1] = False
    torch.testing.assert_close(decoder(y, mask=mask)[0], decoder(other, mask=mask)[0])


def test_a_block_refuses_shares_outside_of_0_to_1():
    for share in (0.0, -0.1, 1.2):
        with pytest.raises(ValueError, match="alpha must be in"):
            block(share)
        with pytest.raises(ValueError, match="beta must be in"):
            PatchAbstraction(16, 4, 10, beta=share)
