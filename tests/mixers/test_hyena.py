"""Hyena: equal to the authors' operator, looks where it should, its filters have the rank and the reach they claim."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer import measure
from gossamer.mixers import create_mixer
from gossamer.models.registry import rename, system
from gossamer.ops.spectral import long_convolution
from official import golden, manifest, probe, seeded_input, seeded_state

OPERATORS = {
    "operator_product": {},
    "operator_joint": {"filter": "joint"},
    "operator_joint_parallel": {"filter": "joint", "direction": "parallel"},
    "operator_joint_4dir": {"filter": "joint", "direction": "4dir"},
}


def holder(mixer: nn.Module) -> nn.Module:
    """A module in which the operator lies where a model's rules look for it."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].mixer = mixer
    return model


def load(mixer: nn.Module, state: dict[str, torch.Tensor]) -> None:
    entry = system("hyena-nd")
    model = holder(mixer)
    state = rename({f"blocks.0.attn.{key}": value for key, value in state.items()}, entry.rules)
    model.load_state_dict(entry.convert(model, state))


def reach(mixer: nn.Module, place: tuple[int, ...], grid: tuple[int, ...]) -> torch.Tensor:
    """Which tokens the output at `place` depends on."""
    x = torch.randn(1, *grid, mixer.dim, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mixer.double()(x)[(0, *place)].sum(), x)
    return grad[0].abs().sum(-1) > 1e-13


def test_one_axis_equals_the_authors_sequence_operator() -> None:
    saved = golden("hyena_1d")
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        mixer = create_mixer("hyena", 12, grid=(13,), order=3, hidden=8, causal=True)
        state = seeded_state(saved["shapes"], dtype)
        load(mixer, {k: v for k, v in state.items() if not k.endswith("modulation.deltas")})
        mixer.to(dtype)
        x = seeded_input("hyena_1d", (2, 13, 12)).to(dtype).requires_grad_()
        y = mixer(x)
        grads = torch.autograd.grad(probe(y), [x, mixer.filter.mlps[0][3].weight])
        for own, name in zip((y, *grads), ("output0", "grad_input", "grad_weight"), strict=True):
            torch.testing.assert_close(own, saved[name].to(dtype), rtol=tolerance, atol=tolerance)


def test_operators_of_192_channels_on_14_by_14_patches_have_the_counted_parameters() -> None:
    counts = []
    for options in OPERATORS.values():
        with torch.device("meta"):
            mixer = create_mixer("hyena", 192, grid=(14, 14), **options)
        counts.append(sum(p.numel() for p in mixer.parameters()))
    assert counts == [196_010, 175_338, 303_210, 175_343]


@pytest.mark.parametrize("name", OPERATORS)
def test_the_authors_operators_have_these_tensors(name: str) -> None:
    record = manifest("hyena-nd")[name]
    with torch.device("meta"):
        mixer = create_mixer("hyena", 192, grid=(14, 14), **OPERATORS[name])
    assert sum(p.numel() for p in mixer.parameters()) == record["parameters"]
    entry, model = system("hyena-nd"), holder(mixer)
    state = {f"blocks.0.attn.{k}": torch.empty(shape, device="meta") for k, shape in record["state_dict"]}
    state = entry.convert(model, rename(state, entry.rules))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("grid", [(5, 5), (9, 16), (16, 7)])
def test_the_long_convolution_is_a_convolution_with_the_whole_turned_filter(grid: tuple[int, int]) -> None:
    mixer = create_mixer("hyena", 6, grid=grid, filter="joint").double()
    k = mixer.filter(grid)
    x = torch.randn(2, *grid, 6, dtype=torch.float64)
    padded = F.pad(x.movedim(-1, 1), (grid[1] - 1, 0, grid[0] - 1, 0))
    y = F.conv2d(padded, k.flip(0, 1).movedim(-1, 0)[:, None], groups=6).movedim(1, -1)
    torch.testing.assert_close(long_convolution(x, k), y, rtol=1e-9, atol=1e-9)


def test_the_operator_is_the_recurrence_written_out() -> None:
    mixer = create_mixer("hyena", 4, grid=(5, 6), order=3, scale=0.5).double()
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    x0, x1, x2, v = mixer.short(mixer.in_proj(x)).chunk(4, -1)
    kernels, biases = mixer.filter((5, 6)).chunk(2, -1), mixer.filter.bias.chunk(2)
    for gate, k, bias in ((x2, kernels[0], biases[0]), (x1, kernels[1], biases[1])):
        v = v * gate
        far = torch.zeros_like(v)
        for i in range(5):
            for j in range(6):
                far[:, i:, j:] += 0.5 * k[i, j] * v[:, : 5 - i, : 6 - j]
        v = far + bias * v
    torch.testing.assert_close(mixer(x), mixer.out_proj(x0 * v))


def test_an_output_sees_its_quadrant_and_what_its_short_convolution_touches() -> None:
    mixer = create_mixer("hyena", 4, grid=(9, 8))
    quadrant = torch.zeros(9, 8, dtype=torch.bool)
    quadrant[:6, :5] = True  # one row and one column beyond (4, 3): the 3x3 convolution before the long one
    assert torch.equal(reach(mixer, (4, 3), (9, 8)), quadrant)


