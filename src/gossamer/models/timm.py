"""Models of timm, given as objects, as ours: the same function, built of our parts.

- recognised by class name and read by attributes; timm itself is never imported
- weights go through the systems' own rules, strictly, after the few names that timm changed are changed back
- a setting our models do not have (other pooling, query norms, windows of two sides, …) is refused by name
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import nn

from gossamer.layers.embed import pair
from gossamer.mixers.window import WindowAttention, shift_offset
from gossamer.models.registry import Rules, State, create_model, load_official, rename


def from_timm(module: nn.Module) -> nn.Module | None:
    """Our model with the sizes and weights of a timm model, in eval mode; None where it is no model we know.

    Raises:
        ValueError: a model we know, with a setting we do not have; the message names it.
    """
    reader = READERS.get(type(module).__name__)
    if reader is None or type(module).__module__.partition(".")[0] != "timm":
        return None
    name, settings, state = reader(module)
    ours = create_model(name, **settings)
    for theirs, own in zip(_window_blocks(module), _mixers(ours), strict=True):
        _same_windows(theirs, own)
    return load_official(ours, state).eval()


def _demand(module: nn.Module, **plain: Any) -> None:
    """Refuses attributes that are there and not as in our model."""
    for name, value in plain.items():
        found = getattr(module, name, value)
        if found != value and not (value is None and isinstance(found, nn.Identity)):
            found = type(found).__name__ if isinstance(found, nn.Module) else repr(found)
            raise ValueError(f"timm's {type(module).__name__}: {name} must be {value!r}, got {found}")


def _part(module: nn.Module, name: str, kind: str) -> Any:
    """The part `name`, which must be of the class `kind`."""
    part = cast(Any, module.get_submodule(name))
    if type(part).__name__ != kind:
        raise ValueError(f"timm's {type(module).__name__}: {name} must be {kind}, got {type(part).__name__}")
    return part


def _gelu(module: nn.Module, name: str) -> None:
    act = module.get_submodule(name)
    if type(act).__name__ != "GELU" or getattr(act, "approximate", "none") != "none":
        raise ValueError(f"timm's {type(module).__name__}: {name} must be GELU, got {act}")


def _average(module: Any) -> None:
    if module.head.global_pool.pool_type != "avg":
        found = module.head.global_pool.pool_type
        raise ValueError(f"timm's {type(module).__name__}: global_pool must be 'avg', got {found!r}")


def _ratio(hidden: int, dim: int) -> float:
    # Half a unit more, so that rounding down meets the width.
    return hidden / dim if int(hidden / dim * dim) == hidden else (hidden + 0.5) / dim


def _vit(module: Any) -> tuple[str, dict[str, Any], State]:
    _demand(module, global_pool="token", norm_pre=None, fc_norm=None, attn_pool=None)
    for i in range(len(module.blocks)):
        block = _part(module, f"blocks.{i}", "Block")
        _demand(_part(module, f"blocks.{i}.attn", "Attention"), q_norm=None, k_norm=None, norm=None, gate=None)
        _demand(_part(module, f"blocks.{i}.mlp", "Mlp"), norm=None)
        _gelu(module, f"blocks.{i}.mlp.act")
    embed = _part(module, "patch_embed", "PatchEmbed")
    _demand(embed, norm=None)
    sides = set(pair(embed.patch_size))
    if len(sides) > 1:
        raise ValueError(f"timm's VisionTransformer: patch_size must be square, got {embed.patch_size}")
    if module.pos_embed is None or isinstance(module.norm, nn.Identity):
        raise ValueError("timm's VisionTransformer: pos_embed and norm must be there")
    attention, taught = block.attn, getattr(module, "dist_token", None) is not None
    if attention.head_dim * attention.num_heads != module.embed_dim:
        raise ValueError(f"timm's VisionTransformer: head_dim must be embed_dim / num_heads, got {attention.head_dim}")
    settings: dict[str, Any] = {
        "dim": module.embed_dim,
        "depth": len(module.blocks),
        "heads": attention.num_heads,
        "patch": sides.pop(),
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, module.embed_dim),
        "img_size": pair(embed.img_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": module.num_classes,
        "eps": module.norm.eps,
        "layer_scale": None if isinstance(block.ls1, nn.Identity) else 1.0,
        "position_tokens": not module.no_embed_class,
        "registers": getattr(module, "num_reg_tokens", 0),
    }
    if taught:
        settings["distilled"] = True
    if attention.qkv.bias is None:
        settings["mixer_options"] = {"qkv_bias": False}
    return "vit_base_patch16_224", settings, module.state_dict()


def _swin(module: Any) -> tuple[str, dict[str, Any], State]:
    _demand(module, absolute_pos_embed=None)
    embed = _part(module, "patch_embed", "PatchEmbed")
    first = module.layers[0].blocks[0]
    for s, stage in enumerate(module.layers):
        for i, block in enumerate(stage.blocks):
            _gelu(module, f"layers.{s}.blocks.{i}.mlp.act")
            if block.attn.qkv.in_features * 3 != block.attn.qkv.out_features:
                raise ValueError("timm's SwinTransformer: head_dim must be dim / num_heads")
    _average(module)
    settings: dict[str, Any] = {
        "embed_dim": embed.proj.out_channels,
        "depths": tuple(len(stage.blocks) for stage in module.layers),
        "heads": tuple(stage.blocks[0].attn.num_heads for stage in module.layers),
        "window": first.attn.window_size[0],
        "patch": pair(embed.patch_size)[0],
        "mlp_ratio": _ratio(first.mlp.fc1.out_features, embed.proj.out_channels),
        "img_size": pair(embed.img_size),
        "in_chans": embed.proj.in_channels,
        "num_classes": module.num_classes,
    }
    if first.attn.qkv.bias is None:
        settings["mixer_options"] = {"qkv_bias": False}
    state = rename(module.state_dict(), [(r"^head\.fc\.", "head.")])
    # Merging stands at the end of a stage in the authors' code, at the start of the next one here.
    rules: Rules = [(rf"^layers\.{i}\.downsample\.", f"layers.{i - 1}.downsample.") for i in range(1, 9)]
    return "swin_t", settings, rename(state, rules)


def _convnext(module: Any) -> tuple[str, dict[str, Any], State]:
    _demand(module, norm_pre=None)
    if len(module.stem) != 2 or any(p.ndim == 4 for n, p in module.named_parameters() if ".mlp." in n):
        raise ValueError("timm's ConvNeXt: the stem must be patches (stem_type) and the MLP linear (conv_mlp)")
    first = module.stages[0].blocks[0]
    for s, stage in enumerate(module.stages):
        stride = 1 if isinstance(stage.downsample, nn.Identity) else stage.downsample[-1].stride[0]
        if stride != (1 if s == 0 else 2):
            raise ValueError(f"timm's ConvNeXt: stage {s} must have stride {1 if s == 0 else 2} (output_stride)")
        for i in range(len(stage.blocks)):
            block = _part(module, f"stages.{s}.blocks.{i}", "ConvNeXtBlock")
            _part(module, f"stages.{s}.blocks.{i}.mlp", "Mlp")
            _demand(block, shortcut=None)
            _gelu(module, f"stages.{s}.blocks.{i}.mlp.act")
            if block.norm.eps != 1e-6:
                raise ValueError(f"timm's ConvNeXt: norm_eps must be 1e-06, got {block.norm.eps}")
            if block.conv_dw.kernel_size != first.conv_dw.kernel_size:
                raise ValueError("timm's ConvNeXt: kernel_sizes must be the same in all stages")
    _demand(_part(module, "head", "NormMlpClassifierHead"), pre_logits=None)
    _average(module)
    width = first.conv_dw.out_channels
    settings: dict[str, Any] = {
        "depths": tuple(len(stage.blocks) for stage in module.stages),
        "dims": tuple(stage.blocks[0].conv_dw.out_channels for stage in module.stages),
        "patch": module.stem[0].stride[0],
        "kernel": first.conv_dw.kernel_size[0],
        "mlp_ratio": _ratio(first.mlp.fc1.out_features, width),
        "layer_scale": None if first.gamma is None else 1.0,
        "in_chans": module.stem[0].in_channels,
        "num_classes": module.num_classes,
    }
    rules: Rules = [
        (r"^stem\.([01])\.", r"downsample_layers.0.\1."),
        *[(rf"^stages\.{i}\.downsample\.", f"downsample_layers.{i}.") for i in range(1, 4)],
        (r"^(stages\.\d+)\.blocks\.", r"\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc([12])\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    ]
    return "convnext_t", settings, rename(module.state_dict(), rules)


def _window_blocks(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if type(part).__name__ == "SwinTransformerBlock"]


def _mixers(ours: nn.Module) -> list[WindowAttention]:
    return [part for part in ours.modules() if isinstance(part, WindowAttention)]


def _same_windows(theirs: Any, own: WindowAttention) -> None:
    """Refuses windows and shifts that the rules of the two differ in; a table of another size would be resized."""
    grid = tuple(theirs.input_resolution)
    wanted = (tuple(theirs.window_size), tuple(theirs.shift_size))
    here = (tuple(own.size), shift_offset(grid, own.size, own.shifted, own.small))
    if wanted != here:
        raise ValueError(
            f"timm's SwinTransformer: window_size and shift must be {here} on {grid[0]}x{grid[1]} tokens, got {wanted}"
        )


READERS: dict[str, Callable[[Any], tuple[str, dict[str, Any], State]]] = {
    "VisionTransformer": _vit,
    "VisionTransformerDistilled": _vit,
    "SwinTransformer": _swin,
    "ConvNeXt": _convnext,
}
