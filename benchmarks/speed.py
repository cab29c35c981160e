"""Side by side with timm or the authors' code: time and peak memory of a forward pass and of a training step, fp32.

Run from the repository root: `python benchmarks/speed.py [NAME …]`. It needs the `bench` extra (timm); systems that
only exist as the authors' repository are measured where `--official DIR` says they are checked out (one folder a
repository, `OWNER+NAME`). Writes `benchmarks/results/speed.json`: for each model, batch, kind and mode of run, the
medians with the CPU they were taken on, the peaks and the ratios ours / theirs, and the geometric means by mode, with
device, threads and versions of the last run. What was measured before stays in the file until it is measured again.

- `--mode compiled` hands both to `torch.compile`, each shape for itself; compiling is not timed
- peak memory is what a call holds above the level before it, in a process that maps every tensor by itself: an
  allocator that keeps what was freed shows up to twice of what is held. Other work on the machine does not change it
  (`--figure memory`), unlike times
- both run in one process on the same input, in turn, in an order drawn anew for each round
- a training step is forward, loss, backward and one step of plain SGD
- the same architecture on both sides: parameter counts must be equal, or the model is refused
"""

import argparse
import contextlib
import ctypes
import gc
import importlib
import itertools
import json
import math
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.io.files import read_json, write_json
from gossamer.measure import device_info, latency, peak_memory
from gossamer.models import create_model

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from stand_in import timm

Inputs = Callable[[int], tuple[Tensor, ...]]
Case = tuple[str, str, int]  # mode, kind and batch
Row = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """One comparison.

    Args:
        ours: builds our model.
        theirs: builds the reference from the folder of official repositories (None where not given).
        inputs: batch size to the inputs of both.
        official: the repository that `theirs` needs, None where timm has it.
        theirs_inputs: inputs of the reference where they differ from ours.
    """

    ours: Callable[[], nn.Module]
    theirs: Callable[[Path | None], nn.Module]
    inputs: Inputs
    official: str | None = None
    theirs_inputs: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None


def images(side: int = 224) -> Inputs:
    return lambda batch: (torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0)),)


def with_timm(ours: str, name: str, side: int = 224, **settings: Any) -> Pair:
    return Pair(partial(create_model, ours), lambda _: timm().create_model(name, **settings), images(side))


def with_authors(ours: str, repository: str, module: str, build: str, **settings: Any) -> Pair:
    """A pair with the authors' own code."""

    def theirs(official: Path | None) -> nn.Module:
        return getattr(_module(official, repository, module), build)(**settings)

    return Pair(partial(create_model, ours), theirs, images(), official=repository)


PAIRS: dict[str, Pair] = {
    "deit_tiny_patch16_224": with_timm("deit_tiny_patch16_224", "deit_tiny_patch16_224"),
    "deit_small_patch16_224": with_timm("deit_small_patch16_224", "deit_small_patch16_224"),
    "swin_t": with_timm("swin_t", "swin_tiny_patch4_window7_224"),
    "convnext_t": with_timm("convnext_t", "convnext_tiny"),
    "convnext_iso_s": with_authors(
        "convnext_iso_s", "facebookresearch+ConvNeXt", "models.convnext_isotropic", "convnext_isotropic_small"
    ),
    "poolformer_s12": with_timm("poolformer_s12", "poolformer_s12"),
    "metaformer_ppaa_s12": with_authors(
        "metaformer_ppaa_s12", "sail-sg+poolformer", "models.metaformer", "metaformer_ppaa_s12_224"
    ),
    "efficientformer_l1": with_timm("efficientformer_l1", "efficientformer_l1"),
    "cct_14_7x2_224": with_authors(
        "cct_14_7x2_224", "SHI-Labs+Compact-Transformers", "src.cct", "cct_14_7x2_224", pretrained=False, progress=False
    ),
    "cswin_t": with_authors("cswin_t", "microsoft+CSWin-Transformer", "models.cswin", "CSWin_64_12211_tiny_224"),
    "maxvit_t": with_timm("maxvit_t", "maxvit_tiny_tf_224"),
    "pvt_small": with_authors("pvt_small", "whai362+PVT/classification", "pvt", "pvt_small"),
    "pvt_v2_b1": with_timm("pvt_v2_b1", "pvt_v2_b1"),
    "t2t_vit_14": with_authors("t2t_vit_14", "yitu-opensource+T2T-ViT", "models.t2t_vit", "t2t_vit_14"),
    "tnt_s": with_timm("tnt_s", "tnt_s_patch16_224"),
    "crossvit_9": with_timm("crossvit_9", "crossvit_9_240", 240),
    "nest_t_224": with_timm("nest_t_224", "nest_tiny_jx"),
    "uniformer_s_image": with_authors(
        "uniformer_s_image",
        "Sense-X+UniFormer/image_classification",
        "models.uniformer",
        "uniformer_small",
    ),
    "sret_t": with_authors("sret_t", "szq0214+SReT", "SReT", "SReT_T"),
    "ppma_t": with_authors("ppma_t", "zhongchenzhao+PPMA/classification", "models.PPMA", "PPMAViT_T", args=None),
}


