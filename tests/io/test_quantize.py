"""Tables of words in int8 files. Products and convolutions are tested with the exporter, in test_onnx.py."""

import torch
from torch import nn

from gossamer.io import export_onnx, onnx_session, quantize_onnx


def test_a_table_of_words_is_a_quarter_of_its_size_with_a_scale_for_each_row(tmp_path):
