"""The CATS activation (equations 4 and 5 of the paper) and nothing else."""

import torch
from torch import Tensor, nn


def threshold_activation(v: Tensor, threshold: float) -> Tensor:
    """Equation 4: ``v_j`` where ``|v_j| >= threshold``, else 0.

    Ties are kept, as in the paper, and so is NaN: a broken activation must stay visible instead of turning into a
    zero. Half-precision values are compared in float32, since rounding the threshold to bfloat16 would move the
    sparsity by up to 0.4 points.

    Args:
        v: any shape, any floating dtype; gate activations ``SiLU(x W_gate)``.
        threshold: non-negative, in units of ``v``.

    Returns:
        Tensor of ``v``'s shape and dtype; the gradient is that of ``v`` where kept, and 0 elsewhere.
    """
    magnitude = v.abs() if v.dtype in (torch.float32, torch.float64) else v.float().abs()
    return v.masked_fill(magnitude < threshold, 0.0)


class CATSActivation(nn.Module):
    """Equation 5: ``CATS_t(SiLU(.))``, a drop-in for a gated MLP's activation function.

    Attributes:
        inner: the model's own activation (SiLU, tanh-GELU, ...).
        threshold: a Python float, not a buffer, so that state_dict stays as it was and ``model.to(bfloat16)`` does not
            round it.
    """

    def __init__(self, inner: nn.Module, threshold: float) -> None:
        super().__init__()
        self.inner = inner
        self.threshold = threshold

    def forward(self, gate: Tensor) -> Tensor:
        """Apply equation 5 to ``x W_gate`` of any shape."""
        return threshold_activation(self.inner(gate), self.threshold)

    def extra_repr(self) -> str:
        return f"threshold={self.threshold:.6g}"
