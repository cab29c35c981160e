"""Hyena N-D: equal to the authors' code, its weights fit, its hybrids are theirs, any image."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from gossamer.io import export_onnx
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from official import golden, manifest, seeded_state
from pyramids import equals_official, manifest_fits

TINY = {"dim": 12, "heads": 2, "patch": 4, "hidden": 8, "num_classes": 5}
JOINT = {"filter": "joint"}
OFFICIAL = {
    "hyena_nd": ({"depth": 2, "img_size": 20}, "blocks.0.attn.in_proj.weight"),
    "hyena_nd_4dir": (
        {"depth": 2, "img_size": 24, "direction": "4dir", "order": 3, "window": "learn", "sqrt_decay": True, **JOINT},
        "blocks.0.attn.filter_fn.modulation.shift",
    ),
    "hyena_nd_parallel": (
        {"depth": 3, "img_size": 12, "direction": "parallel", "window": "symmetric", "method": "hyena2dattn", **JOINT},
        "blocks.0.attn.filter_fn.implicit_filter.4.weight",
    ),
    "hyena_nd_direct": (
        {"depth": 2, "img_size": 20, "direction": "4dirp", "filter": "direct", "method": "onebyone"},
        "blocks.0.attn.linear_mix.weight",
    ),
    "hyena_nd_learn": (
        {"depth": 3, "img_size": 12, "direction": "standard", "window": "learn", "method": "attnhyena2d"},
        "blocks.2.attn.in_proj.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_hyena_equals_official(name: str) -> None:
    settings, key = OFFICIAL[name]
    side = settings["img_size"]
    equals_official(name, "hyena-nd", {**TINY, **settings, "official": True}, (2, 3, side, side), key)


@pytest.mark.parametrize("name", ["deit_tiny_hyena2d_seq_product", "deit_tiny_hyena2d_4dir_joint"])
def test_the_authors_checkpoints_fit(name: str) -> None:
    assert name in manifest("hyena-nd")
    manifest_fits("hyena-nd", name)


def test_weights_of_another_resolution_load_with_resized_tables() -> None:
    state = seeded_state(golden("hyena_nd")["shapes"])
    table = torch.linspace(0, 1, 5)[None, :, None].expand(1, 5, 3)
    state["blocks.0.attn.filter_fn.pos_emb.z"] = table.clone()
    model = load_official(create_model("hyena-nd", **TINY, depth=2, img_size=(36, 24)), state)
    assert model.stem.positions.shape == (1, 54, 12)
    torch.testing.assert_close(model.blocks[0].mixer.filter.positions[:, 1], torch.linspace(0, 1, 9))


def test_hybrids_have_hyena_where_the_authors_have_it() -> None:
    for method, first in (
        ("hyena2dattn", 7 * "h" + 5 * "a"),
        ("attnhyena2d", 7 * "a" + 5 * "h"),
        ("onebyone", 6 * "ha"),
    ):
        with torch.device("meta"):
            model = create_model("hyena-nd", **TINY, img_size=16, method=method, depth=12)
        assert "".join(block.mixer.name[0] for block in model.blocks) == first


def test_two_blocks_in_turn_see_everything_and_one_does_not() -> None:
    model = create_model("hyena-nd", **TINY, depth=2, img_size=32, init_std=None).double()
    x = torch.randn(1, 8, 8, 12, dtype=torch.float64, requires_grad=True)
    seen = []
    for blocks in (model.blocks[:1], model.blocks):
        y = x
        for block in blocks:
            y = block(y)
        seen.append((torch.autograd.grad(y[0, 4, 4].sum(), x)[0].abs().sum(-1) > 1e-14)[0])
    assert not seen[0][0, 7]
    assert seen[1].float().mean() > seen[0].float().mean()
    assert seen[1][0, 0]
    assert seen[1][7, 7]


def test_the_official_form_reads_the_first_token_and_the_clean_form_all() -> None:
    for official in (False, True):
        model = create_model("hyena-nd", **TINY, depth=1, img_size=16, official=official)
        model.blocks = torch.nn.ModuleList()
        x = torch.randn(1, 3, 16, 16)
        other = torch.cat((x[..., :8], torch.randn(1, 3, 16, 8)), -1)
        assert torch.equal(model(x), model(other)) == official
    with pytest.raises(ValueError, match="square images, got img_size=16x20"):
        create_model("hyena-nd", **TINY, img_size=(16, 20), official=True)


def test_images_a_patch_does_not_divide_are_padded_or_refused() -> None:
    model = create_model("hyena-nd", **TINY, depth=1, img_size=(17, 9), in_chans=1, pad=True)
    assert model.features(torch.randn(1, 1, 17, 9))[0].shape == (1, 5, 3, 12)
    with pytest.raises(ValueError, match="patch=4, img_size=17x9"):
        create_model("hyena-nd", **TINY, img_size=(17, 9))


def test_a_small_hyena_is_exported_and_runs_at_another_batch(tmp_path) -> None:
    model = create_model("hyena-nd", **TINY, depth=1, img_size=16, **JOINT).eval()
    certificate = export_onnx(model, torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"


def test_hyena_learns_which_end_of_a_row_is_bright() -> None:
    # A question about far pixels that the mean over tokens cannot answer.
    model = create_model("hyena-nd", **{**TINY, "num_classes": 2}, depth=2, img_size=16, init_std=None, pad=True)
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    loss = torch.tensor(0.0)
    for _ in range(40):
        target = torch.randint(2, (32,))
        x = 0.1 * torch.randn(32, 3, 16, 16)
        x[torch.arange(32), :, :, target * 15] += 1
        loss = F.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1


def digits_known(attend: bool, seed: int = 0) -> float:
    """Share of unseen digits told right after four passes over 1,500, every pixel a token."""
    torch.manual_seed(seed)
    settings = {**TINY, **JOINT, "dim": 24, "patch": 1, "hidden": 16, "num_classes": 10, "mlp_ratio": 2.0}
    model = create_model("hyena-nd", **settings, depth=2, img_size=8, in_chans=1, init_std=None)
    if attend:
        for block in model.blocks:
            block.mixer = create_mixer("attention", 24, heads=2)
        init_transformer(model, None)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(digits.target)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for index in torch.stack([torch.randperm(1500) for _ in range(4)]).flatten().split(50):
        loss = F.cross_entropy(model(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        return float((model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean())


def test_with_few_images_hyena_learns_digits_that_attention_in_its_place_does_not_know_yet() -> None:
    hyena, attention = digits_known(False), digits_known(True)
    assert hyena > 0.75
    assert hyena > attention + 0.1
