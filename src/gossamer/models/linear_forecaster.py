"""Linear forecaster on trend and season: the baseline without attention that every forecaster is held against.

Source: Zeng et al. 2022, "Are Transformers Effective for Time Series Forecasting?" (DLinear: a linear map over time for
the trend and one for the season; NLinear: the last value is taken off before and put back after); Li et al. 2023,
"Revisiting Long-term Time Series Forecasting: An Investigation on Linear Mapping" (RLinear: the mean of the window).

- time is mapped, variables are not mixed; both maps are shared by all variables, or each variable has its own
- a level that drifts is what a fixed map cannot follow, so one value of the window is taken off and put back
- it starts as the forecast that nothing changes: the maps are zero
- calendar features are not read
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.models.registry import register_system
from gossamer.ops.series import decompose


class LinearForecaster(nn.Module):
    """`y = a + W_t trend(x - a) + W_s season(x - a) + b`, `a` the anchor of each window and variable.

    Args:
        channels: variables, read and forecast.
        seq_len: known steps.
        pred_len: steps to forecast.
        moving_avg: steps of the moving average that makes the trend, odd.
        individual: each variable has maps of its own.
        anchor: `last` known value, `mean` of the known steps, or `none`.

    Raises:
        ValueError: a length is below 1, `moving_avg` is even, or there is no such anchor.
    """

    def __init__(
        self,
        channels: int,
        seq_len: int,
        pred_len: int,
        *,
        moving_avg: int,
        individual: bool,
        anchor: Literal["last", "mean", "none"],
    ) -> None:
        super().__init__()
        if min(channels, seq_len, pred_len) < 1:
            raise ValueError(
                f"channels, seq_len and pred_len must be at least 1; got {channels}, {seq_len} and {pred_len}"
            )
        if moving_avg < 1 or moving_avg % 2 == 0:
            raise ValueError(f"moving_avg must be odd and positive, got {moving_avg}")
        if anchor not in ("last", "mean", "none"):
            raise ValueError(f"anchor must be last, mean or none; got {anchor!r}")
        self.seq_len = seq_len
        self.pred_len = pred_len
        self.moving_avg = moving_avg
        self.anchor = anchor
        maps = channels if individual else 1
        self.trend = nn.Parameter(torch.zeros(maps, pred_len, seq_len))
        self.season = nn.Parameter(torch.zeros(maps, pred_len, seq_len))
        self.bias = nn.Parameter(torch.zeros(maps, pred_len))

    def forward(self, x: Float[Tensor, "b n c"], marks: Float[Tensor, "b m f"] | None = None) -> Float[Tensor, "b t c"]:
        """The forecast; `marks` are not read.

        Raises:
            ValueError: `x` has another number of steps than `seq_len`.
        """
        if x.shape[1] != self.seq_len:
            raise ValueError(f"x must have {self.seq_len} steps (seq_len); got {x.shape[1]}")
        if self.anchor != "none":
            level = x[:, -1:] if self.anchor == "last" else x.mean(1, keepdim=True)
            x = x - level
        season, trend = decompose(x, self.moving_avg)
        y = self._map(self.season, season) + self._map(self.trend, trend) + self.bias.t()
        return y if self.anchor == "none" else y + level

    def _map(self, weight: Tensor, x: Tensor) -> Tensor:
        if len(weight) == 1:
            return weight @ x
        # one product for each variable: (c, t, n) (c, n, b)
        return (weight @ x.permute(2, 1, 0)).permute(2, 1, 0)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]] | None:
    if size == "xs":
        return "linear_forecaster", dict(spec)
    if size == "s" and spec["channels"] > 1:
        return "linear_forecaster_individual", dict(spec)
    return None


@register_system(
    "linear-forecaster",
    tasks=("forecasting",),
    scale=_scale,
    training=dict(lr=1e-3, batch_size=32, epochs=10, schedule="cosine", optimiser="adam", weight_decay=0.0),
    variants={"linear_forecaster": dict(), "linear_forecaster_individual": dict(individual=True)},
)
def linear_forecaster(
    *,
    channels: int = 7,
    seq_len: int = 336,
    pred_len: int = 96,
    freq: str = "h",
    marks: int | None = None,
    moving_avg: int = 25,
    individual: bool = False,
    anchor: Literal["last", "mean", "none"] = "last",
) -> nn.Module:
    """A linear forecaster on trend and season.

    Args:
        channels: variables, read and forecast.
        freq, marks: kind of data; the calendar is not read.
        moving_avg: steps of the moving average that makes the trend, odd.
        individual: each variable has maps of its own.
        anchor: what is taken off each window and put back: the `last` value, the `mean`, or nothing (`none`).
    """
    return LinearForecaster(channels, seq_len, pred_len, moving_avg=moving_avg, individual=individual, anchor=anchor)
