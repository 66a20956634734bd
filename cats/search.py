"""Choosing, for each MLP, which product decides and with what weights (the criterion auto).

One pass over the text keeps a sample of each MLP's inputs. Layer by layer the products are formed again from them, and
for every candidate and level the part of the output that would be lost is computed: its squared norm relative to the
output's, token by token, is the error, so that a few tokens with large outputs do not decide. Float32 scores are
compared as `cats.apply` compares them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from cats.calibration import column_norms
from cats.criteria.base import Searched
from cats.equation import GatedMLP, gate_and_up, inner_activation
from cats.histogram import Histogram
from cats.observe import Batches, count_tokens, observe
from cats.structure import eval_mode, gated_mlps, parts_of
from cats.thresholds import Value

SAMPLE = 2048
"""Tokens: evenly spread over the text."""
SIDES = ("gate", "up")
WEIGHTS = ("none", "rms", "rms and norm")
ERROR_TOKENS = 1024
"""Of the sample, on which errors are computed."""


@dataclass(frozen=True)
class Candidate:
    """One side and weights for one MLP.

    Attributes:
        side: the product that decides.
        weights: one of `WEIGHTS`.
        errors: at each level asked for, the squared norm of what is lost of a token's output over that of the output,
            the mean over tokens.
        scale: the weights themselves, float32 (m,); None for "none".
        scores: of all neurons on the sample.
    """

    side: str
    weights: str
    errors: tuple[float, ...]
    scale: Tensor | None
    scores: Histogram

    def threshold(self, level: float) -> Value:
        """What `cats.Thresholds` holds for it at ``level``."""
        threshold = _threshold(self.scores.threshold(level), self.scale)
        return threshold.cpu() if isinstance(threshold, Tensor) else threshold


def search(model: nn.Module, batches: Sequence[Any], targets: Sequence[float]) -> Searched:
    """Thresholds of the best candidate of every MLP at every target.

    Args:
        model: with gated MLPs; its modules' modes are restored.
        batches: as `cats.observe.observe`.
        targets: sparsities of every MLP.

    Raises:
        TypeError, ValueError: as `cats.observe.observe`, and for NaN activations.
    """
    inputs, seen = sample_inputs(model, batches)
    levels = tuple(sorted(set(targets)))
    sites: dict[float, dict[str, dict[str, Value]]] = {target: {side: {} for side in SIDES} for target in targets}
    with torch.no_grad(), eval_mode(model):
        # shown on terminals only, and where it takes long: after the last forward pass comes most of the work
        for path, mlp in tqdm(gated_mlps(model).items(), desc="search", unit="layer", disable=None, delay=1.0):
            tried = list(candidates(path, mlp, inputs.pop(path), levels))
            for place, level in enumerate(levels):
                best = min(tried, key=lambda one: one.errors[place])
                sites[level][best.side][path] = best.threshold(level)
    return Searched(sites, seen)


def sample_inputs(model: nn.Module, batches: Batches, most: int = SAMPLE) -> tuple[dict[str, Tensor], int]:
    """Inputs (tokens, d) of each MLP at up to ``most`` tokens evenly spread over the text, and how many those are."""
    batches = list(batches)
    stride = max(1, -(-count_tokens(batches) // most))
    kept: dict[str, list[Tensor]] = {}
    passed: dict[str, int] = {}

    def record(_site: str, path: str, values: Tensor) -> None:
        start = -passed.get(path, 0) % stride
        passed[path] = passed.get(path, 0) + len(values)
        kept.setdefault(path, []).append(values[start::stride].clone())

    observe(model, batches, record, ("mlp_input",))
    inputs = {path: torch.cat(parts) for path, parts in kept.items()}
    return inputs, len(next(iter(inputs.values())))


def candidates(path: str, mlp: GatedMLP, x: Tensor, levels: Sequence[float]) -> Iterator[Candidate]:
    """Every side and weights, with the error of the MLP's output on ``x`` (tokens, d) at each of ``levels``."""
    of = parts_of(mlp)
    down: Any = mlp._modules[of.down]
    gate, up = gate_and_up(mlp, x, of)
    values = {"gate": inner_activation(mlp, of)(gate), "up": up}
    neurons = values["gate"] * up
    nothing = down.forward(torch.zeros_like(neurons[:1])).float()  # forward: a mask on its input must not act
    few = slice(None, None, -(-len(x) // ERROR_TOKENS))
    whole = (down.forward(neurons[few]).float() - nothing).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    norms = column_norms(down).to(x.device)
    for side, other in (SIDES, SIDES[::-1]):
        magnitude = values[side].float().abs()
        rms = values[other].float().square().mean(0).sqrt()
        for kind, weights in zip(WEIGHTS, (None, rms, rms * norms), strict=True):
            scores = Histogram(x.device)
            try:
                scores.add(magnitude if weights is None else magnitude * weights)
            except ValueError as broken:
                raise ValueError(f"{path}: {broken}") from broken
            errors = []
            for level in levels:
                threshold = _threshold(scores.threshold(level), weights)
                lost = down.forward(neurons[few].masked_fill(magnitude[few] >= threshold, 0.0)).float() - nothing
                errors.append((lost.square().sum(-1) / whole).mean())
            yield Candidate(side, kind, tuple(torch.stack(errors).tolist()), weights, scores)


def _threshold(quantile: float, scale: Tensor | None) -> Value:
    """Of the deciding product, where ``scale`` times it has that quantile."""
    return quantile if scale is None or quantile == 0 else quantile / scale
