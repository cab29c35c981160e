"""Tables of words in int8 files. Products and convolutions are tested with the exporter, in test_onnx.py."""

import torch
from torch import nn

from gossamer.io import export_onnx, onnx_session, quantize_onnx


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
