"""Searches of network shapes: supernets, cost tables of this device, and the moves between shapes."""

from gossamer.search.slimming import slim_efficientformer

__all__ = ["slim_efficientformer"]
