"""Launch configurations of the Triton kernel for quantised weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from cats_kernels.triton.configs import SHARED_MEMORY, Config, rows_waiting


@dataclass(frozen=True)
class QuantizedConfig(Config):
    """`Config`, but for ``parts``, and how packed rows are loaded."""

    paired: bool = True  # scales of 2 bytes in pairs, which can be asynchronous copies
    chunk: int = 0  # bytes of a row that go with one load of a scale; 0: as many as a load of x has columns
    words: bool = True  # four bytes of a row at a time, where they can be (`cats_kernels.triton.quantized_words`)


CONFIGS: dict[tuple[int, int, int], QuantizedConfig] = {
    (8, 2, 1): QuantizedConfig(4, 2, warps=4, programs=2, gate_stages=3, stages=3, chunk=16),
    (8, 2, 2): QuantizedConfig(2, 1, warps=4, programs=2, gate_stages=4, stages=4, chunk=16),
    (8, 4, 1): QuantizedConfig(4, 1, warps=4, programs=2, gate_stages=3, stages=3),
    (8, 4, 2): QuantizedConfig(2, 1, warps=4, programs=1, gate_stages=3, stages=3),
    (4, 2, 1): QuantizedConfig(2, 1, warps=4, programs=3, gate_stages=4, stages=4, chunk=16),
    (4, 2, 2): QuantizedConfig(2, 1, warps=4, programs=2, gate_stages=4, stages=4, chunk=16),
    (4, 4, 1): QuantizedConfig(4, 1, warps=4, programs=2, gate_stages=3, stages=4),
    (4, 4, 2): QuantizedConfig(4, 1, warps=4, programs=1, gate_stages=3, stages=3),
}
"""(bits, bytes of an element of x, rows of x) -> configuration, for rows of 1024 bytes and more. Those of 2 bytes an
element are the fastest of experiments.gpu.tune_quantized on an H100, at both 7B shapes, 50 and 90 %, or within 2 % of
them; int4 in groups of 32 would be up to 5 % faster with tiles of two rows."""
GROUPED: dict[tuple[int, int, int], QuantizedConfig] = {
    (8, 2, 1): QuantizedConfig(2, 1, warps=4, programs=3, gate_stages=4, stages=4, chunk=16),
}
"""The same for several groups per row, where that differs."""
NARROW = QuantizedConfig(8, 8, warps=4, programs=4)
"""For narrower weights."""


@cache
def choose_quantized_config(
    bits: int, element_size: int, rows: int, row_bytes: int, grouped: bool = True
) -> QuantizedConfig:
    """The launch configuration.

    Args:
        bits: of the weights.
        element_size: bytes of an element of x.
        rows: of x, one or two.
        row_bytes: of a packed row.
        grouped: whether a row has several groups.
    """
    if row_bytes < 1024:
        return NARROW
    key = bits, element_size, rows
    return GROUPED[key] if grouped and key in GROUPED else CONFIGS[key]


@cache
def that_fit(config: QuantizedConfig, waiting_bytes: int, arch: int) -> QuantizedConfig:
    """With no more programs than the shared memory of this compute capability has room for at one time, each row that
    waits there having so many bytes: packed, and of scales and zero points."""
    if not rows_waiting(config):
        return config
    room = SHARED_MEMORY.get(arch, 64) * 1024 // (rows_waiting(config) * waiting_bytes)
    return replace(config, programs=max(1, min(config.programs, room)))
