"""Informer: a forecaster that attends from few queries, halves its series layer by layer and answers in one pass.

Source: Zhou et al. 2020, "Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting".

- encoder: ProbSparse attention and a distilling convolution after each layer but the last; decoder: causal ProbSparse
  attention over the last known steps and an empty horizon, then full attention to the encoder's memory
- a sequence of `e_layers` is the official InformerStack: copy i reads the last `seq_len / 2^i` steps and all memories
  are laid end to end
- `sampling="random"` draws the sampled keys at every pass, as the authors do, in eval mode too; build with
  `sampling="fixed"` what shall be exported or answer alike twice (small models for given data are); weights fit both
- the decoder joins its heads in the order of the official code (`mix=True`), which published runs used
- the authors' convolutions pad by 1 or 2 steps, by a comparison of version strings; here it is 1, as they meant
- the position table is computed, not loaded
- learning rate: the official code halves it after each epoch but the first
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Mlp
from gossamer.layers.series import Calendar, Distil, SeriesEmbedding, calendar_features
from gossamer.mixers import create_mixer, mixer_class
from gossamer.models.registry import State, register_system
from gossamer.trunks.seq2seq import (
    Decoder,
    DecoderBlock,
    Encoder,
    Forecaster,
    check_lengths,
    fuse_projections,
)


class LastKnown(nn.Module):
    """The last `label_len` known steps, then `pred_len` zeros."""

    def __init__(self, label_len: int, pred_len: int) -> None:
        super().__init__()
        self.label_len = label_len
        self.pred_len = pred_len

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        return F.pad(x[:, x.shape[1] - self.label_len :], (0, 0, 0, self.pred_len))


class Horizon(nn.Linear):
    """A linear map of the last `steps` tokens."""

    def __init__(self, dim: int, out: int, steps: int) -> None:
        super().__init__(dim, out)
        self.steps = steps

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b t o"]:
        return super().forward(x[:, x.shape[1] - self.steps :])


class Replicas(nn.Module):
    """Encoders of which number i reads the last `n / 2^i` tokens; their memories are laid end to end."""

    def __init__(self, encoders: Sequence[nn.Module]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        n = x.shape[1]
        return torch.cat([encoder(x[:, n - n // 2**i :]) for i, encoder in enumerate(self.encoders)], 1)


# Official keys of forecasters with an encoder and a decoder, and how they are trained.
RULES: list[tuple[str, str | None]] = [
    (r"\.position_embedding\.pe$", None),
    (r"^enc_embedding\.", "source."),
    (r"^dec_embedding\.", "target."),
    (r"\.value_embedding\.tokenConv\.", ".token."),
    (r"\.temporal_embedding\.embed\.", ".calendar."),
    (r"\.temporal_embedding\.(\w+)_embed\.(emb\.)?", r".calendar.tables.\1."),
    (r"\.attn_layers\.(\d+)\.attention\.", r".blocks.\1.self_attention."),
    (r"\.(attn_layers|layers)\.", ".blocks."),
    (r"\.self_attention\.", ".mixer."),
    (r"\.cross_attention\.", ".cross."),
    (r"\.(query|key|value)_projection\.", r".\1."),
    (r"\.out_projection\.", ".proj."),
    (r"\.conv([12])\.", r".mlp.fc\1."),
]
TRAINING: dict[str, Any] = dict(
    lr=1e-4,
    batch_size=32,
    schedule="halve",
    optimiser="adam",
    weight_decay=0.0,
    clip=0.0,
    ema=0.0,
    warmup=0,
)


def convert(model: Any, state: State) -> State:
    """Queries, keys and values as one product."""
    return fuse_projections(state)


def scaled(spec: dict[str, Any], size: str) -> dict[str, Any]:
    """Sizes of a small forecaster with an encoder and a decoder, for the data at hand."""
    dim, e_layers = {"xs": (32, 1), "s": (80, 2), "m": (160, 2), "l": (288, 2)}[size]
    return {"d_model": dim, "n_heads": dim // 16, "d_ff": 2 * dim, "e_layers": e_layers, "d_layers": 1, **spec}


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    return "informer_m7", {"sampling": "fixed", **scaled(spec, size)}


@register_system(
    "informer",
    tasks=("forecasting",),
    scale=_scale,
    training={**TRAINING, "epochs": 6},
    variants={
        "informer_m7": dict(),
        "informer_s1": dict(channels=1),
        "informer_ecl321": dict(channels=321),
        "informer_wth12": dict(channels=12),
        "informer_wth12_enc3_dec2": dict(channels=12, e_layers=3, d_layers=2),
        "informer_m7_freq_t": dict(freq="t"),
        "informer_stack_321": dict(e_layers=(3, 2, 1)),
        "informer_etth1_m_p24": dict(seq_len=48, label_len=48, factor=3),
        "informer_etth1_m_p720": dict(seq_len=336, label_len=336, pred_len=720),
        "informer_etth1_s_p24": dict(channels=1, seq_len=720, label_len=168),
    },
    rules=[
        *RULES,
        (r"\.conv_layers\.", ".merges."),
        (r"\.downConv\.", ".conv."),
        (r"^projection\.", "head."),
    ],
    convert=convert,
)
def informer(
    *,
    channels: int = 7,
    seq_len: int = 96,
    pred_len: int = 24,
    label_len: int | None = None,
    freq: str = "h",
    marks: int | None = None,
    d_model: int = 512,
    n_heads: int = 8,
    e_layers: int | Sequence[int] = 2,
    d_layers: int = 1,
    d_ff: int = 2048,
    factor: int = 5,
    dropout: float = 0.05,
    embed: Calendar = "timeF",
    attn: str = "prob",
    distil: bool = True,
    mix: bool = True,
    measure: Literal["official", "mean"] = "official",
    sampling: Literal["random", "fixed"] = "random",
) -> nn.Module:
    """An Informer.

    Args:
        channels: variables, read and forecast.
        label_len: known steps the decoder starts with, half of `seq_len` by default.
        freq: frequency letter of the data.
        marks: calendar features of a row, by `freq` if None.
        e_layers: encoder layers, or those of each replica of a stack.
        factor: sampled keys and kept queries in units of `ceil(ln n)`.
        embed: how calendar features are read.
        attn: `prob`, `full`, or the name of any registered mixer that works on sequences.
        distil: halve the series between encoder layers.
        mix: join the heads of the decoder's self-attention as the official code does (`prob` and `full`).
        measure: divisor in the choice of queries.
        sampling: draw the sampled keys at every pass, or once.

    Raises:
        ValueError: lengths, heads, layers, calendar or mixer do not fit.
    """
    label_len = check_lengths(seq_len, label_len, pred_len)
    stack = [e_layers] if isinstance(e_layers, int) else list(e_layers)
    if not stack or min(stack) < 1 or seq_len < 2 ** (len(stack) - 1):
        raise ValueError(
            f"e_layers must be positive, replicas at most log2(seq_len) + 1; got {e_layers} for {seq_len} steps"
        )
    if marks is None:
        marks = calendar_features(freq) if embed == "timeF" else 4 + (freq == "t")
    target_len = label_len + pred_len

    def mixer(length: int, causal: bool) -> nn.Module:
        if attn in ("prob", "full"):
            return create_mixer(
                "prob_sparse",
                d_model,
                grid=(length,),
                heads=n_heads,
                factor=factor if attn == "prob" else None,
                causal=causal,
                mix=mix and causal,
                measure=measure,
                sampling=sampling,
                attn_drop=dropout,
                drop=dropout,
            )
        options = {"causal": True} if causal and mixer_class(attn).causal_form else {}
        return create_mixer(attn, d_model, grid=(length,), **options)

    def mlp() -> nn.Module:
        return Mlp(d_model, d_ff, drop=dropout)

    def encoder(length: int, layers: int) -> nn.Module:
        blocks, merges = [], []
        for i in range(layers):
            blocks.append(Block(d_model, mixer(length, False), mlp(), residual="post"))
            if distil and i < layers - 1:
                merges.append(Distil(d_model))
                length = (length + 1) // 2
        return Encoder(blocks, merges=merges, norm=nn.LayerNorm(d_model))

    def embedding(length: int) -> nn.Module:
        return SeriesEmbedding(channels, d_model, marks=marks, freq=freq, calendar=embed, length=length, drop=dropout)

    encoders = [encoder(seq_len // 2**i, layers) for i, layers in enumerate(stack)]
    blocks = []
    for _ in range(d_layers):
        cross = create_mixer("attention", d_model, heads=n_heads, attn_drop=dropout, drop=dropout)
        blocks.append(DecoderBlock(d_model, mixer(target_len, True), cross, mlp()))
    return Forecaster(
        embedding(seq_len),
        encoders[0] if isinstance(e_layers, int) else Replicas(encoders),
        embedding(target_len),
        Decoder(blocks, norm=nn.LayerNorm(d_model)),
        Horizon(d_model, channels, pred_len),
        start=LastKnown(label_len, pred_len),
        seq_len=seq_len,
        label_len=label_len,
        pred_len=pred_len,
    )
