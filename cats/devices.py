"""Devices, dtypes and modes of modules: where a block computes, in what, and how to look at it undisturbed."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def resolve_device(device: str, *more: str) -> str:
    """``auto`` becomes ``cuda`` where there is one, else ``cpu``; ``cpu``, ``cuda``, ``cuda:N`` and ``more`` stay.

    Raises:
        ValueError: another name, or a CUDA device that does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    if device not in more and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(
            f"unknown device {device!r}: allowed are {', '.join(('auto', 'cpu', 'cuda', 'cuda:N', *more))}"
        )
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= count:
        seen = {0: "no CUDA device", 1: "only cuda:0"}.get(count, f"only cuda:0 to cuda:{count - 1}")
        raise ValueError(f"device {device!r} was asked for, but torch {torch.__version__} sees {seen} here")
    return device


def execution_device(module: nn.Module) -> torch.device:
    """Where ``module`` computes: its first tensor's device or, when accelerate has offloaded that, its hooks'.

    Modules without a tensor of their own, such as what torch's dynamic quantisation leaves, compute on the CPU.
    """
    tensor: torch.Tensor | None = next(module.parameters(), None)
    if tensor is None:
        tensor = next(module.buffers(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    if device.type == "meta":
        for part in module.modules():
            hook: Any = getattr(part, "_hf_hook", None)
            for single in getattr(hook, "hooks", (hook,)):  # accelerate chains several in a SequentialHook
                if getattr(single, "execution_device", None) is not None:
                    return torch.device(single.execution_device)
    return device


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of the input that ``module`` expects, also where its weights are stored as integers or float8."""
    for parameter in module.parameters():
        if parameter.dtype in COMPUTE_DTYPES:
            return parameter.dtype
    for part in module.modules():  # bitsandbytes' 4-bit layers
        if getattr(part, "compute_dtype", None) in COMPUTE_DTYPES:
            return part.compute_dtype  # type: ignore[return-value]
    for buffer in module.buffers():  # the scales of GPTQ and AWQ
        if buffer.dtype in COMPUTE_DTYPES:
            return buffer.dtype
    return torch.float32


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` into eval mode, and each back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
