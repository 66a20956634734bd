"""CATS: contextually-aware thresholding for sparsity in gated-MLP language models (arXiv 2404.08763).

thresholds = cats.calibrate(model, batches, sparsity=0.5)
cats.apply(model, thresholds)
model.generate(...)
cats.remove(model)

Names are imported at their first use: `cats.files` and `cats.criteria` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cats.activation import CATSActivation, threshold_activation
    from cats.calibration import calibrate
    from cats.generation import generate
    from cats.patching import apply, remove
    from cats.quantization import dequantize, quantize
    from cats.quantized_files import load_quantized, save_quantized
    from cats.relufication import relufy
    from cats.sparsity import measure_sparsity
    from cats.structure import gated_mlps
    from cats.thresholds import Thresholds

_HOMES = {
    "CATSActivation": "activation",
    "Thresholds": "thresholds",
    "apply": "patching",
    "calibrate": "calibration",
    "dequantize": "quantization",
    "gated_mlps": "structure",
    "generate": "generation",
    "load_quantized": "quantized_files",
    "measure_sparsity": "sparsity",
    "quantize": "quantization",
    "relufy": "relufication",
    "remove": "patching",
    "save_quantized": "quantized_files",
    "threshold_activation": "activation",
}

__all__ = [
    "CATSActivation",
    "Thresholds",
    "apply",
    "calibrate",
    "dequantize",
    "gated_mlps",
    "generate",
    "load_quantized",
    "measure_sparsity",
    "quantize",
    "relufy",
    "remove",
    "save_quantized",
    "threshold_activation",
]


def __getattr__(name: str) -> Any:
    if name == "criteria":
        return import_module("cats.criteria")
    if name not in _HOMES:
        raise AttributeError(f"module 'cats' has no attribute {name!r}")
    value = getattr(import_module(f"cats.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
