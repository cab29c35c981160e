"""Compact Transformers: ViT-Lite, CVT and CCT, transformers that train from scratch on small data; image and text.

Source: Hassani et al. 2021, "Escaping the Big Data Paradigm with Compact Transformers".

- three steps from ViT: small patches and a class token (ViT-Lite), sequence pooling in place of the token (CVT), a
  convolutional tokeniser in place of the patches (CCT)
- the second residual of a block starts from the normalised stream (`residual="stream"`)
- a sinusoid table is a frozen parameter, as there, so that parameter counts agree; it is rebuilt, not loaded
- a learned table of another resolution is resized bilinearly, as there; another number of classes is refused
- text, where the released code fails: it adds a table with one row more than there are tokens, and its tokenisers
  give attention a mask it refuses. Here the row for padding is skipped, the mask reaches attention and pooling, and
  texts shorter than `max_len` run; `official=True` keeps the literal form
- the released code's `padding_idx` is 1; here `pad_id` is 0 by default, as everywhere in Gossamer
"""

from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, TokenStem, resize_positions, sinusoid
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.embed import Positions, pair
from gossamer.layers.init import init_transformer
from gossamer.layers.positions import table_layout
from gossamer.layers.tokenizer import ConvTokenizer, TextTokenizer
from gossamer.mixers import create_mixer, options_for
from gossamer.models.registry import State, register_system
from gossamer.trunks import Isotropic

# The authors' tables start ten times wider than is usual.
POSITION_STD = 0.2


