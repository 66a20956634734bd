"""What e05 times at one shape, dtype and number of rows: each implementation checked against a float64 reference."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from cats_kernels.dispatch import compute
from cats_kernels.problem import TOLERANCE, Problem
from torch import Tensor
from torch._inductor.utils import fresh_cache

from experiments.e05_mlp_latency.compiled import compiled_dense_mlp

OURS, COMPILED, OPTIMAL = "cats", "dense-compiled", "optimal-all-three-shrunk"
CHECKED = 0.5
"""The sparsity at which a vector of thresholds and the other decider are timed too."""


@dataclass
class Case:
    """One thing to time, or why it is not.

    Attributes:
        implementation, decider, threshold, path: as in `experiments.framework.tables.LatencyRow`.
        target, sparsity: fraction of neurons asked for, and of activations below the threshold.
        active: neurons that some row keeps; None where all are used.
        bytes_moved: of the weights that one call must read.
        calls: one for each copy of the weights.
        check: whether it is timed for its own cost alone, and no point of a figure.
        error: why there are no calls.
    """

    implementation: str
    path: str
    target: float
    sparsity: float | None = None
    active: int | None = None
    bytes_moved: int = 0
    calls: Sequence[Callable[[], object]] = field(default_factory=list)
    decider: str = ""
    threshold: str = ""
    check: bool = False
    error: str = ""


class Cases:
    """Makes the cases of one shape, dtype and number of rows; ``largest_error`` keeps each implementation's worst."""

    def __init__(self, problems: Sequence[Problem], device: str) -> None:
        self.problems, self.first, self.device = problems, problems[0], device
        self.m, self.d = self.first.gate.shape
        self.rows, self.dtype = self.first.x.shape[0], self.first.x.dtype
        self.row_bytes = self.d * self.first.gate.element_size()
        self.largest_error: dict[str, float] = {}

    def dense(self, targets: Sequence[float], compilations: int = 1) -> list[Case]:
        """The dense MLP as torch runs it and compiled so many times, and the paper's "Optimal" at each target."""
        every = 3 * self.m * self.row_bytes
        self._check("dense", {0.0: self.first.dense()()})
        cases = [Case("dense", "dense", 0.0, 0.0, bytes_moved=every, calls=[p.dense() for p in self.problems])]
        cases += [self._compiled(every, anew=compilations > 1) for _ in range(compilations)]
        for target in targets:
            # a multiple of 128: of 11469 neurons, 80 % of Mistral-7B's, the bfloat16 MLP ran at 0.79x dense on an H200
            width = min(self.m, max(128, 128 * round(self.m * (1 - target) / 128)))
            calls = [p.dense(width) for p in self.problems]
            moved = 3 * width * self.row_bytes
            cases.append(Case(OPTIMAL, "dense", target, 1 - width / self.m, bytes_moved=moved, calls=calls))
        return cases

    def _compiled(self, bytes_moved: int, anew: bool) -> Case:
        """The dense MLP compiled once; ``anew`` without what inductor's tuning has found before."""
        try:
            mlp = compiled_dense_mlp(self.device)
            calls = [partial(mlp, p.x, p.gate, p.up, p.down) for p in self.problems]
            with fresh_cache() if anew else nullcontext():
                output = calls[0]()
        except Exception as error:  # inductor fails in many ways: that is a result, stated in the table
            return Case(COMPILED, "dense", 0.0, error=sentence(error))
        assert isinstance(output, Tensor)
        self._check(COMPILED, {0.0: output})
        return Case(COMPILED, "dense", 0.0, 0.0, bytes_moved=bytes_moved, calls=calls)

    def sparse(
        self,
        name: str,
        implementation: Callable[..., Tensor],
        targets: Sequence[float],
        path: str = "sparse kernel",
        decider: str = "gate",
        vector: bool = False,
        check: bool = False,
    ) -> list[Case]:
        """One implementation at each target; none without one."""
        if not targets:
            return []
        labels: dict[str, Any] = {"decider": decider, "threshold": "vector" if vector else "number", "check": check}
        problems = [decided_by(problem, decider) for problem in self.problems]
        first, thresholds = problems[0], {target: [p.threshold(target) for p in problems] for target in targets}
        calls = {
            target: [
                partial(implementation, *p.arguments(self._filled(t) if vector else t))
                for p, t in zip(problems, ts, strict=True)
            ]
            for target, ts in thresholds.items()
        }
        try:
            outputs = {thresholds[target][0]: calls[target][0]() for target in targets}
        except RuntimeError as error:  # it does not compile or fit here: that is a result, stated in the table
            return [Case(name, path, target, error=sentence(error), **labels) for target in targets]
        self._check(name, outputs, first, path)
        cases = []
        for target in targets:
            threshold = thresholds[target][0]
            active = first.active(threshold)
            moved = (self.m + 2 * active if path == "sparse kernel" else 3 * self.m) * self.row_bytes
            cases.append(Case(name, path, target, first.sparsity(threshold), active, moved, calls[target], **labels))
        return cases

    def _filled(self, threshold: float) -> Tensor:
        """A vector that keeps the very neurons that the number keeps, so that its own cost is all that differs."""
        return torch.full((self.m,), threshold, dtype=torch.float32, device=self.first.x.device)

    def _check(
        self, name: str, outputs: dict[float, Tensor], problem: Problem | None = None, path: str = "sparse kernel"
    ) -> None:
        """Compare the output at each threshold with the float64 reference. Raises ValueError if it is wrong."""
        # torch's own products of the dense masked path round the deciding one before it is compared
        rounded = path == "dense masked" and self.first.x.device.type == "cuda" and self.dtype != torch.float32
        worst = max((problem or self.first).errors(outputs, rounded).values())
        tolerance = TOLERANCE[self.dtype]
        if not worst <= tolerance:
            raise ValueError(f"{name} is wrong by {worst:.1e} against the float64 reference; allowed: {tolerance:.0e}")
        label = f"{name}, {str(self.dtype).removeprefix('torch.')}"
        self.largest_error[label] = max(worst, self.largest_error.get(label, 0.0))


def decided_by(problem: Problem, decider: str) -> Problem:
    """The same weights and input with another product compared with the threshold."""
    other = copy.copy(problem)
    other.decider = decider
    return other


def sentence(error: Exception) -> str:
    """An exception's message in one line of at most 200 characters; of inductor's, what it wraps."""
    return " ".join(str(getattr(error, "inner_exception", None) or error).split())[:200]


def gate_read(problem: Problem) -> Callable[[], object]:
    """Our CPU kernel with nothing kept reads W_gate alone, up to 30 % faster than torch's sum does."""
    return partial(compute, "cpu", *problem.arguments(math.inf))
