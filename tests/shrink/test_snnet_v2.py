"""SN-Netv2: paths both ways, low-rank stitches and the sampler, against the authors' code."""

import json
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch

from gossamer.io import export_onnx
from gossamer.measure import macs, parameters
from gossamer.models import create_model
from gossamer.models.stitched import join
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.snnet_v2 import draw_path, group_by_cost, group_chances
from gossamer.trunks.paths import out_indices, two_way
from gossamer.trunks.stitched import Stitch, Stitched
from official import GOLDEN, seeded_input, seeded_state
from shrink.loading import same_after_loading
from shrink.toys import encoder, learned, texts

TINY = {"img_size": (8, 12), "patch": 4, "heads": 2, "num_classes": 3}


@cache
def plans():
    with np.load(GOLDEN / "snnet.npz") as file:
        return json.loads(str(file["plans"]))


def joined(rank=4, dims=(8, 12), depths=(3, 6)):
    """Two ViTs with the weights the golden file was computed from."""
    nets = []
    for k, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        net = create_model("vit_tiny_patch16_224", dim=dim, depth=depth, **TINY)
        state = seeded_state({f"{k}/{key}": value.shape for key, value in net.state_dict().items()})
        net.load_state_dict({key.partition("/")[2]: value for key, value in state.items()})
        nets.append(net.eval())
    return join(nets, ways=2, rank=rank)


@pytest.mark.parametrize("depths", [(12, 12), (12, 24), (3, 6)])
def test_paths_and_their_order_are_the_authors(depths):
    want = plans()[f"v2-{depths[0]}-{depths[1]}"]
    plan = two_way(*depths)
    found = [
        [list(p.anchors), [[last, first] for _, last, _, first in p.places], [layer for _, layer in p.stitches]]
        for p in plan.paths
    ]
    assert found == want["cfgs"]
    assert [layers for *_, layers in plan.groups] == want["num"]
    sampled = [i for i, p in enumerate(plan.paths) if p.sampled]
    if depths[0] == 12:
        assert sampled == want["sampled"]
    # Theirs leaves the stitch that skips every large block out at a depth of 12 only.
    assert len(sampled) == len(plan.paths) - 1


@pytest.mark.parametrize("large", [12, 24])
def test_there_are_135_paths_of_five_kinds(large):
    plan = two_way(12, large)
    kinds = Counter(p.anchors for p in plan.paths)
    assert kinds == {(0,): 1, (1,): 1, (0, 1): 12, (1, 0): 11, (1, 0, 1): 55, (0, 1, 0): 55}
    assert sum(p.sampled for p in plan.paths if p.anchors == (0, 1)) == 11


def test_all_paths_answer_as_the_authors_with_their_low_rank_stitches():
    with np.load(GOLDEN / "snnet-v2.npz") as file:
        outputs, bias = (torch.from_numpy(file[name]) for name in ("outputs", "bias"))
    net = joined()
    x = seeded_input("snnet-v2", (24, 3, 8, 12))
    net.solve([(x,)])
    layers = [layer for group in net.stitches for layer in group]
    torch.testing.assert_close(torch.cat([s.bias for s in layers]), bias, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for layer in layers:
            layer.up.fill_(0.05)
            layer.down.copy_(torch.linspace(-1, 1, layer.down.numel()).view_as(layer.down))
    net.eval()
    for number, want in enumerate(outputs):
        net.path = number
        torch.testing.assert_close(net(x[:2]), want, atol=1e-4, rtol=1e-4)


def test_a_stitch_is_the_same_merged_or_not_and_starts_as_its_least_squares_map():
    torch.manual_seed(0)
    layer = Stitch(6, 10, rank=2)
    x = torch.randn(3, 5, 6)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer.train()(x), plain)
    with torch.no_grad():
        layer.up.normal_()
    apart = layer(x)
    assert not torch.allclose(apart, plain, atol=1e-2)
    layer.eval()
    assert layer.merged
    torch.testing.assert_close(layer(x), apart, atol=1e-5, rtol=1e-5)
    before = layer.joined
    layer.merge()
    assert layer.joined is before
    assert torch.linalg.matrix_rank(layer.whole() - layer.weight) <= 2
    assert not layer.weight.requires_grad
    assert layer.bias.requires_grad
    with torch.no_grad():
        layer.up.zero_()
    torch.testing.assert_close(layer.train().eval()(x), plain)
    with pytest.raises(ValueError, match="rank must not be negative, got -1"):
        Stitch(6, 10, rank=-1)


def test_every_path_runs_the_blocks_of_its_route_and_cost_rises_with_large_blocks():
    net = joined().eval()
    x = seeded_input("v2-cost", (1, 3, 8, 12))
    cost = net.costs((x,))
    for number, path in enumerate(net.paths):
        network = net.network(number)
        large = sum(stop - first for a, first, stop in path.route if a)
        blocks = sum(stop - first for _, first, stop in path.route)
        assert len(network.blocks) == blocks + len(path.stitches)
        assert sum(any(b is mine for mine in net.anchors[1].blocks) for b in network.blocks) == large
        assert cost[number] == macs(net.extract(number), x).total
    for kind in {p.anchors for p in net.paths}:
        ordered = sorted(
            (sum(stop - first for a, first, stop in p.route if a), c)
            for p, c in zip(net.paths, cost, strict=True)
            if p.anchors == kind
        )
        assert all(a[1] < b[1] for a, b in pairwise(ordered) if a[0] < b[0])


