"""The sparse gated MLP of CATS as an operator: ``sparse_gated_mlp`` and its plain PyTorch reference."""

from cats_kernels.operator import BACKENDS, MAX_ROWS, sparse_gated_mlp
from cats_kernels.reference import gate_activation, sparse_gated_mlp_reference

__all__ = ["BACKENDS", "MAX_ROWS", "gate_activation", "sparse_gated_mlp", "sparse_gated_mlp_reference"]
