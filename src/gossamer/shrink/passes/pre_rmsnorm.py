"""Pre-LN to Pre-RMSNorm and Pre-CRMSNorm: the same function with cheaper norms.

Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers".

`LN(x) = RMS(x - mean(x))`, and a layer norm does not see a constant added to all channels. So the mean of the residual
stream is of no use to a pre-norm model: it is taken out of everything that adds to the stream, and what is left needs
no centring.

- the norms' scales and shifts go into the products that read them (`W diag(g)`, `b + W c`)
- every product that adds to the stream gets outputs of mean zero: `W - mean_rows(W)`, `b - mean(b)`; a LayerScale is
  made part of its product before
- `crms`: a stream of mean zero has one channel too many; the last is dropped from every writer, `V' = V[:, :-1] -
  V[:, -1:]` in every reader, and the norm is `z / sqrt((sum z^2 + (sum z)^2) / d + eps)`
- `training` keeps every parameter: products are centred as they are read, tokens as they leave the stem, and norms
  leave out their own centring and keep scale and shift. It is the same function of the same parameters and so learns
  as the pre-norm model does, step by step; `rms` and `crms` join and cut parameters and learn along another way. They
  can be made of it when it has learned
- whether it is faster is for the speed gate to tell: runtimes have layer norm as one operation
- the reverse (RMSNorm to LayerNorm), a remark of the paper, is not built
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block
from gossamer.layers.distilled import DistilledClassifier
from gossamer.layers.embed import TextStem, TokenStem
from gossamer.layers.fold import norm_readers
from gossamer.layers.heads import Classifier
from gossamer.layers.language import WordHead, WordStem
from gossamer.mixers.attention import Attention
from gossamer.mixers.grouped_query import GroupedQueryAttention
from gossamer.shrink.base import Calibration, Step, Unsupported, blocks_of, register_pass
from gossamer.shrink.recipe import apply, register_step
from gossamer.trunks import Isotropic

FORMS = ("rms", "crms", "training")


class PlainRMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps)`; with `dropped`, x lacks the last of its channels, which is minus their sum."""

    def __init__(self, dim: int, eps: float, *, dropped: bool = False) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.dropped = dropped

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        if not self.dropped:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        total = x.square().sum(-1, keepdim=True) + x.sum(-1, keepdim=True).square()
        return x * torch.rsqrt(total / self.dim + self.eps)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, eps={self.eps:g}, dropped={self.dropped}"


class UncentredNorm(nn.LayerNorm):
    """The layer norm of vectors whose mean is zero: `y = g x / sqrt(mean(x^2) + eps) + b`."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is None:
            return y
        return y * self.weight if self.bias is None else torch.addcmul(self.bias, y, self.weight)


class CentredLinear(nn.Linear):
    """`y = (W - mean_rows(W)) x + b - mean(b)`; W and b are what learns."""

    def forward(self, x: Float[Tensor, "*b c"]) -> Float[Tensor, "*b o"]:
        bias = None if self.bias is None else self.bias - self.bias.mean()
        return F.linear(x, self.weight - self.weight.mean(0), bias)


class _CentredTokens:
    """A stem whose tokens leave it with mean zero."""

    def forward(self, x: Any) -> tuple[Tensor, Any]:
        tokens, mask = super().forward(x)  # type: ignore[misc]
        return tokens - tokens.mean(-1, keepdim=True), mask


class CentredTokenStem(_CentredTokens, TokenStem):
    pass


class CentredTextStem(_CentredTokens, TextStem):
    pass


class CentredWordStem(_CentredTokens, WordStem):
    pass


STEMS: dict[type, type] = {TokenStem: CentredTokenStem, TextStem: CentredTextStem, WordStem: CentredWordStem}


@register_pass("pre_rmsnorm", family="exact rewrite", paper="pre-rmsnorm", saves=("params",))
def pre_rmsnorm(model: nn.Module, calibration: Calibration | None = None, *, form: str = "rms") -> list[Step]:
    """Replaces the layer norms of a pre-norm model by RMS norms, its answers unchanged.

    Args:
        form: `rms` keeps the width, `crms` drops one channel of the stream, `training` keeps all parameters.

    Raises:
        Unsupported: not a pre-norm model with layer norms, or a stem or head that is not known to be linear.
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}")
    _check(model, form)
    dropping = [n for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]
    if dropping:
        warnings.warn(
            f"dropout ({dropping[0]}) takes the mean of the stream off zero in training; in evaluation the converted "
            "model is the same",
            stacklevel=2,
        )
    step: Step = {"step": "pre_rmsnorm", "form": form}
    apply(model, step)
    return [step]


def _check(model: Any, form: str) -> None:
    if not isinstance(model, Isotropic):
        raise Unsupported(f"{type(model).__name__} is no isotropic model: its stream changes width")
    norms = [("norm", model.norm)]
    for name, block in blocks_of(model):
        if block.residual != "pre":
            raise Unsupported(
                f"{name} is {block.residual}-norm; only pre-norm models have no use for the mean of the stream"
            )
        norms += [(f"{name}.norm1", block.norm1), (f"{name}.norm2", block.norm2)]
        if form == "training" and block.scale1 is not None:
            raise Unsupported(f"{name}.scale1 is learned behind the products that would be centred")
        readers = dict(_readers(block))
        if not readers.get("norm1") or not readers.get("norm2"):
            raise Unsupported(f"{name}: what reads its norms ({type(block.mixer).__name__}) is not known to be linear")
        for writer in _writers(block):
            if not isinstance(writer, nn.Linear) or (form == "training" and type(writer) is not nn.Linear):
                raise Unsupported(f"{name}: what writes into the stream is a {type(writer).__name__}, not linear")
    for name, norm in norms:
        if type(norm) is not nn.LayerNorm and (form == "training" or type(norm) is not UncentredNorm):
            raise Unsupported(f"{name} is a {type(norm).__name__}, not a LayerNorm")
    known = type(model.stem) in STEMS if form == "training" else isinstance(model.stem, TokenStem | TextStem | WordStem)
    if not known or getattr(model.stem, "norm", None) is not None:
        raise Unsupported(f"stem ({type(model.stem).__name__}) does not end in sums of linear maps")
    if isinstance(model.stem, TokenStem) and getattr(model.stem.embed, "norm", None) is not None:
        raise Unsupported("stem: its patches are normalised, which is not linear")
    _head_readers(model.head)


