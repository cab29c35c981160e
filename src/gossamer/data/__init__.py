"""Readers: whatever the user points at, as one `Dataset` of three splits."""

from gossamer.data.base import DataError, Dataset, Split
from gossamer.data.read import read_dataset

__all__ = ["DataError", "Dataset", "Split", "read_dataset"]
