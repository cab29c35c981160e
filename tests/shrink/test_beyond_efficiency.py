"""What token reduction brings beside speed: fair comparisons on generated data, and one that must come out right."""

from statistics import fmean

import pytest
import torch
from tests.shrink.toys import digits, vision
from torch import nn

from gossamer.shrink import beyond_efficiency as beyond
from gossamer.shrink import recipe
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.beyond_efficiency import Effort, Trial
from gossamer.shrink.token_comparison import random_like, token_counts


def test_where_half_of_the_tokens_are_noise_a_trained_selector_beats_random_choice():
    """C2, the mean over seeds at equal tokens; and C1, it looks at what matters."""
    look, right = beyond.distraction(("ia_red2",), Effort(seeds=(0, 1), learn=100, steps=40, lr=4e-3, samples=512))
    assert look.tokens == right.tokens == [9, 9, 9]
    assert fmean(right.dense) > 0.9
    assert fmean(right.reduced) > fmean(right.random) + 0.03
    assert fmean(right.reduced) > fmean(right.dense) - 0.03
    assert min(look.reduced) > 0.8 > max(look.random + look.dense)


def test_images_hold_as_much_noise_as_was_asked_for_and_the_marks_say_where():
    for noise in (0.0, 0.25, 0.5):
        split, relevant = beyond.noisy_images(200, 3, noise)
        assert relevant.sum(1).tolist() == [16 - round(16 * noise)] * 200
        patches = nn.functional.unfold(split.inputs[0].float(), 3, stride=3).transpose(1, 2)
        means = patches.mean(-1)
        assert (noise == 0) or float(means[relevant].mean()) + 60 < float(means[~relevant].mean())
    # The signs tell the class: the mean sign of one class is nearest to its own on new images.
    kept = relevant[..., None].float()
    signs = (patches * kept).sum(1) / kept.sum(1)
    centres = torch.stack([signs[split.targets == k].mean(0) for k in range(4)])
    split, relevant = beyond.noisy_images(200, 4, 0.5)
    patches = nn.functional.unfold(split.inputs[0].float(), 3, stride=3).transpose(1, 2)
    signs = (patches * relevant[..., None]).sum(1) / 8
    assert float((torch.cdist(signs, centres).argmin(1) == split.targets).float().mean()) > 0.9


def test_a_random_reduction_has_the_methods_tokens_in_every_block_and_drops_other_ones_for_another_seed():
    calibration, net = digits(), vision(depth=4).eval()
    for name, given in (("merging", {}), ("eet", {"steps": 0}), ("bus", {"steps": 0}), ("ia_red2", {"steps": 0})):
        reduced, _ = run_pass(name, net, calibration, keep=0.6, **given)
        one, other = (random_like(net, reduced, calibration, seed) for seed in (0, 1))
        x = calibration.example()
        assert token_counts(one, x) == token_counts(reduced, x) == token_counts(other, x)
        assert token_counts(net, x) == [17] * 4
        assert not torch.allclose(one.eval()(*x), other.eval()(*x), atol=1e-4)


def naive_mass(net, x, relevant):
    """Dense: one sample, one head after the other."""
    tokens = net.stem(x)[0]
    for block in net.blocks[:-1]:
        tokens = block(tokens)
    q, k, _ = net.blocks[-1].mixer.project(net.blocks[-1].norm1(tokens))
    shares = []
    for b in range(len(x)):
        rows = [(q[b, h, 0] @ k[b, h].T / q.shape[-1] ** 0.5).softmax(-1) for h in range(q.shape[1])]
        row = torch.stack(rows).mean(0)[1:]
        shares.append(row[relevant[b]].sum() / row.sum())
    return torch.stack(shares)


