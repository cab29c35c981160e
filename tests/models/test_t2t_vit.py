"""T2T-ViT: equal to the authors' code in all its bodies, splits are convolutions, features are what they claim."""

import pytest
import torch
from torch import Tensor, nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx, load_weights, save_weights
from gossamer.layers import Conv, PatchEmbed
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.t2t_vit import TokensToToken, TokenTransformer, random_features, soft_split
from gossamer.ops.linear_attention import linear_attention
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

SLUG = "t2t-vit"
TINY = {"dim": 24, "depth": 2, "heads": 3, "num_classes": 7, "mlp_ratio": 2.0, "token_dim": 8}
# The authors' other bodies have 64 channels between the splits.
OTHER = {**TINY, "dim": 32, "heads": 2, "mlp_ratio": 3.0, "token_dim": 64, "img_size": 32}
DENSE = {"dim": 24, "heads": 4, "body": "dense", "groups": (2, 1), "growth": 8, "token_dim": 64}
SCALE = 24**-0.5
OFFICIAL = {
    # 3x3 tokens, with pixels left over at every split.
    "t2t_vit": ({**TINY, "img_size": 50}, (2, 3, 50, 50), "tokens_to_token.attention1.kqv.weight"),
    "t2t_vit_softmax": (
        {**TINY, "img_size": 33, "tokens": "softmax"},
        (2, 3, 33, 33),
        "tokens_to_token.attention2.attn.qkv.weight",
    ),
    "t2t_vit_scale": ({**TINY, "img_size": 32, "qk_scale": SCALE}, (2, 3, 32, 32), "tokens_to_token.project.weight"),
    "t2t_vit_dense": ({**OTHER, **DENSE, "mlp_ratio": 2.0}, (1, 3, 32, 32), "blocks.1.dense_linear.weight"),
    "t2t_vit_squeeze": ({**OTHER, "body": "squeeze"}, (1, 3, 32, 32), "blocks.1.attn.se_layer.fc.0.weight"),
    "t2t_vit_ghost": ({**OTHER, "body": "ghost"}, (1, 3, 32, 32), "blocks.0.mlp.fc1.weight"),
}


def tiny(**settings) -> nn.Module:
    model = create_model(SLUG, **{**TINY, "img_size": 50, **settings})
    return load_official(model, seeded_state(golden("t2t_vit")["shapes"])).eval()


@pytest.mark.parametrize("name", OFFICIAL)
def test_t2t_vit_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, SLUG, settings, shape, key)


def test_every_official_checkpoint_fits() -> None:
    for name in manifest(SLUG):
        manifest_fits(SLUG, name)


