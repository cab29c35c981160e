"""ViT-CoMer: a plain ViT and a small convolutional pyramid that tell each other what they see, for dense predictions.

Source: Xia et al. 2024, "ViT-CoMer: Vision Transformer with Convolutional Multi-scale Feature Interaction for Dense
Predictions".

- four times: the pyramid (strides 8, 16, 32) is enriched by kernels of two sizes and reads itself by deformable
  attention; its sum at stride 16 is added to the ViT's tokens (`gamma`, zero at first: a pre-trained ViT starts as it
  was); a quarter of the ViT's blocks runs; the tokens are added to the pyramid, which reads itself again
- gives four maps at strides 4, 8, 16, 32 and no classes; `forward` is `features` as a tuple. The 38.7, 61.4 and 144.7 M
  parameters of the paper's table are of segmenters, these backbones with UperNet and its auxiliary head
- weights of a plain ViT (DeiT, DINOv2 at patch 16) load by `load_official` too; the rest of the model stays as it was
- the detection release differs from the segmentation release: `dim_ratio=0.5`, crops of 14x14 tokens in two blocks of
  three, and the last tokens are added to all four maps (`vit_maps="last"`); its variants are named `_detection`
- `vit_comer_l` is the detection release at the authors' sizes around a plain ViT; theirs stands on BEiTv2, with code
  that was not released
- the authors' `pos_embed` has a row for a class token that does not exist here; it is left out, so parameters are fewer
  by one row
- drop path in the interactions is at the ViT's largest rate, as in the authors' code
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import BatchNorm, Block, Conv, ConvNorm, DropPath, GridPositions, Mlp, PatchEmbed, resize_positions
from gossamer.layers.blocks import drop_path_rates
from gossamer.layers.conv import channels_last, max_pool
from gossamer.layers.deform import DeformableAttention, Sizes, centres, join_maps, split_maps, swap_offsets
from gossamer.layers.embed import pair
from gossamer.layers.init import init_transformer
from gossamer.layers.linear import linear
from gossamer.layers.mlp import ConvMlp
from gossamer.layers.positions import table_layout
from gossamer.mixers import create_mixer, options_for
from gossamer.models.registry import State, register_system

Norm = partial(nn.LayerNorm, eps=1e-6)


class Cnn(nn.Module):
    """The convolutional branch: maps of `dim` channels at strides 4, 8, 16, 32."""

    def __init__(self, in_chans: int, dim: int, width: int) -> None:
        super().__init__()
        conv = partial(ConvNorm, kernel=3, bias=False, act=nn.ReLU)
        self.stem = nn.Sequential(conv(in_chans, width, stride=2), conv(width, width), conv(width, width))
        widths = (width, 2 * width, 4 * width, 4 * width)
        self.downs = nn.ModuleList(conv(a, b, stride=2) for a, b in pairwise(widths))
        self.fcs = nn.ModuleList(nn.Linear(w, dim) for w in widths)

    def forward(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w c"]]:
        x = max_pool(self.stem(channels_last(image).movedim(1, -1)), 3, 2, 1)
        maps = [linear(self.fcs[0], x)]
        for down, fc in zip(self.downs, self.fcs[1:], strict=True):
            x = down(x)
            maps.append(linear(fc, x))
        return maps


class MultiReceptiveField(nn.Module):
    """`y = W2 gelu(gelu(norm_l([D3_l u; D5_l v])))`, `[u; v] = W1 x`; D3, D5 depth-wise, their own for each map l."""

    def __init__(self, dim: int, hidden: int, levels: int = 3) -> None:
        super().__init__()
        if hidden % 2:
            raise ValueError(f"dim * dim_ratio must be even (two kernels share it), got {hidden}")
        half = hidden // 2
        self.fc1 = nn.Linear(dim, hidden)
        self.small = nn.ModuleList(Conv(half, half, 3, groups=half) for _ in range(levels))
        self.large = nn.ModuleList(Conv(half, half, 5, groups=half) for _ in range(levels))
        self.norms = nn.ModuleList(BatchNorm(hidden) for _ in range(levels))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n c"], sizes: Sizes) -> Float[Tensor, "b n c"]:
        maps = []
        parts = zip(split_maps(linear(self.fc1, x), sizes), self.small, self.large, self.norms, strict=True)
        for m, small, large, norm in parts:
            u, v = m.chunk(2, -1)
            maps.append(F.gelu(norm(torch.cat((small(u), large(v)), -1))))
        return linear(self.fc2, F.gelu(join_maps(maps)))


class PyramidMlp(ConvMlp):
    """The MLP with a depth-wise convolution, one kernel for all maps of a pyramid."""

    def forward(self, x: Float[Tensor, "b n c"], sizes: Sizes) -> Float[Tensor, "b n c"]:  # type: ignore[override]
        near = join_maps([self.dw(m) for m in split_maps(linear(self.fc1, x), sizes)])
        return linear(self.fc2, self.act(near))


class Injector(nn.Module):
    """CTI to V: `x + gamma * sum_l resize(c'_l)`, `c' = a + mlp(norm(a))`, `a` what the pyramid reads of itself."""

    def __init__(self, dim: int, attend: partial[DeformableAttention], mlp_ratio: float, drop_path: float) -> None:
        super().__init__()
        self.query_norm, self.value_norm, self.mlp_norm = Norm(dim), Norm(dim), Norm(dim)
        self.attention = attend(dim)
        self.mlp = PyramidMlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Float[Tensor, "b h w c"], c: Float[Tensor, "b n c"], sizes: Sizes, reference: Float[Tensor, "1 n 1 2"]
    ) -> Float[Tensor, "b h w c"]:
        c = self.attention(self.query_norm(c), self.value_norm(c), sizes, reference)
        c = c + self.drop_path(self.mlp(self.mlp_norm(c), sizes))
        fine, same, coarse = split_maps(c, sizes)
        return torch.addcmul(x, _halve(fine) + same + _enlarge(coarse, 2), self.gamma)


class Extractor(nn.Module):
    """CTI to C: `c_16 += x`, `q = norm(c)`, `q += read(norm(q), norm(norm'(c)))`, `q += mlp(norm(q))`.

    Args:
        first: `c += mlp(norm(c))` before the reading.
    """

    def __init__(
        self, dim: int, attend: partial[DeformableAttention], mlp_ratio: float, drop_path: float, *, first: bool
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.first_norm = Norm(dim) if first else None
        self.first = PyramidMlp(dim, hidden) if first else None
        self.query_norm, self.value_norm = Norm(dim), Norm(dim)
        self.inner_query_norm, self.inner_value_norm, self.mlp_norm = Norm(dim), Norm(dim), Norm(dim)
        self.attention = attend(dim)
        self.mlp = PyramidMlp(dim, hidden)
        self.drop_path = DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b h w c"], c: Float[Tensor, "b n c"], sizes: Sizes, reference: Float[Tensor, "1 n 1 2"]
    ) -> Float[Tensor, "b n c"]:
        c = _add_tokens(c, x, sizes)
        if self.first is not None and self.first_norm is not None:
            c = c + self.drop_path(self.first(self.first_norm(c), sizes))
        q, v = self.query_norm(c), self.inner_value_norm(self.value_norm(c))
        q = q + self.attention(self.inner_query_norm(q), v, sizes, reference)
        return q + self.drop_path(self.mlp(self.mlp_norm(q), sizes))


class Interaction(nn.Module):
    """One stage: the pyramid speaks, a group of ViT blocks runs, the pyramid listens."""

    def __init__(
        self,
        dim: int,
        attend: partial[DeformableAttention],
        *,
        hidden: int,
        mlp_ratio: float,
        drop_path: float,
        extra: int,
    ) -> None:
        super().__init__()
        self.fields = MultiReceptiveField(dim, hidden)
        self.injector = Injector(dim, attend, mlp_ratio, drop_path)
        self.extractors = nn.ModuleList(
            Extractor(dim, attend, mlp_ratio, drop_path, first=i > 0) for i in range(1 + extra)
        )

    def forward(
        self,
        x: Float[Tensor, "b h w c"],
        c: Float[Tensor, "b n c"],
        blocks: Sequence[nn.Module],
        sizes: Sizes,
        reference: Float[Tensor, "1 n 1 2"],
    ) -> tuple[Float[Tensor, "b h w c"], Float[Tensor, "b n c"]]:
        c = _add_tokens(self.fields(c, sizes), x, sizes)
        x = self.injector(x, c, sizes, reference)
        for block in blocks:
            x = block(x)
        for extractor in self.extractors:
            c = extractor(x, c, sizes, reference)
        return x, c


class ViTCoMer(nn.Module):
    """Patches, positions, four groups of blocks with an interaction each, and four maps; see the head of this file."""

    def __init__(
        self,
        embed: PatchEmbed,
        positions: GridPositions,
        cnn: Cnn,
        blocks: Sequence[nn.Module],
        interactions: Sequence[Interaction],
        dim: int,
        vit_maps: Literal["each", "last"],
    ) -> None:
        super().__init__()
        self.embed = embed
        self.positions = positions
        self.cnn = cnn
        self.levels = nn.Parameter(torch.randn(3, dim))
        self.blocks = nn.ModuleList(blocks)
        self.interactions = nn.ModuleList(interactions)
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norms = nn.ModuleList(BatchNorm(dim) for _ in range(4))
        self.vit_maps = vit_maps

    def forward(self, image: Float[Tensor, "b i height width"]) -> tuple[Float[Tensor, "b _h _w c"], ...]:
        return tuple(self.features(image))

    def features(self, image: Float[Tensor, "b i height width"]) -> list[Float[Tensor, "b _h _w c"]]:
        """Maps at strides 4, 8, 16, 32.

        Raises:
            ValueError: a side of the image is not a multiple of 32.
        """
        # Numbers, also where a tracer would make tensors of them.
        height, width = int(image.shape[2]), int(image.shape[3])
        if height % 32 or width % 32:
            raise ValueError(f"image sides must be multiples of 32, got {height}x{width}")
        sizes = [(height // s, width // s) for s in (8, 16, 32)]
        finest, *pyramid = self.cnn(image)
        c = join_maps([m + level for m, level in zip(pyramid, self.levels, strict=True)])
        reference = centres(sizes, device=c.device, dtype=c.dtype)
        x = self.positions(self.embed(image))
        blocks = list(self.blocks)
        group = len(blocks) // len(self.interactions)
        seen = []
        for i, interaction in enumerate(self.interactions):
            x, c = interaction(x, c, blocks[i * group : (i + 1) * group], sizes, reference)
            seen.append(x)
        if self.vit_maps == "last":
            seen = [x] * 4
        maps = split_maps(c, sizes)
        finest = finest + self.up(maps[0].movedim(-1, 1)).movedim(1, -1)
        maps = [
            finest + _enlarge(seen[0], 4),
            maps[0] + _enlarge(seen[1], 2),
            maps[1] + seen[2],
            maps[2] + _halve(seen[3]),
        ]
        return [norm(m) for norm, m in zip(self.norms, maps, strict=True)]


def _add_tokens(c: Tensor, x: Tensor, sizes: Sizes) -> Tensor:
    fine, same, coarse = split_maps(c, sizes)
    return join_maps([fine, same + x, coarse])


def _halve(x: Tensor) -> Tensor:
    # Bilinear resizing to half the side reads between four pixels: their mean.
    return F.avg_pool2d(x.movedim(-1, 1), 2).movedim(1, -1)


def _enlarge(x: Tensor, times: int) -> Tensor:
    return F.interpolate(x.movedim(-1, 1), scale_factor=times, mode="bilinear", align_corners=False).movedim(1, -1)


def _convert(model: Any, state: State) -> State:
    own = model.state_dict()
    if not any(key.startswith("interactions.") for key in state):
        # A plain ViT: what it does not have is kept as it was made.
        vit = ("embed.", "positions.", "blocks.")
        state = {**{k: v for k, v in own.items() if not k.startswith(vit) or ".scale" in k}, **state}
    for key, value in state.items():
        if key == "positions.table" and value.ndim == 3:
            # After the row of a class token where there is one.
            grid = tuple(own[key].shape[1:3])
            front, old = table_layout(value.shape[1], grid)
            state[key] = resize_positions(value[:, front:], old, grid).unflatten(1, grid)
        elif key.startswith("cnn.fcs.") and value.ndim == 4:
            # 1x1 convolutions are linear maps here.
            state[key] = value.flatten(1)
        elif ".attention.offsets." in key and value is not own[key]:
            state[key] = swap_offsets(value)
    return state


_T: dict[str, Any] = dict(dim=192, heads=3, dim_ratio=6.0, drop_path=0.1)
_S: dict[str, Any] = dict(dim=384, heads=6, dim_ratio=1.5, drop_path=0.2)
_B: dict[str, Any] = dict(dim=768, heads=12, deform_heads=12, deform_ratio=0.5, dim_ratio=1.0, drop_path=0.3)
_L: dict[str, Any] = dict(dim=1024, depth=24, heads=16, deform_heads=16, deform_ratio=0.5, drop_path=0.3)
_DETECTION: dict[str, Any] = dict(dim_ratio=0.5, vit_maps="last")
_CROPS: dict[str, Any] = dict(mixer=("plain_window", "plain_window", "attention") * 4, img_size=592)


@register_system(
    "vit-comer",
    variants={
        "vit_comer_t": _T,
        "vit_comer_s": _S,
        "vit_comer_b": _B,
        "vit_comer_l": {**_L, **_DETECTION},
        "vit_comer_s_detection": {**_S, **_DETECTION, **_CROPS},
        "vit_comer_b_detection": {**_B, **_DETECTION, **_CROPS},
    },
    rules=[
        (r"^(cls_token|dist_token|mask_token|register_tokens)$", None),
        (r"^(norm|head|head_dist)\.", None),
        (r"^pos_embed$", "positions.table"),
        (r"^patch_embed\.", "embed."),
        (r"^level_embed$", "levels"),
        (r"^(blocks\.\d+)\.attn\.", r"\1.mixer."),
        (r"^(blocks\.\d+)\.(?:gamma_?|ls)([12])(?:\.gamma)?$", r"\1.scale\2"),
        *((rf"^spm\.stem\.{3 * i}\.", f"cnn.stem.{i}.conv.") for i in range(3)),
        *((rf"^spm\.stem\.{3 * i + 1}\.", f"cnn.stem.{i}.norm.") for i in range(3)),
        *((rf"^spm\.conv{i + 2}\.0\.", f"cnn.downs.{i}.conv.") for i in range(3)),
        *((rf"^spm\.conv{i + 2}\.1\.", f"cnn.downs.{i}.norm.") for i in range(3)),
        *((rf"^spm\.fc{i + 1}\.", f"cnn.fcs.{i}.") for i in range(4)),
        *((rf"^norm{i + 1}\.", f"norms.{i}.") for i in range(4)),
        (r"\.mrfp\.", ".fields."),
        *((rf"\.dwconv\.dwconv{2 * i + 1}\.", f".small.{i}.") for i in range(3)),
        *((rf"\.dwconv\.dwconv{2 * i + 2}\.", f".large.{i}.") for i in range(3)),
        *((rf"\.dwconv\.bn{i + 1}\.", f".norms.{i}.") for i in range(3)),
        (r"\.dwconv\.dwconv\.", ".dw."),
        (r"\.cti_toc\.", ".extractors.0."),
        *((rf"\.extra_CTIs\.{i}\.", f".extractors.{i + 1}.") for i in range(9)),
        (r"(\.extractors\.\d+)\.ffn_norm\.", r"\1.first_norm."),
        (r"(\.extractors\.\d+)\.ffn\.", r"\1.first."),
        (r"\.cfinter\.query_norm\.", ".inner_query_norm."),
        (r"\.cfinter\.feat_norm\.", ".inner_value_norm."),
        (r"\.cfinter\.", "."),
        (r"\.cti_tov\.", ".injector."),
        (r"\.feat_norm\.", ".value_norm."),
        (r"\.ffn_norm\.", ".mlp_norm."),
        (r"\.ffn\.", ".mlp."),
        (r"\.attn\.sampling_offsets\.", ".attention.offsets."),
        (r"\.attn\.attention_weights\.", ".attention.weights."),
        (r"\.attn\.value_proj\.", ".attention.value."),
        (r"\.attn\.output_proj\.", ".attention.proj."),
    ],
    convert=_convert,
)
def vit_comer(
    *,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    mlp_ratio: float = 4.0,
    deform_heads: int = 6,
    deform_ratio: float = 1.0,
    points: int = 4,
    dim_ratio: float = 6.0,
    width: int = 64,
    pyramid_mlp_ratio: float = 0.25,
    extra: int = 4,
    vit_maps: Literal["each", "last"] = "each",
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    drop: float = 0.0,
    drop_path: float = 0.0,
    mixer: str | Sequence[str] = "attention",
    mixer_options: dict[str, Any] | None = None,
) -> nn.Module:
    """A ViT-CoMer backbone.

    Args:
        deform_heads: heads of the deformable attentions; `deform_ratio`, the width of their values relative to `dim`.
        points: places that each of those heads reads in each map.
        dim_ratio: width inside the multi-receptive-field part relative to `dim`.
        width: channels of the convolutional stem.
        pyramid_mlp_ratio: inner width of the pyramid's MLPs relative to `dim`.
        extra: further extractors of the last interaction.
        vit_maps: which tokens are added to the four maps: of `each` group one, or the `last` to all.
        img_size: sides that the position table is made for; it is resized for other images.
        mixer: name of the ViT's mixer, or one name a layer.

    Raises:
        ValueError: `depth` is not a multiple of 4, or a mixer list is not `depth` long.
    """
    if depth % 4:
        raise ValueError(f"depth must be a multiple of 4 (the groups of blocks), got {depth}")
    if vit_maps not in ("each", "last"):
        raise ValueError(f"vit_maps must be each or last, got {vit_maps!r}")
    names = [mixer] * depth if isinstance(mixer, str) else list(mixer)
    if len(names) != depth:
        raise ValueError(f"mixer must be one name or {depth} names (depth), got {len(names)}")
    height, width_px = pair(img_size)
    grid = (max(1, height // 16), max(1, width_px // 16))
    blocks = []
    for name, rate in zip(names, drop_path_rates(drop_path, depth), strict=True):
        options = {**options_for(name, {"heads": heads}), **(mixer_options or {})}
        if name == "plain_window":
            # The authors cut windows from the products.
            options.setdefault("fill", "products")
        mix = create_mixer(name, dim, grid=grid, **options)
        mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        blocks.append(Block(dim, mix, mlp, norm=Norm, layer_scale=1.0, drop_path=rate))
    attend = partial(DeformableAttention, heads=deform_heads, levels=3, points=points, value_ratio=deform_ratio)
    interactions = [
        Interaction(
            dim,
            attend,
            hidden=int(dim * dim_ratio),
            mlp_ratio=pyramid_mlp_ratio,
            drop_path=drop_path,
            extra=extra if i == 3 else 0,
        )
        for i in range(4)
    ]
    model = ViTCoMer(
        PatchEmbed(in_chans, dim, 16),
        GridPositions(dim, grid, resize=True),
        Cnn(in_chans, dim, width),
        blocks,
        interactions,
        dim,
        vit_maps,
    )
    init_transformer(model)
    for module in (model.cnn, model.interactions, model.up):
        for part in module.modules():
            if isinstance(part, DeformableAttention):
                part.reset()
            elif isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
                fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
                nn.init.normal_(part.weight, std=(2 / fan_out) ** 0.5)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
    return model
