"""OPTIN: scores, rankings and masks of the authors' code, its budget search, and what pruning by them leaves."""

import itertools
import random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tests.official import golden, seeded_state
from tests.shrink.loading import same_after_loading
from tests.shrink.refusals import refuses
from tests.shrink.toys import digits, encoder, learned, texts, vision

from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx
from gossamer.models import create_model
from gossamer.shrink import recipe
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.costs import Staircase, member_macs
from gossamer.shrink.masks import masked, members
from gossamer.shrink.passes.optin import calibration_inputs, optin, score, search
from gossamer.shrink.trajectory import Trajectory
from gossamer.tasks import create_task

SMALL = {
    "dim": 32,
    "depth": 3,
    "heads": 4,
    "hidden": 24,
    "vocab_size": 50,
    "max_len": 12,
    "num_classes": 3,
    "drop": 0.0,
}

DECODER = {"dim": 32, "depth": 2, "heads": 4, "vocab_size": 24, "max_len": 9}


def official_case():
    """The model and the batch that the authors' code scored, in double precision."""
    net = create_model("bert_base", **SMALL).eval()
    net.load_state_dict(seeded_state({k: tuple(v.shape) for k, v in net.state_dict().items()}))
    ids = torch.as_tensor(golden("optin")["ids"])
    split = Split((ids,), torch.zeros(len(ids)).long())
    spec = {"vocab_size": 50, "max_len": 12, "num_classes": 3, "pad_id": 0}
    data = Dataset("text-classification", split, split, split, spec, {"classes": ["a", "b", "c"]})
    return net.double(), Calibration(create_task(data.task, spec, data.meta), data)


def words():
    """Windows of a language's tokens, each followed by the next."""
    ids = torch.randint(1, 24, (16, 10))
    split = Split((ids[:, :-1],), ids[:, 1:])
    spec = {"vocab_size": 24, "max_len": 9, "pad_id": 0}
    data = Dataset("language-modelling", split, split, split, spec, {})
    return Calibration(create_task(data.task, spec, data.meta), data)


def stacked(values, axis):
    return torch.stack([v for (_, kind), v in values.items() if kind == axis]).numpy()


def pruned_macs(net, calibration):
    inputs = calibration.example(1)
    cost = member_macs(net, inputs, members(net))
    return sum(cost[m] * width for m, width in members(net).items())


@pytest.mark.parametrize("quirks", [True, False])
def test_scores_rankings_and_masks_equal_the_authors_code(quirks):
    want = golden("optin")
    name = "quirks" if quirks else "plain"
    net, calibration = official_case()
    found = score(net, calibration, scoring="exact", loss="both", official_quirks=quirks)
    for axis, kind in (("heads", "head"), ("hidden", "neuron")):
        own = stacked(found, axis)
        np.testing.assert_allclose(own, want[f"{name}_{kind}s"], rtol=1e-6)
        order = np.stack(np.unravel_index(np.argsort(-own, axis=None, kind="stable"), own.shape), 1)
        np.testing.assert_array_equal(order, want[f"{name}_{kind}_order"])
    cost = {m: 3 * 9 * 32 * 8 + 2 * 81 * 8 + 9 * 8 * 32 if m[1] == "heads" else 2 * 9 * 32 for m in found}
    masks = search(found, cost, 0.6 * sum(cost[m] * len(v) for m, v in found.items()), least=0)
    np.testing.assert_array_equal(stacked(masks, "heads"), want[f"{name}_head_mask"])
    np.testing.assert_array_equal(stacked(masks, "hidden"), want[f"{name}_neuron_mask"])


