"""Mixture of depths: in a block, the tokens its router weighs most are worked on, the others go by.

`w_i = 1 + 0.2 tanh(r . x_i + r_0)`, r zero at first; `y_i = h_i + w_i mlp(norm(h_i))` for tokens that are worked on,
`h` the sum after attention among them alone, and `y_i = w_i x_i` for the others.

Source: Zhang et al. 2024, "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay" (tanh-gated weights,
weights on both kinds of tokens); Raposo et al. 2024, "Mixture-of-Depths" (the mechanism).

- the router learns through `w` alone; what is not a target (class token, text beside vision) always goes through and is
  never weighed
- of a sample's m targets `trunc(keep * m)` are worked on; they keep their order, so causal attention stays causal
- by the paper targets are tokens of the prompt, and all are ranked together. A causal model that routes every token
  must not look ahead, so it has a rule of ours: of each `WINDOW` tokens in a row the same number is worked on, a token
  if its logit reaches a running quantile, or if as many places as tokens are left
- where a block normalises after its sums (`post`), the weight is inside the norm
- the last router of a model whose head reads one token gets no gradient: nobody reads what it weighs. It stays at zero,
  and the tokens in front are worked on
- rotary positions are the tokens' own, not those in the shorter sequence
- the number of tokens worked on depends on shapes alone, so the block exports
"""

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.blocks import Block
from gossamer.layers.class_attention import added
from gossamer.layers.ranking import EPS, highest
from gossamer.layers.reduce import first_branch
from gossamer.ops import tokens as ops
from gossamer.ops.attention import attention, join_heads

# Tokens in a row of which a causal model works on a fixed number.
WINDOW = 16
# Of the running quantile, what one training batch replaces.
RATE = 0.05


class Decoding(NamedTuple):
    """What a block remembers between tokens: keys and values, whose they are, places taken in this window, position.

    Behind a prompt whose targets were named, no token is `routed` any more.
    """

    keys: Tensor
    values: Tensor
    real: Tensor
    taken: Tensor
    position: int
    routed: bool = True


