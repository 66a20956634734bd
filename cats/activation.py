"""The CATS activation (equations 4 and 5 of the paper), and thresholds as tensors of a module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cats.criteria import Criterion


def threshold_activation(v: Tensor, threshold: float | Tensor) -> Tensor:
    """Equation 4: ``v_j`` where ``|v_j| >= threshold``, else 0.

    Ties are kept, as in the paper, and so is NaN: a broken activation must stay visible instead of turning into a
    zero. Half-precision values are compared in float32, since rounding the threshold to bfloat16 would move the
    sparsity by up to 0.4 points.

    Args:
        v: any shape, any floating dtype; gate activations ``SiLU(x W_gate)``.
        threshold: non-negative, in units of ``v``: a number, or a float32 tensor () or (m,), m the last size of ``v``.

    Returns:
        Tensor of ``v``'s shape and dtype; the gradient is that of ``v`` where kept, and 0 elsewhere.
    """
    magnitude = v.abs() if v.dtype in (torch.float32, torch.float64) else v.float().abs()
    return v.masked_fill(magnitude < threshold, 0.0)


class _WithThreshold(nn.Module):
    """Holds ``threshold``, a float32 tensor () or (n,), in a buffer that is not saved and never changes its dtype.

    As a tensor it is an input of compiled code and not a part of it: layers that differ in their thresholds share one
    graph, and new thresholds need no new one. It moves with the module; ``model.to(bfloat16)`` and ``half()`` leave its
    bits alone.
    """

    threshold: Tensor

    def __init__(self, threshold: float | Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=torch.float32).clone(), persistent=False)

    def set_threshold(self, threshold: float | Tensor) -> None:
        """Replace the threshold, in place where the shape allows it, so that CUDA graphs see the new one."""
        new = torch.as_tensor(threshold, dtype=torch.float32)
        if self.threshold.shape == new.shape and not self.threshold.is_meta:
            self.threshold.copy_(new)
        else:
            self.threshold = new.to(self.threshold.device, copy=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        threshold = self._buffers.pop("threshold")
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["threshold"] = threshold
        if threshold is not None:  # as integers: casts of floating tensors pass them by, moves do not
            self._buffers["threshold"] = fn(threshold.view(torch.int32)).view(torch.float32)
        return self


class CATSActivation(_WithThreshold):
    """Equation 5: ``CATS_t(SiLU(.))``, a drop-in for a gated MLP's activation function.

    Attributes:
        inner: the model's own activation (SiLU, tanh-GELU, ...).
        threshold: float32 tensor, one number () or one per neuron (m,).
        active: False where another product decides, and this one only computes ``inner``.
    """

    def __init__(self, inner: nn.Module, threshold: float | Tensor, active: bool = True) -> None:
        super().__init__(threshold)
        self.inner = inner
        self.active = active

    def forward(self, gate: Tensor) -> Tensor:
        """Apply equation 5 to ``x W_gate`` (..., m)."""
        value = self.inner(gate)
        return threshold_activation(value, self.threshold) if self.active else value

    def extra_repr(self) -> str:
        return _shown(self.threshold)


class Mask(_WithThreshold):
    """What a criterion keeps of the values at one place, (..., n) to (..., n).

    Attributes:
        criterion: whose `cats.criteria.Criterion.mask` is applied.
        sparsity: the level of the thresholds.
        threshold: the criterion's parameter, float32 () or (n,).
        dense_prompts: on the input of a block or layer, whether prompts pass unmasked.
    """

    sparse = False
    dense_prompts = False

    def __init__(self, criterion: Criterion, sparsity: float, threshold: float | Tensor) -> None:
        super().__init__(threshold)
        self.criterion, self.sparsity = criterion, sparsity

    def forward(self, values: Tensor) -> Tensor:
        return self.criterion.mask(values, self.threshold, self.sparsity)

    def extra_repr(self) -> str:
        return f"{self.criterion.name}, {_shown(self.threshold)}"


def _shown(threshold: Tensor) -> str:
    if threshold.is_meta or threshold.dim():
        return f"threshold of shape {tuple(threshold.shape)}"
    return f"threshold={float(threshold):.6g}"
