"""Peak memory of a piece of work, on a GPU or a CPU."""

import re
from pathlib import Path

import torch


def reset_peak_memory(device: torch.device) -> bool:
    """Start `peak_memory` afresh; False where that cannot be done (a CPU without Linux's clear_refs)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> int | None:
    """Largest allocation (GPU) or resident set (CPU), in bytes, since `reset_peak_memory`; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match.group(1)) * 1024 if match else None
