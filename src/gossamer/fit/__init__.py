"""The main job: data and a budget in; the best small transformer that fits out, with its evidence."""

from gossamer.fit.advise import advise
from gossamer.fit.options import FitOptions, FitResult
from gossamer.fit.predict import predict
from gossamer.fit.run import fit

__all__ = ["FitOptions", "FitResult", "advise", "fit", "predict"]
