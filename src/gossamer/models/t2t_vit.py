"""T2T-ViT: a deep and narrow ViT whose tokens are made by merging overlapping neighbours, with attention in between.

Source: Yuan et al. 2021, "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet".

- three soft splits (overlapping windows as vectors), a small transformer after each of the first two; the last split
  and the projection behind it are one convolution, here literally so
- the small transformer widens nothing back: its skip starts from the values. Its attention is a Performer with fixed
  features (`tokens="performer"`) or softmax attention scaled by the width of its input (`tokens="softmax"`, `_t_`)
- a window's channels lie innermost here, outermost in released weights, which are reordered on loading
- position table and features are fixed but saved; a table of another resolution is resized (bicubic), as there. The
  authors' maps are square and their token count is `(side // 16)^2`; here any image that the splits fit
- `qk_scale`: models made with the authors' `pretrained` flag scale logits by `dim ** -0.5`, all others by
  `head_dim ** -0.5`; another scale than the latter is carried by the query weights
- ablations: `body="dense"` (blocks grow the width), `"squeeze"` (channels weighted after attention), `"ghost"` (half of
  the products are scaled copies); `_resnext` and `_wide` differ in sizes alone
"""

import re
from collections.abc import Sequence
from functools import partial
from math import ceil, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Conv, LayerNorm, Mlp, TokenStem, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import SqueezeExcite
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.linear import linear
from gossamer.mixers import create_mixer
from gossamer.models._pyramids import BUDGETS
from gossamer.models.registry import State, register_system
from gossamer.ops.attention import attention
from gossamer.ops.linear_attention import linear_attention
from gossamer.trunks import Isotropic

Split = tuple[int, int, int]
"""Kernel, stride and padding of a soft split, in pixels or tokens."""

SPLITS: tuple[Split, ...] = ((7, 4, 2), (3, 2, 1), (3, 2, 1))
# The dense ablation takes its drop-path rates from the start of a line this long, one rate a group.
_DENSE_RATES = 12