class CompactTextStem(nn.Module):
    """Words, tokenised by a convolution if wanted, a class token if wanted, positions; padding is masked.

    Args:
        vocab_size: rows of the embedding table.
        word_dim: channels of a word vector.
        dim: channels of a token.
        tokenizer: word vectors and mask to tokens and mask, or None.
        tokens: token count of a text of the longest length.
        max_len: longest text in words.
        pad_id: the id that stands for no word.
        token: put a learned class token in front.
        official: the released code's literal form: the table has a row more than there are tokens and is added
            whole, so that it only runs on texts with one token more; tokenisers ignore padding.
    """

    def __init__(
        self,
        vocab_size: int,
        word_dim: int,
        dim: int,
        tokenizer: TextTokenizer | None,
        tokens: int,
        *,
        max_len: int,
        pad_id: int = 0,
        token: bool = False,
        positions: Positions | None = "sinusoid",
        official: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.max_len = max_len
        self.official = official
        self.words = nn.Embedding(vocab_size, word_dim, padding_idx=pad_id)
        self.tokenizer = tokenizer
        self.tokens = nn.Parameter(torch.zeros(1, 1, dim)) if token else None
        rows = tokens + token
        self.positions: nn.Parameter | Tensor | None = None
        if positions == "learned":
            table = nn.init.trunc_normal_(torch.empty(1, rows + official, dim), std=POSITION_STD)
            self.positions = nn.Parameter(table)
        elif positions == "sinusoid":
            table = sinusoid(rows, dim)[None]
            table = torch.cat((torch.zeros(1, 1, dim), table), 1) if official else table
            self.positions = nn.Parameter(table, requires_grad=False)
        self.drop = nn.Dropout(drop)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b t c"], Bool[Tensor, "b t"] | None]:
        if ids.shape[1] > self.max_len and not self.official:
            raise ValueError(f"text is {ids.shape[1]} tokens long, the model takes {self.max_len} (max_len)")
        x: Tensor = self.words(ids)
        mask: Tensor | None = None if self.official and self.tokenizer is not None else ids != self.pad_id
        if self.tokenizer is not None:
            x, mask = self.tokenizer(x, mask)
        elif mask is not None:
            x = x * mask[..., None].to(x.dtype)
        if self.tokens is not None:
            x = torch.cat((self.tokens.expand(len(x), -1, -1), x), 1)
            mask = None if mask is None else torch.cat((torch.ones_like(mask[:, :1]), mask), 1)
        if self.positions is not None:
            rows = self.positions.shape[1]
            if self.official and x.shape[1] != rows:
                raise ValueError(f"official=True adds all {rows} rows of its table; the text gives {x.shape[1]} tokens")
            x = x + self.positions[:, : x.shape[1]]
        return self.drop(x), mask


def _convert(model: Any, state: State) -> State:
    stem = model.stem
    if isinstance(stem, CompactTextStem) and "stem.tokenizer.conv.weight" in state:
        # (dim, 1, words, channels of a word), a convolution over an image of one channel.
        state["stem.tokenizer.conv.weight"] = state["stem.tokenizer.conv.weight"][:, 0].transpose(1, 2)
    table = state.get("stem.positions")
    if table is None or stem.positions is None:
        return state
    if not stem.positions.requires_grad:
        state["stem.positions"] = stem.positions.detach()
    elif isinstance(stem, CompactTextStem):
        # The first row is for a padding token that no text has.
        state["stem.positions"] = table if stem.official else table[:, 1:]
    else:
        prefix = 0 if stem.tokens is None else 1
        old = table_layout(table.shape[1] - prefix, stem.grid)[1]
        state["stem.positions"] = resize_positions(table, old, stem.grid, prefix=prefix, mode="bilinear")
    return state


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    if "vocab_size" in spec:
        dim, depth, word_dim = {"xs": (64, 2, 64), "s": (128, 2, 128), "m": (192, 4, 192), "l": (256, 6, 256)}[size]
        kernel = min(2, spec["max_len"])
        options = dict(dim=dim, depth=depth, heads=dim // 32, mlp_ratio=2.0, word_dim=word_dim, kernel=kernel)
        return "text_cct_2", {**options, **spec}
    target, depth, widest = {"xs": (5, 2, 64), "s": (28, 2, 128), "m": (95, 4, 192), "l": (320, 6, 256)}[size]
    side = max(spec["img_size"])
    # A 3x3 tokeniser halves the grid at each repeat, a 7x7 one quarters it: large images cannot afford small steps.
    if side < 80:
        kernel, convs = 3, 1 if side < 20 else 2 if side < 48 else 3
    else:
        kernel, convs = 7, 3 if side > 320 or (side > 140 and size in ("xs", "s")) else 2
    shape: dict[str, Any] = dict(depth=depth, kernel=kernel, convs=convs, mlp_ratio=2.0)
    choices = [
        dict(dim=dim, hidden=max(4, dim * share // 48)) for dim in range(32, widest + 1, 32) for share in (8, 16)
    ]
    best = min(choices, key=lambda choice: abs(_macs(spec, **shape, **choice) - target * 1e6))
    # Short training wants all of its steps: no dropped weights or paths.
    calm = dict(heads=best["dim"] // 32, attn_drop=0.0, drop_path=0.0)
    return "cct_2_3x2_32", {**shape, **best, **calm, **spec}


def _macs(spec: dict[str, Any], dim: int, depth: int, hidden: int, kernel: int, convs: int, mlp_ratio: float) -> float:
    """Multiply-adds of a CCT on one image, attention products included."""
    total, size = 0, spec["img_size"]
    widths = [spec["in_chans"], *[hidden] * (convs - 1), dim]
    for a, b in pairwise(widths):
        conv = ConvTokenizer(1, 1, kernel, pool=True)
        before = [(n + 2 * conv.padding - kernel) // conv.stride + 1 for n in size]
        total += kernel * kernel * a * b * before[0] * before[1]
        size = conv.grid(size)
    tokens = size[0] * size[1]
    return total + depth * tokens * dim * ((4 + 2 * mlp_ratio) * dim + 2 * tokens)


_2: dict[str, Any] = dict(dim=128, depth=2, heads=2, mlp_ratio=1)
_4: dict[str, Any] = dict(dim=128, depth=4, heads=2, mlp_ratio=1)
_6: dict[str, Any] = dict(dim=256, depth=6, heads=4, mlp_ratio=2)
_7: dict[str, Any] = dict(dim=256, depth=7, heads=4, mlp_ratio=2)
_14: dict[str, Any] = dict(dim=384, depth=14, heads=6, mlp_ratio=3)
_SIZES = {2: _2, 4: _4, 6: _6, 7: _7}
_SINE: dict[str, Any] = dict(positions="sinusoid")
_C100: dict[str, Any] = dict(num_classes=100)
_FLOWERS: dict[str, Any] = dict(num_classes=102)
_TEXT: dict[str, Any] = dict(vocab_size=100_000, kernel=4, num_classes=1000, positions="sinusoid")


def _image_variants() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, sizes in (
        ("cct_2_3x2_32", {**_2, "convs": 2}),
        ("cct_4_3x2_32", {**_4, "convs": 2}),
        ("cct_6_3x1_32", _6),
        ("cct_6_3x2_32", {**_6, "convs": 2}),
        ("cct_7_3x1_32", _7),
        ("cct_7_3x2_32", {**_7, "convs": 2}),
        ("cct_7_7x2_224", {**_7, **_FLOWERS, "kernel": 7, "convs": 2, "img_size": 224}),
        *((f"{f}_{n}_4_32", {**s, "family": f, "kernel": 4}) for f in ("cvt", "vit") for n, s in _SIZES.items()),
    ):
        found[name] = sizes
        found[f"{name}_sine"] = {**sizes, **_SINE}
    found["cct_7_3x1_32_c100"] = {**_7, **_C100}
    found["cct_7_3x1_32_sine_c100"] = {**_7, **_C100, **_SINE}
    found["cct_14_7x2_224"] = {**_14, "kernel": 7, "convs": 2, "img_size": 224, "num_classes": 1000}
    found["cct_14_7x2_384"] = {**found["cct_14_7x2_224"], "img_size": 384}
    found["cct_14_7x2_384_fl"] = {**found["cct_14_7x2_384"], **_FLOWERS}
    return found


def _text_variants() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for depth, sizes in ((2, _2), (4, _4), (6, _6)):
        found[f"text_cct_{depth}"] = {**sizes, **_TEXT}
        found[f"text_cvt_{depth}"] = {**sizes, **_TEXT, "family": "cvt", "dim": 128}
        found[f"text_vit_{depth}"] = {**sizes, **_TEXT, "family": "vit"}
        found[f"text_transformer_{depth}"] = {**sizes, **_TEXT, "family": "transformer", "dim": 300}
    return found


@register_system(
    "compact-transformers",
    tasks=("image-classification", "text-classification"),
    scale=_scale,
    variants={**_image_variants(), **_text_variants()},
    rules=[
        (r"^tokenizer\.conv_layers\.(\d+)\.0\.", r"stem.embed.convs.\1."),
        (r"^tokenizer\.conv_layers\.0\.weight$", "stem.tokenizer.conv.weight"),
        (r"^embedder\.embeddings\.", "stem.words."),
        (r"^classifier\.class_emb$", "stem.tokens"),
        (r"^classifier\.positional_emb$", "stem.positions"),
        (r"^classifier\.attention_pool\.", "head.pool.score."),
        (r"^classifier\.fc\.", "head.fc."),
        (r"^classifier\.", ""),
        (r"\.norm1\.", ".norm2."),
        (r"\.pre_norm\.", ".norm1."),
        (r"\.self_attn\.", ".mixer."),
        (r"\.linear([12])\.", r".mlp.fc\1."),
    ],
    convert=_convert,
)
def compact_transformer(
    *,
    family: Literal["vit", "cvt", "cct", "transformer"] = "cct",
    dim: int = 256,
    depth: int = 7,
    heads: int = 4,
    mlp_ratio: float = 2.0,
    kernel: int = 3,
    convs: int = 1,
    hidden: int = 64,
    positions: Positions | None = "learned",
    drop: float = 0.0,
    attn_drop: float = 0.1,
    drop_path: float = 0.1,
    mixer: str = "attention",
    mixer_options: dict[str, Any] | None = None,
    num_classes: int = 10,
    img_size: int | tuple[int, int] = 32,
    in_chans: int = 3,
    vocab_size: int | None = None,
    word_dim: int = 300,
    max_len: int = 64,
    pad_id: int = 0,
    official: bool = False,
) -> nn.Module:
    """A compact transformer for images, or for text where `vocab_size` is given.

    Args:
        family: `vit` patches and a class token, `cvt` patches and sequence pooling, `cct` convolutional tokens and
            sequence pooling; `transformer` (text) words as they are and a class token, `word_dim` is then `dim`.
        kernel: side of the tokeniser's convolutions, or of a patch.
        convs: repeats of the tokeniser; `hidden` channels between them.
        positions: `learned`, `sinusoid` or None (then images of any size run).
        mixer: name of a mixer in attention's place; with a class token it must work on sequences.
        official: text in the released code's literal form, see `CompactTextStem`.

    Raises:
        ValueError: a patch does not divide the image or the longest text, heads do not divide `dim`, or a family
            that reads no images.
    """
    conv, token = family == "cct", family in ("vit", "transformer")
    stem: nn.Module
    if vocab_size is not None:
        if not conv and family != "transformer" and max_len % kernel:
            raise ValueError(f"kernel must divide max_len; got kernel={kernel}, max_len={max_len}")
        word_dim = dim if family == "transformer" else word_dim
        tokenizer = None if family == "transformer" else TextTokenizer(word_dim, dim, kernel, max_len, pool=conv)
        tokens = max_len if tokenizer is None else tokenizer.length(max_len)
        stem = CompactTextStem(
            vocab_size,
            word_dim,
            dim,
            tokenizer,
            tokens,
            max_len=max_len,
            pad_id=pad_id,
            token=token,
            positions=positions,
            official=official,
            drop=drop,
        )
        grid: tuple[int, ...] = (tokens + token,)
    else:
        size = pair(img_size)
        if family == "transformer":
            raise ValueError("family 'transformer' reads text; give vocab_size, or one of vit, cvt, cct for images")
        if not conv and any(side % kernel for side in size):
            raise ValueError(f"kernel (the patch) must divide the image; got kernel={kernel}, img_size={size}")
        embed = ConvTokenizer(in_chans, dim, kernel, convs=convs, hidden=hidden, pool=conv)
        grid = embed.grid(size)
        stem = TokenStem(
            embed,
            dim,
            embed.grid(size),
            tokens=int(token),
            positions=positions,
            position_std=POSITION_STD,
            drop=drop,
            flat=token,
        )
        if positions == "sinusoid":
            table = stem.positions
            del stem.positions
            assert table is not None
            stem.positions = nn.Parameter(table, requires_grad=False)
        grid = (grid[0] * grid[1] + 1,) if token else grid
    own = options_for(mixer, {"heads": heads, "qkv_bias": False, "attn_drop": attn_drop, "drop": drop})
    options = {**own, **(mixer_options or {})}
    blocks = [
        Block(
            dim,
            create_mixer(mixer, dim, grid=grid, **options),
            Mlp(dim, int(dim * mlp_ratio), drop=drop),
            residual="stream",
            drop_path=rate,
        )
        for rate in drop_path_rates(drop_path, depth)
    ]
    head = Classifier(dim, num_classes, pool="token" if token else "sequence")
    model = Isotropic(stem, blocks, norm=nn.LayerNorm(dim), head=head)
    init_transformer(model)
    if stem.tokens is not None:
        nn.init.zeros_(stem.tokens)
    return model
