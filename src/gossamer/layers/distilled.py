"""Two answers from one trunk: for the label, and for the teacher.

Source: Touvron et al. 2020, "Training data-efficient image transformers & distillation through attention", section 4.
"""

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from gossamer.layers.heads import mean_pool


class DistilledClassifier(nn.Module):
    """`(fc(a), distilled(b))` in training, their mean in eval mode.

    Args:
        pool: `token` reads the first two tokens (class and distillation), `mean` the mean of all tokens twice.
    """

    def __init__(self, dim: int, num_classes: int, *, pool: Literal["mean", "token"] = "mean") -> None:
        super().__init__()
        self.kind = pool
        self.fc = nn.Linear(dim, num_classes)
        self.distilled = nn.Linear(dim, num_classes)

    def forward(
        self,
        x: Float[Tensor, "b *grid c"],
        mask: Bool[Tensor, "b *grid"] | None = None,
        sizes: Float[Tensor, "b *grid"] | None = None,
    ) -> Float[Tensor, "b k"] | tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
        if self.kind == "token":
            answer, distilled = self.fc(x[:, 0]), self.distilled(x[:, 1])
        else:
            pooled = mean_pool(x, mask, sizes)
            answer, distilled = self.fc(pooled), self.distilled(pooled)
        return (answer, distilled) if self.training else (answer + distilled) / 2
