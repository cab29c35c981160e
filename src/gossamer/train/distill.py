"""Learning from a teacher's answers.

`L = (1 - a) * task loss + a * T^2 * KL(softmax(teacher / T) || softmax(student / T))` for classes (Hinton et al.
2015, "Distilling the Knowledge in a Neural Network"); for real-valued answers the second term is the squared
difference to the teacher's.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 2.0
SHARE = 0.7


def distillation_loss(
    student: Float[Tensor, "b ..."], teacher: Float[Tensor, "b ..."], *, classes: bool
) -> Float[Tensor, ""]:
    """How far the student's answers are from the teacher's: logits `(b, k)` if `classes`, else real values."""
    if not classes:
        return F.mse_loss(student, teacher)
    soft = F.log_softmax(teacher / TEMPERATURE, -1)
    own = F.log_softmax(student / TEMPERATURE, -1)
    return F.kl_div(own, soft, reduction="batchmean", log_target=True) * TEMPERATURE**2
