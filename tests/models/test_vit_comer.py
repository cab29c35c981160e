"""ViT-CoMer: equal to the authors' code in both releases; the ViT inside starts as it was pre-trained."""

from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.io import export_onnx
from gossamer.layers.deform import swap_offsets
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from gossamer.models.vit_comer import Injector
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import costs_are_published

TINY = {"dim": 12, "depth": 4, "heads": 2, "deform_heads": 2, "points": 2, "width": 4, "img_size": 64}
OFFICIAL = {
    "vit_comer": ({"dim_ratio": 1.5, "deform_ratio": 1.0}, (1, 3, 64, 96)),
    "vit_comer_detection": (
        {
            "dim_ratio": 0.5,
            "deform_ratio": 0.5,
            "extra": 1,
            "vit_maps": "last",
            "mixer": "plain_window",
            "mixer_options": {"window": 3},
        },
        (1, 3, 96, 64),
    ),
}
OFFSETS = "interactions.1.injector.attention.offsets.weight"


def build(name: str) -> nn.Module:
    return create_model("vit-comer", **TINY, **OFFICIAL[name][0])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_vit_comer_equals_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    saved = golden(name)
    model = load_official(build(name), seeded_state(saved["shapes"], dtype)).to(dtype).eval()
    x = seeded_input(name, OFFICIAL[name][1]).to(dtype).requires_grad_()
    maps = [m.movedim(-1, 1) for m in model.features(x)]
    grad_x, grad_w = torch.autograd.grad(probe(*maps), [x, model.get_parameter(OFFSETS)])
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    for i, m in enumerate(maps):
        torch.testing.assert_close(m, saved[f"output{i}"], **close)
    # Rounding weights and image to fp32 alone moves a few entries of this gradient by 2e-4, 3e-6 of the largest.
    found, wanted = grad_x[..., ::3, ::3].double(), saved["grad_input"].double()
    atol = tolerance if dtype == torch.float64 else 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, atol=atol, rtol=tolerance)
    assert found.isclose(wanted, atol=tolerance, rtol=tolerance).double().mean() > 0.99
    torch.testing.assert_close(swap_offsets(grad_w), saved["grad_weight"], **close)


@pytest.mark.parametrize("name", ["vit_comer_t", "vit_comer_s", "vit_comer_b"])
def test_the_official_checkpoint_fits_but_for_the_row_of_the_class_token(name: str) -> None:
    record, entry = manifest("vit-comer")[name], system("vit-comer")
    with torch.device("meta"):
        model = create_model(name)
        state = {key: torch.empty(shape) for key, shape in record["state_dict"]}
    state = entry.convert(model, rename(state, entry.rules))
    own = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in state.items()} == own
    assert sum(p.numel() for p in model.parameters()) == record["parameters"] - model.levels.shape[1]


@pytest.mark.parametrize("name", ["vit_comer_t", "vit_comer_s", "vit_comer_b"])
def test_vit_comer_costs_what_the_authors_code_costs(name: str) -> None:
    costs_are_published(name)


@pytest.mark.parametrize(("name", "millions"), [("vit_comer_t", 38.7), ("vit_comer_s", 61.4), ("vit_comer_b", 144.7)])
def test_the_papers_segmenters_are_these_backbones_and_upernet_with_both_of_its_heads(name, millions) -> None:
    with torch.device("meta"):
        model = create_model(name)
    d, c = model.levels.shape[1], 512

    def conv(dim: int, out: int, kernel: int) -> int:
        return kernel**2 * dim * out + 2 * out  # behind it a norm

    pooled = 4 * conv(d, c, 1) + conv(d + 4 * c, c, 3)
    joined = 3 * conv(d, c, 1) + 3 * conv(c, c, 3) + conv(4 * c, c, 3)
    classes = (c + 1) * 150 + conv(d, 256, 3) + 257 * 150
    count = sum(p.numel() for p in model.parameters()) + pooled + joined + classes
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_twelve_more_blocks_add_the_parameters_of_twelve_blocks() -> None:
    with torch.device("meta"):
        one, two = create_model("vit_comer_t"), create_model("vit_comer_t", depth=24)
    block = 12 * 192**2 + (3 + 1 + 4 + 1) * 192 + 2 * 2 * 192 + 2 * 192  # products, biases, norms, scales
    assert block == sum(p.numel() for p in one.blocks[0].parameters())
    assert sum(p.numel() for p in two.parameters()) - sum(p.numel() for p in one.parameters()) == 12 * block


def tokens_of(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """The ViT's tokens after each group."""
    seen: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(lambda *given: seen.append(given[2])) for block in model.blocks]
    model.features(image)
    for hook in hooks:
        hook.remove()
    return seen


def test_at_the_start_the_vit_inside_is_the_plain_vit_and_the_pyramid_changes_it_through_gamma() -> None:
    model = create_model("vit-comer", **TINY).eval()
    image = torch.randn(1, 3, 64, 64)
    x = model.positions(model.embed(image))
    plain = []
    for block in model.blocks:
        x = block(x)
        plain.append(x)
    torch.testing.assert_close(tokens_of(model, image), plain, atol=1e-5, rtol=1e-5)
    for interaction in model.interactions[1:]:
        nn.init.constant_(interaction.injector.gamma, 0.3)
    changed = tokens_of(model, image)
    assert torch.equal(changed[0], plain[0])
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(changed[1:], plain[1:], strict=True))


