"""Wide attention: text classifiers that trade layers for heads per layer, with any attention in them.

Source: Brown, Zhao, Shumailov, Mullins 2022, "Wide Attention Is The Way Forward For Transformers?"; the shell is the
encoder of Long Range Arena (Tay et al. 2020).

- `layers * heads` is held fixed and a head's width too, so attention costs the same at every ratio, while the MLPs and
  the depth shrink with the layers
- no code of the authors was found: the sizes of the named variants are recollected or our own, none is confirmed
- shell: word table N(0, 1), sinusoid positions, a class token that starts at zero, pre-norm blocks (eps 1e-6), GELU by
  tanh, no bias in the attention's products, a head of two linear layers
- matching reads two texts with one encoder and no class token, and compares the vectors of their first tokens
- `head_chunk` runs a layer's heads in groups: less memory at a time, the same result
- `head_maps` and `head_effects` show what each head of a one-layer model reads, and what it does to the answer
"""

import copy
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from gossamer.layers import Block, Mlp, TextStem, mean_pool
from gossamer.mixers import create_mixer, options_for
from gossamer.mixers.attention import Attention
from gossamer.mixers.heads import HeadMixer
from gossamer.mixers.sequence import SequenceMixer, head_tensors
from gossamer.models.registry import register_system
from gossamer.ops.attention import attention_maps
from gossamer.trunks import Isotropic


