"""What a launch is, as data: one list of launches is run on a GPU, interpreted on a CPU, or compiled ahead."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from cats_kernels.thresholds import Threshold, kind_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Target:
    """The chip a plan is made for: compute capability (90 for Hopper), streaming multiprocessors, dependent launch."""

    arch: int
    processors: int
    dependent_launch: bool


@dataclass(frozen=True)
class Call:
    """One call of the sparse gated MLP: x (rows, d) and weights (m, d) into y (rows, d), on one chip.

    ``TENSORS`` are its fields that are always tensors.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("x", "gate_weight", "up_weight", "down_weight_t", "y")
    x: Tensor
    gate_weight: Tensor
    up_weight: Tensor
    down_weight_t: Tensor
    threshold: Threshold
    activation: str
    y: Tensor
    target: Target
    decider: str = "gate"

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

    @property
    def deciding(self) -> str:
        """The field of the weight that is read whole."""
        return "gate_weight" if self.decider == "gate" else "up_weight"

    @property
    def other(self) -> str:
        """The field of the weight whose active rows are read."""
        return "up_weight" if self.decider == "gate" else "gate_weight"

    @property
    def rule(self) -> dict[str, Any]:
        """The compile-time constants of a kernel that compares with the threshold."""
        return {"THRESHOLD": kind_of(self.threshold), "UP_DECIDES": self.decider == "up", "ACTIVATION": self.activation}

    def buffer(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """An uninitialised tensor beside x; the kernels write all that they read."""
        return torch.empty(shape, dtype=dtype, device=self.x.device)


@dataclass
class Launch:
    """One kernel launch: arguments by name, compile-time constants by name, and the compiler's options.

    ``fields`` names the arguments that are a tensor (or the threshold) of the call; another call of the same kind has
    others. The rest of ``arguments`` are buffers and sizes.
    """

    kernel: Any
    grid: tuple[int, ...]
    call: Call
    fields: dict[str, str]  # kernel argument -> field of the call
    buffers: dict[str, Any]  # kernel argument -> buffer, or a number that all calls of the kind share
    constants: dict[str, Any]
    warps: int
    dependent: bool = False  # may start before its predecessor has finished, and waits for it inside

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments that are no compile-time constants, by name."""
        return {**{name: getattr(self.call, field) for name, field in self.fields.items()}, **self.buffers}

    def compiler_options(self) -> dict[str, Any]:
        """Triton's compile options; dependent launch is named only where it is used, since not every version has it."""
        return {"num_warps": self.warps, **({"launch_pdl": True} if self.dependent else {})}

    def __call__(self) -> Any:
        """Enqueue the kernel on the current stream; returns what Triton compiled."""
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.compiler_options())

    def compile(self) -> None:
        """Compile for the current device into Triton's cache without running; tensors may be on "meta"."""
        arguments = self.arguments
        values = [arguments[name] for name in self.kernel.arg_names if name in arguments]
        types = [value.dtype if isinstance(value, Tensor) else value for value in values]
        self.kernel.warmup(*types, grid=self.grid, **self.constants, **self.compiler_options())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, at no cost where it is, or where it is no GPU."""
    here = device.type != "cuda" or device.index in (None, torch.cuda.current_device())
    return nullcontext() if here else torch.cuda.device(device)


def run(launches: Sequence[Launch], device: torch.device) -> None:
    """Enqueue launches on the current stream of a device, or interpret them on the CPU."""
    with on(device):
        for step in launches:
            step()


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
