"""Random problems for the sparse gated MLP, thresholds clear of rounding, the float64 oracle, and tolerances by dtype.

One copy for the tests, for the latency experiment and for tuning. The oracle shares no code with the kernels or with
the reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.thresholds import Threshold
from cats_kernels.weights import bytes_read

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest `relative_error` of an output against the oracle, by the dtype of the weights."""
CHUNK = 1024
"""Neurons at a time in float64, so that the oracle of a 7B model's MLP needs little memory."""


def weights(
    d: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal gate, up (m, d) of variance 1/d, and transposed down projection (m, d) of variance 1/m."""
    generator = torch.Generator(device).manual_seed(seed)
    gate, up, down_t = ((torch.randn(m, d, generator=generator, device=device) * n**-0.5).to(dtype) for n in (d, d, m))
    return gate, up, down_t


def inputs(rows: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 1, device: str = "cpu") -> Tensor:
    """Standard normal x (rows, d)."""
    return torch.randn(rows, d, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def products(x: Tensor, gate: Tensor, up: Tensor, activation: str = "silu") -> tuple[Tensor, Tensor]:
    """The activated gate product and the up product, float64 (rows, m)."""
    x = x.double()
    parts = [(x @ g.double().T, x @ u.double().T) for g, u in zip(gate.split(CHUNK), up.split(CHUNK), strict=True)]
    s = torch.cat([part[0] for part in parts], 1)
    v = s * torch.sigmoid(s) if activation == "silu" else F.gelu(s, approximate="tanh")
    return v, torch.cat([part[1] for part in parts], 1)


def oracle(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """The sparse gated MLP in float64 (rows, d): kept terms alone are summed, neuron by neuron where any is dropped."""
    v, u = products(x, gate, up, activation)
    kept = ~((v if decider == "gate" else u).abs() < _float32(threshold, x.device))
    return project_down(torch.where(kept, v * u, 0.0), down_t)


def project_down(hidden: Tensor, down_t: Tensor) -> Tensor:
    """``hidden @ down_t`` in float64, (rows, m) times (m, d)."""
    y = hidden.new_zeros(hidden.shape[0], down_t.shape[1])
    for part, down in zip(hidden.split(CHUNK, 1), down_t.split(CHUNK), strict=True):
        y += part @ down.double()
    return y


def _float32(threshold: Threshold, device: torch.device) -> Tensor:
    return torch.as_tensor(threshold, dtype=torch.float32, device=device).double()


def clear_threshold(magnitudes: Tensor, sparsity: float) -> float:
    """A threshold that about ``sparsity`` of the magnitudes lie below, and none so close that rounding could move it
    across: the middle of the widest of the gaps nearby (within 0.05 % at 7B shapes). 0 keeps all and 1 drops all;
    between them something is kept and something dropped, where there are two to choose from."""
    if sparsity == 0:
        return 0.0
    ordered = magnitudes.flatten().sort().values
    n = len(ordered)
    edges = torch.cat([ordered.new_zeros(1), ordered, 2 * ordered[-1:] + 1])
    wanted = round(sparsity * n)  # edges[wanted] is the last that is dropped
    if sparsity == 1:
        near = edges[n:]
    else:
        some = n > 1
        near = edges[max(1 if some else 0, wanted - 3) : min(wanted + 5, n + 1 if some else n + 2)]
    widest = int(near.diff().argmax())
    return float((near[widest] + near[widest + 1]) / 2)


def clear_vector(magnitudes: Tensor, sparsity: float, seed: int = 0) -> Tensor:
    """A threshold for each neuron (m,), float32 and between 1/2 and 2 of a common one, as clear of magnitudes (rows, m)
    as `clear_threshold` is."""
    generator = torch.Generator(magnitudes.device).manual_seed(seed)
    scale = 0.5 + 1.5 * torch.rand(magnitudes.shape[1], generator=generator, device=magnitudes.device)
    return (clear_threshold(magnitudes / scale.double(), sparsity) * scale.double()).float()


def relative_error(y: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected; over 1 where that is 0."""
    norm = float(expected.norm())
    return float((y.double() - expected).norm()) / (norm if norm > 0 else 1.0)


class Problem:
    """Weights and inputs at random, and the float64 truth about them.

    Attributes:
        x: (rows, d). gate, up, down_t: (m, d). down: (d, m), as nn.Linear stores it.
        v, u: the activated gate product and the up product, float64 (rows, m).
    """

    def __init__(
        self,
        d: int,
        m: int,
        rows: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
        activation: str = "silu",
        decider: str = "gate",
    ) -> None:
        self.x = inputs(rows, d, dtype, seed=seed + 1, device=device)
        self.gate, self.up, self.down_t = weights(d, m, dtype, seed, device)
        self.down = self.down_t.T.contiguous()
        self.activation, self.decider = activation, decider
        self.v, self.u = products(self.x, self.gate, self.up, activation)

    @property
    def magnitude(self) -> Tensor:
        """What is compared with the threshold, float64 (rows, m)."""
        return (self.v if self.decider == "gate" else self.u).abs()

    def threshold(self, sparsity: float) -> float:
        """One threshold for about this sparsity, clear of rounding."""
        return clear_threshold(self.magnitude, sparsity)

    def thresholds(self, sparsity: float, seed: int = 0) -> Tensor:
        """A threshold for each neuron, float32 (m,), for about this sparsity, clear of rounding."""
        return clear_vector(self.magnitude, sparsity, seed)

    def kept(self, threshold: Threshold) -> Tensor:
        """Which neurons each row keeps, (rows, m)."""
        return ~(self.magnitude < _float32(threshold, self.x.device))

    def sparsity(self, threshold: Threshold) -> float:
        """Fraction of the deciding products below the threshold."""
        return 1 - float(self.kept(threshold).double().mean())

    def active(self, threshold: Threshold) -> int:
        """Neurons that some row keeps: the rows of the other two weights that must be read."""
        return int(self.kept(threshold).any(0).sum())

    def bytes_read(self, threshold: Threshold) -> int:
        """Bytes of weights that a call must read."""
        return bytes_read(self.gate, self.up, self.down_t, self.active(threshold), self.decider)

    def arguments(self, threshold: Threshold) -> tuple[Tensor, Tensor, Tensor, Tensor, Threshold, str, str]:
        """Those of every implementation, by position: x, the weights, the threshold, activation and decider."""
        return self.x, self.gate, self.up, self.down_t, threshold, self.activation, self.decider

    def dense(self, width: int | None = None) -> Callable[[], Tensor]:
        """The dense MLP as transformers computes it, of the first ``width`` neurons."""
        gate, up = self.gate[:width], self.up[:width]
        down = self.down if width is None else self.down[:, :width].contiguous()
        act = F.silu if self.activation == "silu" else lambda z: F.gelu(z, approximate="tanh")
        return lambda: F.linear(act(F.linear(self.x, gate)) * F.linear(self.x, up), down)

    def expected(self, threshold: Threshold) -> Tensor:
        """The oracle's output, float64 (rows, d)."""
        return project_down(torch.where(self.kept(threshold), self.v * self.u, 0.0), self.down_t)

    def error(self, y: Tensor, threshold: Threshold) -> float:
        """`relative_error` of an output."""
        return relative_error(y, self.expected(threshold))

    def errors(self, outputs: dict[float, Tensor], rounded: bool = False) -> dict[float, float]:
        """`relative_error` of the output at each threshold, in one pass over the down projection; with ``rounded``, of
        a path whose mask is that of the deciding product in the weights' dtype."""
        magnitude = self.rounded_magnitude() if rounded else self.magnitude
        hidden = [torch.where(magnitude < _float32(t, self.x.device), 0.0, self.v * self.u) for t in outputs]
        truth = project_down(torch.cat(hidden), self.down_t).split(self.x.shape[0])
        return {t: relative_error(y, expected) for (t, y), expected in zip(outputs.items(), truth, strict=True)}

    def rounded_magnitude(self) -> Tensor:
        """What the dense masked path compares: the deciding product rounded to the weights' dtype, float32 after
        that."""
        if self.decider == "up":
            return F.linear(self.x, self.up).float().abs()
        gate = F.linear(self.x, self.gate).float()
        return (F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")).abs()
