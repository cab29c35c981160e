"""SiT: the released layout loads in either form, the heads are what they are said to be."""

import pytest
import torch
from torch import nn

from gossamer import catalogue
from gossamer.io import export_onnx
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from gossamer.models.sit import ReconstructionHead, SiT
from gossamer.train.pretrain import reconstruction
from official import manifest, seeded_state
from pyramids import manifest_fits

TINY = {"dim": 24, "depth": 2, "heads": 2, "patch": 4, "img_size": (12, 20)}
PIPELINE = {**TINY, "hidden": 16, "out": 6}


def official_shapes(classes: bool = False) -> dict[str, list[int]]:
    """Keys of a released pre-training checkpoint at the tiny sizes, by the card's layout."""
    c, hidden, out = 24, 16, 6
    shapes = {"cls_token": [1, 1, c], "pos_embed": [1, 16, c], "patch_embed.proj.weight": [c, 3, 4, 4]}
    shapes |= {"patch_embed.proj.bias": [c], "norm.weight": [c], "norm.bias": [c]}
    for i in range(2):
        for name, size in (("attn.qkv", (3 * c, c)), ("attn.proj", (c, c)), ("mlp.fc1", (4 * c, c))):
            shapes |= {f"blocks.{i}.{name}.weight": [*size], f"blocks.{i}.{name}.bias": [size[0]]}
        shapes |= {f"blocks.{i}.mlp.fc2.weight": [c, 4 * c], f"blocks.{i}.mlp.fc2.bias": [c]}
        shapes |= {f"blocks.{i}.norm{k}.{part}": [c] for k in (1, 2) for part in ("weight", "bias")}
    shapes = {f"backbone.{key}": shape for key, shape in shapes.items()}
    for i, (a, b) in zip((0, 3, 6), ((c, hidden), (hidden, hidden), (hidden, out)), strict=True):
        shapes |= {f"head.mlp.{i}.weight": [b, a], f"head.mlp.{i}.bias": [b]}
        shapes |= {f"head.mlp.{i + 1}.running_mean": [b], f"head.mlp.{i + 1}.running_var": [b]}
        shapes |= {f"head.mlp.{i + 1}.num_batches_tracked": []}
        if i < 6:
            shapes |= {f"head.mlp.{i + 1}.weight": [b], f"head.mlp.{i + 1}.bias": [b]}
    for i in (0, 2, 4):
        shapes |= {f"head_recons.mlp.{i}.weight": [c, c], f"head_recons.mlp.{i}.bias": [c]}
    return shapes | {"head_recons.convTrans.weight": [c, 3, 4, 4], "head_recons.convTrans.bias": [3]}


@pytest.mark.parametrize("name", ["sit_tiny", "sit_small", "sit_base", "sit_tiny_pipeline", "sit_base_pipeline"])
def test_every_checkpoint_fits(name: str) -> None:
    manifest_fits("sit", name)


@pytest.mark.parametrize("name", ["sit_tiny", "sit_base"])
def test_a_whole_checkpoint_leaves_its_backbone_in_a_classifier_and_the_new_head_alone(name: str) -> None:
    record = manifest("sit")[f"{name}_pipeline"]
    with torch.device("meta"):
        model = create_model(name, num_classes=7)
    entry = system("sit")
    state = rename({key: torch.empty(shape, device="meta") for key, shape in record["state_dict"]}, entry.rules)
    state = entry.convert(model, state)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", [row.name for row in catalogue.find("sit").published])
def test_parameter_counts_are_those_of_the_authors_code(name: str) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in create_model(name).parameters())
    assert count / 1e6 == pytest.approx(catalogue.published(name).params_m, abs=1e-6)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_the_backbone_is_deits_without_its_head(size: str) -> None:
    with torch.device("meta"):
        ours, deit = create_model(f"sit_{size}"), create_model(f"deit_{size}_patch16_224")
    count = sum(p.numel() for name, p in deit.named_parameters() if not name.startswith("head."))
    assert sum(p.numel() for p in ours.parameters()) == count


def test_a_released_run_is_unwrapped_and_its_teacher_taken(tmp_path) -> None:
    student, teacher = ({f"module.{k}": v for k, v in seeded_state(official_shapes()).items()} for _ in range(2))
    teacher["module.backbone.cls_token"] = teacher["module.backbone.cls_token"] + 1
    torch.save({"student": student, "teacher": teacher, "epoch": 800}, tmp_path / "checkpoint.pth")
    whole = load_official(create_model("sit_tiny_pipeline", **PIPELINE), tmp_path / "checkpoint.pth")
    assert torch.equal(whole.backbone.stem.tokens.data, teacher["module.backbone.cls_token"])
    bare = load_official(create_model("sit_tiny", **TINY), tmp_path / "checkpoint.pth")
    x = torch.randn(2, 3, 12, 20)
    torch.testing.assert_close(bare.eval()(x), whole.eval().backbone.encode(x)[0][:, 0])
    del teacher["module.head.mlp.0.bias"]
    torch.save({"teacher": teacher}, tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"contrast\.mlp\.0\.bias"):
        load_official(create_model("sit_tiny_pipeline", **PIPELINE), tmp_path / "short.pth")


