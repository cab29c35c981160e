"""Teaching by answers: towards the teacher, and nothing where both agree."""

import pytest
import torch

from gossamer.tasks import create_task


def test_teaching_pulls_towards_the_teacher_and_vanishes_on_agreement():
    task = create_task(
        "image-classification",
        {"img_size": (8, 8), "in_chans": 1, "num_classes": 5},
        {"classes": list("abcde"), "mean": [0.5], "std": [0.5]},
    )
    torch.manual_seed(0)
    taught = torch.randn(4, 5)
    own = torch.randn(4, 5, requires_grad=True)
    assert task.teaching(taught, taught).item() == pytest.approx(0, abs=1e-6)
    gradient = torch.autograd.grad(task.teaching(own, taught), own)[0]
    assert task.teaching(own - 0.1 * gradient, taught) < task.teaching(own, taught)
