"""SiT: a vision transformer that learns from images without labels, and the ViT that is left of it.

Source: Ahmed et al. 2021, "SiT: Self-supervised vIsion Transformer".

- for classes: the ViT and the authors' fine-tuning head on the class token and the mean of the patch tokens; without
  classes, the bare backbone as it was released
- `pretrain=True` is the pre-training network: the ViT, a head on the class token that is compared with another view's,
  and a head that paints every patch token back into pixels; views, corruption, losses and the teacher are in
  `gossamer.train.pretrain`
- built from a description of the method, not from the authors' GPL code; checkpoints of it load, a whole one into
  either form
- `rotations=True` adds the task of the paper's first version, by how many quarter turns an image was rotated; the
  released code no longer has it. There a token of its own is read for it, here the class token, so that the ViT that
  is left is the same
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers import Classifier
from gossamer.layers.heads import mean_pool
from gossamer.layers.init import init_transformer
from gossamer.models.registry import State, register_system, system
from gossamer.models.vit import vit

TURNS = 4
"""Quarter turns an image can be rotated by."""


class FineTuneHead(nn.Module):
    """`W2 gelu(W1 [class token; mean of the patch tokens])`."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2 * dim, dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "b n c"], mask: None = None) -> Float[Tensor, "b k"]:
        return self.fc2(self.act(self.fc1(torch.cat((x[:, 0], mean_pool(x[:, 1:])), -1))))


class ContrastHead(nn.Module):
    """What is compared between views: three products with batch norms, the last norm without weights.

    Args:
        dim: channels of the class token.
        hidden: channels between the products.
        out: channels of the answer.
    """

    def __init__(self, dim: int, *, hidden: int = 4096, out: int = 256) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, out),
            nn.BatchNorm1d(out, affine=False),
        )

    def forward(self, token: Float[Tensor, "b c"]) -> Float[Tensor, "b k"]:
        return self.mlp(token)


class ReconstructionHead(nn.Module):
    """Patch tokens to pixels: `gelu(W x)` three times, then each token becomes its patch of the image."""

    def __init__(self, dim: int, in_chans: int, patch: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(dim, dim), nn.GELU())))
        self.proj = nn.ConvTranspose2d(dim, in_chans, patch, patch)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b i height width"]:
        return self.proj(self.mlp(x).movedim(-1, 1))


class SiT(nn.Module):
    """The pre-training network around a ViT with a class token; the ViT's own head is not used.

    Args:
        backbone: `Isotropic` on a sequence of tokens with a class token in front.
        hidden, out: of the contrast head.
        rotations: score the four turns of an image as well.

    Raises:
        ValueError: `backbone` is no such network.
    """

    def __init__(self, backbone: nn.Module, *, hidden: int = 4096, out: int = 256, rotations: bool = False) -> None:
        super().__init__()
        stem = getattr(backbone, "stem", None)
        if not getattr(stem, "flat", False) or getattr(stem, "tokens", None) is None:
            raise ValueError(
                "self-supervised pre-training wants a ViT with a class token (sit_*, vit_*, deit_*), "
                f"got {getattr(backbone, 'config', {}).get('name', type(backbone).__name__)}"
            )
        inner: Any = stem
        conv = inner.embed.proj
        self.backbone: Any = backbone
        self.contrast = ContrastHead(conv.out_channels, hidden=hidden, out=out)
        self.reconstruct = ReconstructionHead(conv.out_channels, conv.in_channels, conv.kernel_size[0])
        self.turn = nn.Linear(conv.out_channels, TURNS) if rotations else None

    def forward(
        self, image: Float[Tensor, "b i height width"]
    ) -> (
        tuple[Float[Tensor, "b k"], Float[Tensor, "b i height width"]]
        | tuple[Float[Tensor, "b k"], Float[Tensor, "b i height width"], Float[Tensor, "b 4"]]
    ):
        """What is compared, the image painted back and, with `rotations`, the scores of its turns."""
        tokens, _ = self.backbone.encode(image)
        h, w = self.backbone.stem.grid
        painted = self.reconstruct(tokens[:, -h * w :].unflatten(1, (h, w)))
        # Images that were filled up to whole patches are cut off again.
        painted = painted[..., : image.shape[2], : image.shape[3]]
        if self.turn is None:
            return self.contrast(tokens[:, 0]), painted
        return self.contrast(tokens[:, 0]), painted, self.turn(tokens[:, 0])

    def compare(self, image: Float[Tensor, "b i height width"]) -> Float[Tensor, "b k"]:
        """What is compared, alone: all that a teacher is asked for."""
        return self.contrast(self.backbone.encode(image)[0][:, 0])