@pytest.mark.parametrize("loss", ["both", "output"])
def test_probes_and_groups_rank_hidden_units_nearly_as_runs_do(loss):
    net, calibration = official_case()
    exact, probed, grouped, alone = (
        stacked(score(net, calibration, loss=loss, **how), "hidden").ravel()
        for how in (
            {"scoring": "exact"},
            {"probes": 128},
            {"scoring": "groups", "group": 4},
            {"scoring": "groups", "group": 1},
        )
    )
    assert spearmanr(probed, exact).statistic > 0.95
    assert np.median(probed / exact) == pytest.approx(1, abs=0.3)
    assert spearmanr(grouped, exact).statistic > 0.7
    np.testing.assert_allclose(alone, exact)


def test_masks_of_ones_change_nothing_and_what_gives_nothing_scores_nothing():
    net, calibration = official_case()
    with torch.no_grad():
        net.blocks[1].mlp.fc2.weight[:, 5] = 0
        net.blocks[0].mixer.proj.weight[:, 8:16] = 0
        ids = calibration_inputs(calibration, 8)
        plain = net(*ids)
        with masked(net, {m: torch.ones(n) for m, n in members(net).items()}):
            assert torch.equal(net(*ids), plain)
        with masked(net, {m: torch.ones(n).index_fill_(0, torch.tensor([0]), 0.0) for m, n in members(net).items()}):
            assert not torch.allclose(net(*ids), plain)
    for scoring in ("exact", "groups", "probes"):
        found = score(net, calibration, scoring=scoring, group=1, probes=4)
        for member, index in ((("blocks.1.mlp", "hidden"), 5), (("blocks.0.mixer", "heads"), 1)):
            assert float(found[member][index]) == pytest.approx(0, abs=1e-12 * float(found[member].max()))
            assert int(found[member].argmin()) == index
            assert float(found[member].sort().values[1]) > 0


def test_copies_that_share_the_work_of_one_rank_last():
    net, calibration = official_case()
    member = ("blocks.1.mlp", "hidden")
    whole = score(net, calibration, scoring="exact")[member]
    usual = int(whole.argsort()[12])
    copies = [usual, *[i for i in (3, 11, 17, 20) if i != usual][:3]]
    with torch.no_grad():
        mlp = net.blocks[1].mlp
        for i in copies:  # four equal units give together what the usual one gave
            mlp.fc1.weight[i], mlp.fc1.bias[i] = mlp.fc1.weight[usual].clone(), mlp.fc1.bias[usual].clone()
        mlp.fc2.weight[:, copies] = (mlp.fc2.weight[:, usual] / 4)[:, None]
    units = score(net, calibration, scoring="exact")[member]
    assert sorted(units.argsort()[:4].tolist()) == sorted(copies)
    assert float(units[copies].max()) < float(whole[usual]) / 8
    net, calibration = official_case()
    with torch.no_grad():
        mixer = net.blocks[1].mixer
        for part in range(3):  # heads 0 and 1 alike, half of it each
            rows = slice(32 * part, 32 * part + 8), slice(32 * part + 8, 32 * part + 16)
            mixer.qkv.weight[rows[1]], mixer.qkv.bias[rows[1]] = mixer.qkv.weight[rows[0]], mixer.qkv.bias[rows[0]]
        mixer.proj.weight[:, :8] /= 2
        mixer.proj.weight[:, 8:16] = mixer.proj.weight[:, :8]
    heads = score(net, calibration, scoring="exact")[("blocks.1.mixer", "heads")]
    assert sorted(heads.argsort()[:2].tolist()) == [0, 1]


def test_scores_follow_a_permutation_of_units_unless_they_are_weighted_by_index():
    net, calibration = official_case()
    order = torch.randperm(24)
    member = ("blocks.1.mlp", "hidden")
    before = {
        quirks: score(net, calibration, scoring="exact", official_quirks=quirks)[member] for quirks in (False, True)
    }
    with torch.no_grad():
        mlp = net.blocks[1].mlp
        mlp.fc1.weight.copy_(mlp.fc1.weight[order].clone())
        mlp.fc1.bias.copy_(mlp.fc1.bias[order].clone())
        mlp.fc2.weight.copy_(mlp.fc2.weight[:, order].clone())
    after = {
        quirks: score(net, calibration, scoring="exact", official_quirks=quirks)[member] for quirks in (False, True)
    }
    torch.testing.assert_close(after[0], before[0][order])
    assert not torch.allclose(after[1], before[1][order], rtol=0.1)