def test_a_turned_block_sees_the_opposite_quadrant() -> None:
    mixer = create_mixer("hyena", 4, grid=(9, 8), direction="seq")
    quadrant = torch.zeros(9, 8, dtype=torch.bool)
    quadrant[3:, 2:] = True
    assert torch.equal(reach(mixer, (4, 3), (9, 8)), quadrant)


@pytest.mark.parametrize("direction", ["4dir", "4dirp"])
@pytest.mark.parametrize("grid", [(7,), (6, 5), (3, 4, 3)])
def test_all_orthants_together_see_everything(grid: tuple[int, ...], direction: str) -> None:
    mixer = create_mixer("hyena", 4, grid=grid, direction=direction)
    assert len(mixer.turns) == 2 ** len(grid)
    assert reach(mixer, tuple(n // 2 for n in grid), grid).all()


def test_product_filters_have_rank_one_and_joint_ones_have_more() -> None:
    ranks = {}
    for kind in ("product", "joint"):
        mixer = create_mixer("hyena", 8, grid=(11, 11), filter=kind).double()
        for mlp in mixer.filter.mlps:
            for layer in mlp:
                nn.init.normal_(layer.weight)
        ranks[kind] = torch.linalg.matrix_rank(mixer.filter((11, 11)).movedim(-1, 0), rtol=1e-8)
    assert (ranks["product"] == 1).all()
    assert (ranks["joint"] > 1).all()


@pytest.mark.parametrize("kind", ["product", "joint"])
def test_without_its_window_a_filter_reaches_further(kind: str) -> None:
    @torch.no_grad()
    def radius(window: str) -> float:
        torch.manual_seed(0)
        energy = create_mixer("hyena", 16, grid=(16, 16), filter=kind, window=window).filter((16, 16)).square()
        far = torch.arange(16)[:, None] + torch.arange(16)
        return float((energy.sum(-1) * far).sum() / energy.sum())

    assert radius("none") > 1.5 * radius("standard")


def test_the_window_leaves_a_hundredth_after_the_lengths_of_the_paper() -> None:
    mixer = create_mixer("hyena", 3, grid=(31,), filter="joint")
    window = mixer.filter._windowed(torch.ones(31, 3), [0], [31])
    torch.testing.assert_close(window[-1, 0], torch.tensor(0.01 ** (1 / 1.5)))
    torch.testing.assert_close(window[9, 2], torch.tensor(0.01))


def test_smaller_maps_read_the_beginning_of_the_filter_and_larger_ones_are_refused() -> None:
    mixer = create_mixer("hyena", 4, grid=(9, 7), filter="joint")
    torch.testing.assert_close(mixer.filter((4, 5)), mixer.filter((9, 7))[:4, :5])
    assert mixer(torch.randn(1, 4, 5, 4)).shape == (1, 4, 5, 4)
    with pytest.raises(ValueError, match=r"grids up to \(9, 7\), got \(9, 8\)"):
        mixer(torch.randn(1, 9, 8, 4))


def test_products_grow_linearly_with_tokens_and_transforms_are_reported() -> None:
    def total(side: int) -> tuple[int, tuple[str, ...]]:
        with torch.device("meta"):
            mixer = create_mixer("hyena", 32, grid=(side, side)).eval()
            count = measure.macs(mixer, (torch.empty(1, side, side, 32),))
        # The filter's own network reads 2 * side places, not side^2.
        net = 2 * side * (3 * 64 + 2 * 64 * 64 + 64 * 32)
        return count.total - net, count.uncounted

    (small, names), (middle, _), (large, _) = total(8), total(16), total(32)
    assert middle == 4 * small
    assert large == 16 * small
    assert any("fft" in name for name in names)


def test_transforms_grow_as_n_log_n_and_nothing_is_as_large_as_a_pair_of_tokens() -> None:
    def cost(side: int) -> tuple[float, int]:
        """Points of all transforms times the logarithm of their length, and the largest tensor made."""
        mixer, work, sizes = create_mixer("hyena", 4, grid=(side, side), hidden=8), [], []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                made = [t for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)]
                sizes.extend(t.numel() for t in made)
                if "_fft" in str(func):
                    axes = args[1]
                    work.append(made[0].numel() * math.log2(math.prod(max(args[0].shape[a], 2) for a in axes)))
                return out

        with torch.no_grad(), Watch():
            mixer(torch.randn(1, side, side, 4))
        assert len(work) >= 3  # two transforms and one back, at the least
        return sum(work), max(sizes)

    costs = [cost(side) for side in (16, 32, 64)]
    for (less, _), (more, _), side in zip(costs, costs[1:], (16, 32), strict=False):
        # Four times the tokens, and logarithms longer by the twice as long sides.
        assert more / less == pytest.approx(4 * math.log2(4 * side) / math.log2(2 * side), rel=0.15)
    assert costs[-1][1] < 64**4 / 100


def test_a_step_beyond_the_filter_is_refused() -> None:
    mixer = create_mixer("hyena", 4, grid=(2,), causal=True)
    state = mixer.initial_state(1)
    for _ in range(2):
        _, state = mixer.step(torch.randn(1, 4), state)
    with pytest.raises(ValueError, match=r"grids up to \(2,\), got step 3"):
        mixer.step(torch.randn(1, 4), state)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"order": 1}, "order must be at least 2, got 1"),
        ({"window": "symmetric"}, "for joint filters"),
        ({"causal": True}, "causal needs one grid axis"),
    ],
)
def test_choices_that_do_not_exist_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create_mixer("hyena", 4, grid=(4, 4), **options)