def _module(official: Path | None, repository: str, name: str) -> Any:
    """A module of a checked-out repository; repositories share package names, so each is imported afresh."""
    assert official is not None
    # Repositories of 2021 import timm's layers from where they were then.
    now = timm()
    moved = {"layers": now.layers, "layers.helpers": now.layers.helpers, "registry": now.models}
    for old, new in moved.items():
        sys.modules[f"timm.models.{old}"] = new
    top = name.partition(".")[0]
    for loaded in list(sys.modules):
        if loaded == top or loaded.startswith(f"{top}."):
            del sys.modules[loaded]
    if (official / repository / top).is_dir():
        # The package's own __init__ may import what is not there.
        package = types.ModuleType(top)
        package.__path__ = [str(official / repository / top)]
        sys.modules[top] = package
    sys.path.insert(0, str(official / repository))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def forms(model: nn.Module, inputs: tuple[Tensor, ...], kind: str, mode: str) -> Callable[[], object]:
    """One forward pass in eval mode, or one training step."""
    run = torch.compile(model, dynamic=False) if mode == "compiled" else model
    if kind == "forward":
        model.eval()

        def forward() -> object:
            with torch.no_grad():
                return run(*inputs)

        return forward
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), 1e-6)

    def step() -> object:
        output = run(*inputs)
        outputs = output if isinstance(output, tuple | list) else [output]
        loss = sum(y.float().logsumexp(-1).mean() for y in outputs)
        loss.backward()
        optimiser.step()
        # At the end: the peak above the level before a step is to hold the gradients too.
        optimiser.zero_grad(set_to_none=True)
        return loss

    return step


def times(name: str, official: Path | None, cases: list[Case], budget: float, threads: int | None) -> list[Row]:
    rows: list[Row] = []
    for case, both in calls(name, official, cases, threads):
        found = latency(both, budget_s=budget, min_runs=7)
        mine, yours = found["ours"], found["theirs"]
        rows.append({"ours": mine.to_dict(), "theirs": yours.to_dict(), "ratio": mine.median_ms / yours.median_ms})
        rows[-1]["cpu"] = device_info()["cpu"]
        report(name, case, f"ours {mine.median_ms:9.2f} ms  theirs {yours.median_ms:9.2f} ms", rows[-1]["ratio"])
    return rows


def peaks(name: str, official: Path | None, cases: list[Case], threads: int | None) -> list[Row]:
    rows = []
    for case, both in calls(name, official, cases, threads):
        found = {who: peak_memory(call).mib for who, call in both.items()}
        rows.append({"peak_mib": found, "peak_ratio": found["ours"] / max(found["theirs"], 1e-9)})
        report(name, case, f"ours {found['ours']:9.1f} MiB theirs {found['theirs']:9.1f} MiB", rows[-1]["peak_ratio"])
    return rows


def report(name: str, case: Case, figures: str, ratio: float) -> None:
    mode, kind, batch = case
    print(f"{name:24} {mode:8} {kind:8} batch {batch:3}  {figures}  ratio {ratio:.3f}", flush=True)


