"""Optimisers that leave exact zeros: any optimiser's step on the loss, then the proximal map of a penalty.

`z = base step of w`,  `w <- argmin_u Omega(u) + ||u - z||^2 / (2 t)`,  `t = lr * shrink * a`

Source: Guo 2023, "SparseOptimizer: Sparsify Language Models through Moreau-Yosida Regularization and Accelerate via
Compiler Co-design"; Moreau 1965 (the envelope); Parikh and Boyd 2014, "Proximal Algorithms" (the maps in closed form).
A reconstruction: neither code nor full text of the first is public; where the map stands in the step and how its
threshold follows the learning rate are our reading (the map of the whole step, threshold `lr * shrink`).

- the moments of the base optimiser see the gradient of the loss only; without `shrink` it is the base optimiser
- one set of numbers more than the base optimiser needs, and only for `weights="reweighted"`
- `shrink`, `penalty`, `size`, `trim` and `frozen` are entries of a parameter group, as `lr` is: saved with the state,
  and changed at any time
- a weight at zero may come back as long as its group is not `frozen`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

WEIGHTS = ("plain", "reweighted", "preconditioned")

PENALTIES = ("l1", "l0", "rows", "columns", "blocks")
# Of the reweighted penalty: what keeps `1 / |w|` finite, and steps between new weights.
REWEIGHT_EPS, REWEIGHT_EVERY = 1e-3, 100


def check_penalty(penalty: str, size: int, shape: torch.Size) -> None:
    """ValueError unless tensors of `shape` fall into groups of `size` under `penalty`."""
    if penalty not in PENALTIES:
        raise ValueError(f"penalty must be one of {', '.join(PENALTIES)}; got {penalty!r}")
    if penalty in ("l1", "l0"):
        return
    sides = {"rows": shape[:1], "columns": shape[1:], "blocks": shape}[penalty]
    if len(shape) != 2 or size < 1 or any(side % size for side in sides):
        raise ValueError(f"penalty {penalty!r} of size {size} needs a matrix that it divides, got {tuple(shape)}")


def grouped(v: Float[Tensor, "r c"], penalty: str, size: int = 1) -> Float[Tensor, "i a j b"]:
    """A view in which group `(i, j)` holds `v[i, :, j, :]`: `size` rows, `size` columns, or squares of that side."""
    check_penalty(penalty, size, v.shape)
    rows, columns = v.shape
    high = {"rows": size, "columns": rows}.get(penalty, size)
    wide = {"rows": columns, "columns": size}.get(penalty, size)
    return v.unflatten(0, (-1, high)).unflatten(2, (-1, wide))


def group_norms(v: Float[Tensor, "r c"], penalty: str, size: int = 1) -> Float[Tensor, "i j"]:
    """The length of each group's vector."""
    return grouped(v, penalty, size).norm(dim=(1, 3))


def prox(v: Float[Tensor, "*shape"], t: float | Tensor, penalty: str = "l1", size: int = 1) -> Float[Tensor, "*shape"]:
    """`argmin_u Omega(u) + ||u - v||^2 / (2 t)`.

    - `l1`: `sign(v) max(|v| - t, 0)`; `l0`: v where `|v| > sqrt(2 t)`, else 0
    - groups, Omega the sum of their lengths: `v_g max(0, 1 - t / ||v_g||)`

    Args:
        t: how far, above 0; a number, or one for each entry (`l1`, `l0`) or group `(i, j)`.
        penalty: Omega: `l1`, `l0`, or groups of `size` whole `rows`, whole `columns`, or square `blocks`.

    Raises:
        ValueError: an unknown penalty, groups that do not fit, or `t` not above 0.
    """
    if not bool((torch.as_tensor(t) > 0).all()):
        raise ValueError(f"t must be above 0, got {t}")
    check_penalty(penalty, size, v.shape)
    return _map(v, t, penalty, size)


def _map(v: Tensor, t: float | Tensor, penalty: str, size: int) -> Tensor:
    """`prox`, where `t` may be 0 too: what is not shrunk stays."""
    if penalty == "l1":
        return v.sign() * (v.abs() - t).clamp(min=0)
    if penalty == "l0":
        return torch.where(v.abs() > (2 * torch.as_tensor(t)).sqrt(), v, 0.0)
    # A group of length 0 has nothing to scale; the smallest length keeps 0 / 0 out.
    scale = (1 - t / group_norms(v, penalty, size).clamp(min=torch.finfo(v.dtype).tiny)).clamp(min=0)
    return (grouped(v, penalty, size) * scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)


