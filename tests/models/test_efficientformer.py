"""EfficientFormer: equal to the authors' code in both forms, its attention knows offsets, its norms fold away.

Slimming and its table of latencies are tested in `tests/search/test_slimming.py`.
"""

import pytest
import torch
from torch import nn

from gossamer import catalogue
from gossamer.layers import BatchNorm
from gossamer.layers.fold import fold_batch_norm
from gossamer.mixers import create_mixer
from gossamer.mixers.offset_bias_attention import OffsetBiasAttention
from gossamer.models import create_model, load_official
from gossamer.models.registry import rename, system
from official import golden, manifest, probe, seeded_input, seeded_state
from pyramids import costs_are_published

TINY = {"widths": (8, 12, 16, 24), "depths": (1, 1, 2, 3), "num_classes": 5}
OFFICIAL = {
    "efficientformer": ({"attention_blocks": 2}, (2, 3, 197, 211), "stages.3.2.mixer.qkv.bias"),
    "efficientformer_flat_first": (
        {"attention_blocks": 3, "distillation": False},
        (2, 3, 193, 224),
        "stages.3.0.mixer.proj.bias",
    ),
    "efficientformer_dense": ({"attention_blocks": 2, "dense": 16}, (2, 3, 70, 97), "stages.3.2.mixer.qkv.bias"),
}


def official_model(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = create_model("efficientformer_l1", **TINY, **OFFICIAL[name][0])
    return load_official(model, seeded_state(golden(name)["shapes"], dtype)).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", OFFICIAL)
def test_efficientformer_equals_official(name: str, dtype: torch.dtype, tolerance: float) -> None:
    settings, shape, weight = OFFICIAL[name]
    saved = golden(name)
    model = official_model(name, dtype).eval()
    x = seeded_input(name, shape).to(dtype).requires_grad_()
    outputs = [y.movedim(-1, 1) for y in model.features(x)] if "dense" in settings else [model(x)]
    wanted = [saved["output"]] if "output" in saved else [saved[f"output{i}"] for i in range(4)]
    probe(*outputs).backward()
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    for y, want in zip(outputs, wanted, strict=True):
        torch.testing.assert_close(y, want, **close)
    torch.testing.assert_close(x.grad[..., ::7, ::7], saved["input_grad"], **close)
    torch.testing.assert_close(model.get_parameter(weight).grad, saved["weight_grad"], **close)


def test_training_gives_both_heads_as_the_official_code_and_eval_mode_their_mean() -> None:
    saved = golden("efficientformer")
    model = official_model("efficientformer").train()
    x = seeded_input("efficientformer", (2, 3, 197, 211)).double()
    with torch.no_grad():
        for y, want in zip(model(x), (saved["train0"], saved["train1"]), strict=True):
            torch.testing.assert_close(y, want, atol=1e-5, rtol=1e-5, check_dtype=False)
        pooled = model.eval().norm(model.features(x)[-1]).mean((1, 2))
        mean = (model.head.fc(pooled) + model.head.distilled(pooled)) / 2
        torch.testing.assert_close(model(x), mean)
    one = create_model("efficientformer_l1", **TINY, distillation=False, img_size=64)
    assert one.train()(torch.randn(2, 3, 64, 64)).shape == (2, 5)


def test_every_official_checkpoint_fits() -> None:
    entry = system("efficientformer")
    for name, record in manifest("efficientformer").items():
        with torch.device("meta"):
            model = create_model(name)
        state = {key: torch.empty(shape, device="meta") for key, shape in record["state_dict"]}
        state = entry.convert(model, rename(state, entry.rules))
        own = {key: value.shape for key, value in model.state_dict().items()}
        assert {key: value.shape for key, value in state.items()} == own
        assert sum(p.numel() for p in model.parameters()) == record["parameters"]


@pytest.mark.parametrize("name", [row.name for row in catalogue.find("efficientformer").published])
def test_costs_are_those_published(name: str) -> None:
    costs_are_published(name, params=0.005, macs=0.01)


def test_one_head_less_leaves_the_parameters_that_are_published_without_distillation() -> None:
    with torch.device("meta"):
        model = create_model("efficientformer_l1", distillation=False)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(11.84, rel=0.001)


def test_bias_rows_are_seven_times_the_rows_apart_plus_the_columns_apart() -> None:
    mixer = create_mixer("offset_bias_attention", 16, grid=(7, 7), heads=2, key_dim=8)
    nn.init.normal_(mixer.bias_table)
    y, x = torch.meshgrid(torch.arange(7), torch.arange(7), indexing="ij")
    y, x = y.flatten(), x.flatten()
    row = 7 * (y[:, None] - y[None]).abs() + (x[:, None] - x[None]).abs()
    bias = mixer.bias(49)[0]
    assert torch.equal(bias, mixer.bias_table[:, row])
    assert torch.equal(bias, bias.mT)


@pytest.mark.parametrize("grid", [(9,), (3, 5), (2, 3, 2)])
def test_offset_bias_attention_equals_a_dense_reference(grid: tuple[int, ...]) -> None:
    mixer = create_mixer("offset_bias_attention", 12, grid=grid, heads=3, key_dim=4).double()
    nn.init.normal_(mixer.bias_table)
    x = torch.randn(2, *grid, 12, dtype=torch.float64)
    coords = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1).flatten(0, -2)
    n = len(coords)
    expected = torch.zeros(2, n, 3, 16, dtype=torch.float64)
    qkv = mixer.qkv(x.flatten(1, -2)).view(2, n, 3, 24)
    for head in range(3):
        q, k, v = qkv[:, :, head].split((4, 4, 16), -1)
        for i in range(n):
            logits = []
            for j in range(n):
                row = 0
                for axis, size in enumerate(grid):
                    row = row * size + int((coords[i, axis] - coords[j, axis]).abs())
                logits.append((q[:, i] * k[:, j]).sum(-1) / 2 + mixer.bias_table[head, row])
            weights = torch.stack(logits, -1).softmax(-1)
            expected[:, i, head] = (weights[..., None] * v).sum(1)
    torch.testing.assert_close(mixer(x).flatten(1, -2), mixer.proj(expected.flatten(2)), atol=1e-10, rtol=1e-10)