def calls(
    name: str, official: Path | None, cases: list[Case], threads: int | None
) -> Iterator[tuple[Case, dict[str, Callable[[], object]]]]:
    """Each case with the call of ours and of theirs, both called once before."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    pair = PAIRS[name]
    ours, theirs = pair.ours(), pair.theirs(official)
    counts = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
    if counts[0] != counts[1]:
        raise SystemExit(f"{name}: ours has {counts[0]} parameters, the reference {counts[1]}; not the same model")
    for mode, kind, batch in cases:
        x = pair.inputs(batch)
        other = pair.theirs_inputs(x) if pair.theirs_inputs else x
        both = {"ours": forms(ours, x, kind, mode), "theirs": forms(theirs, other, kind, mode)}
        for call in both.values():
            call()
        yield (mode, kind, batch), both
        torch.compiler.reset()
        gc.collect()


def map_every_tensor() -> None:
    """glibc: what is freed is gone from the resident size at once. It must be said before anything large is held."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD


def geometric_mean(ratios: list[float]) -> float:
    return math.exp(sum(math.log(r) for r in ratios) / len(ratios))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(PAIRS)}; all by default")
    parser.add_argument("--official", type=Path, help="folder with the authors' repositories, OWNER+NAME each")
    parser.add_argument("--threads", type=int, help="PyTorch threads; all cores by default")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each comparison")
    parser.add_argument("--batch", type=int, action="append", help="batch sizes, 1 and 16 by default")
    parser.add_argument("--kind", choices=("forward", "training"), action="append", help="both by default")
    parser.add_argument("--figure", choices=("memory", "time"), action="append", help="both by default")
    parser.add_argument("--mode", choices=("eager", "compiled"), action="append", help="eager by default")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speed.json"))
    given = parser.parse_args()
    unknown = sorted(set(given.names) - set(PAIRS))
    if unknown:
        parser.error(f"no comparison is called {', '.join(unknown)}; there are {', '.join(PAIRS)}")
    if given.threads:
        torch.set_num_threads(given.threads)
    kept = read_json(given.out)["rows"] if given.out.exists() else []
    cases: list[Case] = list(
        itertools.product(given.mode or ["eager"], given.kind or ["forward", "training"], given.batch or [1, 16])
    )
    figures = given.figure or ["memory", "time"]
    left_out = {}
    for name in given.names or PAIRS:
        needed = PAIRS[name].official
        if needed and not (given.official and (given.official / needed).is_dir()):
            left_out[name] = f"{needed} is not under --official"
            continue
        keys = [
            {"model": name, "reference": needed or "timm", "mode": mode, "kind": kind, "batch": batch}
            for mode, kind, batch in cases
        ]
        rows = [next((row for row in kept if key.items() <= row.items()), key) for key in keys]
        if "memory" in figures:
            with ProcessPoolExecutor(1, get_context("spawn"), map_every_tensor) as alone:
                found = alone.submit(peaks, name, given.official, cases, given.threads).result()
            rows = [row | new for row, new in zip(rows, found, strict=True)]
        if "time" in figures:
            with ProcessPoolExecutor(1, get_context("spawn")) as alone:
                found = alone.submit(times, name, given.official, cases, given.budget, given.threads).result()
            rows = [row | new for row, new in zip(rows, found, strict=True)]
        kept = [row for row in kept if not any(key.items() <= row.items() for key in keys)] + rows
        write_json(given.out, {**summary(kept), "left_out": left_out, "rows": kept})
    if len(left_out) == len(given.names or PAIRS):
        raise SystemExit("nothing was measured: " + json.dumps(left_out))
    for mode, mean in summary(kept)["geometric_mean"].items():
        print(f"{mode}: geometric means of ours / theirs " + ", ".join(f"{k} {v['all']:.3f}" for k, v in mean.items()))


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The device and the geometric means of the ratios, by mode."""
    means: dict[str, Any] = {}
    for mode in dict.fromkeys(row["mode"] for row in rows):
        means[mode] = {}
        for figure, key in (("time", "ratio"), ("memory", "peak_ratio")):
            these = [row for row in rows if row["mode"] == mode and key in row]
            by_model = {
                name: geometric_mean([row[key] for row in these if row["model"] == name])
                for name in dict.fromkeys(row["model"] for row in these)
            }
            if these:
                means[mode][figure] = {"all": geometric_mean([row[key] for row in these]), "by_model": by_model}
    try:
        reference = version("timm")
    except PackageNotFoundError:
        reference = None
    return {"device": {**device_info(), "timm": reference}, "geometric_mean": means}


if __name__ == "__main__":
    main()