def envelope(v: Float[Tensor, "*shape"], t: float, penalty: str = "l1", size: int = 1) -> Float[Tensor, ""]:
    """`M_t(v) = min_u Omega(u) + ||u - v||^2 / (2 t)`, smooth where Omega is not; its gradient is `(v - prox) / t`.

    For `l1` it is Huber's function. Arguments and errors as of `prox`.
    """
    u = prox(v, t, penalty, size)
    if penalty == "l1":
        omega = u.abs().sum()
    elif penalty == "l0":
        omega = (u != 0).sum().to(v.dtype)
    else:
        # The length of a group at zero has no gradient; none is needed there.
        squares = grouped(u, penalty, size).square().sum((1, 3))
        omega = torch.where(squares > 0, squares, 1.0).sqrt().where(squares > 0, 0.0).sum()
    return omega + (v - u).square().sum() / (2 * t)


class MoreauYosida(Optimizer):
    """Wraps an optimiser: after each of its steps, the groups with a `shrink` are shrunk.

    Entries of a parameter group it reads: `shrink` (lambda, 0 by default), `penalty` (`l1`) and `size` (1, see `prox`),
    `trim` (none): entries or groups longer than this are not shrunk, the trimmed lasso (Bertsimas et al. 2017);
    `frozen` (False): what is zero stays zero, whatever the gradient.

    Args:
        base: takes the step on the loss: `AdamW(groups, lr)`, `SGD(groups, lr)`, …
        weights: `a` of the threshold. `plain`: 1. `reweighted`: `1 / (|w| + 1e-3)` (of a group, its length), taken anew
            every 100 steps, so that the small go and the large stay. `preconditioned`: `1 / (sqrt(v) + eps)` of Adam,
            the map in Adam's own metric.
        smooth: `t` of the envelope. Then nothing is set to zero: `shrink` times the envelope's gradient joins the
            loss's, and `prox` is for the caller to apply at the end.

    Raises:
        ValueError: a negative `shrink`, an unknown penalty or weights, groups that do not fit, `smooth` not above 0.
    """

    def __init__(self, base: Optimizer, *, weights: str = "plain", smooth: float | None = None) -> None:
        if weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
        if smooth is not None and smooth <= 0:
            raise ValueError(f"smooth must be above 0, got {smooth}")
        self.base = base
        self.weights = weights
        self.smooth = smooth
        self.taken = 0
        for group in base.param_groups:
            group.setdefault("shrink", 0.0)
            group.setdefault("penalty", "l1")
            group.setdefault("size", 1)
            group.setdefault("trim", None)
            group.setdefault("frozen", False)
            if group["shrink"] < 0:
                raise ValueError(f"shrink must be at least 0, got {group['shrink']}")
            if group["shrink"] or group["penalty"] != "l1":
                for p in group["params"]:
                    check_penalty(group["penalty"], group["size"], p.shape)
            if weights == "preconditioned" and group["penalty"] not in ("l1", "l0"):
                raise ValueError(f"preconditioned weights need penalty l1 or l0, got {group['penalty']!r}")

    # What training loops read and set is the base optimiser's own.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {**self.base.state_dict(), "taken": self.taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.taken = state.pop("taken", 0)
        self.base.load_state_dict(state)

    def __repr__(self) -> str:
        return f"MoreauYosida(weights={self.weights!r}, smooth={self.smooth}) of {self.base!r}"

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of the base optimiser, and the map behind it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chosen = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        frozen = [(p, p != 0) for g, p in chosen if g.get("frozen")]
        shrunk = [(g, p) for g, p in chosen if g.get("shrink") and g["lr"]]
        weights: dict[Tensor, Tensor] = {}
        if self.weights == "reweighted" and self.taken % REWEIGHT_EVERY == 0:
            weights = {p: 1 / (_lengths(p, g) + REWEIGHT_EPS) for g, p in shrunk}
        if self.smooth is not None:
            for g, p in shrunk:
                p.grad.add_(p - prox(p, self.smooth, g["penalty"], g["size"]), alpha=g["shrink"] / self.smooth)
        self.base.step()
        self.taken += 1
        for p, weight in weights.items():
            self.state[p]["reweight"] = weight
        if self.smooth is None:
            for g, p in shrunk:
                t = g["lr"] * g["shrink"] * self._weight(g, p)
                if g.get("trim") is not None:
                    t = t * (_lengths(p, g) <= g["trim"])
                p.copy_(_map(p, t, g["penalty"], g["size"]))
        for p, alive in frozen:
            p.mul_(alive)
        return loss

    def _weight(self, group: dict[str, Any], p: Tensor) -> float | Tensor:
        if self.weights == "plain":
            return 1.0
        if self.weights == "reweighted":
            if "reweight" not in self.state[p]:
                self.state[p]["reweight"] = 1 / (_lengths(p, group) + REWEIGHT_EPS)
            return self.state[p]["reweight"]
        state = self.state[p]
        if "exp_avg_sq" not in state:
            raise ValueError(f"preconditioned weights need Adam's second moment, which {type(self.base)} has not")
        second = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        return 1 / (second.sqrt() + group["eps"])


def _lengths(p: Tensor, group: dict[str, Any]) -> Tensor:
    return p.abs() if group["penalty"] in ("l1", "l0") else group_norms(p, group["penalty"], group["size"])
