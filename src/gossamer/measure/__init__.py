"""The cost of a module on a device: parameters, MACs, latency, memory, energy."""

from .activations import Activations, activations
from .device import device_info, device_key
from .energy import Energy, EnergyCosts, energy_estimate
from .macs import MacCount, macs, register_macs
from .memory import PeakMemory, peak_memory
from .parameters import parameter_table, parameters, weight_bytes
from .report import measure_model
from .table import LatencyTable
from .timing import Latency, distinguishable, latency

__all__ = [
    "Activations",
    "Energy",
    "EnergyCosts",
    "Latency",
    "LatencyTable",
    "MacCount",
    "PeakMemory",
    "activations",
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
