"""OPTIN: heads and hidden units that least disturb what all later layers and the output make of the data go. No
training.

Source: Khaki and Plataniotis 2024, "The Need for Speed: Pruning Transformers with One Recipe"; code
Skhaki18/optin-transformer-pruning (MIT).

- run the model with one member masked; with `f_j` normalised rows (tokens) of what layer j's MLP gives,
  `E = sum_{j > l} |f_j f_j^T - f_j' f_j'^T|^2` (the last layer: its own), `D = T^2 KL(softmax z || softmax z')`,
  `score = E + c D` with `c = 10^trunc(log10(E / D) - log10(10))`; where `E <= D`, the mean of the `c` so far
- scores of the last layer and of heads are halved (the authors' settings)
- two lists, heads and hidden units: for each number of best heads, the rest of the MACs goes to the best units; the
  split with the largest total wins

Hidden units are many (36 864 in BERT-base), so there are three ways of scoring them:

- `exact`: each by a run, as the authors do
- `groups`: `group` units of like energy (mean square times squared weight norm) masked together, by a run; the group's
  `E` and `D` are shared out by energy
- `probes` (ours, the default): `E` and `D` are squares, `|J dm|^2` to second order in the mask, so for random `v` the
  mean of `(v^T dJ/dm)^2` is the score of every unit of every layer at once, from one backward pass a probe; with 64
  probes a score is known within 18 %

Members are scored alone: of k copies that share the work of one, each has about `1 / k^2` of its score and so goes
first, but copies at full strength are not told from members that are needed.

Heads are always exact. Every run starts at the masked layer, from what is remembered of those before it.

Differences from the code, kept under `official_quirks=True`: the code leaves the last head of each scored layer masked
while later layers are scored; it weights scores by index (`geomspace(1, 10)` for heads, `(1, 100)` for units, from the
first to the last), so that a permutation of equal units changes what is pruned; it draws tokens among padding too.

Ours: one member of each part stays (its slicing needs one); widths stay multiples of `multiple` (1: the paper's);
pyramids, where members cost differently, are ranked by score for cost; a budget in measured latency; for sentence
vectors `D` is `T^2 |Gram difference|^2` of the answers, for forecasts `T^2` times the squared difference over the
variance; readers are then fitted by least squares to what they gave before, each fit kept if it brings the answers to
data it has not seen nearer to the whole model's (`reconstruct=False` leaves them, as the paper does); patches stay.
Scores are `D` alone (one of the code's three losses) unless `loss="both"` asks for the paper's: `E` sums over later
layers and so spares early layers and empties the last, which costs more than it saves. MiniLM-L6 for sentences at 60 %
of its prunable MACs: Spearman on 300 pairs of STS-B dev 83.6 by `D`, 83.3 by `D` with the fit, 75.4 by both, 78.2 by
magnitude, 83.8 before; one seed, and the loss and the form of the fit (of about five) were chosen on these same pairs,
so the figures by `D` are optimistic until run on others.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.shrink.base import Calibration, Step, Unsupported, check_share, register_pass
from gossamer.shrink.costs import fit_widths, member_macs, staircases
from gossamer.shrink.masks import Member, keep_members, masked, members, reader
from gossamer.shrink.trajectory import Trajectory, readings, refit

Scoring = Literal["probes", "groups", "exact"]
Loss = Literal["both", "trajectory", "output"]

LAMBDA = 10.0  # how far below the disturbance of the layers that of the output is brought
TEMPERATURE = 4.0
TOKENS = 768  # rows of the Gram matrices
LAST_LAYER = 0.5
HEADS = 0.5
LOGITS = 2**26  # elements of an answer, at most: language models have many classes a token
FITTED = 4  # times the samples of the scores are read by the fit
CHUNK = 2048  # tokens of a graph that probes go back through


@register_pass(
    "optin",
    family="structured pruning",
    paper="optin",
    saves=("macs", "params", "size"),
    default={"keep": 0.6},
)
def optin(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.6,
    cost: Literal["macs", "latency"] = "macs",
    scoring: Scoring = "probes",
    loss: Loss = "output",
    samples: int = 128,
    group: int = 32,
    probes: int = 64,
    multiple: int = 8,
    reconstruct: bool = True,
    official_quirks: bool = False,
) -> list[Step]:
    """Keeps the heads and hidden units whose removal would disturb later layers and the output most, without training.

    Args:
        keep: share of the MACs (or the latency) of all heads and hidden units that is left.
        cost: what the budget is in.
        scoring: of hidden units; see the head of the file.
        loss: score by `E` and `D`, by `E` alone (`trajectory`) or by `D` alone (`output`).
        samples: rows of the batch that scores are measured on; fewer where the time is short.
        group: units scored together by `groups`.
        probes: backward passes of `probes`, fewer where the time is short.
        multiple: hidden widths are multiples of it.
        reconstruct: fit what is left to what there was.
        official_quirks: do as the authors' code does where it is odd.

    Raises:
        Unsupported: there is nothing that can be masked and sliced in the model's blocks.
        ValueError: `keep` is not in (0, 1] or too small for one member of each part; another setting is not positive.
    """
    check_share("keep", keep)
    for name, value in (("samples", samples), ("group", group), ("probes", probes), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if cost not in ("macs", "latency"):
        raise ValueError(f"cost must be macs or latency, got {cost!r}")
    begun = time.perf_counter()
    scores = score(
        model,
        calibration,
        scoring=scoring,
        loss=loss,
        samples=samples,
        group=group,
        probes=probes,
        official_quirks=official_quirks,
    )
    scored = time.perf_counter()
    widths = {member: len(values) for member, values in scores.items()}
    example = calibration.example(1)
    if cost == "macs":
        macs = member_macs(model, example, widths)
        masks = search(scores, macs, keep * sum(macs[m] * widths[m] for m in widths), multiple=multiple)
    else:
        left = calibration.seconds - (scored - begun)
        stairs = staircases(model, example, widths, seconds=max(1.0, left / 4))
        ranks = {member: values.argsort(descending=True, stable=True) for member, values in scores.items()}
        worth = {member: scores[member][rank].cumsum(0) for member, rank in ranks.items()}
        masks = fit_widths(ranks, worth, stairs, keep)
    steps = prune(model, calibration, masks, samples=samples, reconstruct=reconstruct, begun=begun)
    report = {"seconds_scoring": scored - begun, "seconds_pruning": time.perf_counter() - scored, "scoring": scoring}
    setattr(model, "shrink_report", {**getattr(model, "shrink_report", {}), "optin": report})  # noqa: B010
    return steps


def score(
    model: nn.Module,
    calibration: Calibration,
    *,
    scoring: Scoring = "probes",
    loss: Loss = "output",
    samples: int = 128,
    group: int = 32,
    probes: int = 64,
    official_quirks: bool = False,
) -> dict[Member, Float[Tensor, " n"]]:
    """How much the removal of each head and hidden unit disturbs later layers and the output; see `optin`.

    Raises:
        Unsupported: there is nothing that can be masked and sliced in the model's blocks.
        ValueError: no such `scoring` or `loss`.
    """
    if scoring not in ("probes", "groups", "exact"):
        raise ValueError(f"scoring must be probes, groups or exact; got {scoring!r}")
    if loss not in ("both", "trajectory", "output"):
        raise ValueError(f"loss must be both, trajectory or output; got {loss!r}")
    key = f"optin-{scoring}-{samples}-{group}-{probes}-{official_quirks}-{_fingerprint(model)}"
    widths = members(model)
    if key not in calibration.cache:
        calibration.cache[key] = _measure(model, calibration, widths, scoring, samples, group, probes, official_quirks)
    known: _Measured = calibration.cache[key]
    scores: dict[Member, Tensor] = {}
    for heads in (True, False):
        kind = [m for m in known.layers if (m[1] != "hidden") == heads]
        if not kind:
            continue
        error, change = (np.concatenate([of[m] for m in kind]) for of in (known.errors, known.changes))
        pooled = {"both": _pool, "trajectory": lambda e, _: e, "output": lambda _, c: c}[loss](error, change)
        for m, values in zip(kind, np.split(pooled, np.cumsum([widths[m] for m in kind])[:-1]), strict=True):
            if known.layers[m] == known.depth - 1 and loss != "output":
                values = values * LAST_LAYER
            if official_quirks:
                values = values * np.geomspace(1, 10 if heads else 100, widths[m])[::-1]
            scores[m] = torch.from_numpy(values * (HEADS if heads else 1.0))
    return {m: scores[m] for m in known.layers}


def _fingerprint(model: nn.Module) -> str:
    """Of the weights: their sums and some of them, so that scores are not those of another model."""
    told = hashlib.sha256()
    for name, p in model.named_parameters():
        few = p.detach().flatten()[:: max(1, p.numel() // 1024)].double().cpu()
        told.update(f"{name}{tuple(p.shape)}{float(p.detach().double().sum())}{few.tolist()}".encode())
    return told.hexdigest()[:16]


@dataclass(frozen=True)
class _Measured:
    """`E` and `D` of all members, the blocks they are in, and how many blocks there are."""

    layers: dict[Member, int]
    depth: int
    errors: dict[Member, np.ndarray]
    changes: dict[Member, np.ndarray]


def _measure(
    model: nn.Module,
    calibration: Calibration,
    widths: dict[Member, int],
    scoring: Scoring,
    samples: int,
    group: int,
    probes: int,
    official_quirks: bool,
) -> _Measured:
    deadline = time.perf_counter() + 0.7 * calibration.seconds
    flags = [(p, p.requires_grad) for p in model.parameters()]
    was_training = model.training
    try:
        for p, _ in flags:
            p.requires_grad_(False)
        path = Trajectory(model, _to_device(calibration_inputs(calibration, 2), model))
        found = {member: path.layer(member[0]) for member in widths}
        layers = {member: layer for member, layer in found.items() if layer is not None}
        if not layers:
            raise Unsupported(f"no head or hidden unit of {type(model).__name__} is in one of its blocks")
        # Blocks of one model run in one order, but parts are listed as they were made.
        layers = dict(sorted(layers.items(), key=lambda item: item[1]))
        rooms = {m: -(-widths[m] // group) if scoring == "groups" and m[1] == "hidden" else widths[m] for m in layers}
        heavy = [m for m in layers if m[1] != "hidden" or scoring != "probes"]
        passes = sum(rooms[m] * (len(path.names) - layers[m]) / len(path.names) for m in heavy)
        samples = _affordable(model, calibration, samples, passes, deadline)
        path = Trajectory(model, _to_device(calibration_inputs(calibration, samples), model))
        ruler = Ruler(path, calibration, every_token=official_quirks)
        errors: dict[Member, np.ndarray] = {}
        changes: dict[Member, np.ndarray] = {}
        for m in heavy:
            sets = _sets(ruler, m, layers[m], widths[m], group if scoring == "groups" and m[1] == "hidden" else 1)
            before: dict[Member, int] = {}
            if official_quirks and m[1] != "hidden":
                before = {k: layer for k, layer in layers.items() if k[1] != "hidden" and layer < layers[m]}
            errors[m], changes[m] = _by_runs(ruler, m, layers[m], widths, sets, before)
        rest = {m: layer for m, layer in layers.items() if m not in errors}
        if rest:
            for known, new in zip((errors, changes), _by_probes(ruler, rest, widths, probes, deadline), strict=True):
                known.update(new)
        return _Measured(layers, len(path.names), errors, changes)
    finally:
        model.train(was_training)
        for p, flag in flags:
            p.requires_grad_(flag)


def calibration_inputs(calibration: Calibration, samples: int) -> tuple[Tensor, ...]:
    """About `samples` rows of model inputs, evenly spaced over the training data; texts cut at the longest of them."""
    rows = len(next(calibration.batches(2, batch_size=2))[0][0]) // 2
    items = max(1, samples // max(1, rows))
    inputs, _ = next(calibration.batches(items, batch_size=items))
    pad = calibration.task.spec.get("pad_id")
    first = inputs[0]
    if pad is not None and not first.is_floating_point() and first.ndim == 2:
        used = (first != pad).any(0).nonzero()
        inputs = (first[:, : int(used[-1]) + 1 if len(used) else 1].contiguous(), *inputs[1:])
    return inputs


def search(
    scores: Mapping[Member, Float[Tensor, " n"]],
    costs: Mapping[Member, float],
    budget: float,
    *,
    multiple: int = 1,
    least: int = 1,
) -> dict[Member, Float[Tensor, " n"]]:
    """Masks of the heads and hidden units with the largest total score within `budget`.

    Args:
        costs: of one member.
        multiple: hidden units come and go in groups of so many, by rank within their part.
        least: heads, and groups of hidden units, that every part keeps.

    Raises:
        ValueError: the budget does not even pay for those.
    """
    heads = _in_order({m: s for m, s in scores.items() if m[1] != "hidden"}, costs, 1, least)
    units = _in_order({m: s for m, s in scores.items() if m[1] == "hidden"}, costs, multiple, least)
    spent, gained = (np.concatenate(([0.0], np.cumsum([getattr(i, k) for i in units]))) for k in ("cost", "score"))
    forced = [sum(item.forced for item in items) for items in (heads, units)]
    best, choice = -np.inf, None
    paid = won = 0.0
    for count in range(len(heads) + 1):
        if count:
            paid, won = paid + heads[count - 1].cost, won + heads[count - 1].score
        # As in the authors' search, one head at the least, where there are any.
        if count < max(forced[0], min(1, len(heads))):
            continue
        number = int(np.searchsorted(spent, (budget - paid) * (1 + 1e-12) + 1e-9, side="right")) - 1
        if number >= forced[1] and won + gained[number] > best:
            best, choice = won + gained[number], (count, number)
    if choice is None:
        total = sum(costs[m] * len(s) for m, s in scores.items())
        need = sum(item.cost for items, n in zip((heads, units), forced, strict=True) for item in items[:n])
        raise ValueError(f"keep must be at least {need / total:.3f}, one member of each part; got {budget / total:.3f}")
    masks = {m: torch.zeros(len(s)) for m, s in scores.items()}
    for item in (*heads[: choice[0]], *units[: choice[1]]):
        masks[item.member][item.index] = 1
    return masks


def prune(
    model: nn.Module,
    calibration: Calibration,
    masks: Mapping[Member, Float[Tensor, " n"]],
    *,
    samples: int,
    reconstruct: bool,
    begun: float,
) -> list[Step]:
    """Slices `model` to the members whose mask is not 0, and fits their readers to what they gave before.

    Args:
        begun: when the pass began, by `time.perf_counter`; its time is `calibration.seconds`.
    """
    changed = [m for m, mask in masks.items() if not bool(mask.all())]
    if not reconstruct or not changed:
        return list(keep_members(model, masks))
    # Each part's reader is reached by a run of its block and tried by a few, of which each part has about a half.
    passes, deadline = 2.0 * len(changed) + 3, begun + calibration.seconds
    rows = _affordable(model, calibration, FITTED * samples, passes, deadline)
    inputs = _to_device(calibration_inputs(calibration, rows), model)
    apart = torch.arange(len(inputs[0])) % 8 == 7
    seen, held = (tuple(x[chosen] for x in inputs) for chosen in (~apart, apart))
    ruler = Ruler(Trajectory(model, held), calibration)
    wanted = readings(model, seen, changed)
    steps: list[Step] = list(keep_members(model, masks))
    refit(model, seen, changed, wanted, held, ruler.unlike, seconds=deadline - time.perf_counter())
    return steps


class Ruler:
    """Measures how far a changed model is from the one whose trajectory it has: `E` and `D`.

    Args:
        every_token: draw rows among padding too.
    """

    def __init__(self, path: Trajectory, calibration: Calibration, *, every_token: bool = False) -> None:
        self.path = path
        self.seed = calibration.seed
        self.kind = {"sentence-similarity": "gram", "forecasting": "squares"}.get(calibration.task.name, "classes")
        self.chosen: list[Tensor] = []
        for j, trace in enumerate(path.traces):
            rows = torch.arange(trace[..., 0].numel()) if every_token else path.rows(j, trace).cpu()
            generator = torch.Generator().manual_seed(self.seed + j)
            self.chosen.append(rows[torch.randperm(len(rows), generator=generator)[:TOKENS]].sort().values)
        self.unit = [self.rows(j, trace) for j, trace in enumerate(path.traces)]
        self.gram = [f @ f.T for f in self.unit]
        self.variance = float(path.answer.float().var().clamp(min=1e-12)) if path.answer.numel() > 1 else 1.0

    def rows(self, layer: int, trace: Tensor) -> Float[Tensor, "k c"]:
        """The chosen tokens of what a layer gave, each of length 1."""
        return F.normalize(trace.flatten(0, -2)[self.chosen[layer]], dim=-1)

    def later(self, layer: int) -> Iterable[int]:
        """The layers on which the disturbance of `layer` is measured."""
        last = len(self.gram) - 1
        return range(layer + 1, last + 1) if layer < last else (last,)

    def error(self, layer: int, traces: list[Tensor], first: int) -> float:
        """`E`; `traces` are those of the layers from `first` on."""
        found = 0.0
        for j in self.later(layer):
            f = self.rows(j, traces[j - first])
            found += float((self.gram[j] - f @ f.T).square().sum())
        return found

    def change(self, answer: Tensor) -> float:
        """`D`."""
        before, answer = _wide(self.path.answer), _wide(answer)
        if self.kind == "classes":
            found = F.kl_div(answer.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        elif self.kind == "gram":
            a, b = F.normalize(before, dim=-1), F.normalize(answer, dim=-1)
            found = (a @ a.T - b @ b.T).square().sum()
        else:
            found = (answer - before).square().sum() / self.variance
        return TEMPERATURE**2 * max(0.0, float(found))

    def unlike(self, answer: Tensor) -> float:
        """`D`; for sentence vectors, 1 less the correlation of all cosines, for only their order is used."""
        if self.kind != "gram":
            return self.change(answer)
        pair = torch.triu_indices(len(answer), len(answer), 1).unbind(0)
        units = (F.normalize(_wide(z), dim=-1) for z in (self.path.answer, answer))
        return 1 - float(torch.corrcoef(torch.stack([(f @ f.T)[pair] for f in units]))[0, 1])

    def pull(self, layer: int, part: Tensor, generator: torch.Generator) -> Float[Tensor, "k c"]:
        """Gradient of `<V, f f^T>` by the rows `part` (positions among the chosen) of `f`, `V` random normal."""
        f = self.unit[layer]
        v = torch.randn(len(f), len(f), generator=generator).to(f)
        return (v[part] + v[:, part].T) @ f

    def pull_answer(self, part: slice, generator: torch.Generator) -> Tensor:
        """Random `v` for the samples `part` of the answer, such that `E (v . dz)^2` is `D` to second order."""
        z = self.path.answer
        if self.kind == "gram":
            f = F.normalize(_wide(z), dim=-1)
            v = torch.randn(len(f), len(f), generator=generator).to(f)
            return TEMPERATURE * (v[part] + v[:, part].T) @ f
        noise = torch.randn(z[part].shape, generator=generator).to(z)
        if self.kind == "squares":
            return TEMPERATURE * self.variance**-0.5 * noise
        p = _wide(z[part]).softmax(-1)
        noise = p.sqrt() * noise
        # Half of Fisher's information is the second order of KL.
        return TEMPERATURE * 0.5**0.5 * (noise - p * noise.sum(-1, keepdim=True))


@dataclass(frozen=True)
class _Item:
    score: float
    cost: float
    forced: bool
    member: Member
    index: Tensor


def _in_order(scores: Mapping[Member, Tensor], costs: Mapping[Member, float], multiple: int, least: int) -> list[_Item]:
    """Members, or groups of `multiple` by rank, the forced ones first, then by score for cost."""
    items = []
    for member, values in scores.items():
        ranked = values.argsort(descending=True, stable=True)
        for i, index in enumerate(ranked.split(multiple)):
            items.append(_Item(float(values[index].sum()), costs[member] * len(index), i < least, member, index))
    return sorted(items, key=lambda item: (not item.forced, -item.score / item.cost))


def _pool(errors: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """`E + c D` in the order of scoring: `c` brings `D` below `E` by powers of ten."""
    remembered: list[float] = []
    pooled = np.empty(len(errors))
    for i, (error, change) in enumerate(zip(errors, changes, strict=True)):
        if error > change > 0:
            scale = 10.0 ** int(np.log10(error) - np.log10(change) - np.log10(LAMBDA))
            remembered.append(scale)
        else:
            scale = float(np.mean(remembered)) if remembered else 1.0
        pooled[i] = error + scale * change
    return pooled


def _sets(ruler: Ruler, member: Member, layer: int, width: int, group: int) -> list[tuple[Tensor, Tensor]]:
    """Members masked together, and the share of the score that each has."""
    if group == 1:
        return [(torch.tensor([i]), torch.ones(1)) for i in range(width)]
    part = ruler.path.model.get_submodule(member[0])
    read = reader(part, member[1])
    x = ruler.path.given(layer, read)
    x = x.flatten(0, -2)[ruler.path.rows(layer, x)]
    energy = (x.square().mean(0) * read.weight.square().sum(0)).view(width, -1).sum(1).cpu()
    ranked = energy.argsort(descending=True, stable=True)
    return [(index, energy[index] / energy[index].sum().clamp(min=1e-30)) for index in ranked.split(group)]


@torch.no_grad()
def _by_runs(
    ruler: Ruler,
    member: Member,
    layer: int,
    widths: Mapping[Member, int],
    sets: list[tuple[Tensor, Tensor]],
    before: Mapping[Member, int],
) -> tuple[np.ndarray, np.ndarray]:
    """`E` and `D` of each member of a part; the last members of the parts in `before` stay masked."""
    path = ruler.path
    masks = {m: torch.ones(widths[m]).index_fill_(0, torch.tensor([widths[m] - 1]), 0.0) for m in before}
    first = 0 if before else layer
    errors, changes = np.zeros(widths[member]), np.zeros(widths[member])
    for index, share in sets:
        masks[member] = torch.ones(widths[member]).index_fill_(0, index, 0.0)
        with masked(path.model, {m: mask.to(path.answer.device) for m, mask in masks.items()}):
            answer, traces = path.run(first)
        errors[index.numpy()] = ruler.error(layer, traces, first) * share.numpy()
        changes[index.numpy()] = ruler.change(answer) * share.numpy()
    return errors, changes


def _by_probes(
    ruler: Ruler, layers: Mapping[Member, int], widths: Mapping[Member, int], probes: int, deadline: float
) -> tuple[dict[Member, np.ndarray], dict[Member, np.ndarray]]:
    """`E` and `D` of each member of all parts to second order, from `probes` random directions.

    The Gram matrix of a layer is not disturbed by its own members (but the last layer's is), so what a probe of all
    Gram matrices says of a member is taken less what that of its own layer says.
    """
    path = ruler.path
    count = len(path.inputs[0])
    tokens = max(1, max(trace[..., 0].numel() for trace in path.traces) // count)
    chunks = torch.arange(count).split(max(1, CHUNK // tokens))
    device = path.answer.device
    felt = {m: np.zeros((2, probes, widths[m])) for m in layers}
    done = 0
    for number, chunk in enumerate(chunks):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        masks = {m: torch.ones(widths[m], device=device, requires_grad=True) for m in layers}
        with torch.enable_grad(), masked(path.model, masks):
            answer, traces = path.run(0, tuple(x[part] for x in path.inputs))
            shown, places = [], []
            for j, trace in enumerate(traces):
                each = path.traces[j][..., 0].numel() // count
                low, high = part.start * each, part.stop * each
                place = ((ruler.chosen[j] >= low) & (ruler.chosen[j] < high)).nonzero().flatten()
                places.append(place)
                shown.append(F.normalize(trace.flatten(0, -2)[ruler.chosen[j][place] - low], dim=-1))
        leaves = list(masks.values())
        # What comes before all members, as where the first blocks have none left, no mask moves.
        moved = [j for j, trace in enumerate(shown) if trace.requires_grad]
        begun = time.perf_counter()
        for r in range(done if number else probes):
            draw = torch.Generator().manual_seed(ruler.seed + 7919 * (r + 1))
            pulls = [ruler.pull(j, place, draw) for j, place in enumerate(places)]
            own = {
                m: torch.autograd.grad(shown[j], masks[m], pulls[j], retain_graph=True, allow_unused=True)[0]
                for m, j in layers.items()
                if j < len(shown) - 1 and j in moved
            }
            every = torch.autograd.grad(
                [shown[j] for j in moved], leaves, [pulls[j] for j in moved], retain_graph=True, allow_unused=True
            )
            # Each chunk needs noise of its own, all of them the same Gram matrix.
            draw = torch.Generator().manual_seed(
                ruler.seed + 104729 * (r + 1) + (0 if ruler.kind == "gram" else number)
            )
            pull = ruler.pull_answer(part, draw)
            z = F.normalize(_wide(answer), dim=-1) if ruler.kind == "gram" else answer
            out = torch.autograd.grad(z, leaves, pull.to(z.dtype), retain_graph=True, allow_unused=True)
            for m, total, last in zip(layers, every, out, strict=True):
                if total is not None:
                    mine = own.get(m)
                    felt[m][0, r] += (total if mine is None else total - mine).cpu().numpy()
                if last is not None:
                    felt[m][1, r] += last.cpu().numpy()
            if not number:
                done = r + 1
                spent = time.perf_counter() - begun
                if done >= 4 and begun + (spent + spent / done) * len(chunks) > deadline:
                    break
    errors = {m: np.square(felt[m][0, :done]).mean(0) for m in layers}
    changes = {m: np.square(felt[m][1, :done]).mean(0) for m in layers}
    return errors, changes


def _affordable(model: nn.Module, calibration: Calibration, samples: int, passes: float, deadline: float) -> int:
    """As many samples as the passes have half the time for, up to `samples` and to `LOGITS` elements of the answer."""
    inputs = _to_device(calibration_inputs(calibration, min(8, samples)), model)
    start = time.perf_counter()
    answer = Trajectory(model, inputs).answer
    samples = max(2, min(samples, LOGITS // max(1, answer[0].numel())))
    if deadline == float("inf") or not passes:
        return samples
    each = (time.perf_counter() - start) / len(answer)
    return max(min(8, samples), min(samples, int((deadline - start) / 2 / (passes * each))))


def _wide(x: Tensor) -> Tensor:
    """`x` in single precision at the least."""
    return x if x.dtype == torch.float64 else x.float()


def _to_device(inputs: tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return tuple(x.to(device) for x in inputs)
