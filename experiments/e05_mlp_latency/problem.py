"""A random gated MLP, an input, and the float64 truth about them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CHUNK = 1024  # neurons at a time in float64, so that the reference needs little memory


class Problem:
    """One copy of the weights, an input, and the float64 truth about them."""

    def __init__(self, d: int, m: int, rows: int, dtype: torch.dtype, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(n: int, scale: float) -> Tensor:
            return (torch.randn(n, d, generator=generator, device=device) * scale).to(dtype)

        self.decider = "gate"
        self.x = normal(rows, 1.0)
        self.gate, self.up, self.down_t = normal(m, d**-0.5), normal(m, d**-0.5), normal(m, m**-0.5)
        self.down = self.down_t.T.contiguous()  # as nn.Linear stores it
        x = self.x.double()
        parts = [(x @ g.double().T, x @ u.double().T) for g, u in zip(*map(_chunks, (self.gate, self.up)), strict=True)]
        self.v = F.silu(torch.cat([gate for gate, _ in parts], 1))
        self.up_projection = torch.cat([up for _, up in parts], 1)

    @property
    def _deciding(self) -> Tensor:
        return self.v if self.decider == "gate" else self.up_projection

    def threshold(self, sparsity: float) -> float:
        """In the middle of the gap between the two activations around the quantile; 0 keeps everything."""
        if sparsity == 0:
            return 0.0
        ordered = self._deciding.abs().flatten().sort().values
        k = min(max(round(sparsity * len(ordered)), 1), len(ordered) - 1)
        # the widest of the gaps nearby (within 0.05 % at 7B shapes), so that float32 rounding cannot flip a neuron
        near = ordered[max(0, k - 4) : k + 4]
        widest = int(near.diff().argmax())
        return float((near[widest] + near[widest + 1]) / 2)

    def sparsity(self, threshold: float) -> float:
        """Fraction of the activations below the threshold."""
        return float((self._deciding.abs() < threshold).double().mean())

    def active(self, threshold: float) -> int:
        """Neurons that some row keeps: the rows of W_up and W_down that must be read."""
        return int((self._deciding.abs() >= threshold).any(0).sum())

    def arguments(self, threshold: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, float | Tensor, str]:
        """Those of every variant."""
        return self.x, self.gate, self.up, self.down_t, threshold, "silu"

    def dense(self, width: int | None = None) -> Callable[[], Tensor]:
        """The dense MLP as transformers computes it, of the first ``width`` neurons."""
        gate, up = self.gate[:width], self.up[:width]
        down = self.down if width is None else self.down[:, :width].contiguous()
        return lambda: F.linear(F.silu(F.linear(self.x, gate)) * F.linear(self.x, up), down)

    def errors(self, outputs: dict[float, Tensor], rounded: bool = False) -> dict[float, float]:
        """Scale-free error of the output at each threshold against the float64 reference; with ``rounded``, one whose
        mask is that of the gate product in the weights' dtype."""
        magnitude = (F.silu(F.linear(self.x, self.gate).float()) if rounded else self._deciding).abs()
        hidden = {t: torch.where(magnitude < t, 0, self.v * self.up_projection) for t in outputs}
        stacked = torch.cat(list(hidden.values()))
        truth = sum(
            part @ down.double() for part, down in zip(stacked.split(CHUNK, 1), _chunks(self.down_t), strict=True)
        )
        assert isinstance(truth, Tensor)
        return {
            t: float((y.double() - expected).norm() / expected.norm())
            for (t, y), expected in zip(outputs.items(), truth.split(self.x.shape[0]), strict=True)
        }


def _chunks(weight: Tensor) -> Sequence[Tensor]:
    return weight.split(CHUNK)
