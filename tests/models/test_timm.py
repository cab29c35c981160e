"""Models of timm given as objects: ours gives their outputs, or says which setting it lacks."""

from typing import Any

import pytest
import torch
from torch import nn

import gossamer
import stand_in
from gossamer.models.timm import from_timm

VIT: dict[str, Any] = dict(
    img_size=(12, 20), patch_size=4, embed_dim=24, depth=2, num_heads=2, num_classes=5, mlp_ratio=2.3
)
SWIN: dict[str, Any] = dict(
    img_size=32, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
)
CONVNEXT: dict[str, Any] = dict(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5)
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vision_transformer.VisionTransformer", VIT),
    "vit without biases": ("vision_transformer.VisionTransformer", {**VIT, "qkv_bias": False, "in_chans": 1}),
    "vit of 1e-5": ("vision_transformer.VisionTransformer", {**VIT, "norm_layer": nn.LayerNorm}),
    "vit with registers": ("vision_transformer.VisionTransformer", {**VIT, "reg_tokens": 3}),
    "vit without classes": ("vision_transformer.VisionTransformer", {**VIT, "num_classes": 0}),
    "deit3": ("vision_transformer.VisionTransformer", {**VIT, "init_values": 1e-6, "no_embed_class": True}),
    "deit": ("deit.VisionTransformerDistilled", VIT),
    "swin": ("swin_transformer.SwinTransformer", SWIN),
    "swin of a wide image": ("swin_transformer.SwinTransformer", {**SWIN, "img_size": (32, 64), "qkv_bias": False}),
    "convnext": ("convnext.ConvNeXt", CONVNEXT),
    "convnext unscaled": ("convnext.ConvNeXt", {**CONVNEXT, "ls_init_value": None, "kernel_sizes": 5}),
}


def timm() -> Any:
    try:
        return stand_in.timm()
    except ImportError:
        pytest.skip("timm is not installed")


def made(place: str, settings: dict[str, Any]) -> nn.Module:
    """A random model of theirs, every weight drawn anew."""
    timm()
    file, _, name = place.partition(".")
    models = __import__(f"timm.models.{file}", fromlist=[name])
    model = getattr(models, name)(**settings).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


@pytest.mark.parametrize("name", KNOWN)
def test_the_model_answers_as_timms_does(name: str, tmp_path) -> None:
    place, settings = KNOWN[name]
    theirs = made(place, settings)
    ours = from_timm(theirs)
    assert ours is not None
    assert not ours.training
    side = settings.get("img_size", (64, 96))
    x = torch.randn(2, settings.get("in_chans", 3), *((side, side) if isinstance(side, int) else side))
    with torch.no_grad():
        want = theirs(x)
        torch.testing.assert_close(ours(x), want, atol=1e-4, rtol=1e-4)
        assert want.std() > 1e-2
    gossamer.save(ours, tmp_path / "m")
    assert torch.equal(gossamer.load(tmp_path / "m")(x), ours(x))


def test_released_sizes_are_read_from_their_names() -> None:
    theirs = timm().create_model("swin_tiny_patch4_window7_224", num_classes=3).eval()
    ours, x = from_timm(theirs), torch.randn(1, 3, 224, 224)
    assert ours is not None
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vit", {"global_pool": "avg"}, "global_pool must be 'token', got 'avg'"),
        ("vit", {"qk_norm": True}, "q_norm must be None, got LayerNorm"),
        ("vit", {"pre_norm": True}, "norm_pre must be None"),
        ("vit", {"act_layer": nn.ReLU}, r"mlp\.act must be GELU, got ReLU"),
        ("vit", {"pos_embed": "none"}, "pos_embed and norm must be there"),
        ("swin", {"window_size": (4, 2)}, "window_size and shift must be"),
        ("swin", {"always_partition": True, "img_size": 16, "window_size": 4}, "window_size and shift must be"),
        ("swin", {"head_dim": 4}, "head_dim must be dim / num_heads"),
        ("convnext", {"use_grn": True}, r"mlp must be Mlp, got GlobalResponseNormMlp"),
        ("convnext", {"conv_mlp": True}, "MLP linear"),
        ("convnext", {"stem_type": "overlap"}, "stem must be patches"),
    ],
)
def test_a_setting_we_do_not_have_is_refused_by_name(name: str, changes: dict[str, Any], message: str) -> None:
    place, settings = KNOWN[name]
    with pytest.raises(ValueError, match=message):
        from_timm(made(place, {**settings, **changes}))


def test_other_modules_are_not_ours_to_read() -> None:
    class VisionTransformer(nn.Module):
        pass

    assert from_timm(VisionTransformer()) is None
    assert from_timm(nn.Linear(2, 2)) is None
