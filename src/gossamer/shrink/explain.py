"""`gossamer shrink --explain`: which techniques suit this model, device and budget, and what each would bring.

- what can be measured in seconds is measured: int8, sliced widths, merged tokens and low-rank products as exported
  files on this device; costs only, accuracy needs the search
- what needs longer is judged by the rules of the surveys in the catalogue (`gossamer.catalogue.techniques`)
- a roofline of the device says whether the model waits for its products or for its memory:
  `time >= max(MACs / peak, bytes / bandwidth)` (Williams et al. 2009)
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.catalogue.techniques import Technique, counts, few_tokens, objection, techniques
from gossamer.io import quantize_onnx
from gossamer.measure import device_info, macs, parameters
from gossamer.measure.parameters import weight_bytes
from gossamer.measure.roofline import Roofline, Work
from gossamer.shrink.artefacts import calibration_feeds, export_quickly, file_cost
from gossamer.shrink.base import Calibration, passes, run_pass
from gossamer.shrink.options import ShrinkOptions
from gossamer.shrink.subject import Subject, check_answers, open_subject, read_for
from gossamer.tasks import create_task

KEEP = 0.6  # strength of a probe where the budget names none
# Passes whose costs a cheaper pass shows: the widths they leave are the same, only which members they choose differs.
LIKE = {"optin": "magnitude", "latency_widths": "magnitude", "axformer": "magnitude", "pyra": "merging"}
PROBES = ("magnitude", "depth", "merging", "greenformers", "word_tables", "pre_rmsnorm", "dependency")
VERDICTS = ("suits", "for a recipe", "does not suit", "not built")


@dataclass(frozen=True)
class Advised:
    """One technique: what is to be expected of it here.

    Args:
        verdict: one of `VERDICTS`.
        expected: cost after / cost before, of the exported file on this device; empty where nothing was measured.
        enough: whether it meets the budget by itself.
    """

    technique: str
    family: str
    verdict: str
    reason: str
    by: tuple[str, ...] = ()
    expected: dict[str, float] = field(default_factory=dict)
    enough: bool = False


@dataclass(frozen=True)
class Advice:
    """What `explain` found out: facts of model and device, and the techniques, best first."""

    facts: dict[str, Any]
    rows: list[Advised]

    def to_dict(self) -> dict[str, Any]:
        return {"facts": self.facts, "techniques": [asdict(row) for row in self.rows]}

    def text(self) -> str:
        """Lines for a terminal."""
        f = self.facts
        tokens = f"{f['tokens'] or 'no'} tokens, {f['attention_share']:.0%} of the work between them"
        lines = [
            f"{f['model']}: {f['latency_ms']:.3f} ms, {f['macs'] / 1e6:.1f} MMACs, {f['params']:,.0f} parameters, "
            f"{f['size_mb']:.1f} MB; {tokens}",
            f"this device: {f['peak_gmacs']:.0f} GMACs/s in large products, {f['bandwidth_gbs']:.0f} GB/s; the model "
            f"is bound by its {f['bound']}, and takes {f['over_roof']:.1f} times what either allows",
            "",
        ]
        for verdict in VERDICTS:
            rows = [row for row in self.rows if row.verdict == verdict]
            if rows:
                lines.append(f"{verdict}:")
            for row in rows:
                costs = ", ".join(f"{k} {v:.0%}" for k, v in row.expected.items())
                by = f" [{', '.join(row.by)}]" if row.by else ""
                mark = "* " if row.enough else "  "
                lines.append(f"{mark}{row.technique}{by}: {costs + '; ' if costs else ''}{row.reason}")
            if rows:
                lines.append("")
        c = counts()
        lines.append(
            f"{c['techniques_built']} of the {c['techniques']} techniques of the surveys are built here, "
            f"{c['methods_built']} of the {c['methods']} methods named under them"
        )
        lines.append("* meets the budget by itself; percentages are of the exported file now, measured on this device")
        return "\n".join(lines)


def explain(options: ShrinkOptions) -> Advice:
    """Judges every technique of the catalogue for the model, data, device and budget of `options`.

    Raises:
        ValueError: model or data cannot be used or do not fit each other.
    """
    subject = open_subject(options.model, options.weights)
    data = read_for(subject, str(options.data), task=options.task, seed=options.seed, options=options.options)
    task = create_task(data.task, data.spec, data.meta)
    check_answers(subject, task, data)
    calibration = Calibration(task, data, seconds=60, seed=options.seed)
    one = calibration.example()
    with tempfile.TemporaryDirectory() as folder:
        before = _Costs(Path(folder), one)
        base = before.of(subject.model)
        facts = _facts(subject, one, base)
        shares = options.shares | {k: limit / base[k] for k, limit in options.budget.items() if base.get(k)}
        keep = min([*shares.values(), 1.0]) if shares else KEEP
        keep = keep if keep < 1 else KEEP
        measured: dict[str, dict[str, float] | str] = {"int8": before.int8(calibration, base)}
        for name in PROBES:
            settings = {"keep": keep} if "keep" in passes()[name].settings else {}
            try:
                model, steps = run_pass(name, subject.model, calibration, **settings)
                after = before.of(model)
                measured[name] = {k: after[k] / base[k] for k in base} if steps else "it finds nothing to change"
            except Exception as error:  # the module may be anybody's, and break in any way
                measured[name] = next(iter(str(error).splitlines()), type(error).__name__)
    rows = [_judge(t, measured, facts, shares) for t in techniques()]
    order = {verdict: i for i, verdict in enumerate(VERDICTS)}
    rows.sort(key=lambda r: (order[r.verdict], not r.enough, r.expected.get("latency", 9.0), r.family))
    return Advice(facts, rows)


class _Costs:
    """Costs of exported files, in one folder."""

    def __init__(self, folder: Path, one: tuple[Tensor, ...]) -> None:
        self.path = folder / "model.onnx"
        self.small = folder / "int8.onnx"
        self.one = one

    def of(self, model: nn.Module) -> dict[str, float]:
        export_quickly(model, self.one, self.path)
        return {
            "latency": file_cost(self.path, self.one)[0],
            "macs": float(macs(model, self.one).total),
            "params": float(parameters(model)),
            "size": self.path.stat().st_size / 1e6,
        }

    def int8(self, calibration: Calibration, base: dict[str, float]) -> dict[str, float] | str:
        try:
            inputs = [batch for batch, _ in calibration.batches(32, batch_size=1)]
            quantize_onnx(self.path, self.small, calibration_feeds(self.path, inputs), mode="dynamic")
        except Exception as error:  # the library raises what it likes
            return f"the file cannot be quantised: {str(error).splitlines()[0]}"
        latency = file_cost(self.small, self.one)[0]
        return {"latency": latency / base["latency"], "size": self.small.stat().st_size / 1e6 / base["size"]}


def _facts(subject: Subject, one: tuple[Tensor, ...], base: dict[str, float]) -> dict[str, Any]:
    model = subject.model
    count = macs(model, one)
    between = sum(v for k, v in count.by_op.items() if "attention" in k or "bmm" in k)
    causal = any(getattr(part, "causal", False) for part in model.modules())
    roof, work = Roofline(_peak(), _bandwidth()), Work(count.total, weight_bytes(model))
    return {
        "model": subject.name,
        "origin": subject.origin,
        "decoder": causal,
        "tokens": _tokens(model, one),
        "attention_share": between / max(count.total, 1),
        "latency_ms": base["latency"],
        "macs": base["macs"],
        "params": base["params"],
        "size_mb": base["size"],
        "embedding_share": sum(
            p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
        )
        / max(base["params"], 1),
        "peak_gmacs": roof.peak / 1e9,
        "bandwidth_gbs": roof.bandwidth / 1e9,
        "bound": roof.bound(work),
        "over_roof": base["latency"] / 1e3 / max(roof.seconds(work), 1e-9),
        "device": device_info(),
    }


def _tokens(model: nn.Module, one: tuple[Tensor, ...]) -> int:
    """Tokens the first mixer sees, 0 where there is none of ours."""
    from gossamer.mixers.base import Mixer

    seen: list[int] = []
    mixer = next((m for m in model.modules() if isinstance(m, Mixer)), None)
    if mixer is None:
        return 0
    hook = mixer.register_forward_hook(lambda _, args, __: seen.append(args[0][0, ..., 0].numel()))
    try:
        with torch.no_grad():
            model(*one)
    finally:
        hook.remove()
    return seen[0] if seen else 0


def _judge(
    t: Technique, measured: dict[str, dict[str, float] | str], facts: dict[str, Any], shares: dict[str, float]
) -> Advised:
    def row(verdict: str, reason: str, expected: dict[str, float] | None = None) -> Advised:
        found = expected or {}
        enough = bool(shares and found) and all(found.get(k, 1.0) <= share * 1.02 for k, share in shares.items())
        return Advised(t.name, t.family, verdict, reason, t.by, found, enough)

    if not t.covered:
        return row("not built", t.when)
    against = objection(t, decoder=facts["decoder"])
    if against:
        return row("does not suit", against)
    if t.training == "full":
        few = f"only {facts['tokens']} tokens: attention is {facts['attention_share']:.0%} of the work"
        reason = few if few_tokens(t, facts["tokens"]) else t.when
        return row("does not suit", f"{reason}; it needs a new model (gossamer fit)")
    if shares and t.reduces and not set(shares) & set(t.reduces):
        return row("does not suit", f"it lowers {', '.join(t.reduces)}, the budget is of {', '.join(shares)}")
    for name in [*t.passes(), *(by for by in t.by if by == "int8")]:
        found = measured.get(LIKE.get(name, name))
        if isinstance(found, str):
            return row("does not suit", found)
        if found is None:
            continue
        wanted = [k for k in shares if k in t.reduces] or ["latency"]
        gains = [k for k in wanted if found.get(k, 1.0) < 0.98]
        if not gains:
            words = ", ".join(f"{k} {found.get(k, 1.0):.0%}" for k in wanted)
            return row("does not suit", f"measured here, it saves nothing that was asked for ({words})", found)
        return row("suits", t.when, found)
    return row("for a recipe", t.when)


def _peak(size: int = 768, seconds: float = 0.3) -> float:
    """Multiply-adds a second in a large product."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return size**3 / _best(lambda: a @ b, seconds)


def _bandwidth(mebibytes: int = 64, seconds: float = 0.3) -> float:
    """Bytes a second read and written by a copy too large for the caches."""
    a = torch.ones(mebibytes * 2**18)
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / _best(lambda: b.copy_(a), seconds)


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begun)
    return best
