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

from gossamer.io import export_onnx
from gossamer.layers import Block, Mlp
from gossamer.layers.saturation import Saturation, check_threshold, saturation
from gossamer.measure import macs
from gossamer.mixers import create_mixer
from gossamer.models import create_model
from gossamer.ops.attention import join_heads
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.mue import choose_threshold, expected_cost, layerwise_loss, stack_of
from gossamer.trunks import Isotropic
from shrink import toys
from shrink.loading import same_after_loading

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
def test_two_modalities_over_the_same_layers_leave_apart():
    model, _ = models()["image"]
    blocks = list(model.blocks)
    picture, text = torch.randn(4, 9, 32), torch.randn(4, 6, 32)
    found = Saturation(blocks, threshold=2).eval().likeness(torch.cat((picture, text), 1)).flatten().sort().values
    by_picture, by_text = (Saturation(blocks, threshold=float(found[i])).eval() for i in (6, 10))
    together = torch.cat((by_picture(picture), by_text(text)), 1)
    left = by_picture.depths
    torch.testing.assert_close(together[:, :9], by_picture(picture))
    other = by_text(text.roll(1, 0).neg())
    assert torch.equal(by_picture.depths, left)
    assert not torch.allclose(other, together[:, 9:])


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
    # The layer-wise loss is what makes early layers readable.
    inputs, target = next(calibration.batches(128, split="val"))
    untrained = run_pass("mue", model, calibration, threshold=-2.0, steps=0)[0]
    with torch.no_grad():
        loss = [float(layerwise_loss(m, inputs, target, calibration.task.loss)) for m in (small, untrained)]
    assert loss[0] < 0.8 * loss[1]
    same_after_loading(small, next(calibration.batches(8))[0], tmp_path)


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
    for model, reason in (
        (swin, "no stack of layers of one width"),
        (toys.vision(depth=1), "one layer"),
        (uneven, "as wide in every layer"),
    ):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(Unsupported, match=reason):
            run_pass("mue", model, calibration)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not getattr(model, "recipe", [])


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
