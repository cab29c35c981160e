"""Re-parameterised convolutions: merged they are one product with the same answer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.layers import BatchNorm, Block, Mlp
from gossamer.layers.fold import fold_batch_norm
from gossamer.layers.reparam import MultiBranchConv, MultiBranchMlp, expand_groups, merge


def lived(model: nn.Module) -> nn.Module:
    """The model with norms that have statistics and weights of their own, in double precision, in eval mode."""
    for part in model.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(part.running_mean)
            nn.init.uniform_(part.running_var, 0.5, 2)
            nn.init.normal_(part.weight, 1, 0.3)
            nn.init.normal_(part.bias)
    return model.double().eval()


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("groups", [(1,), (4,), (1, 2, 4), (8, 4), (2, 6), (12,)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_a_merged_convolution_answers_as_its_branches_did(kernel: int, groups: tuple[int, ...], identity: bool) -> None:
    dim = 24
    for stride in (1,) if identity else (1, 2):
        conv = lived(MultiBranchConv(dim, dim, kernel, stride=stride, groups=groups, pointwise=True, identity=identity))
        x = torch.randn(2, 9, 8, dim, dtype=torch.float64)
        y, plain = conv(x), conv.merged()
        torch.testing.assert_close(plain(x), y, rtol=1e-9, atol=1e-9)
        assert plain.weight.shape[1] == dim // conv.groups
        branches = sum(k * k * dim * dim // g for k, g in [(kernel, g) for g in groups] + [(1, conv.groups)])
        norms = 2 * dim * (len(groups) + 1 + identity)
        assert sum(p.numel() for p in conv.parameters()) == branches + norms
        assert sum(p.numel() for p in plain.parameters()) == kernel**2 * dim**2 // conv.groups + dim


@pytest.mark.parametrize("grid", [(7,), (3, 5), (2, 3, 4)])
def test_kernels_of_one_work_on_any_grid_and_become_linear_layers(grid: tuple[int, ...]) -> None:
    conv = lived(MultiBranchConv(8, 12, 1, groups=(1, 2, 4)))
    plain = conv.merged()
    assert isinstance(plain, nn.Linear)
    x = torch.randn(2, *grid, 8, dtype=torch.float64)
    torch.testing.assert_close(plain(x), conv(x), rtol=1e-9, atol=1e-9)


def test_a_grouped_kernel_is_a_block_diagonal_dense_one() -> None:
    x = torch.randn(2, 12, 6, 7)
    weight = torch.randn(24, 2, 3, 3)
    want = F.conv2d(x, weight, groups=6, padding=1)
    for into in (1, 2, 3, 6):
        dense = expand_groups(weight, 6, into)
        assert dense.shape == (24, 12 // into, 3, 3)
        torch.testing.assert_close(F.conv2d(x, dense, groups=into, padding=1), want, atol=1e-6, rtol=1e-5)
    assert (expand_groups(weight, 6) == 0).sum() >= 24 * 10 * 9
    with pytest.raises(ValueError, match="into=4, groups=6"):
        expand_groups(weight, 6, 4)


def test_norms_in_front_are_folded_and_a_second_merge_changes_nothing() -> None:
    model = nn.Sequential(Block(8, MultiBranchMlp(8, 24), None, norm=BatchNorm), Block(8, nn.Identity(), Mlp(8, 4)))
    model = lived(model)
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    y = model(x)
    assert merge(model) is model
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
    state = {key: value.clone() for key, value in model.state_dict().items()}
    again = merge(model).state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in state.items())


def test_folding_alone_keeps_the_branches_and_a_merge_can_follow() -> None:
    model = lived(nn.Sequential(Block(8, MultiBranchMlp(8, 24), None, norm=BatchNorm)))
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    y = model(x)
    torch.testing.assert_close(fold_batch_norm(model)(x), y, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(merge(model)(x), y, rtol=1e-9, atol=1e-9)


def test_a_merged_mlp_can_be_pruned_and_branches_cannot() -> None:
    mlp = lived(MultiBranchMlp(8, 24))
    assert mlp.widths() == {}
    merge(mlp)
    assert mlp.widths() == {"hidden": 24}
    mlp.keep("hidden", torch.arange(5))
    assert mlp(torch.randn(1, 3, 8, dtype=torch.float64)).shape == (1, 3, 8)


def test_merging_in_training_mode_is_refused() -> None:
    conv = MultiBranchConv(8, 8, 3)
    for refused in (conv.merged, lambda: merge(nn.Sequential(conv))):
        with pytest.raises(ValueError, match="eval mode only"):
            refused()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kernel": 2}, "kernel must be odd"),
        ({"groups": (3,)}, r"divide the channels 8 and 8, got \(3,\)"),
        ({"groups": ()}, "divide the channels"),
        ({"out": 16, "identity": True}, "equal channels and stride 1"),
        ({"stride": 2, "identity": True}, "equal channels and stride 1"),
    ],
)
def test_branches_that_cannot_be_are_refused(settings: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        MultiBranchConv(**{"dim": 8, "out": 8, "kernel": 3, **settings})
