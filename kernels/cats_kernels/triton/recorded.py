"""Launches made again: a plan that was launched once, enqueued for other tensors by filling in addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from cats_kernels.thresholds import ONE, kind_of
from cats_kernels.triton.launch import Call, Launch, cdiv

Enqueue = Callable[[int, list[Any]], object]
"""Enqueues one compiled kernel, given a stream's address and all of the kernel's arguments."""
ALIGNMENT = 256
"""Bytes; Triton compiles for pointers that are multiples of 16, and torch allocates in multiples of 512."""


class Recorded:
    """The launches of a plan and what Triton compiled for them, to be made again on other tensors of the same kind.

    Triton's launcher looks at every argument of every launch anew, and planning makes a tensor for every buffer:
    together more than a whole MLP takes on a GPU. Here a call fills in addresses, and takes its buffers as one.

    Attributes:
        size: bytes of all buffers together.
        steps: of each launch what enqueues it, its arguments, and (position, source) of those that a call fills in: a
            field of the call, or the offset of a buffer.
    """

    def __init__(self, launches: Sequence[Launch]) -> None:
        """Enqueues the launches. Arguments that are neither fields of a call nor buffers are the same in all calls."""
        offsets: dict[int, int] = {}  # of the plan's buffers in one
        self.size = 0
        self.steps: list[tuple[Enqueue, list[Any], list[tuple[int, str | int]]]] = []
        for step in launches:
            named = {**step.buffers, **step.constants}
            values: list[Any] = [named.get(name) for name in step.kernel.arg_names]
            sources: list[tuple[int, str | int]] = []
            for position, (name, value) in enumerate(zip(step.kernel.arg_names, values, strict=True)):
                if name in step.fields:
                    sources.append((position, step.fields[name]))
                elif isinstance(value, Tensor):
                    values[position] = None  # not kept alive
                    if id(value) not in offsets:
                        offsets[id(value)] = self.size
                        self.size += cdiv(value.nbytes, ALIGNMENT) * ALIGNMENT
                    sources.append((position, offsets[id(value)]))
            grid = (*step.grid, 1, 1)[:3]
            self.steps.append((enqueue_by(step(), grid), values, sources))

    def __call__(self, call: Call) -> None:
        """Enqueue the same launches for another call on the current stream."""
        fields: dict[str, Any] = {name: getattr(call, name).data_ptr() for name in call.TENSORS}
        threshold = call.threshold
        fields["threshold"] = threshold.data_ptr() if isinstance(threshold, Tensor) else threshold
        buffer = torch.empty(self.size, dtype=torch.uint8, device=call.x.device)
        base, stream = buffer.data_ptr(), current_stream(call.x.device.index)
        for enqueue, values, sources in self.steps:
            filled = values.copy()  # another thread may be here too
            for position, source in sources:
                filled[position] = base + source if isinstance(source, int) else fields[source]
            enqueue(stream, filled)


class Repeated:
    """A recorded plan with the addresses of one block's weights and threshold, for calls that differ in x alone."""

    def __init__(self, recorded: Recorded, call: Call) -> None:
        self.size, self.device, self.index = recorded.size, call.x.device, call.x.device.index
        threshold = call.threshold
        fixed: dict[Any, Any] = {name: getattr(call, name).data_ptr() for name in call.TENSORS}
        fixed["threshold"] = threshold.data_ptr() if isinstance(threshold, Tensor) else threshold
        self.steps: list[tuple[Enqueue, list[Any], list[tuple[int, int, int]]]] = []
        for enqueue, values, sources in recorded.steps:
            filled, varying = values.copy(), []
            for position, source in sources:
                if isinstance(source, int):
                    varying.append((position, 2, source))
                elif source in ("x", "y"):
                    varying.append((position, "xy".index(source), 0))
                else:
                    filled[position] = fixed[source]
            self.steps.append((enqueue, filled, varying))

    def __call__(self, x: Tensor) -> Tensor | None:
        """y for contiguous x of the shape, dtype and device that was recorded; None where this takes a closer look:
        x is not aligned, or its device not the current one."""
        address = x.data_ptr()
        if address % 16 or (self.index is not None and torch._C._cuda_getDevice() != self.index):
            return None
        y = torch.empty_like(x)
        buffer = torch.empty(self.size, dtype=torch.uint8, device=self.device)
        bases, stream = (address, y.data_ptr(), buffer.data_ptr()), current_stream(self.index)
        for enqueue, values, varying in self.steps:
            filled = values.copy()
            for position, base, offset in varying:
                filled[position] = bases[base] + offset
            enqueue(stream, filled)
        return y


def current_stream(index: int | None) -> int:
    """The address of the current stream of a CUDA device; 0 on the CPU, where index is None."""
    return 0 if index is None else int(torch._C._cuda_getCurrentRawStream(index))


def enqueue_by(kernel: Any, grid: tuple[int, ...]) -> Enqueue:
    """What enqueues a kernel that Triton compiled.

    Triton's own ``kernel[grid]`` makes a dictionary and calls two chains of hooks in every launch, which are empty
    unless a profiler has put hooks there; this goes past them to the same launcher.
    """
    runtime, with_hooks = knobs.runtime, kernel[grid]
    try:
        launch = partial(kernel.run, *grid)
        options = kernel.function, kernel.packed_metadata, None, None, None
    except AttributeError:  # another version of Triton, or the stand-in of a test
        return lambda stream, arguments: with_hooks(*arguments)

    def enqueue(stream: int, arguments: list[Any]) -> None:
        if getattr(runtime.launch_enter_hook, "calls", True) or getattr(runtime.launch_exit_hook, "calls", True):
            with_hooks(*arguments, stream=stream)
        else:
            launch(stream, *options, *arguments)

    return enqueue


def aligned(call: Call) -> bool:
    """Whether all tensors of a call lie at multiples of 16 bytes: kernels compiled for one such call serve another. A
    threshold of one element is loaded alone, wherever it lies."""
    if any(getattr(call, name).data_ptr() % 16 for name in call.TENSORS):
        return False
    threshold = call.threshold
    return not isinstance(threshold, Tensor) or kind_of(threshold) == ONE or threshold.data_ptr() % 16 == 0