def test_masked_tokens_are_not_read_by_offset_bias_attention() -> None:
    mixer = create_mixer("offset_bias_attention", 8, grid=(2, 4), heads=2, key_dim=4)
    x = torch.randn(1, 2, 4, 8)
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 1, 2] = False
    changed = x.clone()
    changed[0, 1, 2] += 5
    torch.testing.assert_close(mixer(x, mask=mask)[mask], mixer(changed, mask=mask)[mask])
    assert not torch.allclose(mixer(x)[mask], mixer(changed)[mask])


def test_heads_of_offset_bias_attention_are_pruned_exactly() -> None:
    mixer = create_mixer("offset_bias_attention", 8, grid=(3, 3), heads=4, key_dim=4)
    nn.init.normal_(mixer.bias_table)
    x = torch.randn(2, 3, 3, 8)
    with torch.no_grad():
        mixer.proj.weight.view(8, 4, 16)[:, 2] = 0
    before = mixer(x)
    assert mixer.importance("heads").argmin() == 2
    mixer.keep("heads", torch.tensor([0, 1, 3]))
    assert mixer.widths() == {"heads": 3}
    torch.testing.assert_close(mixer(x), before)


def test_eval_mode_sees_the_biases_of_the_last_training_step() -> None:
    model = create_model("efficientformer_l1", **TINY, img_size=64, distillation=False, layer_scale=0.5)
    x = torch.randn(2, 3, 64, 64)
    before = model.eval()(x)
    table = next(m for m in model.modules() if isinstance(m, OffsetBiasAttention)).bias_table
    loss = model.train()(x).square().sum()
    (grad,) = torch.autograd.grad(loss, [table])
    assert grad.abs().max() > 0
    with torch.no_grad():
        table += 3 * torch.randn_like(table)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.reset_running_stats()
    fresh = create_model("efficientformer_l1", **TINY, img_size=64, distillation=False, layer_scale=0.5)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(x), fresh.eval()(x))
    assert not torch.equal(model(x), before)