def test_the_budget_search_equals_brute_force():
    draw = random.Random(0)
    for _ in range(5):
        names = [
            (f"blocks.{i}.{part}", axis) for i in range(2) for part, axis in (("mixer", "heads"), ("mlp", "hidden"))
        ]
        scores = {m: torch.tensor([draw.random() for _ in range(2 if m[1] == "heads" else 8)]) for m in names}
        cost = {m: 5.0 if m[1] == "heads" else 1.0 for m in names}
        budget = draw.uniform(15, 34)
        masks = search(scores, cost, budget)
        value = sum(float((scores[m] * masks[m]).sum()) for m in names)
        assert sum(cost[m] * float(masks[m].sum()) for m in names) <= budget
        every = []
        for sizes in itertools.product(*[range(1, len(scores[m]) + 1) for m in names]):
            # For given widths the best members are the best choice, so widths are all there is to try.
            if sum(cost[m] * k for m, k in zip(names, sizes, strict=True)) <= budget:
                every.append(sum(float(scores[m].topk(k).values.sum()) for m, k in zip(names, sizes, strict=True)))
        assert value == pytest.approx(max(every))
    with pytest.raises(ValueError, match=r"keep must be at least 0\.333, one member of each part; got 0\.222"):
        search(scores, cost, 8.0)


@pytest.fixture(scope="module")
def trained():
    calibration = digits()
    return learned(vision(), calibration, steps=120), calibration


@pytest.mark.parametrize("loss", ["both", "output"])
def test_a_trained_model_keeps_more_than_by_chance_or_by_magnitude(trained, loss):
    net, calibration = trained
    budget = 0.5 * pruned_macs(net, calibration)
    cost = member_macs(net, calibration.example(1), members(net))

    def kept(scores):
        with masked(net, search(scores, cost, budget)):
            return calibration.score(net)

    by_chance = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        by_chance.append(kept({m: torch.rand(n, generator=generator) for m, n in members(net).items()}))
    magnitudes = {m: net.get_submodule(m[0]).importance(m[1]) for m in members(net)}
    by_magnitude = kept({m: v / v.sum() for m, v in magnitudes.items()})
    plain, fitted = (
        run_pass("optin", net, calibration, keep=0.5, loss=loss, multiple=1, samples=64, probes=32, reconstruct=fit)[0]
        for fit in (False, True)
    )
    assert pruned_macs(plain, calibration) <= budget
    assert calibration.score(plain) > np.mean(by_chance) + 0.1
    assert calibration.score(plain) > by_magnitude
    assert calibration.score(fitted) >= calibration.score(plain)


def test_in_most_trainings_60_percent_keep_more_than_by_magnitude_and_in_all_more_than_by_chance():
    calibration, found = digits(), []
    for seed in range(3):
        calibration.seed = seed
        net = vision()
        torch.manual_seed(seed)
        for p in net.parameters():
            if p.ndim == 2:
                torch.nn.init.normal_(p, std=p.shape[1] ** -0.5)
        learned(net, calibration, steps=90)
        cost, widths = member_macs(net, calibration.example(1), members(net)), members(net)
        budget = 0.6 * sum(cost[m] * n for m, n in widths.items())
        magnitudes = {m: net.get_submodule(m[0]).importance(m[1]) for m in widths}
        kinds = [score(net, calibration, samples=64, probes=32), {m: v / v.sum() for m, v in magnitudes.items()}]
        for lot in range(5):
            draw = torch.Generator().manual_seed(lot)
            kinds.append({m: torch.rand(n, generator=draw) for m, n in widths.items()})
        kept = []
        for scores in kinds:
            with masked(net, search(scores, cost, budget)):
                kept.append(calibration.score(net))
        found.append((kept[0], kept[1], np.mean(kept[2:])))
    assert all(own > chance + 0.1 for own, _, chance in found)
    assert sum(own > magnitude for own, magnitude, _ in found) >= 2
    assert sum(own - magnitude for own, magnitude, _ in found) > 0


