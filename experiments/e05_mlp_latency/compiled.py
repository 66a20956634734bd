"""The strongest dense baseline of torch's own: the gated MLP compiled by inductor with all of its tuning."""

import itertools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MODE = "max-autotune-no-cudagraphs"
"""max_autotune and coordinate_descent_tuning; without CUDA graphs, since the timing captures graphs itself."""


def dense_mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Equation 1 with SiLU, as transformers computes it; gate, up: (m, d), down: (d, m)."""
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


_numbers = itertools.count()


def check_compiler(device: str) -> None:
    """Raise RuntimeError on a CPU without a C++ compiler, or where inductor cannot call it."""
    if torch.device(device).type != "cpu":
        return
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        raise RuntimeError("compiling on a CPU needs a C++ compiler (c++, g++ or clang++)")
    if " " in torch.__path__[0]:
        raise RuntimeError("compiling on a CPU needs torch in a path without spaces: inductor does not quote it")


def compiled_dense_mlp(device: str) -> Callable[..., Any]:
    """`dense_mlp` compiled for one shape: it compiles and tunes itself in its first call, for half a minute or more.

    Each is a function of its own to dynamo, which keeps no more than a few versions of one, and would run the next
    uncompiled without a word.

    Raises:
        RuntimeError: as `check_compiler`.
    """
    check_compiler(device)
    code = dense_mlp.__code__.replace(co_name=f"dense_mlp_{next(_numbers)}")
    return torch.compile(types.FunctionType(code, globals()), mode=MODE, dynamic=False, fullgraph=True)
