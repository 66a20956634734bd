"""`Problem` on quantised weights: the float64 truth about what they dequantise to."""

from __future__ import annotations

import torch
from torch import Tensor

from cats_kernels.problem import Problem, oracle, products
from cats_kernels.quantized import QuantizedWeight, dequantize, quantize
from cats_kernels.thresholds import Threshold

QuantizedArguments = tuple[Tensor, QuantizedWeight, QuantizedWeight, QuantizedWeight, Threshold, str, str]


class QuantizedProblem(Problem):
    """Weights at random, quantised, and inputs; ``gate``, ``up`` and ``down_t`` are the dequantised ones in float32.

    Attributes:
        weights: gate, up and transposed down projection, quantised.
        original: the same before, in the dtype of x.
    """

    def __init__(
        self,
        d: int,
        m: int,
        rows: int,
        bits: int,
        group_size: int | None = None,
        symmetric: bool = True,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        activation: str = "silu",
        decider: str = "gate",
    ) -> None:
        super().__init__(d, m, rows, dtype, device, seed, activation, decider)
        self.original = self.gate, self.up, self.down_t
        gate, up, down_t = (quantize(weight, bits, group_size, symmetric) for weight in self.original)
        self.requantize(gate, up, down_t)

    def requantize(self, gate: QuantizedWeight, up: QuantizedWeight, down_t: QuantizedWeight) -> None:
        """Take other weights of the same shapes."""
        self.weights = gate, up, down_t
        self.gate, self.up, self.down_t = (dequantize(weight) for weight in self.weights)
        self.v, self.u = products(self.x, self.gate, self.up, self.activation)

    def oracle(self, threshold: Threshold) -> Tensor:
        """The output in float64, (rows, d), for what x holds now."""
        arguments = (self.x, self.gate, self.up, self.down_t, threshold, self.activation, self.decider)
        return oracle(*arguments)

    def quantized_arguments(self, threshold: Threshold) -> QuantizedArguments:
        """`arguments` with the quantised weights."""
        return self.x, *self.weights, threshold, self.activation, self.decider

    def bytes_read(self, threshold: Threshold) -> int:
        """Bytes of weights, scales and zero points that a call must read."""
        gate, up, down_t = self.weights
        deciding, other = (gate, up) if self.decider == "gate" else (up, gate)
        return deciding.nbytes + self.active(threshold) * (other.bytes_per_row + down_t.bytes_per_row)
