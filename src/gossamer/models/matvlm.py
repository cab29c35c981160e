"""MaTVLM: a vision-language model some of whose decoder layers are Mamba-2 layers in attention's place.

Source: Li et al. 2025, "MaTVLM: Hybrid Mamba-Transformer for Efficient Vision-Language Modeling"; the model it starts
from is Zhou et al. 2024, "TinyLLaVA" (SigLIP, Zhai et al. 2023; Phi-2, Li et al. 2023).

- decoder blocks have one norm, which attention and MLP both read, and one sum (parallel residual)
- attention turns the first 32 of a head's 80 channels; Mamba-2 layers have no rotary positions, nor biases
- an image is spliced in where its placeholder stands among the words, after a two-layer map to the words' width
- the tower's last block, norm and pooling are not built: its answer is read one block before the end
- the released code passes over the first patch by default, a rule made for towers with a class token; here all 729
  are read, as the paper says, and `skip_first` leaves the first one out
- samples may differ in placeholders; the released code wants an unread image for a text without, ours does not
- turning a trained decoder into this is the pass `matvlm` of `gossamer.shrink`
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers import Block, Mlp, PatchEmbed, TokenStem
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.language import WordHead, WordStem
from gossamer.mixers import Mixer, create_mixer
from gossamer.mixers.rotary import RotaryAttention
from gossamer.models.registry import State, register_system
from gossamer.ops.rotary import rotary_frequencies, rotate
from gossamer.trunks import Isotropic

IMAGE = -200
IGNORE = -100


class PartialRotaryAttention(RotaryAttention):
    """Rotary attention that turns the first `turned` channels of a head and leaves the others.

    Args:
        dim: channels.
        turned: channels of a head, even.
        options: of `RotaryAttention`.
    """

    def __init__(self, dim: int, *, turned: int, **options: Any) -> None:
        super().__init__(dim, **options)
        if not 0 < turned <= self.head_dim:
            raise ValueError(f"turned must be in 1..{self.head_dim} (channels of a head), got {turned}")
        self.turned = turned
        self.register_buffer("frequencies", rotary_frequencies(turned, options.get("base", 10000.0)), persistent=False)

    def project(self, x: Float[Tensor, "b n c"], start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super(RotaryAttention, self).project(x)
        f = self.frequencies.float()
        positions = torch.arange(start, start + x.shape[1], device=x.device, dtype=torch.float32)
        q, k = (torch.cat((rotate(t[..., : self.turned], positions, f), t[..., self.turned :]), -1) for t in (q, k))
        return q, k, v


class ParallelBlock(Block):
    """`y = x + drop(mixer(norm(x))) + drop(mlp(norm(x)))`: one norm that both branches read.

    Source: Wang and Komatsuzaki 2021, "GPT-J-6B"; Black et al. 2022, "GPT-NeoX-20B", section 2.1.2.
    """

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, *, norm: Any = nn.LayerNorm, drop: float = 0.0):
        # The style nearest to it: one norm, one sum.
        super().__init__(dim, mixer, mlp, norm=norm, residual="single")
        self.residual = "parallel"  # type: ignore[assignment]
        self.drop = nn.Dropout(drop)

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        *,
        mask: Bool[Tensor, "b *grid"] | None = None,
        context: Float[Tensor, "b m e"] | None = None,
    ) -> Float[Tensor, "b *grid c"]:
        given = {k: v for k, v in (("mask", mask), ("context", context)) if v is not None}
        read = self.norm1(x)
        return x + self.drop(self.mixer(read, **given)) + self.drop(self.mlp(read))

    def step(self, x_t: Float[Tensor, "b c"], state: Any) -> tuple[Float[Tensor, "b c"], Any]:
        read = self.norm1(x_t[:, None])
        y, state = self.mixer.step(read[:, 0], state)
        return x_t + self.drop(y) + self.drop(self.mlp(read)[:, 0]), state


class VisionWordStem(WordStem):
    """Words, and images where their placeholders stand: `connector(vision(image))`, one token a patch.

    Args:
        vision: images to tokens by its `encode`.
        connector: its width to the words'.
        image_id: the id that stands for an image.
        skip_first: leave the first patch out.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        max_len: int,
        *,
        vision: Isotropic,
        connector: nn.Module,
        image_id: int = IMAGE,
        skip_first: bool = False,
    ) -> None:
        super().__init__(vocab_size, dim, max_len, learned=False)
        self.vision = vision
        self.connector = connector
        self.image_id = image_id
        self.skip_first = skip_first

    def forward(self, ids: Int[Tensor, "b n"] | Float[Tensor, "b n c"]) -> tuple[Float[Tensor, "b n c"], None]:
        """Ids without images, or the tokens that `see` made."""
        if not ids.is_floating_point():
            return super().forward(ids)
        if ids.shape[1] > self.max_len:
            raise ValueError(f"text and images are {ids.shape[1]} tokens, the model takes {self.max_len} (max_len)")
        return ids, None

    def see(
        self,
        ids: Int[Tensor, "b n"],
        images: Float[Tensor, "i k height width"],
        labels: Int[Tensor, "b n"] | None = None,
    ) -> tuple[Float[Tensor, "b m c"], Int[Tensor, "b m"] | None]:
        """Tokens of words and images, and the labels that belong to them, see `splice`."""
        holes = ids == self.image_id
        patches = self.vision.encode(images)[0][:, int(self.skip_first) :]
        return splice(self.words(ids.masked_fill(holes, 0)), self.connector(patches), holes, labels)


