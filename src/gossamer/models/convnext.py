"""ConvNeXt: a pure convolutional pyramid with a transformer's proportions.

Source: Liu et al. 2022, "A ConvNet for the 2020s".

- block: 7x7 depth-wise convolution, LayerNorm, two linear layers with GELU between, LayerScale, one residual
- patchify stem and separate norm-and-convolve merging between stages; the last norm stands after pooling
- isotropic form: one stage on 16x16 patches, no LayerScale, no norm in the stem
- official code keeps channels first; here they are last, which is the same function without the permutations
- sides that are not a multiple of the stride are cut off at the end, as strided convolutions do
- `roadmap` is one of the paper's steps from ResNet-50 to here (`_convnext_roadmap.py`)
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Conv, Mlp, PatchEmbed
from gossamer.mixers import create_mixer, options_for
from gossamer.models._convnext_roadmap import STEPS, roadmap_network
from gossamer.models._pyramids import keep_backbone, small_pyramid, stage_rates, token_grid
from gossamer.models.registry import State, register_system
from gossamer.trunks import Pyramid


class Stem(PatchEmbed):
    """Patches, for images no smaller than the deepest stride."""

    def __init__(self, in_chans: int, dim: int, patch: int, *, least: int, norm: Any) -> None:
        super().__init__(in_chans, dim, patch, norm=norm)
        self.least = least

    def forward(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b h w c"]:
        if min(image.shape[2:]) < self.least:
            height, width = image.shape[2:]
            raise ValueError(f"image sides must be at least {self.least} (the deepest stride), got {height}x{width}")
        return super().forward(image)


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    # LayerScale at 1e-6 wants hundreds of epochs; small models on small data learn at once without it.
    return "convnext_t", {**small_pyramid(spec, size, block=8, step=8), "layer_scale": None, "init_std": None, **spec}


def _convert(model: Any, state: State) -> State:
    return keep_backbone(model, state, "head.")


_T: dict[str, Any] = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
_S: dict[str, Any] = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
_B: dict[str, Any] = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
_L: dict[str, Any] = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))
_XL: dict[str, Any] = dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048))
_ISO: dict[str, Any] = dict(patch=16, layer_scale=None, stem_norm=False)
_ISO_S: dict[str, Any] = dict(depths=(18,), dims=(384,), **_ISO)
_ISO_B: dict[str, Any] = dict(depths=(18,), dims=(768,), **_ISO)
_ISO_L: dict[str, Any] = dict(depths=(36,), dims=(1024,), **_ISO)


@register_system(
    "convnext",
    tasks=("image-classification",),
    scale=_scale,
    variants={
        "convnext_t": _T,
        "convnext_s": _S,
        "convnext_b": _B,
        "convnext_l": _L,
        "convnext_xl": _XL,
        "convnext_iso_s": _ISO_S,
        "convnext_iso_b": _ISO_B,
        "convnext_iso_l": _ISO_L,
        # the authors' own names
        "convnext_tiny": _T,
        "convnext_small": _S,
        "convnext_base": _B,
        "convnext_large": _L,
        "convnext_xlarge": _XL,
        "convnext_isotropic_small": _ISO_S,
        "convnext_isotropic_base": _ISO_B,
        "convnext_isotropic_large": _ISO_L,
        **{f"convnext_roadmap_{step}": {**_T, "roadmap": step} for step in STEPS},
    },
    rules=[
        (r"^downsample_layers\.0\.0\.", "stem.proj."),
        (r"^downsample_layers\.0\.1\.", "stem.norm."),
        (r"^downsample_layers\.1\.", "merges.0."),
        (r"^downsample_layers\.2\.", "merges.1."),
        (r"^downsample_layers\.3\.", "merges.2."),
        (r"^stem\.(weight|bias)$", r"stem.proj.\1"),
        (r"^blocks\.", "stages.0."),
        (r"\.dwconv\.", ".mixer.conv."),
        (r"^(stages\..*)\.norm\.", r"\1.norm1."),
        (r"\.pwconv1\.", ".mlp.fc1."),
        (r"\.pwconv2\.", ".mlp.fc2."),
        (r"\.gamma$", ".scale1"),
        (r"^norm([0-3])\.", r"out_norms.\1."),
        (r"^norm\.", "head.norm."),
        (r"^head\.(weight|bias)$", r"head.fc.\1"),
    ],
    convert=_convert,
)
def convnext(
    *,
    depths: Sequence[int] = (3, 3, 9, 3),
    dims: Sequence[int] = (96, 192, 384, 768),
    patch: int = 4,
    kernel: int = 7,
    mlp_ratio: float = 4.0,
    layer_scale: float | None = 1e-6,
    stem_norm: bool = True,
    drop_path: float = 0.0,
    init_std: float | None = 0.02,
    head_init_scale: float = 1.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    dense: bool = False,
    mixer: str = "depthwise",
    mixer_options: dict[str, Any] | None = None,
    roadmap: str | None = None,
) -> nn.Module:
    """A ConvNeXt.

    Args:
        kernel: width of the depth-wise convolution.
        init_std: deviation of the first weights, None for `fan_in ** -0.5`.
        head_init_scale: multiplies the classifier's first weights (the authors take 0.001 when they fine-tune).
        img_size: only mixers bound to a grid need it; the model takes any image no smaller than its deepest stride.
        dense: a norm for each map that `features` gives, and no classifier.
        mixer: what stands in for the depth-wise convolution.
        roadmap: the network at this step from ResNet-50 to ConvNeXt; before the last one, depths and widths follow the
            paper's and only `dims[0]`, `in_chans` and `num_classes` are read.

    Raises:
        ValueError: `depths` and `dims` differ in length, there is no such step of the roadmap, or an image is smaller
            than the deepest stride.
    """
    if roadmap is not None and roadmap != STEPS[-1]:
        return roadmap_network(roadmap, dims[0], in_chans=in_chans, num_classes=num_classes)
    if len(depths) != len(dims):
        raise ValueError(f"depths and dims must be of one length, got {tuple(depths)} and {tuple(dims)}")
    norm = partial(nn.LayerNorm, eps=1e-6)
    stem = Stem(in_chans, dims[0], patch, least=patch * 2 ** (len(dims) - 1), norm=norm if stem_norm else None)
    merges = [nn.Sequential(norm(dim), Conv(dim, out, 2, stride=2, padding=0)) for dim, out in pairwise(dims)]
    options = {**options_for(mixer, {"kernel": kernel}), **(mixer_options or {})}
    grids = token_grid(img_size, patch, len(dims), up=False)
    stages = [
        [
            Block(
                dim,
                create_mixer(mixer, dim, grid=grid, **options),
                Mlp(dim, int(dim * mlp_ratio)),
                norm=norm,
                residual="single",
                layer_scale=layer_scale,
                drop_path=rate,
            )
            for rate in rates
        ]
        for dim, grid, rates in zip(dims, grids, stage_rates(drop_path, depths), strict=True)
    ]
    head = nn.Identity() if dense else Classifier(dims[-1], num_classes, norm=norm)
    model = Pyramid(
        stem, stages, merges, norm=None, head=head, out_norms=[norm(dim) for dim in dims] if dense else None
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=init_std or module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    if isinstance(head, Classifier) and head.fc is not None:
        head.fc.weight.data.mul_(head_init_scale)
    return model