def test_the_masked_model_equals_the_sliced_one(trained):
    net, calibration = trained
    scores = score(net, calibration, samples=32, probes=8)
    cost = member_macs(net, calibration.example(1), members(net))
    masks = search(scores, cost, 0.6 * pruned_macs(net, calibration), multiple=8)
    sliced, steps = run_pass("optin", net, calibration, samples=32, probes=8, reconstruct=False)
    ids = calibration_inputs(calibration, 16)
    with torch.no_grad(), masked(net, masks):
        torch.testing.assert_close(sliced(*ids), net(*ids), atol=1e-5, rtol=1e-5)
    assert {(s["part"], s["axis"]) for s in steps} == {m for m, mask in masks.items() if not mask.all()}
    assert all(width % 8 == 0 for m, width in members(sliced).items() if m[1] == "hidden")


def test_the_fit_brings_the_answers_nearer_to_the_whole_model(trained):
    net, calibration = trained
    (held,), _ = next(calibration.batches(64, split="val", batch_size=64))
    far = []
    for reconstruct in (False, True):
        how = dict(loss="both", samples=256, probes=16, reconstruct=reconstruct)
        small, _ = run_pass("optin", net, calibration, keep=0.5, **how)
        with torch.no_grad():
            far.append(float((small(held) - net(held)).square().mean()))
    assert far[1] < 0.5 * far[0]


def test_keeping_all_changes_nothing(trained):
    net, calibration = trained
    same, steps = run_pass("optin", net, calibration, keep=1.0, samples=8, probes=2)
    assert steps == []
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), same.state_dict().values(), strict=True))
    assert same.shrink_report["optin"]["seconds_scoring"] > 0
    again = score(net, calibration, samples=8, probes=2)
    kept = [k for k in calibration.cache if k.startswith("optin")]
    score(net, calibration, samples=8, probes=2, loss="both")
    assert [k for k in calibration.cache if k.startswith("optin")] == kept  # nothing is measured twice
    assert all(torch.equal(v, score(net, calibration, samples=8, probes=2)[m]) for m, v in again.items())


def test_a_latency_budget_is_met_by_widths_on_steps(trained, monkeypatch):
    net, calibration = trained
    stairs = {
        m: Staircase((2, 4), (2.0, 4.0)) if m[1] == "heads" else Staircase((32, 64, 96, 128), (1.0, 1.0, 2.0, 2.5))
        for m in members(net)
    }
    monkeypatch.setattr("gossamer.shrink.passes.optin.staircases", lambda *a, **k: stairs)
    small, _ = run_pass("optin", net, calibration, keep=0.7, cost="latency", samples=8, probes=2)
    widths = members(small)
    assert sum(stairs[m](n) for m, n in widths.items()) <= 0.7 * sum(stairs[m](stairs[m].widths[-1]) for m in widths)
    assert all(n in ((2, 4) if m[1] == "heads" else (64, 96, 128)) for m, n in widths.items())


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: vision(), digits),
        (
            lambda: create_model(
                "swin_t", img_size=(8, 8), in_chans=1, num_classes=10, embed_dim=16, depths=(1, 2), heads=(2, 4),
                patch=1, window=4,
            ),
            digits,
        ),
        (lambda: encoder(), texts),
        (lambda: create_model("llama", **DECODER, hidden=48, kv_heads=2), words),
        (lambda: create_model("gpt2", **DECODER), words),
    ],
)  # fmt: skip
def test_images_pyramids_texts_and_decoders_are_pruned_saved_and_exported(make, problem, tmp_path):
    net, calibration = make().eval(), problem()
    small, steps = run_pass("optin", net, calibration, keep=0.6, samples=16, probes=4)
    assert steps
    assert pruned_macs(small, calibration) <= 0.6 * pruned_macs(net, calibration)
    inputs = calibration.example(2)
    export_onnx(small, inputs, tmp_path / "m.onnx", exporter="fast")
    same_after_loading(small, inputs, tmp_path)


