"""Gated associative memory: its three paths by hand, its state, and what its memory cannot do."""

import pytest
import torch
from torch import nn

from gossamer.mixers import create_mixer


def by_hand(mixer: nn.Module, x: torch.Tensor, fusion: str) -> torch.Tensor:
    """The definition, token by token."""
    out = torch.zeros_like(x)
    for t in range(x.shape[1]):
        near = mixer.conv.bias.clone() if mixer.conv is not None else 0
        for back in range(mixer.kernel if mixer.conv is not None else 0):
            if t - back >= 0:
                near = near + mixer.conv.weight[:, 0, mixer.kernel - 1 - back] * x[:, t - back]
        read = 0
        if mixer.bank is not None:
            scores = torch.stack([x[:, t] @ slot for slot in mixer.bank], -1).exp()
            read = (scores / scores.sum(-1, keepdim=True)) @ mixer.bank
        if fusion == "gate":
            gates = mixer.gate(x[:, t]).sigmoid()
            near, read = gates[:, : mixer.dim] * near, gates[:, mixer.dim :] * read
        out[:, t] = near + read
    return out


@pytest.mark.parametrize("fusion", ["gate", "sum", "local", "global"])
@pytest.mark.parametrize("kernel", [1, 3, 4])
def test_it_equals_the_definition_token_by_token(fusion: str, kernel: int) -> None:
    mixer = create_mixer("gam", 6, slots=5, kernel=kernel, fusion=fusion).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), by_hand(mixer, x, fusion))


@pytest.mark.parametrize("fusion", ["gate", "sum", "local", "global"])
def test_decoding_step_by_step_equals_the_full_pass(fusion: str) -> None:
    mixer = create_mixer("gam", 6, slots=5, fusion=fusion, causal=True)
    x = torch.randn(2, 7, 6)
    state = mixer.initial_state(2)
    for t, want in enumerate(mixer(x).unbind(1)):
        got, state = mixer.step(x[:, t], state)
        torch.testing.assert_close(got, want)


def test_the_order_of_the_memory_slots_does_not_matter_and_pruned_slots_are_gone() -> None:
    mixer = create_mixer("gam", 6, slots=5).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    before = mixer(x)
    order = torch.randperm(5)
    mixer.keep("slots", order)
    torch.testing.assert_close(mixer(x), before, atol=1e-12, rtol=0)
    mixer.keep("slots", torch.tensor([0, 3]))
    assert mixer.widths() == {"slots": 2}
    torch.testing.assert_close(mixer(x), by_hand(mixer, x, "gate"))


def test_the_memory_moves_nothing_between_tokens() -> None:
    mixer = create_mixer("gam", 6, slots=5, fusion="global")
    x = torch.randn(1, 7, 6, requires_grad=True)
    mixer(x)[0, 3].sum().backward()
    assert x.grad[0, 3].abs().max() > 0
    assert x.grad[0, [0, 1, 2, 4, 5, 6]].abs().max() == 0


def test_padding_is_not_read_by_either_form() -> None:
    for causal in (True, False):
        mixer = create_mixer("gam", 6, slots=5, causal=causal)
        x, mask = torch.randn(1, 7, 6), torch.tensor([[True] * 4 + [False] * 3])
        torch.testing.assert_close(mixer(x, mask=mask)[:, :4], mixer(x[:, :4]))


def test_the_form_that_is_not_causal_reads_both_neighbours() -> None:
    mixer = create_mixer("gam", 6, slots=5, causal=False)
    x = torch.randn(1, 7, 6, requires_grad=True)
    mixer(x)[0, 3].sum().backward()
    assert (x.grad[0].abs().amax(-1) > 0).tolist() == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("settings", [{"kernel": 0}, {"slots": 0}, {"fusion": "product"}])
def test_settings_that_mean_nothing_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        create_mixer("gam", 6, **settings)
