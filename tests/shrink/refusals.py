"""What a pass cannot handle it names, and the model is as it was: parameters, modes, hooks, answers."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.shrink.base import Calibration, Unsupported, find_pass


def refuses(
    name: str,
    model: nn.Module,
    calibration: Calibration,
    message: str,
    inputs: tuple[Tensor, ...] | None = None,
    **settings: Any,
) -> None:
    """The pass `name` says of `model` what `message` (a pattern) does, and leaves no trace in it.

    Args:
        inputs: what the model's answers are compared on, training items by default.
    """
    x = calibration.example(2) if inputs is None else inputs
    before = copy.deepcopy(model)
    with pytest.raises(Unsupported, match=message):
        find_pass(name).run(model, calibration, **settings)
    assert repr(model) == repr(before)
    assert vars(model).keys() == vars(before).keys()
    for now, was in zip(model.modules(), before.modules(), strict=True):
        assert now.training == was.training
        assert len(now._forward_hooks) == len(was._forward_hooks)
        assert len(now._forward_pre_hooks) == len(was._forward_pre_hooks)
    for now, was in zip(model.parameters(), before.parameters(), strict=True):
        assert now.requires_grad == was.requires_grad
    state = model.state_dict()
    assert state.keys() == before.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in before.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(*x), before.eval()(*x), atol=0, rtol=0)
