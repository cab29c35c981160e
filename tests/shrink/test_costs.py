"""What members cost: analytic MACs against the counter, staircases, and choices against brute force."""

import itertools
import random

import pytest
import torch
from torch import nn

from gossamer.layers import Mlp
from gossamer.measure import LatencyTable, macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.shrink import costs
from gossamer.shrink.costs import Staircase, calls_of, choose, member_macs, staircases, widths_to_time
from gossamer.shrink.masks import members


class OnePart(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)


def test_members_of_bert_cost_what_the_formulas_of_optin_say_and_add_up_to_what_a_counter_sees():
    net = create_model("bert_base", depth=2, vocab_size=50).eval()
    n, d, e = 24, 768, 64
    ids = torch.randint(1, 50, (2, n))
    widths = members(net)
    found = member_macs(net, (ids,), widths)
    assert found[("blocks.1.mixer", "heads")] == 3 * n * d * e + 2 * n * n * e + n * e * d
    assert found[("blocks.0.mlp", "hidden")] == 2 * n * d
    seen = macs(net, (ids[:1],), per_layer=True).by_module
    blocks = seen["blocks.0"] + seen["blocks.1"]
    assert sum(found[m] * widths[m] for m in widths) == pytest.approx(blocks, rel=0.01)


@pytest.mark.parametrize(
    ("part", "axis", "want"),
    [
        (
            create_mixer("gqa", 32, heads=4, kv_heads=2),
            "groups",
            (2 + 2) * 7 * 32 * 8 + 2 * 2 * 49 * 8 + 2 * 7 * 8 * 32,
        ),
        (create_mixer("attention", 32, heads=1), "heads", 3 * 7 * 32 * 32 + 2 * 49 * 32 + 7 * 32 * 32),
        (Mlp(32, 40), "hidden", 2 * 7 * 32),
    ],
)
def test_groups_single_heads_and_units_cost_their_products(part, axis, want):
    net = OnePart(part)
    assert member_macs(net, (torch.randn(3, 7, 32),), members(net)) == {("part", axis): want}


def test_a_staircase_never_falls_and_its_steps_are_the_widths_where_latency_drops():
    stairs = Staircase((8, 16, 24, 32, 40, 48), (1.0, 1.4, 2.1, 2.0, 3.0, 2.99))
    taken = [stairs(width) for width in range(1, 49)]
    assert taken == sorted(taken)
    assert stairs(17) == stairs(24) == stairs(32) == 2.0  # a wider one is faster than 24: members can be left in
    assert [width for width, _ in stairs.steps()] == [8, 16, 32, 48]
    with pytest.raises(ValueError, match=r"width must be in 1 … 48, got 49"):
        stairs(49)
    with pytest.raises(ValueError, match="must ascend"):
        Staircase((8, 8), (1.0, 1.0))


def test_widths_to_time_are_whole_vectors_and_few():
    assert widths_to_time(12, "heads") == list(range(1, 13))
    assert widths_to_time(1536, "hidden") == list(range(64, 1537, 64))
    assert widths_to_time(100, "hidden")[-2:] == [96, 100]
    assert len(widths_to_time(11008, "hidden", 2**29)) <= 5


def test_staircases_are_measured_once_for_parts_of_one_shape_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path))
    timed = []
    true_time = costs._time
    monkeypatch.setattr(costs, "_time", lambda *a: timed.append(a[1]) or true_time(*a))
    net = create_model("bert_base", dim=32, depth=3, heads=2, hidden=24, vocab_size=50).eval()
    ids = torch.randint(1, 50, (1, 6))
    first = staircases(net, (ids,), members(net), seconds=0.1)
    assert sorted(timed) == ["heads", "hidden"]
    assert first[("blocks.0.mlp", "hidden")].widths == (8, 16, 24)
    again = staircases(net, (ids,), members(net), table=LatencyTable())
    assert again == first
    assert len(timed) == 2
    staircases(net, (ids[:, :5],), members(net), seconds=0.1)
    assert len(timed) == 4


def test_a_choice_equals_brute_force():
    draw = random.Random(0)
    for _ in range(30):
        options = [[(draw.random(), draw.random()) for _ in range(draw.randint(1, 5))] for _ in range(4)]
        least = sum(min(cost for cost, _ in part) for part in options)
        budget = least + draw.random()
        every = itertools.product(*[range(len(part)) for part in options])
        values = {
            pick: sum(part[i][1] for part, i in zip(options, pick, strict=True))
            for pick in every
            if sum(part[i][0] for part, i in zip(options, pick, strict=True)) <= budget
        }
        pick = choose(options, budget)
        assert values[tuple(pick)] == pytest.approx(max(values.values()))
    with pytest.raises(ValueError, match="the budget must be at least 2, got 1"):
        choose([[(2.0, 1.0), (3.0, 2.0)]], 1.0)


def test_a_choice_of_many_parts_stays_near_the_best(monkeypatch):
    draw = random.Random(1)
    options = [[(k * draw.uniform(0.9, 1.1), draw.random() * k) for k in range(1, 20)] for _ in range(12)]
    best = choose(options, 90.0)
    monkeypatch.setattr(costs, "FRONT", 200)
    near = choose(options, 90.0)
    value = [sum(part[i][1] for part, i in zip(options, pick, strict=True)) for pick in (best, near)]
    assert value[1] >= 0.98 * value[0]
    assert sum(part[i][0] for part, i in zip(options, near, strict=True)) <= 90.0


def test_recording_calls_leaves_the_model_as_it_was():
    net = create_model("bert_base", dim=32, depth=1, heads=2, vocab_size=50).train()
    seen = calls_of(net, (torch.randint(1, 50, (1, 6)),), ["blocks.0.mixer"])
    assert seen["blocks.0.mixer"][0][0][0].shape == (1, 6, 32)
    assert net.training
    assert not net.blocks[0].mixer._forward_pre_hooks
