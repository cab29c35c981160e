"""An estimate of energy from operation counts. Not a measurement.

`E = MACs * e_mac + DRAM bytes * e_dram + SRAM bytes * e_sram`

Source: Horowitz 2014, "Computing's energy problem (and what we can do about it)", ISSCC, figure 1.1.9: energy of one
operation in a 45 nm process at 0.9 V, of 64 bits out of caches of 8 KB to 1 MB and out of DRAM; the DRAM access of
640 pJ for 32 bits as tabulated from it by Han et al. 2015, "Learning both Weights and Connections for Efficient Neural
Networks", figure 1.

- below 8 bits there are no figures: a multiplication is taken to cost as the square of the bits, a sum as the bits
- newer processes spend less on arithmetic, and no caches, clocks or idle power are in it: compare estimates
  with each other, never with a wattmeter
- the range is that of Horowitz' memories alone; what a design makes of them moves far more
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# pJ of one multiplication and one addition.
_PICOJOULES = {"float32": (3.7, 0.9), "float16": (1.1, 0.4), "int8": (0.2, 0.03), "int4": (0.2 / 4, 0.03 / 2)}


@dataclass(frozen=True)
class EnergyCosts:
    """What a device spends, in pJ; the defaults are Horowitz' 45 nm.

    Args:
        mac: of one multiply-add, by dtype.
        dram, sram: of a byte of main memory and of the memory on the chip.
        dram_high, sram_high: the upper ends of their ranges; the lower ones are `dram` and `sram`.

    Raises:
        ValueError: a cost is negative, or an upper end below its lower one.
    """

    mac: Mapping[str, float] = field(default_factory=lambda: {name: sum(pj) for name, pj in _PICOJOULES.items()})
    dram: float = 640 / 4
    sram: float = 10 / 8
    dram_high: float = 2600 / 8
    sram_high: float = 100 / 8

    def __post_init__(self) -> None:
        for name, value in {
            **{f"mac {k}": v for k, v in self.mac.items()},
            "dram": self.dram,
            "sram": self.sram,
        }.items():
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0 pJ, got {value}")
        for name in ("dram", "sram"):
            if not getattr(self, f"{name}_high") >= getattr(self, name):
                raise ValueError(f"{name}_high must be at least {name}, {getattr(self, name)}")

    @classmethod
    def exactly(cls, mac: Mapping[str, float], *, dram: float, sram: float) -> EnergyCosts:
        """Costs of a device of one's own, without a range."""
        return cls(dict(mac), dram, sram, dram, sram)


@dataclass(frozen=True)
class Energy:
    """Estimated energy in mJ, with the formula that gave it, and the range over dearer memories."""

    mj: float
    formula: str
    low_mj: float
    high_mj: float


def energy_estimate(
    macs: int, bytes_moved: int, dtype: str = "float32", *, sram_bytes: int = 0, costs: EnergyCosts | None = None
) -> Energy:
    """`E = macs * e_mac + bytes_moved * e_dram + sram_bytes * e_sram`.

    Args:
        macs: multiply-adds.
        bytes_moved: bytes read from and written to main memory.
        dtype: of the multiply-adds: "float32", "float16", "int8" or "int4", or another that `costs` has.
        sram_bytes: bytes read from and written to the memory on the chip.
        costs: of the device.

    Raises:
        ValueError: no figures for `dtype`, or a negative count.
    """
    device = EnergyCosts() if costs is None else costs
    if dtype not in device.mac:
        raise ValueError(f"dtype must be one of {sorted(device.mac)}, got {dtype!r}")
    for name, count in (("macs", macs), ("bytes_moved", bytes_moved), ("sram_bytes", sram_bytes)):
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")
    e_mac = device.mac[dtype]
    low, high = (
        (macs * e_mac + bytes_moved * dram + sram_bytes * sram) * 1e-9
        for dram, sram in ((device.dram, device.sram), (device.dram_high, device.sram_high))
    )
    source = "45 nm, Horowitz 2014" if costs is None else "costs as given"
    on_chip = f" + {sram_bytes:,} bytes x {device.sram:g} pJ (SRAM)" if sram_bytes else ""
    formula = (
        f"estimate: {macs:,} MACs x {e_mac:g} pJ ({dtype}) + {bytes_moved:,} bytes x {device.dram:g} pJ (DRAM)"
        f"{on_chip} = {low:.4g} mJ, {high:.4g} with the dearest memories; {source}"
    )
    return Energy(low, formula, low, high)
