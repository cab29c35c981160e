"""GAM: a language model whose blocks mix a causal convolution with a read from a learned memory, in place of attention.

Source: Rishiraj 2025, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling".

- pre-norm blocks, learned positions, the vocabulary's table is both embedding and output product
- as in the authors' code the shared table starts as a linear layer's weights, not as an embedding's, and the positions
  start from N(0, 1)
- the memory moves nothing between tokens: a logit sees `1 + depth * (kernel - 1)` tokens, 13 in the base model
- the paper's transformer baseline is the same model with the mixer "attention"
- with `num_classes` it is a text classifier (ours, not the paper's): padding masked, the mean over words, one linear
  layer; the convolution then looks to both sides
"""

from typing import Any

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gossamer.layers import Block, Classifier, Mlp, TextStem
from gossamer.mixers import create_mixer, mixer_class, options_for
from gossamer.models.registry import State, register_system
from gossamer.trunks import Isotropic


class WordStem(nn.Module):
    """`x = drop(words[ids] + positions)`: every id is a word, none is padding.

    Args:
        vocab_size: rows of the word table.
        dim: channels.
        max_len: longest text in tokens.
        drop: dropout probability.
    """

    def __init__(self, vocab_size: int, dim: int, max_len: int, drop: float = 0.0) -> None:
        super().__init__()
        self.max_len = max_len
        self.words = nn.Embedding(vocab_size, dim)
        # The table is the output product's as well and starts like one.
        nn.init.uniform_(self.words.weight, -(dim**-0.5), dim**-0.5)
        self.positions = nn.Parameter(nn.init.normal_(self.words.weight.new_empty(1, max_len, dim)))
        self.drop = nn.Dropout(drop)

    def forward(self, ids: Int[Tensor, "b n"]) -> tuple[Float[Tensor, "b n c"], None]:
        if ids.shape[1] > self.max_len:
            raise ValueError(f"text is {ids.shape[1]} tokens long, the model takes {self.max_len} (max_len)")
        return self.drop(self.words(ids) + self.positions[:, : ids.shape[1]]), None


class LanguageModel(Isotropic):
    """`logits = norm(blocks(stem(ids))) words^T`: the trunk with its word table as the head."""

    stem: WordStem

    def __init__(self, stem: WordStem, blocks: list[nn.Module], *, norm: nn.Module) -> None:
        super().__init__(stem, blocks, norm=norm, head=nn.Identity())

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n vocab"]:
        return F.linear(self.encode(ids)[0], self.stem.words.weight)


class _EndDropMlp(Mlp):
    """The MLP with dropout on its output only."""

    def __init__(self, dim: int, hidden: int, drop: float) -> None:
        super().__init__(dim, hidden)
        self.end = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return self.end(super().forward(x))


def _scale(spec: dict[str, Any], size: str) -> tuple[str, dict[str, Any]]:
    dim, depth = {"xs": (64, 2), "s": (128, 2), "m": (192, 3), "l": (256, 4)}[size]
    return "gam_base", {"dim": dim, "depth": depth, "slots": 2 * dim, "drop": 0.3, **spec}


def _convert(model: Any, state: State) -> State:
    head, words = state.pop("head.weight", None), state.get("stem.words.weight")
    if head is not None and words is not None and not head.is_meta and not head.equal(words):
        raise ValueError("head.weight and token_embedding.weight of the checkpoint differ; they are one tensor in GAM")
    if "stem.positions" in state:
        state["stem.positions"] = state["stem.positions"][None]
    return state


@register_system(
    "gam",
    tasks=("text-classification",),
    scale=_scale,
    variants={
        "gam_base": {},
        "gam_global_only": dict(fusion="global"),
        "gam_sum_fusion": dict(fusion="sum"),
        "gam_local_only": dict(fusion="local"),
        "transformer_baseline": dict(mixer="attention"),
    },
    rules=[
        (r"\.attn\.bias$", None),
        (r"^token_embedding\.", "stem.words."),
        (r"^pos_embedding\.weight$", "stem.positions"),
        (r"^ln_f\.", "norm."),
        (r"\.memory_bank$", ".mixer.bank"),
        (r"\.causal_conv\.", ".mixer.conv."),
        (r"\.gate\.", ".mixer.gate."),
        (r"\.attn\.c_attn\.", ".mixer.qkv."),
        (r"\.attn\.c_proj\.", ".mixer.proj."),
        (r"\.ffn\.0\.", ".mlp.fc1."),
        (r"\.ffn\.2\.", ".mlp.fc2."),
        (r"\.ln_?([12])\.", r".norm\1."),
    ],
    convert=_convert,
)
def gam(
    *,
    dim: int = 512,
    depth: int = 6,
    slots: int = 512,
    kernel: int = 3,
    fusion: str = "gate",
    mixer: str = "gam",
    heads: int = 8,
    drop: float = 0.1,
    vocab_size: int = 10000,
    max_len: int = 256,
    num_classes: int | None = None,
    pad_id: int = 0,
) -> nn.Module:
    """A GAM language model, or a text classifier of its blocks.

    Args:
        dim: channels.
        depth: blocks.
        slots: rows of each block's memory.
        kernel: tokens the convolution reads.
        fusion: how the two paths are joined: `gate`, `sum`, or one alone: `local`, `global`.
        mixer: any registered mixer; a language model needs one with a causal form.
        heads: attention heads, for mixers that have them.
        drop: dropout of the embeddings, of each MLP, and of a mixer that has it.
        max_len: longest text in tokens.
        num_classes: None makes a language model.
        pad_id: the id that stands for no word, for the classifier.

    Raises:
        ValueError: a language model with a mixer that has no causal form.
    """
    causal = num_classes is None
    if causal and not mixer_class(mixer).causal_form:
        raise ValueError(f"mixer must have a causal form for a language model, got {mixer!r}")
    wanted = dict(slots=slots, kernel=kernel, fusion=fusion, heads=heads, attn_drop=drop, drop=drop, causal=causal)
    options = options_for(mixer, wanted)
    blocks: list[nn.Module] = [
        Block(dim, create_mixer(mixer, dim, grid=(max_len,), **options), _EndDropMlp(dim, 4 * dim, drop))
        for _ in range(depth)
    ]
    if num_classes is None:
        return LanguageModel(WordStem(vocab_size, dim, max_len, drop), blocks, norm=nn.LayerNorm(dim))
    stem = TextStem(vocab_size, dim, max_len, pad_id=pad_id, drop=drop)
    head = Classifier(dim, num_classes, drop=drop)
    return Isotropic(stem, blocks, norm=nn.LayerNorm(dim), head=head)
