"""MetaFormer: equal to the authors' code, the mixer is all that differs between its members."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import measure
from gossamer.layers import Block, GroupNorm1
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.registry import system
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TWO = {"depths": (2, 2), "dims": (16, 24), "num_classes": 7}
OFFICIAL = {
    "metaformer_pool": (TWO, (2, 3, 50, 39), "network.0.1.norm1.weight"),
    "metaformer_dense": (
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32), "dense": True},
        (1, 3, 50, 70),
        "network.1.proj.weight",
    ),
    "metaformer_attention": (
        {
            "depths": (1, 2),
            "dims": (32, 64),
            "mixers": ("pool", "attention"),
            "norm": "layer",
            "num_classes": 7,
            "img_size": (38, 54),
        },
        (2, 3, 38, 54),
        "network.2.pos_embed",
    ),
    "metaformer_spatial": (
        {**TWO, "depths": (1, 2), "mixers": ("identity", "spatial_fc"), "img_size": (38, 54)},
        (2, 3, 38, 54),
        "network.2.0.token_mixer.fc.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_metaformer_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "metaformer", settings, shape, key)


def test_every_official_checkpoint_of_metaformer_fits() -> None:
    for name in manifest("metaformer"):
        manifest_fits("metaformer", name)


@pytest.mark.parametrize("name", [v for v in system("metaformer").variants if not v.endswith("_224")])
def test_metaformer_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


def test_pooling_of_a_constant_is_zero_and_else_the_mean_of_what_exists_less_the_token() -> None:
    pool = create_mixer("pool", 2)
    assert pool(torch.full((1, 5, 6, 2), 3.0)).abs().max() < 1e-6
    x = torch.randn(1, 5, 6, 2)
    want = torch.empty_like(x)
    for i in range(5):
        for j in range(6):
            want[:, i, j] = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2)) - x[:, i, j]
    torch.testing.assert_close(pool(x), want)


def test_one_group_norm_is_layer_norm_over_the_whole_sample() -> None:
    norm = GroupNorm1(6).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 7, 6, dtype=torch.float64, requires_grad=True)
    want = F.layer_norm(x, (5, 7, 6), eps=1e-5) * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), want, atol=1e-6, rtol=1e-6)
    mix = torch.randn_like(x)
    for got, expected in zip(
        torch.autograd.grad((norm(x) * mix).sum(), [x, norm.weight, norm.bias]),
        torch.autograd.grad((want * mix).sum(), [x, norm.weight, norm.bias]),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_a_block_without_scale_is_the_identity_and_pooling_sees_3x3() -> None:
    x = torch.randn(1, 9, 9, 4, requires_grad=True)
    block = Block(4, create_mixer("pool", 4), nn.Linear(4, 4), norm=nn.LayerNorm, layer_scale=0.0)
    assert torch.equal(block(x), x)
    block = Block(4, create_mixer("pool", 4), nn.Linear(4, 4), norm=nn.LayerNorm)
    (reach,) = torch.autograd.grad((block(x)[0, 4, 4] * torch.arange(4)).sum(), x)
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[3:6, 3:6] = True
    assert torch.equal(reach.abs().sum((0, 3)) > 0, inside)


def test_pooling_and_identity_models_differ_in_the_mixer_alone() -> None:
    pool, identity = create_model("metaformer", **TWO), create_model("metaformer", **TWO, mixers="identity")
    identity.load_state_dict(pool.state_dict())
    x = torch.randn(2, 3, 40, 40)
    assert not torch.allclose(pool(x), identity(x), atol=1e-7)
    for stage in pool.stages:
        for block in stage:
            block.mixer = nn.Identity()
    torch.testing.assert_close(pool(x), identity(x))


def test_cost_of_pooling_is_linear_in_pixels_and_that_of_attention_is_not() -> None:
    def ratio(name: str) -> float:
        counts = []
        for side in (128, 256):
            with torch.device("meta"):
                model = create_model(name, img_size=side, num_classes=0).eval()
                counts.append(measure.macs(model, (torch.empty(1, 3, side, side),)).total)
        return counts[1] / counts[0]

    assert ratio("poolformer_s12") == pytest.approx(4, rel=0.02)
    assert ratio("metaformer_ppaa_s12") > 4.02


def test_models_bound_to_a_size_refuse_another_and_pooling_takes_any() -> None:
    x = torch.randn(1, 3, 250, 190)
    small = {"depths": (1, 1, 1, 1), "dims": (32, 32, 32, 32)}
    for mixer in ("pool", "identity"):
        model = create_model("metaformer", **small, mixers=mixer)
        assert [tuple(m.shape[1:3]) for m in model.features(x)] == [(62, 47), (31, 24), (16, 12), (8, 6)]
        assert model(x).shape == (1, 1000)
    with pytest.raises(ValueError, match=r"\(7, 7\).*\(8, 6\)"):
        create_model("metaformer", **small, mixers=("pool", "pool", "pool", "spatial_fc"))(x)
    with pytest.raises(ValueError, match="14x14 grid, got 16x12"):
        create_model("metaformer", **small, mixers=("pool", "pool", "attention", "attention"))(x)
    create_model("metaformer", **small, mixers=("pool", "pool", "attention", "attention"), dense=True).features(x)


def test_position_maps_are_resized_when_weights_of_another_size_are_loaded() -> None:
    settings, _, _ = OFFICIAL["metaformer_attention"]
    state = seeded_state(golden("metaformer_attention")["shapes"])
    model = load_official(create_model("metaformer", **{**settings, "img_size": (70, 54)}), state)
    want = F.interpolate(state["network.2.pos_embed"], (9, 7), mode="bicubic").movedim(1, -1)
    torch.testing.assert_close(model.merges[0][1].table.detach(), want)
    same = load_official(create_model("metaformer", **settings), state)
    assert torch.equal(same.merges[0][1].table, state["network.2.pos_embed"].movedim(1, -1))


def test_weights_of_attention_in_the_first_stage_have_their_positions_in_front() -> None:
    settings = {"depths": (1,), "dims": (32,), "mixers": "attention", "norm": "layer", "img_size": (46, 38)}
    model = create_model("metaformer", **settings, num_classes=3)
    state = {}
    for key, value in model.state_dict().items():
        theirs = key.replace("stem.0.", "patch_embed.").replace("stages.0.", "network.1.").replace("head.fc", "head")
        theirs = theirs.replace(".mixer.", ".token_mixer.").replace(".scale", ".layer_scale_")
        # A map (1, c, h, w), and 1x1 convolutions.
        is_map, is_conv = key == "stem.1.table", ".mlp." in key and value.ndim == 2
        state["network.0.pos_embed" if is_map else theirs] = (
            torch.randn(1, 32, 11, 9) if is_map else value[..., None, None] if is_conv else value
        )
    load_official(model, state)
    assert torch.equal(model.stem[1].table, state["network.0.pos_embed"].movedim(1, -1))


def test_pooling_learns_what_needs_the_neighbourhood_and_identity_does_not() -> None:
    """A chequerboard or one half filled: the pixels are the same, only their neighbours tell."""
    rows, columns = torch.meshgrid(torch.arange(6), torch.arange(6), indexing="ij")
    kinds = torch.stack(((rows + columns) % 2, rows // 3)).float()

    def accuracy(mixer: str) -> float:
        torch.manual_seed(1)
        settings = {"depths": (2,), "dims": (16,), "stem": (1, 1, 0), "layer_scale": None}
        model = create_model("metaformer", **settings, mixers=mixer, in_chans=1, num_classes=2)
        optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
        for _ in range(100):
            label = torch.randint(0, 2, (32,))
            output = model(kinds[label][:, None] + 0.3 * torch.randn(32, 1, 6, 6))
            F.cross_entropy(output, label).backward()
            optimiser.step()
            optimiser.zero_grad()
        return float((output.argmax(1) == label).float().mean())

    assert accuracy("identity") < 0.75
    assert accuracy("pool") > 0.95
