"""Learning from a teacher by more than its answers: hidden states, attention, relations of tokens and of samples.

`Teaching(signals, student, teacher, task)` is an objective for `Trainer`:

`L = R + sum_s w_s r_s L_s`, `R = (1 - a) task(y, target) + a w_logits L_logits`, `a` the share that `Trainer` gives a
teacher; `r_s = 0.3 R / L_s` on the first batch, 10 at most, and the same from then on. The signals:

- `logits`: `Task.teaching` of the answers, `T^2 KL(softmax(t / T) || softmax(y / T))` for classes
  (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network")
- `features`: `mean_l |F_l M_l - T_l|^2 / |T_l|^2` of the hidden states behind matched blocks (Romero et al. 2014,
  "FitNets"; Jiao et al. 2019, "TinyBERT"); `M_l` is the identity where widths are equal
- `attention`: `mean_l mean_hij (A_l - B_l)^2`, `A`, `B` the logits of attention (TinyBERT), head by head
- `relations`: `sum_{z in q, k, v} mean_rt KL(softmax(z'_r z'_r^T / sqrt(d')) || softmax(z_r z_r^T / sqrt(d)))`, row t
  of relation head r, of the last matched block (Wang et al. 2020, "MiniLMv2"); z' is the teacher's
- `gram`: `huber(|e_i - e_j| / mean) + 2 huber(cos angle of e_i, e_j, e_k)` between the samples of a batch, `e` the mean
  token behind the last block (Park et al. 2019, "Relational Knowledge Distillation", with its ratio of the two)

Block `i` of `m` is matched with block `ceil((i + 1) L / m) - 1` of `L` (TinyBERT's uniform map), stage by stage.

- `r_s` is ours: losses of answers differ in size from task to task, hidden signals do not, and so would drown the
  cosines of sentences and be drowned by the likelihoods of words. A run taken up again finds it, and `M_l`, anew
- padding is in no sum; pairs that may not attend (padding, later tokens, other regions of a shifted window) are in none
- TinyBERT's distance of hidden states is not relative; here it is, so that one weight serves networks with norms
  behind or before the sum
- `M_l` is found by recursive least squares, in place of gradient steps: what it forgets and nothing else is set, no
  optimiser has to know of it, and it goes with the objective
- relations take any widths and heads, since vectors are joined and cut again into relation heads
- a window that is shifted is matched with the nearest that is shifted too
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import extract_model_from_parallel, reduce
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.data.language import NOTHING
from gossamer.layers import Block
from gossamer.mixers.attention import Attention
from gossamer.mixers.grouped_query import GroupedMixer, GroupedQueryAttention
from gossamer.mixers.hard_attention import HardAttention
from gossamer.mixers.heads import HeadMixer
from gossamer.mixers.rotary import RotaryAttention
from gossamer.mixers.window import WindowAttention, shift_offset
from gossamer.ops import grid as g
from gossamer.tasks.base import Task
from gossamer.train.trainer import TAUGHT

SIGNALS = ("logits", "features", "attention", "relations", "gram")
# Mixers whose attention is `softmax(scale q k^T + bias)`, as this file writes it out.
PLAIN = (Attention, HardAttention, GroupedQueryAttention, RotaryAttention, WindowAttention)
# Of what a learned map has seen, the share that it keeps from batch to batch; and what keeps its equations solvable.
MEMORY, RIDGE = 0.98, 1e-3
# A signal of weight 1 begins at this share of the loss of labels and answers. It is multiplied by so much at most: one
# that begins at zero must not be all that counts once it rises.
BEGIN, MOST = 0.3, 10.0
# Stands for minus infinity where a difference of two of them has to be a number.
NEVER = -1e9

Pair = tuple[str, str]
"""Names of a block of the student and of the block of the teacher it learns from."""


class Teaching:
    """The objective of the head of this file: `(model, inputs, target) -> loss`.

    One object serves one training of one student: what it has learned of the map between widths is its own.

    Args:
        signals: names, or weights by name; a name alone weighs 1.
        student: what will be trained; the objective may be called with a copy of it or with a wrapper around it.
        teacher: put into eval mode; it gets no gradients.
        relation_heads: of `relations`; the largest number that all widths allow, up to the teacher's heads, by default.

    Raises:
        ValueError: an unknown signal, a weight below 0, or models whose blocks cannot be matched; it names the block.
    """

    def __init__(
        self,
        signals: Sequence[str] | Mapping[str, float],
        student: nn.Module,
        teacher: nn.Module,
        task: Task,
        *,
        relation_heads: int | None = None,
    ) -> None:
        self.weights = check_signals(signals)
        self.teacher = teacher.eval()
        self.task = task
        self.relation_heads = relation_heads
        self.features: list[Pair] = []
        self.attention: list[Pair] = []
        self.relations: list[Pair] = []
        self.gram: list[Pair] = []
        self._maps: dict[str, LinearMap] = {}
        self._ratios: dict[str, float] = {}
        if not self.weights.keys() - {"logits"}:
            return
        own, others = (watchable(m) for m in (student, teacher))
        if "gram" in self.weights:
            self.gram = [(list(own)[-1], list(others)[-1])]
        if "features" in self.weights:
            self.features = match(own, others)
        if "attention" in self.weights:
            self.attention = match(own, others, _plain, "their attention is of other kinds")
        if "relations" in self.weights:
            self.relations = match(own, others, _shows, "they show no queries, keys and values")[-1:]

    def __call__(self, model: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Float[Tensor, ""]:
        teacher = self.teacher.to(inputs[0].device)
        own, output = self._watched(model, extract_model_from_parallel(model), inputs, 0)
        with torch.no_grad():
            other, taught = self._watched(teacher, teacher, inputs, 1)
        answers = [a.float() for a in (output if isinstance(output, tuple) else (output,))]
        taught = (taught[0] if isinstance(taught, tuple) else taught).float()
        loss = (1 - TAUGHT) * torch.stack([self.task.loss(a, target) for a in answers]).mean()
        # The sums are taken in single precision, whatever the model computes in.
        with torch.autocast(inputs[0].device.type, enabled=False):
            if weight := self.weights.get("logits"):
                loss = loss + TAUGHT * weight * torch.stack([self.task.teaching(a, taught) for a in answers]).mean()
            distances = self.distances(own, other, target)
        if distances and not self._ratios:
            # Of all processes together, so that they learn the same.
            first, *values = reduce(torch.stack([loss, *distances.values()]).detach(), "mean").tolist()
            ratios = [min(BEGIN * first / max(value, 1e-12), MOST) for value in values]
            self._ratios = dict(zip(distances, ratios, strict=True))
        for signal, distance in distances.items():
            loss = loss + self.weights[signal] * self._ratios[signal] * distance
        return loss

    def compare(self, student: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Float[Tensor, ""]]:
        """How far `student` is from the teacher: each signal but the logits, not weighed. Nothing is learned.

        Raises:
            ValueError: the two cannot be compared; it names the block and says why.
        """
        maps, self._maps = self._maps, {}
        try:
            with torch.no_grad():
                own, _ = self._watched(student, extract_model_from_parallel(student), inputs, 0)
                other, _ = self._watched(self.teacher, self.teacher, inputs, 1)
                return self.distances(own, other, inputs[0])
        finally:
            self._maps = maps

    def _watched(self, model: nn.Module, plain: nn.Module, inputs: tuple[Tensor, ...], side: int) -> tuple[Seen, Any]:
        """What the blocks of the student (`side` 0) or the teacher (1) show for `inputs`, and the answer."""
        mixers = [*self.attention, *self.relations]
        blocks = {pair[side] for pair in (*self.features, *mixers, *self.gram)}
        with watching(plain, blocks, {pair[side] for pair in mixers}) as seen:
            return seen, model(*inputs)

    def distances(self, own: Seen, other: Seen, target: Tensor) -> dict[str, Float[Tensor, ""]]:
        """Each signal but the logits, not weighed, of one batch as student and teacher saw it.

        Raises:
            ValueError: the two cannot be compared; it names the block and says why.
        """
        counts = target != NOTHING if self.task.name == "language-modelling" else None
        found: dict[str, list[Tensor]] = {}
        for pair in self.features:
            a, b, real = _hidden(pair, own, other, counts, "features")
            if a.shape[-1] != b.shape[-1]:
                a = self._maps.setdefault(pair[0], LinearMap())(a, b, real)
            found.setdefault("features", []).append(feature_distance(a, b, real))
        for pair in self.attention:
            found.setdefault("attention", []).append(self._attention(pair, own, other, counts))
        for pair in self.relations:
            found["relations"] = [self._relations(pair, own, other, counts)]
        for s, t in self.gram:
            vectors = []
            for seen, name in ((own, s), (other, t)):
                x = seen.state(name).flatten(1, -2).float()
                real = _real(seen.masks[name], counts, x)
                vectors.append(x.mean(1) if real is None else _mean(x, real[..., None].expand_as(x), 1))
            found["gram"] = [sample_distance(*vectors)]
        return {signal: torch.stack(parts).mean() for signal, parts in found.items()}

    def _attention(self, pair: Pair, own: Seen, other: Seen, counts: Tensor | None) -> Tensor:
        allowed, real = _pairs(pair, own, other, counts, "attention")
        maps = []
        for seen, name in ((own, pair[0]), (other, pair[1])):
            q, k, _ = seen.shown(name)
            mixer: Any = seen.blocks[name].mixer
            k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            maps.append(logits + mixer.relative_bias() if isinstance(mixer, WindowAttention) else logits)
        a, b = maps[0], maps[1].detach()  # the teacher's table of biases is read here
        if a.shape != b.shape:
            raise ValueError(
                f"attention: {pair[0]} has {a.shape[1]} heads, {pair[1]} of the teacher {b.shape[1]}; "
                "maps are compared head by head, relations need no equal heads"
            )
        return attention_distance(a, b, allowed, real)

    def _relations(self, pair: Pair, own: Seen, other: Seen, counts: Tensor | None) -> Tensor:
        allowed, real = _pairs(pair, own, other, counts, "relations")
        vectors = list(zip(own.shown(pair[0]), other.shown(pair[1]), strict=True))
        widths = [x.shape[1] * x.shape[3] for both in vectors for x in both]
        common = math.gcd(*widths)
        heads = self.relation_heads
        if heads is None:
            heads = max(r for r in range(1, vectors[0][1].shape[1] + 1) if common % r == 0)
        elif common % heads:
            raise ValueError(f"relation_heads must divide the widths {sorted(set(widths))} of {pair[0]}, got {heads}")
        return torch.stack([relation_distance(a, b, heads, allowed, real) for a, b in vectors]).sum()


def check_signals(signals: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Weights by name, those of weight 0 left out.

    Raises:
        ValueError: a name that is none of `SIGNALS`, a weight below 0, or nothing to teach by.
    """
    names = [signals] if isinstance(signals, str) else signals
    weights = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    for name, weight in weights.items():
        if name not in SIGNALS:
            raise ValueError(f"signals must be among {', '.join(SIGNALS)}; got {name!r}")
        if weight < 0:
            raise ValueError(f"the weight of {name} must be at least 0, got {weight}")
    found = {name: float(weight) for name, weight in weights.items() if weight}
    if not found:
        raise ValueError(f"signals must name at least one of {', '.join(SIGNALS)}, got none")
    return found