def _convert(model: Any, state: State) -> State:
    backbone = {key.removeprefix("backbone."): value for key, value in state.items()}
    heads = {key: backbone.pop(key) for key in list(backbone) if key.startswith(("contrast.", "reconstruct."))}
    convert = system("deit").convert
    assert convert is not None
    if isinstance(model, SiT):
        # No released file knows of turns: that head stays as it was made.
        heads |= {key: value for key, value in model.state_dict().items() if key.startswith("turn.")}
        return {**{f"backbone.{key}": value for key, value in convert(model.backbone, backbone).items()}, **heads}
    # The head for classes is new, as the authors begin it.
    own = {key: value for key, value in model.state_dict().items() if key.startswith("head.")}
    return {**convert(model, backbone), **own}


_TINY: dict[str, Any] = dict(dim=192, depth=12, heads=3)
_SMALL: dict[str, Any] = dict(dim=384, depth=12, heads=6)
_BASE: dict[str, Any] = dict(dim=768, depth=12, heads=12)


@register_system(
    "sit",
    tasks=("image-classification",),
    variants={
        "sit_tiny": _TINY,
        "sit_small": _SMALL,
        "sit_base": _BASE,
        "sit_tiny_pipeline": {**_TINY, "pretrain": True},
        "sit_small_pipeline": {**_SMALL, "pretrain": True},
        "sit_base_pipeline": {**_BASE, "pretrain": True},
    },
    rules=[
        (r"^(backbone\.)?patch_embed\.proj\.", r"\1stem.embed.proj."),
        (r"^(backbone\.)?cls_token$", r"\1stem.cls_token"),
        (r"^(backbone\.)?pos_embed$", r"\1stem.positions"),
        (r"\.attn\.", ".mixer."),
        (r"^head_recons\.convTrans\.", "reconstruct.proj."),
        (r"^head_recons\.", "reconstruct."),
        (r"^head\.mlp\.", "contrast.mlp."),
    ],
    convert=_convert,
)
def sit(
    *,
    dim: int = 192,
    depth: int = 12,
    heads: int = 3,
    patch: int = 16,
    mlp_ratio: float = 4.0,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 0,
    pad: bool = False,
    drop_path: float = 0.1,
    pretrain: bool = False,
    hidden: int = 4096,
    out: int = 256,
    rotations: bool = False,
) -> nn.Module:
    """The ViT of SiT, for classes or as a backbone, or with its heads for pre-training.

    Args:
        num_classes: 0 gives the class token itself.
        pad: fill an image that `patch` does not divide up with zeros.
        pretrain: the pre-training network; `hidden` and `out` are the widths of its contrast head.
        rotations: a head for the turns of an image too, in the pre-training network.

    Raises:
        ValueError: `patch` does not divide the image and `pad` is False, classes for a pre-training network, or
            rotations for another.
    """
    if pretrain and num_classes:
        raise ValueError(
            f"a pre-training network has no classes, got num_classes={num_classes}; pre-train sit_tiny, sit_small or "
            "sit_base by train_model(…, pretrain=epochs)"
        )
    if rotations and not pretrain:
        raise ValueError("rotations are a task of the pre-training network; give pretrain=True")
    backbone: Any = vit(
        dim=dim,
        depth=depth,
        heads=heads,
        patch=patch,
        mlp_ratio=mlp_ratio,
        img_size=img_size,
        in_chans=in_chans,
        num_classes=0,
        pad=pad,
        drop_path=drop_path,
    )
    if pretrain:
        model = SiT(backbone, hidden=hidden, out=out, rotations=rotations)
        init_transformer(model)
        return model
    backbone.head = FineTuneHead(dim, num_classes) if num_classes else Classifier(dim, 0, pool="token")
    init_transformer(backbone)
    return backbone
