"""CSWin: equal to the authors' code in both forms, a token sees the cross of its stripes and no more."""

import pytest
import torch
from torch import nn

from gossamer import measure
from gossamer.io import export_onnx
from gossamer.layers import Block, Classifier, Mlp
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from official import golden, manifest, seeded_state
from pyramids import costs_are_published, equals_official, manifest_fits

TINY = {"embed_dim": 8, "depths": (1, 2, 1, 1), "heads": (2, 4, 4, 4)}
OFFICIAL = {
    "cswin": (
        {**TINY, "stripes": (1, 2, 4, 2), "img_size": 64, "num_classes": 7},
        (1, 3, 64, 64),
        "stage2.0.attns.1.get_v.weight",
    ),
    "cswin_odd": (
        {**TINY, "stripes": (3, 4, 2, 3), "img_size": 96, "in_chans": 1, "num_classes": 7},
        (1, 1, 96, 96),
        "stage1.0.qkv.weight",
    ),
    "cswin_dense": (
        {**TINY, "heads": (2, 4, 8, 16), "stripes": (1, 3, 4, 7), "dense": True},
        (1, 3, 50, 71),
        "stage3.0.attns.0.get_v.bias",
    ),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_cswin_equals_official(name: str) -> None:
    settings, shape, key = OFFICIAL[name]
    equals_official(name, "cswin", settings, shape, key)


def test_every_official_checkpoint_of_cswin_fits() -> None:
    for name in manifest("cswin"):
        manifest_fits("cswin", name)


@pytest.mark.parametrize("name", ["cswin_t", "cswin_s", "cswin_b", "cswin_b_384"])
def test_cswin_costs_what_is_published(name: str) -> None:
    costs_are_published(name)


def test_what_is_printed_for_cswin_l_is_one_network_in_parameters_and_another_in_macs() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in create_model("cswin_l").parameters()) / 1e6 == pytest.approx(173.26, rel=0.001)
        for side, name, counted, printed in ((224, "cswin_l", 33.13, 31.5), (384, "cswin_l_384", 101.8, 96.8)):
            image = torch.empty(1, 3, side, side)
            one, two = (
                measure.macs(create_model(name, depths=(2, 4, depth, 2)).eval(), (image,)).total / 1e9
                for depth in (1, 2)
            )
            # Each further block of the third stage costs the same.
            assert one + 31 * (two - one) == pytest.approx(counted, rel=0.005)
            assert one + 29 * (two - one) == pytest.approx(printed, rel=0.005)


