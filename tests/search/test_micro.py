"""Micro-NAS: the space is small and builds, the reward is MnasNet's, and its weight moves the latency one way."""

import itertools

import pytest
import torch

import gossamer
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.search.micro import CHOICES, Judged, Micro, choose, evolve, reward, search_micro, space


def table(net: Micro) -> float:
    """Milliseconds by a cost table: tokens and multiply-adds of a block, and what each mixer needs beside them."""
    tokens = (32 // net.patch) ** 2
    extra = {"attention": 2 * tokens, "pool": 0, "depthwise": 25}[net.mixer]
    return 0.05 + net.depth * tokens * net.dim * (2 * net.ratio * net.dim + extra) * 1e-7


def worth(net: Micro) -> float:
    """An accuracy that grows with size, less and less, and differs a little from one network to the next."""
    noise = torch.Generator().manual_seed(hash((net.patch, net.dim, net.depth, net.ratio, len(net.mixer))) % 2**31)
    gain = 0.1 * net.depth**0.5 + 0.05 * net.dim**0.5 / 2 + 0.03 * net.ratio + 0.2 / net.patch
    return min(0.99, 0.3 + 0.5 * gain + 0.04 * float(torch.rand((), generator=noise)))


def test_the_space_has_at_most_five_hundred_networks_of_our_parts_and_all_kinds_build():
    nets = space((32, 32))
    assert 100 < len(nets) <= 500
    assert len(set(nets)) == len(nets)
    for mixer, patch in itertools.product(CHOICES["mixer"], (2, 8)):
        net = create_model("vit_tiny_patch16_224", img_size=(9, 8), in_chans=1, num_classes=3,
                           **Micro(patch if patch == 2 else 4, 16, 1, 2, mixer).options())  # fmt: skip
        assert net(torch.randn(2, 1, 9, 8)).shape == (2, 3)
    assert all(net.patch < 8 for net in space((8, 8)))


def test_the_reward_is_the_accuracy_at_the_target_and_falls_by_the_power():
    assert reward(0.8, 5.0, 5.0) == 0.8
    assert reward(0.8, 10.0, 5.0) == pytest.approx(0.8 * 2**-0.07)
    # Twice as slow pays for 5 % more accuracy.
    assert reward(0.8 * 1.05, 10.0, 5.0) == pytest.approx(reward(0.8, 5.0, 5.0), rel=2e-3)
    with pytest.raises(ValueError, match="weight must be at most 0"):
        reward(0.8, 1.0, 1.0, 0.1)
    with pytest.raises(ValueError, match="must be positive"):
        reward(0.8, 0.0, 1.0)


def test_the_weight_moves_the_latency_of_the_chosen_network_one_way():
    found = [Judged(net, worth(net), table(net)) for net in space((32, 32))]
    chosen = [choose(found, 1.0, w) for w in (0.0, -0.01, -0.03, -0.07, -0.15, -0.3, -100.0)]
    ms = [c.ms for c in chosen]
    assert ms == sorted(ms, reverse=True)
    assert len(set(ms)) >= 4
    assert chosen[0].accuracy == max(j.accuracy for j in found)
    assert ms[-1] == min(j.ms for j in found)
    for w, best in zip((0.0, -0.07), (chosen[0], chosen[3]), strict=True):
        rewards = [j.accuracy * j.ms**w for j in found]
        assert best.accuracy * best.ms**w == pytest.approx(max(rewards))


def test_evolution_finds_nearly_the_best_of_the_space_and_better_than_chance():
    nets = space((32, 32))
    best = max(reward(worth(n), table(n), 1.0) for n in nets)
    scores = {}
    for name, near in (("evolved", 60), ("chance", 60 * 4 + 4)):
        found = []
        for seed in range(6):
            # With a count four times as large, the first quarter is by chance alone.
            met = evolve(nets, worth, table, 1.0, count=near, seed=seed)[:60]
            assert len({j.net for j in met}) == len(met) == 60
            found.append(max(reward(j.accuracy, j.ms, 1.0) for j in met))
        scores[name] = sum(found) / len(found)
    assert scores["evolved"] > scores["chance"]
    assert scores["evolved"] > 0.97 * best
    assert len(evolve(nets, worth, table, 1.0, count=50, stop=lambda: True)) == 1
    assert len(evolve(nets[:5], worth, table, 1.0, count=50)) == 5
    with pytest.raises(ValueError, match="count of at least 1"):
        evolve(nets, worth, table, 1.0, count=0)


def test_a_search_leaves_a_trained_network_and_says_what_it_saw(tmp_path, monkeypatch):
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    results = search_micro("digits", latency_ms=0.2, seconds=12, count=2, out=tmp_path / "run")
    assert 1 <= len(results["judged"]) <= 2
    assert results["chosen"] in results["judged"]
    net = gossamer.load(tmp_path / "run" / "model")
    assert macs(net, torch.zeros(1, 1, 8, 8)).total == results["macs"]
    assert results["test"]["accuracy"] > 0.3
    with pytest.raises(ValueError, match="wants images"):
        search_micro("toy-text", latency_ms=1.0, seconds=1, out=tmp_path / "other")
