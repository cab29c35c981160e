"""S2AFormer, a reconstruction: the published costs, strides, what looks near and what looks far."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.layers.fold import fold_batch_norm
from gossamer.models import create_model
from gossamer.models.s2aformer import Local
from pyramids import costs_are_published

NAMES = [row.name for row in catalogue.find("s2aformer").published]
TINY = {"dims": (8, 16), "depths": (1, 1), "heads": (1, 2), "ratios": (2, 1), "num_classes": 5}


@pytest.mark.parametrize("name", NAMES)
def test_the_reconstruction_costs_what_is_published(name: str) -> None:
    assert catalogue.find(name).status == "reconstruction"
    costs_are_published(name, params=0.01, macs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_cost_grows_a_little_faster_than_pixels(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name).eval()
        small, large = (measure.macs(model, (torch.empty(1, 3, side, side),)).total for side in (224, 256))
    assert 1.306 < large / small < 1.335


def test_any_image_fits_and_strides_are_4_to_32_rounded_up() -> None:
    model = create_model("s2aformer_mini", depths=(1, 1, 1, 1), num_classes=0).eval()
    maps = model.features(torch.randn(1, 3, 97, 113))
    assert [tuple(m.shape) for m in maps] == [(1, 25, 29, 32), (1, 13, 15, 64), (1, 7, 8, 96), (1, 4, 4, 448)]


def test_the_local_module_moves_with_its_input() -> None:
    local = Local(8).eval()
    x = torch.randn(1, 10, 12, 8)
    moved = torch.roll(x, (1, 1), (1, 2))
    torch.testing.assert_close(local(moved)[:, 2:-1, 2:-1], local(x)[:, 1:-2, 1:-2], rtol=1e-5, atol=1e-5)


def test_only_strips_look_across_the_map() -> None:
    stage = create_model("s2aformer_mini", **TINY).eval().stages[0]
    x = torch.randn(1, 9, 9, 8, requires_grad=True)
    reach = [
        (torch.autograd.grad(part(x)[0, 4, 4].sum(), x)[0].abs().sum(-1) > 0).sum().item() for part in (stage[0], stage)
    ]
    assert reach == [9, 81]


def test_batch_norms_fold_away_and_the_answer_stays() -> None:
    model = create_model("s2aformer_mini", **TINY, init_std=None).eval()
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.bias)
    x = torch.randn(1, 3, 33, 42)
    y = model(x)
    torch.testing.assert_close(fold_batch_norm(model)(x), y, rtol=1e-5, atol=1e-5)
    left = [n for n, part in model.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert left == ["stages.0.1.norm1"]  # zeros stand around the map that this one's reader shrinks


def test_group_norms_stand_in_for_batch_norms() -> None:
    model = create_model("s2aformer_mini", **TINY, norm="group").train()
    x = torch.randn(2, 3, 32, 32)
    block = model.stages[0][1]
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.eval()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)
    assert type(block.norm1).__name__ == "GroupNorm1"


def learn(attend: bool) -> float:
    """Share of right answers to "are the two textures in this image alike?", after a short training."""
    torch.manual_seed(0)
    model = create_model(
        "s2aformer_mini", dims=(16,), depths=(2,), heads=(4,), ratios=(1,), num_classes=2, in_chans=1,
        stem_widths=(16,), stem_strides=(2,), init_std=None,
    )  # fmt: skip
    if not attend:
        for _, block in (model.stages[0][:2], model.stages[0][2:]):
            block.mixer = nn.Identity()
    optimiser = torch.optim.Adam(model.parameters(), 5e-3)
    stripes = torch.zeros(2, 4, 4)
    stripes[0, ::2], stripes[1, :, ::2] = 1, 1

    def batch(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        kinds = torch.randint(2, (n, 2))
        x = 0.1 * torch.randn(n, 1, 8, 32)
        x[:, 0, 2:6, 2:6] += stripes[kinds[:, 0]]
        x[:, 0, 2:6, 26:30] += stripes[kinds[:, 1]]
        return x, (kinds[:, 0] == kinds[:, 1]).long()

    for _ in range(110):
        x, target = batch(48)
        loss = F.cross_entropy(model(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, target = batch(256)
    with torch.no_grad():
        return float((model.eval()(x).argmax(1) == target).float().mean())


def test_a_question_about_two_far_textures_is_learned_with_strips_and_not_without() -> None:
    assert learn(True) > learn(False) + 0.2


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="heads=3, dim=8"):
        create_model("s2aformer_mini", **{**TINY, "heads": (3, 2)})
    with pytest.raises(ValueError, match=r"ratios must be at least 1, got \(0, 1\)"):
        create_model("s2aformer_mini", **{**TINY, "ratios": (0, 1)})
    with pytest.raises(ValueError, match="of one length"):
        create_model("s2aformer_mini", depths=(1,))


def test_a_small_s2aformer_is_exported(tmp_path) -> None:
    model = create_model("s2aformer_mini", **TINY)
    certificate = export_onnx(model, torch.randn(2, 3, 16, 24), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
