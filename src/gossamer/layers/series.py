"""Parts of forecasting models: tokens of a series, calendar embeddings, distilling, season.

Source: Zhou et al. 2020, "Informer", sections 3 and 4 (token convolution, calendar tables, distilling); Wu et al. 2021,
"Autoformer", section 3.1 (decomposition as an inner block, the seasonal LayerNorm).

- a circular convolution is one matrix product on the channels-last series beside its two shifted copies
- calendar features are numbers in [-0.5, 0.5], as many as the frequency has, or columns of integers read in tables
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.positions import sinusoid
from gossamer.ops.series import decompose

Calendar = Literal["timeF", "fixed", "learned"]

# Calendar features by frequency letter: yearly and monthly, weekly, daily and business days, hourly, minutes, seconds.
MARKS = {"a": 1, "m": 1, "w": 2, "d": 3, "b": 3, "h": 4, "t": 5, "s": 6}
# Rows of the calendar tables, in the order of the integer columns; the last is read by minutely data alone.
TABLES = {"month": 13, "day": 32, "weekday": 7, "hour": 24, "minute": 4}


def calendar_features(freq: str) -> int:
    """The number of calendar features that data of frequency `freq` has.

    Raises:
        ValueError: no such frequency letter.
    """
    if freq not in MARKS:
        raise ValueError(f"freq must be one of {', '.join(MARKS)}; got {freq!r}")
    return MARKS[freq]


class CircularConv(nn.Conv1d):
    """`y_t = W_0 x_(t-1) + W_1 x_t + W_2 x_(t+1) + b`, time read as a circle.

    The weight has PyTorch's layout `(out, in, 3)`.
    """

    def __init__(self, dim: int, out: int, *, bias: bool = True) -> None:
        super().__init__(dim, out, 3, bias=bias)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n o"]:
        near = torch.cat((x.roll(1, 1), x, x.roll(-1, 1)), -1)
        return F.linear(near, self.weight.transpose(1, 2).flatten(1), self.bias)


class CalendarTables(nn.Module):
    """Sum of one table row for month, day, weekday, hour (and quarter of the hour for minutely data).

    Args:
        dim: channels.
        freq: frequency letter; `t` reads the fifth column.
        learned: tables are learned; otherwise they are sinusoids and stay as they are.
    """

    def __init__(self, dim: int, freq: str, *, learned: bool) -> None:
        super().__init__()
        self.tables = nn.ModuleDict()
        for name, rows in TABLES.items():
            if name == "minute" and freq != "t":
                continue
            table = nn.Embedding(rows, dim)
            if not learned:
                table.weight = nn.Parameter(sinusoid(rows, dim), requires_grad=False)
            self.tables[name] = table

    def forward(self, marks: Float[Tensor, "b n f"]) -> Float[Tensor, "b n c"]:
        columns = marks.long().unbind(-1)
        rows = [table(column) for table, column in zip(self.tables.values(), columns, strict=True)]
        return torch.stack(rows).sum(0)


class SeriesEmbedding(nn.Module):
    """`drop(circular_conv(x) + calendar(marks) + positions)`.

    Args:
        channels: variables of the series.
        dim: channels of a token.
        marks: calendar features of a row.
        freq: frequency letter, for the tables.
        calendar: `timeF`, a linear map of features; `fixed` or `learned`, tables read by integer columns.
        bias: whether the convolution and the linear map add one.
        length: rows of the sinusoid table, or None for no positions.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        *,
        marks: int,
        freq: str = "h",
        calendar: Calendar = "timeF",
        bias: bool = True,
        length: int | None = None,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if calendar not in ("timeF", "fixed", "learned"):
            raise ValueError(f"calendar must be timeF, fixed or learned; got {calendar!r}")
        columns = len(TABLES) - (freq != "t")
        if calendar != "timeF" and marks != columns:
            raise ValueError(
                f"calendar={calendar!r} at freq={freq!r} reads {columns} integer columns; got marks={marks}"
            )
        self.marks = marks
        self.token = CircularConv(channels, dim, bias=bias)
        nn.init.kaiming_normal_(self.token.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.calendar: nn.Module
        if calendar == "timeF":
            self.calendar = nn.Linear(marks, dim, bias=bias)
        else:
            self.calendar = CalendarTables(dim, freq, learned=calendar == "learned")
        self.positions: Tensor | None
        self.register_buffer("positions", None if length is None else sinusoid(length, dim), persistent=False)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n i"], marks: Float[Tensor, "b n f"]) -> Float[Tensor, "b n c"]:
        if marks.shape[-1] != self.marks:
            raise ValueError(f"marks must have {self.marks} calendar features a row; got {marks.shape[-1]}")
        tokens = self.token(x) + self.calendar(marks)
        if self.positions is not None:
            tokens = tokens + self.positions[: x.shape[1]]
        return self.drop(tokens)


class Distil(nn.Module):
    """`max_pool(ELU(BatchNorm(circular_conv(x))))`: every second step of a series stays, n becomes `(n + 1) // 2`.

    ELU rises everywhere, so it is taken after the maximum, on half as many numbers.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = CircularConv(dim, dim)
        self.norm = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        x = self.norm(self.conv(x).transpose(1, 2))[..., None]
        return F.elu(F.max_pool2d(x, (3, 1), (2, 1), (1, 0))[..., 0].transpose(1, 2))


class Season(nn.Module):
    """The seasonal part of a series: `x - moving_average(x)`.

    Args:
        width: steps of the moving average, odd.

    Raises:
        ValueError: `width` is even or below 1.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        if width < 1 or width % 2 == 0:
            raise ValueError(f"moving_avg must be odd and positive, got {width}")
        self.width = width

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        return decompose(x, self.width)[0]

    def extra_repr(self) -> str:
        return f"width={self.width}"


class SeasonalNorm(nn.Module):
    """`LayerNorm(x)` less its mean over time, so that no trend is left in what is called seasonal."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        x = self.norm(x)
        return x - x.mean(1, keepdim=True)
