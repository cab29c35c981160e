"""An estimate of energy from operation counts. Not a measurement.

Source: Horowitz 2014, "Computing's energy problem (and what we can do about it)", ISSCC, figure 1.1.9: energy
of one operation in a 45 nm process at 0.9 V; the DRAM access of 640 pJ for 32 bits as tabulated from it by
Han et al. 2015, "Learning both Weights and Connections for Efficient Neural Networks", figure 1.

- newer processes spend less on arithmetic, and no caches, clocks or idle power are in it: compare estimates
  with each other, never with a wattmeter
"""

from __future__ import annotations

from dataclasses import dataclass

# pJ of one multiplication and one addition.
_PICOJOULES = {"float32": (3.7, 0.9), "float16": (1.1, 0.4), "int8": (0.2, 0.03)}
_DRAM = 640 / 4  # pJ for a byte


@dataclass(frozen=True)
class Energy:
    """Estimated energy in mJ, with the formula that gave it."""

    mj: float
    formula: str


def energy_estimate(macs: int, bytes_moved: int, dtype: str = "float32") -> Energy:
    """`E = macs * (multiply + add) + bytes_moved * DRAM`.

    Args:
        macs: multiply-adds.
        bytes_moved: bytes read from and written to main memory.
        dtype: "float32", "float16" or "int8".

    Raises:
        ValueError: no figures for `dtype`.
    """
    if dtype not in _PICOJOULES:
        raise ValueError(f"dtype must be one of {sorted(_PICOJOULES)}, got {dtype!r}")
    multiply, add = _PICOJOULES[dtype]
    mj = (macs * (multiply + add) + bytes_moved * _DRAM) * 1e-9
    formula = (
        f"estimate: {macs:,} MACs x ({multiply} + {add}) pJ ({dtype}) + {bytes_moved:,} bytes x {_DRAM:g} pJ "
        f"(DRAM) = {mj:.4g} mJ; 45 nm, Horowitz 2014"
    )
    return Energy(mj, formula)
