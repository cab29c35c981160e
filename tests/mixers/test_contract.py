"""Every registered mixer keeps the contract of `mixers/base.py`; a new one is held to it without a line here."""

import copy

import pytest
import torch
from torch import Tensor

from gossamer.layers.prune import Prunable
from gossamer.mixers import Mixer, create_mixer, list_mixers, mixer_class, mixer_keywords, options_for
from gossamer.mixers.heads import HeadMixer

GRIDS = {1: (13,), 2: (5, 7), 3: (3, 4, 5)}
DIM = 32
# Mechanisms whose heads decide together, so that a silenced head still has a say in the others.
TOGETHER = {"auto_correlation"}
EVERY = [(name, axes) for name in list_mixers() for axes in mixer_class(name).grids]
MASKED = [(name, axes) for name, axes in EVERY if "mask" in mixer_class(name).honours]
CONTEXT = [(name, axes) for name, axes in EVERY if "context" in mixer_class(name).honours]


def build(name: str, axes: int, **options: object) -> Mixer:
    """The mixer as any block would make it, its weights drawn anew so that no branch starts at zero."""
    grid = GRIDS[axes]
    known = mixer_keywords(name)
    if "axes" in known and "grid" not in known:
        options["axes"] = axes
    if "sampling" in known:  # Random by default, as in its paper; the contract is about what can be repeated.
        options["sampling"] = "fixed"
    mixer = create_mixer(name, DIM, grid=grid, **options).eval()
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=DIM**-0.5)
    return mixer


def tokens(axes: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, *GRIDS[axes], DIM)


@pytest.mark.parametrize(("name", "axes"), EVERY)
def test_shape_is_kept_and_eval_is_deterministic_and_gradients_reach_the_input(name: str, axes: int) -> None:
    mixer, x = build(name, axes), tokens(axes).requires_grad_()
    y = mixer(x)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    torch.testing.assert_close(mixer(x), y, rtol=0, atol=0)
    (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    assert bool(grad.isfinite().all())
    assert bool((grad != 0).any(-1).all()), "some token is not read at all"


@pytest.mark.parametrize(("name", "axes"), EVERY)
def test_samples_do_not_see_each_other(name: str, axes: int) -> None:
    mixer, x = build(name, axes), tokens(axes, 3)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "axes"), EVERY)
def test_what_a_mixer_cannot_honour_is_refused(name: str, axes: int) -> None:
    mixer, x = build(name, axes), tokens(axes)
    given = {"mask": torch.ones(x.shape[:-1], dtype=torch.bool), "context": torch.randn(2, 4, DIM), "state": ()}
    for keyword, value in given.items():
        if keyword not in mixer.honours:
            with pytest.raises(ValueError, match=f"cannot honour {keyword}="):
                mixer(x, **{keyword: value})
    for other in {1, 2, 3} - set(mixer.grids):
        with pytest.raises(ValueError, match="grid axes"):
            mixer(tokens(other))


def test_a_block_hands_on_the_settings_of_the_same_name_and_kind() -> None:
    assert options_for("kdgqa", {"heads": 2, "alpha": 0.5}) == {"heads": 2}
    # The window of Hyena is a name, that of a block a number of tokens.
    assert options_for("hyena", {"window": 7, "order": 3}) == {"order": 3}


@pytest.mark.parametrize(("name", "axes"), MASKED)
def test_masked_tokens_are_not_read(name: str, axes: int) -> None:
    mixer, x = build(name, axes), tokens(axes)
    mask = torch.rand(x.shape[:-1]) < 0.6
    mask.view(2, -1)[:, 0] = True
    other = torch.where(mask[..., None], x, torch.randn_like(x))
    with torch.no_grad():
        one, two = mixer(x, mask=mask), mixer(other, mask=mask)
        torch.testing.assert_close(one[mask], two[mask], rtol=1e-4, atol=1e-5)
        full = torch.ones_like(mask)
        torch.testing.assert_close(mixer(x, mask=full), mixer(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "axes"), CONTEXT)
def test_context_is_read(name: str, axes: int) -> None:
    mixer, x = build(name, axes), tokens(axes)
    one, two = torch.randn(2, 2, 9, DIM)
    assert mixer(x, context=one).shape == x.shape
    assert not torch.allclose(mixer(x, context=one), mixer(x, context=two))


@pytest.mark.parametrize("name", list_mixers(causal=True))
def test_causal_steps_equal_the_full_pass_at_every_position(name: str) -> None:
    mixer, x = build(name, 1, causal=True), tokens(1)
    with torch.no_grad():
        full = mixer(x)
        state = mixer.initial_state(2, x.device, x.dtype)
        for t in range(x.shape[1]):
            y, state = mixer.step(x[:, t], state)
            torch.testing.assert_close(y, full[:, t], rtol=1e-4, atol=1e-5)
        later = x.clone()
        later[:, 7:] += 1
        torch.testing.assert_close(mixer(later)[:, :7], full[:, :7], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list_mixers(causal=False))
def test_mixers_without_a_causal_form_say_so(name: str) -> None:
    mixer = build(name, mixer_class(name).grids[0])
    with pytest.raises(ValueError, match="no decoding form"):
        mixer.initial_state(1)


@pytest.mark.parametrize(("name", "axes"), EVERY)
def test_keeping_every_member_changes_nothing_and_keeping_some_equals_silencing_the_others(
    name: str, axes: int
) -> None:
    mixer, x = build(name, axes), tokens(axes)
    if not isinstance(mixer, Prunable):
        pytest.skip(f"{name} has no inner width")
    with torch.no_grad():
        for axis, width in mixer.widths().items():
            whole, cut, silenced = mixer(x), copy.deepcopy(mixer), copy.deepcopy(mixer)
            assert mixer.importance(axis).shape == (width,)
            cut.keep(axis, torch.arange(width))
            torch.testing.assert_close(cut(x), whole)
            index = torch.arange(0, width, 2)
            cut.keep(axis, index)
            assert cut.widths()[axis] == len(index)
            assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in mixer.parameters())
            assert all(p.requires_grad for p in cut.parameters())
            if isinstance(mixer, HeadMixer) and axis == "heads" and name not in TOGETHER:
                # A silenced head is one whose values the output product does not read.
                silenced.proj.weight.view(DIM, width, -1)[:, 1::2] = 0
                torch.testing.assert_close(cut(x), silenced(x), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="axis must be one of"):
            mixer.keep("no such axis", torch.arange(1))
