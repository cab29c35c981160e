"""Teaching signals: equal to formulas written out, blind to padding and to what may not be read, and worth having."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.data.language import NOTHING
from gossamer.models import create_model
from gossamer.ops.attention import join_heads
from gossamer.shrink.base import Calibration, run_pass
from gossamer.tasks import create_task
from gossamer.train import teaching
from gossamer.train.teaching import SIGNALS, Teaching
from shrink.toys import digits, encoder, learned, sentences, texts, vision

KINDS = ("bert", "vit", "swin", "gpt2", "llama")
WORDS = {"vocab_size": 24, "max_len": 12}


def built(kind, depth=4, dim=32, heads=4, seed=0):
    """A small model whose blocks all do something."""
    torch.manual_seed(seed)
    if kind == "bert":
        net = encoder(depth=depth, dim=dim, heads=heads)
    elif kind == "vit":
        net = vision(depth=depth, dim=dim, heads=heads)
    elif kind == "swin":
        sizes = {"img_size": (8, 8), "in_chans": 1, "num_classes": 10, "patch": 1, "window": 4}
        net = create_model("swin_t", **sizes, embed_dim=dim // 2, depths=(depth, 2), heads=(heads // 2, heads))
    elif kind == "gpt2":
        net = create_model("gpt2", **WORDS, dim=dim, depth=depth, heads=heads, drop=0.0)
    else:
        net = create_model("llama", **WORDS, dim=dim, depth=depth, heads=heads, kv_heads=heads // 2, hidden=48)
    torch.manual_seed(seed + 1)
    for name, p in net.named_parameters():
        nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.3 if p.ndim == 1 else 0.2)
    return net.eval()


def data_for(kind):
    """Data that suit the model."""
    if kind in ("vit", "swin"):
        return digits()
    if kind == "bert":
        return texts()
    ids = sentences(8, 0)[0].clamp(min=1)
    target = torch.cat((ids[:, 1:], ids[:, :1]), 1)
    target[:, -3:] = NOTHING
    split = Split((ids,), target)
    spec = {**WORDS, "pad_id": 0}
    data = Dataset("language-modelling", split, split, split, spec, {})
    return Calibration(create_task(data.task, spec, {}), data)


def problem(kind):
    """Task, inputs and target."""
    calibration = data_for(kind)
    return calibration.task, *next(calibration.batches(6))


def distances(signals, student, teacher, task, inputs, target, **settings):
    taught = Teaching(signals, student, teacher, task, **settings)
    with torch.no_grad():
        own, _ = taught._watched(student, student, inputs, 0)
        other, _ = taught._watched(teacher, teacher, inputs, 1)
    return {name: float(value.detach()) for name, value in taught.distances(own, other, target).items()}


# --- the formulas ---------------------------------------------------------------------------------------------------


def softmax(row):
    shifted = [math.exp(x - max(row)) for x in row]
    return [x / sum(shifted) for x in shifted]


def test_relations_are_the_divergence_of_rows_of_similarity_written_out():
    generator = torch.Generator().manual_seed(0)
    # Two heads of three against four of four and a half: cut into relation heads of their own widths.
    own, wanted = (torch.randn(2, h, 5, d, generator=generator) for h, d in ((2, 6), (4, 6)))
    allowed = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    allowed[1, :, 0] = False
    allowed[1, 0, 0] = True
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0]], dtype=torch.bool)
    rows = []
    for b in range(2):
        for r in range(3):
            o, w = (x[b].transpose(0, 1).flatten(1) for x in (own, wanted))
            o, w = o[:, 4 * r : 4 * r + 4], w[:, 8 * r : 8 * r + 8]
            for t in range(5):
                if real[b, t]:
                    keys = [s for s in range(5) if allowed[b, t, s]]
                    p = softmax([float(w[t] @ w[s]) / math.sqrt(8) for s in keys])
                    q = softmax([float(o[t] @ o[s]) / math.sqrt(4) for s in keys])
                    rows.append(sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)))
    found = teaching.relation_distance(own, wanted, 3, allowed, real)
    assert float(found) == pytest.approx(sum(rows) / len(rows), abs=1e-5)
    assert float(teaching.relation_distance(wanted, wanted, 3, allowed, real)) == pytest.approx(0, abs=1e-6)


def test_features_and_attention_are_mean_squares_of_what_counts():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 2, 4, 3, generator=generator)
    real = torch.tensor([[True, True, False, True], [True, False, False, False]])
    above = sum(float((a[i, j] - b[i, j]).square().sum()) for i in range(2) for j in range(4) if real[i, j])
    below = sum(float(b[i, j].square().sum()) for i in range(2) for j in range(4) if real[i, j])
    assert float(teaching.feature_distance(a, b, real)) == pytest.approx(above / below, abs=1e-6)
    m, n = torch.randn(2, 2, 3, 4, 4, generator=generator)
    allowed = real[:, None].expand(-1, 4, -1)
    counted = [
        float((m[i, h, q, k] - n[i, h, q, k]) ** 2)
        for i in range(2)
        for h in range(3)
        for q in range(4)
        for k in range(4)
        if real[i, q] and real[i, k]
    ]
    found = teaching.attention_distance(m, n, allowed, real)
    assert float(found) == pytest.approx(sum(counted) / len(counted), abs=1e-6)


def test_samples_are_compared_by_lengths_and_angles_written_out():
    generator = torch.Generator().manual_seed(2)
    own, wanted = torch.randn(5, 3, generator=generator), torch.randn(5, 7, generator=generator)

    def huber(x, y):
        gap = abs(x - y)
        return gap * gap / 2 if gap < 1 else gap - 0.5

    lengths, angles = [], []
    for x in (own, wanted):
        length = [[math.dist(x[i].tolist(), x[j].tolist()) for j in range(5)] for i in range(5)]
        mean = sum(map(sum, length)) / 20
        lengths.append([v / mean for row in length for v in row])
        # No way leads from a sample to itself: its cosines are zero.
        cosines = [
            float(F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0))
            for j in range(5)
            for i in range(5)
            for k in range(5)
        ]
        angles.append(cosines)
    want = sum(map(huber, *lengths)) / 25 + 2 * sum(map(huber, *angles)) / 125
    assert float(teaching.sample_distance(own, wanted)) == pytest.approx(want, abs=1e-5)
    turned = 3 * wanted @ torch.linalg.qr(torch.randn(7, 7, generator=generator))[0] + 1
    assert float(teaching.sample_distance(turned, wanted)) == pytest.approx(0, abs=1e-5)


def test_the_map_between_widths_is_the_best_linear_one_of_what_it_saw():
    generator = torch.Generator().manual_seed(3)
    own, wanted = torch.randn(2, 40, 4, generator=generator), torch.randn(2, 40, 6, generator=generator)
    real = torch.rand(2, 40, generator=generator) < 0.6
    x = torch.cat((own[real], torch.ones(int(real.sum()), 1)), 1)
    weight = torch.linalg.lstsq(x, wanted[real]).solution
    found = teaching.LinearMap()(own, wanted, real)
    torch.testing.assert_close(found[real], x @ weight, atol=5e-3, rtol=5e-3)
    # Of an exact linear image nothing is left.
    image = own @ torch.randn(4, 6, generator=generator) + 2
    assert float(teaching.feature_distance(teaching.LinearMap()(own, image), image)) < 1e-4
    # What was seen before counts still: the map is not that of the last batch alone.
    learning = teaching.LinearMap()
    for part in (slice(0, 20), slice(20, 40)):
        found = learning(own[:, part], wanted[:, part])
    alone = teaching.LinearMap()(own[:, 20:], wanted[:, 20:])
    assert (found - alone).abs().max() > 0.05


# --- on models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_like_its_teacher_is_at_no_distance_and_another_is(kind):
    task, inputs, target = problem(kind)
    teacher = built(kind)
    found = distances(SIGNALS, copy.deepcopy(teacher), teacher, task, inputs, target)
    assert found.keys() == set(SIGNALS) - {"logits"}
    assert max(found.values()) < 1e-5
    found = distances(SIGNALS, built(kind, seed=5), teacher, task, inputs, target)
    assert min(found.values()) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_compared_is_what_attention_reads(kind):
    """Softmax of the logits and masks that are compared, times the values, is what the mixer gave."""
    task, inputs, target = problem(kind)
    net = built(kind)
    taught = Teaching(["attention"], net, net, task)
    given = {}
    for name, _ in taught.attention:
        mixer = net.get_submodule(name).mixer
        mixer.register_forward_hook(lambda m, _, y, name=name: given.update({name: y}))
    own, _ = taught._watched(net, net, inputs, 0)
    seen = {}
    original = teaching.attention_distance
    try:
        teaching.attention_distance = lambda a, b, allowed, real: (
            seen.update(a=a, allowed=allowed, real=real) or a.sum()
        )
        for name, _ in taught.attention:
            counts = target != NOTHING if task.name == "language-modelling" else None
            taught._attention((name, name), own, own, counts)
            mixer = net.get_submodule(name).mixer
            _, _, v = own.shown(name)
            logits = seen["a"]
            if seen["allowed"] is not None:
                logits = logits.masked_fill(~seen["allowed"][:, None], -math.inf)
            y = mixer.proj(join_heads(logits.softmax(-1) @ v.repeat_interleave(logits.shape[1] // v.shape[1], 1)))
            if kind == "swin":
                # Windows of the shifted map, row by row.
                side = own.states[name].shape[1] // 4
                y = y.view(-1, side, side, 4, 4, y.shape[-1]).transpose(2, 3).flatten(1, 2).flatten(2, 3)
                shifted = mixer.shifted and side > 1
                y = y.roll((2, 2), (1, 2)) if shifted else y
                assert (seen["allowed"] is not None) == shifted
            rows = slice(None) if kind != "bert" else seen["real"]
            torch.testing.assert_close(y[rows], given[name][rows], atol=1e-5, rtol=1e-4)
    finally:
        teaching.attention_distance = original


def test_padding_changes_nothing():
    task, inputs, target = problem("bert")
    student, teacher = built("bert", depth=2, seed=3), built("bert")
    ids = inputs[0][:, :10].clone()
    ids[:, 8:] = 0
    want = distances(SIGNALS, student, teacher, task, (ids[:, :8],), target)
    found = distances(SIGNALS, student, teacher, task, (ids,), target)
    assert found == pytest.approx(want, abs=1e-5, rel=1e-5)
    words = ids.clone()
    words[:, 8:] = 7
    assert distances(SIGNALS, student, teacher, task, (words,), target) != pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_is_taught_by_nothing_that_comes_later_or_fills_up(kind):
    task, inputs, target = problem(kind)
    student, teacher = built(kind, depth=2, seed=3), built(kind)
    want = distances(SIGNALS, student, teacher, task, (inputs[0][:, :-3],), target[:, :-3])
    found = distances(SIGNALS, student, teacher, task, inputs, target)
    assert found == pytest.approx(want, abs=1e-5, rel=1e-4)
    everything = distances(SIGNALS, student, teacher, task, inputs, target.clamp(min=0))
    assert everything != pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_student_and_not_the_teacher(kind):
    task, inputs, target = problem(kind)
    student, teacher = built(kind, depth=2, seed=3), built(kind)
    before = copy.deepcopy(teacher.state_dict())
    for signal in SIGNALS:
        student.zero_grad()
        objective = Teaching([signal], student, teacher, task)
        # The labels' own share teaches too; the signal is what is left.
        loss = objective(student, inputs, target) - 0.3 * task.loss(student(*inputs), target)
        loss.backward()
        reached = [n for n, p in student.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-7]
        assert any(".mixer.qkv" in n for n in reached), signal
        assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert not any("project" in vars(m) or m._forward_hooks for net in (student, teacher) for m in net.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_widths_and_heads_may_differ_for_all_but_attention_maps(kind):
    task, inputs, target = problem(kind)
    teacher = built(kind)
    student = built(kind, depth=2, dim=24, heads=2, seed=3)
    signals = [s for s in SIGNALS if s != "attention"]
    objective = Teaching(signals, student, teacher, task)
    objective(student, inputs, target).backward()
    found = distances(signals, student, teacher, task, inputs, target, relation_heads=2)
    assert found["relations"] > 0
    # The best map in hindsight leaves less than saying nothing would.
    assert 0 < found["features"] < 1
    with pytest.raises(ValueError, match=r"has \d heads.* relations need no equal heads"):
        distances(["attention"], student, teacher, task, inputs, target)
    with pytest.raises(ValueError, match=r"relation_heads must divide the widths .*, got 7"):
        distances(["relations"], student, teacher, task, inputs, target, relation_heads=7)


def test_relations_with_other_heads_are_those_of_the_joined_vectors():
    """One head of 32 or four of 8: the same products, so the same relations."""
    task, inputs, target = problem("bert")
    teacher = built("bert")
    student = built("bert", heads=1, seed=3)
    same = built("bert", heads=4, seed=3)
    for a, b in zip(student.blocks, same.blocks, strict=True):
        b.mixer.load_state_dict(a.mixer.state_dict())
        nn.init.zeros_(a.mixer.proj.weight)
        nn.init.zeros_(b.mixer.proj.weight)
    found = [distances(["relations"], s, teacher, task, inputs, target) for s in (student, same)]
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_blocks_are_matched_evenly_stage_by_stage_and_windows_with_their_like():
    own, other = (dict(enumerate(range(n))) for n in (3, 6))
    own, other = ({f"blocks.{i}": built("bert", depth=1).blocks[0] for i in m} for m in (own, other))
    assert [t for _, t in teaching.match(own, other)] == ["blocks.1", "blocks.3", "blocks.5"]
    assert [t for _, t in teaching.match(other, own)] == [f"blocks.{i}" for i in (0, 0, 1, 1, 2, 2)]
    small, large = (teaching.watchable(built("swin", depth=n)) for n in (2, 6))
    assert teaching.match(small, large)[:2] == [("stages.0.0", "stages.0.2"), ("stages.0.1", "stages.0.5")]
    for s, t in teaching.match(small, large, lambda _: True):
        assert s.split(".")[1] == t.split(".")[1]
        assert small[s].mixer.shifted == large[t].mixer.shifted


def test_answers_alone_are_what_a_trainer_with_a_teacher_learns():
    calibration = texts()
    teacher = built("bert")
    ends = []
    for way in ("teacher", "objective"):
        student = encoder(depth=1)
        loss = Teaching(["logits"], student, teacher, calibration.task)
        hint = {"teacher": teacher} if way == "teacher" else {"objective": loss}
        calibration.trainer(student, lr=1e-3, ema=0.0, **hint).train(steps=3)
        ends.append(student.state_dict())
    for key, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][key], atol=1e-6, rtol=1e-6)


def test_a_signal_begins_at_its_share_of_labels_and_answers_and_keeps_its_measure():
    task, inputs, target = problem("vit")
    student, teacher = built("vit", depth=2, seed=3), built("vit")
    signals = {"logits": 0.5, "features": 2.0, "gram": 1.0, "relations": 0}
    objective = Teaching(signals, student, teacher, task)
    rest, parts = [], []
    for net in (student, built("vit", depth=2, seed=8)):
        answer, taught = net(*inputs), teacher(*inputs)
        kl = F.kl_div((answer / 2).log_softmax(-1), (taught / 2).softmax(-1), reduction="batchmean") * 4
        rest.append(float((0.3 * F.cross_entropy(answer, target) + 0.7 * 0.5 * kl).detach()))
        parts.append(distances(["features", "gram"], net, teacher, task, inputs, target))
        want = rest[-1] + sum(signals[s] * 0.3 * rest[0] / parts[0][s] * parts[-1][s] for s in parts[0])
        assert objective(net, inputs, target).item() == pytest.approx(want, rel=1e-4)
    assert float(Teaching(["features"], teacher, teacher, task)(teacher, inputs, target)) == pytest.approx(
        0.3 * float(task.loss(teacher(*inputs), target)), abs=1e-5
    )


# --- what cannot be -------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_compared_are_refused_by_name():
    task, inputs, target = problem("vit")
    teacher = built("vit")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert float(Teaching(["logits"], plain, teacher, task)(plain, inputs, target)) > 0
    with pytest.raises(ValueError, match="Sequential has no residual blocks"):
        Teaching(["features"], plain, teacher, task)
    merged, _ = run_pass("merging", teacher, digits(), keep=0.6)
    with pytest.raises(ValueError, match=r"blocks\.\d \(MergingBlock\) changes how many tokens"):
        Teaching(["logits", "relations"], merged, teacher, task)
    coarse = vision(patch=4)
    with pytest.raises(ValueError, match=r"features: blocks.0 gives tokens \(5,\), blocks.1 of the teacher \(17,\)"):
        Teaching(["features"], coarse, teacher, task)(coarse, inputs, target)
    assert not any("project" in vars(m) or m._forward_hooks for m in coarse.modules())
    with pytest.raises(ValueError, match=r"the student has the stages stages.0, stages.1, its teacher blocks"):
        Teaching(["features"], built("swin"), teacher, task)
    sizes = {"img_size": (32, 32), "in_chans": 1, "num_classes": 10}
    convnext = create_model("convnext_tiny", **{**sizes, "dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"stages.3.0 .* cannot be compared.*show no queries"):
        Teaching(["relations"], convnext, convnext, task)
    Teaching(["features", "gram"], convnext, convnext, task)


def test_signals_that_make_no_sense_are_refused():
    for signals, message in (
        (["feature"], "signals must be among logits, features, attention, relations, gram; got 'feature'"),
        ({"gram": -1.0}, "the weight of gram must be at least 0"),
        ([], "at least one of"),
        ({"gram": 0.0}, "at least one of"),
    ):
        with pytest.raises(ValueError, match=message):
            teaching.check_signals(signals)
    assert teaching.check_signals("gram") == {"gram": 1.0}


# --- is it worth having ---------------------------------------------------------------------------------------------


def test_a_taught_student_beats_one_of_labels_alone_over_three_seeds():
    calibration = texts()
    teacher = learned(encoder(depth=4), calibration, steps=90)
    few = copy.copy(calibration)
    few.data = copy.copy(calibration.data)
    few.data.train = calibration.data.train.take(torch.arange(64))
    scores = []
    for signals in ([], ["logits", "features", "relations"]):
        for few.seed in range(3):
            student = encoder(depth=2, dim=24, heads=2)
            objective = Teaching(signals, student, teacher, few.task) if signals else None
            few.trainer(student, lr=3e-3, ema=0.0, warmup=5, objective=objective).train(steps=50, schedule="linear")
            scores.append(few.score(student))
    assert sum(scores[3:]) > sum(scores[:3]) + 0.1, scores