@pytest.mark.parametrize("name", [row.name for row in catalogue.find(SLUG).published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.001, macs=0.015)


@pytest.mark.parametrize("split", [(7, 4, 2), (3, 2, 1), (3, 1, 1), (5, 3, 0)])
def test_a_soft_split_with_a_linear_layer_is_a_convolution(split: tuple[int, int, int]) -> None:
    kernel, stride, padding = split
    conv = Conv(4, 6, kernel, stride=stride, padding=padding)
    x = torch.randn(2, 19, 14, 4, requires_grad=True)
    weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
    one, two = nn.functional.linear(soft_split(x, split), weight, conv.bias), conv(x)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    noise = torch.randn_like(one)
    grads = [torch.autograd.grad((y * noise).sum(), x)[0] for y in (one, two)]
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_without_its_transformers_the_tokeniser_is_three_convolutions() -> None:
    stem = TokensToToken(3, 12, 8, ((7, 4, 2), (3, 2, 1), (3, 2, 1)), "performer")
    convs = [Conv(3, 8, 7, stride=4, padding=2), Conv(8, 8, 3, stride=2), stem.project]

    class Product(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.weight, self.bias = conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight, self.bias)

    stem.levels = nn.ModuleList(Product(conv) for conv in convs[:2])
    x = torch.randn(2, 3, 45, 67)
    want = x.movedim(1, -1)
    for conv in convs:
        want = conv(want)
    torch.testing.assert_close(stem(x), want, atol=1e-5, rtol=1e-5)
    assert stem.grid((45, 67)) == tuple(want.shape[1:3])


@pytest.mark.parametrize("grid", [(3, 4), (12, 13)])
def test_the_small_transformer_is_attention_by_explicit_features_from_the_values_on(grid: tuple[int, int]) -> None:
    """Both orders of the products: few tokens and many."""
    part = TokenTransformer(12, 8, "performer", drop=0.5).eval()
    nn.init.normal_(part.qkv.weight, std=0.3)
    x = torch.randn(2, *grid, 12)
    q, k, v = part.qkv(part.norm1(x)).flatten(1, 2).chunk(3, -1)
    phi = [(u @ part.w.T - (u * u).sum(-1, keepdim=True) / 2).exp() / 2 for u in (q, k)]
    weights = phi[0] @ phi[1].transpose(1, 2)
    y = v + part.proj(weights @ v / (weights.sum(-1, keepdim=True) + 1e-8))
    y = y + part.mlp.fc2(nn.functional.gelu(part.mlp.fc1(part.norm2(y))))
    torch.testing.assert_close(part(x), y.unflatten(1, grid), atol=1e-5, rtol=1e-4)
    assert (part(x).flatten(1, 2) - v).abs().max() > 0.1
    # Rows of the features are orthogonal and of norm sqrt(m).
    torch.testing.assert_close(part.w @ part.w.T, 4 * torch.eye(4), atol=1e-5, rtol=1e-5)


def test_features_of_gaussian_rows_near_the_exponential_kernel_as_they_grow_in_number() -> None:
    q, k, v = (torch.randn(4, 40, 16, dtype=torch.float64) * 0.3 for _ in range(3))
    exact = (q @ k.transpose(1, 2)).softmax(-1) @ v
    errors = []
    for m in (32, 128, 512, 2048):
        drawn = [torch.randn(m, 16, dtype=torch.float64) for _ in range(8)]
        near = [linear_attention(q, k, v, lambda x, w=w: random_features(x, w), eps=1e-8) for w in drawn]
        errors.append(sum((y - exact).square().mean().item() for y in near))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


def macs(model: nn.Module, *shape: int) -> int:
    return measure.macs(model.eval(), (torch.empty(shape, device="meta"),)).total


def test_performer_splits_cost_linearly_with_pixels_and_softmax_splits_quadratically() -> None:
    with torch.device("meta"):
        ratio = {}
        for kind in ("performer", "softmax"):
            part = TokenTransformer(147, 64, kind)
            ratio[kind] = macs(part, 1, 112, 112, 147) / macs(part, 1, 56, 56, 147)
    assert ratio["performer"] == pytest.approx(4, rel=1e-3)
    assert ratio["softmax"] > 14


def lines(count: int) -> tuple[Tensor, Tensor]:
    """A dozen short lines, light or dark, anywhere, all near one of four directions, which is the label."""
    label = torch.randint(4, (count,))
    at = torch.arange(32.0)
    image = 0.1 * torch.randn(count, 32, 32)
    for _ in range(12):
        angle = torch.pi / 4 * (label + 0.8 * (torch.rand(count) - 0.5))
        sine, cosine = angle.sin()[:, None, None], angle.cos()[:, None, None]
        down, right = at[:, None] - torch.randint(4, 28, (count, 1, 1)), at - torch.randint(4, 28, (count, 1, 1))
        across, along = (down * cosine - right * sine).abs(), (down * sine + right * cosine).abs()
        sign = torch.randint(2, (count, 1, 1)) * 2 - 1
        image += sign * (1.5 - across).clamp(0, 1) * (4.5 - along).clamp(0, 1)
    return image[:, None], label


def learns_lines(seed: int, *, patches: bool, **body: int) -> tuple[float, int]:
    """Accuracy on new images after 60 steps, and what the model costs."""
    torch.manual_seed(seed)
    settings = {**TINY, "dim": 48, "token_dim": 16, "in_chans": 1, "num_classes": 4, "init_std": None, **body}
    model = create_model(SLUG, **settings, img_size=32)
    if patches:
        model.stem.embed = PatchEmbed(1, settings["dim"], 16)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-3, weight_decay=0.05)
    warm = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min(1, (step + 1) / 20))
    for _ in range(60):
        image, label = lines(64)
        loss = nn.functional.cross_entropy(model(image), label)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        warm.step()
    model.eval()
    image, label = lines(512)
    with torch.no_grad():
        right = (model(image).argmax(1) == label).double().mean().item()
    return right, macs(model.to("meta"), 1, 1, 32, 32)


def test_splits_see_lines_that_patches_blur_whether_of_an_equal_body_or_of_an_equal_cost() -> None:
    split, cost = learns_lines(0, patches=False)
    patched, _ = learns_lines(0, patches=True)
    larger, at_least = learns_lines(0, patches=True, dim=64, heads=4, depth=4)
    assert at_least > cost
    assert split > 0.93
    assert max(patched, larger) < split - 0.03


