"""Autoformer: a forecaster that splits trend from season after every step and lets delayed copies of a series meet.

Source: Wu et al. 2021, "Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series Forecasting".

- every residual sum is followed by a moving average; the season goes on, the trend is added up in the decoder
- Auto-Correlation takes attention's place: delays shared by the batch in training, each sample's own in eval mode
- no positions: the order of a series is in its delays
- the decoder starts from season and trend of the last known steps, zeros and the mean of the series after them
- the official code also holds a position table that it never adds, and keywords (mask, dropout) of Auto-Correlation
  that it never reads; neither is here
- `factor` is 3, as in the published scripts of all data sets but ETTm2 (1)
- learning rate: the official code halves it after each epoch but the first
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Mlp
from gossamer.layers.series import (
    Calendar,
    CircularConv,
    Season,
    SeasonalNorm,
    SeriesEmbedding,
    calendar_features,
)
from gossamer.mixers.auto_correlation import AutoCorrelation
from gossamer.models.informer import RULES, TRAINING, convert, scaled
from gossamer.models.registry import register_system
from gossamer.ops.series import decompose
from gossamer.trunks.seq2seq import Decoder, Encoder, Forecaster, check_lengths

Streams = tuple[Tensor, Tensor]


class SeasonTrendStart(nn.Module):
    """Season and trend of the last `label_len` known steps, continued by zeros and by the mean of the series."""

    def __init__(self, label_len: int, pred_len: int, moving_avg: int) -> None:
        super().__init__()
        self.label_len = label_len
        self.pred_len = pred_len
        self.moving_avg = moving_avg

    def forward(self, x: Float[Tensor, "b n c"]) -> Streams:
        season, trend = (part[:, x.shape[1] - self.label_len :] for part in decompose(x, self.moving_avg))
        mean = x.mean(1, keepdim=True).expand(-1, self.pred_len, -1)
        return F.pad(season, (0, 0, 0, self.pred_len)), torch.cat((trend, mean), 1)


class SeasonEmbedding(nn.Module):
    """Tokens of the season; the trend goes along as it is."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.season = embedding

    def forward(self, start: Streams, marks: Float[Tensor, "b n f"]) -> Streams:
        return self.season(start[0], marks), start[1]


class SeasonTrendBlock(nn.Module):
    """`x, t1 = D(x + mixer(x))`, `x, t2 = D(x + cross(x, memory))`, `x, t3 = D(x + mlp(x))`; the trend gains
    `conv(t1 + t2 + t3)`. D splits season and trend.

    Args:
        dim: channels of the season's tokens.
        channels: variables of the trend.
        moving_avg: steps of the moving average, odd.
    """

    def __init__(
        self, dim: int, channels: int, mixer: nn.Module, cross: nn.Module, mlp: nn.Module, *, moving_avg: int
    ) -> None:
        super().__init__()
        self.mixer = mixer
        self.cross = cross
        self.mlp = mlp
        self.moving_avg = moving_avg
        self.trend = CircularConv(dim, channels, bias=False)

    def forward(self, streams: Streams, memory: Float[Tensor, "b m c"]) -> Streams:
        x, trend = streams
        x, first = decompose(x + self.mixer(x), self.moving_avg)
        x, second = decompose(x + self.cross(x, context=memory), self.moving_avg)
        x, third = decompose(x + self.mlp(x), self.moving_avg)
        return x, trend + self.trend(first + second + third)


