"""What is saved is what is loaded: in this process and in a fresh one that cannot unpickle."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import gossamer

_CODE = """
import sys, torch
io = torch.load(sys.argv[1] + "/io.pt", weights_only=True)
import pickle
def refuse(*a, **k): raise RuntimeError("pickle")
pickle.load = pickle.loads = pickle.Unpickler = refuse
import gossamer
with torch.no_grad():
    y = gossamer.load(sys.argv[1] + "/m")(*io["x"])
assert torch.equal(y, io["y"]), (y - io["y"]).abs().max()
"""


def same_after_loading(model: nn.Module, inputs: tuple[Tensor, ...] | Tensor, tmp_path: Path) -> None:
    """Saves `model`, loads it here and in a fresh process without pickle, and holds all answers equal to the bit."""
    x = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    gossamer.save(model, tmp_path / "m")
    with torch.no_grad():
        y = model.eval()(*x)
        assert torch.equal(gossamer.load(tmp_path / "m")(*x), y)
    torch.save({"x": x, "y": y}, tmp_path / "io.pt")
    # Sums are taken in another order by another number of threads.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-c", _CODE, str(tmp_path)], check=True, env=env)
