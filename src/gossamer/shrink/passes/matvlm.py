"""MaTVLM: attention of some decoder layers becomes a Mamba-2 layer, started from its weights and taught by the whole.

Source: Li et al. 2025, "MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling". The layer is
`gossamer.mixers.mamba2`.

Without decay and norm a Mamba-2 head is `sum_(j <= t) (c_t . b_j) x_j`, attention without softmax; so the rows of its
first product are v for x, k for b and q for c, its last product is attention's, and all else starts as Mamba-2 does.
Then one stage of learning, of the new layers alone:

`loss = w_kl T^2 KL(teacher || student) + w_tl sum_l ||layer_l(h_l) - h_(l+1)||_2 + w_ce task`

with `h_l` the teacher's own hidden states, before and after each replaced layer.

- norms, MLPs and all other layers stay as they are; the connector of a vision-language model learns too
- no rotary positions and, by default, no biases in the new layers, whatever attention had
- layers are evenly spaced from the first; the paper's 12.5 % of 32 layers are 0, 6, 12, 18, to be given as `layers`
- `kl` sums over places and words and is divided by the batch, as theirs; the hidden loss is the norm of a whole batch
- their code compares the last layer behind the model's norm; here every layer is compared as it leaves the block
- attention's weights are the better start where a layer looks tokens up by content, but not at first. Decoders that
  recall 20 of 24 keys (4 layers, 2 heads of 32 channels; the first layer replaced, both losses, a rate of 8e-3, which
  for 64 channels is what 2e-4 is for 2560) were 5 to 20 % nearer to their teacher after 400 steps than from new weights
  (`start="random"`), and 39 to 55 % where keys were asked for, on all of 5 seeds; with 4 heads of 12 channels and 12
  keys nearer on 4 of 5. In the first 100 steps, and on random or briefly trained teachers, new weights were as near or
  nearer: the state starts at a hundredth of the skip, and the random signs of the convolution hide the products of
  queries and keys
- their `jsd` has its two divergences the other way round, which is not bounded; here it is Jensen's and Shannon's
- AdamW (0.9, 0.95), decay 0.01, clip 0.1 and warm-up, constant, decay, as theirs; batches and steps are the user's
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn, optim

from gossamer.layers import Block
from gossamer.mixers.attention import Attention
from gossamer.mixers.grouped_query import GroupedQueryAttention
from gossamer.mixers.mamba2 import Mamba2
from gossamer.mixers.rotary import RotaryAttention
from gossamer.models.matvlm import PartialRotaryAttention, check_layers
from gossamer.shrink.base import Calibration, Step, Unsupported, blocks_of, check_share, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.shrink.recovery import check_steps
from gossamer.train import Settings

MATCHES = ("kl", "reverse", "jsd", "l2", "ce")
# Mixers whose products are read off as queries, keys and values; what inherits from them may do more with them.
KINDS = (Attention, GroupedQueryAttention, RotaryAttention, PartialRotaryAttention)
WARM, DECAY = 0.1, 0.1


@register_pass("matvlm", family="teaching", paper="matvlm", saves=("macs",), default={"keep": 0.75})
def matvlm(
    model: nn.Module,
    calibration: Calibration,
    *,
    keep: float = 0.75,
    layers: Sequence[int] | None = None,
    bias: bool = False,
    start: str = "attention",
    match: str = "kl",
    temperature: float = 1.0,
    weights: Sequence[float] = (1.0, 1.0, 0.0),
    connector: bool = True,
    steps: int | None = None,
    batch_size: int = 8,
    lr: float = 2e-4,
) -> list[Step]:
    """Replaces the attention of some decoder layers by Mamba-2 layers that start from it, and teaches these.

    Args:
        keep: share of the attention layers that stay.
        layers: those to replace, counted among the attention layers of the decoder; evenly spaced by default.
        bias: keep the biases of attention's products.
        start: the new layers' weights, from attention or all anew.
        match: what the answers are taught by, see `answer_loss`.
        temperature: of the softmax in it.
        weights: of answers, of hidden states, and of the task's own loss.
        connector: whether a vision-language model's connector learns too.
        steps: of training, three epochs by default, and never longer than the calibration's time.
        lr: learning rate.

    Raises:
        Unsupported: no layer's attention is causal, or its queries, keys and values cannot be read off.
        ValueError: a setting is out of range.
    """
    began = time.perf_counter()
    check_share("keep", keep)
    check_steps(steps)
    for name, value, allowed in (("match", match, MATCHES), ("start", start, ("attention", "random"))):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if len(weights) != 3 or min(weights) < 0:
        raise ValueError(f"weights must be three numbers of at least 0, got {list(weights)}")
    found = attention_layers(model)
    chosen = spaced(len(found), keep) if layers is None else sorted(layers)
    check_layers(chosen, len(found))
    parts = [list(found)[i] for i in chosen]
    for name in parts:
        _check(name, found[name].mixer)
    if not parts:
        return []
    teacher = copy.deepcopy(model).eval()
    step: Step = {"step": "matvlm", "parts": parts, "bias": bias}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(calibration.seed)
        apply(model, step)
    if start == "attention":
        for name in parts:
            block: Any = model.get_submodule(name)
            start_from(block.mixer, teacher.get_submodule(name).mixer)
    left = calibration.seconds - (time.perf_counter() - began)
    if left > 0 and steps != 0:
        with _frozen(model, set(trained(model, connector=connector, parts=parts))):
            objective = _Objective(model, teacher, parts, calibration, match, temperature, weights)
            _train(model, calibration, objective, steps, left, batch_size, lr)
    model.eval()
    return [step]


@register_step("matvlm")
def _replace(model: nn.Module, step: Step) -> None:
    for name in step["parts"]:
        block: Any = model.get_submodule(name)
        if not isinstance(block, Block) or type(block.mixer) not in KINDS:
            raise ValueError(f"parts must be blocks with attention, got {name} ({type(block).__name__})")
        old = block.mixer
        shared = getattr(old, "kv_heads", old.heads)
        new = Mamba2(
            old.dim, heads=old.heads, head_dim=old.head_dim, x_heads=shared, b_heads=shared, bias=bool(step["bias"])
        )
        block.mixer = new.to(old.qkv.weight).train(block.training)


# ---- which layers, and how they start --------------------------------------------------------------------------------


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Blocks of the decoder in order, by name: those whose mixer is causal attention.

    Raises:
        Unsupported: there is none; the message names the first block and says why it is none.
    """
    blocks = blocks_of(model)
    found = {name: block for name, block in blocks if _attends(block.mixer) and getattr(block.mixer, "causal", False)}
    if found:
        return found
    name, block = next(((n, b) for n, b in blocks if _attends(b.mixer)), blocks[0])
    kind = type(block.mixer).__name__
    if not _attends(block.mixer):
        raise Unsupported(f"matvlm: {name}.mixer ({kind}) has no q, k and v to start a Mamba-2 layer from")
    raise Unsupported(f"matvlm: {name}.mixer ({kind}) looks both ways; a Mamba-2 layer only knows what came before")