def test_attention_mass_equals_the_loop_and_follows_tokens_through_reductions():
    calibration, net = digits(), vision(depth=3).eval()
    x = calibration.example(4)[0]
    relevant = torch.rand(4, 16) < 0.5
    with torch.no_grad():
        torch.testing.assert_close(beyond.attention_mass(net, x, relevant), naive_mass(net, x, relevant))
        for name, given in (("merging", {}), ("eet", {"steps": 0}), ("bus", {"steps": 0}), ("ia_red2", {"steps": 0})):
            reduced, _ = run_pass(name, net, calibration, keep=0.6, **given)
            mass = beyond.attention_mass(reduced, x, relevant)
            rest = beyond.attention_mass(reduced, x, ~relevant)
            torch.testing.assert_close(mass + rest, torch.ones(4), msg=name)
            torch.testing.assert_close(beyond.attention_mass(reduced, x, relevant | True), torch.ones(4), msg=name)
            assert not torch.allclose(mass, naive_mass(net, x, relevant), atol=1e-3), name
        # Copies of tokens merge: the mass is that of the dense model.
        for block in net.blocks:
            for part in (block.mixer.proj, block.mlp.fc2):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
        nn.init.zeros_(net.stem.positions)
        plain = torch.full_like(x, 0.5)
        dense = beyond.attention_mass(net, plain, relevant)
        recipe.apply(net, {"step": "merging", "r": [3, 3, 0], "tokens": 17, "protect": 1})
        torch.testing.assert_close(beyond.attention_mass(net, plain, relevant), dense, atol=1e-5, rtol=1e-4)


def test_a_block_that_attends_to_some_of_its_tokens_only_has_no_such_mass():
    net, _ = run_pass("p_mod", vision(depth=3), digits(), keep=0.5, steps=0)
    with pytest.raises(ValueError, match=r"last block \(DepthBlock\) must attend to all"):
        beyond.attention_mass(net, torch.randn(2, 1, 8, 8), torch.ones(2, 16, dtype=torch.bool))


def test_every_text_holds_one_needle_and_the_class_says_which():
    (ids,), target = beyond.needle_texts(300, 12, 5).inputs, beyond.needle_texts(300, 12, 5).targets
    found = (ids >= 2) & (ids < 2 + beyond.NEEDLES)
    assert found.sum(1).tolist() == [1] * 300
    assert torch.equal(ids[found] - 2, target)
    assert set(found.nonzero()[:, 1].tolist()) == set(range(1, 12))


def test_retrieval_is_a_table_over_lengths_and_a_trained_selector_finds_what_random_choice_drops():
    trials = beyond.retrieval((10, 20), ("ia_red2",), Effort(seeds=(0,), learn=60, steps=40, lr=5e-3, samples=512))
    assert [(t.test, t.at, t.tokens) for t in trials] == [("retrieval", 10, [6] * 3), ("retrieval", 20, [11] * 3)]
    for t in trials:
        assert t.reduced[0] > t.random[0] + 0.1
        assert t.dense[0] > t.random[0] + 0.1
    assert beyond.table(trials).count("| retrieval | accuracy | ia_red2 |") == 2


def test_spikes_and_last_losses_are_those_of_the_curve():
    """A loss that is a hundred times as steep in one step is one spike."""
    calibration, net = digits(), vision()
    effort = Effort(steps=20, lr=0.0, seeds=(0,))
    plain = beyond._curve(net, calibration, effort, 0)
    assert plain == beyond._curve(net, calibration, effort, 0)
    assert plain != beyond._curve(net, calibration, effort, 1)
    calls = []

    class Steep(Calibration):
        def loss(self, *given):
            calls.append(super().loss(*given))
            return calls[-1] * (100 if len(calls) == 7 else 1)

    last, spikes = beyond._curve(net, Steep(calibration.task, calibration.data), effort, 0)
    assert last == pytest.approx(fmean(float(loss) for loss in calls[-4:]))
    assert (plain[1], spikes) == (0, 1)


