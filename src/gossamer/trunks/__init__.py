"""The few skeletons every system is an instance of.

A trunk takes parts; a system is a trunk with its parts filled in."""

from gossamer.trunks.isotropic import Isotropic
from gossamer.trunks.pyramid import Pyramid
from gossamer.trunks.seq2seq import Seq2Seq

__all__ = ["Isotropic", "Pyramid", "Seq2Seq"]