def splice(
    words: Float[Tensor, "b n c"],
    images: Float[Tensor, "i p c"],
    holes: Bool[Tensor, "b n"],
    labels: Int[Tensor, "b n"] | None = None,
) -> tuple[Float[Tensor, "b m c"], Int[Tensor, "b m"] | None]:
    """`words` with the tokens of an image in each hole, in order; shorter rows are filled up behind with zeros.

    Args:
        labels: of the words; tokens of images and of what is filled up get -100.

    Raises:
        ValueError: not as many images as holes.
    """
    row, column = holes.nonzero(as_tuple=True)
    if len(row) != len(images):
        raise ValueError(f"each image needs its placeholder; got {len(images)} images, {len(row)} placeholders")
    patches = images.shape[1]
    lengths = torch.where(holes, patches, 1)
    ends = lengths.cumsum(1)
    longest = int(ends[:, -1].max())
    # Where each word goes; a hole's own embedding lands on its first patch and is written over.
    places = ends - lengths
    x = words.new_zeros(len(words), longest, words.shape[2])
    x = x.scatter(1, places[..., None].expand_as(words), words)
    inside = places[row, column][:, None] + torch.arange(patches, device=words.device)
    x = x.index_put((row[:, None], inside), images.to(x.dtype))
    if labels is None:
        return x, None
    moved = labels.new_full((len(words), longest), IGNORE)
    return x, moved.scatter(1, places, labels.masked_fill(holes, IGNORE))


class VisionLanguage(Isotropic):
    """A decoder that reads words and images."""

    stem: Any

    def forward(
        self, ids: Int[Tensor, "b n"], images: Float[Tensor, "i k height width"] | None = None
    ) -> Float[Tensor, "b m v"]:
        """Scores of each next word, at the places of words and of images' tokens.

        Args:
            ids: words; `stem.image_id` (-200) where an image belongs.
            images: in the order of their placeholders; None where there are none.
        """
        answer = super().forward(ids if images is None else self.stem.see(ids, images)[0])
        assert isinstance(answer, Tensor)
        return answer


class BiasedWordHead(WordHead):
    """`y_t = W x_t + b`."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.fc = nn.Linear(dim, vocab_size)


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raises a ValueError where numbers of layers are not different ones of `depth`."""
    outside = [i for i in layers if not 0 <= i < depth]
    if outside or len(set(layers)) != len(layers):
        raise ValueError(f"layers must be different numbers in 0..{depth - 1}, got {list(layers)}")


_QKV = ("q_proj", "k_proj", "v_proj")


def _convert(model: Any, state: State) -> State:
    """Queries, keys and values become one product, in the tower and in the decoder."""
    for key in [k for k in state if f".{_QKV[0]}." in k]:
        parts = [key.replace(_QKV[0], name) for name in _QKV]
        if all(part in state for part in parts):
            state[key.replace(_QKV[0], "qkv")] = torch.cat([state.pop(part) for part in parts])
    table = state.get("stem.vision.stem.positions")
    if table is not None:
        state["stem.vision.stem.positions"] = table[None]
    last = f"stem.vision.blocks.{len(model.stem.vision.blocks)}."
    if not any(key.startswith("stem.vision.") for key in state):
        # The tower is released by itself and was not trained.
        warnings.warn("the checkpoint holds no vision tower; the model keeps its own", stacklevel=3)
        state |= {k: v for k, v in model.state_dict().items() if k.startswith("stem.vision.")}
    return {k: v for k, v in state.items() if not k.startswith(last)}