def test_positions_of_another_resolution_are_resized() -> None:
    state = seeded_state(official_shapes())
    model = load_official(create_model("sit_tiny", **{**TINY, "img_size": 16}), {**state, **square(state)})
    table = square(state)["backbone.pos_embed"]
    image = table[:, 1:].view(1, 3, 3, 24).permute(0, 3, 1, 2)
    wide = nn.functional.interpolate(image, (4, 4), mode="bicubic").permute(0, 2, 3, 1).reshape(1, 16, 24)
    torch.testing.assert_close(model.stem.positions[:, 1:].data, wide)
    assert torch.equal(model.stem.positions[:, :1].data, table[:, :1])


def square(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"backbone.pos_embed": state["backbone.pos_embed"][:, :10]}


def test_the_network_paints_patches_from_their_own_tokens_and_compares_the_class_token() -> None:
    model = load_official(create_model("sit_tiny_pipeline", **PIPELINE), seeded_state(official_shapes())).eval()
    x = torch.randn(2, 3, 12, 20)
    compared, painted = model(x)
    assert compared.shape == (2, 6)
    assert painted.shape == x.shape
    torch.testing.assert_close(model.compare(x), compared)
    # By hand: the product of a token with the kernel is its patch.
    token = model.backbone.encode(x)[0][:, 1 + 1 * 5 + 2]
    for i in (0, 2, 4):
        token = nn.functional.gelu(model.reconstruct.mlp[i](token))
    patch = torch.einsum("bc,cihw->bihw", token, model.reconstruct.proj.weight)
    patch = patch + model.reconstruct.proj.bias[:, None, None]
    torch.testing.assert_close(painted[:, :, 4:8, 8:12], patch)
    first = nn.functional.relu(model.contrast.mlp[1](model.contrast.mlp[0](model.backbone.encode(x)[0][:, 0])))
    second = nn.functional.gelu(model.contrast.mlp[4](model.contrast.mlp[3](first)))
    torch.testing.assert_close(model.contrast.mlp[7](model.contrast.mlp[6](second)), compared)


def test_pixels_that_were_not_changed_give_the_painter_no_gradient() -> None:
    head = ReconstructionHead(8, 3, 4)
    tokens = torch.randn(1, 3, 5, 8, requires_grad=True)
    image, changed = torch.randn(1, 3, 12, 20), torch.zeros(1, 1, 12, 20, dtype=torch.bool)
    changed[:, :, 4:6, 8:11] = True
    painted = head(tokens)
    assert painted.shape == image.shape
    reconstruction(painted, image, changed).backward()
    read = tokens.grad.abs().sum(-1)[0] > 0
    assert read.nonzero().tolist() == [[1, 2]]
    assert reconstruction(image, image, changed) == 0


def test_classes_are_told_from_the_class_token_and_the_mean_of_the_others() -> None:
    model = create_model("sit_tiny", **TINY, num_classes=3).eval()
    x = torch.randn(2, 3, 12, 20)
    tokens = model.encode(x)[0]
    both = torch.cat((tokens[:, 0], tokens[:, 1:].mean(1)), 1)
    torch.testing.assert_close(model(x), model.head.fc2(nn.functional.gelu(model.head.fc1(both))))
    assert model.features(x)[0].shape == (2, 3, 5, 24)


def test_images_a_patch_does_not_divide_are_refused_or_filled_up_and_cut_again() -> None:
    odd = {**PIPELINE, "img_size": (13, 18)}
    with pytest.raises(ValueError, match="patch=4, img_size=13x18"):
        create_model("sit_tiny_pipeline", **odd)
    model = create_model("sit_tiny_pipeline", **odd, pad=True).eval()
    x = torch.randn(1, 3, 13, 18)
    assert model(x)[1].shape == x.shape


def test_turns_are_told_from_the_class_token_by_a_head_that_no_released_file_has() -> None:
    model = create_model("sit_tiny_pipeline", **PIPELINE, rotations=True).eval()
    head = {key: value.clone() for key, value in model.turn.state_dict().items()}
    load_official(model, seeded_state(official_shapes()))
    assert all(torch.equal(value, head[key]) for key, value in model.turn.state_dict().items())
    x = torch.randn(2, 3, 12, 20)
    compared, painted, scores = model(x)
    assert scores.shape == (2, 4)
    torch.testing.assert_close(scores, model.backbone.encode(x)[0][:, 0] @ head["weight"].T + head["bias"])
    plain = load_official(create_model("sit_tiny_pipeline", **PIPELINE), seeded_state(official_shapes())).eval()
    for one, two in zip((compared, painted), plain(x), strict=True):
        torch.testing.assert_close(one, two)
    with pytest.raises(ValueError, match="give pretrain=True"):
        create_model("sit_tiny", rotations=True)


def test_what_is_no_vit_with_a_class_token_cannot_be_pretrained() -> None:
    with pytest.raises(ValueError, match=r"class token.*got cct_2_3x2_32"):
        SiT(create_model("cct_2_3x2_32"))
    with pytest.raises(ValueError, match="num_classes=10"):
        create_model("sit_tiny_pipeline", num_classes=10)


@pytest.mark.parametrize("name", ["sit_tiny", "sit_tiny_pipeline"])
def test_it_exports(tmp_path, name: str) -> None:
    sizes = {**TINY, "num_classes": 3} if name == "sit_tiny" else PIPELINE
    model = create_model(name, **sizes).eval()
    certificate = export_onnx(model, (torch.randn(1, 3, 12, 20),), tmp_path / "m.onnx")
    assert certificate.passed, certificate.reason
