"""GPT-2: the plain decoder of language models.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Sanh et al. 2019, "DistilBERT"
(DistilGPT2).

- pre-norm blocks of causal attention over words and learned positions; the words are the output product too
- scores of a token see earlier tokens only, so texts may be filled up behind their end with any id
- weights come from Hugging Face folders (`gossamer.models.transformers`)
"""

from functools import partial

from torch import nn

from gossamer.layers import Block, Mlp
from gossamer.layers.init import init_transformer
from gossamer.layers.language import WordHead, WordStem
from gossamer.mixers import create_mixer
from gossamer.models.bert import ACTIVATIONS
from gossamer.models.registry import register_system
from gossamer.trunks import Isotropic


@register_system(
    "gpt2",
    tasks=("language-modelling",),
    variants={
        "gpt2": {},
        "gpt2_medium": dict(dim=1024, depth=24, heads=16),
        "gpt2_large": dict(dim=1280, depth=36, heads=20),
        "gpt2_xl": dict(dim=1600, depth=48, heads=25),
        "distilgpt2": dict(depth=6),
    },
)
def gpt2(
    *,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int | None = None,
    vocab_size: int = 50257,
    max_len: int = 1024,
    pad_id: int = 0,
    act: str = "gelu_tanh",
    eps: float = 1e-5,
    drop: float = 0.1,
    tied: bool = True,
    mixer: str = "attention",
) -> nn.Module:
    """A language model: `ids (b, n)` to scores `(b, n, vocab_size)` of each next token.

    Args:
        hidden: channels between the products of the MLP, `4 * dim` by default.
        pad_id: taken for the sake of the common interface; nothing has to be masked.
        act: activation of the MLP.
        drop: dropout of words and positions.
        tied: the output product is the table of words.
        mixer: a mixer with a causal form.

    Raises:
        ValueError: an unknown activation, or a mixer without a causal form.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    norm = partial(nn.LayerNorm, eps=eps)
    stem = WordStem(vocab_size, dim, max_len, drop=drop)
    blocks = [
        Block(
            dim,
            create_mixer(mixer, dim, heads=heads, causal=True),
            Mlp(dim, hidden or 4 * dim, act=ACTIVATIONS[act]),
            norm=norm,
        )
        for _ in range(depth)
    ]
    model = Isotropic(stem, blocks, norm=norm(dim), head=WordHead(vocab_size, dim, tied=stem if tied else None))
    init_transformer(model)
    return model
