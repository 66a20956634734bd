"""Launch configurations of the Triton kernel for quantised weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from cats_kernels.triton.configs import Config


@dataclass(frozen=True)
class QuantizedConfig(Config):
    """`Config`, and whether scales of 2 bytes are loaded in pairs, which can be asynchronous copies."""

    paired: bool = True


CONFIGS: dict[tuple[int, int], QuantizedConfig] = {
    (8, 1): QuantizedConfig(4, 2, warps=4, programs=2, gate_stages=3, stages=3),
    (8, 2): QuantizedConfig(2, 1, warps=4, programs=1, gate_stages=3, stages=3),
    (4, 1): QuantizedConfig(4, 2, warps=4, programs=3, gate_stages=4, stages=4),
    (4, 2): QuantizedConfig(4, 2, warps=4, programs=1, gate_stages=3, stages=3),
}
"""(bits, most rows of x) -> configuration, for rows of 1024 bytes and more."""
NARROW = QuantizedConfig(8, 8, warps=4, programs=4)
"""For narrower weights."""


@cache
def choose_quantized_config(bits: int, rows: int, row_bytes: int) -> QuantizedConfig:
    """The launch configuration for one or two rows of x and packed weight rows of so many bytes."""
    return CONFIGS[bits, rows] if row_bytes >= 1024 else NARROW
