"""BERT and its kin: the text encoder most models in use are, RoBERTa, DistilBERT and MiniLM among them.

Source: Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers"; Liu et al. 2019, "RoBERTa";
Sanh et al. 2019, "DistilBERT"; Wang et al. 2020, "MiniLM"; Reimers and Gurevych 2019, "Sentence-BERT" (pooling).

- post-norm blocks over words and learned positions; the embedding of the first segment is part of the positions
- `head` is a classifier over the first token, or the sentence vector of Sentence-BERT
- weights come from Hugging Face folders (`gossamer.models.transformers`)
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn

from gossamer.layers import Block, Mlp
from gossamer.layers.embed import TextStem
from gossamer.layers.heads import Classifier, DenseClassifier, SentenceVector
from gossamer.layers.init import init_transformer
from gossamer.mixers import create_mixer
from gossamer.models.registry import register_system
from gossamer.trunks import Isotropic

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@register_system(
    "bert",
    tasks=("text-classification", "sentence-similarity"),
    variants={
        "bert_base": {},
        "bert_large": dict(dim=1024, depth=24, heads=16),
        "minilm_l6_h384": dict(dim=384, depth=6),
        "minilm_l12_h384": dict(dim=384, depth=12),
        "distilbert_base": dict(depth=6, head_act="relu"),
        "roberta_base": dict(vocab_size=50265, max_len=512, pad_id=1, eps=1e-5),
    },
)
def bert(
    *,
    dim: int = 768,
    depth: int = 12,
    heads: int = 12,
    hidden: int | None = None,
    vocab_size: int = 30522,
    max_len: int = 512,
    pad_id: int = 0,
    act: str = "gelu",
    eps: float = 1e-12,
    drop: float = 0.1,
    pool: Literal["token", "mean", "max"] = "mean",
    normalize: bool = True,
    num_classes: int = 0,
    classifier: Literal["dense", "linear"] = "dense",
    head_act: str = "tanh",
    mixer: str = "attention",
) -> nn.Module:
    """A text encoder.

    Args:
        hidden: channels between the products of the MLP, `4 * dim` by default.
        act: activation of the MLP, `head_act` that of the classifier's inner layer.
        pool: how tokens become a sentence vector; `normalize` gives it length 1.
        num_classes: 0 gives sentence vectors.
        classifier: `dense` is BERT's, over the first token; `linear` scores the pooled tokens.

    Raises:
        ValueError: an unknown activation.
    """
    for name, value in (("act", act), ("head_act", head_act)):
        if value not in ACTIVATIONS:
            raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}; got {value!r}")
    norm = partial(nn.LayerNorm, eps=eps)
    stem = TextStem(vocab_size, dim, max_len, pad_id=pad_id, norm=norm, drop=drop)
    blocks = [
        Block(
            dim,
            create_mixer(mixer, dim, heads=heads),
            Mlp(dim, hidden or 4 * dim, act=ACTIVATIONS[act]),
            norm=norm,
            residual="post",
        )
        for _ in range(depth)
    ]
    head: nn.Module
    if num_classes and classifier == "linear":
        head = Classifier(dim, num_classes, pool="token" if pool == "token" else "mean", drop=drop)
    elif num_classes:
        head = DenseClassifier(dim, num_classes, act=ACTIVATIONS[head_act], drop=drop)
    else:
        head = SentenceVector(pool, normalize=normalize)
    model = Isotropic(stem, blocks, norm=None, head=head)
    init_transformer(model)
    return model
