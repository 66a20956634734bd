"""The sparse gated MLP of CATS as an operator: ``sparse_gated_mlp`` and its plain PyTorch reference."""

from cats_kernels.dispatch import BACKENDS, path_of
from cats_kernels.operator import sparse_gated_mlp
from cats_kernels.quantized import QuantizedWeight, dequantize, quantize
from cats_kernels.reference import DECIDERS, gate_activation, sparse_gated_mlp_reference
from cats_kernels.weights import MAX_ROWS

__all__ = [
    "BACKENDS",
    "DECIDERS",
    "MAX_ROWS",
    "QuantizedWeight",
    "dequantize",
    "gate_activation",
    "path_of",
    "quantize",
    "sparse_gated_mlp",
    "sparse_gated_mlp_reference",
]
