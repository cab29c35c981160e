"""Llama and its kin: the decoder most open language models are, Mistral, Qwen2, TinyLlama and SmolLM among them.

Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models" and "Llama 2"; Dubey et al. 2024,
"The Llama 3 Herd of Models"; Jiang et al. 2023, "Mistral 7B"; Yang et al. 2024, "Qwen2 Technical Report".

- pre-norm blocks with root-mean-square norms, grouped queries, rotary positions and a gated MLP (SwiGLU)
- Mistral's sliding window is not built: within its window the model is this one
- scores of a token see earlier tokens only, so texts may be filled up behind their end with any id
- weights come from Hugging Face folders (`gossamer.models.transformers`)
"""

from functools import partial
from typing import Any

from torch import nn

from gossamer.layers import Block
from gossamer.layers.init import init_transformer
from gossamer.layers.language import GatedMlp, RMSNorm, WordHead, WordStem
from gossamer.mixers import create_mixer
from gossamer.models.bert import ACTIVATIONS
from gossamer.models.registry import register_system
from gossamer.trunks import Isotropic

_LLAMA3: dict[str, Any] = dict(vocab_size=128256, hidden=14336, kv_heads=8, max_len=8192, rope_base=500000.0)


@register_system(
    "llama",
    tasks=("language-modelling",),
    variants={
        "llama2_7b": {},
        "llama2_13b": dict(dim=5120, depth=40, heads=40, hidden=13824),
        "llama3_8b": _LLAMA3,
        "tinyllama_1_1b": dict(dim=2048, depth=22, heads=32, kv_heads=4, hidden=5632, max_len=2048),
        "smollm_135m": dict(
            dim=576, depth=30, heads=9, kv_heads=3, hidden=1536, vocab_size=49152, max_len=2048, tied=True
        ),
        "mistral_7b": dict(kv_heads=8, hidden=14336),
        "qwen2_0_5b": dict(
            dim=896,
            depth=24,
            heads=14,
            kv_heads=2,
            hidden=4864,
            vocab_size=151936,
            max_len=32768,
            rope_base=1e6,
            eps=1e-6,
            qkv_bias=True,
            tied=True,
        ),
    },
)
def llama(
    *,
    dim: int = 4096,
    depth: int = 32,
    heads: int = 32,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    hidden: int = 11008,
    vocab_size: int = 32000,
    max_len: int = 4096,
    pad_id: int = 0,
    act: str = "silu",
    eps: float = 1e-5,
    rope_base: float = 10000.0,
    rope_scaling: dict[str, Any] | None = None,
    qkv_bias: bool = False,
    out_bias: bool = False,
    mlp_bias: bool = False,
    tied: bool = False,
) -> nn.Module:
    """A language model: `ids (b, n)` to scores `(b, n, vocab_size)` of each next token.

    Args:
        kv_heads: key and value heads, `heads` by default.
        head_dim: channels of a head, `dim / heads` by default.
        hidden: channels between the products of the MLP.
        pad_id: taken for the sake of the common interface; nothing has to be masked.
        act: activation of the MLP's gate.
        rope_base: of the rotary frequencies; `rope_scaling` slows them down, see `gossamer.ops.rotary`.
        qkv_bias, out_bias, mlp_bias: whether these products add one.
        tied: the output product is the table of words.

    Raises:
        ValueError: an unknown activation, or heads that do not divide.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}; got {act!r}")
    norm = partial(RMSNorm, eps=eps)
    stem = WordStem(vocab_size, dim, max_len, learned=False)
    attention: dict[str, Any] = dict(
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        base=rope_base,
        scaling=rope_scaling,
        causal=True,
    )
    blocks = [
        Block(
            dim,
            create_mixer("rotary_gqa", dim, **attention),
            GatedMlp(dim, hidden, act=ACTIVATIONS[act], bias=mlp_bias),
            norm=norm,
        )
        for _ in range(depth)
    ]
    model = Isotropic(stem, blocks, norm=norm(dim), head=WordHead(vocab_size, dim, tied=stem if tied else None))
    init_transformer(model)
    return model