def soft_split(x: Float[Tensor, "b h w c"], split: Split) -> Float[Tensor, "b i j e"]:
    """Every window of `x`, zeros around the map, as one vector: rows, then columns, then channels."""
    kernel, stride, padding = split
    b, h, w, c = x.shape
    rows, columns = ((n + 2 * padding - kernel) // stride + 1 for n in (h, w))
    x = F.pad(x, (0, 0, padding, padding, padding, padding))
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        # No strides in an exported graph: one slice for each place in a window.
        down, right = stride * (rows - 1) + 1, stride * (columns - 1) + 1
        places = [(i, j) for i in range(kernel) for j in range(kernel)]
        return torch.cat([x[:, i : i + down : stride, j : j + right : stride] for i, j in places], -1)
    # A row of a window is one run of numbers: a copy by runs is several times quicker than PyTorch's unfold.
    x = x.contiguous()
    line, size = x.stride(1), (b, rows, columns, kernel, kernel * c)
    return x.as_strided(size, (x.stride(0), stride * line, stride * c, line, 1)).flatten(3)


def random_features(x: Float[Tensor, "*b n d"], w: Float[Tensor, "m d"]) -> Float[Tensor, "*b n m"]:
    """`phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)`, in single precision at least: half precision overflows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    logits = x @ w.to(x.dtype).transpose(-2, -1) - x.square().sum(-1, keepdim=True) / 2
    return logits.exp() * w.shape[0] ** -0.5


class TokenTransformer(nn.Module):
    """`y = v + proj(attend(q, k, v))`, `y = y + mlp(norm(y))`, `q, k, v = W norm(x)`, one head.

    Args:
        dim: channels in.
        out: channels out, of the queries and of the hidden layer.
        kind: `performer` (fixed random features, half as many as `out`) or `softmax`.
        drop: dropout before each sum.
    """

    w: nn.Parameter | None

    def __init__(self, dim: int, out: int, kind: str, *, drop: float = 0.0) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * out, bias=kind == "performer")
        self.proj = nn.Linear(out, out)
        self.norm2 = LayerNorm(out)
        self.mlp = Mlp(out, out)
        self.drop = nn.Dropout(drop)
        self.scale = dim**-0.5
        if kind == "performer":
            m = max(1, out // 2)
            rows = nn.init.orthogonal_(torch.empty(m, out)) * sqrt(m)
            self.w = nn.Parameter(rows, requires_grad=False)
        else:
            self.w = None

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h w e"]:
        q, k, v = linear(self.qkv, self.norm1(x)).flatten(1, 2).chunk(3, -1)
        if self.w is None:
            y = attention(q[:, None], k[:, None], v[:, None], scale=self.scale)[:, 0]
        else:
            features = partial(random_features, w=self.w)
            y = linear_attention(q, k, v.to(torch.promote_types(v.dtype, torch.float32)), features, eps=1e-8)
        y = v + self.drop(linear(self.proj, y.to(v.dtype)))
        y = y + self.drop(self.mlp(self.norm2(y)))
        return y.reshape(*x.shape[:3], -1)


class TokensToToken(nn.Module):
    """An image as tokens: soft splits with small transformers between them.

    Args:
        in_chans: image channels.
        dim: token channels; `token_dim` between the splits.
        splits: windows of each split; the last is the convolution that gives the tokens.
        kind: attention of the small transformers; `drop` their dropout.
    """

    def __init__(
        self,
        in_chans: int,
        dim: int,
        token_dim: int,
        splits: Sequence[Split],
        kind: str,
        *,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if kind not in ("performer", "softmax"):
            raise ValueError(f"tokens must be performer or softmax, got {kind!r}")
        self.splits = tuple(splits)
        widths = [in_chans] + [token_dim] * (len(splits) - 1)
        self.levels = nn.ModuleList(
            TokenTransformer(kernel * kernel * width, token_dim, kind, drop=drop)
            for width, (kernel, _, _) in zip(widths, self.splits[:-1], strict=False)
        )
        kernel, stride, padding = self.splits[-1]
        self.project = Conv(widths[-1], dim, kernel, stride=stride, padding=padding)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens for an image of `size`.

        Raises:
            ValueError: the image is too small for the splits.
        """
        height, width = size
        for kernel, stride, padding in self.splits:
            height, width = ((n + 2 * padding - kernel) // stride + 1 for n in (height, width))
            if height < 1 or width < 1:
                raise ValueError(f"img_size={size[0]}x{size[1]} is too small for the splits {self.splits}")
        return height, width

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        x = image.movedim(1, -1)
        for level, split in zip(self.levels, self.splits, strict=False):
            x = level(soft_split(x, split))
        return self.project(x)


class GhostMlp(nn.Module):
    """`y = W2 [u; gelu(s1 * u); gelu(s2 * u)]`, `u = gelu(W1 x)`: three times as wide for one product."""

    def __init__(self, dim: int, *, drop: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, dim)
        self.act = nn.GELU()
        # As a depth-wise 1x1 convolution starts.
        self.scale = nn.Parameter(torch.empty(2, dim).uniform_(-1, 1))
        self.fc2 = nn.Linear(3 * dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b n c"]:
        u = linear(self.fc1, x, self.act)
        ghosts = self.act(u[..., None, :] * self.scale).flatten(-2)
        return self.drop(linear(self.fc2, self.drop(torch.cat((u, ghosts), -1))))


class DenseBlock(Block):
    """A block that adds channels instead of changing those there are: `y = [x; W block(x)]`."""

    def __init__(self, dim: int, growth: int, mixer: nn.Module, mlp: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__(dim, mixer, mlp, norm=LayerNorm, drop_path=drop_path)
        self.grow = nn.Linear(dim, growth)

    def forward(self, x: Float[Tensor, "b n c"], **given: Any) -> Float[Tensor, "b n e"]:
        return torch.cat((x, linear(self.grow, super().forward(x, **given))), -1)


def _innermost(value: Tensor, kernel: int) -> Tensor:
    """The last axis from (channels, rows, columns) of a window to (rows, columns, channels)."""
    return value.unflatten(-1, (-1, kernel * kernel)).transpose(-1, -2).flatten(-2)


def _convert(model: Any, state: State) -> State:
    stem = model.stem
    for i, (kernel, _, _) in enumerate(stem.embed.splits[:-1]):
        level = f"stem.embed.levels.{i}"
        for kind in ("weight", "bias"):
            if f"{level}.kqv.{kind}" in state:
                k, q, v = state.pop(f"{level}.kqv.{kind}").chunk(3)
                state[f"{level}.qkv.{kind}"] = torch.cat((q, k, v))
        for key in (f"{level}.norm1.weight", f"{level}.norm1.bias", f"{level}.qkv.weight"):
            if key in state:
                state[key] = _innermost(state[key], kernel)
    key, kernel = "stem.embed.project.weight", stem.embed.splits[-1][0]
    if key in state:
        state[key] = state[key].unflatten(1, (-1, kernel, kernel))
    table = state.get("stem.positions")
    if table is not None and table.shape != stem.positions.shape:
        side = round((table.shape[1] - 1) ** 0.5)
        state["stem.positions"] = resize_positions(table, (side, side), stem.grid, prefix=1)
    for key in [key for key in state if key.endswith(".mixer.q.weight")]:
        start = key.removesuffix("q.weight")
        parts = [state.pop(f"{start}{name}.weight") for name in "qkv"]
        scales = [state.pop(f"{start}cheap_operation_{name}.weight").flatten() for name in "qkv"]
        state[f"{start}qkv.weight"], state[f"{start}scale"] = torch.cat(parts), torch.stack(scales)
    for key in [key for key in state if key.endswith(".mlp.cheap_operation2.weight")]:
        second = key.replace("operation2", "operation3")
        state[key.replace("cheap_operation2.weight", "scale")] = torch.stack(
            [state.pop(name).flatten() for name in (key, second)]
        )
    if any(".mixer.1." in key for key in state):
        state = {re.sub(r"\.mixer\.(qkv|proj)\.", r".mixer.0.\1.", key): value for key, value in state.items()}
    for key, factor in _query_factors(model, model.config.get("qk_scale")).items():
        rows = state[key].shape[0] // 3
        state[key] = torch.cat((state[key][:rows] * factor, state[key][rows:]))
    return state


def _query_factors(model: Any, qk_scale: float | None) -> dict[str, float]:
    """By what the query rows of each product are multiplied, so that logits have the scale `qk_scale`."""
    if qk_scale is None:
        return {}
    return {
        f"{name}.qkv.weight": qk_scale * sqrt(part.dim // part.heads)
        for name, part in model.named_modules()
        if name.startswith("blocks.") and hasattr(part, "heads")
    }


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    depth, widest = {"xs": (3, 96), "s": (5, 160), "m": (7, 256), "l": (10, 384)}[size]
    side, budget = min(max(spec["img_size"]), 8 * min(spec["img_size"])), BUDGETS[size]
    # Some eight tokens a side.
    first = max(4, ceil(side / 32))
    splits: tuple[Split, ...] = ((max(7, first), first, max(7, first) // 2 - (first - 1) // 2), (3, 2, 1), (3, 2, 1))
    if side < 80:
        near = 1 if side < 12 else 2
        splits = ((7, 4, 2), (3, 2, 1)) if side >= 48 else ((3, near, 1), (3, near, 1))

    def macs(dim: int, width: int) -> tuple[float, float]:
        (height, columns), chans, tokens = spec["img_size"], spec["in_chans"], 0.0
        for i, (kernel, stride, padding) in enumerate(splits):
            height, columns = ((n + 2 * padding - kernel) // stride + 1 for n in (height, columns))
            window = kernel * kernel * chans
            last = i == len(splits) - 1
            tokens += height * columns * (window * dim if last else width * (3 * window + 5 * width))
            chans = width
        n = height * columns + 1
        return tokens, depth * n * dim * (8 * dim + 2 * n)

    choices = [(dim, max(8, dim // 4)) for dim in range(32, widest + 1, 16)]
    dim, width = min(choices, key=lambda choice: abs(sum(macs(*choice)) - budget))
    options: dict[str, Any] = dict(dim=dim, depth=depth, heads=dim // 16, token_dim=width, splits=splits)
    return "t2t_vit_7", {**options, "token_drop": 0.0, "init_std": None, **spec}


_TINY: dict[str, Any] = dict(dim=256, heads=4, mlp_ratio=2.0)
_14: dict[str, Any] = dict(dim=384, depth=14, heads=6)
_19: dict[str, Any] = dict(dim=448, depth=19, heads=7)
_24: dict[str, Any] = dict(dim=512, depth=24, heads=8)
_SOFTMAX: dict[str, Any] = dict(tokens="softmax", token_drop=0.0)


@register_system(
    "t2t-vit",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "t2t_vit_7": {**_TINY, "depth": 7},
        "t2t_vit_10": {**_TINY, "depth": 10},
        "t2t_vit_12": {**_TINY, "depth": 12},
        "t2t_vit_14": _14,
        "t2t_vit_19": _19,
        "t2t_vit_24": _24,
        "t2t_vit_t_14": {**_14, **_SOFTMAX},
        "t2t_vit_t_19": {**_19, **_SOFTMAX},
        "t2t_vit_t_24": {**_24, **_SOFTMAX},
        "t2t_vit_14_resnext": {**_14, "heads": 32},
        "t2t_vit_14_wide": dict(dim=768, depth=4, heads=12),
        "t2t_vit_dense": dict(dim=128, heads=8, mlp_ratio=2.0, body="dense"),
        "t2t_vit_14_se": {**_14, "body": "squeeze"},
        "t2t_vit_16_ghost": {**_14, "depth": 16, "body": "ghost"},
    },
    rules=[
        (r"^(cls_token)$", "stem.tokens"),
        (r"^pos_embed$", "stem.positions"),
        (r"^tokens_to_token\.attention1\.", "stem.embed.levels.0."),
        (r"^tokens_to_token\.attention2\.", "stem.embed.levels.1."),
        (r"^tokens_to_token\.", "stem.embed."),
        (r"^(stem\.embed\.levels\.\d)\.attn\.", r"\1."),
        (r"^(stem\.embed\.levels\.\d\.mlp)\.0\.", r"\1.fc1."),
        (r"^(stem\.embed\.levels\.\d\.mlp)\.2\.", r"\1.fc2."),
        (r"\.attn\.se_layer\.fc\.0\.", ".mixer.1.fc1."),
        (r"\.attn\.se_layer\.fc\.2\.", ".mixer.1.fc2."),
        (r"\.attn\.", ".mixer."),
        (r"\.dense_linear\.", ".grow."),
        (r"^(blocks\.\d+)\.linear\.", r"\1.0."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def t2t_vit(
    *,
    dim: int = 256,
    depth: int = 7,
    heads: int = 4,
    mlp_ratio: float = 3.0,
    token_dim: int = 64,
    tokens: str = "performer",
    token_drop: float = 0.1,
    splits: Sequence[Split] = SPLITS,
    body: str = "plain",
    groups: Sequence[int] = (3, 6, 6, 4),
    growth: int = 64,
    qk_scale: float | None = None,
    init_std: float | None = 0.02,
    drop: float = 0.0,
    drop_path: float = 0.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
) -> nn.Module:
    """A tokens-to-token vision transformer.

    Args:
        token_dim: channels between the soft splits; `token_drop` the dropout there.
        tokens: attention between the soft splits.
        splits: kernel, stride and padding of each soft split.
        body: `plain`, or one of the paper's ablations. `dense` takes `groups` (blocks between transitions) and
            `growth` (channels a block adds) in place of `depth`.
        qk_scale: what logits of the blocks are multiplied by, `head_dim ** -0.5` by default.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.

    Raises:
        ValueError: unknown `tokens` or `body`, heads that do not divide `dim`, an image too small for the splits, or
            a ghost body whose `mlp_ratio` is not 3.
    """
    if body not in ("plain", "squeeze", "ghost", "dense"):
        raise ValueError(f"body must be plain, squeeze, ghost or dense, got {body!r}")
    if body == "ghost" and mlp_ratio != 3:
        raise ValueError(f"a ghost body has mlp_ratio=3 (a product and two copies of it), got {mlp_ratio}")
    embed = TokensToToken(in_chans, dim, token_dim, splits, tokens, drop=token_drop)
    grid = embed.grid(pair(img_size))
    stem = TokenStem(embed, dim, grid, positions="sinusoid", drop=drop)
    # Not trained, but a parameter of released weights.
    table = stem.positions
    del stem.positions
    assert table is not None
    stem.positions = nn.Parameter(table, requires_grad=False)

    def mixer(width: int) -> nn.Module:
        if body == "ghost":
            return create_mixer("ghost_attention", width, heads=heads, drop=drop)
        mix = create_mixer("attention", width, heads=heads, qkv_bias=False, drop=drop)
        return nn.Sequential(mix, _squeeze(width)) if body == "squeeze" else mix

    def mlp(width: int) -> nn.Module:
        return GhostMlp(width, drop=drop) if body == "ghost" else Mlp(width, int(width * mlp_ratio), drop=drop)

    blocks: list[nn.Module] = []
    if body == "dense":
        for i, (count, rate) in enumerate(zip(groups, drop_path_rates(drop_path, _DENSE_RATES), strict=False)):
            if i:
                blocks.append(nn.Sequential(nn.Linear(dim, dim // 2), nn.GELU()))
                dim //= 2
            for width in range(dim, dim + count * growth, growth):
                blocks.append(DenseBlock(width, growth, mixer(width), mlp(width), drop_path=rate))
            dim += count * growth
    else:
        blocks += [Block(dim, mixer(dim), mlp(dim), drop_path=rate) for rate in drop_path_rates(drop_path, depth)]
    model = Isotropic(stem, blocks, norm=LayerNorm(dim), head=Classifier(dim, num_classes, pool="token"))
    init_transformer(model, init_std)
    # The convolution is a linear layer in disguise.
    weight = embed.project.get_parameter("weight")
    nn.init.trunc_normal_(weight, std=init_std or weight[0].numel() ** -0.5)
    nn.init.zeros_(embed.project.get_parameter("bias"))
    with torch.no_grad():
        for key, factor in _query_factors(model, qk_scale).items():
            weight = model.get_parameter(key)
            weight[: weight.shape[0] // 3] *= factor
    return model


def _squeeze(dim: int) -> SqueezeExcite:
    """The authors' has no biases."""
    part = SqueezeExcite(dim, dim // 16, act=nn.ReLU)
    part.fc1.register_parameter("bias", None)
    part.fc2.register_parameter("bias", None)
    return part
