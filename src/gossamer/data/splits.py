"""Which item goes to which split, when the data do not say.

- given splits are used as they are
- no test split but a validation split: the validation split becomes the test split (it is the published number of
  SST-2 and its like), and a new validation split is taken from training
- no held-out split at all: test, then validation, are taken from training
- what we take is stratified by class, seeded, and never parts exact duplicates
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.data.base import DataError

LARGEST = 10_000  # items: a held-out split need not grow beyond this; the standard error of accuracy is below 0.5 %

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val", "develop": "val", "development": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


@dataclass
class Plan:
    """For each split: the given split its items come from, and their positions there."""

    parts: dict[str, tuple[str, np.ndarray]]
    how: str


def digest(data: bytes) -> int:
    """64-bit content key; equal bytes, equal key."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def hold_out(labels: np.ndarray, keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Boolean `(n,)`: a seeded, stratified `share` of the items; items with equal keys stay together.

    Every class with two different items keeps at least one on either side.
    """
    rng = np.random.default_rng(seed)
    share = min(share, LARGEST / max(len(labels), 1))
    _, first, group, size = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    chosen = np.zeros(len(first), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels[first] == label))
        if len(members) < 2:
            continue
        before = np.cumsum(size[members]) - size[members]  # items taken before each group
        wanted = max(1.0, round(share * size[members].sum()))
        chosen[members[:-1]] = before[:-1] < wanted
    return chosen[group.reshape(-1)]


def make_plan(labels: Mapping[str, np.ndarray], keys: Mapping[str, np.ndarray], seed: int) -> Plan:
    """The three splits from what was given (`train`, and `val` or `test` or neither)."""
    if "train" not in labels:
        raise DataError(f"no training split: found only {', '.join(labels)}; name one train")
    everything = {name: (name, np.arange(len(values))) for name, values in labels.items()}
    if "val" in labels and "test" in labels:
        return Plan(everything, "train, val and test as given")
    left, train_keys, train_labels = np.arange(len(labels["train"])), keys["train"], labels["train"]
    parts, notes = {}, []
    if "test" in labels:
        parts["test"] = everything["test"]
        notes.append("test as given")
    elif "val" in labels:
        parts["test"] = everything["val"]
        notes.append("the given validation split is the test split")
    else:
        share = 0.2 if len(left) < 10_000 else 0.1
        held = hold_out(train_labels, train_keys, share, seed)
        parts["test"] = ("train", left[held])
        left = left[~held]
        notes.append(f"{held.sum()} items taken from train as test")
    share = 0.2 if len(left) < 1000 else 0.1
    held = hold_out(train_labels[left], train_keys[left], share, seed + 1)
    parts["val"] = ("train", left[held])
    parts["train"] = ("train", left[~held])
    notes.append(f"{held.sum()} items taken from train as val")
    for name, (_, index) in parts.items():
        if len(index) == 0:
            raise DataError(
                f"too few items to split: {len(labels['train'])} in all leave none for {name}; add items or give "
                "train, val and test"
            )
    return Plan(parts, "; ".join(notes) + f" (stratified, seed {seed})")


def split_record(plan: Plan, keys: Mapping[str, np.ndarray], seed: int) -> dict[str, object]:
    """What a run stores to repeat its split: seed, sizes, and one hash over content and order of all three."""
    state = hashlib.sha256()
    for name in ("train", "val", "test"):
        given, index = plan.parts[name]
        state.update(name.encode() + np.ascontiguousarray(keys[given][index]).tobytes())
    sizes = {name: len(plan.parts[name][1]) for name in ("train", "val", "test")}
    return {"seed": seed, "how": plan.how, "sizes": sizes, "hash": state.hexdigest()[:32]}


def duplicate_problems(
    labels: Mapping[str, np.ndarray], keys: Mapping[str, np.ndarray], classes: Sequence[str]
) -> list[str]:
    """What is odd about equal items: in two given splits, or under two labels."""
    problems = []
    for name in labels:
        if name != "train" and (n := int(np.isin(keys[name], keys["train"]).sum())):
            problems.append(f"{n} of {len(keys[name])} {name} items also occur in train")
    every, label = np.concatenate(list(keys.values())), np.concatenate(list(labels.values()))
    pairs = np.unique(np.stack([every, label]), axis=1)
    values, counts = np.unique(pairs[0], return_counts=True)
    if len(twice := values[counts > 1]):
        names = sorted({classes[k] for k in pairs[1][np.isin(pairs[0], twice)]})
        problems.append(f"{len(twice)} items occur under more than one label ({', '.join(names[:6])})")
    return problems
