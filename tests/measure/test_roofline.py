"""The roofline's verdicts are those of its formula."""

import pytest

from gossamer.measure.roofline import Roofline, Work, attention, decoder, product


@pytest.mark.parametrize(("peak", "bandwidth"), [(4e11, 4e10), (1e12, 1e9), (7.0, 3.0)])
def test_the_verdict_flips_at_the_analytic_intensity(peak, bandwidth):
    roof = Roofline(peak, bandwidth)
    assert roof.ridge == peak / bandwidth
    for share, bound in ((0.999, "memory"), (1.001, "products")):
        work = Work(roof.ridge * share * 1e6, 1e6)
        assert roof.bound(work) == bound
        assert roof.seconds(work) == max(work.macs / peak, work.bytes / bandwidth)
    # A square product has n / 12 multiply-adds a byte in single precision.
    n = round(12 * roof.ridge)
    assert product(n, n, n).intensity == pytest.approx(n / 12)
    if n > 100:
        assert roof.bound(product(n - 9, n - 9, n - 9)) == "memory"
        assert roof.bound(product(n + 9, n + 9, n + 9)) == "products"


def test_a_step_of_decoding_waits_for_memory_and_the_first_reading_for_products():
    roof = Roofline()
    step, first = decoder(1, cached=512), decoder(512)
    assert roof.bound(step) == "memory"
    assert roof.bound(first) == "products"
    assert step.intensity < 0.3 < roof.ridge < first.intensity
    # Weights of 4 bits make a step of decoding faster, and the first reading not.
    assert roof.seconds(decoder(1, cached=512, size=0.5)) < 0.2 * roof.seconds(step)
    assert roof.seconds(decoder(512, size=0.5)) == roof.seconds(first)


def test_a_decoder_counts_the_multiply_adds_of_the_model():
    import torch

    from gossamer.measure import macs
    from gossamer.models import create_model

    sizes = dict(dim=64, depth=2, heads=4, vocab_size=100)
    with torch.device("meta"):
        net = create_model("gpt2", **sizes, max_len=32)
        counted = macs(net, torch.ones(1, 32, dtype=torch.long)).total
    assert decoder(32, **sizes).macs == counted - 31 * 64 * 100


def test_tiles_spare_the_scores_and_a_larger_buffer_spares_keys():
    whole, tiled = attention(4096, 4096, 64), attention(4096, 4096, 64, buffer=2**20)
    assert whole.macs == tiled.macs == 2 * 4096 * 4096 * 64
    assert tiled.bytes < 0.1 * whole.bytes
    assert attention(4096, 4096, 64, buffer=2**22).bytes < tiled.bytes
    least = 4 * 4096 * 64 * 4
    assert attention(4096, 4096, 64, buffer=2**40).bytes == least


def test_a_device_without_speed_is_refused():
    with pytest.raises(ValueError, match="bandwidth must be positive, got 0"):
        Roofline(bandwidth=0)
