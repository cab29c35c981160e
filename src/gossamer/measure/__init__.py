"""The cost of a module on a device: parameters, MACs, latency, memory, energy."""

from .device import device_info, device_key
from .energy import Energy, energy_estimate
from .macs import MacCount, macs, register_macs
from .memory import PeakMemory, peak_memory
from .parameters import parameter_table, parameters, weight_bytes
from .report import measure_model
from .table import LatencyTable
from .timing import Latency, distinguishable, latency

__all__ = [
    "Energy",
    "Latency",
    "LatencyTable",
    "MacCount",
    "PeakMemory",
    "device_info",
    "device_key",
    "distinguishable",
    "energy_estimate",
    "latency",
    "macs",
    "measure_model",
    "parameter_table",
    "parameters",
    "peak_memory",
    "register_macs",
    "weight_bytes",
]
