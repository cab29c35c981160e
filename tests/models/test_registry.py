"""Systems by name: what is built, what is refused, and how official weights are told."""

import copy

import pytest
import torch
from torch import nn

from gossamer import catalogue
from gossamer.models import create_model, list_models, load_official, model_card
from gossamer.models.registry import config_of, rename, system

TINY = {"dim": 16, "depth": 1, "heads": 2, "patch": 4, "img_size": 8, "num_classes": 3}


def test_a_model_is_built_again_from_its_config() -> None:
    model = create_model("vit_tiny_patch16_224", **TINY)
    again = create_model(**config_of(model))
    again.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(again.eval()(x), model.eval()(x))


def test_lists_that_have_been_through_json_are_taken_as_tuples() -> None:
    model = create_model("efficientformer_l1", widths=[8, 16], depths=[1, 1], img_size=[16, 24])
    assert [len(stage) for stage in model.stages] == [1, 1]


def test_a_slug_builds_with_the_builders_own_defaults() -> None:
    with torch.device("meta"):
        model = create_model("compact-transformers")
    assert len(model.blocks) == 7


def test_what_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="vit_tinny"):
        create_model("vit_tinny")
    with pytest.raises(ValueError, match=r"no setting depht; it has dim, depth"):
        create_model("vit_tiny_patch16_224", depht=3)
    with pytest.raises(ValueError, match="was not made by create_model"):
        config_of(torch.nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("embed_dim", "96", "a whole number"),
        ("embed_dim", True, "a whole number"),
        ("window", 0, "at least 1"),
        ("heads", (1, 0), "at least 1"),
        ("depths", 2, "a sequence, each a whole number"),
        ("depths", "22", "a sequence, each a whole number"),
        ("depths", (1, -1), "at least 0"),
        ("img_size", "32", "a whole number or 2 entries, each a whole number"),
        ("img_size", (32, 32, 32), "a whole number or 2 entries, each a whole number"),
        ("img_size", (32, 0), "at least 1"),
        ("in_chans", 0, "at least 1"),
        ("num_classes", -1, "at least 0"),
        ("patch", (), "a whole number"),
        ("heads", (), "an entry"),
        ("mixer_options", 0, "a mapping"),
        ("drop_path", -0.1, "below 1"),
        ("drop", 1, "below 1"),
        ("mlp_ratio", -1, "positive"),
        ("mlp_ratio", float("nan"), "finite"),
        ("init_std", "small", "a number or None"),
        ("pad", 1, "True or False"),
        ("mixer", None, "a name or a sequence, each a name"),
        ("mixer_options", {"heads": "2"}, "a whole number"),
    ],
)
def test_a_setting_of_another_kind_or_range_is_refused_by_name(setting: str, value: object, allowed: str) -> None:
    name = next(iter(value)) if isinstance(value, dict) else setting
    with pytest.raises(ValueError, match=rf"{name} must .*{allowed}.*, got "):
        create_model("swin", **{setting: value})


def test_planned_systems_are_told_apart_from_unknown_ones() -> None:
    planned = next(entry for entry in catalogue.systems() if entry.status == "planned")
    with pytest.raises(ValueError, match="not built yet"):
        system(planned.slug)


def test_models_are_listed_by_task() -> None:
    text, images = list_models(task="text-classification"), list_models(task="image-classification")
    assert "text_cct_2" in text
    assert "efficientformer_l1" in images
    assert "efficientformer_l1" not in text
    assert set(text) | set(images) <= set(list_models())


def test_a_card_tells_what_is_published_and_what_differs() -> None:
    card = model_card("efficientformer_l1")
    assert card["published_here"]["params_m"] == 12.29
    assert "flatten" in card["about"]


def test_loading_is_strict_and_names_what_is_missing_left_over_or_of_another_shape() -> None:
    model = create_model("vit_tiny_patch16_224", **TINY)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in create_model("vit_tiny_patch16_224", **TINY).state_dict().items()}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del state["norm.bias"]
    state["extra"] = torch.zeros(1)
    state["norm.weight"] = torch.zeros(5)
    with pytest.raises(
        ValueError, match=r"1 missing: norm\.bias; 1 left over: extra; 1 of another shape: norm\.weight"
    ):
        load_official(model, state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_rules_apply_in_order_and_none_drops_a_key() -> None:
    rules = [(r"^old\.", "new."), (r"^new\.a", "new.b"), (r"index$", None)]
    state = {"old.a": torch.tensor(1), "old.index": torch.tensor(2), "c": torch.tensor(3)}
    assert {key: int(value) for key, value in rename(state, rules).items()} == {"new.b": 1, "c": 3}


def test_kernels_lie_as_the_maps_they_meet_and_answer_as_plain_ones_do() -> None:
    model = create_model("resnet50_rgb", backbone="resnet18", width=8, img_size=32, num_classes=3).eval()
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous()
    kernels = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert all(k.is_contiguous(memory_format=torch.channels_last) for k in kernels)
    assert not all(k.is_contiguous() for k in kernels)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), plain(x))
