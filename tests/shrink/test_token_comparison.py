"""All token reduction under one benchmark: equal MACs, equal training, beside none and a random one."""

import copy

import pytest
import torch
from tests.shrink.toys import digits, encoder, learned, texts, vision

from gossamer.data.base import Dataset, Split
from gossamer.layers.init import init_by_width
from gossamer.measure import macs
from gossamer.models import create_model
from gossamer.shrink import token_comparison
from gossamer.shrink.base import Calibration, passes, run_pass
from gossamer.shrink.token_comparison import compare_token_reduction, table, token_counts
from gossamer.tasks import create_task


@pytest.fixture(scope="module")
def pictures():
    return digits()


def test_every_registered_token_reduction_takes_part_at_equal_macs(pictures):
    net = vision(depth=4)
    rows = compare_token_reduction(net, pictures, (0.75,), steps=0, latency_s=0)
    names = [name for name, entry in passes().items() if entry.family == "token reduction"]
    assert {"merging", "pyra", "p_mod"} <= set(names)
    assert [row.method for row in rows] == ["dense", *names, "random"]
    whole = macs(net, pictures.example()).total
    assert (rows[0].macs, rows[0].share) == (whole, 1.0)
    for row in rows[1:]:
        if row.share is None:
            assert row.why, row.method
        else:
            assert 0.6 < row.share <= 0.75, row
            assert row.macs == round(row.share * whole)
            assert 0 <= row.score <= 1
            assert sum(row.tokens) < 4 * 17 == sum(rows[0].tokens)
    assert sum(row.share is not None for row in rows) >= 4


def test_the_solved_setting_gives_the_macs_that_are_reported(pictures):
    net = vision(depth=4)
    (_, row) = compare_token_reduction(net, pictures, (0.7,), steps=0, methods=["merging"], latency_s=0.05)
    again, _ = run_pass("merging", net, pictures, keep=row.setting)
    assert macs(again, pictures.example()).total == row.macs
    assert row.tokens == token_counts(again, pictures.example())
    assert row.score == pictures.score(again)
    assert row.latency.median_ms > 0
    assert f"| {row.share:.1%} | {' '.join(map(str, row.tokens))} |" in table([row], "accuracy")


def test_keeping_all_is_the_dense_model_for_random_choice_too(pictures):
    net = vision(depth=4).eval()
    before = copy.deepcopy(net.state_dict())
    (dense, row) = compare_token_reduction(net, pictures, (1.0,), steps=0, methods=["random"], latency_s=0)
    assert (row.macs, row.score, row.tokens) == (dense.macs, dense.score, dense.tokens)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def halves():
    """The digits beside as much noise, on either side."""
    source = digits()

    def widen(split, seed):
        generator = torch.Generator().manual_seed(seed)
        x = split.inputs[0]
        noise = torch.randint(0, 256, x.shape, dtype=x.dtype, generator=generator)
        left = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
        return Split((torch.cat((torch.where(left, x, noise), torch.where(left, noise, x)), 3),), split.targets)

    spec = {**source.data.spec, "img_size": (8, 16)}
    parts = [widen(split, i) for i, split in enumerate((source.data.train, source.data.val, source.data.test))]
    data = Dataset(source.data.task, *parts, spec, source.data.meta)
    return Calibration(create_task(data.task, spec, data.meta), data)


def test_where_half_of_the_tokens_are_noise_a_method_beats_a_random_choice():
    calibration = halves()
    net = vision(img_size=(8, 16), depth=3)
    torch.manual_seed(2)
    init_by_width(net)
    learned(net, calibration, 160, lr=5e-3)
    rows = compare_token_reduction(net, calibration, (0.6, 0.45), steps=0, methods=["merging", "random"], latency_s=0)
    dense, *_ = rows
    merged, blind = ([row for row in rows if row.method == name] for name in ("merging", "random"))
    for one, other in zip(merged, blind, strict=True):
        assert one.share == pytest.approx(other.share, abs=0.05)
        assert one.score > other.score
        assert one.score > dense.score - 0.05


def test_texts_are_compared_too_and_what_cannot_be_done_says_why():
    rows = compare_token_reduction(
        encoder(depth=4), texts(), (0.7, 0.02), steps=1, methods=["merging", "random"], latency_s=0
    )
    assert [(row.method, row.keep, row.share is None) for row in rows] == [
        ("dense", 1.0, False),
        ("merging", 0.7, False),
        ("random", 0.7, False),
        ("merging", 0.02, True),
        ("random", 0.02, True),
    ]
    assert "merging cannot leave 0.02 of the MACs: merging cannot leave the share" in rows[3].why
    assert rows[3].why in table(rows)
    swin = create_model("swin_t", img_size=8, embed_dim=16, depths=(1, 1), heads=(2, 2), in_chans=1, pad=True)
    with pytest.raises(ValueError, match="Pyramid is not one sequence"):
        token_comparison.solve_setting("pyra", swin, digits(), 0.5)


def test_impossible_budgets_and_methods_are_refused(pictures):
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
            compare_token_reduction(vision(), pictures, (keep,))
    with pytest.raises(ValueError, match=r"method must be random or one of .*merging.*; got 'magnitude'"):
        compare_token_reduction(vision(), pictures, methods=["magnitude"])
    with pytest.raises(ValueError, match="pass must be one of"):
        compare_token_reduction(vision(), pictures, methods=["melting"])
