"""mu: a small encoder-decoder language model of modern parts, two thirds of its layers in the encoder.

Source: Elfeki, Liu, Voegele 2025, "Return of the Encoder: Maximizing Parameter Efficiency for SLMs".

- `model(source, target)` gives scores of the token after each target token; `generate` writes with a cache, in which
  keys and values of the source are made once
- `model(ids)` is the model as a language model: the first `split` tokens are written by the decoder alone, and what
  follows them by the decoder that reads the encoder's memory of them. No token sees a later one
- attention is narrower than the stream, with half as many key and value heads as query heads; rotary positions in
  self-attention only, counted from the middle of the text in the encoder (only differences matter, but near the
  middle they are rounded least)
- padding is never read; a source of padding alone gives zeros, where the released code gives the mean of the padding
- released files share key heads as [0, 1, 2, 0, 1, 2] (or, `interleaved`, as [0, 0, 1, 1, 2, 2]). The model itself
  always keeps the heads of a group together, as a permutation of heads changes nothing: files are put in that order
- `stretch` lets the rotary base grow with texts beyond `max_len` (dynamic NTK scaling). Each new length then turns
  everything anew, so a target beyond `max_len` is written without cache, as the released code writes all targets
- not built: the vision variant, whose image tower is another model
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers import Block, Mlp
from gossamer.layers.init import init_transformer
from gossamer.layers.language import RMSNorm, WordHead, WordStem
from gossamer.layers.linear import linear
from gossamer.layers.prune import check_axis, expand_heads, slice_linear
from gossamer.mixers.grouped_query import GroupedMixer, check_groups
from gossamer.mixers.rotary import RotaryAttention
from gossamer.models.registry import State, create_model, register_system
from gossamer.ops.attention import attention, join_heads, split_heads
from gossamer.ops.rotary import rotary_frequencies, rotate

EPS = 1e-6

KeysValues = tuple[Tensor, Tensor]


class Memory(NamedTuple):
    """What the encoder made of the source, and which of its tokens are no padding."""

    tokens: Float[Tensor, "b m c"]
    mask: Bool[Tensor, "b m"]


class Source(NamedTuple):
    """Keys and values of a memory for each decoder block, and which of its tokens are no padding."""

    kept: list[KeysValues]
    mask: Tensor


class Writing(NamedTuple):
    """Where writing stands: the target so far, and keys and values of it and of the source for each decoder block."""

    ids: Tensor
    own: list[KeysValues]
    source: Source


class SelfAttention(RotaryAttention):
    """Rotary grouped-query attention, its base `base (f n / n_max - (f - 1))^(d / (d - 2))` for `n > n_max` tokens.

    Args:
        heads, kv_heads, head_dim: query heads, key and value heads, channels of one.
        base: of the rotary frequencies.
        max_len: `n_max`, tokens up to which the base stays.
        stretch: `f`, 1 for no growth.
        drop: dropout of attention weights.
        causal: attend only to earlier tokens and to itself; otherwise positions are counted from the middle.
    """

    def __init__(
        self,
        dim: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        base: float,
        max_len: int,
        stretch: float,
        drop: float,
        causal: bool,
    ) -> None:
        super().__init__(
            dim,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qkv_bias=True,
            out_bias=True,
            base=base,
            causal=causal,
        )
        self.base = base
        self.max_len = max_len
        self.stretch = stretch
        self.drop = drop

    def frequencies_for(self, n: int | Tensor) -> Float[Tensor, " half"]:
        """Turns per token in a text of `n`; the tracer's sizes are tensors."""
        if self.stretch == 1 or n <= self.max_len:
            return self.frequencies.float()
        grown = (self.stretch * int(n) / self.max_len - (self.stretch - 1)) ** (self.head_dim / (self.head_dim - 2))
        return rotary_frequencies(self.head_dim, self.base * grown).to(self.frequencies.device)

    def project(self, x: Float[Tensor, "b n c"], start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        n = x.shape[1]
        q, k, v = GroupedMixer.project(self, x)
        positions = torch.arange(start, start + n, device=x.device, dtype=torch.float32)
        if not self.causal:
            positions = positions - (n - 1) // 2
        f = self.frequencies_for(n)
        return rotate(q, positions, f), rotate(k, positions, f), v

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        q, k, v = self.project(x)
        keys = None if mask is None else mask[:, None, None, :]
        drop = self.drop if self.training else 0.0
        if self.causal:
            y = attention(q, k, v, mask=keys, causal=True, dropout=drop)
        else:
            y = read_all(q, k, v, keys, drop)
        return linear(self.proj, join_heads(y))

    def step(
        self, x_t: Float[Tensor, "b c"], state: KeysValues, mask: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Float[Tensor, "b c"], KeysValues]:
        """The next position, within `max_len`; `mask` says which tokens up to and with it are no padding."""
        q, k, v = self.project(x_t[:, None], start=state[0].shape[2])
        k, v = torch.cat((state[0], k), 2), torch.cat((state[1], v), 2)
        y = read_all(q, k, v, None if mask is None else mask[:, None, None, :])
        return linear(self.proj, join_heads(y))[:, 0], (k, v)


class CrossAttention(nn.Module):
    """`y_t = W_o concat_h(softmax(q_h(x_t)^T k_g(m_s) / sqrt(d)) v_g(m_s))`: the target reads the memory.

    Args:
        heads, kv_heads, head_dim: query heads, key and value heads, channels of one.
        drop: dropout of attention weights.
    """

    def __init__(self, dim: int, *, heads: int, kv_heads: int, head_dim: int, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.drop = drop
        self.q = nn.Linear(dim, heads * head_dim)
        self.kv = nn.Linear(dim, 2 * kv_heads * head_dim)
        self.proj = nn.Linear(heads * head_dim, dim)

    def remember(self, memory: Float[Tensor, "b m c"]) -> KeysValues:
        """Keys and values of a memory, each `(b, kv_heads, m, head_dim)`."""
        k, v = linear(self.kv, memory).unflatten(-1, (2, self.kv_heads, self.head_dim)).unbind(2)
        return k.transpose(1, 2), v.transpose(1, 2)

    def forward(
        self, x: Float[Tensor, "b n c"], source: KeysValues, mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b n c"]:
        q = split_heads(linear(self.q, x), self.heads)
        y = read_all(q, *source, None if mask is None else mask[:, None, None, :], self.drop if self.training else 0.0)
        return linear(self.proj, join_heads(y))

    def widths(self) -> dict[str, int]:
        return {"groups": self.kv_heads}

    def importance(self, axis: str) -> Float[Tensor, " g"]:
        check_axis(self, axis)
        values = self.kv.weight.detach().chunk(2)[1].reshape(self.kv_heads, -1).norm(dim=1)
        return values * self.proj.weight.detach().unflatten(1, (self.kv_heads, -1)).norm(dim=(0, 2))

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        share = self.heads // self.kv_heads
        queries, keys = expand_heads(index, share * self.head_dim), expand_heads(index, self.head_dim)
        slice_linear(self.q, queries, inputs=False)
        slice_linear(self.kv, torch.cat((keys, keys + self.kv_heads * self.head_dim)), inputs=False)
        slice_linear(self.proj, queries, inputs=True)
        self.kv_heads = len(index)
        self.heads = share * len(index)


def read_all(
    q: Float[Tensor, "b h n d"],
    k: Float[Tensor, "b g m d"],
    v: Float[Tensor, "b g m d"],
    mask: Bool[Tensor, "b 1 1 m"] | None = None,
    drop: float = 0.0,
) -> Float[Tensor, "b h n d"]:
    """Attention whose queries all see the same keys: those of a group stand in one line, and no key is repeated."""
    share = q.shape[1] // k.shape[1]
    y = attention(q.unflatten(1, (k.shape[1], share)).flatten(2, 3), k, v, mask=mask, dropout=drop)
    return y.unflatten(2, (share, -1)).flatten(1, 2)


class LastDropMlp(Mlp):
    """`drop(W2 act(W1 x))`: dropout behind the second product alone."""

    def __init__(self, dim: int, hidden: int, *, drop: float) -> None:
        super().__init__(dim, hidden, act=partial(nn.GELU, approximate="tanh"))
        self.last = nn.Dropout(drop)

    def forward(self, x: Float[Tensor, "b *grid c"]) -> Float[Tensor, "b *grid c"]:
        return self.last(super().forward(x))


class DecoderBlock(nn.Module):
    """`x += mixer(norm1 x)`, `x += cross(norm2 x, source)`, `x += mlp(norm3 x)`; the second where there is a source."""

    def __init__(self, dim: int, mixer: SelfAttention, cross: CrossAttention, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1 = RMSNorm(dim, eps=EPS)
        self.mixer = mixer
        self.norm2 = RMSNorm(dim, eps=EPS)
        self.cross = cross
        self.norm3 = RMSNorm(dim, eps=EPS)
        self.mlp = mlp

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        source: KeysValues | None = None,
        source_mask: Bool[Tensor, "b m"] | None = None,
    ) -> Float[Tensor, "b n c"]:
        return self._rest(x + self.mixer(self.norm1(x), mask=mask), source, source_mask)

    def step(
        self,
        x_t: Float[Tensor, "b c"],
        state: KeysValues,
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        source: KeysValues | None = None,
        source_mask: Bool[Tensor, "b m"] | None = None,
    ) -> tuple[Float[Tensor, "b c"], KeysValues]:
        """One position, equal to the full pass at that position."""
        y, state = self.mixer.step(self.norm1(x_t), state, mask)
        return self._rest((x_t + y)[:, None], source, source_mask)[:, 0], state

    def _rest(self, x: Tensor, source: KeysValues | None, mask: Tensor | None) -> Tensor:
        if source is not None:
            x = x + self.cross(self.norm2(x), source, mask)
        return x + self.mlp(self.norm3(x))


class EncoderDecoder(nn.Module):
    """An encoder, a decoder that reads its memory, and one table of words for source, target and scores.

    Args:
        stem: words.
        encoder: blocks of the encoder; `decoder` those of the decoder.
        pad_id: id that is never read.
        split: tokens of a plain text that are the source, see `forward`.
        interleaved: how released files of this model order their heads.

    Raises:
        ValueError: `split` is below 2.
    """

    def __init__(
        self,
        stem: WordStem,
        encoder: list[Block],
        decoder: list[DecoderBlock],
        *,
        pad_id: int,
        split: int,
        interleaved: bool,
    ) -> None:
        super().__init__()
        if split < 2:
            raise ValueError(f"split must be at least 2 tokens, got {split}")
        dim = stem.words.embedding_dim
        self.pad_id = pad_id
        self.split = split
        self.interleaved = interleaved
        self.stem = stem
        self.encoder = nn.ModuleList(encoder)
        self.encoder_norm = RMSNorm(dim, eps=EPS)
        self.decoder = nn.ModuleList(decoder)
        self.norm = RMSNorm(dim, eps=EPS)
        self.head = WordHead(stem.words.num_embeddings, dim, tied=stem)

    def encode(self, source: Int[Tensor, "b m"]) -> Memory:
        """The memory of a source."""
        x, mask = self.stem(source)[0], source != self.pad_id
        for block in self.encoder:
            x = block(x, mask=mask)
        return Memory(self.encoder_norm(x), mask)

    def remember(self, memory: Memory) -> Source:
        """What the decoder blocks read of a memory."""
        return Source([block.cross.remember(memory.tokens) for block in self._decoder()], memory.mask)

    def decode(self, memory: Memory | Source | None, target: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """Scores of the token after each of `target`, given a memory or nothing."""
        source = self.remember(memory) if isinstance(memory, Memory) else memory
        x, mask = self.stem(target)[0], target != self.pad_id
        for i, block in enumerate(self._decoder()):
            x = (
                block(x, mask=mask)
                if source is None
                else block(x, mask=mask, source=source.kept[i], source_mask=source.mask)
            )
        return self.head(self.norm(x))

    def forward(self, source: Int[Tensor, "b m"], target: Int[Tensor, "b n"] | None = None) -> Float[Tensor, "b t v"]:
        """Scores of the token after each of `target`; or, with one text alone, after each of that.

        Of one text `x` the source is `x[:split]`. Its own tokens are foretold by the decoder that has no memory; the
        token behind it and all later ones by the decoder that has, and starts from the last token of the source.
        """
        if target is not None:
            return self.decode(self.encode(source), target)
        if source.shape[1] <= self.split:
            return self.decode(None, source)
        alone = self.decode(None, source[:, : self.split - 1])
        memory = self.encode(source[:, : self.split])
        return torch.cat((alone, self.decode(memory, source[:, self.split - 1 :])), 1)

    def begin(self, memory: Memory) -> Writing:
        """The state before the first target token: the source's keys and values are made here, once."""
        like = memory.tokens
        empty = torch.empty(len(like), 0, dtype=torch.long, device=like.device)
        own = [block.mixer.initial_state(len(like), like.device, like.dtype) for block in self._decoder()]
        return Writing(empty, own, self.remember(memory))

    def step(self, ids_t: Int[Tensor, " b"], state: Writing) -> tuple[Float[Tensor, "b v"], Writing]:
        """Scores of the token after `ids_t`, and the state behind it."""
        ids = torch.cat((state.ids, ids_t[:, None]), 1)
        mixer = self._decoder()[0].mixer
        if mixer.stretch > 1 and ids.shape[1] > mixer.max_len:
            return self.decode(state.source, ids)[:, -1], Writing(ids, state.own, state.source)
        x, own = self.stem(ids_t[:, None])[0][:, 0], []
        for block, kept, source in zip(self._decoder(), state.own, state.source.kept, strict=True):
            x, kept = block.step(x, kept, mask=ids != self.pad_id, source=source, source_mask=state.source.mask)
            own.append(kept)
        return self.head(self.norm(x)[:, None])[:, 0], Writing(ids, own, state.source)

    @torch.no_grad()
    def generate(
        self,
        source: Int[Tensor, "b m"],
        *,
        bos_id: int | Int[Tensor, " b"],
        eos_id: int | None = None,
        max_new: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "b n"]:
        """Targets for the sources: `bos_id`, then tokens up to `eos_id`, which also fills up what ended early.

        Args:
            bos_id: what targets start from, one for all or one each.
            eos_id: what ends a target; without it all have `max_new` tokens.
            temperature: scores are divided by it and a token is drawn; 0 takes the likeliest.
            top_k: draw among the likeliest so many.
            generator: source of chance.

        Raises:
            ValueError: a negative temperature, or `top_k` below 1.
        """
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature must be 0 or more and top_k 1 or more; got {temperature} and {top_k}")
        was_training = self.training
        self.eval()
        state = self.begin(self.encode(source))
        ids = torch.as_tensor(bos_id, device=source.device).expand(len(source))[:, None]
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(max_new):
            scores, state = self.step(ids[:, -1], state)
            if temperature == 0:
                chosen = scores.argmax(-1)
            else:
                scores = scores.float() / temperature
                if top_k is not None and top_k < scores.shape[-1]:
                    least = scores.topk(top_k).values[:, -1:]
                    scores = scores.masked_fill(scores < least, float("-inf"))
                chosen = torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]
            if eos_id is not None:
                ended = ended | (chosen == eos_id)
                chosen = chosen.masked_fill(ended, eos_id)
            ids = torch.cat((ids, chosen[:, None]), 1)
            if eos_id is not None and bool(ended.all()):
                break
        self.train(was_training)
        return ids

    def _decoder(self) -> list[DecoderBlock]:
        return list(self.decoder)  # type: ignore[arg-type]


def decoder_twin(model: EncoderDecoder) -> nn.Module:
    """A decoder-only `llama` with as many layers in all, the same attention, words and (nearly) parameters.

    Its gated MLPs are as wide as brings the parameters nearest.
    """
    block: Any = model.encoder[0]
    depth = len(model.encoder) + len(model.decoder)
    sizes = dict(
        dim=model.stem.words.embedding_dim,
        depth=depth,
        heads=block.mixer.heads,
        kv_heads=block.mixer.kv_heads,
        head_dim=block.mixer.head_dim,
        vocab_size=model.stem.words.num_embeddings,
        max_len=model.stem.max_len,
        pad_id=model.pad_id,
        eps=EPS,
        rope_base=block.mixer.base,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        tied=True,
    )
    with torch.device("meta"):
        least = sum(p.numel() for p in create_model("llama", **sizes, hidden=1).parameters())
    wanted = sum(p.numel() for p in model.parameters())
    unit = depth * (3 * sizes["dim"] + 2)
    return create_model("llama", **sizes, hidden=max(1, 1 + round((wanted - least) / unit)))


def _convert(model: Any, state: State) -> State:
    """Separate products joined, and heads of a group put together."""
    mixer = model.encoder[0].mixer
    share = mixer.heads // mixer.kv_heads
    order = torch.arange(mixer.heads)
    if not model.interleaved:
        order = order.view(share, mixer.kv_heads).t().flatten()
    channels = expand_heads(order, mixer.head_dim)
    joined: State = {}
    for key, value in state.items():
        at, _, part = key.rpartition("_linear.")
        if at.endswith(".q"):
            q = value[channels]
            k, v = (state[f"{at[:-1]}{name}_linear.{part}"] for name in "kv")
            if ".cross." in at:
                joined |= {f"{at}.{part}": q, f"{at[:-1]}kv.{part}": torch.cat((k, v))}
            else:
                joined[f"{at}kv.{part}"] = torch.cat((q, k, v))
        elif at.endswith(".out"):
            joined[f"{at[:-3]}proj.{part}"] = value[:, channels] if value.ndim == 2 else value
        elif not at:
            joined[key] = value
    return joined


@register_system(
    "mu-encoder-decoder-slm",
    tasks=("language-modelling",),
    variants={"mu_330m": {}},
    rules=[
        (r"^transformer\.wte\.", "stem.words."),
        (r"^lm_head\.", "head.fc."),
        (r"^transformer\.ln_e\.", "encoder_norm."),
        (r"^transformer\.ln_f\.", "norm."),
        (r"^transformer\.e\.", "encoder."),
        (r"^transformer\.h\.", "decoder."),
        (r"\.ln(\d)\.", r".norm\1."),
        (r"\.(?:causal_)?attn\.", ".mixer."),
        (r"\.cross_attn\.", ".cross."),
    ],
    convert=_convert,
)
def mu(
    *,
    dim: int = 1024,
    encoder_depth: int = 20,
    decoder_depth: int = 10,
    qkv: int = 384,
    heads: int = 6,
    kv_heads: int = 3,
    hidden: int = 4096,
    vocab_size: int = 32128,
    max_len: int = 1024,
    pad_id: int = 0,
    drop: float = 0.1,
    rope_base: float = 10000.0,
    stretch: float = 1.0,
    interleaved: bool = False,
    split: int | None = None,
) -> nn.Module:
    """An encoder-decoder: `source (b, m)` and `target (b, n)` to scores `(b, n, vocab_size)` of each next token.

    Args:
        qkv: channels of all query heads together.
        kv_heads: key and value heads.
        hidden: channels between the products of the MLP.
        max_len: longest source, and longest target, in tokens; `stretch` times as many are taken.
        drop: dropout of attention weights and behind the MLP.
        rope_base: of the rotary frequencies; beyond `max_len` tokens it grows by the factor `stretch` where that is
            above 1.
        interleaved: how released files order their heads, see the head of this file.
        split: tokens of a plain text that are the source, half of `max_len` by default.

    Raises:
        ValueError: heads that do not divide, or a `stretch` below 1.
    """
    if qkv % heads:
        raise ValueError(f"heads must divide qkv; got heads={heads}, qkv={qkv}")
    check_groups(heads, kv_heads)
    if stretch < 1 or (stretch > 1 and qkv // heads < 4):
        raise ValueError(f"stretch must be 1 or more, and above 1 with heads of 4 channels or more; got {stretch}")
    sizes: dict[str, Any] = dict(heads=heads, kv_heads=kv_heads, head_dim=qkv // heads, drop=drop)
    own: dict[str, Any] = dict(**sizes, base=rope_base, max_len=max_len, stretch=stretch)
    stem = WordStem(vocab_size, dim, int(max_len * stretch), learned=False)
    encoder = [
        Block(
            dim,
            SelfAttention(dim, **own, causal=False),
            LastDropMlp(dim, hidden, drop=drop),
            norm=partial(RMSNorm, eps=EPS),
        )
        for _ in range(encoder_depth)
    ]
    decoder = [
        DecoderBlock(
            dim,
            SelfAttention(dim, **own, causal=True),
            CrossAttention(dim, **sizes),
            LastDropMlp(dim, hidden, drop=drop),
        )
        for _ in range(decoder_depth)
    ]
    model = EncoderDecoder(
        stem, encoder, decoder, pad_id=pad_id, split=split or max(2, max_len // 2), interleaved=interleaved
    )
    init_transformer(model)
    return model
