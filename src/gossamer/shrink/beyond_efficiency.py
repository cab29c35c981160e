"""What token reduction may bring beside speed, tried on generated data: no reduction, a random one, and a method.

Source: Kong et al. 2025, "Token Reduction Should Go Beyond Efficiency in Generative Models", arXiv 2505.18227. Its
claims are opinions without figures; these are small tests of them, not proofs.

- random reduction has the method's own number of tokens in every block, and all are trained equally many steps; a
  pass's `steps` are shared among the trainings it makes
- C1 `alignment`, C2 `distraction`: images, half of whose patches are noise. How much of the class token's attention in
  the last block goes to the others, and how often the answer is right
- C3 `retrieval`: one of eight words in a long text has to be found, for growing lengths
- C4 `stability`: the loss at the end of further training, and steps whose gradient is far above the median
- C5 `overthinking`: sums modulo five by a small decoder that writes partial sums on its way, for growing numbers of
  them. What is reduced is this trace: at random, or evenly (steps of the same size). That is our stand-in for the
  methods that shorten traces, of which none is a pass
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, pstdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.data.base import Dataset, Split
from gossamer.layers.init import init_by_width
from gossamer.layers.reduce import Trail
from gossamer.models import create_model
from gossamer.shrink.base import Calibration, check_share, run_pass
from gossamer.shrink.recovery import check_steps, recover
from gossamer.shrink.token_comparison import random_like, token_counts
from gossamer.tasks import create_task

# Those that choose by what they have learned.
SELECTORS = ("ia_red2", "bus", "eet")
# A gradient is a spike if it is so many times as long as the median one.
SPIKE = 3.0


@dataclass(frozen=True)
class Trial:
    """One measure of one method, beside no reduction and a random one of the same number of tokens.

    Args:
        test: `alignment`, `distraction`, `retrieval`, `stability` or `overthinking`.
        measure: what the figures are.
        at: length of the text, or steps of reasoning; None where there is nothing to vary.
        tokens: that each block worked on; of reasoning, the tokens written.
        dense, random, reduced: the figures, one for each seed.
    """

    test: str
    measure: str
    method: str
    at: int | None
    tokens: list[int]
    dense: list[float]
    random: list[float]
    reduced: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def table(trials: Sequence[Trial]) -> str:
    """The trials as a table in Markdown: mean over seeds, and standard deviation where there are several."""

    def cell(values: list[float]) -> str:
        return f"{fmean(values):.3f}" + (f" ± {pstdev(values):.3f}" if len(values) > 1 else "")

    names = ("test", "measure", "method", "at", "tokens", "dense", "random", "reduced")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for t in trials:
        figures = " | ".join(map(cell, (t.dense, t.random, t.reduced)))
        at = "" if t.at is None else t.at
        lines.append(f"| {t.test} | {t.measure} | {t.method} | {at} | {' '.join(map(str, t.tokens))} | {figures} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Args:
        keep: share of all tokens that is worked on.
        seeds: the reduction is made once for each.
        learn: steps in which the dense model learns the problem, `steps` of each reduction and of what it is beside.
        lr: learning rate.
        samples: to learn from.

    Raises:
        ValueError: `keep` is not in (0, 1], there is no seed, or negative steps.
    """

    keep: float = 0.5
    seeds: tuple[int, ...] = (0, 1, 2)
    learn: int = 200
    steps: int = 100
    lr: float = 2e-3
    samples: int = 1024

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_steps(self.learn)
        check_steps(self.steps)
        if not self.seeds:
            raise ValueError("seeds must hold at least one, got none")


# ---- images half of which is noise -----------------------------------------------------------------------------------

SIDE, PATCH, CLASSES = 4, 3, 4


def noisy_images(count: int, seed: int, noise: float = 0.5) -> tuple[Split, Tensor]:
    """Images of 4 x 4 patches, each a faint sign of the class or bright noise, and which are signs `(count, 16)`.

    Args:
        noise: share of the patches that are noise, in other places in each image.
    """
    signs = torch.randn(CLASSES, PATCH**2, generator=torch.Generator().manual_seed(0)).sign()
    generator = torch.Generator().manual_seed(seed + 1)
    target = torch.randint(0, CLASSES, (count,), generator=generator)
    order = torch.rand(count, SIDE**2, generator=generator).argsort(1)
    relevant = order >= round(noise * SIDE**2)
    shape = (count, SIDE**2, PATCH**2)
    faint = 96 + 24 * signs[target][:, None] + 48 * torch.randn(shape, generator=generator)
    bright = 128 + 127 * torch.rand(shape, generator=generator)
    patches = torch.where(relevant[..., None], faint, bright).clamp(0, 255).to(torch.uint8)
    tiles = patches.view(count, SIDE, SIDE, PATCH, PATCH).transpose(2, 3)
    return Split((tiles.reshape(count, 1, SIDE * PATCH, SIDE * PATCH),), target), relevant