class WideBlock(Block):
    """`x = x + drop(sum_groups mixer_group(norm1(x)))`, `x = x + mlp(norm2(x))`.

    Args:
        head_chunk: heads that run at a time, None for all at once.
        drop: dropout after the mixer.
    """

    mixer: HeadMixer
    mlp: nn.Module
    norm2: nn.Module

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, drop: float, head_chunk: int | None) -> None:
        super().__init__(dim, mixer, mlp, norm=partial(nn.LayerNorm, eps=1e-6))
        if head_chunk is not None and (head_chunk < 1 or not isinstance(mixer, HeadMixer)):
            raise ValueError(f"head_chunk must be at least 1 and the mixer one with heads, got {head_chunk}")
        self.drop = nn.Dropout(drop)
        self.head_chunk = head_chunk

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m e"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        given = {name: value for name, value in (("mask", mask), ("context", context)) if value is not None}
        x = x + self.drop(self._mix(self.norm1(x), given))
        return self.tail(x)

    def tail(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        """What follows the sum of stream and heads."""
        return x + self.mlp(self.norm2(x))

    def _mix(self, x: Tensor, given: dict[str, Tensor]) -> Tensor:
        if self.head_chunk is None or self.head_chunk >= self.mixer.heads:
            return self.mixer(x, **given)
        total: Tensor | None = None
        for index in torch.arange(self.mixer.heads, device=x.device).split(self.head_chunk):
            if torch.is_grad_enabled():
                # What a group keeps for its gradient is made again in the backward pass, a group at a time.
                part = checkpoint(self._share, x, index, given, use_reentrant=False)
            else:
                part = self._share(x, index, given)
            total = part if total is None else total + part
        assert total is not None
        return total

    def _share(self, x: Tensor, index: Tensor, given: dict[str, Tensor]) -> Tensor:
        part = copy.copy(self.mixer)
        part.heads = len(index)
        return functional_call(part, head_tensors(self.mixer, index), (x,), given)


class ClassHead(nn.Module):
    """`W_2 relu(W_1 pool(x) + b_1) + b_2`.

    Args:
        pool: the first `token`, or the `mean` of the valid ones.
    """

    def __init__(self, dim: int, hidden: int, num_classes: int, pool: str = "token") -> None:
        super().__init__()
        if pool not in ("token", "mean"):
            raise ValueError(f"pool must be token or mean, got {pool!r}")
        self.kind = pool
        self.mlp = nn.Linear(dim, hidden)
        self.logits = nn.Linear(hidden, num_classes)

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b k"]:
        x = x[:, 0] if self.kind == "token" else mean_pool(x, mask)
        return self.logits(self.mlp(x).relu())


class FirstToken(nn.Module):
    """The vector of the first token."""

    def forward(self, x: Float[Tensor, "b n c"], mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b c"]:
        return x[:, 0]


class Matcher(nn.Module):
    """Two texts read by one encoder: `W_3 relu(W_2 relu(W_1 [e_1; e_2]))`.

    Args:
        encoder: ids to a vector of `dim` channels.
    """

    def __init__(self, encoder: nn.Module, dim: int, hidden: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.mlp1 = nn.Linear(2 * dim, hidden)
        self.mlp2 = nn.Linear(hidden, hidden // 2)
        self.logits = nn.Linear(hidden // 2, num_classes)

    def forward(self, first: Int[Tensor, "b n"], second: Int[Tensor, "b m"]) -> Float[Tensor, "b k"]:
        x = torch.cat((self.encoder(first), self.encoder(second)), -1)
        return self.logits(self.mlp2(self.mlp1(x).relu()).relu())


# ---- what the heads of a one-layer model do ------------------------------------------------------------------------


def _single(model: nn.Module) -> tuple[Isotropic, TextStem, WideBlock]:
    if isinstance(model, Isotropic) and isinstance(model.stem, TextStem) and len(model.blocks) == 1:
        block = model.blocks[0]
        if isinstance(block, WideBlock) and isinstance(block.mixer, HeadMixer):
            return model, model.stem, block
    raise ValueError("model must be a wide attention classifier of one layer (layers=1) whose mixer has heads")


@torch.no_grad()
def head_maps(model: nn.Module, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b h t"]:
    """The weight with which the class token reads each token (itself first), for each head.

    Raises:
        ValueError: more than one layer, no class token, or a mixer whose weights cannot be written out.
    """
    _, stem, block = _single(model)
    if stem.token is None:
        raise ValueError("model must pool a class token (pool='token')")
    x, mask = stem(ids)
    x = block.norm1(x)
    if isinstance(block.mixer, SequenceMixer):
        return block.mixer.maps(x, mask)[:, :, 0]
    if not isinstance(block.mixer, Attention):
        raise ValueError(f"mixer {block.mixer.name!r} cannot write out its weights")
    q, k, v = block.mixer.project(x)
    return attention_maps(q[:, :, :1], k, v, mask=mask[:, None, None])[1][:, :, 0]


@torch.no_grad()
def head_effects(model: nn.Module, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b h k"]:
    """`logits - logits without head h`, exactly: before the MLP the stream is a sum over heads.

    Raises:
        ValueError: more than one layer, or a mixer without heads.
    """
    trunk, stem, block = _single(model)
    mixer = block.mixer
    x, mask = stem(ids)
    heads: list[Tensor] = []
    hook = mixer.proj.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    try:
        y = mixer(block.norm1(x), mask=mask)
    finally:
        hook.remove()

    def answer(stream: Tensor) -> Tensor:
        x = block.tail(stream)
        return trunk.head(x if trunk.norm is None else trunk.norm(x), mask)

    whole = answer(x + y)
    parts = zip(heads[0].split(mixer.head_dim, -1), mixer.proj.weight.split(mixer.head_dim, 1), strict=True)
    return torch.stack([whole - answer(x + y - part @ weight.mT) for part, weight in parts], 1)


# ---- the system ----------------------------------------------------------------------------------------------------


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    budget = {"xs": 6e6, "s": 30e6, "m": 100e6, "l": 320e6}[size]
    n = spec["max_len"] + 1
    # Long texts are read in linear time.
    mixer, reach = ("attention", n) if n <= 257 else ("linear", 16)
    # Inner width and MLP width are twice the channels: 12 dim^2 for each token, 4 dim for each pair that meets.
    fits = [dim for dim in (32, 48, 64, 96, 128, 192, 256, 384, 512) if n * (12 * dim**2 + 4 * dim * reach) <= budget]
    dim = max(fits, default=32)
    heads = dim // 8
    return "wide_cpu_small_1_8", {
        **dict(dim=dim, mlp=2 * dim, layers=1, heads=heads, total_heads=heads, head_dim=16, mixer=mixer, drop=0.3),
        **spec,
    }


def _variants() -> dict[str, dict[str, Any]]:
    large: dict[str, Any] = dict(dim=512, head_dim=64, mlp=2048, total_heads=48)
    middle: dict[str, Any] = dict(dim=128, head_dim=32, mlp=512, total_heads=16)
    small: dict[str, Any] = dict(dim=64, head_dim=16, mlp=128, total_heads=8)
    families: dict[str, tuple[dict[str, Any], str]] = {
        "wide_imdb": ({**large, "vocab_size": 257, "max_len": 1000}, "6-8 3-16 2-24 1-48"),
        "wide_listops": ({**large, "vocab_size": 17, "max_len": 2000, "num_classes": 10}, "6-8 3-16 2-24 1-48"),
        "wide_matching": ({**middle, "vocab_size": 257, "max_len": 4000, "matching": True}, "4-4 2-8 1-16"),
        "wide_cpu_small": ({**small, "vocab_size": 257, "max_len": 1000}, "4-2 2-4 1-8"),
    }
    return {
        f"{family}_{layers}_{heads}": {**sizes, "layers": int(layers), "heads": int(heads)}
        for family, (sizes, ratios) in families.items()
        for layers, heads in (ratio.split("-") for ratio in ratios.split())
    }


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=1e-6)
        elif isinstance(module, TextStem):
            nn.init.normal_(module.words.weight)
            with torch.no_grad():
                module.words.weight[module.pad_id] = 0
    for module in model.modules():
        if isinstance(module, HeadMixer):
            for part in module.qkv.weight.detach().chunk(3):  # three products in one tensor
                nn.init.xavier_uniform_(part)


@register_system("wide-attention", tasks=("text-classification",), scale=_scale, variants=_variants())
def wide_attention(
    *,
    layers: int = 1,
    heads: int = 8,
    total_heads: int | None = None,
    dim: int = 64,
    head_dim: int = 16,
    mlp: int = 128,
    mixer: str = "attention",
    mixer_options: dict[str, Any] | None = None,
    pool: str = "token",
    drop: float = 0.1,
    head_chunk: int | None = None,
    matching: bool = False,
    vocab_size: int = 257,
    max_len: int = 1000,
    num_classes: int = 2,
    pad_id: int = 0,
) -> nn.Module:
    """A text classifier of `layers` layers with `heads` heads each.

    Args:
        total_heads: `layers * heads`, said so that a change of ratio is checked; None: not checked.
        dim: channels of the stream.
        head_dim: channels of a head; the inner width `heads * head_dim` may exceed `dim`.
        mlp: hidden units of each MLP, and of the head.
        mixer: any registered mixer that honours a mask.
        mixer_options: its keywords.
        pool: a class `token` in front, or the `mean` of the words.
        drop: dropout of embeddings, mixers and MLPs.
        head_chunk: heads that run at a time, None for all at once.
        matching: two texts in, one answer out.
        max_len: longest text in tokens.

    Raises:
        ValueError: `layers * heads` is not `total_heads`, or an unknown mixer.
    """
    if total_heads is not None and layers * heads != total_heads:
        raise ValueError(f"layers * heads must be total_heads={total_heads}, got {layers} * {heads} = {layers * heads}")
    token = pool == "token" and not matching
    blocks = []
    for layer in range(layers):
        wanted = dict(heads=heads, head_dim=head_dim, qkv_bias=False, out_bias=False, seed=layer)
        options = options_for(mixer, wanted) | (mixer_options or {})
        mix = create_mixer(mixer, dim, grid=(max_len + token,), **options)
        part = Mlp(dim, mlp, act=partial(nn.GELU, approximate="tanh"), drop=drop)
        blocks.append(WideBlock(dim, mix, part, drop=drop, head_chunk=head_chunk))
    stem = TextStem(vocab_size, dim, max_len, pad_id=pad_id, token=token, positions="sinusoid", drop=drop)
    head = FirstToken() if matching else ClassHead(dim, mlp, num_classes, pool)
    model: nn.Module = Isotropic(stem, blocks, norm=nn.LayerNorm(dim, eps=1e-6), head=head)
    if matching:
        model = Matcher(model, dim, mlp, num_classes)
    _initialise(model)
    return model
