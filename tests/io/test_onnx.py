"""ONNX: the certificate tells what the file does, and int8 is really int8."""

import json
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gossamer.io import export_onnx, onnx_callable, onnx_session, quantize_onnx, sensitivity
from gossamer.io.onnx import _rules_of_linear_time


class Window(nn.Module):
    """Shifted windows over a grid of any size that they divide, one head of masked attention in each."""

    def __init__(self, dim=8, size=4):
        super().__init__()
        self.size = size
        self.embed, self.qkv, self.head = nn.Conv2d(3, dim, 2, 2), nn.Linear(dim, 3 * dim), nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x).movedim(1, -1)
        (b, h, w, c), s = x.shape, self.size
        y = torch.roll(x, (-2, -2), (1, 2)).reshape(b, h // s, s, w // s, s, c)
        y = y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 1, s * s, c)
        mask = torch.ones(s * s, s * s, dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(*self.qkv(y).chunk(3, -1), attn_mask=mask)
        y = y.reshape(b, h // s, w // s, s, s, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.head((x + torch.roll(y, (2, 2), (1, 2))).mean((1, 2)))


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, ids):
        x, mask = self.embed(ids), ids != 0
        x = x[:, None]  # one head: the exporter wants four axes
        x = F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None, None, :])[:, 0]
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class Bound(nn.Module):
    """Its size is fixed by a table, and its batch on request."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, 4))
        self.bound = False

    def forward(self, x):
        if self.bound and len(x) != 1:
            raise ValueError("one sample at a time")
        return (x + self.table).sum((1, 2))


def ids(batch=2, length=12):
    x = torch.randint(1, 20, (batch, length))
    x[0, length // 2 :] = 0
    return x


@pytest.mark.parametrize("exporter", ["dynamo", "fast"])
@pytest.mark.parametrize(
    ("model", "inputs"), [(Window(), torch.randn(1, 3, 16, 16)), (Text(), ids())], ids=["windows", "text"]
)
def test_files_hold_at_another_batch_and_size(tmp_path, model, inputs, exporter, capfd):
    torch.manual_seed(1)
    path = tmp_path / "m.onnx"
    certificate = export_onnx(model, inputs, path, dynamic="size", exporter=exporter)
    assert certificate.passed
    assert certificate.exporter == exporter
    assert certificate.requested == certificate.held == "size"
    assert certificate.shapes[0] != certificate.shapes[1]
    assert 0 < certificate.max_abs < 1e-4
    assert json.loads(json.dumps(certificate.to_dict()))["opset"] == certificate.opset >= 18
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert certificate.size_mb == pytest.approx(path.stat().st_size / 1e6)
    # And at a third shape that the certificate has not seen.
    other = torch.randn(3, 3, 24, 8) if inputs.ndim == 4 else ids(5, 7)
    with torch.no_grad():
        (found,) = onnx_callable(onnx_session(path, threads=1), other)()
        np.testing.assert_allclose(found, model(other).numpy(), atol=1e-5)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_size_that_the_module_refuses_falls_back_to_the_batch_and_says_why(tmp_path):
    certificate = export_onnx(Bound(), torch.randn(2, 16, 4), tmp_path / "m.onnx", dynamic="size", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"
    assert "the module itself refuses it" in certificate.reason


def test_a_batch_that_the_module_refuses_falls_back_to_fixed_shapes(tmp_path):
    model = Bound()
    model.bound = True
    certificate = export_onnx(model, torch.randn(1, 16, 4), tmp_path / "m.onnx", exporter="fast")
    assert certificate.held is None
    assert certificate.reason
    assert certificate.shapes[0] == certificate.shapes[1] == [[1, 16, 4]]


def test_tracing_moves_axes_counted_from_the_end(tmp_path):
    class Moves(nn.Module):
        def forward(self, x):
            return x.movedim(-1, 1), x.movedim((1, -1), (-2, 0)), torch.movedim(x, 0, -1)

    certificate = export_onnx(Moves(), torch.randn(2, 3, 4, 5), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.exporter == "fast"
    assert certificate.held == "batch"


def test_what_cannot_be_traced_goes_through_the_other_exporter_in_silence(tmp_path, capfd):
    class Spectral(nn.Module):
        def forward(self, x):
            return torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1, n=8) + x

    certificate = export_onnx(Spectral(), torch.randn(2, 8, 3), tmp_path / "m.onnx", exporter="fast")
    assert certificate.passed
    assert certificate.exporter == "dynamo"
    assert "fft" in certificate.reason
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_the_clean_up_after_an_export_leaves_out_the_rule_that_takes_square_time_and_no_other():
    from onnxscript import rewriter

    rules = rewriter._DEFAULT_REWRITE_RULES
    with _rules_of_linear_time():
        assert [rule.name for rule in rules if rule not in rewriter._DEFAULT_REWRITE_RULES] == ["SlicesSplit"]
        assert len(rewriter._DEFAULT_REWRITE_RULES) == len(rules) - 1
    assert rewriter._DEFAULT_REWRITE_RULES is rules


def test_a_trace_that_took_a_value_for_a_constant_does_not_pass(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x * 2 if float(x[0, 0]) > 0 else x * 3

    x = torch.tensor([[1.0, 2.0, -3.0]])  # its mirror image takes the other branch
    certificate = export_onnx(Branch(), x, tmp_path / "m.onnx", exporter="fast")
    assert not certificate.passed
    assert certificate.max_abs > 1
    assert "differs" in certificate.reason


def test_several_inputs_and_outputs_keep_their_names_and_flags_are_restored(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x, marks):
            return {"a": self.drop(x) + marks.mean(-1, keepdim=True), "b": x * 2}

    model = Two().train()
    certificate = export_onnx(
        model,
        (torch.randn(2, 5, 3), torch.randn(2, 5, 4)),
        tmp_path / "m.onnx",
        input_names=["x", "marks"],
        output_names=["a", "b"],
        real_inputs=(torch.randn(4, 5, 3) * 100, torch.randn(4, 5, 4)),
        exporter="fast",
    )
    assert certificate.passed
    assert certificate.shapes[0] == [[4, 5, 3], [4, 5, 4]]
    session = onnx_session(tmp_path / "m.onnx")
    assert [node.name for node in session.get_inputs()] == ["x", "marks"]
    assert [node.name for node in session.get_outputs()] == ["a", "b"]
    assert model.training
    assert model.drop.training


def test_senseless_arguments_and_hopeless_models_are_refused(tmp_path):
    class Hopeless(nn.Module):
        def forward(self, x):
            return torch.from_numpy(np.linalg.svd(x.numpy())[1])

    x = torch.randn(2, 3, 3)
    with pytest.raises(ValueError, match="input_names"):
        export_onnx(Text(), ids(), tmp_path / "m.onnx", input_names=["a", "b"])
    with pytest.raises(ValueError, match="2 GB"):
        export_onnx(nn.Linear(2**15, 2**15, device="meta"), x, tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="Hopeless could not be exported"):
        export_onnx(Hopeless(), x, tmp_path / "m.onnx", dynamic=None)
    with pytest.raises(ValueError, match="no such file"):
        onnx_session(tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


# --- int8 -----------------------------------------------------------------------------------------------------


class Hybrid(nn.Module):
    """Convolutions with a residual, then attention and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16), nn.ReLU())
        self.conv = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.conv(x)).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))
        return self.head(x.mean(1))


