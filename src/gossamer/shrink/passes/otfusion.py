"""Optimal-transport fusion: trained models of one depth are aligned unit by unit, then their weights are averaged.

Source: Imfeld, Graldi, Giordano, Hofmann, Anagnostidis, Singh 2023, "Transformer Fusion with Optimal Transport".

A map `T (n0, n1)` says where the units of one model are found in the anchor's. A linear layer is aligned by

    W' = W S(T_in),   W'' = T^T W',   T = n1 argmin <P, C>,   C_ij = |a_i - b_j| / max C

with `a`, `b` the standardised activations of the two layers' units over samples and tokens, or the rows of `W'` and of
the anchor's `W`. Columns of `T` sum to 1: aligned units are means. `S(T) = T n0 / n1`, whose rows sum to 1: what read a
unit goes on reading all of it. Maps flow:

- embeddings: patches (words) and positions have their own map each, the stream the two combined
- attention: queries, keys and values read the stream's map; the output product reads that of the values, whose heads
  are not kept together. `qk="shared"` gives queries and keys one map (the released `eq_t_map`)
- residual sums combine the map of the stream with that of the branch, by default their mean
- norms and scales are vectors in the map of what they are applied to; the last product keeps its own outputs
- several models are aligned with the anchor one by one, and all are averaged
- unequal widths: the released code scales outputs by n0 / n1 too; ours does not, or widths would change the answers
- class tokens and tables of positions have no activations: they are compared as they are, rows not normalised
- fused weights equal the released code's for both solvers, both costs, and the policies without weights; the weighted
  policies follow the description and differ from it by up to 0.02; its map over queries and keys as one set of units
  (`joint`) is left out
- heads that are nothing but a pooled stream have the anchor's coordinates
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, TextStem, TokenStem
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.heads import DenseClassifier, SentenceVector
from gossamer.layers.language import WordHead, WordStem
from gossamer.measure import parameters
from gossamer.mixers.attention import Attention
from gossamer.models.registry import config_of, create_model
from gossamer.ops.transport import exact_plan, sinkhorn_plan
from gossamer.shrink.base import Calibration, Step, Unsupported, register_pass
from gossamer.shrink.passes.snnet import become
from gossamer.shrink.recipe import load, note, register_step, replay
from gossamer.trunks.isotropic import Isotropic

Map = Tensor | None
"""`(units of the model, units of the anchor)`, columns summing to 1; None where the two are the same units."""

POLICIES = ("mean", "only_residual", "no_residual", "identity", "weighted_scalar", "weighted_matrix")
REGS = {"activations": 0.08, "weights": 0.06}


@dataclass(frozen=True)
class Fusion:
    """How units are compared and maps combined; see `otfusion`."""

    solver: str = "sinkhorn"
    reg: float | None = None
    cost: str = "activations"
    metric: str = "euclidean"
    residual: str = "mean"
    qk: str = "separate"

    def __post_init__(self) -> None:
        for name, allowed in (
            ("solver", ("sinkhorn", "emd")),
            ("cost", ("activations", "weights")),
            ("metric", ("euclidean", "cosine")),
            ("residual", POLICIES),
            ("qk", ("separate", "shared")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        if self.reg is not None and self.reg <= 0:
            raise ValueError(f"reg must be positive, got {self.reg}")


@register_pass("otfusion", family="joining", paper="otfusion-transformer", saves=("macs", "params", "size"))
def otfusion(
    model: nn.Module,
    calibration: Calibration,
    *,
    others: Sequence[nn.Module | str | Path] = (),
    alpha: float | None = None,
    solver: str = "sinkhorn",
    reg: float | None = None,
    cost: str = "activations",
    metric: str = "euclidean",
    residual: str = "mean",
    qk: str = "separate",
    samples: int = 200,
    window: int = 6,
) -> list[Step]:
    """Fuses the model with `others` into one of the narrowest of them (the anchor; the model itself among equals).

    Args:
        others: models of the same depth, or folders they were saved in.
        alpha: share of the anchor in each average of two, `1 / models` by default.
        solver: soft plans by Sinkhorn, or exact ones.
        reg: entropy of soft plans, 0.08 for activations and 0.06 for weights by default.
        cost: what units are compared by.
        residual: how the maps of stream and branch are combined: their `mean`, one of them, none (`identity`), or
            weighted by mean activation, per layer (`weighted_scalar`) or per unit (`weighted_matrix`).
        qk: queries and keys have `separate` maps, or a `shared` one solved from both.
        samples: items activations are taken from.
        window: side of the central square of patches they are taken at.

    Raises:
        Unsupported: nothing to fuse with, or parts whose units cannot be mapped.
        ValueError: an unknown setting, no samples, `alpha` not in [0, 1].
    """
    how = Fusion(solver, reg, cost, metric, residual, qk)
    if samples < 1 or window < 1:
        raise ValueError(f"samples and window must be at least 1, got samples={samples}, window={window}")
    if alpha is not None and not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if not others:
        raise Unsupported(f"{type(model).__name__} alone cannot be fused: give others=[…], models or their folders")
    models = [model, *(m if isinstance(m, nn.Module) else load(m) for m in others)]
    anchor = min(models, key=parameters)
    rest = [m for m in models if m is not anchor]
    for other in rest:
        check_pair(other, anchor)
    inputs = [x for x, _ in calibration.batches(samples)]
    share = 1 / len(models) if alpha is None else alpha
    known = Record.of(anchor, inputs, window)
    aligned = [align(other, anchor, Record.of(other, inputs, window), known, how) for other in rest]
    own = anchor.state_dict()
    fused = dict(own)
    for key in aligned[0]:
        mean = torch.stack([a[key] for a in aligned]).mean(0)
        fused[key] = torch.lerp(mean, own[key], share)
    if anchor is model:
        model.load_state_dict(fused)
        return []
    try:
        step = {"step": "otfusion.anchor", "config": config_of(anchor), "recipe": list(getattr(anchor, "recipe", []))}
    except ValueError as error:
        raise Unsupported(str(error)) from error
    narrow = copy.deepcopy(anchor)
    narrow.load_state_dict(fused)
    become(model, narrow)
    note(model, step)
    return [step]


@register_step("otfusion.anchor")
def _anchor(model: nn.Module, step: Step) -> None:
    become(model, replay(create_model(**step["config"]), step["recipe"]))


class Record:
    """What a model's units gave on the samples.

    Args:
        units: of each product, `(units, samples x tokens)`.
        strength: of each summand of the stream, its mean size per unit.
    """

    def __init__(self) -> None:
        self.units: dict[str, Tensor] = {}
        self.strength: dict[str, Tensor] = {}

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], window: int) -> Record:
        """Runs `model` on `inputs`; tokens: the learned ones and the central `window`, or all but padding."""
        kept: dict[str, list[Tensor]] = {}
        sizes: dict[str, list[Tensor]] = {}
        mask: list[Tensor | None] = [None]
        stem: Any = model.stem
        grid = getattr(stem, "grid", None)

        def tokens(x: Tensor) -> Tensor:
            valid = mask[0]
            if grid is None:
                return x.flatten(0, 1) if valid is None else x[valid]
            if x.ndim == 4:  # the patches themselves, all of them as in the released code
                return x.flatten(0, 2)
            h, w = grid
            front, square = x[:, : x.shape[1] - h * w], x[:, x.shape[1] - h * w :].unflatten(1, (h, w))
            top, left = max(0, (h - window) // 2), max(0, (w - window) // 2)
            square = square[:, top : top + window, left : left + window].flatten(1, 2)
            return torch.cat((front, square), 1).flatten(0, 1)

        def note(name: str, _: nn.Module, __: Any, y: Tensor) -> None:
            kept.setdefault(name, []).append(y if y.ndim == 2 else tokens(y))

        def note_size(name: str, _: nn.Module, args: Any) -> None:
            sizes.setdefault(name, []).append(tokens(args[0]).abs().mean(0))

        def mask_words(_: nn.Module, args: Any) -> None:
            mask[0] = args[0] != stem.pad_id if hasattr(stem, "pad_id") else None

        def mask_tokens(_: nn.Module, __: Any, y: Any) -> None:
            mask[0] = y[1]

        hooks = [stem.register_forward_pre_hook(mask_words), stem.register_forward_hook(mask_tokens)]
        for name, part in model.named_modules():
            # What the last product gives is never compared.
            known = isinstance(part, nn.Linear | nn.Embedding) and name not in ("head.fc", "head.distilled")
            if known or name == "stem.embed":
                hooks.append(part.register_forward_hook(partial(note, name)))
            if isinstance(part, Block):
                hooks.append(part.register_forward_pre_hook(partial(note_size, f"{name}.in")))
                middle = part.norm2 if part.residual == "pre" else part.mlp
                hooks.append(middle.register_forward_pre_hook(partial(note_size, f"{name}.mid")))
        was_training = model.training
        model.eval()
        try:
            for x in inputs:
                model(*x)
        finally:
            model.train(was_training)
            for hook in hooks:
                hook.remove()
        record = cls()
        for name, parts in kept.items():
            raw = torch.cat(parts)
            record.strength[name] = raw.abs().mean(0).double()
            raw = raw - raw.mean(0)
            record.units[name] = (raw / raw.std(0, correction=0).clamp(min=1e-12)).T
        for name, parts in sizes.items():
            record.strength[name] = torch.stack(parts).mean(0).double()
        if isinstance(getattr(stem, "positions", None), Tensor):
            record.strength["stem.positions"] = stem.positions.detach()[0].double().abs().mean(0)
        return record


def align(
    source: nn.Module, anchor: nn.Module, record: Record, anchor_record: Record, how: Fusion
) -> dict[str, Tensor]:
    """The weights of `source` in the units, and of the widths, of `anchor`; both went through `check_pair`."""
    return _Alignment(source, anchor, record, anchor_record, how).run()


class _Alignment:
    def __init__(self, source: nn.Module, anchor: nn.Module, record: Record, anchor_record: Record, how: Fusion):
        self.source, self.anchor = cast(Any, source), cast(Any, anchor)
        self.own = {k: v.detach().double() for k, v in source.state_dict().items()}
        self.goal = {k: v.detach().double() for k, v in anchor.state_dict().items()}
        self.record, self.anchor_record, self.how = record, anchor_record, how
        self.state: dict[str, Tensor] = {}

    def run(self) -> dict[str, Tensor]:
        stream = self.stem()
        for number in range(len(self.source.blocks)):
            stream = self.block(f"blocks.{number}", stream)
        if self.source.norm is not None:
            self.vectors("norm", stream)
        self.head(stream)
        return {key: value.to(self.anchor.state_dict()[key].dtype) for key, value in self.state.items()}

    def stem(self) -> Tensor:
        stem = self.source.stem
        if isinstance(stem, TokenStem):
            content = self.product("stem.embed.proj", None, record="stem.embed")
            if getattr(stem.embed, "norm", None) is not None:
                self.vectors("stem.embed.norm", content)
            name, tokens = "stem.embed", "stem.tokens"
        else:
            content = self.table("stem.words.weight", "stem.words")
            name, tokens = "stem.words", "stem.token"
        if tokens in self.own:
            self.table(tokens)
        stream = content
        if "stem.positions" in self.own:
            stream = self.combine(self.table("stem.positions"), content, "stem.positions", name, None)
        elif isinstance(getattr(stem, "positions", None), Tensor) and content.shape[0] != content.shape[1]:
            raise Unsupported("stem.positions is a fixed table: models of different widths cannot be mapped onto it")
        if getattr(stem, "norm", None) is not None:
            self.vectors("stem.norm", stream)
        return stream

    def block(self, name: str, stream: Tensor) -> Tensor:
        block = self.source.get_submodule(name)
        pre = block.residual == "pre"
        if pre:
            self.vectors(f"{name}.norm1", stream)
        branch = self.attention(f"{name}.mixer", stream)
        self.vector(f"{name}.scale1", branch)
        stream = self.combine(stream, branch, f"{name}.in", f"{name}.mixer.proj", f"{name}.scale1")
        self.vectors(f"{name}.norm2" if pre else f"{name}.norm1", stream)
        hidden = self.product(f"{name}.mlp.fc1", stream)
        branch = self.product(f"{name}.mlp.fc2", hidden)
        self.vector(f"{name}.scale2", branch)
        stream = self.combine(stream, branch, f"{name}.mid", f"{name}.mlp.fc2", f"{name}.scale2")
        if not pre:
            self.vectors(f"{name}.norm2", stream)
        return stream

    def attention(self, name: str, stream: Tensor) -> Tensor:
        weight, goal = (s[f"{name}.qkv.weight"].unflatten(0, (3, -1)) for s in (self.own, self.goal))
        units = [
            r.units[f"{name}.qkv"].unflatten(0, (3, -1)) if self.how.cost == "activations" else None
            for r in (self.record, self.anchor_record)
        ]
        read = weight @ self.reader(stream)

        def solve(*parts: int) -> Tensor:
            if units[0] is not None and units[1] is not None:
                first, second = (torch.cat([u[i] for i in parts], -1) for u in (units[0], units[1]))
            else:
                first, second = (F.normalize(torch.cat([w[i] for i in parts], -1), dim=-1) for w in (read, goal))
            return self.plan(first, second)

        if self.how.qk == "separate":
            maps = [solve(0), solve(1), solve(2)]
        else:
            both = solve(0, 1)
            maps = [both, both, solve(2)]
        self.state[f"{name}.qkv.weight"] = torch.cat([t.T @ w for t, w in zip(maps, read, strict=True)])
        if f"{name}.qkv.bias" in self.own:
            biases = self.own[f"{name}.qkv.bias"].unflatten(0, (3, -1))
            self.state[f"{name}.qkv.bias"] = torch.cat([t.T @ b for t, b in zip(maps, biases, strict=True)])
        return self.product(f"{name}.proj", maps[2])

    def head(self, stream: Tensor) -> None:
        head = self.source.head
        if isinstance(head, Classifier) and head.norm is not None:
            self.vectors("head.norm", stream)
        if isinstance(head, DenseClassifier):
            stream = self.product("head.dense", stream)
        tied = isinstance(head, WordHead) and head.fc.weight is self.source.stem.words.weight
        for layer in ("head.fc", "head.distilled"):
            if f"{layer}.weight" in self.own and not tied:
                self.product(layer, stream, last=True)
        if tied:
            # One table: it is mapped where it makes the stream.
            self.state["head.fc.weight"] = self.state["stem.words.weight"]

    def product(self, name: str, given: Map, *, record: str | None = None, last: bool = False) -> Tensor:
        """Aligns one product; gives the map of its outputs."""
        weight, goal = self.own[f"{name}.weight"], self.goal[f"{name}.weight"]
        shape = goal.shape
        weight, goal = weight.flatten(1), goal.flatten(1)
        if given is not None:
            weight = weight @ self.reader(given)
        found = torch.eye(len(weight)).to(weight) if last else self.solve(weight, goal, record or name)
        self.state[f"{name}.weight"] = (found.T @ weight).view(len(goal), *shape[1:])
        self.vector(f"{name}.bias", found)
        return found

    def table(self, key: str, record: str | None = None) -> Tensor:
        """Aligns a table of embeddings, channels last; gives the map of its channels."""
        own, goal = (s[key].flatten(0, -2).T for s in (self.own, self.goal))
        if record is not None and self.how.cost == "activations":
            found = self.solve(own, goal, record)
        else:
            found = self.plan(own, goal)
        self.state[key] = (found.T @ own).T.view(self.goal[key].shape)
        return found

    def vectors(self, name: str, found: Tensor) -> None:
        for kind in ("weight", "bias"):
            self.vector(f"{name}.{kind}", found)

    def vector(self, key: str, found: Tensor) -> None:
        if key in self.own:
            self.state[key] = found.T @ self.own[key]

    def reader(self, given: Tensor) -> Tensor:
        """`S(T)`: the map as those who read the units need it, its rows summing to 1."""
        return given * (given.shape[0] / given.shape[1])

    def solve(self, weight: Tensor, goal: Tensor, record: str) -> Tensor:
        if self.how.cost == "activations":
            return self.plan(self.record.units[record], self.anchor_record.units[record])
        return self.plan(F.normalize(weight, dim=-1), F.normalize(goal, dim=-1))

    def plan(self, first: Tensor, second: Tensor) -> Tensor:
        cost = ground_cost(first.double(), second.double(), self.how.metric)
        if self.how.solver == "emd":
            found = exact_plan(cost)
        else:
            found = sinkhorn_plan(cost, self.how.reg or REGS[self.how.cost])
        return found * found.shape[1]

    def combine(self, stream: Tensor, branch: Tensor, stream_at: str, branch_at: str, scale: str | None) -> Tensor:
        policy = self.how.residual
        if policy == "only_residual":
            return stream
        if policy == "no_residual":
            return branch
        if policy == "identity":
            if stream.shape[0] != stream.shape[1]:
                raise Unsupported(f"residual='identity' needs equal widths, got {tuple(stream.shape)} at {branch_at}")
            return torch.eye(len(stream)).to(stream)
        if policy == "mean":
            return (stream + branch) / 2
        strength = self.anchor_record.strength
        one, two = strength[stream_at], strength[branch_at]
        if scale is not None and scale in self.goal:
            two = two * self.goal[scale].abs()
        if policy == "weighted_scalar":
            one, two = one.mean(), two.mean()
        share = one / (one + two).clamp(min=1e-12)
        return stream * share + branch * (1 - share)


def ground_cost(first: Tensor, second: Tensor, metric: str) -> Tensor:
    """Distances between the rows of two matrices, divided by the largest."""
    if metric == "cosine":
        cost = 1 - F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T
    else:
        cost = torch.cdist(first, second)
    return cost / cost.max().clamp(min=1e-12)


def check_pair(source: nn.Module, anchor: nn.Module) -> None:
    """Raises `Unsupported` where the units of one model cannot be mapped onto those of the other, naming the part."""
    for model in (source, anchor):
        if not isinstance(model, Isotropic):
            raise Unsupported(f"{type(model).__name__} is not an Isotropic trunk: its maps do not flow block to block")
        kinds: tuple[tuple[str, tuple[type, ...]], ...] = (
            ("stem", (TokenStem, TextStem, WordStem)),
            ("head", (Classifier, DistilledClassifier, DenseClassifier, SentenceVector, WordHead)),
        )
        for name, allowed in kinds:
            if type(getattr(model, name)) not in allowed:
                raise Unsupported(f"{name} ({type(getattr(model, name)).__name__}) has no rule of alignment")
        if isinstance(model.head, Classifier) and model.head.pool is not None:
            raise Unsupported("head (SequencePool) has no rule of alignment")
        for number, block in enumerate(model.blocks):
            if type(block) is not Block or block.residual not in ("pre", "post"):
                raise Unsupported(f"blocks.{number} ({type(block).__name__}) is no pre-norm or post-norm block")
            for name, part, kind in (("mixer", block.mixer, Attention), ("mlp", block.mlp, Mlp)):
                if type(part) is not kind:
                    raise Unsupported(f"blocks.{number}.{name} ({type(part).__name__}) has no rule of alignment")
            if block.mlp.norm1 is not None or block.mlp.norm2 is not None:
                raise Unsupported(f"blocks.{number}.mlp has norms between its products")
    one, two = cast(Any, source), cast(Any, anchor)
    for what, values in (
        ("depth", (len(one.blocks), len(two.blocks))),
        ("stem", (type(one.stem).__name__, type(two.stem).__name__)),
        ("head", (type(one.head).__name__, type(two.head).__name__)),
        ("residual style", (one.blocks[0].residual, two.blocks[0].residual)),
        ("patch grid", tuple(getattr(m.stem, "grid", None) for m in (one, two))),
        ("parts", tuple(tuple(sorted(m.state_dict())) for m in (one, two))),
    ):
        if values[0] != values[1]:
            told = "" if what == "parts" else f", got {values[0]} and {values[1]}"
            raise Unsupported(f"models to fuse must agree in {what}{told}")
    for key, value in one.state_dict().items():
        rows = key in ("stem.words.weight", "stem.tokens", "stem.positions") or key.startswith(("head.fc", "head.dist"))
        if rows and value.shape[:-1] != two.state_dict()[key].shape[:-1]:
            raise Unsupported(f"{key} differs: {tuple(value.shape)} and {tuple(two.state_dict()[key].shape)}")
