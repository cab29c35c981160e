"""XFormer, a reconstruction: the published size, any image, linear growth, any mixer in its fuse blocks."""

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.models import create_model

TINY = {
    "stem_widths": (8, 8),
    "stem_strides": (2, 2),
    "dims": (8, 16),
    "mobile": (1, 0),
    "widths": (0, 24),
    "depths": (0, 1),
    "last": 32,
    "num_classes": 5,
}


def test_the_reconstruction_has_the_published_number_of_parameters() -> None:
    row = catalogue.published("xformer")
    assert row is not None
    with torch.device("meta"):
        model = create_model("xformer")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(row.params_m, rel=0.05)
    assert catalogue.find("xformer").status == "reconstruction"


def test_maps_have_strides_4_to_32_at_any_size_from_32_pixels() -> None:
    model = create_model("xformer", num_classes=0, mobile=(0, 0, 0, 0), depths=(0, 1, 1, 1)).eval()
    for height, width in ((97, 66), (32, 45), (32, 32)):
        maps = model.features(torch.randn(1, 3, height, width))
        sides = [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]
        assert [tuple(m.shape[1:3]) for m in maps] == sides
        assert [m.shape[3] for m in maps] == [64, 96, 128, 160]
        assert all(bool(m.isfinite().all()) for m in maps)


def test_the_backbone_grows_linearly_with_pixels_and_with_plain_attention_it_does_not() -> None:
    def macs(mixer: str, side: int) -> int:
        with torch.device("meta"):
            model = create_model("xformer", mixer=mixer, num_classes=0).eval()
            return measure.macs(model, (torch.empty(1, 3, side, side),)).total

    # Squeeze-excitation sees one token whatever the size.
    assert macs("cross_feature", 512) / macs("cross_feature", 256) == pytest.approx(4, rel=0.002)
    assert macs("attention", 512) / macs("attention", 256) > 4.4


def test_only_the_fuse_blocks_attention_looks_across_the_map() -> None:
    model = create_model("xformer", **TINY).eval()
    x = torch.randn(1, 9, 9, 16, requires_grad=True)
    fuse = model.stages[1][0]

    def reach() -> torch.Tensor:
        (grad,) = torch.autograd.grad(fuse(x)[0, 0, 0].sum(), x)
        return grad[0].abs().sum(-1) > 0

    assert reach().all()
    with torch.no_grad():
        fuse.blocks[0].mixer.proj.weight.zero_()
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[:3, :3] = True
    assert torch.equal(reach(), near)


def test_the_first_map_of_a_fuse_block_is_kept_beside_the_far_one() -> None:
    fuse = create_model("xformer", **TINY).eval().stages[1][0]
    with torch.no_grad():
        fuse.narrow.norm.weight.zero_()
    one, two = torch.randn(2, 1, 4, 4, 16)
    assert not torch.allclose(fuse(one), fuse(two))


def test_plain_attention_takes_the_place_of_cross_features() -> None:
    x = torch.randn(2, 3, 32, 40)
    outputs = []
    for mixer in ("cross_feature", "attention", "context_score", "pool"):
        torch.manual_seed(0)
        model = create_model("xformer", **TINY, mixer=mixer).eval()
        assert model.stages[1][0].blocks[0].mixer.name == mixer
        outputs.append(model(x))
        assert [m.shape for m in model.features(x)] == [(2, 8, 10, 8), (2, 4, 5, 16)]
    assert len({tuple(y[0].tolist()) for y in outputs}) == 4


def far_digits_known(fused: bool, seed: int = 0) -> tuple[float, float]:
    """Loss and share of right answers to "are the two digits, a zero or a one each, alike?", after 90 steps."""
    torch.manual_seed(seed)
    settings = {**TINY, "stem_widths": (8,), "stem_strides": (2,), "heads": 2, "last": 48, "num_classes": 2}
    # Without fuse blocks, inverted residuals in their place that have more parameters.
    settings |= {"depths": (0, 2), "mobile": (1, 0)} if fused else {"depths": (0, 0), "mobile": (1, 4)}
    model = create_model("xformer", **settings, in_chans=1, init_std=None, img_size=(8, 40))
    assert sum(p.numel() for p in model.parameters()) == (19702 if fused else 24474)
    digits = load_digits(n_class=2)
    images = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    kinds = torch.tensor(digits.target)

    def pairs(n: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = torch.randint(first, last, (2, n))
        x = -torch.ones(n, 1, 8, 40)
        x[:, 0, :, :8], x[:, 0, :, -8:] = images[left], images[right]
        return x, (kinds[left] == kinds[right]).long()

    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(90):
        x, y = pairs(50, 0, 280)
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    x, y = pairs(300, 280, 360)
    with torch.no_grad():
        return sum(losses[-10:]) / 10, float((model.eval()(x).argmax(1) == y).float().mean())


def test_fuse_blocks_learn_whether_two_far_digits_are_alike_sooner_than_convolutions_alone() -> None:
    (fused, right), (alone, _) = far_digits_known(True), far_digits_known(False)
    assert right > 0.93
    assert fused < alone / 1.5


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 32 .*31x64"):
        create_model("xformer", depths=(0, 1, 1, 1))(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match="heads=5"):
        create_model("xformer", **TINY, heads=5)
    with pytest.raises(ValueError, match=r"must end in dims\[0\]"):
        create_model("xformer", **{**TINY, "stem_widths": (8, 4)})
    with pytest.raises(ValueError, match="of one length"):
        create_model("xformer", depths=(1,))


def test_a_small_xformer_is_exported(tmp_path) -> None:
    model = create_model("xformer", **TINY)
    certificate = export_onnx(model, torch.randn(2, 3, 16, 24), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