def plain(mixer, x: torch.Tensor, *, lepe: bool = True) -> torch.Tensor:
    """Each token by itself: attention over the stripe it lies in, and the values around it inside that stripe."""
    b, h, w, _ = x.shape
    heads, d, stripe = mixer.heads, mixer.head_dim, mixer.stripe
    q, k, v = mixer.qkv(x).unflatten(-1, (3, heads, d)).unbind(3)
    out = torch.zeros(b, h, w, heads, d, dtype=x.dtype)
    for head in range(heads):
        vertical = head < heads // 2
        conv = mixer.lepe[0 if vertical else 1]
        channels = slice((head % (heads // 2)) * d, (head % (heads // 2) + 1) * d)
        length = w if vertical else h
        missing = -length % stripe
        before = missing // 2
        for i in range(h):
            for j in range(w):
                start = ((j if vertical else i) + before) // stripe * stripe - before
                band = range(start, start + stripe)
                real = [p for p in band if 0 <= p < length]
                cut = (slice(None), slice(None), real) if vertical else (slice(None), real)
                keys, values = k[cut][..., head, :].flatten(1, 2), v[cut][..., head, :].flatten(1, 2)
                logits = (keys @ q[:, i, j, head, :, None])[..., 0] * d**-0.5
                empty = (stripe - len(real)) * (h if vertical else w)
                total = logits.exp().sum(1) + empty  # Zero keys have logit 0 and value 0.
                out[:, i, j, head] = (logits.exp()[..., None] * values).sum(1) / total[:, None]
                for r in range(3) if lepe else ():
                    for s in range(3):
                        row, column = i + r - 1, j + s - 1
                        if 0 <= row < h and 0 <= column < w and (column if vertical else row) in band:
                            out[:, i, j, head] += v[:, row, column, head] * conv.weight[channels, 0, r, s]
                if lepe:
                    out[:, i, j, head] += conv.bias[channels]
    return mixer.proj(out.flatten(3))


@pytest.mark.parametrize(("shape", "stripe"), [((6, 4), 2), ((5, 7), 3), ((4, 5), 1), ((2, 3), 4)])
@torch.no_grad()
def test_stripes_equal_attention_token_by_token_and_their_borders_stop_the_convolution(shape, stripe) -> None:
    mixer = create_mixer("cross_shaped", 8, heads=4, stripe=stripe).double()
    x = torch.randn(2, *shape, 8, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), plain(mixer, x), atol=1e-10, rtol=1e-10)
    for conv in mixer.lepe:
        nn.init.zeros_(conv.weight)
        nn.init.zeros_(conv.bias)
    torch.testing.assert_close(mixer(x), plain(mixer, x, lepe=False), atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_one_stripe_as_large_as_the_map_is_global_attention() -> None:
    mixer = create_mixer("cross_shaped", 8, heads=4, stripe=5)
    whole = create_mixer("cross_shaped", 8, heads=4, stripe=None)
    state = mixer.state_dict()
    for name in ("weight", "bias"):
        state[f"lepe.0.{name}"] = torch.cat((state.pop(f"lepe.0.{name}"), state.pop(f"lepe.1.{name}")))
    whole.load_state_dict(state)
    x = torch.randn(2, 5, 5, 8)
    torch.testing.assert_close(mixer(x), whole(x), atol=1e-6, rtol=1e-5)
    attend = create_mixer("attention", 8, heads=4)
    attend.load_state_dict({k: v for k, v in state.items() if not k.startswith("lepe")})
    for value in whole.lepe[0].parameters():
        value.zero_()
    torch.testing.assert_close(whole(x), attend(x), atol=1e-6, rtol=1e-5)


def test_a_token_sees_exactly_its_row_band_and_its_column_band() -> None:
    mixer = create_mixer("cross_shaped", 8, heads=2, stripe=2)
    x = torch.randn(1, 8, 10, 8, requires_grad=True)
    reach = torch.autograd.grad(mixer(x)[0, 3, 6].sum(), x)[0].abs().sum((0, 3)) > 0
    cross = torch.zeros(8, 10, dtype=torch.bool)
    cross[2:4] = True
    cross[:, 6:8] = True
    assert torch.equal(reach, cross)


@pytest.mark.parametrize("stripe", [1, 2, 7])
def test_cost_of_attention_grows_with_the_stripe_and_not_with_the_square_of_the_map(stripe: int) -> None:
    with torch.device("meta"):
        mixer = create_mixer("cross_shaped", 64, heads=2, stripe=stripe)
        count = measure.macs(mixer, (torch.empty(1, 28, 42, 64),))
    attention = count.total - 28 * 42 * (4 * 64**2 + 9 * 64)
    assert attention == pytest.approx(28 * 42 * 64 * stripe * (28 + 42), rel=0.01)


def test_only_the_padding_forms_take_any_image_and_their_strides_are_4_8_16_32() -> None:
    settings = {**TINY, "stripes": (1, 2, 7, 7)}
    for form in ({"pad": True}, {"dense": True}):
        maps = create_model("cswin", **settings, **form).features(torch.randn(1, 3, 130, 95))
        assert [tuple(m.shape) for m in maps] == [(1, 32, 24, 8), (1, 16, 12, 16), (1, 8, 6, 32), (1, 4, 3, 64)]
    strict, padded = create_model("cswin", **settings), create_model("cswin", **settings, pad=True)
    padded.load_state_dict(strict.state_dict())
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(strict(x), padded(x))
    with pytest.raises(ValueError, match=r"multiple of 224.*250x190"):
        strict(torch.randn(1, 3, 250, 190))
    with pytest.raises(ValueError, match=r"multiple of 224.*192x192"):
        create_model("cswin", **settings, img_size=192)


def test_a_stage_whose_map_is_its_stripe_attends_over_all_of_it_in_the_classification_form_only() -> None:
    settings = {**TINY, "stripes": (1, 2, 4, 2), "img_size": 64}
    for dense in (False, True):
        model = create_model("cswin", **settings, dense=dense)
        assert [stage[0].mixer.stripe for stage in model.stages] == [1, 2, 4 if dense else None, None]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heads must be even.*got 3"):
        create_mixer("cross_shaped", 12, heads=3, stripe=2)
    with pytest.raises(ValueError, match="stripe must be at least 1, got 0"):
        create_mixer("cross_shaped", 8, heads=2, stripe=0)
    with pytest.raises(ValueError, match="of one length"):
        create_model("cswin", depths=(1, 1))


def test_heads_of_one_direction_can_all_be_cut() -> None:
    mixer, x = create_mixer("cross_shaped", 8, heads=4, stripe=2), torch.randn(1, 4, 4, 8)
    with torch.no_grad():
        mixer.proj.weight.view(8, 4, 2)[:, :2] = 0
        before = mixer(x)
        mixer.keep("heads", torch.tensor([3, 2]))
        torch.testing.assert_close(mixer(x), before)
    assert mixer.shares == [0, 2]


def test_the_dense_form_takes_the_backbone_of_a_classifier() -> None:
    state = seeded_state(golden("cswin_odd")["shapes"])
    settings = {**OFFICIAL["cswin_odd"][0], "img_size": 96}
    strict = load_official(create_model("cswin", **settings), state)
    dense = load_official(create_model("cswin", **settings, dense=True), state)
    x = torch.randn(1, 1, 96, 96)
    torch.testing.assert_close(dense.stages[0](dense.stem(x)), strict.stages[0](strict.stem(x)))
    assert torch.equal(dense.out_norms[0].weight, torch.ones(8))


def learns(mixer: str, **options) -> float:
    """Accuracy on new maps of telling whether two marked tokens, never in one window, share a row or column."""
    torch.manual_seed(0)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        place = torch.randint(0, 4, (count, 2, 2)) + torch.tensor([[0, 0], [4, 4]])
        label = torch.arange(count) % 2
        axis = torch.randint(0, 2, (count,))
        # The second mark lies in the other half of both axes, or on the first one's row or column.
        mark = place[:, 1].clone()
        rows = torch.arange(count)[label == 1]
        mark[rows, axis[rows]] = place[rows, 0, axis[rows]]
        x = torch.zeros(count, 8, 8, 2)
        x[torch.arange(count), place[:, 0, 0], place[:, 0, 1], 0] = 4
        x[torch.arange(count), mark[:, 0], mark[:, 1], 1] = 4
        return x, label

    blocks = [Block(16, create_mixer(mixer, 16, heads=2, **options), Mlp(16, 32)) for _ in range(2)]
    model = nn.Sequential(nn.Linear(2, 16), *blocks, Classifier(16, 2))
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(80):
        x, y = draw(64)
        loss = nn.functional.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, y = draw(512)
    with torch.no_grad():
        return float((model(x).argmax(-1) == y).float().mean())


def test_two_blocks_of_one_token_stripes_match_rows_and_columns() -> None:
    assert learns("cross_shaped", stripe=1) > 0.9
    assert learns("window", window=4) < 0.65


def test_a_small_cswin_exports_to_onnx_for_any_batch(tmp_path) -> None:
    model = create_model(
        "cswin", **{**TINY, "depths": (1, 1), "heads": (2, 2), "stripes": (3, 2)}, img_size=40, pad=True
    )
    certificate = export_onnx(model, torch.randn(1, 3, 40, 40), tmp_path / "m.onnx", dynamic="batch")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
