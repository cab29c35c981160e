"""What the pieces of an EfficientFormer cost on this device: one table, measured piece by piece, kept between runs.

Source: Li et al. 2022, "EfficientFormer: Vision Transformers at MobileNet Speed", section 4.2 (latency lookup table).

- a piece is exported and timed under ONNX Runtime, as the network that comes out will run
- what a call costs by itself is measured too and taken off each piece, and added once to a network
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gossamer import __version__
from gossamer.io import export_onnx, onnx_callable, onnx_session
from gossamer.measure import LatencyTable, latency
from gossamer.models import create_model
from gossamer.search.supernet import ATTEND, CONV, SKIP, Plan

PIECE_S = 0.25  # of timing a piece


class CostTable:
    """Latencies in milliseconds, measured when first asked for.

    Args:
        options: keywords of `efficientformer` that all networks of the search share.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = {k: v for k, v in options.items() if k not in ("widths", "depths", "attention_blocks")}
        self.stages = len(options["widths"])
        self._kept = LatencyTable()
        self._known: dict[str, float] = {}

    def total(self, plan: Plan) -> float:
        """The latency of a network: its pieces, and one call."""
        w = plan.widths
        pieces: list[tuple[str, int, Any]] = [("stem", 0, w[0]), ("head", self.stages - 1, w[-1])]
        pieces += [("merge", i, pair) for i, pair in enumerate(pairwise(w))]
        pieces += [(k, i, w[i]) for i, stage in enumerate(plan.slots) for k in stage if k != SKIP]
        return self._ms("call", 0, 0) + sum(self._ms(*piece) for piece in pieces)

    def _ms(self, kind: str, stage: int, width: int | tuple[int, int]) -> float:
        settings = sorted((k, str(v)) for k, v in self.options.items())
        key = f"slimming-{__version__}-{kind}-{stage}-{width}-{torch.get_num_threads()}-{settings}"
        if key not in self._known:
            found = self._kept.get(key)
            if found is None:
                call = 0.0 if kind == "call" else self._ms("call", 0, 0)
                found = max(0.0, self._time(kind, stage, width) - call)
                self._kept.put(key, found)
            self._known[key] = found
        return self._known[key]

    def _time(self, kind: str, stage: int, width: int | tuple[int, int]) -> float:
        piece, x = self._piece(kind, stage, width)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "piece.onnx"
            export_onnx(piece.eval(), (x,), path, input_names=["x"], dynamic=None, exporter="fast")
            call = onnx_callable(onnx_session(path), [x])
            return latency({"piece": call}, budget_s=PIECE_S)["piece"].median_ms

    def _piece(self, kind: str, stage: int, width: int | tuple[int, int]) -> tuple[nn.Module, torch.Tensor]:
        """A part of a network of the search, and an input for it."""
        torch.manual_seed(0)
        if kind == "call":
            return nn.ReLU(), torch.zeros(1, 1)
        widths = [16] * self.stages
        if isinstance(width, tuple):
            widths[stage : stage + 2] = width
        else:
            widths[stage] = width
        depths = [1] * self.stages
        options = {**self.options, "widths": tuple(widths), "depths": tuple(depths)}
        attending = {ATTEND: self.stages - stage}.get(kind, 0)
        net: Any = create_model("efficientformer_l1", **options, attention_blocks=attending)
        image = torch.randn(1, options["in_chans"], *options["img_size"])
        with torch.no_grad():
            maps = net.eval().features(image)
        if kind == "stem":
            return net.stem, image
        if kind == "head":
            return nn.Sequential(net.norm, net.head), maps[-1]
        if kind == "merge":
            return net.merges[stage], maps[stage]
        assert kind in (CONV, ATTEND)
        return net.stages[stage][0], maps[stage]
