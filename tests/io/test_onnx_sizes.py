"""Sizes in exported files: what is the same at every batch size is not counted at every call."""

from collections import Counter

import onnx
import pytest
import torch
from torch import Tensor, nn

from gossamer.io import export_onnx, onnx_session
from gossamer.ops import grid


class Heads(nn.Module):
    """Views by sizes read at run time, as models have them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).view(x.shape[0], x.shape[1], 3, 4).transpose(1, 2)
        return y.flatten(2).reshape(x.shape[0], -1)


class Padded(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return grid.pad_to_multiple(x * 2, (self.size, self.size))


class Outer(nn.Module):
    """A shape with two entries that follow the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[:, None] - x[None]).reshape(x.shape[0], x.shape[0], -1)


def operators(path: object) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_sizes_that_no_batch_changes_are_written_into_the_file(tmp_path):
    path, model = tmp_path / "model.onnx", Heads().eval()
    certificate = export_onnx(model, torch.randn(2, 5, 12), path, dynamic="batch", exporter="fast")
    assert certificate.passed
    assert certificate.held == "batch"
    assert certificate.exporter == "fast"
    assert not set(operators(path)) & {"Shape", "Gather", "Concat", "Slice", "Unsqueeze"}
    for batch in (1, 7):
        x = torch.randn(batch, 5, 12)
        (found,) = onnx_session(path).run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("size", "pads"), [(4, 0), (3, 1)])
def test_padding_by_nothing_is_left_out_and_real_padding_stays(tmp_path, size, pads):
    path, model = tmp_path / "model.onnx", Padded(size).eval()
    assert export_onnx(model, torch.randn(1, 8, 8, 2), path, dynamic="batch", exporter="fast").passed
    assert operators(path)["Pad"] == pads
    x = torch.randn(5, 8, 8, 2)
    (found,) = onnx_session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))


def test_a_shape_with_two_open_entries_is_still_counted(tmp_path):
    path, model = tmp_path / "model.onnx", Outer().eval()
    assert export_onnx(model, torch.randn(2, 5), path, dynamic="batch", exporter="fast").passed
    assert operators(path)["Shape"]
    x = torch.randn(4, 5)
    (found,) = onnx_session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x))


def test_shifted_windows_are_exported_by_tracing(tmp_path):
    from gossamer.mixers import create_mixer

    path = tmp_path / "model.onnx"
    model = create_mixer("window", 8, heads=2, window=4, shifted=True).eval()
    certificate = export_onnx(model, torch.randn(1, 8, 8, 8), path, dynamic="batch", exporter="fast")
    assert certificate.passed
    assert certificate.exporter == "fast"
    assert certificate.held == "batch"
    x = torch.randn(3, 8, 8, 8)
    (found,) = onnx_session(path).run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=0)
