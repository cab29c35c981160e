"""Forecasting: windows of a standardised series to batches, outputs to values with their times.

- inputs are `x (b, seq_len, channels)` and `marks (b, seq_len + pred_len, features)`, the target `(b, pred_len,
  channels)`; a model of another `seq_len` than the data set's predicts the same targets
- errors are on standardised values, as in the literature; forecasts are told in the user's units
- augmentation scales each window by `1 +- 0.2 strength` and adds noise of `0.1 strength` deviations to what the model
  sees, not to the target (which is scaled alike)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gossamer.data import DataError, Split
from gossamer.tasks.base import Figure, Task, check_strength, new_plot, to_svg


class Forecasting(Task):
    """`loss = mean (output - target)^2` on standardised values."""

    name = "forecasting"
    metric = "mse"
    maximise = False

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        super().__init__(spec, meta)
        self.seq_len, self.pred_len = int(spec["seq_len"]), int(spec["pred_len"])
        if self.seq_len > meta["lookback"]:
            raise ValueError(
                f"seq_len must be at most the lookback of the data, {meta['lookback']}; got {self.seq_len}"
            )
        self.columns: list[str] = list(meta["columns"])
        self.mean = torch.tensor(meta["mean"], dtype=torch.float64)
        self.std = torch.tensor(meta["std"], dtype=torch.float64)
        self.reading: list[tuple[str, list[str]]] = []

    def batch(
        self,
        split: Split,
        index: Int[Tensor, " b"],
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Float[Tensor, "b seq c"], Float[Tensor, "b span f"]], Float[Tensor, "b pred c"]]:
        """Past values, calendar marks of past and future, and future values."""
        check_strength(strength)
        series, marks = split.shared
        rows = split.targets[index, None] + torch.arange(-self.seq_len, self.pred_len)
        values = series[rows]
        x, target = values[:, : self.seq_len], values[:, self.seq_len :]
        if train and strength > 0:
            scale = 1 + (torch.rand(len(x), 1, 1, generator=generator) * 2 - 1) * (0.2 * strength)
            noise = torch.randn(x.shape, generator=generator) * (0.1 * strength)
            x, target = x * scale + noise, target * scale
        return (x.contiguous(), marks[rows]), target.contiguous()

    def loss(
        self, output: Float[Tensor, "b pred c"], target: Float[Tensor, "b pred c"], smoothing: float = 0.0
    ) -> Float[Tensor, ""]:
        """Mean squared error; `smoothing` means nothing here."""
        return F.mse_loss(output.float(), target)

    def metrics(self, output: Float[Tensor, "n pred c"], target: Float[Tensor, "n pred c"]) -> dict[str, float]:
        """Mean squared and mean absolute error over all windows, steps and channels."""
        error = output.float() - target
        return {"mse": float(error.square().mean()), "mae": float(error.abs().mean())}

    def details(self, output: Float[Tensor, "n pred c"], target: Float[Tensor, "n pred c"]) -> dict[str, Any]:
        """Errors of each step ahead and of each channel."""
        error = output.float() - target
        return {
            "columns": self.columns,
            "mse_by_step": error.square().mean((0, 2)).tolist(),
            "mae_by_step": error.abs().mean((0, 2)).tolist(),
            "mse_by_channel": error.square().mean((0, 1)).tolist(),
            "mae_by_channel": error.abs().mean((0, 1)).tolist(),
        }

    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        """The last value seen, repeated."""
        square = absolute = 0.0
        for index in torch.arange(len(split)).split(512):
            (x, _), target = self.batch(split, index)
            error = x[:, -1:] - target
            square += float(error.square().mean((1, 2)).sum())
            absolute += float(error.abs().mean((1, 2)).sum())
        return {"mse": square / len(split), "mae": absolute / len(split)}

    def read(self, inputs: list[str]) -> tuple[Float[Tensor, "b seq c"], Float[Tensor, "b span f"]]:
        """Tables with the run's columns and at least `seq_len` rows; the forecast begins after their end."""
        import pandas as pd

        from gossamer.data.series import calendar, following, read_series
        from gossamer.data.tables import read_table

        series, marks, reading = [], [], []
        freq = self.meta["freq"]
        for name in inputs:
            if not Path(name).is_file():
                raise DataError(f"{name}: no such file")
            table = read_table(Path(name))
            if (rows := len(table.frame)) < self.seq_len:
                raise DataError(f"{name}: {rows} rows are too few; the model looks back on {self.seq_len}")
            # Only the rows the model sees have to be whole.
            table.frame = table.frame.iloc[rows - self.seq_len :].reset_index(drop=True)
            table.lines = None if table.lines is None else table.lines[rows - self.seq_len :]
            stamps, values = read_series(table, self.meta["time"], self.columns)
            expected = pd.date_range(stamps[0], periods=self.seq_len, freq=freq)
            if not (stamps == expected).all():
                row = int((stamps != expected).argmax())
                raise DataError(
                    f"{table.where(row, self.meta['time'])}: {stamps[row]} where {expected[row]} is expected; the "
                    f"series has the frequency {freq!r}"
                )
            future = following(stamps[-1], freq, self.pred_len)
            series.append(((torch.from_numpy(values) - self.mean) / self.std).float())
            marks.append(calendar(pd.DatetimeIndex([*stamps, *future]), freq))
            reading.append((name, [stamp.isoformat() for stamp in future]))
        if not series:
            raise DataError("no input: give a table with the columns of the series")
        self.reading = reading
        return torch.stack(series), torch.stack(marks)

    def describe(self, output: Float[Tensor, "n pred c"]) -> list[dict[str, Any]]:
        """For each input a `forecast`: rows of a time and the value of each column, in the user's units."""
        values = output.double() * self.std + self.mean
        rows = []
        for i, table in enumerate(values.tolist()):
            default = (str(i), [str(step + 1) for step in range(self.pred_len)])
            name, stamps = self.reading[i] if i < len(self.reading) else default
            forecast = [
                {self.meta["time"]: stamp, **dict(zip(self.columns, row, strict=True))}
                for stamp, row in zip(stamps, table, strict=True)
            ]
            rows.append({"input": name, "forecast": forecast})
        return rows

    def figures(self, output: Tensor, target: Tensor, split: Split) -> list[Figure]:
        """A few test windows and channels, and the error by step ahead beside that of the repeated last value."""
        return [self.windows(output, target, split), self.by_step(output, target, split)]

    def windows(self, output: Tensor, target: Tensor, split: Split) -> Figure:
        import pandas as pd

        windows = sorted({int(i) for i in np.linspace(0, len(split) - 1, 5)[1:4]})
        channels = sorted({int(i) for i in np.linspace(0, len(self.columns) - 1, min(3, len(self.columns)))})
        stamps = pd.date_range(self.meta["first"], periods=len(split.shared[0]), freq=self.meta["freq"])
        plot, axes = new_plot(3.6 * len(windows), 1.9 * len(channels) + 0.3, len(channels), len(windows))
        for line, channel in enumerate(channels):
            mean, std = float(self.mean[channel]), float(self.std[channel])
            for column, i in enumerate(windows):
                axis, first = axes[line, column], int(split.targets[i])
                begin = first - min(self.seq_len, 2 * self.pred_len)
                past = split.shared[0][begin:first, channel].numpy() * std + mean
                future = stamps[first : first + self.pred_len]
                axis.plot(stamps[begin:first], past, color="0.6", lw=1, label="seen")
                axis.plot(future, target[i, :, channel].numpy() * std + mean, color="0.15", lw=1.2, label="truth")
                guess = output[i, :, channel].float().numpy() * std + mean
                axis.plot(future, guess, color="tab:blue", lw=1.2, label="forecast")
                axis.tick_params(labelsize=7)
                axis.tick_params(axis="x", rotation=30)
                axis.xaxis.set_major_locator(locator())
                if column == 0:
                    axis.set_ylabel(self.columns[channel][:24], parse_math=False)
        axes[0, 0].legend(fontsize=7, frameon=False)
        return Figure("Forecasts", to_svg(plot), "Windows of the test data, in the units of the data.")

    def by_step(self, output: Tensor, target: Tensor, split: Split) -> Figure:
        last = split.shared[0][split.targets - 1][:, None]
        steps = np.arange(1, self.pred_len + 1)
        plot, axes = new_plot(6.4, 2.8)
        axis = axes[0, 0]
        axis.plot(steps, (last - target).square().mean((0, 2)).numpy(), color="0.6", label="last value repeated")
        axis.plot(steps, (output.float() - target).square().mean((0, 2)).numpy(), color="tab:blue", label="forecast")
        axis.set_xlabel("steps ahead")
        axis.set_ylabel("mean squared error")
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
        return Figure("Error by step", to_svg(plot), "On test data, standardised values, all channels.")


def locator() -> Any:
    from matplotlib.dates import AutoDateLocator

    return AutoDateLocator(minticks=2, maxticks=4)
