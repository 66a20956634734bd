"""The CPU kernels called with addresses. numba looks at an array argument for a microsecond and makes one from a tensor
in two, together more than a small MLP takes; an integer costs a tenth of one."""

# mypy: disable-error-code="call-arg, type-var"
# (numba's stubs describe other signatures than those of compiled code)
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from cats_kernels.cpu.compiling import jit
from cats_kernels.cpu.kernels import parallel_kernel, serial_kernel

STORED = {torch.float32: np.float32, torch.bfloat16: np.uint16}
"""How numba sees the numbers of a weight: bfloat16, which it lacks, as its bits."""


@intrinsic
def pointer(context: Any, address: Any) -> Any:
    """The pointer to an address (int64)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@cache
def addressed_kernels(dtype: torch.dtype) -> tuple[Callable[..., None], Callable[..., None]]:
    """`serial_kernel` and `parallel_kernel` for weights of a dtype, both by addresses.

    Arguments: addresses of x (rows, d) in float32, of the deciding, the other and the down weight (m, d), of the
    thresholds (count,) and of y (rows, d) in float32; rows, d, m, count; whether the activation is GELU and whether up
    decides; the number of threads.
    """
    stored: Any = STORED[dtype]

    @jit(nogil=True)
    def serial(
        x: int, deciding: int, other: int, down: int, thresholds: int, y: int,
        rows: int, d: int, m: int, count: int, gelu: bool, up_decides: bool, threads: int,
    ) -> None:  # fmt: skip
        serial_kernel(
            carray(pointer(x), (rows, d), np.float32),
            carray(pointer(deciding), (m, d), stored),
            carray(pointer(other), (m, d), stored),
            carray(pointer(down), (m, d), stored),
            carray(pointer(thresholds), (count,), np.float32),
            gelu,
            up_decides,
            carray(pointer(y), (rows, d), np.float32),
        )

    @jit(nogil=True)
    def parallel(
        x: int, deciding: int, other: int, down: int, thresholds: int, y: int,
        rows: int, d: int, m: int, count: int, gelu: bool, up_decides: bool, threads: int,
    ) -> None:  # fmt: skip
        parallel_kernel(
            carray(pointer(x), (rows, d), np.float32),
            carray(pointer(deciding), (m, d), stored),
            carray(pointer(other), (m, d), stored),
            carray(pointer(down), (m, d), stored),
            carray(pointer(thresholds), (count,), np.float32),
            gelu,
            up_decides,
            carray(pointer(y), (rows, d), np.float32),
            threads,
        )

    return serial, parallel
