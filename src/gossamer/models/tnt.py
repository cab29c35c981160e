"""TNT, Transformer in Transformer: sentences are patches, words are pieces of a patch, and each block runs on both.

Source: Han et al. 2021, "Transformer in Transformer".

- in a block, the words of each patch attend to each other; their projection is added to the patch's sentence; then the
  sentences and the class token attend to each other. The class token has no words
- a word is a 7x7 convolution with stride 4 over its own patch, zeros around it: no patch sees another's pixels
- drop path falls on words per patch, on sentences per image; the sum of the two streams is never dropped
- released weights keep queries and keys apart from values, here they are one product; their `outer_tokens` is a table
  of zeros that nothing reads, and is left out
- sentence positions of another resolution are resized (bicubic); word positions are the same for every patch
- texture finer than a patch is learnt from few images: 1,000 of striped cells of 4x4 pixels, four seeds, 94 to 97 %
  right after 200 steps, a ViT of as many parameters or of more cost 74 to 82 %
- `tnt_ti` is described in the paper alone. The released code's squeeze-and-excitation, in no variant, is not here
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, LayerNorm, Mlp, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import Conv2d
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.linear import linear
from gossamer.mixers import create_mixer
from gossamer.models._pyramids import BUDGETS
from gossamer.models.registry import State, register_system


class WordEmbed(nn.Module):
    """Each patch by itself, zeros around it, through a 7x7 convolution: `(patch / stride)^2` words.

    Args:
        patch: side of a patch in pixels.
        stride: step between words in pixels.

    Raises:
        ValueError: `stride` does not divide `patch`.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, stride: int) -> None:
        super().__init__()
        if patch % stride:
            raise ValueError(f"stride must divide patch; got stride={stride}, patch={patch}")
        self.patch = patch
        self.words = (patch // stride) ** 2
        self.proj = Conv2d(in_chans, dim, 7, stride, 3)

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "p m c"]:
        (b, i, height, width), p = image.shape, self.patch
        grid = image.reshape(b, i, height // p, p, width // p, p)
        # Channels first: with a handful of channels on so small a map that is the quicker layout.
        patches = grid.permute(0, 2, 4, 1, 3, 5).reshape(-1, i, p, p)
        return self.proj(patches).flatten(2).transpose(1, 2).contiguous()


class Join(nn.Module):
    """The words of a patch as one vector of a sentence's width: `y = norm2(W norm1([w_1; …; w_m]))`."""

    def __init__(self, words: int, inner: int, outer: int, *, bias: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(words * inner)
        self.proj = nn.Linear(words * inner, outer, bias)
        self.norm2 = LayerNorm(outer)

    def forward(self, words: Float[Tensor, "p m c"]) -> Float[Tensor, "p d"]:
        return self.norm2(linear(self.proj, self.norm1(words.flatten(1))))


class TntBlock(nn.Module):
    """`Y = inner(Y)`, `Z = outer([z_class; z_i + join(Y_i)])`.

    Args:
        inner: block of the words of each patch.
        join: words to what is added to their sentence.
        outer: block of the sentences.
    """

    def __init__(self, inner: Block, join: Join, outer: Block) -> None:
        super().__init__()
        self.inner = inner
        self.join = join
        self.outer = outer

    def forward(
        self, sentences: Float[Tensor, "b n d"], words: Float[Tensor, "p m c"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "p m c"]]:
        words = self.inner(words)
        told = sentences[:, 1:] + self.join(words).unflatten(0, (sentences.shape[0], -1))
        return self.outer(torch.cat((sentences[:, :1], told), 1)), words


class Tnt(nn.Module):
    """Words, sentences, blocks on both, a classifier that reads the class token.

    Args:
        size: height and width of the images.
        embed: image to words.
        join: words to sentences.
        dims: width of a word and of a sentence.
        blocks: applied in turn.
        head: sentences to logits, with a norm.
        pad: fill images up with zeros, below and to the right, to whole patches.
    """

    def __init__(
        self,
        size: tuple[int, int],
        embed: WordEmbed,
        join: Join,
        dims: tuple[int, int],
        blocks: list[TntBlock],
        head: Classifier,
        *,
        pad: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.size = size
        self.pad = pad
        self.grid = (-(-size[0] // embed.patch), -(-size[1] // embed.patch))
        self.embed = embed
        self.join = join
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dims[1]), std=0.02))
        rows = self.grid[0] * self.grid[1] + 1
        self.inner_positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, embed.words, dims[0]), std=0.02))
        self.outer_positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, dims[1]), std=0.02))
        self.drop = nn.Dropout(drop)
        self.blocks = nn.ModuleList(blocks)
        self.head = head

    def encode(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b n d"]:
        """Class token and sentences after the last block, not normalised."""
        if tuple(image.shape[2:]) != self.size:
            raise ValueError(
                f"the position table is for {self.size[0]}x{self.size[1]} images, got "
                f"{image.shape[2]}x{image.shape[3]}; build the model with img_size= of the image"
            )
        if self.pad:
            p = self.embed.patch
            image = F.pad(image, (0, -image.shape[3] % p, 0, -image.shape[2] % p))
        words = self.embed(image) + self.inner_positions
        sentences = self.join(words).unflatten(0, (image.shape[0], -1))
        sentences = torch.cat((self.token.expand(image.shape[0], -1, -1), sentences), 1)
        sentences = self.drop(sentences + self.outer_positions)
        for block in self.blocks:
            sentences, words = block(sentences, words)
        return sentences

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b k"]:
        return self.head(self.encode(image))

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b h w c"]]:
        """The one map it has: the normalised sentences."""
        return [cast(Any, self.head).norm(self.encode(image)[:, 1:]).unflatten(1, self.grid)]


def _convert(model: Any, state: State) -> State:
    for key in [key for key in state if ".mixer.qk." in key]:
        state[key.replace(".qk.", ".qkv.")] = torch.cat((state.pop(key), state.pop(key.replace(".qk.", ".v."))))
    table = state.get("outer_positions")
    if table is not None and table.shape != model.outer_positions.shape:
        side = round((table.shape[1] - 1) ** 0.5)
        state["outer_positions"] = resize_positions(table, (side, side), model.grid, prefix=1)
    return state


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    depth, widest = {"xs": (2, 64), "s": (4, 96), "m": (6, 160), "l": (8, 224)}[size]
    height, width = spec["img_size"]
    # Some eight patches a side, of sixteen words each where they have as many pixels.
    words = 2 if max(height, width) < 24 else 4
    stride = max(1, round(max(height, width) / (8 * words)))
    patch = words * stride
    n, m = -(-height // patch) * -(-width // patch), words * words

    def macs(inner: int, outer: int) -> float:
        mix = n * m * inner * (12 * inner + 2 * m) + n * outer * (12 * outer + 2 * n)
        return n * m * inner * 49 * spec["in_chans"] + depth * (mix + n * m * inner * outer)

    choices = [(max(8, outer // 64 * 8), outer) for outer in range(32, widest + 1, 16)]
    inner, outer = min(choices, key=lambda widths: abs(macs(*widths) - BUDGETS[size]))
    heads = dict(inner_heads=inner // 4, outer_heads=outer // 16)
    options: dict[str, Any] = dict(inner_dim=inner, outer_dim=outer, depth=depth, patch=patch, stride=stride, **heads)
    return "tnt_s", {**options, "pad": bool(height % patch or width % patch), **spec}


_TI: dict[str, Any] = dict(inner_dim=12, outer_dim=192, inner_heads=2, outer_heads=3)
_S: dict[str, Any] = dict(inner_dim=24, outer_dim=384, inner_heads=4, outer_heads=6)
_B: dict[str, Any] = dict(inner_dim=40, outer_dim=640, inner_heads=4, outer_heads=10)


@register_system(
    "tnt",
    tasks=("image-classification",),
    scale=_scale,
    variants={"tnt_ti": _TI, "tnt_s": _S, "tnt_b": _B, "tnt_s_patch16_224": _S, "tnt_b_patch16_224": _B},
    rules=[
        (r"^outer_tokens$", None),
        (r"^cls_token$", "token"),
        (r"^(inner|outer)_pos$", r"\1_positions"),
        (r"^patch_embed\.", "embed."),
        (r"^((?:blocks\.\d+\.)?)proj\.", r"\1join.proj."),
        (r"^((?:blocks\.\d+\.)?)proj_norm([12])\.", r"\1join.norm\2."),
        (r"\.(inner|outer)_attn\.", r".\1.mixer."),
        (r"\.(inner|outer)_(norm[12]|mlp)\.", r".\1.\2."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def tnt(
    *,
    inner_dim: int = 24,
    outer_dim: int = 384,
    depth: int = 12,
    inner_heads: int = 4,
    outer_heads: int = 6,
    patch: int = 16,
    stride: int = 4,
    mlp_ratio: float = 4.0,
    drop: float = 0.0,
    drop_path: float = 0.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    pad: bool = False,
) -> nn.Module:
    """A transformer in a transformer.

    Args:
        inner_dim: channels of a word; `outer_dim` of a sentence, likewise the heads.
        patch: side of a patch in pixels.
        stride: step between the words of a patch in pixels.
        pad: fill an image that `patch` does not divide up with zeros.

    Raises:
        ValueError: `patch` does not divide the image and `pad` is False, `stride` does not divide `patch`, or heads
            do not divide their width.
    """
    height, width = pair(img_size)
    if not pad and (height % patch or width % patch):
        raise ValueError(f"patch must divide the image; got patch={patch}, img_size={height}x{width}; or give pad=True")
    embed = WordEmbed(in_chans, inner_dim, patch, stride)

    def block(dim: int, heads: int, rate: float) -> Block:
        mixer = create_mixer("attention", dim, heads=heads, qkv_bias=False, drop=drop)
        return Block(dim, mixer, Mlp(dim, int(dim * mlp_ratio), drop=drop), drop_path=rate)

    blocks = [
        TntBlock(
            block(inner_dim, inner_heads, rate),
            Join(embed.words, inner_dim, outer_dim, bias=False),
            block(outer_dim, outer_heads, rate),
        )
        for rate in drop_path_rates(drop_path, depth)
    ]
    join = Join(embed.words, inner_dim, outer_dim, bias=True)
    head = Classifier(outer_dim, num_classes, pool="token", norm=LayerNorm)
    model = Tnt((height, width), embed, join, (inner_dim, outer_dim), blocks, head, pad=pad, drop=drop)
    init_transformer(model)
    return model
