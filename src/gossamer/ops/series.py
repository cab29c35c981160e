"""Time series, channels last: trend and season by moving average, and aggregation of delayed copies.

Source: Wu et al. 2021, "Autoformer: Decomposition Transformers with Auto-Correlation", sections 3.1 and 3.2.

- at its ends a series is continued by its first and last value
- delays are scored by the mean over channels of the circular correlation: sums along the wrapped diagonals of `q k^T`
  for short series; for long ones the mean is taken among frequencies, so one inverse transform serves all channels
- aggregation is one circulant matrix product for short series and one FFT for long ones, whatever the number of
  delays; the moving average is one banded product or a pooling
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gossamer.ops.spectral import circular_correlation

# up to this many steps a matrix product beats the FFT, and a moving average by pooling (measured on a CPU)
MATRIX_STEPS = 192


def _exporting() -> bool:
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def _as_given(x: Tensor) -> AbstractContextManager[None]:
    """Autocast off: sums over all steps keep the precision of what they are given."""
    kind = x.device.type
    active = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if active else nullcontext()


def decompose(x: Float[Tensor, "b n c"], k: int) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
    """`trend_t = mean of x_(t - (k-1)/2) .. x_(t + (k-1)/2)`, `seasonal = x - trend`; returns (seasonal, trend).

    Args:
        k: width of the moving average in steps, odd.

    Raises:
        ValueError: `k` is even or below 1.
    """
    _odd(k)
    if not _exporting() and x.shape[1] <= MATRIX_STEPS:
        counts = _band(x.shape[1], k, x)
        with _as_given(x):
            seasonal = torch.baddbmm(x, counts.expand(x.shape[0], -1, -1), x, alpha=-1 / k)
        return seasonal, x - seasonal
    wide = F.pad(x.transpose(1, 2), ((k - 1) // 2,) * 2, mode="replicate")
    trend = F.avg_pool1d(wide, k, stride=1).transpose(1, 2)
    return x - trend, trend


def _band(n: int, k: int, like: Tensor) -> Tensor:
    """How often step s is read by the window around step t, of a series continued by its ends: (t, s)."""
    reach = (k - 1) // 2
    t = torch.arange(n, device=like.device)
    counts = ((t - t[:, None]).abs() <= reach).to(like.dtype)
    counts[:, 0] += (reach - t).clamp(min=0)
    counts[:, -1] += (t + reach + 1 - n).clamp(min=0)
    return counts


def decompose_reference(x: Float[Tensor, "b n c"], k: int) -> tuple[Float[Tensor, "b n c"], Float[Tensor, "b n c"]]:
    """`decompose`, step by step."""
    _odd(k)
    n, reach = x.shape[1], (k - 1) // 2
    steps = [[min(max(s, 0), n - 1) for s in range(t - reach, t + reach + 1)] for t in range(n)]
    trend = torch.stack([x[:, near].mean(1) for near in steps], dim=1)
    return x - trend, trend


def _odd(k: int) -> None:
    if k < 1 or k % 2 == 0:
        raise ValueError(f"k must be odd and positive, got {k}")


def delay_scores(q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """`R(tau) = mean over channels of sum_t q_t k_(t - tau mod n)`: how well `k`, delayed by tau, fits `q`."""
    n = q.shape[1]
    if _exporting() or n <= MATRIX_STEPS:
        with _as_given(q):
            return _diagonals(q @ k.transpose(1, 2)) / q.shape[2]
    if q.dtype not in (torch.float32, torch.float64):
        return circular_correlation(q, k).mean(-1)
    product = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
    return torch.fft.irfft(product.mean(-1), n=n, dim=1)


def _diagonals(g: Tensor) -> Tensor:
    """`sum_t g_(t, t - tau mod n)` for each tau."""
    n = g.shape[1]
    # rows twice as long, read one entry longer than they are: row t then starts at its own diagonal
    skewed = F.pad(torch.cat((g, g), 2).flatten(1), (0, n)).unflatten(1, (n, 2 * n + 1))
    ahead = skewed[:, :, :n].sum(1)
    return torch.cat((ahead[:, :1], ahead[:, 1:].flip(1)), 1)


def delay_scores_reference(q: Float[Tensor, "b n c"], k: Float[Tensor, "b n c"]) -> Float[Tensor, "b n"]:
    """`delay_scores`, one delay after the other."""
    return torch.stack([(q * k.roll(tau, 1)).sum(1).mean(-1) for tau in range(q.shape[1])], dim=1)


def _delays(scores: Tensor, k: int, shared: bool) -> tuple[Tensor, Tensor]:
    """The `k` best delays of each sample (shared: of the batch's mean) and their softmax weights, both (b, k)."""
    b, n = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"k must be in 1..{n} (steps), got {k}")
    best = scores.mean(0, keepdim=True).expand(b, n) if shared else scores
    delays = best.topk(k, dim=1).indices
    return delays, scores.gather(1, delays).softmax(1)


def aggregate_delays(
    v: Float[Tensor, "b n c"], scores: Float[Tensor, "b n"], k: int, *, shared: bool = False
) -> Float[Tensor, "b n c"]:
    """`y_t = sum_i w_i v_(t + tau_i mod n)` over the `k` delays of highest score, `w` = softmax of their scores.

    Args:
        v: the series to read.
        scores: of each delay, see `delay_scores`.
        k: delays to use.
        shared: one set of delays for the whole batch, those of the mean score (Autoformer's training form), with
            each sample's own weights; otherwise each sample has its own delays (inference form).

    Raises:
        ValueError: `k` is not in 1..n.
    """
    delays, weights = _delays(scores, k, shared)
    n = v.shape[1]
    kernel = torch.zeros_like(scores).scatter(1, delays, weights).to(v.dtype)
    if _exporting() or n <= MATRIX_STEPS:
        t = torch.arange(n, device=v.device)
        ahead = t - t[:, None]
        return kernel[:, torch.where(ahead < 0, ahead + n, ahead)] @ v
    # sum_s kernel_s v_(t + s) is the correlation of v with the kernel, alike for all channels
    wide = v.float() if v.dtype in (torch.float16, torch.bfloat16) else v
    spectrum = torch.fft.rfft(kernel.to(wide.dtype), dim=1).conj()[..., None]
    return torch.fft.irfft(torch.fft.rfft(wide, dim=1) * spectrum, n=n, dim=1).to(v.dtype)


def aggregate_delays_reference(
    v: Float[Tensor, "b n c"], scores: Float[Tensor, "b n"], k: int, *, shared: bool = False
) -> Float[Tensor, "b n c"]:
    """`aggregate_delays`, one sample and one delay after the other."""
    delays, weights = _delays(scores, k, shared)
    samples = []
    for series, tau, w in zip(v, delays.tolist(), weights, strict=True):
        samples.append(torch.stack([w[i] * series.roll(-tau[i], 0) for i in range(k)]).sum(0))
    return torch.stack(samples)
