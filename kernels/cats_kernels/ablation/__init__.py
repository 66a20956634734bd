"""The paper's kernels (Figure 6) for comparison with ours, on the CPU and in Triton. They import ours; ours never
them."""

from __future__ import annotations

NAMES = ("gather", "fused-compact", "fused-mask")
"""The paper's kernels: not fused; Algorithm 2 (indices); Algorithms 1 and 3 (mask)."""


def check_paper(threshold: object, decider: str) -> None:
    """Raise ValueError in one sentence where the paper's kernels have no such case."""
    if decider != "gate" or not isinstance(threshold, int | float):
        raise ValueError(
            "The paper's kernels (gather, fused-compact, fused-mask) take one number as threshold and decider 'gate'; "
            "for a tensor or decider 'up' use sparse_gated_mlp."
        )
