"""Files in and out: atomic writes, weights, archives from outside, ONNX."""

from .archive import safe_extract
from .files import atomic_path, atomic_write, claim, plain, read_json, write_json
from .onnx import Certificate, export_onnx, onnx_callable, onnx_session
from .quantize import quantize_onnx, sensitivity
from .weights import load_weights, read_checkpoint, save_weights

__all__ = [
    "Certificate",
    "atomic_path",
    "atomic_write",
    "claim",
    "export_onnx",
    "load_weights",
    "onnx_callable",
    "onnx_session",
    "plain",
    "quantize_onnx",
    "read_checkpoint",
    "read_json",
    "safe_extract",
    "save_weights",
    "sensitivity",
    "write_json",
]