def _readers(block: Block) -> list[tuple[str, list[nn.Linear]]]:
    # Self-attention reads its norm by one product; where it could be given a context, folding would not hold.
    found = dict(norm_readers(block))
    if isinstance(block.mixer, Attention | GroupedQueryAttention):
        found["norm1"] = [block.mixer.qkv]
    return list(found.items())


def _writers(block: Block) -> list[nn.Module]:
    return [getattr(block.mixer, "proj", nn.Identity()), getattr(block.mlp, "fc2", nn.Identity())]


def _head_readers(head: nn.Module) -> list[nn.Linear]:
    if isinstance(head, WordHead):
        return [head.fc]
    if isinstance(head, Classifier) and head.kind in ("mean", "token") and head.norm is None and head.fc is not None:
        return [head.fc]
    if isinstance(head, DistilledClassifier):
        return [head.fc, head.distilled]
    raise Unsupported(f"head ({type(head).__name__}) does not read the last norm by linear layers alone")


@register_step("pre_rmsnorm")
@torch.no_grad()
def _convert(model: Any, step: Step) -> None:
    form = step["form"]
    _check(model, form)
    if form == "training":
        _centre_when_read(model)
        return
    drop = form == "crms"
    for reader in _head_readers(model.head):
        reader.weight = nn.Parameter(reader.weight.clone())  # a head may share its weight with the words
        _take_affine(reader, model.norm)
        _narrow(reader, drop)
    model.norm = _plain(model.norm, drop)
    for _, block in blocks_of(model):
        for name, readers in _readers(block):
            for reader in readers:
                _take_affine(reader, getattr(block, name))
                _narrow(reader, drop)
            setattr(block, name, _plain(getattr(block, name), drop))
        for writer, scale in zip(_writers(block), ("scale1", "scale2"), strict=True):
            assert isinstance(writer, nn.Linear)
            if type(writer) is CentredLinear:
                object.__setattr__(writer, "__class__", nn.Linear)
            gain = getattr(block, scale)
            if gain is not None:
                writer.weight = nn.Parameter(writer.weight * gain[:, None])
                writer.bias = None if writer.bias is None else nn.Parameter(writer.bias * gain)
                setattr(block, scale, None)
            writer.weight = nn.Parameter(_centred(writer.weight, 0, drop))
            writer.bias = None if writer.bias is None else nn.Parameter(_centred(writer.bias, 0, drop))
            writer.out_features = len(writer.weight)
    _centre_stem(model.stem, drop)
    model.stem.__class__ = next(
        (plain for plain, centred in STEMS.items() if type(model.stem) is centred), type(model.stem)
    )


def _centre_when_read(model: Any) -> None:
    norms = [model.norm]
    for _, block in blocks_of(model):
        norms += [block.norm1, block.norm2]
        for writer in _writers(block):
            writer.__class__ = CentredLinear
    for norm in norms:
        norm.__class__ = UncentredNorm
    model.stem.__class__ = STEMS[type(model.stem)]


def _centre_stem(stem: Any, drop: bool) -> None:
    for name in ("tokens", "token", "positions"):
        value = getattr(stem, name, None)
        if value is not None:
            made = _centred(value, -1, drop)
            setattr(stem, name, nn.Parameter(made) if isinstance(value, nn.Parameter) else made)
    if isinstance(stem, TokenStem):
        proj: Any = stem.embed.proj
        proj.weight = nn.Parameter(_centred(proj.weight, 0, drop))
        proj.bias = None if proj.bias is None else nn.Parameter(_centred(proj.bias, 0, drop))
        proj.out_channels = len(proj.weight)
        return
    stem.words.weight = nn.Parameter(_centred(stem.words.weight, 1, drop))
    stem.words.embedding_dim = stem.words.weight.shape[1]


def _centred(x: Tensor, axis: int, drop: bool) -> Tensor:
    x = x - x.mean(axis, keepdim=True)
    return x.narrow(axis, 0, x.shape[axis] - 1).clone() if drop else x


def _take_affine(reader: nn.Linear, norm: nn.LayerNorm) -> None:
    if not norm.elementwise_affine:
        return
    if norm.bias is not None:
        moved = reader.weight @ norm.bias
        reader.bias = nn.Parameter(moved if reader.bias is None else reader.bias + moved)
    reader.weight = nn.Parameter(reader.weight * norm.weight)


def _narrow(reader: nn.Linear, drop: bool) -> None:
    if drop:
        reader.weight = nn.Parameter(reader.weight[:, :-1] - reader.weight[:, -1:])
        reader.in_features -= 1


def _plain(norm: nn.LayerNorm, drop: bool) -> PlainRMSNorm:
    return PlainRMSNorm(norm.normalized_shape[0], norm.eps, dropped=drop)