def test_stability_compares_three_models_of_every_seed():
    loss, spikes = beyond.stability(("bus",), Effort(seeds=(0, 1), learn=4, steps=5, samples=64))
    assert (loss.measure, spikes.measure) == ("last loss", "gradient spikes")
    assert all(len(figures) == 2 for t in (loss, spikes) for figures in (t.dense, t.random, t.reduced))
    assert loss.dense[0] != loss.dense[1]
    assert all(count >= 0 for count in spikes.dense + spikes.random + spikes.reduced)


# ---- reasoning -------------------------------------------------------------------------------------------------------


class Oracle(nn.Module):
    """Adds the digits behind the last sum to it; `wrong` in the first sum it writes."""

    def __init__(self, wrong=False):
        super().__init__()
        self.wrong = wrong

    def forward(self, ids):
        scores = torch.zeros(*ids.shape, 2 * beyond.MODULUS)
        for row, out in zip(ids.tolist(), scores, strict=True):
            total, written = 0, 0
            for word in row:
                new = word >= beyond.MODULUS
                total, written = (word - beyond.MODULUS, written + 1) if new else (total + word, written)
            out[-1, beyond.MODULUS + (total + (self.wrong and not written)) % beyond.MODULUS] = 1
        return scores


def test_traces_say_the_sums_and_an_answer_is_only_right_if_the_steps_were():
    digits = torch.randint(0, beyond.MODULUS, (20, beyond.TERMS))
    for row, given in zip(beyond.write_trace(digits, (2, 4)).tolist(), digits.tolist(), strict=True):
        two, four = (beyond.MODULUS + sum(given[:n]) % beyond.MODULUS for n in (2, 4))
        assert row == [*given[:2], two, *given[2:4], four, *given[4:]]
    for trace in ((), (3,), (2, 3, 4)):
        assert beyond.answers_right(Oracle(), digits, trace) == 1.0
        assert beyond.answers_right(Oracle(wrong=True), digits, trace) == 0.0


def test_a_decoder_that_writes_its_steps_is_right_more_often_than_one_that_does_not():
    net = beyond.reasoner(300, 4e-3)
    digits = torch.randint(0, beyond.MODULUS, (256, beyond.TERMS))
    silent, aloud = (beyond.answers_right(net, digits, trace) for trace in ((), range(2, beyond.TERMS)))
    assert aloud > silent + 0.2


def test_even_steps_are_as_many_as_asked_for_and_about_as_long_as_each_other():
    for limit in range(beyond.TERMS - 1):
        steps = beyond.even_steps(limit)
        assert len(set(steps)) == limit
        assert set(steps) <= set(range(2, beyond.TERMS))
        sizes = [b - a for a, b in zip([1, *steps], [*steps, beyond.TERMS], strict=True)]
        assert max(sizes) - min(sizes) <= 1


def test_overthinking_is_a_table_over_limits_in_which_all_traces_end_alike():
    trials = beyond.overthinking(Effort(seeds=(0, 1), learn=3), samples=40)
    assert [(t.at, t.tokens) for t in trials] == [(n, [n]) for n in range(beyond.TERMS - 1)]
    assert trials[-1].dense == trials[-1].random == trials[-1].reduced
    assert trials[0].random == trials[0].reduced
    assert all(t.dense == trials[0].dense for t in trials)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0.0}, "keep must be in"),
        ({"keep": 1.5}, "keep must be in"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"seeds": ()}, "seeds must hold at least one"),
    ],
)
def test_efforts_that_make_no_sense_are_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        Effort(**settings)


def test_a_table_gives_means_and_spread():
    trial = Trial("retrieval", "accuracy", "eet", 16, [8, 4], [1.0, 0.5], [0.25, 0.25], [0.5, 1.0])
    assert "| eet | 16 | 8 4 | 0.750 ± 0.250 | 0.250 ± 0.000 | 0.750 ± 0.250 |" in beyond.table([trial])
    assert trial.to_dict()["dense"] == [1.0, 0.5]