class DepthBlock(nn.Module):
    """A block that works on the share `keep` of its target tokens.

    Args:
        block: the block whose work is done.
        keep: share of the targets, in (0, 1].
        protect: leading tokens that are no targets.
        alpha: the weights lie within `1 - alpha` and `1 + alpha`.

    Raises:
        ValueError: `keep` is not in (0, 1], or the block has one residual branch only.
    """

    reduces: ClassVar[bool] = True

    def __init__(self, block: Block, keep: float, *, protect: int = 0, alpha: float = 0.2) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        if block.norm2 is None:
            raise ValueError(f"a block of one residual branch ({block.residual}) has no output of its MLP to weigh")
        self.block = block
        self.keep = keep
        self.protect = protect
        self.alpha = alpha
        self.router = nn.Linear(block.mixer.dim, 1)
        nn.init.zeros_(self.router.weight)
        nn.init.zeros_(self.router.bias)
        self.causal = bool(getattr(block.mixer, "causal", False))
        self.threshold: Tensor | None = None
        if self.causal:
            del self.threshold
            self.register_buffer("threshold", torch.zeros(()))

    def forward(
        self,
        x: Float[Tensor, "b n c"],
        *,
        mask: Bool[Tensor, "b n"] | None = None,
        sizes: Float[Tensor, "b n"] | None = None,
        targets: Bool[Tensor, "_b _n"] | None = None,
    ) -> tuple[Float[Tensor, "b n c"], Bool[Tensor, "b n"] | None, Float[Tensor, "b n"] | None]:
        """As many tokens as came in.

        Args:
            targets: tokens that may be passed by (vision tokens of a prompt), ranked together; None: all real ones
                but `protect` in front.

        Raises:
            ValueError: `targets` has another shape than the tokens.
        """
        if targets is not None and targets.shape != x.shape[:2]:
            raise ValueError(f"targets must be {tuple(x.shape[:2])}, one for each token, got {tuple(targets.shape)}")
        logits = self.router(x)[..., 0]
        weights = self.weights(logits)
        place = torch.arange(x.shape[1], device=x.device)
        if targets is not None:
            weighed = targets if mask is None else targets & mask
        else:
            weighed = (place >= self.protect).expand(x.shape[:2])
            weighed = weighed if mask is None else weighed & mask
        weights = torch.where(weighed, weights, 1.0)
        if self.causal and self.training and targets is None:
            self._follow(logits, weighed)
        if self.keep == 1:
            h, _ = first_branch(self.block, x, mask, sizes)
            return self._second(h, weights), mask, sizes
        if targets is None and self.causal:
            index, real = self._online(logits, mask)
        else:
            index, real = self._ranked(logits, mask, weighed, free=targets is None)
        passed = x * weights[..., None]
        chosen = None if sizes is None else sizes.gather(1, index)
        h = self._first(ops.take(x, index), index, real, chosen)
        y = self._second(h, weights.gather(1, index))
        if real is not None:
            y = torch.where(real[..., None], y, ops.take(passed, index))
        return ops.put(passed, index, y), mask, sizes

    def weights(self, logits: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
        """`1 + alpha tanh(logits)`."""
        return 1 + self.alpha * torch.tanh(logits)

    def _first(self, x: Tensor, index: Tensor, mask: Tensor | None, sizes: Tensor | None) -> Tensor:
        """The block up to its second branch, on tokens that stood at the places `index`."""
        block = self.block
        if not hasattr(block.mixer, "frequencies"):
            return first_branch(block, x, mask, sizes)[0]
        q, k, v = self._turned(x, index - torch.arange(x.shape[1], device=x.device))
        y = attention(q, k, v, mask=None if mask is None else mask[:, None, None, :], causal=self.causal)
        return added(block, x, block.mixer.proj(join_heads(y)))

    def _turned(self, x: Tensor, further: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attention reads of the tokens, rotary ones turned by so many places more than their number here."""
        block, mixer = self.block, self.block.mixer
        q, k, v = mixer.project(block.norm1(x) if block.residual in ("pre", "stream") else x)
        if hasattr(mixer, "frequencies"):
            angles = further[:, None, :, None].float() * mixer.frequencies.float()
            cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
            q, k = (
                torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
                for first, second in (q.chunk(2, -1), k.chunk(2, -1))
            )
        return q, k, v

    def _second(self, x: Tensor, weights: Tensor) -> Tensor:
        block = self.block
        out = block.mlp(block.norm2(x) if block.residual == "pre" else x)
        x = block._add(x, out * weights[..., None], block.scale2)
        return block.norm2(x) if block.residual == "post" else x

    def _ranked(
        self, logits: Tensor, mask: Tensor | None, weighed: Tensor, *, free: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Places of the tokens to work on, in order, and which of them count: a sample may have fewer than another."""
        n = logits.shape[1]
        score = torch.where(weighed, logits, float("inf"))
        if mask is not None:
            score = torch.where(mask, score, -float("inf"))
        # Where nothing else goes through, one token must.
        least = 0 if self.protect else 1
        capacity = self.protect + max(least, int(self.keep * (n - self.protect) + EPS))
        if mask is None and free:
            return highest(score, capacity).sort(dim=1).values, None
        always = ~weighed if mask is None else ~weighed & mask
        count = always.sum(1) + (weighed.sum(1) * self.keep + EPS).floor().long()
        count = count.clamp(min=1)
        if not free:
            capacity = int(count.max())
        index, order = highest(score, capacity).sort(dim=1)
        return index, (torch.arange(capacity, device=index.device) < count[:, None]).gather(1, order)

    # ---- without looking ahead -----------------------------------------------------------------------------------

    @property
    def places(self) -> int:
        """Tokens of a window that a causal model works on."""
        return max(1, round(self.keep * WINDOW))

    def _follow(self, logits: Tensor, weighed: Tensor) -> None:
        assert self.threshold is not None
        seen = logits.detach()[weighed].float()
        if len(seen):
            self.threshold.lerp_(seen.kthvalue(1 + int((1 - self.keep) * (len(seen) - 1))).values, RATE)

    def _online(self, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        n, places = logits.shape[1], self.places
        assert self.threshold is not None
        wanted = logits >= self.threshold
        wanted = F.pad(wanted if mask is None else wanted & mask, (0, -n % WINDOW)).unflatten(1, (-1, WINDOW))
        # Taken after j tokens: all wanted ones while there is place, and no fewer than leave `places` reachable.
        left = torch.arange(WINDOW - 1, -1, -1, device=logits.device)
        taken = torch.maximum(wanted.long().cumsum(-1).clamp(max=places), places - left)
        worked = (taken > F.pad(taken, (1, -1))).flatten(1)[:, :n]
        capacity = n // WINDOW * places + min(n % WINDOW, places)
        order = worked.long() * 2 * n - torch.arange(n, device=logits.device)
        index = order.topk(capacity, dim=1).indices
        if mask is None and n % WINDOW == 0:
            return index, None
        return index, (worked if mask is None else worked & mask).gather(1, index)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Decoding:
        """An empty decoding state."""
        mixer = self.block.mixer
        if not self.causal or not hasattr(mixer, "project"):
            raise ValueError(f"mixer {type(mixer).__name__} is no causal attention; it has no decoding form")
        keys, values = mixer.initial_state(batch, device, dtype)
        nothing = torch.zeros(batch, 0, dtype=torch.bool, device=device)
        return Decoding(keys, values, nothing, torch.zeros(batch, dtype=torch.long, device=device), 0)

    def prefill(
        self, x: Float[Tensor, "b n c"], targets: Bool[Tensor, "b n"]
    ) -> tuple[Float[Tensor, "b n c"], Decoding]:
        """A prompt without padding, and the state to go on from by `step`: keys of the tokens that were worked on.

        Args:
            targets: tokens that may be passed by; those that come behind the prompt are none.
        """
        y, _, _ = self(x, targets=targets)
        if self.keep == 1:
            index, real = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]), None
        else:
            index, real = self._ranked(self.router(x)[..., 0], None, targets, free=False)
        _, k, v = self._turned(ops.take(x, index), index - torch.arange(index.shape[1], device=x.device))
        state = self.initial_state(len(x), x.device, x.dtype)
        real = torch.ones_like(index, dtype=torch.bool) if real is None else real
        return y, state._replace(keys=k, values=v, real=real, position=x.shape[1], routed=False)

    def step(self, x_t: Float[Tensor, "b c"], state: Decoding) -> tuple[Float[Tensor, "b c"], Decoding]:
        """One position: equal to the full pass there. A token that no sample works on leaves no trace in the cache."""
        mixer = self.block.mixer
        assert self.threshold is not None
        logits = self.router(x_t)[:, 0]
        weights = self.weights(logits)[:, None]
        j = state.position % WINDOW
        taken = torch.zeros_like(state.taken) if j == 0 else state.taken
        worked = (taken < self.places) & ((logits >= self.threshold) | (self.places - taken >= WINDOW - j))
        if self.keep == 1 or not state.routed:
            worked = torch.ones_like(worked)
        if not state.routed:
            weights = torch.ones_like(weights)
        after = state._replace(taken=taken + worked, position=state.position + 1)
        if not worked.any():
            return x_t * weights, after
        x = x_t[:, None]
        q, k, v = self._turned(x, torch.full_like(state.taken, state.position)[:, None])
        k, v = torch.cat((state.keys, k), 2), torch.cat((state.values, v), 2)
        real = torch.cat((state.real, worked[:, None]), 1)
        h = added(self.block, x, mixer.proj(join_heads(attention(q, k, v, mask=real[:, None, None, :]))))
        y = self._second(h, weights)[:, 0]
        return torch.where(worked[:, None], y, x_t * weights), after._replace(keys=k, values=v, real=real)

    def extra_repr(self) -> str:
        return f"keep={self.keep:g}, protect={self.protect}"
