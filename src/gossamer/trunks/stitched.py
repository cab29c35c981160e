"""Several trained models of one task as one: stitching layers lead from a block of one to a block of another.

Source: Pan et al. 2023, "Stitchable Neural Networks"; Pan et al. 2023, "Stitched ViTs are Flexible Vision Backbones"
(both ways, low-rank stitching layers). The models that are joined are called anchors.

- `path` says which of the networks (`gossamer.trunks.paths`) runs
- a stitching layer is the least-squares map between the tokens the two anchors make of the same inputs
- the table of measured latencies and scores travels with the weights, so a limit can be met call by call
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from gossamer.measure import latency, macs
from gossamer.measure.timing import Latency
from gossamer.trunks.anchors import anchor_blocks, block_names, block_tokens, check_anchors, stage_offset, stage_width
from gossamer.trunks.isotropic import Isotropic
from gossamer.trunks.paths import Path, Place, Plan, out_indices
from gossamer.trunks.pyramid import Pyramid


class Stitch(nn.Linear):
    """`y = (W + U D / rank) x + b`, tokens of one anchor to tokens of another; `rank` 0 leaves `U D` out.

    With a rank, `W` is frozen and `U` (first zero) and `D` learn. In eval mode the product is added to `W` once.
    """

    joined: Tensor | None

    def __init__(self, dim: int, out: int, rank: int = 0) -> None:
        super().__init__(dim, out)
        if rank < 0:
            raise ValueError(f"rank must not be negative, got {rank}")
        self.rank = rank
        if rank:
            self.weight.requires_grad_(False)
            self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, dim), a=5**0.5))
            self.up = nn.Parameter(torch.zeros(out, rank))
        # Beside `weight`, not in its place: adding and taking away again would not give the same bits.
        self.register_buffer("joined", None, persistent=False)

    @property
    def merged(self) -> bool:
        return self.joined is not None

    def merge(self) -> None:
        """Adds the low-rank product to the weight that runs; a second call changes nothing."""
        if self.rank and self.joined is None:
            self.joined = self.whole()

    def unmerge(self) -> None:
        self.joined = None

    def whole(self) -> Float[Tensor, "o i"]:
        """The one matrix the layer amounts to."""
        if not self.rank:
            return self.weight.detach()
        return (self.weight + self.up @ self.down / self.rank).detach()

    def train(self, mode: bool = True) -> Stitch:
        super().train(mode)
        self.unmerge()
        if not mode:
            self.merge()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.train(self.training)

    def forward(self, x: Float[Tensor, "b *grid i"], *, mask: Tensor | None = None) -> Float[Tensor, "b *grid o"]:
        if self.joined is not None and not self.training:
            return F.linear(x, self.joined, self.bias)
        y = F.linear(x, self.weight, self.bias)
        return y + F.linear(F.linear(x, self.down), self.up) / self.rank if self.rank else y


class Stitched(nn.Module):
    """`head_e(norm_e(blocks_e(… stitch(blocks_f(stem_f(x))))))` for the path from anchor `f` to anchor `e` chosen.

    Args:
        anchors: models of one task, smallest first.
        plan: the paths through them.
        rank: of what the stitching layers learn, 0 for all of their weights.
        final_norm: False leaves out the norm behind the last block on stitched paths, as the released code of the
            first paper does.

    Raises:
        ValueError: the anchors cannot be joined; the message says why.
    """

    latencies: Tensor
    scores: Tensor

    def __init__(self, anchors: Sequence[nn.Module], plan: Plan, *, rank: int = 0, final_norm: bool = True) -> None:
        super().__init__()
        check_anchors(anchors)
        self.anchors = nn.ModuleList(anchors)
        self.paths = plan.paths
        self.groups = plan.groups
        self.final_norm = final_norm

        def layer(front: int, end: int, stage: int) -> Stitch:
            return Stitch(stage_width(anchors[front], stage), stage_width(anchors[end], stage), rank)

        self.stitches = nn.ModuleList(
            nn.ModuleList(layer(*place) for _ in range(layers)) for *place, layers in plan.groups
        )
        nothing = torch.full((len(plan.paths),), float("nan"), dtype=torch.float64)
        self.register_buffer("latencies", nothing)
        self.register_buffer("scores", nothing.clone())
        self._path = len(anchors) - 1

    @property
    def path(self) -> int:
        """The path that runs; at first the largest anchor."""
        return self._path

    @path.setter
    def path(self, number: int) -> None:
        self._path = self._known(number)

    def _known(self, number: int) -> int:
        if not 0 <= number < len(self.paths):
            raise ValueError(f"path must be one of 0 … {len(self.paths) - 1}, got {number}")
        return number

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self._path)

    def set_extra_state(self, state: Tensor) -> None:
        self.path = int(state)

    def forward(
        self, x: Shaped[Tensor, "b ..."], *, latency_ms: float | None = None
    ) -> Float[Tensor, "b ..."] | tuple[Float[Tensor, "b ..."], ...]:
        """The answer of the chosen path, or of the best that takes at most `latency_ms`."""
        return self.network(self._path if latency_ms is None else self.within(latency_ms))(x)

    def features(self, x: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w _c"]]:
        """The maps of the chosen path."""
        return self.network(self._path).features(x)

    def maps(self, image: Float[Tensor, "b i height width"], at: Sequence[int]) -> list[Float[Tensor, "b h w _c"]]:
        """Maps behind the blocks `at` of the deepest anchor, or behind those that stand for them on the chosen path.

        Raises:
            ValueError: the anchors are pyramids.
        """
        if isinstance(self.anchors[0], Pyramid):
            raise ValueError("maps is for anchors of one stage; pyramids have features")
        depths = [len(anchor_blocks(anchor)) for anchor in self.anchors]
        wanted = [set(out_indices(depth, max(depths), at)) for depth in depths]
        network = cast(Isotropic, self.network(self._path))
        h, w = cast(Any, network.stem).grid
        x, _ = network.stem(image)
        runs = [(a, i) for a, first, stop in self.paths[self._path].route for i in [*range(first, stop), None]]
        found = []
        for (anchor, number), block in zip(runs, network.blocks, strict=False):
            x = block(x)
            if number in wanted[anchor]:
                found.append(x if x.ndim == 4 else x[:, -h * w :].unflatten(1, (h, w)))
        return found

    def network(self, number: int) -> Isotropic | Pyramid:
        """Path `number` as an ordinary trunk; its parts are shared with this model."""
        path = self.paths[self._known(number)]
        anchors: Any = self.anchors
        if not path.stitches:
            return anchors[path.anchors[0]]
        front, end = anchors[path.anchors[0]], anchors[path.anchors[-1]]
        norm = end.norm if self.final_norm else None
        if isinstance(front, Isotropic):
            blocks = [block for _, block in self._sequence(path)]
            return Isotropic(front.stem, blocks, norm=norm, head=end.head)
        stages: list[list[nn.Module]] = [[] for _ in front.stages]
        for stage, block in self._sequence(path):
            stages[stage].append(block)
        begins, ends = [], []  # which anchor makes the first and the last map of each stage
        for stage in range(len(stages)):
            owners = [
                anchor
                for anchor, first, stop in path.route
                for at in [stage_offset(anchors[anchor], stage)]
                if first < at + len(anchors[anchor].stages[stage]) and at < stop
            ]
            begins.append(owners[0])
            ends.append(owners[-1])
        return Pyramid(
            front.stem,
            stages,
            [anchors[a].merges[s] for s, a in enumerate(begins[1:])],
            norm=norm,
            head=end.head,
            out_norms=None if end.out_norms is None else [anchors[a].out_norms[s] for s, a in enumerate(ends)],
        )

    def _sequence(self, path: Path) -> Iterator[tuple[int, nn.Module]]:
        """Stage and module of every block and stitch of `path`, in order."""
        stitches: Any = self.stitches
        for k, (anchor, first, stop) in enumerate(path.route):
            blocks = anchor_blocks(self.anchors[anchor])
            yield from blocks[first:stop]
            if k < len(path.stitches):
                group, layer = path.stitches[k]
                yield blocks[stop - 1][0], stitches[group][layer]

    def extract(self, number: int) -> Isotropic | Pyramid:
        """A copy of path `number` that shares nothing with this model, its stitches plain products."""
        network = copy.deepcopy(self.network(number)).train(self.training)
        for parent in list(network.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, Stitch) and part.rank:
                    plain = Stitch(part.in_features, part.out_features).to(part.weight)
                    plain.load_state_dict({"weight": part.whole(), "bias": part.bias.detach()})
                    setattr(parent, name, plain.train(part.training))
        return network

    @torch.no_grad()
    def solve(self, batches: Iterable[tuple[Tensor, ...]]) -> None:
        """Sets every stitching layer to the least-squares map between its two anchors on `batches`.

        `[A; b] = pinv([X 1]) Y` with `X` what the front block gives and `Y` what the end block is given in its own
        anchor; layers that several stitches share get the mean of their solutions. Padding is left out.

        Raises:
            ValueError: no batch, or the anchors make different tokens of the same input.
        """
        shared = {place: layer for path in self.paths for place, layer in zip(path.places, path.stitches, strict=True)}
        squares: dict[tuple[int, int], Tensor] = {}
        products: dict[Place, Tensor] = {}
        count: dict[tuple[int, int], int] = {}
        eps = 0.0
        was_training = self.training
        self.eval()
        for inputs in batches:
            before, after = zip(*(block_tokens(anchor, inputs) for anchor in self.anchors), strict=True)
            for front, i in dict.fromkeys((a, i) for a, i, _, _ in shared):
                x = torch.cat((after[front][i], torch.ones_like(after[front][i][:, :1])), 1)
                eps = torch.finfo(x.dtype).eps
                x = x.double()
                squares[front, i] = squares.get((front, i), 0) + x.T @ x
                count[front, i] = count.get((front, i), 0) + len(x)
                for place in shared:
                    if place[:2] == (front, i):
                        y = before[place[2]][place[3]]
                        if len(y) != len(x):
                            raise ValueError(
                                f"anchors must make the same tokens of an input; anchor {front} makes {len(x)} "
                                f"where anchor {place[2]} makes {len(y)}"
                            )
                        products[place] = products.get(place, 0) + x.T @ y.double()
        self.train(was_training)
        if not squares:
            raise ValueError("solve needs at least one batch")
        inverse = {}
        for at, square in squares.items():
            values, vectors = torch.linalg.eigh(square)
            # What the pseudo-inverse of the tokens themselves would cut off in their own precision.
            least = (max(count[at], len(values)) * eps) ** 2 * values[-1]
            inverse[at] = (vectors / values.where(values > least, torch.inf)) @ vectors.T
        for layer in dict.fromkeys(shared.values()):
            group, number = layer
            stitch = cast(Any, self.stitches)[group][number]
            found = [inverse[p[:2]] @ products[p] for p, used in shared.items() if used == layer]
            mean = torch.stack(found).mean(0).to(stitch.weight)
            stitch.weight.copy_(mean[:-1].T)
            stitch.bias.copy_(mean[-1])
            if stitch.rank:
                stitch.up.zero_()
            stitch.train(stitch.training)

    def costs(self, inputs: tuple[Tensor, ...]) -> list[int]:
        """MACs of every path on `inputs`, as the sums of its parts."""
        parts: list[dict[str, int]] = []
        tokens: list[list[int]] = []
        for anchor in self.anchors:
            sizes: list[int] = []
            hooks = [
                block.register_forward_hook(lambda _, __, y, sizes=sizes: sizes.append(y.numel() // y.shape[-1]))
                for _, block in anchor_blocks(anchor)
            ]
            try:
                parts.append(macs(anchor, inputs, per_layer=True).by_module)
            finally:
                for hook in hooks:
                    hook.remove()
            tokens.append(sizes)
        total = []
        for path in self.paths:
            (front, _, _), (end, _, _) = path.route[0], path.route[-1]
            cost = parts[front]["stem"] + parts[end]["head"]
            for number, first, stop in path.route:
                names = block_names(self.anchors[number])
                cost += sum(parts[number][names[i]] for i in range(first, stop))
                if isinstance(self.anchors[number], Pyramid):
                    entered = range(1, len(cast(Any, self.anchors[number]).stages))
                    cost += sum(
                        parts[number][f"merges.{s - 1}"]
                        for s in entered
                        if first <= stage_offset(self.anchors[number], s) < stop
                    )
            for (number, last, _, _), (group, layer) in zip(path.places, path.stitches, strict=True):
                cost += tokens[number][last] * cast(Any, self.stitches)[group][layer].weight.numel()
            total.append(cost)
        return total

    def measure(self, inputs: tuple[Tensor, ...], *, seconds: float = 2.0) -> list[Latency]:
        """Times every path on `inputs` on this device, side by side, and keeps the medians (ms) in `latencies`."""
        networks = {str(number): self.network(number) for number in range(len(self.paths))}
        was_training = self.training
        self.eval()
        with torch.inference_mode():
            calls: dict[str, Any] = {
                name: (lambda network=network: network(*inputs)) for name, network in networks.items()
            }
            found = latency(calls, budget_s=seconds, min_runs=3)
        self.train(was_training)
        self.latencies.copy_(torch.tensor([found[name].median_ms for name in networks]))
        return [found[name] for name in networks]

    def front(self) -> list[int]:
        """The paths that no other is faster than and at least as good as, fastest first.

        Raises:
            ValueError: latencies or scores are not measured.
        """
        known = (self.latencies.isfinite() & self.scores.isfinite()).nonzero().flatten().tolist()
        if not known:
            raise ValueError("no path has both a latency (measure) and a score (scores)")
        best, kept = -torch.inf, []
        for number in sorted(known, key=lambda p: (float(self.latencies[p]), -float(self.scores[p]))):
            if float(self.scores[number]) > best:
                best = float(self.scores[number])
                kept.append(number)
        return kept

    def within(self, latency_ms: float) -> int:
        """The best path that takes at most `latency_ms` here; the slowest of them where scores are not known.

        Raises:
            ValueError: latencies are not measured, or even the fastest path takes longer.
        """
        if not self.latencies.isfinite().any():
            raise ValueError("latency_ms needs the table of latencies; make it with measure")
        table = self.latencies.nan_to_num(nan=torch.inf)
        if float(table.min()) > latency_ms:
            raise ValueError(f"latency_ms must be at least {float(table.min()):.3g} (fastest path), got {latency_ms}")
        judged = self.scores if bool(self.scores[table <= latency_ms].isfinite().any()) else self.latencies
        return int(judged.nan_to_num(nan=-torch.inf).where(table <= latency_ms, -torch.inf).argmax())