def operations(path, tmp_path):
    """What ONNX Runtime runs after its own optimisation."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


@pytest.fixture(params=["batch", None], ids=["dynamic", "fixed"])
def hybrid(tmp_path, request):
    path = tmp_path / "m.onnx"
    assert export_onnx(Hybrid(), torch.randn(2, 3, 16, 16), path, dynamic=request.param, exporter="fast").passed
    return path, [{"input": torch.randn(5, 3, 16, 16).numpy()} for _ in range(2)]


@pytest.mark.parametrize(
    ("mode", "layers", "expected"),
    [
        ("static", 4, {"QLinearConv": 2, "QLinearAdd": 1, "DynamicQuantizeMatMul": 0}),
        ("dynamic", 2, {"QLinearConv": 0, "QLinearAdd": 0, "DynamicQuantizeMatMul": 2}),
        ("mixed", 4, {"QLinearConv": 2, "QLinearAdd": 1, "DynamicQuantizeMatMul": 2}),
    ],
)
def test_integer_kernels_run_where_they_were_asked_for(tmp_path, hybrid, mode, layers, expected):
    path, data = hybrid
    handlers = list(logging.getLogger().handlers)
    out = tmp_path / "int8.onnx"
    assert len(quantize_onnx(path, out, data, mode=mode)) == layers
    found = operations(out, tmp_path)
    assert {name: found.count(name) for name in expected} == expected
    if mode == "static":
        assert found.count("MatMulIntegerToFloat") + found.count("QGemm") == 2
    assert found.count("MatMul") + found.count("FusedMatMul") == 2  # attention's own two products
    batch = {"input": data[0]["input"][:2]}
    before = onnx_session(path).run(None, batch)[0]
    after = onnx_session(out).run(None, batch)[0]
    assert 0 < np.abs(after - before).max() < 0.1 * np.abs(before).max()
    assert logging.getLogger().handlers == handlers


def test_layers_can_be_left_out_and_unknown_ones_are_told(tmp_path, hybrid):
    path, data = hybrid
    every = quantize_onnx(path, tmp_path / "a.onnx", data)
    rest = quantize_onnx(path, tmp_path / "b.onnx", data, exclude=every[:1])
    assert rest == every[1:]
    assert operations(tmp_path / "b.onnx", tmp_path).count("QLinearConv") == 1
    with pytest.raises(ValueError, match=r"not there.*nonsense"):
        quantize_onnx(path, tmp_path / "c.onnx", data, exclude=["nonsense"])
    with pytest.raises(ValueError, match="no layer"):
        quantize_onnx(path, tmp_path / "c.onnx", data, exclude=every)
    with pytest.raises(ValueError, match="calibration_batches"):
        quantize_onnx(path, tmp_path / "c.onnx")
    with pytest.raises(ValueError, match="mode"):
        quantize_onnx(path, tmp_path / "c.onnx", data, mode="int4")  # type: ignore[arg-type]


def test_the_layer_that_int8_breaks_is_named_first(tmp_path):
    class Broken(nn.Module):
        """One huge channel of the middle layer's input leaves a single level for all the others."""

        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            with torch.no_grad():
                self.first.bias[0] = 1e4
                self.middle.weight[:, 0] = 0

        def forward(self, x):
            return self.last(self.middle(self.first(x)))

    path = tmp_path / "m.onnx"
    x = torch.randn(32, 8)
    export_onnx(Broken(), x, path, exporter="fast")
    costs = sensitivity(path, [{"input": x.numpy()}])
    assert len(costs) == 3
    (worst, most), *others = costs.items()
    assert "middle" in worst
    assert most > 10 * others[0][1]
    by_score = sensitivity(path, [{"input": x.numpy()}], lambda session: 1.0, mode="dynamic")
    assert set(by_score.values()) == {0.0}
