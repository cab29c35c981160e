"""The energy estimate is linear in what it counts, and activations are counted on the tensors."""

import itertools

import pytest
import torch
from torch import nn

from gossamer.measure import EnergyCosts, activations, energy_estimate


def test_energy_is_linear_in_multiply_adds_and_bytes_of_either_memory():
    costs = EnergyCosts({"int8": 0.5}, dram=20.0, sram=2.0, dram_high=40.0, sram_high=8.0)

    def e(macs, dram, sram):
        return energy_estimate(macs, dram, "int8", sram_bytes=sram, costs=costs)

    for m, d, s in itertools.product((0, 10**6, 3 * 10**9), (0, 10**3, 7 * 10**6), (0, 5 * 10**5)):
        assert e(m, d, s).mj == pytest.approx((0.5 * m + 20 * d + 2 * s) * 1e-9)
        assert e(m, d, s).low_mj == e(m, d, s).mj
        assert e(m, d, s).high_mj == pytest.approx((0.5 * m + 40 * d + 8 * s) * 1e-9)
        assert e(3 * m, 3 * d, 3 * s).mj == pytest.approx(3 * e(m, d, s).mj)


def test_costs_below_zero_are_refused_and_so_are_counts():
    for wrong in ({"mac": {"int8": -1.0}}, {"dram": -0.1}, {"sram": -2.0}, {"mac": {"int8": float("nan")}}):
        with pytest.raises(ValueError, match="must be at least 0 pJ"):
            EnergyCosts(**wrong)
    with pytest.raises(ValueError, match="dram_high must be at least dram"):
        EnergyCosts(dram=500.0)
    for counts in ((-1, 0, 0), (0, -1, 0), (0, 0, -1)):
        with pytest.raises(ValueError, match="must be at least 0"):
            energy_estimate(counts[0], counts[1], sram_bytes=counts[2])
    with pytest.raises(ValueError, match="dtype must be one of"):
        energy_estimate(1, 1, "int3")


def test_fewer_bits_cost_less_and_the_words_call_it_an_estimate():
    mj = [energy_estimate(10**9, 0, name).mj for name in ("float32", "float16", "int8", "int4")]
    assert mj == sorted(mj, reverse=True)
    assert mj[0] == pytest.approx(4.6)
    assert "estimate" in energy_estimate(1, 1, sram_bytes=2).formula
    assert "SRAM" in energy_estimate(1, 1, sram_bytes=2).formula


def test_peak_activations_are_what_lives_at_once_and_written_is_all_of_it():
    net = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 30), nn.Linear(30, 5)).train()
    x = torch.randn(2, 10)
    found = activations(net, x)
    # Two of the wide ones live while ReLU runs; the others are smaller.
    assert found.peak == 2 * 4 * 200
    assert found.written == 2 * 4 * (100 + 100 + 30 + 5)
    assert net.training
    assert activations(net, torch.randn(4, 10)).peak == 2 * found.peak

    class Kept(nn.Module):
        def forward(self, x):
            held = [x * i for i in range(5)]
            return sum(held)

    assert activations(Kept(), torch.zeros(100)).peak >= 5 * 400
    assert activations(nn.ReLU(inplace=True), torch.zeros(100)).written == 0
