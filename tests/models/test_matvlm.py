"""MaTVLM: the authors' hybrid and its parts, sizes, checkpoints, splicing, decoding, saving and export."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.io import export_onnx
from gossamer.measure import macs
from gossamer.mixers.mamba2 import Mamba2
from gossamer.models import create_model, load_official
from gossamer.models.matvlm import IGNORE, ParallelBlock, PartialRotaryAttention, splice
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state
from shrink.loading import same_after_loading

GOLDEN: dict[str, Any] = dict(
    dim=40, depth=4, heads=4, kv_heads=2, hidden=48, vocab_size=37, max_len=64, img_size=15, patch=7
)
GOLDEN |= dict(vision_dim=24, vision_depth=2, vision_heads=2, vision_hidden=32)
TINY: dict[str, Any] = dict(GOLDEN, ssm_layers=(0, 2))
SIGLIP = {
    "embeddings.patch_embedding.weight": (1152, 3, 14, 14),
    "embeddings.patch_embedding.bias": (1152,),
    "embeddings.position_embedding.weight": (729, 1152),
    **{
        f"encoder.layers.{i}.{part}.{kind}": ((*size, into) if kind == "weight" and into else size)
        for i in range(27)
        for part, size, into in (
            ("layer_norm1", (1152,), None),
            ("layer_norm2", (1152,), None),
            *((f"self_attn.{name}_proj", (1152,), 1152) for name in ("q", "k", "v", "out")),
            ("mlp.fc1", (4304,), 1152),
            ("mlp.fc2", (1152,), 4304),
        )
        for kind in ("weight", "bias")
    },
    "post_layernorm.weight": (1152,),
    "post_layernorm.bias": (1152,),
    "head.probe": (1, 1, 1152),
    "head.attention.in_proj_weight": (3456, 1152),
}
COUNTS = {
    "tinyllava_phi2_siglip": 2_789_191_680,
    "matvlm_0.125": 2_815_857_024,
    "matvlm_0.25": 2_842_522_368,
    "matvlm_0.50": 2_895_853_056,
}


def tiny(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = create_model("matvlm_0.25", **{**TINY, **changes}).eval()
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.2)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 37, (2, 6))
    ids[0, 1] = ids[1, 4] = -200
    return ids, torch.randn(2, 3, 15, 15)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_scores_of_words_and_an_image_equal_the_authors(which: str, dtype: torch.dtype, tolerance: float) -> None:
    saved = golden("matvlm")
    student = create_model("matvlm_0.25", **GOLDEN, ssm_layers=(0, 2)).to(dtype)
    shapes = saved["shapes"]
    if which == "teacher":
        # The same rule gives the weights of attention layers their names say.
        shapes = {k: v for k, v in shapes.items() if ".mamba." not in k}
        for i in (0, 2):
            for name, rows in (("q_proj", 40), ("k_proj", 20), ("v_proj", 20), ("dense", 40)):
                shapes[f"language_model.model.layers.{i}.self_attn.{name}.weight"] = (rows, 40)
                shapes[f"language_model.model.layers.{i}.self_attn.{name}.bias"] = (rows,)
        student = create_model("tinyllava_phi2_siglip", **GOLDEN).to(dtype)
    load_official(student, seeded_state(shapes, dtype)).eval()
    near = {"atol": tolerance, "rtol": tolerance}
    images = seeded_input("matvlm_images", (3, 3, 15, 15)).to(dtype)
    y = student(saved["ids"], images)
    torch.testing.assert_close(y, saved[which].to(dtype), **near)
    if which == "student":
        spliced, _ = student.stem.see(saved["ids"], images)
        torch.testing.assert_close(spliced, saved["spliced"].to(dtype), **near)
        (grad,) = torch.autograd.grad(probe(y), student.blocks[2].mixer.proj.weight)
        torch.testing.assert_close(grad, saved["proj"].to(dtype), **near)


@pytest.mark.parametrize("name", COUNTS)
def test_released_checkpoints_fit_and_have_as_many_parameters_as_counted(name: str) -> None:
    entry = manifest("matvlm")["phi2_teacher_lm_connector" if name.startswith("tiny") else name]
    with torch.device("meta"):
        model = create_model(name)
        state = {key: torch.empty(shape) for key, shape in entry["state_dict"]}
        tower = {f"vision_tower._vision_tower.vision_model.{k}": torch.empty(s) for k, s in SIGLIP.items()}
    words = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("stem.vision."))
    assert words == COUNTS[name] == entry["parameters"]
    load_official(model, {**state, **tower})
    with pytest.warns(UserWarning, match="holds no vision tower"):
        load_official(model, state)
    key = "language_model.model.layers.0.mlp.fc1.weight"
    with pytest.raises(ValueError, match=r"1 missing: blocks\.0\.mlp\.fc1\.weight"):
        load_official(model, {**{k: v for k, v in state.items() if k != key}, **tower})
    with pytest.raises(ValueError, match="1 left over"):
        load_official(model, {**state, **tower, "language_model.model.layers.0.rest": state[key]})
    with pytest.raises(ValueError, match="missing"):
        load_official(model, {**state, **dict(list(tower.items())[:40])})


def test_a_mamba_layer_costs_6666336_parameters_more_than_the_attention_it_replaces() -> None:
    with torch.device("meta"):
        model = create_model("matvlm_0.125", depth=2, ssm_layers=(0,), vision_depth=1)
    one, two = (sum(p.numel() for p in block.parameters()) for block in model.blocks)
    assert one - two == 6_666_336


def test_the_variants_replace_the_papers_layers() -> None:
    layers = {name: v.get("ssm_layers", ()) for name, v in system("matvlm").variants.items()}
    assert layers["matvlm_0.125"] == (0, 6, 12, 18)
    assert layers["matvlm_0.25"] == (0, 4, 8, 12, 16, 20, 24, 28)
    assert layers["matvlm_0.50"] == tuple(2 * i for i in range(16))
    with torch.device("meta"):
        model = create_model("matvlm_0.50", dim=64, heads=4, hidden=64, vocab_size=9, vision_depth=1)
    assert [type(b.mixer) for b in model.blocks] == [Mamba2, PartialRotaryAttention] * 16


@pytest.mark.parametrize("layers", [(0, 4), (1, 1), (-1,)])
def test_layers_out_of_range_or_twice_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"layers must be different numbers in 0..3, got {list(layers)}")):
        create_model("matvlm_0.25", **GOLDEN, ssm_layers=layers)


def test_the_block_adds_both_branches_of_one_norm() -> None:
    block = tiny().blocks[1]
    assert isinstance(block, ParallelBlock)
    x = torch.randn(2, 5, 40)
    read = block.norm1(x)
    torch.testing.assert_close(block(x), x + block.mixer(read) + block.mlp(read))
    torch.manual_seed(0)
    assert not torch.allclose(block.train()(x), block.eval()(x)), "dropout of the branches"


def test_attention_turns_a_part_of_each_head_and_mamba_none() -> None:
    mixer = tiny().blocks[1].mixer
    x = torch.randn(1, 7, 40)
    (q, k, _), (q5, k5, _) = mixer.project(x), mixer.project(x, start=5)
    assert not torch.allclose(q[..., :4], q5[..., :4], atol=1e-3)
    torch.testing.assert_close(q[..., 4:], q5[..., 4:])
    torch.testing.assert_close(q[:, ::2] @ k.transpose(-2, -1), q5[:, ::2] @ k5.transpose(-2, -1), atol=1e-4, rtol=1e-4)
    mamba = tiny().blocks[0].mixer
    assert not any("frequencies" in name for name, _ in mamba.named_buffers())
    with pytest.raises(ValueError, match=r"turned must be in 1\.\.10"):
        PartialRotaryAttention(40, turned=12, heads=4)


def test_images_are_spliced_where_their_placeholders_stand_and_their_labels_are_ignored() -> None:
    words = torch.arange(1, 13.0).view(2, 6, 1).requires_grad_()
    images = -torch.arange(1, 7.0).view(2, 3, 1)
    holes = torch.zeros(2, 6, dtype=torch.bool)
    holes[0, 0] = holes[0, 3] = True
    labels = torch.arange(12).view(2, 6)
    x, moved = splice(words, images, holes, labels)
    assert x[..., 0].tolist() == [
        [-1, -2, -3, 2, 3, -4, -5, -6, 5, 6],
        [7, 8, 9, 10, 11, 12, 0, 0, 0, 0],
    ]
    i = IGNORE
    assert moved is not None
    assert moved.tolist() == [[i, i, i, 1, 2, i, i, i, 4, 5], [6, 7, 8, 9, 10, 11, i, i, i, i]]
    (grad,) = torch.autograd.grad(x.sum(), words)
    assert torch.equal(grad[..., 0] == 0, holes), "what stands in a hole is not read"
    with pytest.raises(ValueError, match="got 2 images, 1 placeholders"):
        splice(words, images, holes & (torch.arange(6) == 0))


def test_labels_and_tokens_are_spliced_as_the_authors_do() -> None:
    saved = golden("matvlm")
    ids = saved["ids"]
    labels = torch.where(ids > 18, ids, -100)
    words = torch.randn(3, 7, 2)
    assert torch.equal(splice(words, torch.randn(3, 4, 2), ids == -200, labels)[1], saved["labels"])


def test_a_row_with_fewer_images_and_words_alone_give_what_they_give_alone() -> None:
    model = tiny()
    ids, images = prompts()
    ids[1, 4] = 3
    with torch.no_grad():
        both = model(ids, images[:1])
        torch.testing.assert_close(both[1, :6], model(ids[1:])[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(both[:1], model(ids[:1], images[:1]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="each image needs its placeholder"):
        model(ids[1:], images)
    with pytest.raises(ValueError, match="9 tokens, the model takes 8"):
        tiny(max_len=8)(ids, images[:1])


def test_the_first_patch_is_left_out_where_asked() -> None:
    ids, images = prompts()
    whole, less = tiny(), tiny(skip_first=True)
    less.load_state_dict(whole.state_dict())
    one, two = (m.stem.see(ids[:1], images[:1])[0] for m in (whole, less))
    assert (one.shape[1], two.shape[1]) == (9, 8)
    torch.testing.assert_close(torch.cat((one[:, :1], one[:, 2:]), 1), two)


def test_words_before_an_image_do_not_see_it_and_words_behind_do() -> None:
    model = tiny()
    ids, images = prompts()
    with torch.no_grad():
        one, two = model(ids, images), model(ids, images + 1)
    torch.testing.assert_close(one[0, :1], two[0, :1])
    assert not torch.allclose(one[0, -1], two[0, -1], atol=1e-3)


def test_decoding_the_hybrid_step_by_step_equals_the_full_pass() -> None:
    model = tiny()
    ids, images = prompts()
    with torch.no_grad():
        full = model(ids, images)
        tokens, _ = model.stem.see(ids, images)
        states = [block.initial_state(2) for block in model.blocks]
        for t in range(tokens.shape[1]):
            x = tokens[:, t]
            for i, block in enumerate(model.blocks):
                x, states[i] = block.step(x, states[i])
            torch.testing.assert_close(model.head(model.norm(x)[:, None])[:, 0], full[:, t], atol=1e-4, rtol=1e-4)


def test_saved_and_loaded_in_a_fresh_process_it_is_the_same(tmp_path) -> None:
    same_after_loading(tiny(), prompts(), tmp_path)


def test_the_language_model_exports_with_a_free_batch(tmp_path) -> None:
    ids = torch.randint(1, 37, (1, 70))
    found = export_onnx(tiny(max_len=70), ids, tmp_path / "m.onnx", exporter="fast")
    assert found.passed, found.reason
    assert (found.exporter, found.held) == ("fast", "batch"), found.reason


def test_multiply_adds_are_those_counted_by_hand() -> None:
    with torch.device("meta"):
        model = create_model("matvlm_0.25", vision_depth=1)
    n = 512
    counted = macs(model, torch.zeros(1, n, dtype=torch.long), per_layer=True).by_module
    plain, mamba = counted["blocks.1"], counted["blocks.0"]
    mlp = n * 2 * 2560 * 10240
    assert plain == pytest.approx(n * 4 * 2560**2 + 2 * n * n * 2560 + mlp, rel=0.02)
    inside = n * 2560 * (64 + 80) + n * 2 * 2560 * 80
    assert mamba == pytest.approx(n * (10272 + 2560) * 2560 + inside + mlp, rel=0.02)


def test_official_names_of_what_trains_hold_mamba_or_connector() -> None:
    from gossamer.shrink.passes.matvlm import trained

    with torch.device("meta"):
        model = create_model("matvlm_0.25")
    names = set(trained(model, connector=True))
    assert names
    for key, _ in manifest("matvlm")["matvlm_0.25"]["state_dict"]:
        (ours,) = rename({key: torch.empty(0)}, system("matvlm").rules)
        assert (ours in names) == ("mamba" in key or "connector" in key), key
    alone = trained(model, connector=False)
    assert names - set(alone) == {f"stem.connector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
