"""Tables of words in int8 files. Products and convolutions are tested with the exporter, in test_onnx.py."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from gossamer.io import export_onnx, onnx_session, quantize_onnx
from gossamer.models import create_model


def test_a_table_of_words_is_a_quarter_of_its_size_with_a_scale_for_each_row(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(2000, 16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        net[0].weight[7] *= 1000  # one loud word must not drown the others
    ids = torch.randint(0, 2000, (4, 9))
    ids[0, 0] = 7
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    export_onnx(net, ids, whole, input_names=["ids"])
    quantize_onnx(whole, small, mode="dynamic")
    assert small.stat().st_size < 0.45 * whole.stat().st_size
    answer = onnx_session(small).run(None, {"ids": ids[1:].numpy()})[0]
    want = net(ids[1:]).detach().numpy()
    assert abs(answer - want).max() < 0.05 * abs(want).max()


@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_int8_with_a_scale_for_each_channel_errs_by_less_than_a_hundredth(spread, tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(512, 512).eval()
    with torch.no_grad():
        # Channels of very different size: a scale for the whole weight would drown the small ones.
        layer.weight.copy_(torch.randn(512, 512) * torch.logspace(0, -1, 512).pow(spread / 50)[:, None])
        layer.bias.zero_()
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    export_onnx(layer, torch.randn(2, 512), whole, input_names=["x"])
    quantize_onnx(whole, small, mode="dynamic")
    initial = {t.name: numpy_helper.to_array(t) for t in onnx.load(small).graph.initializer}
    (codes,) = (a for a in initial.values() if a.dtype == np.int8 and a.shape == (512, 512))
    (scale,) = (a for name, a in initial.items() if a.dtype == np.float32 and a.shape == (512,) and "scale" in name)
    weight = torch.from_numpy(codes.astype(np.float32) * scale)  # (in, out)
    want = layer.weight.detach().T
    error = (weight - want).norm(dim=0) / want.norm(dim=0)
    assert 1e-4 < float(error.max()) < 0.012
    assert float(error.square().mean().sqrt()) < 0.01


def test_a_dynamic_int8_file_is_at_least_three_and_a_half_times_smaller(tmp_path):
    torch.manual_seed(0)
    net = create_model("bert_base", dim=256, depth=2, heads=4, hidden=1024, vocab_size=2000, max_len=16, num_classes=2)
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    export_onnx(net.eval(), torch.randint(1, 2000, (2, 16)), whole, input_names=["ids"])
    quantize_onnx(whole, small, mode="dynamic")
    assert whole.stat().st_size > 3.5 * small.stat().st_size


@pytest.mark.parametrize("mode", ["dynamic", "static", "mixed"])
def test_a_product_with_a_vector_stays_in_floats(mode, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 8)
            self.vector = nn.Parameter(torch.randn(32))

        def forward(self, x):
            return self.fc(x) + (x @ self.vector)[..., None]

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(4, 5, 32)
    whole, small = tmp_path / "whole.onnx", tmp_path / "small.onnx"
    export_onnx(net, x, whole, input_names=["x"])
    quantize_onnx(whole, small, [{"x": x.numpy()}], mode=mode)
    answer = onnx_session(small).run(None, {"x": x.numpy()})[0]
    want = net(x).detach().numpy()
    assert abs(answer - want).max() < 0.03 * abs(want).max()