class SeasonTrendHead(nn.Module):
    """`linear(norm(season)) + trend` of the last `steps` steps."""

    def __init__(self, dim: int, channels: int, steps: int) -> None:
        super().__init__()
        self.norm = SeasonalNorm(dim)
        self.proj = nn.Linear(dim, channels)
        self.steps = steps

    def forward(self, streams: Streams) -> Float[Tensor, "b t o"]:
        season, trend = streams
        known = season.shape[1] - self.steps
        return self.proj(self.norm(season)[:, known:]) + trend[:, known:]


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]] | None:
    known, horizon = spec["seq_len"], spec["pred_len"]
    if min(known, known // 2 + horizon) < 2:
        return None  # no delay to choose from
    return "autoformer_7", {"factor": 3, **scaled(spec, size)}


@register_system(
    "autoformer",
    tasks=("forecasting",),
    scale=_scale,
    training={**TRAINING, "epochs": 10},
    variants={
        "autoformer_7": dict(factor=1),
        "autoformer_ecl_321": dict(channels=321, factor=1),
        "autoformer_traffic_862": dict(channels=862, factor=1),
        "autoformer_exchange_8": dict(channels=8, factor=1),
        "autoformer_weather_21": dict(channels=21, factor=1),
        "autoformer_etth1_96": dict(),
        "autoformer_ettm2_96": dict(freq="t", factor=1),
        "autoformer_ecl_96": dict(channels=321),
        "autoformer_traffic_96": dict(channels=862),
        "autoformer_ili_24": dict(seq_len=36, label_len=18, pred_len=24),
    },
    rules=[
        (r"^dec_embedding\.", "target.season."),
        *RULES,
        (r"^decoder\.projection\.", "head.proj."),
        (r"\.projection\.", ".trend."),
        (r"^decoder\.norm\.layernorm\.", "head.norm.norm."),
        (r"\.layernorm\.", ".norm."),
    ],
    convert=convert,
)
def autoformer(
    *,
    channels: int = 7,
    seq_len: int = 96,
    pred_len: int = 96,
    label_len: int | None = None,
    freq: str = "h",
    marks: int | None = None,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int = 2,
    d_layers: int = 1,
    d_ff: int = 2048,
    moving_avg: int = 25,
    factor: float = 3,
    dropout: float = 0.05,
    embed: Calendar = "timeF",
) -> nn.Module:
    """An Autoformer.

    Args:
        channels: variables, read and forecast.
        label_len: known steps the decoder starts with, half of `seq_len` by default.
        freq: frequency letter of the data.
        marks: calendar features of a row, by `freq` if None.
        moving_avg: steps of the moving average, odd.
        factor: delays that are read, in units of `ln n`, rounded down.
        embed: how calendar features are read.

    Raises:
        ValueError: lengths, heads or calendar do not fit, `moving_avg` is even, or `int(factor * ln n)` delays are not
            in 1..n for the encoder's or the decoder's series.
    """
    label_len = check_lengths(seq_len, label_len, pred_len)
    steps = label_len + pred_len
    if marks is None:
        marks = calendar_features(freq) if embed == "timeF" else 4 + (freq == "t")

    def mixer(steps: int) -> nn.Module:
        mix = AutoCorrelation(d_model, heads=n_heads, factor=factor, drop=dropout)
        mix.delays(steps)  # a series too short for the factor is told now, not at the first forward pass
        return mix

    def mlp() -> nn.Module:
        return Mlp(d_model, d_ff, drop=dropout, bias=False)

    def embedding() -> nn.Module:
        return SeriesEmbedding(channels, d_model, marks=marks, freq=freq, calendar=embed, bias=False, drop=dropout)

    def season(_: int) -> nn.Module:
        return Season(moving_avg)

    blocks = [Block(d_model, mixer(seq_len), mlp(), norm=season, residual="post") for _ in range(e_layers)]
    layers = [
        SeasonTrendBlock(d_model, channels, mixer(steps), mixer(steps), mlp(), moving_avg=moving_avg)
        for _ in range(d_layers)
    ]
    return Forecaster(
        embedding(),
        Encoder(blocks, norm=SeasonalNorm(d_model)),
        SeasonEmbedding(embedding()),
        Decoder(layers),
        SeasonTrendHead(d_model, channels, pred_len),
        start=SeasonTrendStart(label_len, pred_len, moving_avg),
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
    )