def test_folded_norms_leave_the_outputs_unchanged() -> None:
    model = official_model("efficientformer", torch.float32).eval()
    x = seeded_input("efficientformer", (2, 3, 197, 211))
    with torch.no_grad():
        before = model(x)
        assert fold_batch_norm(model) is model
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=1e-5)


def test_4d_blocks_have_no_norm_before_a_branch_and_attention_stands_last() -> None:
    model = create_model("efficientformer_l1", **TINY, attention_blocks=2, img_size=64)
    blocks = [block for stage in model.stages for block in stage]
    assert [block.mixer.name for block in blocks] == ["pool"] * 5 + ["offset_bias_attention"] * 2
    first = model.eval().stages[0][0]
    x = torch.randn(1, 6, 5, 8)
    mixed = nn.functional.avg_pool2d(x.movedim(-1, 1), 3, 1, 1, count_include_pad=False).movedim(1, -1) - x
    a = x + first.scale1 * mixed
    torch.testing.assert_close(first(x), a + first.scale2 * first.mlp(a))


def test_images_of_another_grid_need_a_model_built_for_them() -> None:
    model = create_model("efficientformer_l1", **TINY).eval()
    for side in (193, 224):
        assert model(torch.randn(1, 3, side, side)).shape == (1, 5)
    with pytest.raises(ValueError, match=r"224x224, got 256x256; build the model with img_size=\(256, 256\)"):
        model(torch.randn(1, 3, 256, 256))
    built = create_model("efficientformer_l1", **TINY, img_size=(256, 130)).eval()
    assert built(torch.randn(1, 3, 256, 130)).shape == (1, 5)
    dense = create_model("efficientformer_l1", **TINY, dense=25)
    shapes = [tuple(m.shape) for m in dense.features(torch.randn(1, 3, 90, 130))]
    assert shapes == [(1, 23, 33, 8), (1, 12, 17, 12), (1, 6, 9, 16), (1, 3, 5, 24)]


def test_weights_of_another_size_load_with_resized_bias_tables() -> None:
    state = seeded_state(golden("efficientformer")["shapes"])
    settings = {**TINY, "attention_blocks": 2}
    same = load_official(create_model("efficientformer_l1", **settings), state)
    key = "network.6.3.token_mixer.attention_biases"
    assert torch.equal(same.stages[3][2].mixer.bias_table, state[key])
    other = load_official(create_model("efficientformer_l1", **settings, img_size=(256, 416)), state)
    table = other.stages[3][2].mixer.bias_table
    assert table.shape == (8, 8 * 13)
    # No offset stays no offset, the largest stays the largest.
    torch.testing.assert_close(table[:, [0, -1]], state[key][:, [0, -1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (8, 16), "depths": (1,)}, "equally long"),
        ({"depths": (1, 1, 1, 2), "attention_blocks": 4}, r"0\.\.3"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("efficientformer_l1", **settings)
    with pytest.raises(ValueError, match="bound to a grid"):
        create_mixer("offset_bias_attention", 8)


@pytest.mark.parametrize("mixer", ["window", "attention", "identity"])
def test_another_mixer_takes_poolings_place(mixer: str) -> None:
    model = create_model("efficientformer_l1", **{**TINY, "widths": (8, 16, 24, 32)}, mixer=mixer, img_size=64)
    assert model.stages[1][0].mixer.name == mixer
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 5)
