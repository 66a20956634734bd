"""Launch configurations of our Triton kernels, found on an H200 by ``python -m experiments.gpu.tune``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from cats_kernels.triton.launch import power_of_2


@dataclass(frozen=True)
class Config:
    """Launch parameters of our kernels, chosen by measurement (with the gate deciding). A tile is a number of weight
    rows, a stage a tile that a program has asked for before it needs it."""

    gate_tile: int  # of the deciding weight
    tile: int  # of the other weight and W_down (fused), or of the other weight
    warps: int
    programs: int  # per streaming multiprocessor
    gate_stages: int = 1  # of the deciding weight, if fused
    stages: int = 1  # of the other weight and W_down, or of all weights with dot
    parts: int = 1  # fused, if over 1: each program takes its neurons in two parts, divided at one of so many places
    dot: bool = False  # products on tensor cores, each in a kernel of its own; tiles of 16 rows a warp
    columns: int = 128  # of x and the deciding or the other weight in one stage, with dot
    down_block: int = 512  # columns, and
    down_tile: int = 16  # weight rows, of the down kernel, with dot
    reduce_block: int = 32  # columns that a program of the reduction sums, if fused
    dependent: bool = True  # programmatic dependent launch, where the chip has it
    early: bool = False  # with it, if fused: a program asks for its first weight rows before it waits (`fused_kernel`)


TENSOR_CORES = Config(64, 64, warps=4, programs=2, stages=4, dot=True, down_block=512, down_tile=16)
CONFIGS: dict[tuple[int, int], Config] = {
    (2, 1): Config(2, 1, warps=4, programs=2, gate_stages=4, stages=4),
    (2, 2): Config(4, 2, warps=4, programs=1, gate_stages=4, stages=4),
    (2, 8): TENSOR_CORES,
    (4, 1): Config(1, 2, warps=8, programs=1, gate_stages=6, stages=3, early=True),
    (4, 2): Config(1, 1, warps=4, programs=1, gate_stages=6, stages=5, parts=8),
    (4, 4): Config(2, 1, warps=8, programs=1, gate_stages=4, stages=4),
    (4, 8): replace(TENSOR_CORES, columns=64, down_block=256, dependent=False),
}
"""(bytes of a weight, most rows of x) -> configuration, for widths from 1024 up; where there is no (2, 4), (2, 8)."""
NARROW = Config(8, 8, warps=4, programs=4)
"""For narrower weights and one or two rows: a weight row is less than one load of 8 warps."""
MAX_FUSED_WIDTH = 8192  # columns of x and of sums, in float32, that a program of 4 warps can keep in registers


SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Compute capability -> KB of shared memory that a program can have (CUDA C++ Programming Guide); 64 elsewhere."""


@cache
def choose_config(element_size: int, rows: int, d: int, arch: int = 90) -> Config:
    """The launch configuration for weights of element_size bytes, rows of x (1 to 8), width d and a chip."""
    most, width = power_of_2(rows), power_of_2(d)
    config = CONFIGS.get((element_size, most), CONFIGS[element_size, 8])
    if config.dot or most * width > MAX_FUSED_WIDTH * (2 if most == 4 else 1) or (most == 4 and d < 1024):
        return CONFIGS[element_size, 8]
    if d < 1024:
        config = NARROW
    if arch < 90:  # without dependent launch there is nothing to begin early, and it takes shared memory
        config = replace(config, early=False)
    # d = 5120 is padded to 8192, where two rows in three stages of float32 are 262 KB
    one = replace(config, programs=1)
    smaller = (config, one, replace(one, gate_tile=1, tile=1), replace(config, gate_stages=1, stages=1, programs=2))
    room = SHARED_MEMORY.get(arch, 64) * 1024 // (width * element_size)
    return next(one for one in smaller if one.programs * rows_waiting(one) <= room)


def rows_waiting(config: Config) -> int:
    """Weight rows that a program of the fused kernel has in shared memory at a time."""
    return max((config.gate_stages - 1) * config.gate_tile, 2 * (config.stages - 1) * config.tile)
