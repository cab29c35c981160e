"""A masked model is the sliced model."""

import pytest
import torch

from gossamer.models import create_model
from gossamer.shrink.base import Unsupported
from gossamer.shrink.masks import keep_members, masked, members


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"img_size": 16, "patch": 4, "dim": 32, "depth": 2, "heads": 4, "num_classes": 3}),
        ("bert_base", {"dim": 32, "depth": 2, "heads": 4, "hidden": 48, "vocab_size": 50, "max_len": 12}),
        ("swin_t", {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "heads": (2, 4), "patch": 2, "window": 4}),
    ],
)
def test_a_masked_model_equals_the_sliced_one(name, settings):
    torch.manual_seed(0)
    net = create_model(name, **settings).eval()
    x = torch.randint(1, 50, (2, 9)) if name == "bert_base" else torch.randn(2, 3, *[settings["img_size"]] * 2)
    masks = {}
    for member, width in members(net).items():
        mask = (torch.rand(width) < 0.6).float()
        mask[0] = 1
        masks[member] = mask
    with torch.no_grad():
        whole = net(x)
        with masked(net, masks):
            want = net(x)
        assert torch.equal(net(x), whole)
        keep_members(net, masks)
        torch.testing.assert_close(net(x), want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, want, atol=1e-3)


def test_what_cannot_be_masked_is_named():
    with pytest.raises(Unsupported, match="Linear states a pruning rule"):
        members(torch.nn.Linear(2, 2))
