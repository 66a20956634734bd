"""Launch configurations of the Triton kernel for quantised weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from cats_kernels.triton.configs import SHARED_MEMORY, Config, rows_waiting


@dataclass(frozen=True)
class QuantizedConfig(Config):
    """`Config`, and how packed rows are loaded."""

    paired: bool = True  # scales of 2 bytes in pairs, which can be asynchronous copies
    chunk: int = 0  # bytes of a row that go with one load of a scale; 0: as many as a load of x has columns


CONFIGS: dict[tuple[int, int, int], QuantizedConfig] = {
    (8, 2, 1): QuantizedConfig(4, 2, warps=4, programs=2, gate_stages=3, stages=3),
    (8, 2, 2): QuantizedConfig(2, 1, warps=4, programs=1, gate_stages=3, stages=3),
    (8, 4, 1): QuantizedConfig(4, 1, warps=4, programs=2, gate_stages=3, stages=3),
    (8, 4, 2): QuantizedConfig(2, 1, warps=4, programs=1, gate_stages=3, stages=3),
    (4, 2, 1): QuantizedConfig(4, 2, warps=4, programs=3, gate_stages=4, stages=4),
    (4, 2, 2): QuantizedConfig(4, 1, warps=4, programs=1, gate_stages=3, stages=3),
    (4, 4, 1): QuantizedConfig(4, 1, warps=4, programs=2, gate_stages=3, stages=4),
    (4, 4, 2): QuantizedConfig(4, 1, warps=4, programs=1, gate_stages=3, stages=3),
}
"""(bits, bytes of an element of x, rows of x) -> configuration, for rows of 1024 bytes and more."""
NARROW = QuantizedConfig(8, 8, warps=4, programs=4)
"""For narrower weights."""


@cache
def choose_quantized_config(
    bits: int, element_size: int, rows: int, row_bytes: int, scale_bytes: int, arch: int = 90
) -> QuantizedConfig:
    """The launch configuration.

    Args:
        bits: of the weights.
        element_size: bytes of an element of x.
        rows: of x, one or two.
        row_bytes, scale_bytes: of a packed row, and of its scales and zero points as they wait in shared memory.
        arch: compute capability; programs that its shared memory has no room for at one time are not started.
    """
    if row_bytes < 1024:
        return NARROW
    config = CONFIGS[bits, element_size, rows]
    room = SHARED_MEMORY.get(arch, 64) * 1024 // (rows_waiting(config) * (row_bytes + scale_bytes))
    return replace(config, programs=max(1, min(config.programs, room)))
