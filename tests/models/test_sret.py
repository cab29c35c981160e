"""SReT: equal to the authors' code, one block for all its passes, attention inside its slices alone."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.mixers import create_mixer
from gossamer.mixers.sliced import fixed_order
from gossamer.models import create_model, load_official
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY = {"base_dim": 8, "heads": (1, 2, 4), "depths": (2, 4, 2), "in_chans": 1, "num_classes": 7, "img_size": 64}
WHOLE = {"groups": (1, 1, 1), "second_groups": (1, 1, 1)}
OFFICIAL = {
    "sret": ({}, (2, 1, 64, 64), "transformers.0.blocks.0.attn.qkv.weight"),
    "sret_drawn": (
        {"second_groups": (4, 2, 1), "mlp_ratio": 3.0, "projection_ratio": 2},
        (1, 1, 64, 64),
        "transformers.0.blocks.1.mlp.fc1.weight",
    ),
    "sret_noslice": (
        {**WHOLE, "mlp_ratio": 4.0, "img_size": 40},
        (1, 1, 40, 40),
        "transformers.1.blocks.4.mlp.fc1.weight",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_sret_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "sret", {**TINY, **settings}, shape, key)


def test_every_official_checkpoint_of_sret_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    records = {name.lower(): record for name, record in manifest("sret").items()}
    monkeypatch.setattr("pyramids.manifest", lambda slug: records)
    for name in records:
        manifest_fits("sret", name)


@pytest.mark.parametrize("name", ["sret_t", "sret_lt", "sret_s", "sret_t_noslice", "sret_lt_noslice", "sret_s_noslice"])
def test_sret_costs_what_is_published(name: str) -> None:
    costs_are_published(name, params=0.002)


def test_slices_save_a_fifth_of_lt_and_divide_the_products_of_attention_by_their_number() -> None:
    totals = []
    for name in ("sret_lt", "sret_lt_noslice"):
        with torch.device("meta"):
            model = create_model(name).eval()
            count = measure.macs(model, (torch.empty(1, 3, 224, 224),))
        totals.append(count.total)
    assert totals[0] / totals[1] == pytest.approx(0.82, abs=0.01)
    mixer = {groups: create_mixer("sliced", 32, heads=4, groups=groups) for groups in (1, 4, 8)}
    x = torch.randn(2, 64, 32)
    count = {groups: measure.macs(m, (x,)).total - 2 * 64 * 4 * 32 * 32 for groups, m in mixer.items()}
    assert count == {groups: 2 * 2 * 64 * 64 * 32 // groups for groups in mixer}


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize(("shape", "groups"), [((24,), 4), ((5, 7), 4), ((3, 4, 2), 1), ((2, 3, 5), 7)])
def test_slices_are_global_attention_with_other_groups_masked(
    shape: tuple[int, ...], groups: int, shuffled: bool
) -> None:
    mixer = create_mixer("sliced", 8, heads=2, groups=groups, shuffled=shuffled).double().eval()
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    n = x.flatten(1, -2).shape[1]
    order = fixed_order(n) if shuffled else torch.arange(n)
    group = torch.empty(n, dtype=torch.long)
    group[order] = torch.arange(n) // -(-n // groups)
    q, k, v = mixer.project(x.flatten(1, -2))
    logits = (q @ k.transpose(-2, -1) / 2).masked_fill(group[:, None] != group, -torch.inf)
    y = mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).view(x.shape)
    torch.testing.assert_close(mixer(x), y, atol=1e-5, rtol=1e-5)
    if groups == 1:
        whole = create_mixer("attention", 8, heads=2).double()
        whole.load_state_dict(mixer.state_dict())
        torch.testing.assert_close(mixer(x), whole(x), atol=1e-6, rtol=1e-6)


def test_tokens_that_groups_do_not_divide_are_refused_unless_padded() -> None:
    mixer = create_mixer("sliced", 8, heads=2, groups=4, pad=False)
    with pytest.raises(ValueError, match=r"groups=4, tokens=35"):
        mixer(torch.randn(1, 5, 7, 8))
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        create_mixer("sliced", 8, heads=2, groups=0)
    with pytest.raises(ValueError, match="groups=8, tokens=25"):
        create_model("sret", **{**TINY, "img_size": 40}, pad=False)(torch.randn(1, 1, 40, 40))


def test_the_order_is_drawn_anew_in_training_and_in_eval_mode_only_on_request() -> None:
    x = torch.randn(2, 1, 64, 64)
    model = create_model("sret", **TINY).eval()
    assert torch.equal(model(x), model(x))
    fresh = create_model("sret", **TINY, fresh=True).eval()
    fresh.load_state_dict(model.state_dict())
    one, two = fresh._maps(x), fresh._maps(x)
    assert not torch.allclose(one[0], two[0], atol=1e-5)
    # Stages whose second pass is not sliced draw nothing.
    y = torch.randn(1, 4, 4, 16)
    assert torch.equal(fresh.stages[1](y), fresh.stages[1](y))
    torch.manual_seed(5)
    one = fresh(x)
    torch.manual_seed(5)
    assert torch.equal(fresh(x), one)
    stage = model.train().stages[0]
    y = torch.randn(1, 8, 8, 8)
    assert not torch.allclose(stage(y), stage(y), atol=1e-5)


def test_more_passes_add_projections_and_no_other_parameters() -> None:
    def parts(loops: int) -> tuple[int, int]:
        model = create_model("sret", **{**TINY, "depths": (loops, 2 * loops, loops)}, loops=loops)
        extra = sum(p.numel() for name, p in model.named_parameters() if ".projections." in name)
        return sum(p.numel() for p in model.parameters()) - extra, extra

    counts = [parts(loops) for loops in (1, 2, 4)]
    assert len({shared for shared, _ in counts}) == 1
    assert [extra for _, extra in counts] == [counts[0][1] * loops for loops in (1, 2, 4)]
    with pytest.raises(ValueError, match=r"heads must be multiples .* got \(2, 3, 6\)"):
        create_model("sret", heads=(2, 3, 6))
    with pytest.raises(ValueError, match=r"loops=3, depths=\(2, 4, 2\)"):
        create_model("sret", **TINY, loops=3)


def test_the_gradient_of_a_shared_block_is_the_sum_over_its_passes() -> None:
    recursion = create_model("sret", **TINY, **WHOLE).eval().stages[1][0]
    x = torch.randn(2, 4, 4, 16)
    recursion(x).square().sum().backward()
    copies = [copy.deepcopy(recursion.block) for _ in range(2)]
    for block in copies:
        block.zero_grad()
    y = x
    for block, projection in zip(copies, recursion.projections, strict=True):
        y = projection(block(y))
    y.square().sum().backward()
    for shared, one, two in zip(recursion.block.parameters(), *(c.parameters() for c in copies), strict=True):
        assert bool((one.grad != 0).any())
        torch.testing.assert_close(shared.grad, one.grad + two.grad, atol=1e-3, rtol=1e-3)


def test_residual_sums_are_weighed_by_learned_numbers() -> None:
    block = create_model("sret", **TINY, **WHOLE).stages[0][0].block
    x = torch.randn(1, 8, 8, 8)
    with torch.no_grad():
        block.coefficients.copy_(torch.tensor([0.5, 2.0, -1.0, 3.0]))
        y = 0.5 * x + 2 * block.mixer(block.norm1(x))
        torch.testing.assert_close(block(x), -y + 3 * block.mlp(block.norm2(y)))


def test_later_passes_let_information_cross_the_slices_of_the_first() -> None:
    recursion = create_model("sret", **TINY).eval().stages[0][0]
    x = torch.randn(1, 8, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(recursion.block(x)[0, 0, 0].sum(), x)
    # Eight runs of eight tokens: a row each.
    assert (grad[0].abs().sum(-1) > 0).nonzero()[:, 0].unique().tolist() == [0]
    (grad,) = torch.autograd.grad(recursion(x)[0, 0, 0].sum(), x)
    assert (grad[0].abs().sum(-1) > 0).all()


def test_both_names_of_a_shared_tensor_are_read_and_must_agree() -> None:
    state = seeded_state(golden("sret")["shapes"])
    second = {
        key.replace("blocks.0.", "blocks.2.").replace("blocks.4.", "blocks.6."): value.clone()
        for key, value in state.items()
        if ".blocks.0." in key or ".blocks.4." in key
    }
    assert not set(second) & set(state)
    one = load_official(create_model("sret", **TINY), state).eval()
    two = load_official(create_model("sret", **TINY), {**state, **second}).eval()
    x = torch.randn(1, 1, 64, 64)
    assert torch.equal(one(x), two(x))
    for name in ("attn.proj.weight", "coefficient3.bias"):
        key = f"transformers.1.blocks.6.{name}"
        with pytest.raises(ValueError, match="two values for the shared tensor"):
            load_official(create_model("sret", **TINY), {**state, **second, key: second[key] + 1})


def test_position_maps_of_another_resolution_are_resized() -> None:
    state = seeded_state(golden("sret")["shapes"])
    model = load_official(create_model("sret", **{**TINY, "img_size": (40, 88)}), state)
    want = F.interpolate(state["pos_embed"], (5, 11), mode="bicubic").permute(0, 2, 3, 1)
    torch.testing.assert_close(model.stem[1].table.data, want)
    assert [tuple(m.shape) for m in model.features(torch.randn(1, 1, 40, 88))] == [
        (1, 5, 11, 8),
        (1, 3, 6, 16),
        (1, 2, 3, 32),
    ]


def test_drop_path_rates_are_those_of_the_block_not_of_the_pass() -> None:
    model = create_model("sret_t", drop_path=0.2)
    rates = [r.block.drop_path.rate for stage in model.stages for r in stage]
    entries = [0, 1, *range(4, 9), *range(14, 17)]
    assert rates == pytest.approx([0.2 * i / 20 for i in entries])


def test_any_mixer_stands_in_the_blocks_of_sret() -> None:
    x = torch.randn(2, 1, 64, 64)
    answers = set()
    for mixer in ("sliced", "pool", "attention", "spatial_fc"):
        torch.manual_seed(0)
        answers.add(tuple(create_model("sret", **TINY, mixer=mixer)(x)[0].tolist()))
    assert len(answers) == 4


def alike_known(loops: int, seed: int = 0) -> tuple[float, float]:
    """Loss, and share of right answers to "are the textures at the two ends alike?", after 120 steps.

    The first pass attends inside slices of three rows, too few to compare the ends; later ones attend to everything.
    One pass has a projection twice as wide, so that parameters are equal.
    """
    torch.manual_seed(seed)
    settings = {"base_dim": 16, "heads": (1,), "groups": (4,), "second_groups": (1,), "mlp_ratio": 2.0, "in_chans": 1}
    model = create_model(
        "sret", **settings, depths=(loops,), loops=loops, projection_ratio=2 / loops, stem_strides=(2, 1),
        drop_path=0.0, init_by_fan=True, num_classes=2, img_size=(24, 8),
    )  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(5490, rel=0.01)
    stripes = torch.zeros(2, 4, 4)
    stripes[0, ::2], stripes[1, :, ::2] = 1, 1
    kinds = torch.randint(2, (1800, 2))
    x, y = 0.1 * torch.randn(1800, 1, 24, 8), (kinds[:, 0] == kinds[:, 1]).long()
    x[:, 0, 2:6, 2:6] += stripes[kinds[:, 0]]
    x[:, 0, 18:22, 2:6] += stripes[kinds[:, 1]]
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for index in torch.stack([torch.randperm(1500) for _ in range(4)]).flatten().split(50):
        loss = F.cross_entropy(model(x[index]), y[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        right = (model.eval()(x[1500:]).argmax(1) == y[1500:]).float().mean()
    return sum(losses[-10:]) / 10, float(right)


def test_two_passes_learn_in_a_number_of_steps_what_one_pass_of_as_many_parameters_does_not() -> None:
    (once, _), (twice, right) = alike_known(1), alike_known(2)
    assert right > 0.95
    assert twice < once / 4


def test_a_small_sret_is_exported_with_slices_drawn_and_padded(tmp_path: Path) -> None:
    small = {"heads": (1, 2), "depths": (2, 2), "groups": (4, 1), "second_groups": (2, 1), "img_size": (72, 40)}
    model = create_model("sret", **{**TINY, **small}).eval()
    certificate = export_onnx(model, torch.randn(2, 1, 72, 40), tmp_path / "m.onnx", dynamic="batch", tolerance=1e-4)
    assert certificate.passed, certificate.reason
