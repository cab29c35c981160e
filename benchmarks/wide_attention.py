"""Layers against heads: accuracy, size and cost of text classifiers at a fixed number of heads.

    python benchmarks/wide_attention.py --quick         # minutes
    python benchmarks/wide_attention.py                 # all ten attentions, three seeds

Source of the experiment: Brown et al. 2022, "Wide Attention Is The Way Forward For Transformers?". Data: ListOps-mini
(nested lists of 32 to 64 symbols over the digits 0 to 3, generated), or the SST-2 sentences of `GOSSAMER_DATA` as
bytes. Every model of a seed sees the same batches. Figures go to `benchmarks/results/wide_attention.json`.
"""

import argparse
import math
import os
import random
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import measure
from gossamer.io.files import write_json
from gossamer.models import create_model

HERE = Path(__file__).parent
TEN = ("attention", "bigbird", "linear", "linformer", "local", "longformer", "performer", "sinkhorn", "sparse",
       "synthesizer")  # fmt: skip
RATIOS = ("4-2", "2-4", "1-8")

Set = tuple[Tensor, Tensor]

# ---- data ----------------------------------------------------------------------------------------------------

DIGITS, OPERATORS, CLOSE = 4, ("min", "max", "med", "sum"), 9


def listops_tree(rng: random.Random, depth: int = 0) -> tuple[list[int], int]:
    """Symbols and value of a random nested list: digits are 1 .. 4, operators 5 .. 8, the closing bracket 9."""
    if depth and (depth == 5 or rng.random() > 0.35):
        digit = rng.randrange(DIGITS)
        return [1 + digit], digit
    kind = rng.randrange(len(OPERATORS))
    parts = [listops_tree(rng, depth + 1) for _ in range(rng.randint(2, 5))]
    values = sorted(value for _, value in parts)
    value = (values[0], values[-1], int(statistics.median(values)), sum(values) % DIGITS)[kind]
    return [1 + DIGITS + kind, *(symbol for symbols, _ in parts for symbol in symbols), CLOSE], value


def listops_mini(count: int, seed: int, shortest: int = 32, longest: int = 64) -> Set:
    """`count` different lists of `shortest .. longest` symbols and their values."""
    rng = random.Random(seed)
    found: dict[tuple[int, ...], int] = {}
    while len(found) < count:
        symbols, value = listops_tree(rng)
        if shortest <= len(symbols) <= longest:
            found[tuple(symbols)] = value
    ids = torch.zeros(count, longest, dtype=torch.long)
    for row, known in enumerate(found):
        ids[row, : len(known)] = torch.tensor(known)
    return ids, torch.tensor(list(found.values()))


def sst2_bytes(name: str, longest: int = 192) -> Set:
    """Sentences of SST-2 as bytes + 1, cut at `longest`, and their labels."""
    folder = Path(os.environ.get("GOSSAMER_DATA", HERE.parent.parent / "shared" / "data")) / "sst2"
    rows = [line.rpartition("\t") for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row[2] in ("0", "1")]
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, (text, _, _) in enumerate(rows):
        codes = [byte + 1 for byte in text.encode()[:longest]]
        ids[i, : len(codes)] = torch.tensor(codes)
    return ids, torch.tensor([int(row[2]) for row in rows])


def data_of(name: str, seed: int) -> tuple[Set, Set, dict[str, int]]:
    """Training set, test set and model keywords."""
    if name == "sst2":
        return sst2_bytes("train.tsv"), sst2_bytes("dev.tsv"), dict(vocab_size=257, max_len=192, num_classes=2)
    ids, values = listops_mini(9000, seed)
    return (ids[1000:], values[1000:]), (ids[:1000], values[:1000]), dict(vocab_size=10, max_len=64, num_classes=4)


# ---- the sweep -----------------------------------------------------------------------------------------------


def train(model: torch.nn.Module, data: Set, steps: int, seed: int, lr: float, batch: int = 32) -> None:
    """Adam, warm-up over a tenth of the steps, then decay by the root, as in Long Range Arena."""
    ids, targets = data
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), eps=1e-9, weight_decay=0.1)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1.0, (step + 1) / warm) * math.sqrt(warm / max(step + 1, warm))
    )
    model.train()
    for _ in range(steps):
        index = torch.randint(len(ids), (batch,), generator=generator)
        loss = F.cross_entropy(model(ids[index]), targets[index])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Set) -> float:
    hits = [(model(i).argmax(-1) == t).sum().item() for i, t in zip(*(d.split(250) for d in data), strict=True)]
    return 100 * sum(hits) / len(data[1])


def sweep(
    *,
    data: str = "listops",
    mixers: Sequence[str] = TEN,
    ratios: Sequence[str] = RATIOS,
    seeds: int = 3,
    steps: int = 2000,
    lr: float = 1e-3,
) -> dict[str, Any]:
    """One row a mixer and ratio; `gain` is the accuracy over the deepest ratio, its mean over mixers at the end.

    Raises:
        ValueError: a ratio that is none of the named variants.
    """
    rows: list[dict[str, Any]] = []
    for mixer in mixers:
        built = {}
        for ratio in ratios:
            layers, heads = ratio.split("-")
            scores = []
            for seed in range(seeds):
                training, test, settings = data_of(data, seed)
                torch.manual_seed(seed)
                model = create_model(f"wide_cpu_small_{layers}_{heads}", mixer=mixer, **settings)
                train(model, training, steps, seed, lr)
                scores.append(accuracy(model, test))
            built[ratio] = model
            one = test[0][:1]
            row: dict[str, Any] = {
                "mixer": mixer,
                "ratio": ratio,
                "accuracy": statistics.mean(scores),
                "std": statistics.stdev(scores) if seeds > 1 else None,
                "parameters": measure.parameters(model),
                "macs": measure.macs(model, one).total,
            }
            rows.append(row)
            print(f"{mixer:12} {ratio}  {row['accuracy']:5.1f} %", flush=True)
        with torch.no_grad():
            one = test[0][:1]
            forms = {ratio: partial(model, one) for ratio, model in built.items()}
            times = measure.latency(forms, budget_s=0.5 * len(forms))
            for row in rows[-len(ratios) :]:
                row["latency"] = vars(times[row["ratio"]])
                row["peak_memory"] = vars(measure.peak_memory(forms[row["ratio"]]))
                row["gain"] = row["accuracy"] - rows[-len(ratios)]["accuracy"]
    return {
        "data": data,
        "seeds": seeds,
        "steps": steps,
        "rows": rows,
        "mean_gain": {r: statistics.mean(row["gain"] for row in rows if row["ratio"] == r) for r in ratios},
        "device": measure.device_info(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", choices=("listops", "sst2"), default="listops")
    parser.add_argument("--mixers", nargs="+", default=list(TEN), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--quick", action="store_true", help="attention, linear and local; one seed; 300 steps")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "wide_attention.json")
    given = parser.parse_args()
    if given.quick:
        given.mixers, given.seeds, given.steps = ["attention", "linear", "local"], 1, 300
    report = sweep(data=given.data, mixers=given.mixers, seeds=given.seeds, steps=given.steps)
    write_json(given.out, report)
    print(f"mean gain over the deepest: {report['mean_gain']}; written to {given.out}")


if __name__ == "__main__":
    main()
