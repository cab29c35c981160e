"""Early exit by saturation: who leaves where, that batches and caches agree, and what it saves."""

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.data.base import Dataset, Split
from gossamer.io import export_onnx
from gossamer.layers import Block, Mlp
from gossamer.layers.saturation import Saturation, check_threshold, saturation
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.ops.attention import join_heads
from gossamer.shrink import recipe
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.passes.mue import choose_threshold, expected_cost, layerwise_loss, stack_of
from gossamer.tasks import create_task
from gossamer.trunks import Isotropic
from shrink import toys
from shrink.loading import same_after_loading
from shrink.refusals import refuses

DEPTH = 4


class Words(nn.Module):
    """Words and places as vectors; nothing is masked."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(16, dim), nn.Parameter(torch.randn(1, 12, dim))

    def forward(self, ids):
        return self.words(ids) + self.places[:, : ids.shape[1]], None


class Scores(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x)


def decoder(mixer="attention", **options) -> Isotropic:
    torch.manual_seed(0)
    blocks = [
        Block(16, create_mixer(mixer, 16, heads=4, causal=True, **options), Mlp(16, 32), layer_scale=0.7**i)
        for i in range(DEPTH)
    ]
    return Isotropic(Words(16), blocks, norm=nn.LayerNorm(16), head=Scores(16, 16)).eval()


def with_exits(model: Isotropic, threshold: float) -> Isotropic:
    model = copy.deepcopy(model)
    blocks = list(model.blocks)
    model.blocks = nn.ModuleList([Saturation(blocks, threshold=threshold, per_token=blocks[0].mixer.causal)])
    return model.eval()


def models():
    ids = torch.randint(3, toys.WORDS, (5, 12))
    ids[1, 7:] = ids[4, 3:] = 0
    return {
        "text": (toys.encoder(depth=DEPTH), ids),
        "image": (toys.vision(depth=DEPTH, layer_scale=0.3), torch.randn(5, 1, 8, 8)),
        "decoder": (decoder(), torch.randint(0, 16, (5, 12))),
    }


@torch.no_grad()
def levels(model, x) -> torch.Tensor:
    """Likenesses of all layers and samples (tokens), in rising order."""
    tokens, mask = model.stem(x)
    return with_exits(model, 2.0).blocks[0].likeness(tokens, mask=mask).flatten().sort().values


@pytest.mark.parametrize("kind", ["text", "image", "decoder"])
@torch.no_grad()
def test_a_threshold_above_one_is_the_full_model_and_one_below_minus_one_a_single_layer(kind):
    model, x = models()[kind]
    assert torch.equal(with_exits(model, 1.0001)(x), model(x))
    first = with_exits(model, -1.1)
    one = copy.deepcopy(model)
    one.blocks = one.blocks[:1]
    torch.testing.assert_close(first(x), one(x), atol=1e-6, rtol=1e-6)
    assert (stack_of(first).depths == 1).all()


@pytest.mark.parametrize("kind", ["text", "image", "decoder"])
@torch.no_grad()
def test_depths_never_rise_when_the_threshold_falls(kind):
    model, x = models()[kind]
    found = levels(model, x)
    before = None
    for threshold in (2.0, *found[[-1, -4, len(found) // 2, 2]].tolist(), -2.0):
        exits = with_exits(model, threshold)
        exits(x)
        depths = stack_of(exits).depths
        if kind != "decoder":  # a decoder's tokens see the copies of those that left before them
            assert before is None or (depths <= before).all()
        assert before is None or depths.sum() <= before.sum()
        before = depths
    assert (before == 1).all()


@pytest.mark.parametrize("kind", ["text", "image"])
@torch.no_grad()
def test_a_batch_leaves_sample_by_sample_as_each_alone(kind):
    model, x = models()[kind]
    exits = exits_between(model, x)
    together, depths = exits(x), stack_of(exits).depths
    assert len(depths.unique()) > 1
    for i in range(len(x)):
        # A text alone has no padding: neither its likeness nor its exit may read what is padded.
        one = x[i : i + 1, : int((x[i] != 0).sum())] if kind == "text" else x[i : i + 1]
        torch.testing.assert_close(exits(one)[0], together[i], atol=1e-5, rtol=1e-5)
        assert stack_of(exits).depths == depths[i]


def exits_between(model, x) -> Isotropic:
    """`model` with a threshold half way between two likenesses in the middle of all."""
    found = levels(model, x)
    middle = len(found) // 2
    return with_exits(model, float(found[middle - 1] + found[middle]) / 2)


def naive_decoding(model, ids, threshold):
    """Token by token and layer by layer from the definition, no cache of states: keys and values are kept as lists."""
    keys = [[] for _ in range(DEPTH)]
    values = [[] for _ in range(DEPTH)]
    answers, taken = [], []
    for t in range(len(ids)):
        x = model.stem.words(ids[t]) + model.stem.places[0, t]
        for layer, block in enumerate(model.blocks):
            mixer = block.mixer
            q, k, v = (part[0] for part in mixer.project(block.norm1(x)[None, None]))
            keys[layer].append(k[:, 0])
            values[layer].append(v[:, 0])
            k, v = torch.stack(keys[layer], 1), torch.stack(values[layer], 1)
            share = q.shape[0] // k.shape[0]
            k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
            weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
            y = x + block.scale1 * mixer.proj(join_heads((weights @ v)[None])[0, 0])
            y = y + block.scale2 * block.mlp(block.norm2(y)[None])[0]
            likeness = float(x @ y / (x.norm() * y.norm()))
            x = y
            if likeness > threshold:
                break
        for deeper in range(layer + 1, DEPTH):
            keys[deeper].append(keys[layer][-1])
            values[deeper].append(values[layer][-1])
        answers.append(model.head(model.norm(x)))
        taken.append(layer + 1)
    return torch.stack(answers), torch.tensor(taken)


@pytest.mark.parametrize(("mixer", "options"), [("attention", {}), ("gqa", {"kv_heads": 2})])
@torch.no_grad()
def test_a_decoder_copies_keys_and_values_of_skipped_layers_cached_and_uncached(mixer, options):
    model = decoder(mixer, **options)
    ids = torch.randint(0, 16, (3, 10))
    found = levels(model, ids)
    threshold = float(found[len(found) // 2] + found[len(found) // 2 + 1]) / 2
    exits = with_exits(model, threshold)
    stack = stack_of(exits)
    whole, depths = exits(ids), stack.depths
    assert len(depths.unique()) > 1
    tokens, _ = exits.stem(ids)
    state = stack.initial_state(3)
    for t in range(10):
        x_t, state = stack.step(tokens[:, t], state)
        assert torch.equal(stack.depths, depths[:, t])
        torch.testing.assert_close(exits.head(exits.norm(x_t)), whole[:, t], atol=1e-5, rtol=1e-5)
    for i in range(3):
        want, taken = naive_decoding(model, ids[i], threshold)
        assert torch.equal(taken, depths[i])
        torch.testing.assert_close(whole[i], want, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, model(ids), atol=1e-3)


@torch.no_grad()
def test_decoding_that_never_leaves_is_the_models_own():
    model, ids = models()["decoder"]
    stack = stack_of(with_exits(model, 1.0001))
    state, plain = stack.initial_state(5), [block.initial_state(5) for block in model.blocks]
    for x_t in model.stem(ids)[0].unbind(1):
        y = x_t
        for layer, block in enumerate(model.blocks):
            y, plain[layer] = block.step(y, plain[layer])
        x_t, state = stack.step(x_t, state)
        assert torch.equal(x_t, y)
        assert (stack.depths == DEPTH).all()


@torch.no_grad()
def test_a_change_of_the_text_moves_exits_of_an_image_read_with_it_and_none_of_one_read_apart():
    model, _ = models()["image"]
    blocks = list(model.blocks)
    picture, text, other = torch.randn(4, 9, 32), torch.randn(4, 6, 32), torch.randn(4, 6, 32)

    def likeness(x):
        return Saturation(blocks, threshold=2.0).eval().likeness(x)[0]

    def depths(threshold, *parts):
        stacks = [Saturation(blocks, threshold=threshold).eval() for _ in parts]
        given = [stack(part) for stack, part in zip(stacks, parts, strict=True)]
        return [stack.depths for stack in stacks], torch.cat(given, 1)

    # Between what the first layer makes of one sample with either text: one of them lets it go there.
    with_text, with_other = (likeness(torch.cat((picture, words), 1)) for words in (text, other))
    between = float(with_text[0] + with_other[0]) / 2
    together = [depths(between, torch.cat((picture, words), 1))[0][0] for words in (text, other)]
    assert together[0][0] != together[1][0]
    # Apart, the image leaves where it would leave alone, whatever the text; the text's own exits move.
    threshold = float(likeness(picture).sort().values[1:3].mean())
    (seen, read), both = depths(threshold, picture, text)
    (seen_again, read_again), both_again = depths(threshold, picture, 0.2 * other)
    assert torch.equal(seen, seen_again)
    assert len(seen.unique()) > 1
    assert torch.equal(both[:, :9], both_again[:, :9])
    assert not torch.equal(read, read_again)


def test_skipped_layers_cost_nothing():
    model, x = models()["image"]
    exits = with_exits(model, -2.0)
    one = copy.deepcopy(model)
    one.blocks = one.blocks[:1]
    assert macs(exits, (x,)).total == macs(one, (x,)).total < macs(model, (x,)).total
    cost = expected_cost(exits, [(x,)])
    assert (cost.layers, cost.share) == (1.0, 0.25)
    assert cost.macs == pytest.approx(macs(one, (x[:1],)).total)


def test_trained_exits_run_a_third_fewer_layers_at_nearly_the_full_score(tmp_path):
    calibration = toys.texts()
    model = toys.learned(toys.encoder(depth=DEPTH), calibration, steps=90)
    full = calibration.score(model)
    small, steps = run_pass("mue", model, calibration, keep=0.65, steps=60, lr=1e-3)
    assert [step["step"] for step in steps] == ["mue.exits"]
    cost = expected_cost(small, [x for x, _ in calibration.batches(128, split="val")])
    assert cost.share <= 0.7
    assert calibration.score(small) >= 0.95 * full
    same_after_loading(small, next(calibration.batches(8))[0], tmp_path)


def test_the_layer_wise_loss_makes_every_layer_answer_and_as_many_steps_of_the_last_ones_do_not():
    calibration = toys.digits()
    (inputs, target), right = next(calibration.batches(128, split="val", batch_size=128)), []
    wise, _ = run_pass("mue", toys.vision(depth=DEPTH), calibration, threshold=2.0, steps=100, lr=5e-3)
    final = toys.vision(depth=DEPTH)
    calibration.trainer(final, lr=5e-3, ema=0.0).train(steps=100, schedule="linear")
    final, _ = run_pass("mue", final, calibration, threshold=2.0, steps=0)
    for net in (wise, final):
        with torch.no_grad():
            states = stack_of(net).states(net.stem(*inputs)[0])
            answers = [net.head(net.norm(state)).argmax(1) for state in states]
        right.append([float((answer == target).float().mean()) for answer in answers])
    assert all(ours > theirs + 0.1 for ours, theirs in zip(right[0][:2], right[1][:2], strict=True))
    assert right[0][2] > right[1][2]
    assert min(right[0][-1], right[1][-1]) > 0.6


# A picture of cells, one of which shows a shape in a colour, and the sentence that tells of it.
CELLS, KINDS = 6, 5
BEGIN = 2 + KINDS * KINDS
TOLD = BEGIN + 2 + 2 * KINDS + CELLS


def pictures_and_captions(count, seed):
    draw = torch.Generator().manual_seed(seed)
    place = torch.randint(0, CELLS, (count,), generator=draw)
    colour, shape = torch.randint(0, KINDS, (2, count), generator=draw)
    cells = torch.ones(count, CELLS, dtype=torch.long).scatter(1, place[:, None], (2 + KINDS * shape + colour)[:, None])
    first, last = torch.zeros_like(place), torch.full_like(place, TOLD - BEGIN - 1)
    words = (first, 1 + colour, 1 + KINDS + shape, 1 + 2 * KINDS + place, last)
    ids = torch.cat((cells, BEGIN + torch.stack(words, 1)), 1)
    return Split((ids[:, :-1],), ids[:, 1:].index_fill(1, torch.arange(CELLS), -100))


def captions():
    spec = {"vocab_size": TOLD, "max_len": CELLS + 5}
    splits = [pictures_and_captions(n, i) for i, n in enumerate((512, 128, 128))]
    data = Dataset("language-modelling", *splits, spec, {})
    task = create_task("text-classification", {**spec, "num_classes": 2, "pad_id": 0}, {"classes": ["a", "b"]})
    task.batch = lambda split, index, **_: ((split.inputs[0][index],), split.targets[index])
    task.loss = lambda y, target, smoothing=0.0: F.cross_entropy(y.flatten(0, 1), target.flatten(), ignore_index=-100)
    task.metrics = lambda y, target: {task.metric: float((y.argmax(-1) == target)[target >= 0].float().mean())}
    return Calibration(task, data)


@torch.no_grad()
def tell(net, cells):
    """The words that `net` writes behind the cells, the likeliest each time, from its caches, and the layers taken."""
    stack, said, layers = stack_of(net), torch.cat((cells, torch.full_like(cells[:, :1], BEGIN)), 1), []
    state = stack.initial_state(len(cells))
    for t in range(CELLS + 4):
        x, state = stack.step(net.stem(said)[0][:, t], state)
        layers.append(stack.depths)
        if t >= CELLS:
            said = torch.cat((said, net.head(net.norm(x)[:, None])[:, 0].argmax(-1, keepdim=True)), 1)
    return said[:, CELLS + 1 :], torch.stack(layers, 1).double()


def test_a_decoder_tells_of_pictures_in_a_third_fewer_layers_at_nearly_the_full_score():
    calibration = captions()
    torch.manual_seed(0)
    sizes = {"dim": 32, "depth": DEPTH, "heads": 4, "hidden": 64, "vocab_size": TOLD, "max_len": CELLS + 5}
    model = create_model("gpt2", **sizes, drop=0.0)
    for p in model.parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.2)
    toys.learned(model, calibration, steps=100, lr=5e-3)
    small, _ = run_pass("mue", model, calibration, keep=0.65, steps=70, lr=3e-3)
    (ids,), target = next(calibration.batches(128, split="val", batch_size=128))
    whole = copy.deepcopy(small)
    stack_of(whole).threshold = 2.0
    right = []
    for net in (whole, small):
        words, layers = tell(net, ids[:, :CELLS])
        right.append(float((words == target[:, CELLS:]).float().mean()))
    assert right[0] > 0.8
    assert right[1] >= 0.95 * right[0]
    assert float(layers.mean()) <= 0.7 * DEPTH


def test_the_pass_works_for_images_and_two_heads():
    calibration = toys.digits()
    small, _ = run_pass("mue", toys.vision(depth=DEPTH, distilled=True), calibration, keep=0.5, steps=2, samples=64)
    assert expected_cost(small, [x for x, _ in calibration.batches(64)]).share <= 0.5


def test_sentences_that_leave_at_different_layers_are_trained_to_be_compared():
    model = with_exits(toys.encoder(depth=DEPTH, num_classes=0), 2.0)
    ids, _ = toys.sentences(6, 0)
    with torch.no_grad():
        states = stack_of(model).states(*model.stem(ids)[:1], mask=ids != 0)
        vectors = torch.stack([model.head(state, ids != 0) for state in states])
    seen = []

    def loss(answer, target):
        seen.append(answer.detach())
        return answer.sum()

    layerwise_loss(model, (ids,), torch.zeros(3), loss, mixed=True)
    torch.testing.assert_close(torch.stack(seen[:DEPTH]), vectors)
    assert len(seen) == 2 * DEPTH
    layers = [[bool(torch.allclose(seen[-1][i], v[i], atol=1e-6)) for v in vectors].index(True) for i in range(6)]
    assert len(set(layers)) > 1


def test_the_threshold_is_the_largest_that_keeps_the_share():
    model, x = models()["decoder"]
    for kind in ("decoder", "text", "image"):
        model, x = models()[kind]
        exits = with_exits(model, 2.0)
        assert choose_threshold(exits, [(x,)], 1.0) > 1
        for keep in (0.75, 0.5):
            stack_of(exits).threshold = level = choose_threshold(exits, [(x,)], keep)
            share = expected_cost(exits, [(x,)]).share
            assert keep - 0.2 <= share <= keep
            found = levels(model, x)
            above = found[found > level]
            if kind != "decoder" and len(above) > 1:
                stack_of(exits).threshold = float(above[:2].mean()) + 1e-6
                assert expected_cost(exits, [(x,)]).share >= share


def test_torch_export_keeps_the_exits(tmp_path):
    # In a process of its own: what checks shapes in the tests cannot be compiled.
    code = (
        "import sys, onnx, torch\n"
        "from shrink.test_mue import exits_between, models, toys\n"
        "from gossamer.io import export_onnx, onnx_session\n"
        "torch.manual_seed(0)\n"
        "model, x = toys.encoder(depth=2), models()['text'][1]\n"
        "exits = exits_between(model, x)\n"
        "certificate = export_onnx(exits, x, sys.argv[1], exporter='dynamo')\n"
        "assert certificate.passed and certificate.held == 'batch', certificate.reason\n"
        "assert sum(n.op_type == 'If' for n in onnx.load(sys.argv[1]).graph.node) == 2\n"
        "y = torch.from_numpy(onnx_session(sys.argv[1]).run(None, {'input': x.numpy()})[0])\n"
        "torch.testing.assert_close(y, exits(x).detach(), atol=1e-4, rtol=1e-4)\n"
        "assert len(exits.blocks[0].depths.unique()) > 1\n"
    )
    folder = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx")],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{folder}:{folder.parent / 'src'}"},
    )


@pytest.mark.parametrize("kind", ["text", "image", "decoder"])
def test_a_traced_model_answers_the_same(kind, tmp_path):
    model, x = models()[kind]
    exits = exits_between(model, x)
    certificate = export_onnx(exits, x, tmp_path / "m.onnx", exporter="fast", real_inputs=x)
    assert certificate.passed, certificate.reason
    assert certificate.held == "batch", certificate.reason


def test_what_cannot_leave_early_is_named_and_left_as_it_was():
    calibration = toys.digits()
    swin = create_model("swin_t", img_size=32, embed_dim=16, depths=(2, 2), heads=(2, 4), patch=2, window=4)
    uneven = decoder()
    uneven.blocks[1].mixer.keep("heads", torch.tensor([0, 2]))
    ids = (torch.randint(0, 16, (2, 12)),)
    merging = recipe.apply(toys.vision(depth=2), {"step": "merging", "r": [2, 0], "tokens": 17, "protect": 1})
    for model, reason, inputs in (
        (swin, "Pyramid is no stack of layers of one width", (torch.randn(2, 3, 32, 32),)),
        (toys.vision(depth=1), "Isotropic has one layer", None),
        (uneven, "as wide in every layer", ids),
        (decoder("linear"), r"layer 0 \(LinearAttention\) must remember the keys and values themselves", ids),
        (merging, r"blocks\.0 \(MergingBlock\) gives other tokens than it takes", None),
    ):
        refuses("mue", model, calibration, reason, inputs)


@pytest.mark.parametrize("threshold", ["0.9", float("nan"), True, None])
def test_thresholds_that_are_no_numbers_are_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be a number"):
        check_threshold(threshold)
    with pytest.raises(ValueError, match="threshold must be a number"):
        run_pass("mue", toys.vision(), toys.digits(), threshold=float("nan"))


def test_a_share_must_be_one():
    with pytest.raises(ValueError, match="keep must be in"):
        run_pass("mue", toys.vision(), toys.digits(), keep=0.0)


def test_likeness_is_a_cosine_over_valid_tokens():
    x, y = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    want = [F.cosine_similarity(x[i, :n].flatten(), y[i, :n].flatten(), 0) for i, n in enumerate((5, 2))]
    torch.testing.assert_close(saturation(x, y, mask), torch.stack(want))
