"""FMViT, a reconstruction: branches merge exactly, attention takes low frequencies and convolutions high ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import catalogue, measure
from gossamer.io import export_onnx
from gossamer.models import create_model
from gossamer.models.fmvit import ConvMixer, MixBlock, PooledAttention, merge

TINY = {"dims": (8, 16), "mixed": (0, 32), "depths": (1, 2), "reductions": (2, 1), "head_dim": 8, "num_classes": 5}
TINY = {**TINY, "stem_widths": (8, 8), "stem_strides": (2, 1)}


def lived(model: nn.Module) -> nn.Module:
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight, 1, 0.3)
            nn.init.normal_(part.bias, std=0.2)
    return model.eval()


@pytest.mark.parametrize("shape", [(2, 3, 64, 64), (1, 3, 49, 35)])
def test_the_merged_network_is_the_trained_one(shape: tuple[int, ...]) -> None:
    model = lived(create_model("fmvit_r_nano", num_classes=7, init_std=None)).double()
    x = torch.randn(shape, dtype=torch.float64)
    before, y = sum(p.numel() for p in model.parameters()), model(x)
    assert y.std() > 1e-3
    merge(model)
    torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-8)
    assert sum(p.numel() for p in model.parameters()) < 0.8 * before
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())


def test_merging_lowers_cost_and_the_number_of_products() -> None:
    with torch.device("meta"):
        model, image = create_model("fmvit_r_nano").eval(), torch.empty(1, 3, 64, 64)
    whole, kernels = measure.macs(model, (image,)).total, products(model)
    merged = merge(create_model("fmvit_r_nano").eval())
    assert measure.macs(merged, (torch.empty(1, 3, 64, 64),)).total < 0.8 * whole
    assert products(merged) < 0.7 * kernels


def products(model: nn.Module) -> int:
    return sum(isinstance(part, nn.Conv2d | nn.Linear) for part in model.modules())


def test_reduced_attention_at_ratio_one_is_multi_head_attention() -> None:
    mixer = lived(PooledAttention(16, head_dim=8))
    x = torch.randn(2, 5, 6, 16)
    y = mixer(x)
    plain = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    merge(mixer)
    plain.in_proj_weight.data = torch.cat((mixer.q.weight, mixer.kv.weight)).detach()
    plain.in_proj_bias.data = torch.cat((mixer.q.bias, mixer.kv.bias)).detach()
    plain.out_proj.weight.data, plain.out_proj.bias.data = mixer.proj.weight.detach(), mixer.proj.bias.detach()
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(plain(tokens, tokens, tokens)[0].view(x.shape), y, rtol=1e-5, atol=1e-5)


def test_products_of_attention_fall_with_the_square_of_the_ratio() -> None:
    def pairs(ratio: int) -> int:
        with torch.device("meta"):
            mixer = PooledAttention(32, head_dim=32, ratio=ratio).eval()
            count = measure.macs(mixer, (torch.empty(1, 16, 16, 32),))
        return sum(n for op, n in count.by_op.items() if "attention" in op or op == "bmm")

    assert pairs(1) == 2 * 256 * 256 * 32
    assert pairs(2) == pairs(1) // 4
    assert pairs(4) == pairs(1) // 16


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, False, 2), (0.5, True, 2), (0.75, True, 1), (1.0, True, 0)])
def test_a_mixing_block_has_the_paths_its_share_leaves_room_for(share: float, low: bool, high: int) -> None:
    block = lived(MixBlock(16, 32, share=share, head_dim=8))
    assert (block.low is not None) == low
    assert len(block.high) == high
    x = torch.randn(2, 6, 7, 16)
    y = block(x)
    assert y.shape == (2, 6, 7, 32)
    torch.testing.assert_close(merge(block)(x), y, rtol=1e-4, atol=1e-4)


def test_only_the_low_path_carries_information_across_the_map() -> None:
    reach = {}
    for share in (0.0, 1.0):
        block = lived(MixBlock(16, 16, share=share, head_dim=8))
        x = torch.randn(1, 9, 9, 16, requires_grad=True)
        (grad,) = torch.autograd.grad(block(x)[0, 0, 0].sum(), x)
        reach[share] = int((grad[0].abs().sum(-1) > 0).sum())
    assert reach == {0.0: 9, 1.0: 81}  # a corner of the 5x5 kernel, and everything


def test_pooled_attention_passes_lower_frequencies_than_convolution() -> None:
    def low_share(y: torch.Tensor, mean: bool = False) -> float:
        y = y if mean else y - y.mean((1, 2), keepdim=True)
        power = torch.fft.fft2(y, dim=(1, 2)).abs().square().mean((0, 3))
        frequency = torch.fft.fftfreq(16).abs()
        low = (frequency[:, None] <= 0.125) & (frequency <= 0.125)
        return float(power[low].sum() / power.sum())

    torch.manual_seed(1)
    noise = torch.randn(8, 16, 16, 32)
    # Queries of neighbours that are alike, as in images: noise with a smooth part.
    smooth = noise + F.avg_pool2d(torch.randn(8, 32, 20, 20), 5, 1).movedim(1, -1) * 5
    with torch.no_grad():
        attention, convolution = PooledAttention(32, ratio=2).eval(), ConvMixer(32, 3).eval()
        assert low_share(attention(smooth)) > low_share(convolution(smooth))
        # White noise has no neighbours alike: there the means over many keys are what is low, the mean of the map.
        assert low_share(attention(noise), mean=True) > low_share(convolution(noise), mean=True) + 0.1


def test_features_have_the_widths_of_the_last_blocks_and_strides_4_to_32() -> None:
    model = create_model("fmvit_r_nano").eval()
    maps = model.features(torch.randn(1, 3, 65, 97))
    assert [tuple(m.shape) for m in maps] == [(1, 17, 25, 24), (1, 9, 13, 64), (1, 5, 7, 128), (1, 3, 4, 256)]


def test_every_variant_has_the_blocks_of_next_vit() -> None:
    for name, depths in (("fmvit_r_s", (3, 4, 10, 3)), ("fmvit_r_b", (3, 4, 20, 3)), ("fmvit_r_l", (3, 4, 30, 3))):
        with torch.device("meta"):
            model = create_model(name)
        mixing = [
            [i for i, b in enumerate(b for b in stage if not hasattr(b, "proj")) if isinstance(b, MixBlock)]
            for stage in model.stages
        ]
        assert mixing == [[], [3], list(range(4, depths[2], 5)), [2]]
        assert model.norm.num_features == 1024


def test_it_is_called_a_reconstruction_and_publishes_no_figures_of_its_own() -> None:
    entry = catalogue.find("fmvit")
    assert entry.status == "reconstruction"
    assert not entry.published


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 32 .*31x64"):
        create_model("fmvit_r_nano")(torch.randn(1, 3, 31, 64))
    with pytest.raises(ValueError, match="head_dim=7"):
        create_model("fmvit_r_nano", head_dim=7)
    with pytest.raises(ValueError, match="of one length"):
        create_model("fmvit_r_nano", depths=(1, 1))
    with pytest.raises(ValueError, match=r"share=1\.5"):
        MixBlock(32, 32, share=1.5)


def test_a_merged_network_is_exported(tmp_path) -> None:
    model = merge(lived(create_model("fmvit", **TINY)))
    certificate = export_onnx(model, torch.randn(2, 3, 16, 16), tmp_path / "m.onnx", dynamic="batch", exporter="fast")
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch"
