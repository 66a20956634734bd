"""CATS: contextually-aware thresholding for sparsity in gated-MLP language models (arXiv 2404.08763).

thresholds = cats.calibrate(model, batches, sparsity=0.5)
cats.apply(model, thresholds)
model.generate(...)
cats.remove(model)
"""

from cats.activation import CATSActivation, threshold_activation
from cats.calibration import Thresholds, calibrate
from cats.patching import apply, remove
from cats.relufication import relufy
from cats.sparsity import measure_sparsity
from cats.structure import gated_mlps

__all__ = [
    "CATSActivation",
    "Thresholds",
    "apply",
    "calibrate",
    "gated_mlps",
    "measure_sparsity",
    "relufy",
    "remove",
    "threshold_activation",
]
