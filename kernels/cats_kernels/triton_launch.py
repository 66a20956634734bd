"""What a launch is, as data: one list of launches is run on a GPU, interpreted on a CPU, or compiled ahead."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Target:
    """The chip a plan is made for: compute capability (90 for Hopper), streaming multiprocessors, dependent launch."""

    arch: int
    processors: int
    dependent_launch: bool


@dataclass(frozen=True)
class Call:
    """One call of the sparse gated MLP: x (rows, d) and weights (m, d) into y (rows, d), on one chip."""

    x: Tensor
    gate_weight: Tensor
    up_weight: Tensor
    down_weight_t: Tensor
    threshold: float
    activation: str
    y: Tensor
    target: Target

    @property
    def rows(self) -> int:
        """Rows of x."""
        return self.x.shape[0]

    @property
    def d(self) -> int:
        """Columns of x and of a weight row."""
        return self.x.shape[1]

    @property
    def m(self) -> int:
        """Neurons."""
        return self.gate_weight.shape[0]

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor beside x; the kernels write all that they read."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)


@dataclass
class Launch:
    """One kernel launch: arguments by name, compile-time constants by name, and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    dependent: bool = False  # may start before its predecessor has finished, and waits for it inside

    def compiler_options(self) -> dict[str, Any]:
        """Triton's compile options; dependent launch is named only where it is used, since not every version has it."""
        return {"num_warps": self.warps, **({"launch_pdl": True} if self.dependent else {})}

    def __call__(self) -> None:
        """Enqueue the kernel on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.compiler_options())

    def compile(self) -> None:
        """Compile for the current device into Triton's cache without running; tensors may be on "meta"."""
        values = [self.arguments[name] for name in self.kernel.arg_names if name in self.arguments]
        types = [value.dtype if isinstance(value, Tensor) else value for value in values]
        self.kernel.warmup(*types, grid=self.grid, **self.constants, **self.compiler_options())


@cache
def target_of(device: torch.device) -> Target:
    """The target of a CUDA device; a small one, without dependent launch, for the interpreter on the CPU.

    Raises:
        ValueError: for a device the kernels cannot run on.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        arch = 10 * properties.major + properties.minor
        # dependent launch exists from compute capability 9.0
        return Target(arch, properties.multi_processor_count, arch >= 90 and not INTERPRETED)
    if INTERPRETED:
        return Target(arch=90, processors=2, dependent_launch=False)
    raise ValueError(f"The Triton kernels need CUDA tensors, or TRITON_INTERPRET=1 set before import, not {device}.")


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, k: int) -> int:
    """n / k rounded up; triton.cdiv, made for kernels, takes 4 microseconds a call on the host, this one 0.1."""
    return -(-n // k)
