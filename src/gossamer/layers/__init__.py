"""Parts everyone shares: norms, MLPs, positions, embeddings, heads, blocks. Channels last everywhere."""

from gossamer.layers.blocks import Block, DropPath
from gossamer.layers.conv import Conv, ConvNorm
from gossamer.layers.embed import PatchEmbed, TextStem, TokenStem
from gossamer.layers.heads import Classifier, SequencePool, mean_pool
from gossamer.layers.mlp import Mlp
from gossamer.layers.norms import BatchNorm, GroupNorm1, LayerNorm
from gossamer.layers.positions import GridPositions, resize_positions, sinusoid

__all__ = [
    "BatchNorm",
    "Block",
    "Classifier",
    "Conv",
    "ConvNorm",
    "DropPath",
    "GridPositions",
    "GroupNorm1",
    "LayerNorm",
    "Mlp",
    "PatchEmbed",
    "SequencePool",
    "TextStem",
    "TokenStem",
    "mean_pool",
    "resize_positions",
    "sinusoid",
]
