"""Parameters kept in few bits: the module stays what it is and computes as ever; its state dict holds the codes.

- `Grid` says which numbers a weight may be: ternary, binary, powers of two, whole numbers by groups
- `keep_coded` puts a parameter on codes: from then on the state dict has them in its place, and loading decodes them
- a parameter that was changed since, by training or pruning, is stored whole again: nothing is ever lost in silence
- `straight_through` is the form it learns in: rounded on the way forward, the gradient that of the identity

Source: Li et al. 2016, "Ternary Weight Networks"; Rastegari et al. 2016, "XNOR-Net"; Ding et al. 2018, "LightNN"
(powers of two, and sums of two of them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.layers.dense_sparse import pack_bits, unpack_bits
from gossamer.layers.exchange import exchange

Parts = dict[str, Tensor]

# Of a group's largest number, the scales that are tried.
CLIPS = tuple(1 - 0.05 * i for i in range(9))
# Powers of two that a term may be beside zero: with a sign, 4 bits.
POWERS = 7
TRITS = 5  # base-3 digits in a byte: 3^5 = 243


@runtime_checkable
class Coding(Protocol):
    """How a parameter is written: `parts` of a value, by the names in `names`, and the value of parts."""

    names: ClassVar[tuple[str, ...]]

    def parts(self, value: Tensor) -> Parts: ...

    def value(self, parts: Parts, shape: torch.Size) -> Tensor: ...


@dataclass(frozen=True)
class Grid:
    """The numbers a weight may be; a row is one of its first axis.

    - `ternary`: `alpha {-1, 0, 1}`, zero where `|w| <= 0.7 mean |w|`; 1.6 bits
    - `binary`: `alpha sign(w)`; 1 bit
    - `power`, `power2`: `±2^k` or zero, k one of seven below the row's largest; and a sum of two; 4 and 8 bits
    - `int`: `scale` times a whole number of `bits` bits, a scale for each `group` of a row's numbers

    `alpha` is the mean of `|w|` over what is not zero, which has the least squared error for those signs; `scale` has
    the least of nine. Ternary, binary and powers of two have one `alpha` or k a row.

    Args:
        kind: one of `KINDS`.
        bits: of `int`, 2 to 8.
        group: of `int`.

    Raises:
        ValueError: an unknown kind, or sizes out of range.
    """

    kind: str
    bits: int = 4
    group: int = 128

    KINDS: ClassVar[tuple[str, ...]] = ("ternary", "binary", "power", "power2", "int")
    names: ClassVar[tuple[str, ...]] = ("codes", "scale")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)}; got {self.kind!r}")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in 2 … 8, got {self.bits}")
        if self.group < 1:
            raise ValueError(f"group must be at least 1, got {self.group}")

    @property
    def code_bits(self) -> float:
        """Bits of a code, scales not counted."""
        return {"ternary": 8 / TRITS, "binary": 1, "power": 4, "power2": 8, "int": self.bits}[self.kind]

    @torch.no_grad()
    def codes(self, weight: Float[Tensor, "o ..."]) -> tuple[Int[Tensor, "o n"], Tensor]:
        """The nearest codes, from 0 on, a row each, and the rows' or groups' scales."""
        rows = weight.detach().flatten(1)
        if self.kind == "ternary":
            signs = rows.sign() * (rows.abs() > 0.7 * rows.abs().mean(1, keepdim=True))
            alpha = (rows * signs).sum(1) / signs.abs().sum(1).clamp(min=1)
            return signs.long() + 1, alpha
        if self.kind == "binary":
            return (rows >= 0).long(), rows.abs().mean(1)
        if self.kind == "int":
            return self._whole(rows)
        top = _nearest_power(rows.abs().amax(1))
        code = _power_code(rows, top)
        if self.kind == "power2":
            code = code + 16 * _power_code(rows - _power_value(code, top), top)
        return code, top.to(torch.int8)

    def rows(self, codes: Int[Tensor, "o n"], scale: Tensor) -> Float[Tensor, "o n"]:
        """The numbers that codes stand for."""
        if self.kind == "ternary":
            return (codes - 1) * scale[:, None]
        if self.kind == "binary":
            return (2 * codes - 1) * scale[:, None]
        if self.kind == "int":
            wide = F.pad(codes - 2 ** (self.bits - 1), (0, -codes.shape[1] % self.group)).unflatten(1, (-1, self.group))
            return (wide * scale.float()[..., None]).flatten(1)[:, : codes.shape[1]]
        first = _power_value(codes % 16, scale)
        return first + _power_value(codes // 16, scale) if self.kind == "power2" else first

    def round(self, weight: Float[Tensor, "o ..."]) -> Float[Tensor, "o ..."]:
        """The weight's nearest on the grid."""
        return self.rows(*self.codes(weight)).view_as(weight).to(weight)

    def parts(self, value: Float[Tensor, "o ..."]) -> Parts:
        """Packed codes and scales."""
        codes, scale = self.codes(value)
        if self.kind == "ternary":
            digits = F.pad(codes.flatten(), (0, -codes.numel() % TRITS)).view(-1, TRITS)
            packed = (digits * 3 ** torch.arange(TRITS, device=digits.device)).sum(1).to(torch.uint8)
        else:
            packed = pack_bits(codes.flatten(), int(self.code_bits))
        return {"codes": packed, "scale": scale}

    def value(self, parts: Parts, shape: torch.Size) -> Float[Tensor, ...]:
        """The weight of that shape.

        Raises:
            ValueError: the parts are of another size.
        """
        packed, scale = parts["codes"], parts["scale"]
        count = shape.numel()
        bits = 8 / TRITS if self.kind == "ternary" else self.code_bits
        width = count // shape[0]
        scales = (shape[0], -(-width // self.group)) if self.kind == "int" else (shape[0],)
        if packed.shape != (-(-count // TRITS) if self.kind == "ternary" else -(-int(count * bits) // 8),):
            raise ValueError(f"codes hold {tuple(packed.shape)} bytes, not those of {tuple(shape)} by {self}")
        if scale.shape != scales:
            raise ValueError(f"scale must be {scales} for {tuple(shape)} by {self}, got {tuple(scale.shape)}")
        if self.kind == "ternary":
            codes = _trits(packed)[:count]
        else:
            codes = unpack_bits(packed, int(bits), count)
        return self.rows(codes.view(shape[0], -1), scale).view(shape)

    def _whole(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        most = 2 ** (self.bits - 1) - 1
        wide = F.pad(rows, (0, -rows.shape[1] % self.group)).unflatten(1, (-1, self.group))
        top = wide.abs().amax(-1) / most
        best, least = top, torch.full_like(top, float("inf"))
        for clip in CLIPS:
            scale = (top * clip).clamp(min=2.0**-24).half().to(rows)  # as it is stored
            near = (wide / scale[..., None]).round().clamp(-most, most) * scale[..., None]
            error = (near - wide).square().sum(-1)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        codes = (wide / best[..., None]).round().clamp(-most, most).long() + 2 ** (self.bits - 1)
        return codes.flatten(1)[:, : rows.shape[1]], best.half()


def _nearest_power(size: Float[Tensor, "*s"]) -> Int[Tensor, "*s"]:
    """k of the nearest `2^k`: up from `1.5 * 2^k` on; -126 at the least."""
    return torch.frexp(size / 1.5).exponent.clamp(min=-100).long()


def _power_code(rows: Tensor, top: Tensor) -> Tensor:
    """0 for zero, 1 … 7 for the powers up to `2^top`; 8 more where negative."""
    power = _nearest_power(rows.abs()) - top[:, None] + POWERS
    # Below half the smallest power zero is nearer; from there on the smallest power is.
    smallest = torch.ldexp(torch.ones_like(rows), (top - POWERS)[:, None])
    index = power.clamp(1, POWERS) * (rows.abs() >= smallest)
    return index + 8 * ((rows < 0) & (index > 0))


def _power_value(code: Tensor, top: Tensor) -> Tensor:
    index = code % 8
    sign = 1.0 - 2.0 * (code >= 8)
    return torch.ldexp(sign * (index > 0), index - POWERS + top.long()[:, None])


def _trits(packed: UInt8[Tensor, " m"]) -> Int[Tensor, " n"]:
    return (packed.long()[:, None] // 3 ** torch.arange(TRITS, device=packed.device) % 3).flatten()


# --- storing ------------------------------------------------------------------------------------------------------


class Kept:
    """What stands for a parameter in its module's state dict.

    Args:
        name: of the parameter.
        coding: how it is written.
    """

    def __init__(self, name: str, coding: Coding) -> None:
        self.name = name
        self.coding = coding
        self.parts: Parts = {}

    def holds(self, module: nn.Module) -> bool:
        """Whether the parameter still is what the parts stand for."""
        parameter = module._parameters[self.name]
        if parameter is None or parameter.is_meta:
            return False
        try:
            value = self.coding.value(self.parts, parameter.shape)
        except (ValueError, RuntimeError):  # another shape by now
            return False
        return torch.equal(value.to(parameter), parameter)

    def stored_bits(self) -> int:
        """Bits of the parts."""
        return 8 * sum(part.numel() * part.element_size() for part in self.parts.values())


def _on_save(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, kept in module.__dict__["coded"].items():
        if prefix + name in state and kept.parts and kept.holds(module):
            del state[prefix + name]
            state.update({f"{prefix}{name}_{part}": value for part, value in kept.parts.items()})


def _on_load(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    errors = rest[-1]
    for name, kept in module.__dict__["coded"].items():
        key, parameter = prefix + name, module._parameters[name]
        kept.parts = {}
        if key in state or parameter is None:
            continue
        parts = {part: state.pop(f"{key}_{part}", None) for part in kept.coding.names}
        if any(value is None for value in parts.values()):
            continue  # PyTorch says that the key is missing
        try:
            state[key] = kept.coding.value(parts, parameter.shape).to(parameter.dtype)
        except (ValueError, RuntimeError) as error:
            state[key] = parameter.detach()
            errors.append(f"{key} cannot be decoded: {error}")
        else:
            kept.parts = parts


def announce_coded(model: nn.Module, part: str, name: str, coding: Coding) -> Kept:
    """Makes the state dict of the module `part` of `model` read and write its parameter `name` by `coding`.

    The parameter no longer asks for a gradient, and what holds the module has no width left to cut.

    Raises:
        ValueError: there is no such parameter.
    """
    module = model.get_submodule(part)
    parameter = module._parameters.get(name)
    if parameter is None:
        raise ValueError(f"{part or type(model).__name__} has no parameter {name!r}")
    if "coded" not in module.__dict__:
        module.__dict__["coded"] = {}
        module.register_state_dict_post_hook(_on_save)
        module.register_load_state_dict_pre_hook(_on_load)
    known: dict[str, Kept] = module.__dict__["coded"]
    known[name] = Kept(name, coding)
    parameter.requires_grad_(False)
    if part:
        exchange(model, part, module)
    return known[name]


@torch.no_grad()
def keep_coded(model: nn.Module, part: str, name: str, coding: Coding, parts: Parts | None = None) -> Kept:
    """As `announce_coded`, and the parameter becomes what `parts` (by default its own nearest codes) stand for."""
    kept = announce_coded(model, part, name, coding)
    parameter = model.get_submodule(part)._parameters[name]
    assert parameter is not None
    parts = coding.parts(parameter.detach()) if parts is None else parts
    parameter.copy_(coding.value(parts, parameter.shape).to(parameter))
    kept.parts = parts
    return kept


def coded_parameters(model: nn.Module) -> dict[str, Kept]:
    """What of `model` is stored in codes, by name of the parameter."""
    return {
        f"{part}.{name}" if part else name: kept
        for part, module in model.named_modules()
        for name, kept in module.__dict__.get("coded", {}).items()
        if kept.parts
    }


# --- learning -----------------------------------------------------------------------------------------------------


class _StraightThrough(nn.Module):
    def __init__(self, rounding: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.rounding(weight) - weight).detach()


def straight_through(module: nn.Module, name: str, rounding: Callable[[Tensor], Tensor]) -> None:
    """From here on `module` computes with `rounding(w)`, and learns w by the gradient of that."""
    parametrize.register_parametrization(module, name, _StraightThrough(rounding))


def learned(module: nn.Module, name: str) -> None:
    """Takes what stands before a parameter away again; w stays as it was learned, not rounded."""
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