def distraction(methods: Sequence[str] = SELECTORS, effort: Effort | None = None) -> list[Trial]:
    """C1 and C2: where a reduced model looks, and how often it is right, with noise among its tokens.

    Raises:
        Unsupported: a method cannot leave so few tokens.
    """
    effort = effort or Effort()
    calibration, relevant = _images(effort.samples)
    net = _learned(_vision(), calibration, effort)
    trials = []
    for method in methods:
        figures: dict[str, list[list[float]]] = {"attention on what matters": [], "accuracy": []}
        tokens, contests = _contenders(net, calibration, method, effort)
        for nets in contests:
            figures["accuracy"].append([calibration.score(n) for n in nets])
            figures["attention on what matters"].append([_mass(n, calibration, relevant) for n in nets])
        for (measure, rows), test in zip(figures.items(), ("alignment", "distraction"), strict=True):
            trials.append(Trial(test, measure, method, None, tokens, *map(list, zip(*rows, strict=True))))
    return trials


def attention_mass(model: Any, x: Tensor, relevant: Tensor) -> Tensor:
    """Of the first token's attention to the others in the last block, the share on those that are `relevant (b, n)`.

    A token that others went into is as relevant as they are in the mean.

    Args:
        relevant: which tokens of the stem, behind those in front.

    Raises:
        ValueError: the attention of the last block does not read all tokens that are left.
    """
    block = model.blocks[-1]
    inner = getattr(block, "block", block)
    seen: dict[str, Any] = {}

    def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.setdefault("x", args[0])
        seen.setdefault("source", trail.source)

    hooks = [inner.mixer.qkv.register_forward_pre_hook(look)]
    hooks.append(
        block.register_forward_pre_hook(lambda _, args, given: seen.update(sizes=given.get("sizes")), with_kwargs=True)
    )
    try:
        with torch.no_grad(), Trail(model) as trail:
            model(x)
            q, k, _ = inner.mixer.project(seen["x"])
    finally:
        for hook in hooks:
            hook.remove()
    logits = (q[:, :, :1] * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if seen["sizes"] is not None:
        logits = logits + seen["sizes"].log()[:, None, None]
    row = logits.softmax(-1)[:, :, 0].mean(1)
    if int(seen["source"].max()) >= row.shape[1]:
        raise ValueError(f"the last block ({type(block).__name__}) must attend to all tokens that are left")
    front = trail.source.shape[1] - relevant.shape[1]
    place, real = seen["source"][:, front:].clamp(min=0), seen["source"][:, front:] >= 0
    zeros = torch.zeros_like(row)
    members = zeros.scatter_add(1, place, real.to(row))
    worth = zeros.scatter_add(1, place, (real & relevant).to(row)) / members.clamp(min=1)
    row = row * (members > 0)
    return (row * worth).sum(1) / row.sum(1)


def _mass(model: nn.Module, calibration: Calibration, relevant: Tensor) -> float:
    val = calibration.data.val
    (x,), _ = calibration.task.batch(val, torch.arange(len(val)), train=False)
    return float(attention_mass(model, x, relevant).mean())


def _images(samples: int) -> tuple[Calibration, Tensor]:
    (train, _), (val, relevant) = noisy_images(samples, 0), noisy_images(256, 1)
    spec = {"img_size": (SIDE * PATCH, SIDE * PATCH), "in_chans": 1, "num_classes": CLASSES}
    meta = {"classes": list("abcd"), "mean": [0.5], "std": [0.25]}
    data = Dataset("image-classification", train, val, val, spec, meta)
    return Calibration(create_task(data.task, spec, meta), data), relevant


def _vision() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": (SIDE * PATCH, SIDE * PATCH), "in_chans": 1, "num_classes": CLASSES, "patch": PATCH}
    net = create_model("vit_tiny_patch16_224", **sizes, dim=32, depth=3, heads=4, mlp_ratio=2.0)
    init_by_width(net)
    return net


# ---- a word in a long text -------------------------------------------------------------------------------------------

NEEDLES, WORDS = 8, 40


def needle_texts(count: int, length: int, seed: int) -> Split:
    """Texts of `length` words, one of which is one of eight needles; the class is which."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2 + NEEDLES, WORDS, (count, length), generator=generator)
    target = torch.randint(0, NEEDLES, (count,), generator=generator)
    place = torch.randint(1, length, (count,), generator=generator)
    ids[:, 0] = 1
    ids[torch.arange(count), place] = 2 + target
    return Split((ids,), target)


def retrieval(
    lengths: Sequence[int] = (16, 32, 64, 128), methods: Sequence[str] = SELECTORS, effort: Effort | None = None
) -> list[Trial]:
    """C3: how often the needle is found, for each length, by a model that learned on texts of that length.

    Raises:
        Unsupported: a method cannot leave so few tokens.
    """
    effort = effort or Effort()
    trials = []
    for length in lengths:
        spec = {"vocab_size": WORDS, "max_len": length, "num_classes": NEEDLES, "pad_id": 0}
        train, val = needle_texts(effort.samples, length, 0), needle_texts(256, length, 1)
        data = Dataset("text-classification", train, val, val, spec, {"classes": list("abcdefgh")})
        calibration = Calibration(create_task(data.task, spec, data.meta), data)
        torch.manual_seed(0)
        net = create_model("bert_base", dim=32, depth=3, heads=4, hidden=64, drop=0.0, head_act="tanh", **spec)
        init_by_width(net)
        net = _learned(net, calibration, effort)
        for method in methods:
            tokens, contests = _contenders(net, calibration, method, effort)
            rows = [[calibration.score(n) for n in nets] for nets in contests]
            trials.append(Trial("retrieval", "accuracy", method, length, tokens, *map(list, zip(*rows, strict=True))))
    return trials


# ---- how calmly it learns --------------------------------------------------------------------------------------------


def stability(methods: Sequence[str] = SELECTORS, effort: Effort | None = None) -> list[Trial]:
    """C4: the models of C2 are trained on, with each seed's order of samples.

    Raises:
        Unsupported: a method cannot leave so few tokens.
    """
    effort = effort or Effort()
    calibration, _ = _images(effort.samples)
    net = _learned(_vision(), calibration, effort)
    trials = []
    for method in methods:
        tokens, contests = _contenders(net, calibration, method, effort)
        rows = [
            [_curve(n, calibration, effort, seed) for n in nets]
            for seed, nets in zip(effort.seeds, contests, strict=True)
        ]
        for i, measure in enumerate(("last loss", "gradient spikes")):
            dense, random, reduced = ([row[j][i] for row in rows] for j in range(3))
            trials.append(Trial("stability", measure, method, None, tokens, dense, random, reduced))
    return trials


def _curve(model: nn.Module, calibration: Calibration, effort: Effort, seed: int) -> tuple[float, float]:
    """Mean loss of the last fifth of the steps, and steps with a gradient far above the median."""
    model = copy.deepcopy(model).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=effort.lr)
    generator = torch.Generator().manual_seed(seed)
    train, task, losses, norms = calibration.data.train, calibration.task, [], []
    for _ in range(max(effort.steps, 5)):
        inputs, target = task.batch(train, torch.randint(len(train), (32,), generator=generator), train=False)
        loss = calibration.loss(model, inputs, target)
        optimiser.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
        losses.append(float(loss.detach()))
        optimiser.step()
    usual = median(norms)
    return fmean(losses[-len(losses) // 5 :]), float(sum(norm > SPIKE * usual for norm in norms))


# ---- how long to think -----------------------------------------------------------------------------------------------

MODULUS, TERMS = 5, 7
# Random traces of each length.
DRAWN = 5


def overthinking(effort: Effort | None = None, *, samples: int = 512) -> list[Trial]:
    """C5: sums of seven digits modulo five, with 0 to 5 partial sums written on the way.

    One decoder learns from traces with random steps left out, and writes its own partial sums when it is asked.
    `random` and `reduced` are as long as the limit `at` says; `dense` writes all steps.

    Args:
        samples: sums to be asked.
    """
    effort = effort or Effort()
    full = list(range(2, TERMS))
    trials: dict[int, list[list[float]]] = {}
    for seed in effort.seeds:
        net = reasoner(effort.learn, effort.lr, seed)
        generator = torch.Generator().manual_seed(10_000 + seed)
        digits = torch.randint(0, MODULUS, (samples, TERMS), generator=generator)
        for limit in range(len(full) + 1):
            orders = [(2 + torch.randperm(TERMS - 2, generator=generator)).tolist() for _ in range(DRAWN)]
            lots = [sorted(order[:limit]) for order in orders]
            trials.setdefault(limit, []).append(
                [fmean(answers_right(net, digits, t) for t in traces) for traces in ([full], lots, [even_steps(limit)])]
            )
    return [
        Trial("overthinking", "accuracy", "even steps", at, [at], *map(list, zip(*rows, strict=True)))
        for at, rows in trials.items()
    ]


def even_steps(limit: int) -> list[int]:
    """`limit` of the digits after which a partial sum is written, as evenly spread as they can be."""
    return [round(1 + (TERMS - 1) * (i + 1) / (limit + 1)) for i in range(limit)]  # the first digit is its own sum


def reasoner(steps: int, lr: float, seed: int = 0) -> nn.Module:
    """A decoder that has learned to give the sum at every digit, with partial sums written behind some of them."""
    torch.manual_seed(seed)
    sizes = {"dim": 48, "depth": 2, "heads": 4, "hidden": 96, "vocab_size": 2 * MODULUS, "max_len": 2 * TERMS}
    net = create_model("gpt2", **sizes, drop=0.0)
    init_by_width(net)
    optimiser = torch.optim.AdamW(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for step in range(steps):
        digits = torch.randint(0, MODULUS, (64, TERMS), generator=generator)
        count = int(torch.randint(0, TERMS - 1, (1,), generator=generator))
        trace = sorted((2 + torch.randperm(TERMS - 2, generator=generator)).tolist()[:count])
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        asked = [i + sum(c <= i for c in trace) for i in range(TERMS)]  # where the digits are
        scores = net(write_trace(digits, trace))[:, asked]
        loss = F.cross_entropy(scores.flatten(0, 1), (MODULUS + digits.cumsum(1) % MODULUS).flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net.eval()


def write_trace(digits: Tensor, trace: Sequence[int]) -> Tensor:
    """The digits; behind as many of them as `trace` says, the sum so far, which is a word of its own."""
    sums = MODULUS + digits.cumsum(1) % MODULUS
    words = [(digits[:, i], sums[:, i])[: 1 + (i + 1 in trace)] for i in range(TERMS)]
    return torch.stack([word for pair in words for word in pair], 1)


@torch.no_grad()
def answers_right(model: nn.Module, digits: Tensor, trace: Sequence[int]) -> float:
    """The share of sums that are right when the decoder writes the partial sums of `trace` itself."""
    ids = digits[:, :0]
    for i in range(TERMS):
        ids = torch.cat((ids, digits[:, i : i + 1]), 1)
        if i + 1 in (*trace, TERMS):
            ids = torch.cat((ids, MODULUS + model(ids)[:, -1:, MODULUS:].argmax(-1)), 1)
    return float((ids[:, -1] - MODULUS == digits.sum(1) % MODULUS).float().mean())


# ---- the same for all ------------------------------------------------------------------------------------------------


def _learned(net: nn.Module, calibration: Calibration, effort: Effort) -> nn.Module:
    recover(net, calibration, steps=effort.learn, lr=effort.lr, began=time.perf_counter())
    return net.eval()


def _contenders(
    model: nn.Module, calibration: Calibration, method: str, effort: Effort
) -> tuple[list[int], list[tuple[nn.Module, nn.Module, nn.Module]]]:
    """The tokens of the method, and for each seed the dense, the random and the reduced model, trained equally long."""
    found = []
    tokens: list[int] = []
    for seed in effort.seeds:
        calibration.seed = seed
        given: dict[str, Any] = {"steps": effort.steps, "lr": effort.lr}
        if method == "ia_red2":  # one training of the interpreter, one of the blocks
            given |= {"steps": effort.steps // 2, "groups": 1, "policy_lr": 5 * effort.lr}
        reduced, _ = run_pass(method, model, calibration, keep=effort.keep, **given)
        tokens = token_counts(reduced, calibration.example()) or []
        blind = random_like(model, reduced, calibration, seed)
        if token_counts(blind, calibration.example()) != tokens:
            raise ValueError(f"method must be one that leaves fewer tokens from block to block; got {method!r}")
        dense = copy.deepcopy(model)
        for net in (dense, blind):
            recover(net, calibration, steps=effort.steps, lr=effort.lr, began=time.perf_counter(), teacher=model)
        found.append((dense.eval(), blind.eval(), reduced))
    return tokens, found