# --- distances ------------------------------------------------------------------------------------------------------


def feature_distance(
    own: Float[Tensor, "b n c"], wanted: Float[Tensor, "b n c"], real: Bool[Tensor, "b n"] | None = None
) -> Float[Tensor, ""]:
    """`|own - wanted|^2 / |wanted|^2` over the real tokens."""
    if real is not None:
        own, wanted = own[real], wanted[real]
    return (own - wanted).square().sum() / wanted.square().sum().clamp(min=1e-12)


def attention_distance(
    own: Float[Tensor, "b h n n"],
    wanted: Float[Tensor, "b h n n"],
    allowed: Bool[Tensor, "#b n n"] | None = None,
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """`mean((own - wanted)^2)` over the heads and the pairs of a real query and a key that it may attend."""
    square = (own - wanted).square().mean(1)
    counted = torch.ones_like(square, dtype=torch.bool) if allowed is None else allowed.expand_as(square)
    return _mean(square, counted if real is None else counted & real[..., None])


def relation_distance(
    own: Float[Tensor, "b h n d"],
    wanted: Float[Tensor, "b k n e"],
    heads: int,
    allowed: Bool[Tensor, "#b n n"] | None = None,
    real: Bool[Tensor, "b n"] | None = None,
) -> Float[Tensor, ""]:
    """`KL(softmax(w w^T / sqrt(d_w)) || softmax(o o^T / sqrt(d_o)))`, the mean over relation heads and real tokens."""
    logs = []
    for x in (own, wanted):
        x = x.transpose(1, 2).flatten(2).unflatten(-1, (heads, -1)).transpose(1, 2)
        logits = (x * x.shape[-1] ** -0.5) @ x.transpose(-2, -1)
        logs.append((logits if allowed is None else logits.masked_fill(~allowed[:, None], NEVER)).log_softmax(-1))
    rows = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean(1)
    return rows.mean() if real is None else _mean(rows, real)


def sample_distance(own: Float[Tensor, "b c"], wanted: Float[Tensor, "b e"]) -> Float[Tensor, ""]:
    """`huber(|e_i - e_j| / mean) + 2 huber(cos of the angle at e_j between e_i and e_k)`, of all pairs and triples."""
    lengths, angles = [], []
    for x in (own, wanted):
        length = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        lengths.append(length / length.sum().clamp(min=1e-12) * (length > 0).sum())
        way = F.normalize(x[None] - x[:, None], dim=-1)
        angles.append(way @ way.transpose(-2, -1))
    return F.smooth_l1_loss(lengths[0], lengths[1]) + 2 * F.smooth_l1_loss(angles[0], angles[1])


class LinearMap:
    """`x M + c`, nearest to what is wanted over the batches seen, older ones forgotten by and by."""

    def __init__(self) -> None:
        self.square: Tensor | None = None
        self.cross: Tensor | None = None

    def __call__(
        self, own: Float[Tensor, "b n c"], wanted: Float[Tensor, "b n e"], real: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n e"]:
        """`own` as the teacher's width; first the map learns from these tokens. Gradients go through `own` only."""
        ones = torch.cat((own, own.new_ones(*own.shape[:-1], 1)), -1)
        with torch.no_grad():
            x, y = (t.flatten(0, -2) if real is None else t[real] for t in (ones, wanted))
            x, y = x.double(), y.double()
            square, cross = x.T @ x, x.T @ y
            if self.square is not None and self.cross is not None:
                square, cross = square + MEMORY * self.square, cross + MEMORY * self.cross
            self.square, self.cross = square, cross
            ridge = RIDGE * square.diagonal().mean().clamp(min=1e-12)
            weight = torch.linalg.solve(square + torch.diag(ridge.expand(len(square))), cross)
        return ones @ weight.to(ones)


def _mean(x: Tensor, counted: Tensor, dim: int | None = None) -> Tensor:
    """The mean of the entries that count."""
    if dim is None:
        return (x * counted).sum() / counted.sum().clamp(min=1)
    return (x * counted).sum(dim) / counted.sum(dim).clamp(min=1)


# --- which blocks ---------------------------------------------------------------------------------------------------


def watchable(model: nn.Module) -> dict[str, Block]:
    """The outermost residual blocks by name, in order.

    Raises:
        ValueError: there are none, or one changes how many tokens there are.
    """
    for name, part in model.named_modules():
        if getattr(part, "reduces", False):
            raise ValueError(f"{name} ({type(part).__name__}) changes how many tokens there are; teach it by logits")
    found = {name: part for name, part in model.named_modules() if isinstance(part, Block)}
    outer = {n: b for n, b in found.items() if not any(n.startswith(f"{other}.") for other in found)}
    if not outer:
        raise ValueError(f"{type(model).__name__} has no residual blocks (gossamer.layers.Block); teach it by logits")
    return outer


def stage_of(name: str) -> str:
    """The list of blocks that a block is in: `stages.0` for `stages.0.3`, and for a block within it."""
    parts = name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    return ".".join(parts[:-1])


def match(
    student: Mapping[str, Block],
    teacher: Mapping[str, Block],
    wanted: Callable[[nn.Module], bool] | None = None,
    reason: str = "",
) -> list[Pair]:
    """Blocks of the student and those of the teacher they learn from, in order.

    Args:
        wanted: only blocks whose mixers are such, of one window and shift; None matches blocks by place alone.
        reason: what is said of the mixers that are not.

    Raises:
        ValueError: the models have different stages, or no pair is wanted.
    """
    stages = [[list(names) for _, names in groupby(m, stage_of)] for m in (student, teacher)]
    if len(stages[0]) != len(stages[1]):
        names = [", ".join(stage_of(s[0]) for s in found) for found in stages]
        raise ValueError(f"blocks cannot be matched: the student has the stages {names[0]}, its teacher {names[1]}")
    pairs = []
    for own, others in zip(*stages, strict=True):
        for i, name in enumerate(own):
            place = max(0, -(-(i + 1) * len(others) // len(own)) - 1)
            if wanted is None:
                pairs.append((name, others[place]))
                continue
            mixer = student[name].mixer
            fitting = [
                j
                for j, other in enumerate(others)
                if wanted(teacher[other].mixer) and _geometry(teacher[other].mixer) == _geometry(mixer)
            ]
            if wanted(mixer) and fitting:
                pairs.append((name, others[min(fitting, key=lambda j: abs(j - place))]))
    if not pairs:
        last = list(student)[-1]
        other = list(teacher)[-1]
        raise ValueError(
            f"{last} ({type(student[last].mixer).__name__}) and {other} of the teacher "
            f"({type(teacher[other].mixer).__name__}) cannot be compared, nor any other pair of blocks: {reason}"
        )
    return pairs


def _plain(mixer: nn.Module) -> bool:
    return type(mixer) in PLAIN


def _shows(mixer: nn.Module) -> bool:
    return isinstance(mixer, HeadMixer | GroupedMixer)


def _geometry(mixer: nn.Module) -> tuple[Any, Any]:
    return getattr(mixer, "size", None), getattr(mixer, "shifted", None)


# --- what is seen ---------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What blocks gave, which of their tokens were real, and the queries, keys and values of their mixers."""

    blocks: dict[str, Block]
    states: dict[str, Tensor] = field(default_factory=dict)
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    products: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def state(self, name: str) -> Tensor:
        if name not in self.states:
            raise ValueError(f"{name} ({type(self.blocks[name]).__name__}) was not run as a block; teach by logits")
        return self.states[name]

    def shown(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name not in self.products:
            mixer = type(self.blocks[name].mixer).__name__
            raise ValueError(f"{name}.mixer ({mixer}) made its queries, keys and values in a way of its own")
        q, k, v = self.products[name]
        return q.float(), k.float(), v.float()


@contextmanager
def watching(model: nn.Module, blocks: Collection[str], mixers: Collection[str]) -> Iterator[Seen]:
    """Within it, each run of `model` notes what these blocks give and what the mixers of those blocks project."""
    seen = Seen({})
    with ExitStack() as undo:
        for name in blocks:
            block = model.get_submodule(name)
            assert isinstance(block, Block)
            seen.blocks[name] = block
            undo.callback(_watch_block(block, name, seen))
            if name in mixers:
                undo.callback(_watch_mixer(block.mixer, name, seen))
        yield seen


def _watch_block(block: Block, name: str, seen: Seen) -> Callable[[], None]:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        seen.states[name], seen.masks[name] = output, kwargs.get("mask")

    return block.register_forward_hook(note, with_kwargs=True).remove


def _watch_mixer(mixer: Any, name: str, seen: Seen) -> Callable[[], None]:
    project = mixer.project

    def note(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        seen.products[name] = project(*args, **kwargs)
        return seen.products[name]

    object.__setattr__(mixer, "project", note)
    return lambda: object.__delattr__(mixer, "project")


def _real(mask: Tensor | None, counts: Tensor | None, like: Tensor) -> Tensor | None:
    """Which tokens of a state `(b, n, c)` are real, None where all are."""
    found = counts if mask is None else mask.flatten(1)
    return found if found is not None and found.shape == like.shape[:2] else None


def _hidden(
    pair: Pair, own: Seen, other: Seen, counts: Tensor | None, signal: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of a pair as `(b, n, c)`, and which tokens of them are real."""
    a, b = own.state(pair[0]), other.state(pair[1])
    if a.shape[:-1] != b.shape[:-1]:
        raise ValueError(
            f"{signal}: {pair[0]} gives tokens {tuple(a.shape[1:-1])}, {pair[1]} of the teacher "
            f"{tuple(b.shape[1:-1])}; tokens that are not the same cannot be compared"
        )
    a, b = a.flatten(1, -2).float(), b.flatten(1, -2).float()
    return a, b, _real(other.masks[pair[1]], counts, b)


def _pairs(
    pair: Pair, own: Seen, other: Seen, counts: Tensor | None, signal: str
) -> tuple[Tensor | None, Tensor | None]:
    """Who may attend whom `(#b, n, n)`, and which queries are real `(b, n)`; None where all are."""
    _, _, real = _hidden(pair, own, other, counts, signal)
    q, like = own.shown(pair[0])[0], other.shown(pair[1])[0]
    if (q.shape[0], q.shape[2]) != (like.shape[0], like.shape[2]):
        raise ValueError(
            f"{signal}: {pair[0]} attends within {tuple(q.shape[::2])} (groups, tokens), {pair[1]} of the teacher "
            f"within {tuple(like.shape[::2])}"
        )
    block = own.blocks[pair[0]]
    mixer: Any = block.mixer
    if real is not None and real.shape != (q.shape[0], q.shape[2]):
        raise ValueError(
            f"{signal}: {pair[0]}.mixer ({type(mixer).__name__}) cuts its tokens, so padding cannot be told from them"
        )
    masked = other.masks[pair[1]] is not None
    allowed = real[:, None, :].expand(-1, q.shape[2], -1) if real is not None and masked else None
    if getattr(mixer, "causal", False):
        earlier = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()[None]
        allowed = earlier if allowed is None else allowed & earlier
    if isinstance(mixer, WindowAttention) and mixer.shifted:
        grid = own.states[pair[0]].shape[1:-1]
        offset = shift_offset(grid, mixer.size, True, mixer.small)
        if any(offset):
            full = tuple(-(-n // s) * s for n, s in zip(grid, mixer.size, strict=True))
            regions = g.shift_penalty(full, mixer.size, offset, -1.0).to(q.device) == 0
            allowed = regions.repeat(q.shape[0] // len(regions), 1, 1)
    return allowed, real