@register_system(
    "matvlm",
    tasks=("language-modelling",),
    variants={
        "tinyllava_phi2_siglip": {},
        "matvlm_0.125": dict(ssm_layers=(0, 6, 12, 18)),
        "matvlm_0.25": dict(ssm_layers=tuple(range(0, 32, 4))),
        "matvlm_0.50": dict(ssm_layers=tuple(range(0, 32, 2))),
    },
    rules=[
        (r"^vision_tower\._vision_tower\.vision_model\.(post_layernorm|head)\.", None),
        (r"^vision_tower\._vision_tower\.vision_model\.", "stem.vision."),
        (r"\.embeddings\.patch_embedding\.", ".stem.embed.proj."),
        (r"\.embeddings\.position_embedding\.weight$", ".stem.positions"),
        (r"\.encoder\.layers\.", ".blocks."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"^language_model\.model\.embed_tokens\.", "stem.words."),
        (r"^language_model\.model\.final_layernorm\.", "norm."),
        (r"^language_model\.lm_head\.", "head.fc."),
        (r"^language_model\.model\.layers\.", "blocks."),
        (r"^connector\._connector\.", "stem.connector."),
        (r"\.input_layernorm\.", ".norm1."),
        (r"\.self_attn\.(dense|out_proj)\.", ".mixer.proj."),
        (r"\.(self_attn|mamba)\.", ".mixer."),
        (r"\.conv1d\.", ".conv."),
        (r"\.mixer\.out_proj\.", ".mixer.proj."),
        (r"\.mixer\.A_log$", ".mixer.rate"),
        (r"\.mixer\.D$", ".mixer.skip"),
    ],
    convert=_convert,
)
def matvlm(
    *,
    dim: int = 2560,
    depth: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    hidden: int = 10240,
    vocab_size: int = 51200,
    max_len: int = 2048,
    pad_id: int = 0,
    turned: float = 0.4,
    eps: float = 1e-5,
    drop: float = 0.1,
    ssm_layers: Sequence[int] = (),
    ssm_bias: bool = False,
    img_size: int | tuple[int, int] = 384,
    in_chans: int = 3,
    patch: int = 14,
    vision_dim: int = 1152,
    vision_depth: int = 26,
    vision_heads: int = 16,
    vision_hidden: int = 4304,
    image_id: int = IMAGE,
    skip_first: bool = False,
) -> nn.Module:
    """A vision-language model: `ids (b, n)` and images to scores `(b, m, vocab_size)` of each next word.

    Args:
        kv_heads: key and value heads, `heads` by default; Mamba-2 layers have as many heads of x and B.
        hidden: channels between the products of the MLP.
        max_len: of words and images' tokens together.
        pad_id: taken for the sake of the common interface; nothing has to be masked.
        turned: share of a head's channels that rotary positions turn.
        drop: dropout of both branches of a block.
        ssm_layers: layers with Mamba-2 in attention's place.
        ssm_bias: whether the products of these add a bias.
        vision_depth: blocks of the tower that are run (SigLIP so400m has one more).
        image_id: the id that stands for an image.
        skip_first: leave the first patch of an image out.

    Raises:
        ValueError: `ssm_layers` are not different layers, or heads that do not divide.
    """
    check_layers(ssm_layers, depth)
    kv_heads = kv_heads or heads
    act = partial(nn.GELU, approximate="tanh")
    norm = partial(nn.LayerNorm, eps=eps)
    vision_norm = partial(nn.LayerNorm, eps=1e-6)
    height, width = pair(img_size)
    tower = Isotropic(
        TokenStem(PatchEmbed(in_chans, vision_dim, patch), vision_dim, (height // patch, width // patch), tokens=0),
        [
            Block(
                vision_dim,
                create_mixer("attention", vision_dim, heads=vision_heads),
                Mlp(vision_dim, vision_hidden, act=act),
                norm=vision_norm,
            )
            for _ in range(vision_depth)
        ],
        norm=None,
        head=nn.Identity(),
    )
    stem = VisionWordStem(
        vocab_size,
        dim,
        max_len,
        vision=tower,
        connector=nn.Sequential(nn.Linear(vision_dim, dim), nn.GELU(), nn.Linear(dim, dim)),
        image_id=image_id,
        skip_first=skip_first,
    )

    def mixer(layer: int) -> Mixer:
        if layer in ssm_layers:
            return create_mixer("mamba2", dim, heads=heads, x_heads=kv_heads, b_heads=kv_heads, bias=ssm_bias)
        channels = int(turned * (dim // heads))
        return PartialRotaryAttention(
            dim, turned=channels, heads=heads, kv_heads=kv_heads, qkv_bias=True, out_bias=True, causal=True
        )

    blocks = [ParallelBlock(dim, mixer(i), Mlp(dim, hidden, act=act), norm=norm, drop=drop) for i in range(depth)]
    model = VisionLanguage(stem, blocks, norm=norm(dim), head=BiasedWordHead(vocab_size, dim))
    init_transformer(model)
    return model
