"""Streaming histograms over the leading bits of float32.

2048 bins to each power of two: a bin is at most 0.05 % wide relative to its value whatever the scale, bfloat16 values
fall on bin edges exactly, and memory (0.7 MB per layer) does not depend on how many tokens are seen.
"""

import numpy as np
import torch
from torch import Tensor

_SHIFT = 23 - 11  # float32 has 23 mantissa bits; 11 are kept
_LOWEST = (127 - 30) << 11  # |v| below 2^-30 shares the first bin
_HIGHEST = (127 + 16) << 11  # |v| from 2^16 shares the last


class Histogram:
    """Streaming histogram of |v| over bins of the leading float32 bits; ``counts`` is int64 on the data's device."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(_HIGHEST - _LOWEST + 1, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """Count ``values`` (any shape, any floating dtype). Raises ValueError on NaN."""
        magnitude = values.detach().float().abs().flatten()
        if torch.isnan(magnitude).any():
            raise ValueError("activations contain NaN: the model is broken or overflows in this dtype")
        keys = (magnitude.contiguous().view(torch.int32) >> _SHIFT).clamp_(_LOWEST, _HIGHEST) - _LOWEST
        self.counts += torch.bincount(keys, minlength=len(self.counts))

    @staticmethod
    def edges() -> Tensor:
        """Lower edges of the bins, float32, exactly representable; the first is 0."""
        edges = (torch.arange(_LOWEST, _HIGHEST + 2, dtype=torch.int32) << _SHIFT).view(torch.float32)
        edges[0] = 0.0
        return edges

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def threshold(self, sparsity: float) -> float:
        """The bin edge t for which the fraction of values below t, those that CATS drops, is nearest to ``sparsity``.

        Equation 3 takes the least t with F(t) >= ``sparsity``, where F counts the ties at t too, which CATS keeps. The
        two differ by at most one bin. That shows where many values are equal, as in bfloat16: no threshold splits a
        tie, so the sparsity may miss its target by half the tie's share, where equation 3 may miss it by the whole.
        """
        # numpy: asked for every layer and batch, where threads of torch take longer than the sum itself
        below = np.concatenate([[0], self.counts.cpu().numpy().cumsum()])
        below = below / below[-1]
        # `below` rises with the edge: the crossing bin's two edges are the candidates, the lower one on a tie
        upper = int(np.searchsorted(below, sparsity))
        nearest = upper - 1 if upper and sparsity - below[upper - 1] <= below[upper] - sparsity else upper
        return float(self.edges()[nearest])

    def fraction_below(self, threshold: float) -> float:
        """Fraction of values in bins that lie wholly below ``threshold`` (exact when it is a bin edge)."""
        edges = self.edges()
        return float(self.counts.cpu()[edges[1:] <= threshold].sum()) / self.total

    def rebinned(self, edges: Tensor) -> Tensor:
        """Counts in wider bins between ascending ``edges`` (n + 1), int64 (n); a bin goes where its centre is."""
        fine = self.edges()
        centre = (fine[:-1] + fine[1:]) / 2
        index = torch.bucketize(centre.double(), edges.double(), right=True) - 1
        inside = (index >= 0) & (index < len(edges) - 1)
        coarse = torch.zeros(len(edges) - 1, dtype=torch.int64)
        return coarse.index_add_(0, index[inside], self.counts.cpu()[inside])