def _attends(mixer: Any) -> bool:
    return isinstance(mixer, Attention | GroupedQueryAttention)


def _check(name: str, mixer: Any) -> None:
    """Raises Unsupported where the products of a mixer are not to be read off."""
    if type(mixer) not in KINDS:
        raise Unsupported(f"matvlm: {name}.mixer ({type(mixer).__name__}) does more than attend by q, k and v")
    for leaf in ("qkv", "proj"):
        part = getattr(mixer, leaf)
        if type(part) is not nn.Linear or hasattr(part, "parametrizations"):
            raise Unsupported(f"matvlm: {name}.mixer.{leaf} ({type(part).__name__}) is no plain product of one matrix")


def spaced(depth: int, keep: float) -> list[int]:
    """Layers `0, k, 2k, …` so that about the share `keep` of `depth` layers is left as it is."""
    count = min(depth, round(depth * (1 - keep)))
    return [i * depth // count for i in range(count)]


@torch.no_grad()
def start_from(mamba: Mamba2, attention: Any) -> None:
    """Rows of x, b and c become those of v, k and q; the output product becomes attention's."""
    inner, shared, heads = attention.heads, getattr(attention, "kv_heads", attention.heads), attention.head_dim
    sizes = [inner * heads, shared * heads, shared * heads]
    rows = slice(sizes[0], sizes[0] + sum(sizes))

    def turned(values: Tensor) -> Tensor:
        q, k, v = values.split(sizes)
        return torch.cat((v, k, q))

    mamba.in_proj.weight[rows] = turned(attention.qkv.weight)
    mamba.proj.weight.copy_(attention.proj.weight)
    if mamba.in_proj.bias is not None:
        if attention.qkv.bias is not None:
            mamba.in_proj.bias[rows] = turned(attention.qkv.bias)
        mamba.proj.bias.copy_(attention.proj.bias if attention.proj.bias is not None else torch.zeros(mamba.dim))


# ---- teaching --------------------------------------------------------------------------------------------------------


def trained(model: nn.Module, *, connector: bool = True, parts: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that learn: those of Mamba-2 layers (of the blocks `parts`) and the connector's."""
    places = [
        name
        for name, part in model.named_modules()
        if isinstance(part, Mamba2) and (parts is None or name.rpartition(".")[0] in parts)
    ]
    if connector and isinstance(getattr(getattr(model, "stem", None), "connector", None), nn.Module):
        places.append("stem.connector")
    return [name for name, _ in model.named_parameters() if any(name.startswith(f"{place}.") for place in places)]


def answer_loss(
    student: Float[Tensor, "b *n v"], teacher: Float[Tensor, "b *n v"], match: str = "kl", temperature: float = 1.0
) -> Float[Tensor, ""]:
    """How far `student`'s scores are from `teacher`'s, summed over places and words, a sample of the batch.

    `kl` is `T^2 KL(teacher || student)` of the softmax at temperature T, `reverse` the other way round, `jsd` the mean
    of both against their average; `l2` is the norm of the difference of all scores, `ce` the mean cross entropy to the
    teacher's likeliest word.
    """
    if match == "l2":
        return (teacher - student).norm()
    if match == "ce":
        return F.cross_entropy(student.flatten(0, -2), teacher.flatten(0, -2).argmax(-1))
    s, t = ((scores / temperature).log_softmax(-1) for scores in (student, teacher))
    scale = temperature**2 / len(student)

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return F.kl_div(q, p, reduction="sum", log_target=True) * scale

    if match == "kl":
        return divergence(t, s)
    if match == "reverse":
        return divergence(s, t)
    middle = torch.logaddexp(s, t) - torch.log(s.new_tensor(2.0))
    return (divergence(t, middle) + divergence(s, middle)) / 2


class _Objective:
    """The loss of a batch, from one pass of the teacher and one of the student and its replaced layers."""

    def __init__(
        self,
        model: nn.Module,
        teacher: nn.Module,
        parts: Sequence[str],
        calibration: Calibration,
        match: str,
        temperature: float,
        weights: Sequence[float],
    ) -> None:
        self.blocks = [(model.get_submodule(name), teacher.get_submodule(name)) for name in parts]
        self.teacher = teacher
        self.task = calibration.task
        self.match = match
        self.temperature = temperature
        self.weights = tuple(weights)

    def __call__(self, wrapped: nn.Module, inputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        self.teacher.to(inputs[0].device)
        with torch.no_grad(), _watched([block for _, block in self.blocks]) as seen:
            taught = self.teacher(*inputs).float()
        return self.loss(wrapped(*inputs).float(), taught, [seen[block] for _, block in self.blocks], target)

    def hidden(self, seen: Sequence[tuple[Any, Any, Tensor]]) -> Tensor:
        """Sum over replaced layers of `||layer(h) - h'||`, `h` and `h'` the teacher's before and after it."""
        pairs = zip(self.blocks, seen, strict=True)
        return torch.stack([(mine(*a, **k) - after).float().norm() for (mine, _), (a, k, after) in pairs]).sum()

    def loss(self, answer: Tensor, taught: Tensor, seen: Sequence[Any], target: Tensor) -> Tensor:
        """The weighted sum; what has no weight is not computed."""
        answers, hidden, task = self.weights
        loss = answer.new_zeros(())
        if answers:
            loss = loss + answers * answer_loss(answer, taught, self.match, self.temperature)
        if hidden:
            loss = loss + hidden * self.hidden(seen)
        if task:
            loss = loss + task * self.task.loss(answer, target)
        return loss


@contextmanager
def _watched(blocks: Sequence[nn.Module]) -> Iterator[dict[nn.Module, tuple[Any, Any, Tensor]]]:
    """What each block was given, and what it gave."""
    seen: dict[nn.Module, tuple[Any, Any, Tensor]] = {}

    def note(block: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen[block] = (args, kwargs, output)

    handles = [block.register_forward_hook(note, with_kwargs=True) for block in blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _frozen(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Within the block only the parameters `names` learn."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
            p.grad = None


def _adamw(model: nn.Module, settings: Settings) -> optim.Optimizer:
    """The authors' optimiser: no decay of what has one axis."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def _train(
    model: nn.Module,
    calibration: Calibration,
    objective: Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor],
    steps: int | None,
    seconds: float,
    batch_size: int,
    lr: float,
) -> None:
    """Warm-up, a constant rate, and a decay of the last tenth."""
    began = time.perf_counter()
    size = min(batch_size, len(calibration.data.train))
    count = 3 * max(1, len(calibration.data.train) // size) if steps is None else steps
    trainer = calibration.trainer(
        model,
        objective=objective,
        optimiser=_adamw,
        lr=lr,
        ema=0.0,
        batch_size=size,
        clip=0.1,
        warmup=max(1, round(WARM * count)),
    )
    last = max(1, round(DECAY * count))
    bounded = None if seconds == float("inf") else seconds
    if count > last:
        trainer.train(steps=count - last, seconds=bounded and (1 - DECAY) * bounded, schedule="stable")
        trainer.begin_phase()
    left = None if bounded is None else bounded - (time.perf_counter() - began)
    if left is None or left > 0:
        trainer.train(steps=last, seconds=left, schedule="linear")
