"""Gated associative memory: a causal depthwise convolution and a read from a learned memory, mixed by gates.

Source: Rishiraj 2025, "Gated Associative Memory: A Parallel O(N) Architecture for Efficient Sequence Modeling".

- cost grows linearly with tokens; no recurrence
- the memory is a table of weights, the same for every token: it moves nothing between tokens. Tokens meet only in the
  convolution, so a stack of L layers sees `1 + L (kernel - 1)` tokens
- no output product; the memory is key and value at once, and its logits are not scaled
- the ablations of the paper by `fusion`
- prunable: memory slots
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gossamer.layers.prune import check_axis
from gossamer.mixers.base import Mixer, register_mixer


@register_mixer("gam", grids=(1,), causal=True)
class GatedMemory(Mixer):
    """`y = sigmoid(g_l) * conv(x) + sigmoid(g_m) * softmax(x B^T) B`, `(g_l, g_m) = W x + b`.

    Args:
        dim: channels.
        slots: rows of the memory `B`.
        kernel: tokens the convolution reads, the token itself included.
        fusion: `gate` as above; `sum` adds the two paths; `local`, `global` have one of them only.
        causal: the convolution reads earlier tokens only (the paper's form), else those around.

    Raises:
        ValueError: `kernel` or `slots` is below 1, or `fusion` is unknown.
    """

    def __init__(
        self, dim: int, *, slots: int = 512, kernel: int = 3, fusion: str = "gate", causal: bool = True
    ) -> None:
        super().__init__(dim)
        if kernel < 1 or slots < 1:
            raise ValueError(f"kernel and slots must be at least 1, got kernel={kernel}, slots={slots}")
        if fusion not in ("gate", "sum", "local", "global"):
            raise ValueError(f"fusion must be gate, sum, local or global, got {fusion!r}")
        self.kernel, self.fusion, self.causal = kernel, fusion, causal
        self.conv = nn.Conv1d(dim, dim, kernel, groups=dim) if fusion != "global" else None
        self.bank = nn.Parameter(nn.init.xavier_uniform_(torch.empty(slots, dim))) if fusion != "local" else None
        self.gate = nn.Linear(dim, 2 * dim) if fusion == "gate" else None

    def forward(self, x: Float[Tensor, "b n c"], *, mask: Bool[Tensor, "b n"] | None = None) -> Float[Tensor, "b n c"]:
        near = x
        if self.conv is not None:
            tokens = x if mask is None else x.masked_fill(~mask[..., None], 0.0)
            ahead = 0 if self.causal else (self.kernel - 1) // 2
            near = self._convolve(F.pad(tokens, (0, 0, self.kernel - 1 - ahead, ahead)))
        return self._fuse(x, near)

    def _convolve(self, x: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        assert self.conv is not None
        # As an image one token high: PyTorch's 2-D kernels take channels last as they are, the 1-D ones copy.
        weight = self.conv.weight[:, :, None]
        return F.conv2d(x.mT[:, :, None], weight, self.conv.bias, groups=self.dim)[:, :, 0].mT

    def _fuse(self, x: Tensor, near: Tensor) -> Tensor:
        if self.bank is None:
            return near
        read = (x @ self.bank.mT).softmax(-1) @ self.bank
        if self.fusion == "global":
            return read
        if self.gate is None:
            return near + read
        near_gate, read_gate = self.gate(x).sigmoid().chunk(2, -1)
        return torch.addcmul(near * near_gate, read, read_gate)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "b k c"]:
        return torch.zeros(batch, self.kernel - 1, self.dim, device=device, dtype=dtype)

    def step(
        self, x_t: Float[Tensor, "b c"], state: Float[Tensor, "b k c"]
    ) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b k c"]]:
        x = x_t[:, None]
        seen = torch.cat((state, x), 1)
        near = x if self.conv is None else self._convolve(seen)
        return self._fuse(x, near)[:, 0], seen[:, 1:]

    def widths(self) -> dict[str, int]:
        return {} if self.bank is None else {"slots": len(self.bank)}

    def importance(self, axis: str) -> Float[Tensor, " n"]:
        check_axis(self, axis)
        assert self.bank is not None
        return self.bank.detach().norm(dim=1)

    def keep(self, axis: str, index: Int[Tensor, " k"]) -> None:
        check_axis(self, axis)
        assert self.bank is not None
        self.bank = nn.Parameter(self.bank.detach()[index].clone())