def test_table_and_features_are_fixed_and_survive_saving(tmp_path) -> None:
    model = create_model(SLUG, **TINY, img_size=32)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"stem.positions", "stem.embed.levels.0.w", "stem.embed.levels.1.w"}
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all((p.grad is None) == (name in fixed) for name, p in model.named_parameters())
    save_weights(model.state_dict(), tmp_path / "w.safetensors")
    other = create_model(SLUG, **TINY, img_size=32)
    assert not torch.equal(other.stem.embed.levels[0].w, model.stem.embed.levels[0].w)
    other.load_state_dict(load_weights(tmp_path / "w.safetensors"))
    assert all(torch.equal(other.get_parameter(name), model.get_parameter(name)) for name in fixed)
    angle = 3 / 10000 ** (4 / 24)
    assert model.stem.positions[0, 3, 4].item() == pytest.approx(torch.tensor(angle).sin().item(), abs=1e-6)
    assert model.stem.positions[0, 3, 5].item() == pytest.approx(torch.tensor(angle).cos().item(), abs=1e-6)


def test_token_counts_follow_the_splits_on_any_image() -> None:
    for size, grid in ((224, (14, 14)), (384, (24, 24)), ((100, 47), (7, 3))):
        assert create_model("t2t_vit_7", **TINY, img_size=size).stem.grid == grid
    model = create_model("t2t_vit_7", **TINY, img_size=(100, 47)).eval()
    assert model.features(torch.randn(1, 3, 100, 47))[0].shape == (1, 7, 3, 24)
    assert model(torch.randn(1, 3, 100, 47)).shape == (1, 7)
    with pytest.raises(ValueError, match="img_size"):
        model(torch.randn(1, 3, 47, 100))


def test_weights_of_another_resolution_load_with_a_resized_table() -> None:
    table = golden("t2t_vit")["shapes"]["pos_embed"]
    assert table == [1, 10, 24]
    state = seeded_state(golden("t2t_vit")["shapes"])
    other = tiny(img_size=(80, 50))
    image = state["pos_embed"][:, 1:].unflatten(1, (3, 3)).movedim(-1, 1)
    want = nn.functional.interpolate(image, (5, 3), mode="bicubic").movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(other.stem.positions.data, torch.cat((state["pos_embed"][:, :1], want), 1))
    assert torch.equal(tiny().stem.positions, state["pos_embed"])


def test_another_logit_scale_is_carried_by_the_queries() -> None:
    x = torch.randn(1, 3, 50, 50)
    assert (tiny()(x) - tiny(qk_scale=SCALE)(x)).abs().max() > 1e-3
    torch.testing.assert_close(tiny()(x), tiny(qk_scale=8**-0.5)(x), atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    one = create_model(SLUG, **TINY, img_size=32)
    torch.manual_seed(0)
    two = create_model(SLUG, **TINY, img_size=32, qk_scale=8**-0.5 / 2)
    ratio = two.blocks[0].mixer.qkv.weight / one.blocks[0].mixer.qkv.weight
    torch.testing.assert_close(ratio[:24], torch.full((24, 24), 0.5))
    torch.testing.assert_close(ratio[24:], torch.ones(48, 24))


def test_a_dense_block_adds_channels_and_leaves_those_there_are() -> None:
    model = create_model("t2t_vit_dense", dim=24, heads=4, groups=(2, 2), growth=8, token_dim=8, img_size=32)
    x = torch.randn(2, 5, 24)
    y = model.blocks[0](x)
    assert y.shape == (2, 5, 32)
    assert torch.equal(y[..., :24], x)
    assert [type(block).__name__ for block in model.blocks] == ["DenseBlock"] * 2 + ["Sequential"] + ["DenseBlock"] * 2
    # 24 + 2 * 8 halved, and 2 * 8 more.
    assert model.features(torch.randn(1, 3, 32, 32))[0].shape == (1, 2, 2, 36)


def test_ghost_attention_is_attention_with_the_products_written_out() -> None:
    ghost = create_mixer("ghost_attention", 16, heads=4)
    plain = create_mixer("attention", 16, heads=4, qkv_bias=False)
    q, k, v = (torch.cat((w, s[:, None] * w)) for w, s in zip(ghost.qkv.weight.chunk(3), ghost.scale, strict=True))
    plain.qkv.weight.data, plain.proj = torch.cat((q, k, v)).detach(), ghost.proj
    x = torch.randn(2, 3, 5, 16)
    torch.testing.assert_close(ghost(x), plain(x), atol=1e-6, rtol=1e-5)
    assert ghost.qkv.weight.numel() * 2 == plain.qkv.weight.numel()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": "linear"}, "tokens must be performer or softmax, got 'linear'"),
        ({"body": "wide"}, "body must be plain, squeeze, ghost or dense, got 'wide'"),
        ({"body": "ghost"}, "mlp_ratio=3"),
        ({"heads": 5}, "heads must divide dim"),
        ({"img_size": (64, 2)}, "img_size=64x2 is too small"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(SLUG, **{**TINY, **settings})


def test_an_exported_t2t_vit_agrees_for_every_batch_size(tmp_path) -> None:
    certificate = export_onnx(tiny(), torch.randn(2, 3, 50, 50), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert (certificate.held, certificate.exporter) == ("batch", "fast")
