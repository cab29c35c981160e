"""Slimming: the supernet answers as the network a plan describes, and moves are those with the least drop a ms."""

import itertools
from pathlib import Path

import pytest
import torch

import gossamer
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.search import slimming as module
from gossamer.search.costs import CostTable
from gossamer.search.slimming import moves, slim, slim_efficientformer
from gossamer.search.supernet import ATTEND, CONV, SKIP, STEP, Plan, Supernet, allowed

TINY = {
    "widths": (16, 32),
    "depths": (2, 2),
    "heads": 2,
    "key_dim": 4,
    "value_dim": 8,
    "stem_strides": (1, 1),
    "img_size": (8, 8),
    "in_chans": 1,
    "num_classes": 4,
}


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(**TINY, layer_scale=0.5)


def price(plan: Plan) -> float:
    """A made-up device: a 3-D block costs 3, a 4-D block 1, channels a little."""
    kinds = [kind for stage in plan.slots for kind in stage]
    return 3.0 * kinds.count(ATTEND) + kinds.count(CONV) + 0.02 * sum(plan.widths)


def test_following_a_plan_equals_the_network_it_describes(supernet: Supernet) -> None:
    plan = Plan((16, 32), ((CONV, SKIP), (CONV, ATTEND)))
    supernet.eval().follow(plan)
    network = create_model("efficientformer_l1", **{**supernet.options, **plan.options()}).eval()
    state = {}
    for key in network.state_dict():
        parts = key.split(".")
        if parts[0] == "stages":
            stage, place = int(parts[1]), int(parts[2])
            slot = [j for j, kind in enumerate(plan.slots[stage]) if kind != SKIP][place]
            parts[2] = f"{slot}.paths.{plan.slots[stage][slot]}"
        state[key] = supernet.net.state_dict()[".".join(parts)]
    network.load_state_dict(state)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(supernet(x), network(x))


def test_the_mixture_weighs_paths_by_alpha_and_tau(supernet: Supernet) -> None:
    slot = supernet.eval().slots()[1][0]
    with torch.no_grad():
        slot.alpha.copy_(torch.tensor([0.3, -0.2, 0.1]))
    supernet.cool(0.5)
    x = torch.randn(1, 4, 4, 32)
    w = (slot.alpha / 0.5).softmax(0)
    torch.testing.assert_close(slot(x), w[0] * slot.paths[CONV](x) + w[1] * slot.paths[ATTEND](x) + w[2] * x)


def test_alpha_is_trained_with_the_weights(supernet: Supernet) -> None:
    supernet(torch.randn(2, 1, 8, 8)).sum().backward()
    assert all(slot.alpha.grad.abs().sum() > 0 for stage in supernet.slots() for slot in stage)


def test_a_narrower_stage_is_silent_in_the_channels_it_lost(supernet: Supernet) -> None:
    supernet.eval().follow(supernet.largest().narrow(1))
    last = supernet.net.features(torch.randn(1, 1, 8, 8))[-1]
    assert int((last.abs().sum((0, 1, 2)) == 0).sum()) == STEP


def test_no_4d_block_stands_behind_a_3d_one() -> None:
    assert allowed([(CONV, SKIP), (ATTEND, SKIP, ATTEND)])
    assert not allowed([(CONV, ATTEND), (CONV,)])
    plan = Plan((16, 32), ((CONV, CONV), (ATTEND, ATTEND)))
    while found := moves(plan, [[1.0, 2.0], [3.0, 4.0]]):
        assert all(allowed(other.slots) for _, other in found)
        plan = found[-1][1]


def test_each_move_is_the_least_drop_a_millisecond_and_latency_falls_to_the_target(supernet: Supernet) -> None:
    alphas = torch.linspace(-1, 1, 4).tolist()
    with torch.no_grad():
        for value, slot in zip(alphas, itertools.chain(*supernet.slots()), strict=True):
            slot.alpha[-1] = value

    def score(plan: Plan) -> float:
        kinds = [kind for stage in plan.slots for kind in stage]
        return kinds.count(ATTEND) ** 0.5 + 0.8 * kinds.count(CONV) ** 0.5 + 0.01 * sum(plan.widths)

    plan, trace = slim(supernet, price, 5.0, score)
    latencies = [price(supernet.largest())] + [step["ms"] for step in trace]
    assert all(a > b for a, b in itertools.pairwise(latencies))
    assert latencies[-1] == price(plan) <= 5.0 < latencies[-2]
    now = supernet.largest()
    for step in trace:
        ratios = {
            what: (score(now) - score(other)) / (price(now) - price(other))
            for what, other in moves(now, supernet.importance())
            if price(other) < price(now)
        }
        assert step["move"] == min(ratios, key=lambda what: ratios[what])
        now = Plan(step["widths"], step["slots"])


def test_a_target_that_no_network_meets_is_refused(supernet: Supernet) -> None:
    with pytest.raises(ValueError, match=r"no move makes the network faster than .* the budget is 0\.1 ms"):
        slim(supernet, price, 0.1, lambda plan: 0.0)


def test_the_pieces_of_the_table_are_those_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(self: CostTable, kind: str, stage: int, width: int | tuple[int, int]) -> float:
        if kind == "call":
            return 0.0
        piece, x = self._piece(kind, stage, width)
        return float(macs(piece.eval(), (x,)).total)

    monkeypatch.setattr(CostTable, "_ms", work)
    plan = Plan((16, 48), ((CONV, SKIP), (CONV, ATTEND)))
    options = {**TINY, "distillation": False}
    network = create_model("efficientformer_l1", **{**options, **plan.options()}).eval()
    assert CostTable(options).total(plan) == macs(network, (torch.randn(1, 1, 8, 8),)).total


def test_a_search_ends_in_a_network_that_loads_and_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CostTable, "_ms", lambda self, kind, stage, width: 1.0 if kind in (CONV, ATTEND) else 0.0)
    words = {"latency_ms": 2.0, "seconds": 6.0, "out": tmp_path / "run", "size": "xs"}
    result = slim_efficientformer("toy-images", **words)
    assert result["predicted_ms"] <= 2.0
    assert sum(result["config"]["depths"]) == 2
    assert result["certificate"]["passed"]
    assert 0 <= result["test"]["accuracy"] <= 1
    loaded = gossamer.load(tmp_path / "run" / "model")
    assert loaded.config["widths"] == list(result["config"]["widths"])
    monkeypatch.setattr(module, "_train", lambda *_: pytest.fail("trained again"))
    assert slim_efficientformer("toy-images", **words)["predicted_ms"] == result["predicted_ms"]
    with pytest.raises(ValueError, match="another folder"):
        slim_efficientformer("toy-images", **{**words, "latency_ms": 3.0})
