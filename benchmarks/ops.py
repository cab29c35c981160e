"""Time of each op's forms at growing sizes: the fast form, its reference, and other forms that were considered.

Run from the repository root: `python benchmarks/ops.py` (about a minute; one thread). Writes
`benchmarks/results/ops.json`: milliseconds per form, with the device and the versions they were measured on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from gossamer.io.files import write_json
from gossamer.layers.language import RMSNorm
from gossamer.measure import device_info, latency
from gossamer.ops import attention, linear_attention, online_softmax, patterns, recurrence, series, spectral, tokens

Forms = dict[str, Callable[[], object]]
Case = tuple[str, tuple[int, ...], Callable[[int], Forms]]


def heads(n: int) -> list[torch.Tensor]:
    """Queries, keys and values of 4 heads of width 32."""
    return [torch.randn(1, 4, n, 32) for _ in range(3)]


def band(n: int) -> Forms:
    q, k, v = heads(n)
    pattern = patterns.band(128, 127)
    mask, blocks = patterns.dense_mask(pattern, n, n), patterns.block_mask(pattern, n, n)
    return {
        "band_attention": partial(patterns.band_attention, q, k, v, 128, 127),
        "flex, compiled": partial(patterns.flex, q, k, v, blocks),
        "fused dense, masked": partial(F.scaled_dot_product_attention, q, k, v, attn_mask=mask),
        "reference": partial(patterns.pattern_reference, q, k, v, mask),
    }


def local(n: int) -> Forms:
    q, k, v = heads(n)
    mask = patterns.dense_mask(patterns.window(64), n, n)
    return {
        "local_attention": partial(patterns.local_attention, q, k, v, 64),
        "reference": partial(patterns.pattern_reference, q, k, v, mask),
    }


def bigbird(n: int) -> Forms:
    q, k, v = heads(n)
    index = patterns.bigbird_blocks(n // 64, heads=4)
    mask = patterns.dense_mask(patterns.bigbird(index, n, 64), n, n)
    return {
        "block_attention": partial(patterns.block_attention, q, k, v, index, 64, dense_rows=(0, -1)),
        "reference": partial(patterns.pattern_reference, q, k, v, mask),
    }


def dense(n: int) -> Forms:
    q, k, v = heads(n)
    return {
        "attention": partial(attention.attention, q, k, v),
        "chunked_attention": lambda: online_softmax.finish(online_softmax.chunked_attention(q, k, v)),
        "reference": partial(attention.attention_maps, q, k, v),
    }


def linear(n: int, causal: bool) -> Forms:
    q, k, v = heads(n)
    return {
        "linear_attention": partial(linear_attention.linear_attention, q, k, v, causal=causal),
        "reference": partial(linear_attention.linear_attention_reference, q, k, v, causal=causal),
    }


def scan(n: int) -> Forms:
    a, b = torch.rand(1, n, 256) * 0.2 + 0.8, torch.randn(1, n, 256)
    return {
        "linear_recurrence": partial(recurrence.linear_recurrence, a, b),
        "reference": partial(recurrence.linear_recurrence_reference, a, b),
    }


def scan_training(n: int) -> Forms:
    a, b = (torch.rand(1, n, 256) * 0.2 + 0.8).requires_grad_(), torch.randn(1, n, 256, requires_grad=True)

    @torch.enable_grad()
    def train(form: Callable) -> object:
        return torch.autograd.grad(form(a, b).sum(), (a, b))

    return {
        "linear_recurrence": partial(train, recurrence.linear_recurrence),
        "reference": partial(train, recurrence.linear_recurrence_reference),
    }


def correlation(n: int) -> Forms:
    q, k = torch.randn(4, n, 64), torch.randn(4, n, 64)
    return {
        "fft": partial(spectral.circular_correlation, q, k, form="fft"),
        "dft": partial(spectral.circular_correlation, q, k, form="dft"),
        "reference": partial(spectral.circular_correlation_reference, q, k),
    }


def convolution(n: int) -> Forms:
    x, k = torch.randn(4, n, 64), torch.randn(n, 64)
    return {
        "fft": partial(spectral.long_convolution, x, k, form="fft"),
        "dft": partial(spectral.long_convolution, x, k, form="dft"),
        "reference": partial(spectral.long_convolution_reference, x, k),
    }


def toeplitz(n: int) -> Forms:
    x, table = torch.randn(4, n, 64), torch.randn(2 * n - 1, 1)
    return {
        "fft": partial(spectral.toeplitz, x, table, form="fft"),
        "dft": partial(spectral.toeplitz, x, table, form="dft"),
        "reference": partial(spectral.toeplitz_reference, x, table),
    }


def decomposition(n: int) -> Forms:
    x = torch.randn(8, n, 64)
    return {
        "decompose": partial(series.decompose, x, 25),
        "reference": partial(series.decompose_reference, x, 25),
    }


def aggregation(n: int) -> Forms:
    v, scores, k = torch.randn(8, n, 64), torch.randn(8, n), int(3 * torch.tensor(float(n)).log())
    return {
        "aggregate_delays": partial(series.aggregate_delays, v, scores, k),
        "reference": partial(series.aggregate_delays_reference, v, scores, k),
    }


def merging(n: int) -> Forms:
    x = torch.randn(4, n, 64)
    return {"merge": partial(tokens.merge, x, n // 4), "reference": partial(tokens.merge_reference, x, n // 4)}


def norms(n: int) -> Forms:
    x = torch.randn(1, n, 384)
    return {"layer norm": partial(nn.LayerNorm(384), x), "RMS norm": partial(RMSNorm(384), x)}


CASES: tuple[Case, ...] = (
    ("attention", (256, 1024, 2048), dense),
    ("local attention, window 64", (256, 1024, 2048), local),
    ("band attention, 256 wide", (512, 1024, 2048), band),
    ("BigBird attention, block 64", (512, 1024, 2048), bigbird),
    ("linear attention", (256, 1024, 2048), partial(linear, causal=False)),
    ("linear attention, causal", (256, 1024, 2048), partial(linear, causal=True)),
    ("recurrence", (1024, 4096, 16384), scan),
    ("recurrence, forward and backward", (512, 2048), scan_training),
    ("circular correlation", (96, 336, 1024), correlation),
    ("long convolution", (64, 256, 1024), convolution),
    ("Toeplitz product", (64, 256, 512), toeplitz),
    ("decomposition", (96, 336, 1024), decomposition),
    ("delay aggregation", (96, 336, 1024), aggregation),
    ("token merging", (16, 64, 128), merging),
    ("norm, 384 channels", (1, 197, 1024), norms),
)


def rows() -> Iterator[dict]:
    for op, sizes, build in CASES:
        for n in sizes:
            measured = latency(build(n), budget_s=0.6, min_runs=3)
            row = {"op": op, "n": n, "ms": {form: round(t.median_ms, 4) for form, t in measured.items()}}
            print(f"{op:35}{n:7}  " + "  ".join(f"{form} {ms:.3g}" for form, ms in row["ms"].items()), flush=True)
            yield row


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        results = list(rows())
    facts = {"device": device_info(), "unit": "ms, median, float32", "rows": results}
    write_json(Path(__file__).parent / "results" / "ops.json", facts)


if __name__ == "__main__":
    main()
