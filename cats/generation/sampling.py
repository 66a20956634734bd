"""The choice of a token: the likeliest, or a draw by temperature, top-k and top-p."""

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def whole_number(value: Any) -> int | None:
    """``value`` as an int, one of numpy or torch too; None where it is no whole number."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def _number(value: Any) -> float:
    """``value`` as a float, one of numpy or torch too; NaN where it is no number."""
    try:
        return math.nan if isinstance(value, str | bytes | bool) else float(value)
    except (TypeError, ValueError, RuntimeError):
        return math.nan


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen, in the order and with the conventions of transformers.

    Attributes:
        temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
        top_k: draw among the so many likeliest; None for all.
        top_p: draw among the likeliest whose probabilities add up to this; None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        temperature, top_k = _number(self.temperature), whole_number(self.top_k)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be 0 or more, not {self.temperature!r}")
        if self.top_k is not None and (top_k is None or top_k < 1):
            raise ValueError(f"top_k must be a whole number, 1 or more, or None, not {self.top_k!r}")
        if self.top_p is not None and not 0 < _number(self.top_p) <= 1:
            raise ValueError(f"top_p must be in (0, 1] or None, not {self.top_p!r}")
        object.__setattr__(self, "temperature", temperature)
        object.__setattr__(self, "top_k", top_k)
        object.__setattr__(self, "top_p", None if self.top_p is None else _number(self.top_p))
        if self.greedy and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p need a temperature above 0: at 0 the likeliest token is taken")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __call__(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Tokens int64 (batch, 1).

        Args:
            logits: float32 (batch, vocabulary).
            noise: likewise, exponentially distributed: the token with the largest ratio of its probability to its noise
                is a draw by probability. None draws it from the default generator.
        """
        if self.greedy:
            return logits.argmax(-1, keepdim=True)
        scores = logits / self.temperature
        if self.top_k is not None:
            least = scores.topk(min(self.top_k, scores.shape[-1])).values[:, -1:]
            scores = scores.masked_fill(scores < least, float("-inf"))
        if self.top_p is not None and self.top_p < 1:
            ascending, places = scores.sort(-1)
            unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            unlikely[:, -1] = False
            scores = scores.masked_fill(unlikely.scatter(-1, places, unlikely), float("-inf"))
        probabilities = scores.softmax(-1)
        if noise is None:
            noise = torch.empty_like(probabilities).exponential_()
        return (probabilities / noise).argmax(-1, keepdim=True)
