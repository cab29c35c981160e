"""Suites that compare what the other floors offer, on equal terms and on the device at hand."""

from gossamer.bench.mixers import bench_mixers

__all__ = ["bench_mixers"]
