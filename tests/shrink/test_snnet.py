"""SN-Net: paths, stitching layers, costs and training, against the authors' code and released tables."""

import json
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import gossamer
from gossamer.io import export_onnx
from gossamer.measure import macs, parameters
from gossamer.models import create_model, load_official
from gossamer.models.stitched import join
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.trunks.anchors import block_tokens
from gossamer.trunks.paths import Path, one_way, unequal_pairs, window_pairs
from gossamer.trunks.stitched import Stitched
from official import GOLDEN, seeded_input, seeded_state
from shrink.loading import same_after_loading
from shrink.toys import encoder, learned, texts

NAMES = {
    "stem.embed.": "patch_embed.",
    "stem.tokens": "cls_token",
    "stem.positions": "pos_embed",
    ".mixer.": ".attn.",
    "head.fc": "head",
}
TINY = {"img_size": (8, 12), "patch": 4, "heads": 2, "num_classes": 3}


@cache
def authors():
    """What the authors' code gave: `plans` (path lists, groups, released table) and arrays."""
    with np.load(GOLDEN / "snnet.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in ("flat_w", "flat_b", "outputs")}
        return {**json.loads(str(file["plans"])), **arrays}


def family(dims=(8, 12, 16), depths=(3, 3, 3)):
    """ViTs with the weights the golden file was computed from."""
    nets = []
    for k, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        net = create_model("vit_tiny_patch16_224", dim=dim, depth=depth, **TINY)
        state = seeded_state({f"{k}/{key}": value.shape for key, value in net.state_dict().items()})
        net.load_state_dict({key.partition("/")[2]: value for key, value in state.items()})
        nets.append(net.eval())
    return nets


def described(path: Path):
    """A path of a plan of one stage as the authors write it."""
    return [list(path.anchors), [[p[1], p[3]] for p in path.places], [layer for _, layer in path.stitches]]


@pytest.mark.parametrize(
    ("name", "depth", "kernel", "stride", "nearest"),
    [("12-2-1", 12, 2, 1, True), ("12-3-2", 12, 3, 2, True), ("5-2-1-all", 5, 2, 1, False)],
)
def test_paths_and_their_order_are_the_authors(name, depth, kernel, stride, nearest):
    plan = one_way([(depth,)] * 3, kernel=kernel, stride=stride, nearest=nearest)
    assert [described(path) for path in plan.paths] == authors()[name]


def test_three_anchors_of_12_blocks_make_71_paths_or_732_and_11_layers_a_pair():
    near, all_ = one_way([(12,)] * 3), one_way([(12,)] * 3, nearest=False)
    assert (len(near.paths), len(all_.paths)) == (71, 732)
    assert authors()["12-2-1-all"] == 732
    assert near.groups == [(0, 1, 0, 11), (1, 2, 0, 11)]
    assert len(window_pairs(12, 2, 1)) == 34


def test_stitches_of_swin_are_the_authors_41_paths():
    depths = [(2, 2, 6, 2), (2, 2, 18, 2), (2, 2, 18, 2)]
    plan = one_way(depths)
    assert len(plan.paths) == 41
    found = []
    for path in plan.paths[3:]:
        (a, last, b, first), (group, layer) = path.places[0], path.stitches[0]
        stage = plan.groups[group][2]
        found.append([[a, b], stage, [last - sum(depths[a][:stage]), first - sum(depths[b][:stage])], layer])
    assert found == authors()["swin"]


def test_blocks_of_a_deeper_anchor_are_entered_at_the_same_share_of_the_shallow_one():
    pairs = unequal_pairs(6, 12)
    assert all(j // 2 == i < j for i, j, _ in pairs)
    assert len(pairs) == 11


def test_stitching_layers_and_the_outputs_of_all_paths_equal_the_authors():
    want = authors()
    net = join(family())
    x = seeded_input("snnet", (24, 3, 8, 12))
    net.solve([(x[:10],), (x[10:],)])
    net.eval()
    layers = [layer for group in net.stitches for layer in group]
    torch.testing.assert_close(torch.cat([s.weight.flatten() for s in layers]), want["flat_w"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat([s.bias for s in layers]), want["flat_b"], atol=1e-4, rtol=1e-4)
    net.final_norm = False  # as released
    for number, expected in enumerate(want["outputs"]):
        net.path = number
        torch.testing.assert_close(net(x[:2]), expected, atol=2e-4, rtol=1e-4)
    net.final_norm = True
    assert not torch.allclose(net(x[:2]), want["outputs"][-1], atol=1e-2)


def test_every_path_of_the_released_deit_table_has_its_parameters_and_cost():
    with torch.device("meta"):
        net = create_model("snnet_deit_ti_s_b").eval()
    cost = net.costs((torch.zeros(1, 3, 224, 224),))
    tables = [p.stem.tokens.numel() + p.stem.positions.numel() for p in net.anchors]
    for number, (params, flops) in enumerate(authors()["deit"]):
        path = net.paths[number]
        # The released count leaves the class token and positions of a stitched path out.
        ours = parameters(net.network(number)) - (tables[path.anchors[0]] if path.stitches else 0)
        assert ours == params
        # Theirs counts norms too, 0.4 % of the whole.
        assert cost[number] == pytest.approx(flops, rel=5e-3)
    # A path of as many blocks as an anchor has costs between the two it joins.
    between = [n for n, p in enumerate(net.paths) if p.stitches and all(j == i + 1 for _, i, _, j in p.places)]
    assert len(between) == 2 * 11
    for number in between:
        front, end = net.paths[number].anchors
        assert cost[front] < cost[number] < cost[end]


@pytest.mark.parametrize("name", ["vit", "swin", "bert"])
def test_the_cost_of_a_path_is_the_sum_of_its_parts_and_lies_between_the_anchors(name):
    net, x = joined(name)
    cost = net.costs((x,))
    assert cost == [macs(net.extract(i), x).total for i in range(len(cost))]
    assert min(cost) >= cost[0] - 1
    for path, c in zip(net.paths, cost, strict=True):
        if all(last < first for _, last, _, first in path.places):  # no block at one depth twice
            # A stitch itself costs less than half a block.
            assert cost[path.anchors[0]] * 0.8 < c < cost[path.anchors[-1]] * 1.2


def joined(name):
    torch.manual_seed(0)
    if name == "vit":
        return join(family()).eval(), torch.randn(1, 3, 8, 12)
    if name == "bert":
        small, large = encoder(dim=16, hidden=32), encoder(dim=32, depth=4)
        return join([small, large]).eval(), torch.randint(3, 24, (1, 12))
    swins = [
        create_model("swin_t", img_size=32, embed_dim=dim, depths=depths, heads=(2, 2, 2), patch=2, window=4)
        for dim, depths in ((8, (2, 2, 2)), (16, (2, 4, 2)))
    ]
    return join(swins).eval(), torch.randn(1, 3, 32, 32)


@pytest.mark.parametrize("name", ["vit", "swin", "bert"])
def test_anchors_answer_as_before_and_a_path_is_front_blocks_then_stitch_then_end_blocks(name):
    net, x = joined(name)
    for number, anchor in enumerate(net.anchors):
        net.path = number
        assert torch.equal(net(x), anchor(x))
    if name == "swin":
        number = next(i for i, p in enumerate(net.paths) if p.stitches and net.groups[p.stitches[0][0]][2] == 1)
    else:
        number = len(net.paths) - 3
    path = net.paths[number]
    (a, last, b, first), (group, layer) = path.places[0], path.stitches[0]
    tokens = block_tokens(net.anchors[a], (x,))[1][last]
    got = {}
    blocks = [block for stage in getattr(net.anchors[b], "stages", [net.anchors[b]]) for block in
              (stage if isinstance(stage, nn.Sequential) else stage.blocks)]  # fmt: skip
    handle = blocks[first].register_forward_pre_hook(lambda _, args: got.setdefault("x", args[0]))
    net.path = number
    y = net(x)
    handle.remove()
    torch.testing.assert_close(got["x"].flatten(0, -2), net.stitches[group][layer](tokens[None])[0])
    assert y.shape == net.anchors[b](x).shape


def test_joining_and_solving_leave_the_answers_of_the_anchors_as_they_were():
    nets, x = family(), seeded_input("snnet", (24, 3, 8, 12))
    before = [net(x) for net in nets]
    net = join(nets)
    net.solve([(x,)])
    net.eval()
    for number, want in enumerate(before):
        net.path = number
        torch.testing.assert_close(net(x), want, atol=1e-6, rtol=0)


def test_least_squares_recovers_a_linear_map_and_beats_random_weights():
    front, end = family((8, 16), (2, 2))
    net = join([front, end])
    torch.manual_seed(1)
    matrix, bias = torch.randn(16, 8), torch.randn(16)
    # The end anchor's stem is a linear function of what block 0 of the front gives: then so is every solution there.
    x = torch.randn(40, 3, 8, 12)
    stem, block = front.stem, front.blocks[0]
    end.stem.forward = lambda image: (block(stem(image)[0]) @ matrix.T + bias, None)
    one = Stitched([front, end], type(one_way([(2,), (2,)]))([Path(((0, 0, 1), (1, 0, 2)), ((0, 0),))], [(0, 1, 0, 1)]))
    one.solve([(x,)])
    torch.testing.assert_close(one.stitches[0][0].weight, matrix, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.stitches[0][0].bias, bias, atol=1e-4, rtol=1e-4)
    del end.stem.forward

    def residual(layer):
        tokens = block_tokens(front, (x,))[1][1]
        return float((layer(tokens[None])[0] - block_tokens(end, (x,))[0][1]).norm().detach())

    before = residual(net.stitches[0][0])
    net.solve([(x,)])
    assert residual(net.stitches[0][0]) < 0.8 * before


def test_padding_has_no_part_in_the_stitching_layers():
    small, large = encoder(dim=16, hidden=32), encoder()
    ids = torch.randint(3, 24, (16, 9))
    padded = torch.cat((ids, torch.zeros(16, 3, dtype=torch.long)), 1)
    found = []
    for batch in (ids, padded):
        net = join([small.eval(), large.eval()])
        net.solve([(batch,)])
        found.append(net.stitches[0][0].weight.detach().clone())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-3)


def test_a_training_step_changes_only_what_lies_on_its_path():
    net = join(family()).train()
    net.path = next(i for i, p in enumerate(net.paths) if p.route == ((0, 0, 2), (1, 2, 3)))
    net(torch.randn(2, 3, 8, 12)).square().sum().backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None}
    (group, layer) = net.paths[net.path].stitches[0]
    allowed = ("anchors.0.stem.", "anchors.0.blocks.0.", "anchors.0.blocks.1.", f"stitches.{group}.{layer}.")
    allowed += ("anchors.1.blocks.2.", "anchors.1.norm.", "anchors.1.head.")
    assert touched == {name for name, _ in net.named_parameters() if name.startswith(allowed)}


def test_a_latency_asked_for_per_call_runs_the_best_path_within_it():
    net = join(family()).eval()
    x = torch.randn(2, 3, 8, 12)
    with pytest.raises(ValueError, match="needs the table"):
        net(x, latency_ms=1.0)
    cost = torch.tensor(net.costs((x[:1],)), dtype=torch.float64)
    net.latencies.copy_(cost / 1e6)
    limits = torch.linspace(float(net.latencies.min()), float(net.latencies.max()), 9).tolist()
    chosen = [net.within(limit + 1e-9) for limit in limits]
    assert [float(cost[i]) for i in chosen] == sorted(float(cost[i]) for i in chosen)
    assert len(set(chosen)) > 5
    net.path = chosen[3]
    want = net(x)
    net.path = 0
    assert torch.equal(net(x, latency_ms=limits[3] + 1e-9), want)
    assert net.path == 0
    net.scores.copy_(torch.rand(len(cost), generator=torch.Generator().manual_seed(0)))
    front = net.front()
    assert [float(net.scores[i]) for i in front] == sorted(float(net.scores[i]) for i in front)
    assert [float(net.latencies[i]) for i in front] == sorted(float(net.latencies[i]) for i in front)
    assert all(net.within(float(net.latencies[i])) == i for i in front)
    with pytest.raises(ValueError, match="latency_ms must be at least"):
        net(x, latency_ms=limits[0] / 2)


def test_measuring_times_every_path_and_the_table_is_saved_with_the_model(tmp_path):
    net = create_model(
        "stitched", anchors=[{"name": "vit_tiny_patch16_224", "dim": d, "depth": 2, **TINY} for d in (8, 16)]
    ).eval()
    x = torch.randn(1, 3, 8, 12)
    found = net.measure((x,), seconds=0.2)
    assert len(found) == len(net.paths)
    assert net.latencies.tolist() == pytest.approx([f.median_ms for f in found])
    net.path = 3
    same_after_loading(net, x, tmp_path)
    again = gossamer.load(tmp_path / "m")
    assert again.path == 3
    assert torch.equal(again.latencies, net.latencies)


def test_official_weights_load_by_the_authors_names():
    net = create_model(
        "stitched",
        anchors=[{"name": "deit_tiny_patch16_224", "dim": d, "depth": 2, **TINY} for d in (8, 16)],
    )
    shapes = {}
    for m, anchor in enumerate(net.anchors):
        for key, value in anchor.state_dict().items():
            key = (
                key.replace("stem.embed.", "patch_embed.")
                .replace("stem.tokens", "cls_token")
                .replace("head.fc", "head")
            )
            key = key.replace("stem.positions", "pos_embed").replace(".mixer.", ".attn.")
            shapes[f"anchors.{m}.{key}"] = value.shape
    for c, group in enumerate(net.stitches):
        for s, layer in enumerate(group):
            shapes[f"stitch_layers.{c}.{s}.transform.weight"] = layer.weight.shape
            shapes[f"stitch_layers.{c}.{s}.transform.bias"] = layer.bias.shape
    state = seeded_state(shapes)
    load_official(net, state)
    assert torch.equal(net.stitches[0][0].weight, state["stitch_layers.0.0.transform.weight"])
    assert torch.equal(net.anchors[1].blocks[1].mixer.qkv.weight, state["anchors.1.blocks.1.attn.qkv.weight"])
    del state["stitch_layers.0.0.transform.bias"]
    with pytest.raises(ValueError, match=r"missing: stitches\.0\.0\.bias"):
        load_official(net, state)


@pytest.mark.parametrize("name", ["vit", "swin", "bert"])
def test_each_path_exports_as_an_ordinary_module(name, tmp_path):
    net, x = joined(name)
    number = len(net.paths) - 1
    net.path = number
    single = net.extract(number)
    assert torch.equal(single(x), net(x))
    if name != "swin":  # its export is held by its own tests, and slow
        certificate = export_onnx(single, x, tmp_path / "path.onnx", exporter="fast")
        assert certificate.passed, certificate.reason
        assert (certificate.held, certificate.max_abs < 1e-4) == ("batch", True)
    with torch.no_grad():
        next(net.network(number).parameters()).zero_()
    assert not torch.equal(single(x), net(x))  # it shares nothing


def test_least_squares_stitches_are_better_than_random_ones_and_training_makes_them_good():
    calibration = texts()
    small = learned(encoder(dim=16, hidden=32, depth=3), calibration, steps=80)
    large = learned(encoder(dim=40, depth=3), calibration, steps=80)
    anchors = [calibration.score(m) for m in (small, large)]
    torch.manual_seed(0)
    random = join([small, large]).eval()
    solved, _ = run_pass("snnet", large, calibration, family=[small], epochs=0)
    trained, _ = run_pass("snnet", large, calibration, family=[small], epochs=6, lr=2e-3)

    def middle(net):
        scores = []
        for number, path in enumerate(net.paths):
            if path.stitches:
                net.path = number
                scores.append(calibration.score(net))
        return sum(scores) / len(scores)

    figures = [middle(net) for net in (random, solved, trained)]
    assert figures[0] + 0.1 < figures[1], (figures, anchors)
    assert figures[1] <= figures[2] + 0.02, (figures, anchors)
    assert figures[2] > min(anchors) - 0.05, (figures, anchors)
    # The pass scored all paths, and the chosen one is within the share of the cost.
    assert trained.scores.isfinite().all()
    cost = trained.costs(calibration.example())
    assert cost[trained.path] <= 0.6 * max(cost)


def test_the_pass_works_alone_on_text_and_is_the_same_after_loading(tmp_path):
    calibration = texts()
    small, large = encoder(dim=16, hidden=32).eval(), encoder(depth=4).eval()
    folder = gossamer.save(small, tmp_path / "small")
    net, steps = run_pass("snnet", large, calibration, family=[folder], epochs=0.2, keep=0.7)
    assert [s["step"] for s in steps] == ["stitch.join"]
    assert isinstance(net, Stitched)
    x = calibration.example(4)
    same_after_loading(net, x, tmp_path)
    single, steps = run_pass("snnet", large, calibration, family=[small], epochs=0, keep=0.7, single=True)
    assert [s["step"] for s in steps] == ["stitch.join", "stitch.single"]
    assert parameters(single) < parameters(large)
    same_after_loading(single, x, tmp_path / "single")
    assert export_onnx(single, x, tmp_path / "single.onnx", exporter="fast").passed


def test_a_pruned_anchor_is_stitched_with_its_recipe(tmp_path):
    calibration = texts()
    large, _ = run_pass("magnitude", encoder().eval(), calibration, keep=0.5)
    small, _ = run_pass("magnitude", encoder(dim=16, hidden=32).eval(), calibration, keep=0.5)
    net, _ = run_pass("snnet", large, calibration, family=[small], epochs=0)
    same_after_loading(net, calibration.example(2), tmp_path)


def test_what_cannot_be_stitched_is_left_as_it_was():
    calibration = texts()
    model = encoder().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for family_, message in (
        ([], "give family"),
        ([nn.Linear(2, 2)], "config"),
        ([encoder(vocab_size=30)], "vocabulary"),
        ([encoder(num_classes=3)], "answers of the family"),
        ([create_model("bag_of_pairs", vocab_size=24, num_classes=2)], "plain Isotropic or Pyramid"),
    ):
        with pytest.raises(Unsupported, match=message):
            run_pass("snnet", model, calibration, family=family_)
    assert not hasattr(model, "recipe")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_wrong_settings_are_named():
    nets = family()
    with pytest.raises(ValueError, match="kernel and stride must be at least 1, got kernel=0"):
        join(nets, kernel=0)
    with pytest.raises(ValueError, match=r"patch grid, got \(2, 3\), \(4, 6\)"):
        join([nets[0], create_model("vit_tiny_patch16_224", dim=16, depth=3, **{**TINY, "patch": 2})])
    with pytest.raises(ValueError, match="at least two models"):
        create_model("stitched")
    with pytest.raises(ValueError, match=r"path must be one of 0 … 16, got 17"):
        join(nets).path = 17
    with pytest.raises(ValueError, match="fewer blocks"):
        one_way([(4,), (3,)])