def test_weights_of_a_plain_vit_load_and_its_class_token_is_left_out() -> None:
    vit = {"dim": 12, "depth": 4, "heads": 2, "patch": 16, "img_size": 48, "num_classes": 5}
    state = seeded_state({
        {"stem.tokens": "cls_token", "stem.positions": "pos_embed"}.get(k, k.replace("stem.embed.", "patch_embed.")
         .replace(".mixer.", ".attn.").replace("head.fc.", "head.")): v.shape
        for k, v in create_model("vit_tiny_patch16_224", **vit).state_dict().items()
    })  # fmt: skip
    plain = load_official(create_model("vit_tiny_patch16_224", **vit), state)
    model = create_model("vit-comer", **{**TINY, "img_size": 48})
    cnn = model.cnn.downs[1].conv.weight.clone()
    load_official(model, state)
    x = torch.randn(2, 3, 3, 12)
    torch.testing.assert_close(model.blocks[2](x).flatten(1, 2), plain.blocks[2](x.flatten(1, 2)))
    torch.testing.assert_close(model.positions.table.flatten(1, 2), plain.stem.positions[:, 1:])
    assert torch.equal(model.cnn.downs[1].conv.weight, cnn)
    wider = load_official(create_model("vit-comer", **{**TINY, "img_size": (64, 96)}), state)
    image = state["pos_embed"][:, 1:].view(1, 3, 3, 12).movedim(-1, 1)
    want = nn.functional.interpolate(image, (4, 6), mode="bicubic").movedim(1, -1)
    torch.testing.assert_close(wider.positions.table.detach(), want)
    del state["blocks.2.mlp.fc1.bias"]
    with pytest.raises(ValueError, match=r"blocks\.2\.mlp\.fc1\.bias"):
        load_official(model, state)


def test_four_maps_at_strides_4_8_16_32_of_images_in_multiples_of_32() -> None:
    model = create_model("vit-comer", **TINY, in_chans=1)
    maps = model(torch.randn(2, 1, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(2, 24, 16, 12), (2, 12, 8, 12), (2, 6, 4, 12), (2, 3, 2, 12)]
    with pytest.raises(ValueError, match="multiples of 32, got 96x48"):
        model(torch.randn(1, 1, 96, 48))


def test_gradients_reach_the_convolutions_the_vit_and_gamma() -> None:
    model = create_model("vit-comer", **TINY)
    probe(*model(torch.randn(2, 3, 64, 64))).backward()
    for name in ("cnn.stem.0.conv.weight", "blocks.0.mixer.qkv.weight", "positions.table", "levels", "up.weight"):
        assert model.get_parameter(name).grad.abs().max() > 0, name
    assert all(i.injector.gamma.grad.abs().max() > 0 for i in model.interactions)


def test_the_published_tiny_size_learns_from_a_small_image() -> None:
    model = create_model("vit_comer_t")
    maps = model(torch.randn(1, 3, 128, 128))
    assert [tuple(m.shape) for m in maps] == [(1, 32, 32, 192), (1, 16, 16, 192), (1, 8, 8, 192), (1, 4, 4, 192)]
    probe(*maps).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert model.cnn.stem[0].conv.weight.grad.abs().max() > 0
    assert all(i.injector.gamma.grad.abs().max() > 0 for i in model.interactions)


def test_the_injector_adds_the_mean_of_four_fine_tokens_and_the_enlarged_coarse_map() -> None:
    model = create_model("vit-comer", **TINY)
    injector = model.interactions[0].injector
    assert isinstance(injector, Injector)
    nn.init.constant_(injector.gamma, 2.0)
    for p in (*injector.attention.proj.parameters(), *injector.mlp.fc2.parameters()):
        nn.init.zeros_(p)
    # Of what is read only the bias is left: the same vector in every token of the three maps.
    injector.attention.proj.bias.data += torch.arange(12.0)
    x, c = torch.randn(1, 4, 4, 12), torch.randn(1, 84, 12)
    sizes = [(8, 8), (4, 4), (2, 2)]
    y = injector(x, c, sizes, torch.rand(1, 84, 1, 2))
    torch.testing.assert_close(y, x + 2 * 3 * torch.arange(12.0))


def test_crops_attend_inside_windows_filled_up_with_zero_keys() -> None:
    mixer = create_mixer("plain_window", 8, heads=2, window=3, fill="products")
    x = torch.randn(2, 4, 5, 8)
    qkv = torch.zeros(2, 6, 6, 24)
    qkv[:, :4, :5] = mixer.qkv(x)
    want = torch.empty(2, 6, 6, 8)
    for r in (0, 3):
        for c in (0, 3):
            q, k, v = qkv[:, r : r + 3, c : c + 3].reshape(2, 9, 3, 2, 4).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-2, -1) / 2).softmax(-1) @ v
            want[:, r : r + 3, c : c + 3] = y.transpose(1, 2).reshape(2, 3, 3, 8)
    torch.testing.assert_close(mixer(x), mixer.proj(want[:, :4, :5]))


def test_vit_comer_exports_to_onnx(tmp_path: Path) -> None:
    model = create_model("vit-comer", **TINY, extra=0).eval()
    certificate = export_onnx(model, torch.randn(1, 3, 64, 64), tmp_path / "comer.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"


def test_settings_that_do_not_fit_are_named() -> None:
    for settings, message in (
        ({"depth": 6}, "multiple of 4"),
        ({"dim_ratio": 0.25}, "even .* got 3"),
        ({"mixer": ("attention",)}, "4 names"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model("vit-comer", **{**TINY, **settings})
