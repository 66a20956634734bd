"""What a launch is, as data: one list of launches is run on a GPU, interpreted on a CPU, or compiled ahead."""

from __future__ import annotations

import os
from collections.abc import Sequence
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

    def __call__(self) -> Any:
        """Enqueue the kernel on the current stream; returns what Triton compiled."""
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.compiler_options())

    def compile(self) -> None:
        """Compile for the current device into Triton's cache without running; tensors may be on "meta"."""
        values = [self.arguments[name] for name in self.kernel.arg_names if name in self.arguments]
        types = [value.dtype if isinstance(value, Tensor) else value for value in values]
        self.kernel.warmup(*types, grid=self.grid, **self.constants, **self.compiler_options())


class Recorded:
    """The launches of a plan and what Triton compiled for them, to be made again on other tensors of the same kind.

    Triton's launcher looks at every argument of every launch anew, and planning makes a tensor for every buffer:
    together more than a whole MLP takes on a GPU. Here a call fills in addresses, and takes its buffers as one.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        """Enqueues the launches. Arguments that are no tensor of a call and no threshold are the same in all calls."""
        offsets: dict[int, int] = {}  # of the plan's buffers in one
        self.size = 0
        self.steps: list[tuple[Any, list[Any], list[tuple[int, str | int]]]] = []
        for step in launches:
            named = {**step.arguments, **step.constants}
            values: list[Any] = [named[name] for name in step.kernel.arg_names]
            places: list[tuple[int, str | int]] = []
            for place, (name, value) in enumerate(zip(step.kernel.arg_names, values, strict=True)):
                if isinstance(value, Tensor):
                    values[place] = None  # not kept alive
                if name in CALL_ARGUMENTS or name == "threshold":
                    places.append((place, name))
                elif isinstance(value, Tensor):
                    if id(value) not in offsets:
                        offsets[id(value)] = self.size
                        self.size += cdiv(value.nbytes, ALIGNMENT) * ALIGNMENT
                    places.append((place, offsets[id(value)]))
            grid = (*step.grid, 1, 1)[:3]
            self.steps.append((step()[grid], values, places))

    def __call__(self, call: Call) -> None:
        """Enqueue the same launches for another call on the current stream."""
        buffer = torch.empty(self.size, dtype=torch.uint8, device=call.x.device)
        base = buffer.data_ptr()
        given: dict[str, Any] = {name: getattr(call, field).data_ptr() for name, field in CALL_ARGUMENTS.items()}
        given["threshold"] = call.threshold
        for enqueue, values, places in self.steps:
            filled = values.copy()
            for place, source in places:
                filled[place] = base + source if isinstance(source, int) else given[source]
            enqueue(*filled)


CALL_ARGUMENTS = {
    "x_ptr": "x", "gate_ptr": "gate_weight", "up_ptr": "up_weight", "down_ptr": "down_weight_t", "y_ptr": "y"
}  # fmt: skip
"""A kernel's argument -> the field of `Call` that it always is."""
ALIGNMENT = 256
"""Bytes; Triton compiles for pointers that are multiples of 16, and torch allocates in multiples of 512."""


def aligned(call: Call) -> bool:
    """Whether all tensors of a call lie at multiples of 16 bytes: kernels compiled for one such call serve another."""
    return not any(getattr(call, field).data_ptr() % 16 for field in CALL_ARGUMENTS.values())


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
