"""Choosing, for each MLP, which product decides, with what weights, and how much it skips; see `cats.search`.

One pass over the text keeps a sample of each MLP's inputs. Layer by layer the products are formed again from them, and
for every candidate and level the part of the output that would be lost is computed: its squared norm relative to the
output's, token by token, is the error, so that a few tokens with large outputs do not decide. How much the error of
each MLP matters to the model's output is measured too (`output_costs`), and `cats.allocation` shares the target among
the layers by both. Float32 scores are compared as `cats.apply` compares them.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cats.allocation import LEVELS, allocate
from cats.calibration import column_norms
from cats.criteria.base import Searched
from cats.equation import GatedMLP, gate_and_up, inner_activation
from cats.histogram import Histogram
from cats.observe import Batches, model_inputs, observe
from cats.sensitivity import Output, scores_with
from cats.structure import eval_mode, gated_mlps, parts_of
from cats.thresholds import Value

SAMPLE = 2048
"""Tokens: evenly spread over the text."""
SIDES = ("gate", "up")
WEIGHTS = ("none", "rms", "rms and norm")
OUTPUT, UNIFORM = ALLOCATIONS = ("output", "uniform")
"""How the target is shared among the layers: by what the model's output suffers, or equally."""
ERROR_TOKENS = 1024
"""Of the sample, on which errors are computed."""
OPERATING_POINT, RELIEF = 0.5, 0.3
"""Levels of all MLPs, and of one of them, between which the effect on the output is measured."""
LEAST_EFFECT, LEAST_ERROR = 0.05, 1e-6
"""Of the mean effect; and of an error: below them a layer counts as having as much."""


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
        neurons: m.
    """

    side: str
    weights: str
    errors: tuple[float, ...]
    scale: Tensor | None
    scores: Histogram
    neurons: int

    def threshold(self, level: float) -> Value:
        """What `cats.Thresholds` holds for it at ``level``."""
        threshold = _threshold(self.scores.threshold(level), self.scale)
        return threshold.cpu() if isinstance(threshold, Tensor) else threshold


def search(model: nn.Module, batches: Sequence[Any], targets: Sequence[float], allocation: str = OUTPUT) -> Searched:
    """Thresholds of the best candidate of every MLP at every target.

    Args:
        model: with gated MLPs; its modules' modes are restored.
        batches: as `cats.observe.observe`.
        targets: sparsities of all MLPs together, each counted by its number of weights.
        allocation: one of `ALLOCATIONS`: a level for each MLP, or the target in all.

    Raises:
        TypeError, ValueError: as `cats.observe.observe`, and for NaN activations.
    """
    inputs, seen = sample_inputs(model, batches)
    levels = tuple(sorted(set(targets))) if allocation == UNIFORM else LEVELS
    tried: dict[str, list[Candidate]] = {}
    sizes: dict[str, float] = {}
    with torch.no_grad(), eval_mode(model):
        for path, mlp in gated_mlps(model).items():
            x = inputs.pop(path)
            tried[path] = list(candidates(path, mlp, x, levels))
            sizes[path] = x.shape[-1] * tried[path][0].neurons
    costs = {} if allocation == UNIFORM else output_costs(Output(model, batches), tried, levels)
    sites: dict[float, dict[str, dict[str, Value]]] = {}
    shares: dict[float, dict[str, float]] = {}
    for target in targets:
        shares[target] = {} if allocation == UNIFORM else allocate(costs, sizes, target, levels)
        own = shares[target] or dict.fromkeys(tried, target)
        best = {path: best_of(tried[path], levels, level)[0] for path, level in own.items()}
        values = {path: one.threshold(own[path]) for path, one in best.items()}
        if allocation == OUTPUT:
            values = settled(model, batches, best, own, values)
        sites[target] = {side: {path: values[path] for path in best if best[path].side == side} for side in SIDES}
    return Searched(sites, seen, shares)


def settled(
    model: nn.Module,
    batches: Sequence[Any],
    best: Mapping[str, Candidate],
    levels: Mapping[str, float],
    thresholds: Mapping[str, Value],
) -> dict[str, Value]:
    """Thresholds of each MLP's candidate at its level on what MLPs see while ``thresholds`` are in force.

    Those of the dense model skip up to two points more or less than their level behind layers that skip.
    """
    skips = {path: (one.side, thresholds[path]) for path, one in best.items()}
    scores = scores_with(model, batches, skips, {path: one.scale for path, one in best.items()})
    return {path: replace(one, scores=scores[path]).threshold(levels[path]) for path, one in best.items()}


def best_of(tried: Sequence[Candidate], levels: Sequence[float], level: float) -> tuple[Candidate, float]:
    """The candidate with the least error at ``level``, straight between ``levels`` and 0, and that error."""
    errors = [float(np.interp(level, (0.0, *levels), (0.0, *one.errors))) for one in tried]
    return tried[errors.index(min(errors))], min(errors)


def output_costs(
    output: Output, tried: Mapping[str, Sequence[Candidate]], levels: Sequence[float]
) -> dict[str, list[float]]:
    """What each MLP costs the model's output at each of ``levels``, in nats, as far as costs add up.

    The least error of an MLP tells how its cost rises with the level; how much an error matters is measured on the
    output itself, once: by how far it comes closer to the dense model's when, of all MLPs that skip `OPERATING_POINT`,
    this one skips only `RELIEF`. With all others dense an early layer's errors seem to matter less than they do.
    """
    skips, relieved, errors = {}, {}, {}
    for path, own in tried.items():
        (most, high), (least, low) = (best_of(own, levels, level) for level in (OPERATING_POINT, RELIEF))
        skips[path] = most.side, most.threshold(OPERATING_POINT)
        relieved[path] = least.side, least.threshold(RELIEF)
        errors[path] = max(high - low, LEAST_ERROR)
    whole = output.divergence(skips)
    effects = {path: whole - output.divergence({**skips, path: relieved[path]}) for path in tried}
    floor = LEAST_EFFECT * max(sum(effects.values()) / len(effects), 0.0)
    scales = {path: max(effect, floor) / errors[path] for path, effect in effects.items()}
    return {path: [scales[path] * best_of(own, levels, level)[1] for level in levels] for path, own in tried.items()}


def sample_inputs(model: nn.Module, batches: Batches, most: int = SAMPLE) -> tuple[dict[str, Tensor], int]:
    """Inputs (tokens, d) of each MLP at up to ``most`` tokens evenly spread over the text, and how many those are."""
    batches = list(batches)
    stride = max(1, -(-_tokens(batches) // most))
    kept: dict[str, list[Tensor]] = {}
    passed: dict[str, int] = {}

    def record(_site: str, path: str, values: Tensor) -> None:
        start = -passed.get(path, 0) % stride
        passed[path] = passed.get(path, 0) + len(values)
        kept.setdefault(path, []).append(values[start::stride].clone())

    observe(model, batches, record, ("mlp_input",))
    inputs = {path: torch.cat(parts) for path, parts in kept.items()}
    return inputs, len(next(iter(inputs.values())))


def _tokens(batches: Iterable[Any]) -> int:
    """Real tokens, or what is as good for spreading a sample: `observe` refuses what these are not."""
    total = 0
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"), None)
        mask = inputs.get("attention_mask")
        total += inputs["input_ids"].numel() if mask is None else int(mask.sum())
    return total


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
            yield Candidate(side, kind, tuple(torch.stack(errors).tolist()), weights, scores, neurons.shape[-1])


def _threshold(quantile: float, scale: Tensor | None) -> Value:
    """Of the deciding product, where ``scale`` times it has that quantile."""
    return quantile if scale is None or quantile == 0 else quantile / scale
