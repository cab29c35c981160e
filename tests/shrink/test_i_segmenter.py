"""Integer-only models: no float between input and answer, the same integers everywhere, and little lost."""

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.io import export_onnx, onnx_session
from gossamer.io.integer_graph import IntegerGraph, float_operators
from gossamer.layers import BatchNorm
from gossamer.layers.integer import Cell
from gossamer.models import create_model
from gossamer.ops import integer as op
from gossamer.shrink.base import Unsupported, run_pass
from gossamer.shrink.passes.i_segmenter import settle, simulate, watch
from shrink import toys
from shrink.loading import same_after_loading

KINDS = ("text", "image")


def problem(kind):
    return toys.texts() if kind == "text" else toys.digits()


@pytest.fixture(scope="module")
def trained():
    made = {}
    for kind in KINDS:
        calibration = problem(kind)
        model = toys.encoder() if kind == "text" else toys.vision(layer_scale=0.5)
        made[kind] = calibration, toys.learned(model, calibration, steps=120)
    return made


@pytest.fixture(scope="module")
def integers(trained):
    return {kind: run_pass("i_segmenter", model, calibration)[0] for kind, (calibration, model) in trained.items()}


class NoFloats(TorchDispatchMode):
    """Notes every operation on floats."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.dtype.is_floating_point:
                self.seen.append(str(func))
        return out


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_nothing_is_a_float_between_input_and_answer(kind, trained, integers):
    calibration, model = trained[kind]
    (x,) = next(calibration.batches(16))[0]
    small = integers[kind]
    quantised = small.stem.quantised(x) if kind == "image" else x
    with NoFloats() as watched:
        answer = small.integers(quantised)
    assert not watched.seen
    assert not answer.is_floating_point()
    assert torch.equal(small(x), answer.float() * small.head.quantum)
    assert all(p.dtype == torch.int8 for name, p in small.named_parameters() if name.endswith("weight"))
    with NoFloats() as watched:
        model(x)
    assert watched.seen


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_file_has_integer_operators_only_and_gives_the_same_integers(kind, trained, integers, tmp_path):
    calibration, _ = trained[kind]
    path = integers[kind].write_onnx(next(calibration.batches(2))[0], tmp_path / "m.onnx")
    assert float_operators(path) == []
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds.count("QuantizeLinear") == (kind == "image")
    assert kinds.count("DequantizeLinear") == 1
    assert kinds.count("MatMulInteger") >= 2 * 6
    assert not {"MatMul", "Gemm", "Conv", "Softmax", "LayerNormalization", "Erf", "Sqrt", "Exp"} & set(kinds)
    session = onnx_session(path)
    for count in (1, 40):  # the batch is free
        (x,) = next(calibration.batches(count, batch_size=40, split="val"))[0]
        y = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        assert torch.equal(y, integers[kind](x))


@pytest.mark.parametrize("kind", KINDS)
def test_little_of_the_score_is_lost_with_one_sample_and_no_more_with_sixteen(kind, trained, integers):
    calibration, model = trained[kind]
    full = calibration.score(model)
    scores = [calibration.score(run_pass("i_segmenter", model, calibration, samples=count)[0]) for count in (1, 16)]
    unit = 1.0 if full <= 1 else 100.0
    assert min(scores[0], scores[1]) >= full - 0.05 * unit
    assert scores[1] >= scores[0] - 0.02 * unit


@pytest.mark.parametrize("kind", KINDS)
def test_integers_answer_as_their_simulation_and_near_the_model(kind, trained):
    calibration, model = trained[kind]
    batches = [x for x, _ in calibration.batches(32)]
    other = run_pass("magnitude", model, calibration, keep=1.0)[0].double()
    simulate(other, None)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in batches[0])
    watch(other, [inputs])
    found = []

    def multiple(cell, args, out):
        value, scale = out
        if scale.ndim:  # one scale a channel, or a group of them
            scale = scale.repeat_interleave(value.shape[-1] // len(scale))
        found.append(float((value / scale - (value / scale).round()).abs().max()))

    hooks = [cell.register_forward_hook(multiple) for cell in other.modules() if isinstance(cell, Cell)]
    with torch.no_grad():
        simulated = other(*inputs)
        for hook in hooks:
            hook.remove()
        assert len(found) > 20
        assert max(found) < 1e-3
        settle(other, inputs)
        whole = other(*inputs)
        step = float(other.head.quantum)
        # A tie that falls to the other side may move an answer by a few of 2^16 steps.
        assert (whole - simulated).abs().max() <= 64 * step
        # What is labelled is labelled alike by integers and simulation.
        assert torch.equal(whole.argmax(-1), simulated.argmax(-1))
        assert (whole - model(*batches[0])).abs().max() < 0.15 * model(*batches[0]).abs().max()
        assert not torch.equal(whole.float(), model(*batches[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_integer_model_is_the_same_after_loading(kind, trained, integers, tmp_path):
    same_after_loading(integers[kind], next(trained[kind][0].batches(5))[0], tmp_path)


def test_weights_are_a_quarter_of_the_size(tmp_path):
    import gossamer

    calibration = toys.texts()
    model = toys.encoder(dim=128, hidden=512, vocab_size=2000)
    small = run_pass("i_segmenter", model, calibration, samples=4)[0]
    sizes = []
    for name, one in (("full", model), ("small", small)):
        gossamer.save(one, tmp_path / name)
        sizes.append((tmp_path / name / "model.safetensors").stat().st_size)
    assert sizes[0] > 3.7 * sizes[1]


HEADS = {
    "mean, normalised": ("bert_base", {"num_classes": 0, "pool": "mean"}),
    "maximum": ("bert_base", {"num_classes": 0, "pool": "max", "normalize": False}),
    "mean": ("bert_base", {"num_classes": 0, "normalize": False, "act": "relu"}),
    "relu": ("bert_base", {"num_classes": 3, "head_act": "relu", "act": "silu"}),
    "two heads": ("vit", {"distilled": True}),
    "padded, oblong": ("vit", {"img_size": (9, 7), "pad": True, "position_tokens": False}),
    "batch norm": ("vit", {"norm": BatchNorm}),
    "no head": ("vit", {"num_classes": 0}),
}


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_other_ends_and_norms_are_integers_too(head, tmp_path):
    name, settings = HEADS[head]
    if name == "vit":
        model = toys.vision(**settings).eval()
        size = settings.get("img_size", (8, 8))
        batches = [(torch.randn(16, 1, *size),)]
        if head == "batch norm":
            model.train()
            for _ in range(5):
                model(torch.randn(16, 1, *size))
            model.eval()
    else:
        model = toys.encoder(**settings).eval()
        batches = [next(toys.texts().batches(16))[0]]
    want = model(*batches[0])
    simulate(model, None)
    watch(model, batches)
    settle(model, batches[0])
    got = model(*batches[0])
    assert (got - want).abs().max() < 0.12 * want.abs().max()
    path = model.write_onnx(batches[0], tmp_path / "m.onnx")
    assert float_operators(path) == []
    y = onnx_session(path).run(None, {"input": batches[0][0].numpy()})[0]
    assert torch.equal(torch.from_numpy(y), got)


def test_padding_changes_nothing(integers):
    ids, _ = toys.sentences(6, 3)
    ids[:, 8:] = 0
    longer, shorter = integers["text"](ids), integers["text"](ids[:, :8])
    assert torch.equal(longer, shorter)


def test_training_the_simulation_lowers_its_loss_over_fifty_steps():
    calibration = toys.texts()
    model = toys.learned(toys.encoder(), calibration, steps=25)
    simulate(model, 4.0)
    watch(model, [x for x, _ in calibration.batches(32)])
    losses: list[float] = []
    trainer = calibration.trainer(model, lr=1e-3, ema=0.0, warmup=1)
    trainer.train(steps=50, on_step=losses.append)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_the_pass_can_train_with_the_model_as_teacher():
    calibration = toys.texts()
    model = toys.learned(toys.encoder(), calibration, steps=60)
    small, steps = run_pass("i_segmenter", model, calibration, steps=3, lam=4.0)
    assert small.fixed
    assert [step["step"] for step in steps] == ["i_segmenter.integers"]
    assert calibration.score(small) >= calibration.score(model) - 5


def test_what_has_no_integer_form_is_named_and_left_as_it_was():
    calibration = toys.digits()
    other = toys.vision()
    other.blocks[1].mlp.act = nn.Softplus()
    odd = toys.vision()
    odd.norm = nn.RMSNorm(32)
    cases = (
        (create_model("swin_t", img_size=32, embed_dim=16, depths=(2, 2), heads=(2, 4), patch=2, window=4), "no stack"),
        (toys.vision(mixer="pool"), r"stem \(TokenStem\)"),
        (other, r"blocks.1.*activation must be one of GELU"),
        (odd, r"norm \(RMSNorm\)"),
    )
    for model, reason in cases:
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(Unsupported, match=reason):
            run_pass("i_segmenter", model, calibration)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert not getattr(model, "recipe", [])


def test_bad_settings_and_images_are_refused(integers, tmp_path):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        run_pass("i_segmenter", toys.vision(), toys.digits(), samples=0)
    with pytest.raises(ValueError, match="lam must be positive"):
        run_pass("i_segmenter", toys.vision(), toys.digits(), lam=-1.0)
    with pytest.raises(ValueError, match="the image is 1x1"):
        integers["image"](torch.zeros(1, 1, 1, 1))
    model = toys.vision()
    simulate(model, None)
    with pytest.raises(ValueError, match="not fixed yet"):
        model.write_onnx(torch.zeros(1, 1, 8, 8), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="ranges are not known yet"):
        model.eval()(torch.zeros(1, 1, 8, 8))


def test_the_walk_finds_floats_wherever_they_are(tmp_path):
    def save(nodes, name):
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
            [helper.make_tensor("s", TensorProto.FLOAT, [], [0.5]), helper.make_tensor("z", TensorProto.INT8, [], [0])],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / name)
        return tmp_path / name

    first = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["a"])
    last = helper.make_node("DequantizeLinear", ["d", "s"], ["y"])
    clean = [first, helper.make_node("Identity", ["a"], ["d"]), last]
    assert float_operators(save(clean, "clean.onnx")) == []
    detour = [
        first,
        helper.make_node("DequantizeLinear", ["a", "s"], ["b"]),
        helper.make_node("Tanh", ["b"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "s", "z"], ["d"]),
        last,
    ]
    assert [name.split(":")[0] for name in float_operators(save(detour, "detour.onnx"))] == [
        "DequantizeLinear",
        "Tanh",
        "QuantizeLinear",
    ]


WEIGHT = torch.randint(-128, 128, (64, 24), dtype=torch.int8)
FUNCTIONS = {
    "product": (lambda x: op.product(x, WEIGHT), (torch.int8, 128, (3, 5, 64))),
    "products": (lambda x: op.product(x, x.transpose(-1, -2)), (torch.int8, 128, (3, 2, 5, 64))),
    "shift": (lambda x: (x * 2**30) >> torch.arange(1, 8), (torch.int64, 2**20, (3, 5, 7))),
    "clamp": (lambda x: x.clamp(min=1, max=2**24), (torch.int64, 2**30, (3, 99))),
    "comparison": (lambda x: (x >= 2**30).to(torch.int64) + (x > 5) * 2 + (x < 9) * 4, (torch.int64, 2**33, (3, 999))),
    "mask": (lambda x: op.shiftmax(300 * x, 64, mask=x != 0, reciprocal=op.WIDE), (torch.int64, 1, (99, 4))),
    "requantise": (
        lambda x: op.requantise(x, *op.dyadic(torch.arange(1, 8) * 1e-4), bits=16),
        (torch.int32, 2**27, (3, 5, 7)),
    ),
    "shiftmax": (lambda x: op.shiftmax(x, 64, reciprocal=op.WIDE), (torch.int64, 700, (3, 2, 9, 9))),
    "attention": (
        lambda x: op.product(op.shiftmax(x, 64), x.to(torch.int8).transpose(-1, -2)),
        (torch.int64, 100, (3, 2, 5, 9)),
    ),
    "gelu": (
        lambda x: op.shift_gelu(x, 1300, bits=16, reciprocal=op.WIDE, finer=6),
        (torch.int8, 128, (3, 5, 64)),
    ),
    "tanh": (lambda x: op.shift_tanh(x, 300), (torch.int64, 2048, (3, 5, 64))),
    "norm": (lambda x: op.integer_norm(x, 77), (torch.int64, 2**15, (3, 5, 1500))),
    "norm of little": (lambda x: op.integer_norm(x), (torch.int64, 2, (99, 8))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_gives_the_same_integers_in_a_file(name, tmp_path):
    run, (dtype, top, shape) = FUNCTIONS[name]
    x = torch.randint(-top, top, shape).to(dtype)
    graph = IntegerGraph()
    answer = run(graph.input("x", dtype, ("batch", *shape[1:]))).to(torch.int64)
    # As two halves of 31 bits, since an answer has 32.
    low = answer - ((answer >> 31) * 2**31)
    for half, want in ((answer >> 31, run(x).long() >> 31), (low, run(x).long() & (2**31 - 1))):
        nodes = list(graph.nodes)
        graph.save(tmp_path / "m.onnx", half, torch.tensor(1.0))
        model = onnx.load(tmp_path / "m.onnx")
        last = model.graph.node.pop()
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info(last.input[0], TensorProto.INT32, None))
        onnx.save(model, tmp_path / "m.onnx")
        graph.nodes = nodes
        got = onnx_session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})[0]
        assert torch.equal(torch.from_numpy(got).long(), want)


def test_a_division_that_could_round_the_other_way_is_not_written():
    graph = IntegerGraph()
    x = graph.input("x", torch.int64, ("batch", 4))
    with pytest.raises(ValueError, match="clamp them first"):
        x // 3
    with pytest.raises(TypeError, match="convert one"):
        x + x.to(torch.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_exporter_takes_the_models_own_writer_and_certifies_the_file(kind, trained, integers, tmp_path):
    inputs = next(trained[kind][0].batches(2))[0]
    certificate = export_onnx(integers[kind], inputs, tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.exporter == "own"
    assert certificate.max_abs == 0
    assert float_operators(tmp_path / "m.onnx") == []