def test_groups_are_the_authors_and_every_group_gets_its_share_of_draws():
    groups = group_by_cost(dict(enumerate(plans()["costs"])), 1e9)
    assert groups == plans()["groups"]
    assert torch.equal(group_chances(4), torch.full((4,), 0.25, dtype=torch.float64))
    chances = group_chances(len(groups), 8.0)
    assert float(chances.sum()) == pytest.approx(1)
    assert chances.tolist() == sorted(chances.tolist())
    generator = torch.Generator().manual_seed(0)
    draws = Counter(draw_path(groups, chances, generator) for _ in range(10_000))
    for group, chance in zip(groups, chances.tolist(), strict=True):
        for path in group:
            mean = 10_000 * chance / len(group)
            assert abs(draws[path] - mean) < 4 * mean**0.5
        hits, mean = sum(draws[p] for p in group), 10_000 * chance
        assert abs(hits - mean) < 3 * (mean * (1 - chance)) ** 0.5


def test_dense_tasks_get_four_maps_on_any_path():
    assert out_indices(12, 24, (9, 14, 19, 23)) == plans()["out_indices"] == [4, 7, 9, 11]
    net = joined().eval()
    x = seeded_input("v2-maps", (2, 3, 8, 12))
    for number, path in enumerate(net.paths):
        net.path = number
        maps = net.maps(x, (0, 3, 5))
        assert [m.shape[:3] for m in maps] == [(2, 2, 3)] * 3
        assert {m.shape[3] for m in maps} <= {(8, 12)[a] for a in path.anchors}
    net.path = 1
    seen = []
    hook = net.anchors[1].blocks[3].register_forward_hook(lambda _, __, y: seen.append(y))
    maps = net.maps(x, (3,))
    hook.remove()
    assert torch.equal(maps[0].flatten(1, 2), seen[0][:, 1:])


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="multiple of the blocks of the other, got 8 and 3"):
        two_way(3, 8)
    calibration = texts()
    large, small = encoder().eval(), encoder(dim=16, hidden=32).eval()
    for setting in ({"rank": -1}, {"gap": 0.0}, {"slope": -2.0}, {"keep": 0.0}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            run_pass("snnet_v2", large, calibration, family=[small], **setting)
    before = {k: v.clone() for k, v in large.state_dict().items()}
    with pytest.raises(Unsupported, match="two anchors"):
        run_pass("snnet_v2", large, calibration, family=[small, small])
    with pytest.raises(Unsupported, match="multiple"):
        run_pass("snnet_v2", encoder(depth=3), calibration, family=[small])
    assert all(torch.equal(v, before[k]) for k, v in large.state_dict().items())


@pytest.mark.parametrize("single", [False, True])
def test_the_pass_works_alone_on_text_and_is_the_same_after_loading(single, tmp_path):
    calibration = texts()
    small, large = encoder(dim=16, hidden=32).eval(), encoder(depth=4).eval()
    net, steps = run_pass(
        "snnet_v2", large, calibration, family=[small], rank=4, epochs=0.3, lr=1e-3, keep=0.7, single=single
    )
    assert isinstance(net, Stitched) != single
    assert len(steps) == 1 + single
    x = calibration.example(4)
    if not single:
        assert any(bool(layer.up.any()) for group in net.stitches for layer in group)
    else:
        assert parameters(net) < parameters(large)
        assert export_onnx(net, x, tmp_path / "single.onnx", exporter="fast").max_abs < 1e-4
    same_after_loading(net, x, tmp_path)


def test_drawing_by_cost_gives_the_cheapest_and_the_dearest_paths_more_steps_than_drawing_all_alike():
    with torch.device("meta"):
        net = create_model("snnetv2_s_b").eval()
    cost = net.costs((torch.zeros(1, 3, 224, 224),))
    sampled = {i: cost[i] for i, p in enumerate(net.paths) if p.sampled}
    groups = group_by_cost(sampled, 1e9)
    assert len(groups) > 10
    chances = group_chances(len(groups))
    share = {p: float(c) / len(group) for group, c in zip(groups, chances, strict=True) for p in group}
    ranked = sorted(sampled, key=lambda p: sampled[p])
    ends, alike = [*ranked[:5], *ranked[-5:]], 1 / len(ranked)
    assert all(share[p] > 2 * alike for p in (ranked[0], ranked[-1]))
    assert sum(share[p] for p in ends) > 2 * len(ends) * alike
    assert all(share[p] < alike for p in max(groups, key=len))


def test_joint_training_makes_the_stitched_paths_good():
    calibration = texts()
    small, large = learned(encoder(dim=16, hidden=32), calibration), learned(encoder(), calibration)
    scores = []
    for epochs in (0, 6):
        net, _ = run_pass("snnet_v2", large, calibration, family=[small], rank=8, epochs=epochs, lr=2e-3)
        scores.append(float(net.scores[2:].mean()))
    assert scores[1] > scores[0] + 0.05, scores
    assert scores[1] > 0.9 * float(net.scores[:2].min())
