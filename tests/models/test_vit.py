"""ViT and DeiT: equal to timm's form, weights of every variant fit, any mixer takes attention's place."""

import pytest
import torch
from torch import nn

from gossamer import catalogue
from gossamer.mixers import list_mixers
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import costs_are_published

TINY = {"dim": 24, "depth": 2, "heads": 2, "num_classes": 5, "patch": 4}
OFFICIAL = {
    "deit": ("deit_tiny_patch16_224", {"img_size": (12, 20)}, (2, 3, 12, 20), "stem.positions"),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 12}, (2, 3, 12, 12), "head.distilled.weight"),
    "deit3": ("deit3_small_patch16_224", {"img_size": 12}, (2, 3, 12, 12), "blocks.0.scale1"),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_vit_equals_timm(name: str, dtype: torch.dtype, tolerance: float) -> None:
    variant, settings, shape, weight = OFFICIAL[name]
    saved = golden(name)
    model = create_model(variant, **TINY, **settings)
    load_official(model, seeded_state(saved["shapes"], dtype)).to(dtype).eval()
    x = seeded_input(name, shape).to(dtype).requires_grad_()
    y = model(x)
    probe(y).backward()
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    torch.testing.assert_close(y, saved["output"], **close)
    torch.testing.assert_close(x.grad[..., ::7, ::7], saved["input_grad"], **close)
    torch.testing.assert_close(model.get_parameter(weight).grad, saved["weight_grad"], **close)


def test_every_checkpoint_fits() -> None:
    entry = system("deit")
    for name, record in manifest("deit").items():
        with torch.device("meta"):
            model = create_model(name)
        state = {key: torch.empty(shape, device="meta") for key, shape in record["state_dict"]}
        state = entry.convert(model, rename(state, entry.rules))
        own = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in state.items()} == own, name
        assert sum(p.numel() for p in model.parameters()) == record["parameters"], name


@pytest.mark.parametrize("name", [row.name for row in catalogue.find("deit").published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.01, macs=0.02)


def test_a_distilled_model_gives_two_answers_in_training_and_their_mean_after() -> None:
    model = create_model("deit_tiny_distilled_patch16_224", **TINY, img_size=12)
    nn.init.normal_(model.head.fc.weight)
    x = torch.randn(2, 3, 12, 12)
    answer, distilled = model.train()(x)
    assert not torch.allclose(answer, distilled)
    torch.testing.assert_close(model.eval()(x), (answer + distilled) / 2)


def test_position_tables_of_another_resolution_are_resized_and_the_class_row_is_kept() -> None:
    state = seeded_state(golden("deit_distilled")["shapes"])
    model = load_official(create_model("deit_tiny_distilled_patch16_224", **TINY, img_size=(20, 16)), state)
    table = state["pos_embed"]
    assert torch.equal(model.stem.positions[:, :2], table[:, :2])
    image = table[:, 2:].view(1, 3, 3, 24).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(image, (5, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 20, 24)
    torch.testing.assert_close(model.stem.positions[:, 2:].data, expected)


def test_any_mixer_of_maps_takes_attentions_place() -> None:
    names = [name for name in list_mixers(grid_axes=2) if name != "attention"]
    assert {"pool", "window", "identity", "offset_bias_attention"} <= set(names)
    for name in names:
        model = create_model("vit_tiny_patch16_224", **{**TINY, "dim": 32}, img_size=(16, 24), mixer=name).eval()
        assert model.blocks[1].mixer.name == name
        assert model(torch.randn(1, 3, 16, 24)).shape == (1, 5), name
        assert model.features(torch.randn(1, 3, 16, 24))[0].shape == (1, 4, 6, 32)


def test_a_list_of_mixers_gives_a_hybrid() -> None:
    model = create_model("vit_tiny_patch16_224", **TINY, img_size=16, mixer=("pool", "attention"))
    assert [block.mixer.name for block in model.blocks] == ["pool", "attention"]
    x = torch.randn(1, 4, 4, 24, requires_grad=True)
    near = torch.autograd.grad(model.blocks[0](x)[0, 0, 0].sum(), x)[0].abs().sum((0, 3)) > 0
    assert near.sum() == 4
    far = torch.autograd.grad(model.blocks[1](x)[0, 0, 0].sum(), x)[0].abs().sum((0, 3)) > 0
    assert far.all()
    with pytest.raises(ValueError, match="2 names"):
        create_model("vit_tiny_patch16_224", **TINY, img_size=16, mixer=("pool",))


def test_images_a_patch_does_not_divide_are_refused_or_padded() -> None:
    with pytest.raises(ValueError, match="patch=4, img_size=17x9"):
        create_model("vit_tiny_patch16_224", **TINY, img_size=(17, 9))
    model = create_model("vit_tiny_patch16_224", **TINY, img_size=(17, 9), pad=True).eval()
    x = torch.randn(1, 3, 17, 9)
    whole = create_model("vit_tiny_patch16_224", **TINY, img_size=(20, 12)).eval()
    whole.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), whole(nn.functional.pad(x, (0, 3, 0, 3))))
