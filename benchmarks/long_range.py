"""Long sequences: four small tasks x attentions x lengths, with accuracy, multiply-adds, time and memory.

`python benchmarks/long_range.py [--lengths 256 1024] [--mixers NAME ...] [--steps 60] [--depth 4] [--dim 128]` writes
`benchmarks/results/long_range.json` and says whether this device repeats what Long Range Arena found: kernel attentions
fastest, low-rank ones lightest.

Source: the tasks are in the manner of Tay et al. 2020, "Long Range Arena", made anew for each batch and not theirs:

- `listops`: nested MAX, MIN, MED and SM (sum modulo 10) of digits; the answer is a digit
- `text`: words spelt in bytes; the answer is which of two sets of words comes more often
- `retrieval`: two documents; the answer is whether both hold the same key
- `pixels`: handwritten digits, a token for each pixel, enlarged to the length asked for

A few steps do not train a long model. Costs are the point; accuracies are read beside their error and the chance level.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import cache
from math import isqrt, sqrt
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.bench.block import make_mixer, reason
from gossamer.data import Dataset, read_dataset
from gossamer.io import write_json
from gossamer.layers import Block, Mlp
from gossamer.layers.embed import TextStem
from gossamer.layers.heads import Classifier
from gossamer.layers.init import init_by_width
from gossamer.measure import device_info, latency, macs, parameters, peak_memory
from gossamer.trunks import Isotropic

RESULTS = Path(__file__).parent / "results" / "long_range.json"
KINDS = {
    "attention": "full",
    "local": "sparse",
    "longformer": "sparse",
    "bigbird": "sparse",
    "sparse": "sparse",
    "sinkhorn": "sparse",
    "linformer": "low-rank",
    "synthesizer": "low-rank",
    "linear": "kernel",
    "performer": "kernel",
}
Batch = tuple[Tensor, Tensor]
BATCH, TESTED = 16, 256
OPEN, CLOSE = 12, 16  # listops: digits are 1 to 10, the four operators 12 to 15
GOOD, BAD = ("light", "warm", "clear", "swift"), ("heavy", "cold", "murky", "slow")
FILLERS = ("the", "stone", "river", "under", "and", "walks", "seven", "often")


def listops(n: int, chance: Random) -> tuple[list[int], int]:
    """A nested expression of at most n tokens, and its value."""

    def grow(room: int, depth: int) -> tuple[list[int], int]:
        if room < 5 or depth == 0 or (depth < 8 and chance.random() < 0.35):
            digit = chance.randrange(10)
            return [digit + 1], digit
        kind = chance.randrange(4)
        ids: list[int] = []
        values: list[int] = []
        left = room - 2
        while left > 0 and len(values) < 2 + chance.randrange(8):
            part, value = grow(min(left, max(1, left // 2)), depth - 1)
            ids += part
            values.append(value)
            left -= len(part)
        answer = (max(values), min(values), sorted(values)[len(values) // 2], sum(values) % 10)[kind]
        return [OPEN + kind, *ids, CLOSE], answer

    return grow(n, 8)


def text(n: int, chance: Random) -> tuple[list[int], int]:
    """Words in bytes, and whether those of the first set are the more frequent."""
    answer, words, length = chance.randrange(2), [], 0
    while length < n - 8:
        often = GOOD if answer else BAD
        seldom = BAD if answer else GOOD
        pick = chance.random()
        words.append(chance.choice(often if pick < 0.2 else seldom if pick < 0.3 else FILLERS))
        length += len(words[-1]) + 1
    return [byte + 1 for byte in " ".join(words).encode()][:n], answer


def retrieval(n: int, chance: Random) -> tuple[list[int], int]:
    """Two documents with a key of four letters each, and whether it is the same."""
    half, answer = n // 2 - 1, chance.randrange(2)
    keys = [[chance.randrange(30, 40) for _ in range(4)]]
    keys.append(keys[0] if answer else [chance.randrange(30, 40) for _ in range(4)])
    ids: list[int] = []
    for key in keys:
        document = [chance.randrange(1, 20) for _ in range(half)]
        place = chance.randrange(half - 4)
        document[place : place + 4] = key
        ids += [*document, 41]
    return ids, int(keys[0] == keys[1])


MADE: dict[str, tuple[Callable[[int, Random], tuple[list[int], int]], int, int]] = {
    "listops": (listops, CLOSE + 1, 10),
    "text": (text, 257, 2),
    "retrieval": (retrieval, 42, 2),
}


@cache
def digits() -> Dataset:
    return read_dataset("digits")


def batch(task: str, n: int, count: int, seed: int) -> Batch:
    """Padded ids `(count, n)` and answers, the same for the same seed."""
    chance = Random(f"{task} {n} {seed}")
    if task == "pixels":
        data = digits()
        split = data.test if seed < 0 else data.train
        index = torch.tensor([chance.randrange(len(split)) for _ in range(count)])
        images = split.inputs[0][index].float()
        side = isqrt(n)
        images = F.interpolate(images, (side, side), mode="bilinear")[:, 0].flatten(1)
        return F.pad(images.round().long() + 1, (0, n - side * side)), split.targets[index]
    make, _, _ = MADE[task]
    rows = [make(n, chance) for _ in range(count)]
    ids = torch.zeros(count, n, dtype=torch.long)
    for row, (words, _) in zip(ids, rows, strict=True):
        row[: len(words)] = torch.tensor(words)
    return ids, torch.tensor([answer for _, answer in rows])


def network(name: str, task: str, n: int, dim: int, depth: int, heads: int) -> nn.Module:
    """A text classifier of blocks that differ in their mixer alone."""
    _, vocab, classes = MADE.get(task, (None, 257, 10))
    torch.manual_seed(0)
    blocks = [Block(dim, make_mixer(name, dim, (n,), heads), Mlp(dim, 2 * dim)) for _ in range(depth)]
    model = Isotropic(TextStem(vocab, dim, n), blocks, norm=nn.LayerNorm(dim), head=Classifier(dim, classes))
    init_by_width(model)
    return model


def cell(name: str, task: str, n: int, words: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"task": task, "mixer": name, "kind": KINDS.get(name, "other"), "tokens": n}
    model = network(name, task, n, words.dim, words.depth, words.heads)
    one = batch(task, n, 1, 0)[0].clamp(min=1)
    row |= {"parameters": parameters(model), "macs": macs(model, (one,)).total}
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    began = time.perf_counter()
    for step in range(words.steps):
        ids, answers = batch(task, n, BATCH, step)
        loss = F.cross_entropy(model.train()(ids), answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    row["train_ms"] = (time.perf_counter() - began) / max(words.steps, 1) * 1e3
    model.eval()
    with torch.inference_mode():
        ids, answers = batch(task, n, TESTED, -1)
        right = torch.cat([model(part).argmax(-1) for part in ids.split(BATCH)]) == answers
        accuracy = float(right.float().mean())
        took = latency({"one": lambda: model(one)}, budget_s=0.3, min_runs=3)["one"]
        row |= {"ms": took.median_ms, "peak_mib": peak_memory(lambda: model(one)).mib}
    return row | {"accuracy": accuracy, "error": sqrt(accuracy * (1 - accuracy) / TESTED), "why": ""}


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What Long Range Arena found, and what is found here: at the longest tokens, on tasks that all mixers ran."""
    mixers = {r["mixer"] for r in rows}
    done: dict[tuple[int, str], dict[str, dict[str, Any]]] = {}
    for r in rows:
        if not r["why"]:
            done.setdefault((r["tokens"], r["task"]), {})[r["mixer"]] = r
    whole = {place: found for place, found in done.items() if found.keys() == mixers}
    if not whole:
        return []
    longest = max(tokens for tokens, _ in whole)
    tables = [found for (tokens, _), found in whole.items() if tokens == longest]
    said = (("kernel attentions are fastest", "ms", "kernel"), ("low-rank ones are lightest", "peak_mib", "low-rank"))
    answers = []
    for words, cost, kind in said:
        sums = {m: sum(found[m][cost] for found in tables) for m in sorted(mixers)}
        best = min(sums, key=lambda m: sums[m])
        here = KINDS.get(best, "other")
        answers.append(
            {"said": words, "by": cost, "tokens": longest, "here": best, "kind": here, "reproduced": here == kind}
        )
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=[*MADE, "pixels"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--mixers", nargs="+", default=list(KINDS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=600.0, help="for everything; what is left out says so")
    words = parser.parse_args()
    end = time.perf_counter() + words.seconds
    rows = []
    for n in sorted(words.lengths):
        for task in words.tasks:
            for name in words.mixers:
                if time.perf_counter() > end:
                    row = {"task": task, "mixer": name, "tokens": n, "why": "no time was left"}
                else:
                    try:
                        row = cell(name, task, n, words)
                    except (RuntimeError, ValueError) as error:
                        row = {"task": task, "mixer": name, "tokens": n, "why": reason(error)}
                rows.append(row)
                if row["why"]:
                    print(f"{task:10}{name:13}{n:6}  {row['why']}")
                    continue
                print(
                    f"{task:10}{name:13}{n:6}  accuracy {row['accuracy']:.3f} ±{row['error']:.3f}  "
                    f"{row['macs'] / 1e6:9.1f} MMACs  {row['ms']:8.2f} ms  {row['peak_mib']:7.1f} MiB"
                )
    found = verdicts(rows)
    for v in found:
        word = "reproduced" if v["reproduced"] else "NOT reproduced"
        print(f"{v['said']}: {word}; at {v['tokens']} tokens it is {v['here']} ({v['kind']})")
    if not found:
        print("no task was run with all mixers, so nothing can be said; give more --seconds")
    asked = {k: v for k, v in vars(words).items() if k != "seconds"}
    write_json(RESULTS, {"device": device_info(), "asked": asked, "rows": rows, "verdicts": found})


if __name__ == "__main__":
    main()
