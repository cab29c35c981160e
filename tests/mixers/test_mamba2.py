"""Mamba-2 against the authors' layer, its scan against the recurrence, and against linear attention."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.io import export_onnx
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.ops.ssd import ssd, ssd_reference
from official import golden, probe, seeded_input, seeded_state

NAMES = {"conv1d.": "conv.", "out_proj.": "proj.", "A_log": "rate", "D": "skip"}
KINDS = {
    "gqa": {"x_heads": 2, "b_heads": 2},
    "first": {"x_heads": 2, "b_heads": 2, "bias": True, "spread_first": True},
    "mha": {"bias": True},
}


def inputs(n: int, heads: tuple[int, int, int, int] = (4, 4, 4, 4), dtype=torch.float64) -> list[Tensor]:
    h, hx, hb, hc = heads
    shapes = ((2, n, hx, 3), (2, n, h), (h,), (2, n, hb, 5), (2, n, hc, 5))
    x, dt, a, b, c = (torch.randn(s, dtype=dtype) for s in shapes)
    return [t.requires_grad_() for t in (x, F.softplus(dt).detach(), -a.exp().detach(), b, c)]


def authors(tag: str, dtype: torch.dtype, **options) -> tuple[nn.Module, dict[str, Tensor]]:
    saved = golden(f"matvlm_layer_{tag}")
    state = {}
    for key, value in seeded_state(saved["shapes"], dtype).items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        state[key] = value
    mixer = create_mixer("mamba2", 20, heads=4, head_dim=6, chunk=5, **KINDS[tag], **options).to(dtype)
    mixer.load_state_dict(state)
    return mixer, saved


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tag", KINDS)
def test_the_layer_and_its_gradients_equal_the_authors(tag: str, dtype: torch.dtype, tolerance: float) -> None:
    mixer, saved = authors(tag, dtype)
    x = seeded_input(f"matvlm_layer_{tag}", (2, 13, 20)).to(dtype).requires_grad_()
    y = mixer(x)
    weights = [x, mixer.in_proj.weight, mixer.conv.weight, mixer.rate, mixer.dt_bias]
    grads = torch.autograd.grad(probe(y), weights)
    near = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(y, saved["output"].to(dtype), **near)
    for mine, theirs in zip(grads, ("grad", "in_proj", "conv", "rate", "dt_bias"), strict=True):
        torch.testing.assert_close(mine, saved[theirs].to(dtype), **near)


@pytest.mark.parametrize("tag", ["gqa", "mha"])
def test_decoding_equals_the_authors_steps(tag: str) -> None:
    mixer, saved = authors(tag, torch.float64)
    x = seeded_input(f"matvlm_layer_{tag}", (2, 13, 20)).double()
    state, rows = mixer.initial_state(2, dtype=torch.float64), []
    with torch.no_grad():
        for t in range(13):
            y, state = mixer.step(x[:, t], state)
            rows.append(y)
    torch.testing.assert_close(torch.stack(rows, 1), saved["steps"].double(), atol=1e-5, rtol=1e-5)
    assert state[0].shape == (2, 3, mixer.conv.in_channels)


@pytest.mark.parametrize("heads", [(4, 4, 4, 4), (4, 2, 2, 4), (4, 4, 1, 1), (6, 3, 2, 6)])
@pytest.mark.parametrize("n", [1, 4, 5, 17, 32])
def test_chunks_equal_the_recurrence_forward_and_gradient(n: int, heads: tuple[int, int, int, int]) -> None:
    given = inputs(n, heads)
    fast, slow = ssd(*given, chunk=4), ssd_reference(*given)
    torch.testing.assert_close(fast, slow, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(probe(fast), given), torch.autograd.grad(probe(slow), given), atol=1e-8, rtol=1e-8
    )


def test_the_chunk_does_not_matter_and_strong_decay_over_long_texts_stays_finite() -> None:
    x, dt, a, b, c = inputs(200, dtype=torch.float32)
    a = a.detach() * 50
    a.requires_grad_()
    found = [ssd(x, dt, a, b, c, chunk=size) for size in (1, 7, 64, 500)]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-4)
    for grad in torch.autograd.grad(found[2].sum(), (x, dt, a, b, c)):
        assert bool(grad.isfinite().all())


@pytest.mark.parametrize("n", [9, 70])
def test_without_decay_step_or_skip_it_is_causal_attention_without_softmax(n: int) -> None:
    x, dt, a, b, c = inputs(n, (4, 2, 2, 4))
    y = ssd(x, torch.ones_like(dt), torch.zeros_like(a), b, c)
    v, k = (t.repeat_interleave(2, 2).transpose(1, 2) for t in (x, b))
    scores = (c.transpose(1, 2) @ k.transpose(-2, -1)).tril()
    torch.testing.assert_close(y, (scores @ v).transpose(1, 2), atol=1e-9, rtol=1e-9)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="heads of b must divide those of dt; got 3 and 4"):
        ssd(*inputs(3, (4, 4, 3, 4)))
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        ssd(*inputs(3), chunk=0)
    with pytest.raises(ValueError, match="x_heads must divide heads; got x_heads=3, heads=4"):
        create_mixer("mamba2", 16, heads=4, x_heads=3)
    with pytest.raises(ValueError, match="heads must divide dim; got heads=4, dim=18"):
        create_mixer("mamba2", 18, heads=4)
    with pytest.raises(ValueError, match="causal must be True"):
        create_mixer("mamba2", 16, causal=False)


def test_it_starts_as_mamba_2_does() -> None:
    torch.manual_seed(0)
    mixer = create_mixer("mamba2", 64, heads=64)
    steps, rates = F.softplus(mixer.dt_bias.detach()), mixer.rate.detach().exp()
    assert 1e-3 <= float(steps.min()) < 3e-3
    assert 3e-2 < float(steps.max()) <= 0.1 + 1e-6
    assert 1 <= float(rates.min()) < 3
    assert 14 < float(rates.max()) <= 16
    assert torch.equal(mixer.skip, torch.ones(64))


def test_tokens_before_the_text_change_nothing_where_they_are_masked() -> None:
    mixer = create_mixer("mamba2", 16, heads=4, chunk=4).eval()
    x = torch.randn(2, 9, 16)
    padded = torch.cat((torch.randn(2, 3, 16), x), 1)
    mask = torch.arange(12).expand(2, 12) >= 3
    torch.testing.assert_close(mixer(padded, mask=mask)[:, 3:], mixer(x), atol=1e-5, rtol=1e-5)


def test_cost_grows_linearly_with_tokens() -> None:
    mixer = create_mixer("mamba2", 32, heads=4)
    one, two, four = (macs(mixer, torch.randn(1, n, 32)).total for n in (256, 512, 1024))
    assert two - one == pytest.approx(one, rel=0.05)
    assert four - two == pytest.approx(2 * (two - one), rel=0.1)


@pytest.mark.parametrize("exporter", ["fast", "dynamo"])
def test_it_exports_with_a_free_batch(tmp_path, exporter: str) -> None:
    mixer = create_mixer("mamba2", 16, heads=4, x_heads=2, b_heads=2, chunk=5)
    found = export_onnx(nn.Sequential(mixer).eval(), torch.randn(1, 13, 16), tmp_path / "m.onnx", exporter=exporter)
    assert found.passed
    assert (found.exporter, found.held) == (exporter, "batch"), found.reason
