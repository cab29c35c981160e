"""The training loop, its settings, moving averages, distillation, and runs that survive a kill."""

from gossamer.train.runs import train_model
from gossamer.train.settings import Settings
from gossamer.train.trainer import Diverged, Trainer

__all__ = ["Diverged", "Settings", "Trainer", "train_model"]