def test_sentence_vectors_and_forecasts_have_an_output_term_of_their_own():
    net = create_model("bert_base", **{**SMALL, "num_classes": 0}).eval()
    pairs = torch.randint(1, 50, (8, 2, 9))
    pairs[2:, :, 6:] = 0
    split = Split((pairs,), torch.rand(8))
    spec = {"vocab_size": 50, "max_len": 12, "num_classes": 0, "pad_id": 0}
    data = Dataset("sentence-similarity", split, split, split, spec, {"range": (0, 5)})
    calibration = Calibration(create_task(data.task, spec, data.meta), data)
    exact = stacked(score(net, calibration, scoring="exact"), "hidden").ravel()
    probed = stacked(score(net, calibration, probes=128), "hidden").ravel()
    assert spearmanr(probed, exact).statistic > 0.95
    assert len(calibration_inputs(calibration, 8)[0]) == 8


def test_padding_is_no_part_of_the_trajectory_unless_asked_for():
    net, calibration = official_case()
    ids = calibration.data.train.inputs[0]
    longer = torch.cat((ids, torch.zeros_like(ids[:, :3])), 1)
    longer[0, 10] = 7
    found = []
    for tail in (longer, torch.cat((longer, torch.zeros_like(ids[:, :0])), 1)):
        calibration.data.train.inputs = (tail,)
        found.append(Trajectory(net, calibration_inputs(calibration, 8)))
    assert found[0].inputs[0].shape[1] == 11
    rows = found[0].rows(1, found[0].traces[1])
    assert len(rows) == int((longer != 0).sum())


def test_short_time_means_fewer_samples_and_probes(trained):
    net, _ = trained
    assert len(score(net, digits(seconds=0.3), samples=128)) == 4


def test_what_it_cannot_handle_it_says_and_leaves_the_model_as_it_was():
    calibration = texts()
    bare = torch.nn.Linear(2, 2)
    refuses("optin", bare, calibration, "no part of Linear states a pruning rule for heads", (torch.randn(3, 2),))
    net = encoder()
    net.blocks = torch.nn.ModuleList([net.blocks[0], net.blocks[0]])
    refuses("optin", net.eval(), calibration, r"block blocks\.0 runs more than once", probes=2, samples=8)


def test_settings_that_make_no_sense_are_refused_before_anything_is_sliced():
    calibration = texts()
    pooling = create_model("poolformer_s12", img_size=(8, 8), in_chans=1, num_classes=10)
    for value in (0.0, -0.5, 1.5):
        with pytest.raises(ValueError, match="keep must be in"):
            optin(pooling, calibration, keep=value)
    net = encoder()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for wrong in ({"keep": 0.01}, {"samples": 0}, {"multiple": 0}):
        with pytest.raises(ValueError, match="must be"):
            optin(net, calibration, **{"probes": 2, "samples": 8, **wrong})
    assert not getattr(net, "recipe", [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_model_whose_first_blocks_hold_no_members_is_scored():
    calibration = digits()
    net = vision(depth=3).eval()
    # The first block is left with its norms alone, as after the removal of its branches.
    for part in ("blocks.0.mixer", "blocks.0.mlp"):
        recipe.apply(net, {"step": "axformer.remove", "part": part, "losses": None})
    small, steps = run_pass("optin", net, calibration, keep=0.5, samples=16, probes=4)
    assert {step["part"].split(".")[1] for step in steps} == {"1", "2"}
    assert small(*calibration.example(2)).shape == (2, 10)
