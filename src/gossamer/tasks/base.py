"""What lies between a batch and a number, for every task: inputs, targets, loss, metrics, words and pictures.

- batches are made on the CPU in the form models take; augmentation lives here
- `metrics` are flat numbers for the race, `details` the tables of the report
- matplotlib is loaded by the first picture
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gossamer.data import Split


@dataclass
class Figure:
    """A picture of the report: `kind` is `svg` or `png`."""

    title: str
    data: bytes
    caption: str
    kind: str = "svg"


class Task(ABC):
    """One kind of problem.

    Args:
        spec: model keywords of the data set (`Dataset.spec`).
        meta: facts of the data set (`Dataset.meta`).
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    maximise: ClassVar[bool]

    def __init__(self, spec: dict[str, Any], meta: dict[str, Any]) -> None:
        self.spec = spec
        self.meta = meta

    @abstractmethod
    def batch(
        self,
        split: Split,
        index: Tensor,
        *,
        train: bool = False,
        strength: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Model inputs and target of the items at `index`.

        Args:
            split: where the items are.
            index: int64 `(b,)`.
            train: augment.
            strength: of the augmentation, 0 (none) to 1.
            generator: source of all chance.
        """

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor, smoothing: float = 0.0) -> Float[Tensor, ""]:
        """The mean training loss of a batch."""

    def answer_shape(self, inputs: tuple[Tensor, ...], target: Tensor) -> tuple[int | None, ...]:
        """Sizes of a model's answer to a batch, None where any will do: those of the target, if not overridden."""
        return tuple(target.shape)

    def teaching(self, student: Tensor, teacher: Tensor) -> Float[Tensor, ""]:
        """How far the answers of `student` are from its teacher's: the mean squared difference, if not overridden."""
        return F.mse_loss(student, teacher)

    def reduce(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What `metrics`, `details` and `figures` need of a batch, first axis kept: all of it, if not overridden."""
        return output, target

    @property
    def most_at_once(self) -> int:
        """Samples whose answers memory holds together."""
        return 1 << 20

    def example(self, split: Split, count: int = 1) -> tuple[Tensor, ...]:
        """Model inputs of `count` samples as an exported model is given them; costs are measured on one."""
        return self.batch(split, torch.arange(min(count, len(split))))[0]

    @abstractmethod
    def metrics(self, output: Tensor, target: Tensor) -> dict[str, float]:
        """Numbers over a whole split; `self.metric` is among them."""

    @abstractmethod
    def details(self, output: Tensor, target: Tensor) -> dict[str, Any]:
        """JSON-able tables over a whole split, for the report."""

    @abstractmethod
    def baseline(self, train: Split, split: Split) -> dict[str, float]:
        """`metrics` of the simplest honest guess on `split`, which every model must beat."""

    @abstractmethod
    def read(self, inputs: list[str]) -> tuple[Tensor, ...]:
        """Model inputs from files or texts of the user. What `describe` needs of them is remembered.

        Raises:
            DataError: an input cannot be read.
        """

    @abstractmethod
    def describe(self, output: Tensor) -> list[dict[str, Any]]:
        """The output for the inputs read last, in the user's terms: one JSON-able row for each input."""

    @abstractmethod
    def figures(self, output: Tensor, target: Tensor, split: Split) -> list[Figure]:
        """Pictures of the outputs on a whole split, in its order."""


def check_strength(strength: float) -> None:
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")


def new_plot(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """An empty figure (inches) and its 2-d array of axes, without pyplot's global state."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Plot

    plot = Plot(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(plot)
    return plot, plot.subplots(rows, columns, squeeze=False)


def to_svg(plot: Any) -> bytes:
    """The figure as SVG, the same bytes for the same picture; letters stay letters."""
    import warnings

    import matplotlib

    buffer = io.BytesIO()
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "gossamer", "font.size": 9}
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters the measuring font lacks are the browser's business
        plot.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
