"""The operator's FLOPs, for torch's ``FlopCounterMode``.

Its module imports Triton, which takes a second, so it is not imported here: the formula is registered where a program
has imported the module itself.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack


def dense_flops(x_shape: torch.Size, gate_weight_shape: torch.Size, *_: Any, **__: Any) -> int:
    """Floating-point operations of the dense MLP, 6 per row, neuron and column: an upper bound, since how many neurons
    a call skips is in its data, and the count of the dense block that it replaces."""
    m, d = gate_weight_shape
    return 6 * math.prod(x_shape[:-1]) * m * d


def register_flops() -> None:
    """Register `dense_flops` if a program can count FLOPs, also with counters that have already started (each takes a
    copy of the formulas when it is made)."""
    module: Any = sys.modules.get("torch.utils.flop_counter")
    if module is None:
        return
    operator = torch.ops.cats.sparse_gated_mlp
    if operator not in module.flop_registry:
        module.register_flop_formula(operator)(dense_flops)
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, module.FlopCounterMode):
            counter.flop_registry.setdefault(operator, module.flop_registry[operator])
