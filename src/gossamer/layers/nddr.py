"""Feature fusion between networks that run side by side: each gets a learned mixture of all their features.

Source: Gao et al. 2019, "NDDR-CNN: Layerwise Feature Fusing in Multi-Task CNNs by Neural Discriminative Dimensionality
Reduction", section 3.

- hard sharing, no sharing and cross-stitch units are special cases: mixtures of whole features
- at the start each network mostly hears itself
- channels last on any number of grid axes: maps of convolutions, tokens of transformers
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gossamer.layers.norms import BatchNorm

Start = Literal["constant", "xavier"]


class Nddr(nn.Module):
    """`y_k = act(norm_k(W_k [x_1; …; x_K]))`; gated: `y_k = x_k + g_k act(norm_k(W_k [x_1; …; x_K]))`, `g_k = 0` first.

    `W_k` starts as `alpha I` on the network's own features and `beta I` on the others'.

    Args:
        dim: channels of each network's features.
        tasks: networks.
        alpha: own share at the start.
        beta: share of each other, `(1 - alpha) / (tasks - 1)` by default.
        start: `constant` as above, or `xavier` weights.
        norm: factory of a norm over `dim` channels, or None for a bias.
        act: activation factory.
        gated: add the mixture to what was there, by a learned gate for each channel.

    Raises:
        ValueError: fewer than two tasks, or features that do not have one shape of `dim` channels.
    """

    def __init__(
        self,
        dim: int,
        tasks: int,
        *,
        alpha: float = 0.9,
        beta: float | None = None,
        start: Start = "constant",
        norm: Callable[[int], nn.Module] | None = BatchNorm,
        act: Callable[[], nn.Module] = nn.ReLU,
        gated: bool = False,
    ) -> None:
        super().__init__()
        if tasks < 2:
            raise ValueError(f"tasks must be at least 2, got {tasks}: one network has nothing to be fused with")
        if start not in ("constant", "xavier"):
            raise ValueError(f"start must be constant or xavier, got {start!r}")
        self.dim, self.tasks = dim, tasks
        proj = [nn.Linear(tasks * dim, dim, bias=norm is None) for _ in range(tasks)]
        self.proj = nn.ModuleList(proj)
        self.norm = nn.ModuleList(norm(dim) for _ in range(tasks)) if norm else None
        self.act = act()
        self.gate = nn.ParameterList(torch.zeros(dim) for _ in range(tasks)) if gated else None
        beta = (1 - alpha) / (tasks - 1) if beta is None else beta
        with torch.no_grad():
            for own, layer in enumerate(proj):
                if start == "xavier":
                    nn.init.xavier_uniform_(layer.weight)
                else:
                    shares = [alpha if other == own else beta for other in range(tasks)]
                    layer.weight.copy_(torch.cat([share * torch.eye(dim) for share in shares], 1))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, features: Sequence[Float[Tensor, "b *grid c"]]) -> list[Float[Tensor, "b *grid c"]]:
        shapes = [tuple(x.shape) for x in features]
        if len(features) != self.tasks or len(set(shapes)) != 1 or shapes[0][-1] != self.dim:
            raise ValueError(f"expected {self.tasks} features of one shape with {self.dim} channels, got {shapes}")
        everything = torch.cat(list(features), -1)
        mixtures = []
        for k, own in enumerate(features):
            y = self.proj[k](everything)
            if self.norm is not None:
                y = self.norm[k](y)
            y = self.act(y)
            mixtures.append(y if self.gate is None else torch.addcmul(own, y, self.gate[k]))
        return mixtures
