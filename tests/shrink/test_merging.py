"""Token merging as a pass: equal to the authors' code, within its MACs, honest about what it cannot do."""

import pytest
import torch
from tests.official import golden, probe, seeded_input, seeded_state
from tests.shrink.toys import digits, encoder, learned, texts, vision
from torch import nn

from gossamer.layers import mean_pool, reduce
from gossamer.layers.init import init_by_width
from gossamer.measure import macs
from gossamer.models import create_model, load_official
from gossamer.shrink import recipe
from gossamer.shrink.base import run_pass
from gossamer.shrink.passes import merging


@pytest.fixture(scope="module")
def pictures():
    return digits()


@pytest.fixture(scope="module")
def sentences():
    return texts()


@pytest.mark.parametrize(("name", "distilled"), [("merging_vit", False), ("merging_distilled", True)])
def test_a_merging_vit_equals_the_authors(name, distilled):
    want = golden(name)
    sizes = {"img_size": (20, 16), "patch": 4, "dim": 24, "depth": 3, "heads": 3, "num_classes": 5}
    net = create_model("vit_tiny_patch16_224", distilled=distilled, **sizes).double().eval()
    load_official(net, seeded_state(want["shapes"], torch.double))
    step = {"step": "merging", "r": want["r"].tolist(), "tokens": 21 + distilled, "protect": 1 + distilled}
    recipe.apply(net, step)
    x = seeded_input(name, (2, 3, 20, 16)).double().requires_grad_()
    given = []
    net.blocks[-1].register_forward_hook(lambda *a: given.append(a[-1]))
    y = net(x)
    gx, gw = torch.autograd.grad(probe(y), (x, net.blocks[0].block.mixer.qkv.weight))
    for ours, key in ((y, "y"), (given[0][0], "tokens"), (given[0][2], "sizes"), (gx, "gx"), (gw, "gw")):
        torch.testing.assert_close(ours.float(), want[key], atol=1e-4, rtol=1e-4)


def blocks_macs(net, x):
    """MACs of the blocks on one sample, counted."""
    count = macs(net, x[:1], per_layer=True)
    return sum(n for name, n in count.by_module.items() if name.count(".") == 1 and name.startswith("blocks."))


@pytest.mark.parametrize("schedule", ["constant", "decreasing"])
@pytest.mark.parametrize("keep", [0.9, 0.7, 0.55])
def test_the_share_of_the_macs_is_kept_and_hardly_less(pictures, keep, schedule):
    net = vision(img_size=(16, 16), depth=6)
    x = torch.randn(3, 1, 16, 16)
    found = merging.Mergeable(65, 1, [merging._costs(b, 65) for b in net.blocks])
    assert merging.total_macs(found, [0] * 6) == blocks_macs(net, x)
    r = merging.removals(found, keep, schedule)
    recipe.apply(net, {"step": "merging", "r": r, "tokens": 65, "protect": 1})
    left = blocks_macs(net, x)
    assert left == merging.total_macs(found, r)
    assert left / merging.total_macs(found, [0] * 6) == pytest.approx(keep, abs=0.03)
    assert left <= keep * merging.total_macs(found, [0] * 6)
    assert (max(r) - min(r) <= 1) if schedule == "constant" else (sorted(r, reverse=True) == r and r[0] > r[-2])


def test_a_trained_model_keeps_its_accuracy_by_merging_what_is_alike(pictures, monkeypatch):
    net = vision(depth=4)
    init_by_width(net)
    learned(net, pictures, 200, lr=5e-3)
    merged, _ = run_pass("merging", net, pictures, keep=0.6)
    good = pictures.score(merged)
    assert good > pictures.score(net) - 0.05 > 0.7
    least_alike = reduce.ops.match
    monkeypatch.setattr(reduce.ops, "match", lambda keys, r, **given: least_alike(keys * signs(keys), r, **given))
    assert pictures.score(merged) < good - 0.02


def signs(keys):
    """Turns the keys of odd positions round, so that the least alike look most alike."""
    return 1 - 2 * (torch.arange(keys.shape[1]) % 2)[:, None]


def test_a_text_with_enough_padding_keeps_all_its_words(sentences):
    net = encoder(num_classes=0, depth=3).eval()
    merged, (step,) = run_pass("merging", net, sentences, keep=0.75)
    assert step["protect"] == 1
    gone = sum(step["r"])
    ids = torch.randint(3, 24, (4, 12))
    ids[:2, 12 - gone :] = 0
    torch.testing.assert_close(merged(ids)[:2], net(ids)[:2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged(ids)[2:], net(ids)[2:], atol=1e-3)
    tokens, mask = merged.encode(ids)
    assert tokens.shape[1] == 12 - gone
    assert mask.sum(1).tolist() == [12 - gone] * 4


def test_sentence_vectors_are_means_over_words_not_over_merged_tokens(sentences):
    net, _ = run_pass("merging", encoder(num_classes=0, depth=2).eval(), sentences, keep=0.8)
    ids = torch.randint(3, 24, (2, 12))
    given = []
    net.head.register_forward_hook(lambda *a: given.append((*a[1], a[2]["sizes"])), with_kwargs=True)
    y = net(ids)
    tokens, mask, sizes = given[0]
    assert (sizes * mask).sum(1).tolist() == [12, 12]
    mean = (tokens * (sizes * mask)[..., None]).sum(1) / 12
    torch.testing.assert_close(y, nn.functional.normalize(mean, dim=-1))
    assert not torch.allclose(mean, mean_pool(tokens, mask), atol=1e-3)


def test_a_step_for_another_number_of_blocks_is_refused():
    with pytest.raises(ValueError, match="one number for each of the 2 blocks, got 3"):
        recipe.apply(vision(), {"step": "merging", "r": [1, 1, 1], "tokens": 17, "protect": 1})
