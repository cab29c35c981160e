"""Weights in and out: safetensors of our own, and checkpoints of others read without running their code.

- a tied tensor (one storage under several names) is stored once; the other names are in the file's metadata
  under "shared", and come back tied
- a checkpoint is unpickled by PyTorch's restricted reader: tensors and plain values, nothing that can run
"""

from __future__ import annotations

import argparse
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .files import atomic_path

GIB = 2**30

# Where training scripts put the weights, outermost first; the raw ones are preferred to a moving average. Of a
# self-supervised run, which keeps student and teacher, the teacher is taken: it is the steadier one.
_WRAPPERS = ("model", "model_state", "model_state_dict", "state_dict", "model_ema", "teacher", "student")

# NumPy's maker of scalars, which moved between versions of NumPy and is a private name in both.
_SCALAR = np.float64(0).__reduce__()[0]

# Plain data that training scripts store beside the weights: argument lists and NumPy numbers.
_PLAIN: list[Any] = [
    argparse.Namespace,
    np.dtype,
    _SCALAR,
    (_SCALAR, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")),
]


def read_checkpoint(path: str | Path, *, max_bytes: int = 16 * GIB) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU.

    Nested `model`, `model_state`, `model_state_dict`, `state_dict`, `model_ema`, `teacher` and `student` are unwrapped,
    and `module.` is taken off where every key has it.

    Args:
        path: a safetensors file, or one that `torch.save` wrote.
        max_bytes: largest file (unpacked) that is read.

    Raises:
        ValueError: the file is missing, too large, damaged, holds pickled code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    size = _unpacked_size(path)
    if size > max_bytes:
        raise ValueError(f"{path} holds {size:,} bytes, more than max_bytes={max_bytes:,}")
    content = load_weights(path) if _is_safetensors(path) else _unpickle(path)
    state = _unwrap(content)
    tensors = {str(key): value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{path} holds no tensors; its keys are {sorted(map(str, state))[:8]}")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def save_weights(state: Mapping[str, Any], path: str | Path) -> None:
    """Write tensors as safetensors, atomically; tied ones once.

    Raises:
        ValueError: a value is not a tensor, or is on the meta device and has no numbers.
    """
    from safetensors.torch import save_file

    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: dict[int, int] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"state must hold tensors, got {type(tensor).__name__} at {name!r}")
        if tensor.is_meta:
            raise ValueError(f"state must hold numbers, but {name!r} is on the meta device")
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        key = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        kept[name] = tensor
        storages[storage] = storages.get(storage, 0) + 1
    # Different views of one storage are not the same tensor: each is copied out of it.
    kept = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        if storages[tensor.untyped_storage().data_ptr()] > 1
        else tensor.contiguous()
        for name, tensor in kept.items()
    }
    metadata = {"format": "pt"} | ({"shared": json.dumps(shared)} if shared else {})
    with atomic_path(path) as temporary:
        save_file(kept, temporary, metadata)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, on the CPU; tied names hold the same tensor.

    Raises:
        ValueError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata() or {}
        shared = json.loads(metadata.get("shared", "{}"))
        return state | {name: state[source] for name, source in shared.items()}
    except (SafetensorError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a sound safetensors file: {error}") from None


def _is_safetensors(path: Path) -> bool:
    """By content: eight bytes of header length, then the header's opening brace."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _unpacked_size(path: Path) -> int:
    """Bytes of the file, or of its members where it is a zip that could be packed tighter than it reads."""
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = max(size, sum(member.file_size for member in archive.infolist()))
    return size


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).replace("\n", " ")
        # The reader names what it was asked to import or build; else it met bytes that are no pickle.
        start = max(reason.find(sign) for sign in ("Unsupported global", "Unsupported class", "Trying to"))
        if start >= 0:
            raise ValueError(f"{path} holds pickled code, which is not run: {reason[start : start + 160]}") from None
        raise ValueError(f"{path} is not a checkpoint: {reason[:160]}") from None
    except (RuntimeError, EOFError, ValueError, OSError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a checkpoint: {str(error).splitlines()[0][:160]}") from None


def _unwrap(content: Any) -> Mapping[Any, Any]:
    while isinstance(content, Mapping):
        inner = next((content[name] for name in _WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            return content
        content = inner
    if isinstance(content, Tensor):
        raise ValueError("the checkpoint is a single tensor, not a dictionary of them")
    raise ValueError(f"the checkpoint must be a dictionary of tensors, got {type(content).__name__}")
