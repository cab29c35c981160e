"""Content-based token pruning, its guidance by a teacher, and the codes of the retrieval it was made for."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

from gossamer.layers import Block, Mlp
from gossamer.layers.class_attention import ContentBlock, Heads, attend, content_map
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model, load_official
from gossamer.ops.hashing import discrete_codes, hamming, mean_average_precision, signs
from gossamer.shrink import recipe
from gossamer.shrink.passes.eet import HashHead, _Guide, erase, last_map, shares
from official import golden, probe, seeded_input, seeded_state
from shrink.toys import digits, vision

PAPER = [1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 1.0, 0.25, 1.0, 1.0]


def lengths(model, *inputs):
    """Tokens that come into each block."""
    seen = []
    hooks = [b.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])) for b in model.blocks]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-4)])
def test_importance_and_answers_equal_the_authors(dtype, tolerance):
    saved = golden("eet")
    net = create_model("vit_tiny_patch16_224", dim=24, heads=3, mlp_ratio=2.0, num_classes=5)
    state = seeded_state(saved["shapes"], dtype)
    hash_ = {n: state.pop(f"head_hash.{n}") for n in ("weight", "bias")}
    load_official(net, state).to(dtype).eval()
    recipe.apply(net, {"step": "eet", "keep": PAPER, "protect": 1})
    net.head = HashHead(net.head, 5, 8).to(dtype)
    net.head.fc.load_state_dict(hash_)
    x = seeded_input("eet", (2, 3, 224, 224)).to(dtype)
    maps = []
    for i in (0, 3):
        block = net.blocks[i]
        block.register_forward_pre_hook(
            lambda m, a: maps.append(content_map(attend(getattr(m, "block", m), a[0], None, None)[1])[:, 1:])
        )
    y, h = net(x)
    probe(y, h).backward()
    near = {"atol": tolerance, "rtol": 10 * tolerance}
    for ours, theirs in zip(maps, (saved["map0"], saved["map3"]), strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **near)
    torch.testing.assert_close(y, saved["logits"].to(dtype), **near)
    torch.testing.assert_close(h, saved["hash"].to(dtype), **near)
    torch.testing.assert_close(net.blocks[2].mixer.qkv.weight.grad, saved["qkv"].to(dtype), **near)
    torch.testing.assert_close(net.stem.tokens.grad, saved["cls"].to(dtype), **near)


def test_the_papers_places_leave_197_99_50_and_13_tokens_and_2_53_gmacs():
    net = create_model("vit_small_patch16_224").to("meta")
    recipe.apply(net, {"step": "eet", "keep": PAPER, "protect": 1})
    x = torch.empty(1, 3, 224, 224, device="meta")
    assert lengths(net, x) == [197] * 4 + [99] * 4 + [50] * 2 + [13] * 2
    counted = macs(net, x).total
    formula = sum(12 * n * 384**2 + 2 * n * n * 384 for n in lengths(net, x)) + 196 * 768 * 384 + 384 * 1000
    assert counted == pytest.approx(formula, rel=0.01)
    assert counted == pytest.approx(2.53e9, rel=0.01)


@pytest.mark.parametrize(("depth", "keep"), [(12, 0.55), (12, 0.8), (6, 0.6), (2, 0.7), (24, 0.5)])
def test_the_share_of_all_tokens_is_what_was_asked_for(depth, keep):
    left, now, total = shares(depth, keep), 1.0, 0.0
    for share in left:
        total += now
        now *= share
    assert total / depth == pytest.approx(keep, abs=1e-3)
    if depth == 12:
        assert [i for i, share in enumerate(left) if share < 1] == [3, 7, 9]
    assert shares(depth, 1.0) == [1.0] * depth


def block(keep=1.0, residual="pre", protect=1, dim=16):
    torch.manual_seed(0)
    made = Block(dim, create_mixer("attention", dim, heads=4), Mlp(dim, 32), residual=residual)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return ContentBlock(made, keep, protect=protect).eval()


def naive_map(inner, x):
    """One sample, one head, one token after the other."""
    read = inner.norm1(x) if inner.residual in ("pre", "stream") else x
    q, k, v = (t[0] for t in inner.mixer.project(read))
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    outputs = weights @ v
    importance = []
    for i in range(x.shape[1]):
        norms = [float(outputs[h, i].norm()) for h in range(len(q))]
        importance.append(sum(n / (sum(norms) + 1e-8) * float(weights[h, 0, i]) for h, n in enumerate(norms)))
    return torch.tensor(importance)


@pytest.mark.parametrize("residual", ["pre", "post", "stream"])
def test_a_block_keeps_the_tokens_of_highest_importance_in_their_order(residual):
    pruned, x = block(0.5, residual), torch.randn(1, 12, 16)
    with torch.no_grad():
        y, mask, sizes = pruned(x)
        assert (mask, sizes) == (None, None)
        m = naive_map(pruned.block, x)
        best = sorted(range(1, 12), key=lambda i: -float(m[i]))[:5]
        torch.testing.assert_close(y, pruned.block(x)[:, [0, *sorted(best)]], atol=1e-5, rtol=1e-5)


def test_weights_of_the_heads_sum_to_one_and_loud_tokens_are_heard():
    outputs = torch.randn(2, 3, 7, 4)
    ones = content_map(Heads(torch.ones(2, 3, 7), outputs))
    torch.testing.assert_close(ones, torch.ones(2, 7))
    # All heads look at all tokens alike but one, which looks at token 4 and has the most to say there.
    row = torch.full((1, 3, 7), 1 / 7)
    row[0, 0] = torch.eye(7)[4]
    outputs = torch.ones(1, 3, 7, 4)
    outputs[0, 0, 4] *= 50
    assert int(content_map(Heads(row, outputs)).argmax()) == 4


@pytest.mark.parametrize("keep", [0.5, 0.34])
def test_a_model_that_masks_what_leaves_equals_the_one_that_gathers(keep):
    pruned, behind, x = block(keep, "post"), block(1.0, "post"), torch.randn(3, 13, 16)
    with torch.no_grad():
        y, _, _ = behind(pruned(x)[0])
        m = content_map(attend(pruned.block, x, None, None)[1])[:, 1:]
        kept = torch.zeros(3, 13, dtype=torch.bool)
        kept[:, 0] = True
        kept.scatter_(1, 1 + m.topk(int(keep * 12), dim=1).indices, True)
        masked = behind(pruned.block(x), mask=kept)[0]
        torch.testing.assert_close(y, masked[kept].view_as(y), atol=1e-5, rtol=1e-5)


def test_a_padded_batch_equals_each_sample_alone():
    pruned, x = block(0.5, "post"), torch.randn(3, 12, 16)
    mask = torch.arange(12) < torch.tensor([[12], [8], [2]])
    y, left, _ = pruned(x, mask=mask)
    for i, n in enumerate((12, 8, 2)):
        alone, _, _ = pruned(x[i : i + 1, :n])
        torch.testing.assert_close(y[i][left[i]], alone[0], atol=1e-5, rtol=1e-5)


def test_exactly_the_wanted_cells_are_erased():
    images = torch.randn(2, 3, 224, 224)
    cells = torch.tensor([[0, 15, 195, 13], [1, 2, 3, 28]])
    for official in (False, True):
        erased = erase(images, cells, (14, 14), official=official)
        want = images.clone()
        for i, row in enumerate(cells.tolist()):
            for cell in row:
                r, c = (cell % 14, cell // 14) if official else (cell // 14, cell % 14)
                want[i, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = 0
        assert torch.equal(erased, want)
        assert int((erased == 0).sum()) == 2 * 3 * 4 * 256
    with pytest.raises(ValueError, match="cells must be in"):
        erase(images, torch.tensor([[196], [0]]), (14, 14))


def test_what_is_erased_is_what_the_teacher_looks_at_most():
    calibration, net, student = digits(), vision(depth=3).eval(), vision(depth=3).eval()
    inputs, target = next(calibration.batches(6, batch_size=6))
    given = []
    student.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    loss = _Guide(net, calibration, 4, 1)(student, inputs, target)
    seen = torch.stack([naive_map(net.blocks[2], t[None]) for t in net.blocks[1](net.blocks[0](net.stem(*inputs)[0]))])
    shown, hidden = given
    assert torch.equal(shown, inputs[0])
    for i in range(6):
        best = sorted(range(16), key=lambda cell: -float(seen[i, 1 + cell]))[:4]
        want = shown[i].clone()
        for cell in best:
            want[:, 2 * (cell // 4) : 2 * (cell // 4) + 2, 2 * (cell % 4) : 2 * (cell % 4) + 2] = 0
        assert torch.equal(hidden[i], want)
    with torch.no_grad():
        answers, erased, taught = student(shown), student(hidden), net(shown)
        likeness = torch.cosine_similarity(answers, taught, dim=-1)
        rest = calibration.task.loss(answers, target) + calibration.task.loss(erased, target)
    torch.testing.assert_close(loss.detach(), rest + (1 - likeness).mean())


def test_the_teachers_map_is_that_of_its_last_block_and_its_answer_its_own():
    net, x = vision(depth=3).eval(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        answer, seen = last_map(net, x)
        torch.testing.assert_close(answer, net(x))
        tokens = net.blocks[1](net.blocks[0](net.stem(x)[0]))
        torch.testing.assert_close(seen[0], naive_map(net.blocks[2], tokens[:1]), atol=1e-5, rtol=1e-5)


# ---- codes -----------------------------------------------------------------------------------------------------------


def test_the_objective_of_the_codes_falls_and_classes_stay_together():
    labels = torch.arange(60) % 6
    codes, losses = discrete_codes(labels, 6, 16, generator=torch.Generator().manual_seed(0))
    assert set(codes.unique().tolist()) == {-1.0, 1.0}
    assert all(after <= before + 1e-6 for before, after in pairwise(losses))
    assert losses[-1] < losses[0]
    distances, same = hamming(codes, codes), labels[:, None] == labels
    assert distances[same].mean() < distances[~same].mean() - 1
    assert float(distances.diagonal().max()) == 0


def test_precision_is_one_for_perfect_codes_and_the_prior_for_random_ones():
    labels = torch.arange(400) % 4
    perfect = signs(torch.randn(4, 12))[labels]
    same = labels[:, None] == labels
    assert mean_average_precision(hamming(perfect, perfect), same) == pytest.approx(1.0)
    random = signs(torch.randn(400, 64))
    others = ~torch.eye(400, dtype=torch.bool)
    score = mean_average_precision(hamming(random, random) + 99 * ~others, same & others)
    assert score == pytest.approx(0.25, abs=0.04)
    ranking = mean_average_precision(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[True, False, True]]))
    assert ranking == pytest.approx((1 + 2 / 3) / 2)


def test_in_most_trainings_a_teachers_codes_help_a_pruned_student_retrieve():
    """The student's loss of the paper with the teacher's answers and without."""
    calibration = digits()
    train, test = calibration.data.train, calibration.data.test
    codes = discrete_codes(train.targets, 10, 16, generator=torch.Generator().manual_seed(0)).codes
    by_class = signs(torch.stack([codes[train.targets == k].mean(0) for k in range(10)]))
    entropy, near = nn.functional.cross_entropy, nn.functional.mse_loss

    def hashing(seed):
        net = vision()
        torch.manual_seed(seed)
        for p in net.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
        net.head = HashHead(net.head, 10, 16)
        return net

    @torch.no_grad()
    def precision(net):
        queries = signs(net.eval()(*calibration.task.batch(test, torch.arange(300))[0])[1])
        return mean_average_precision(hamming(queries, codes), test.targets[:300, None] == train.targets)

    def learn(net, loss, steps):
        calibration.trainer(net, objective=loss, lr=5e-3, ema=0.0).train(steps=steps, schedule="linear")
        return precision(net)

    def alone(model, inputs, target):
        y, h = model(*inputs)
        return entropy(y, target) + near(h, by_class[target])

    def student(taught):
        def loss(model, inputs, target):
            with torch.no_grad():
                (_, wanted), seen = last_map(teacher, *inputs)
            y, h = model(*inputs)
            hidden, _ = model(erase(inputs[0], seen[:, 1:].topk(2, dim=1).indices, (4, 4)))
            found = 0.1 * (entropy(y, target) + entropy(hidden, target)) + near(h, by_class[target])
            return found + taught * (1 - torch.cosine_similarity(h, wanted, dim=-1)).mean()

        return loss

    teacher = hashing(100)
    assert learn(teacher, alone, 300) > 0.8
    found = []
    for seed in range(3):
        calibration.seed = seed
        net = recipe.apply(hashing(seed), {"step": "eet", "keep": [0.5, 1.0], "protect": 1})
        before, other = precision(net), copy.deepcopy(net)
        found.append((before, learn(other, student(0.0), 80), learn(net, student(1.0), 80)))
    assert all(min(without, taught) > before + 0.1 for before, without, taught in found)
    assert sum(taught > without for _, without, taught in found) >= 2


def test_a_block_that_keeps_all_is_the_plain_one_and_one_without_a_class_token_is_refused():
    plain, x = block(1.0), torch.randn(2, 9, 16)
    torch.testing.assert_close(plain(x)[0], plain.block(x), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="class token"):
        block(protect=0)
    with pytest.raises(ValueError, match="img_size= of the image"):
        vision()(torch.randn(1, 1, 12, 12))
