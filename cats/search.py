"""Choosing, for each MLP, which product decides and with what weights (the criterion auto).

One pass over the text keeps a sample of each MLP's inputs. Layer by layer the products are formed again from them, and
for every candidate and level the part of the output that would be lost is computed: its squared norm relative to the
output's, token by token, is the error, so that a few tokens with large outputs do not decide. One token does count for
more: the first of a sequence, which all others attend to and whose activations are like no other's. Its error counts as
much as the mean over the rest (docs/LOG.md: in two of gemma-3-270m's layers the up product would lose all of its
output, which a mean over tokens does not show). Float32 scores are compared as `cats.apply` compares them.
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
from cats.observe import Batches, count_tokens, model_inputs, observe
from cats.structure import eval_mode, gated_mlps, parts_of
from cats.thresholds import Value

SAMPLE = 2048
"""Tokens: evenly spread over the text."""
SIDES = ("gate", "up")
WEIGHTS = ("none", "rms", "rms and norm")
ERROR_TOKENS = 1024
"""Of the sample, on which errors are computed."""
SEQUENCES = 64
"""Whose first tokens are looked at, at most."""


@dataclass(frozen=True)
class Sample:
    """What `sample_inputs` keeps, by module path of the MLP.

    Attributes:
        inputs: at tokens evenly spread over the text, (tokens, d).
        first: at the first token of sequences, (sequences, d).
        tokens: how many ``inputs`` are of.
    """

    inputs: dict[str, Tensor]
    first: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class Candidate:
    """One side and weights for one MLP.

    Attributes:
        side: the product that decides.
        weights: one of `WEIGHTS`.
        errors: at each level asked for, the squared norm of what is lost of a token's output over that of the output:
            the mean over tokens, plus that over first tokens.
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
    sample = sample_inputs(model, batches)
    levels = tuple(sorted(set(targets)))
    sites: dict[float, dict[str, dict[str, Value]]] = {target: {side: {} for side in SIDES} for target in targets}
    with torch.no_grad(), eval_mode(model):
        # shown on terminals only, and where it takes long: after the last forward pass comes most of the work
        for path, mlp in tqdm(gated_mlps(model).items(), desc="search", unit="layer", disable=None, delay=1.0):
            x = sample.inputs.pop(path)
            tried = list(candidates(path, mlp, x, levels, sample.first.get(path, x[:0])))
            for place, level in enumerate(levels):
                best = min(tried, key=lambda one: one.errors[place])
                sites[level][best.side][path] = best.threshold(level)
    return Searched(sites, sample.tokens)


def sample_inputs(model: nn.Module, batches: Batches, most: int = SAMPLE) -> Sample:
    """Inputs of each MLP at up to ``most`` tokens evenly spread over the text, and at first tokens; one pass."""
    batches = list(batches)
    stride = max(1, -(-count_tokens(batches) // most))
    kept: dict[str, list[Tensor]] = {}
    first: dict[str, Tensor] = {}
    passed: dict[str, int] = {}
    at_end = False

    def text() -> Iterator[Any]:
        nonlocal at_end
        yield from batches
        at_end = True
        yield _first_tokens(batches)

    def record(_site: str, path: str, values: Tensor) -> None:
        if at_end:
            first[path] = values.clone()
            return
        start = -passed.get(path, 0) % stride
        passed[path] = passed.get(path, 0) + len(values)
        kept.setdefault(path, []).append(values[start::stride].clone())

    observe(model, text(), record, ("mlp_input",))
    inputs = {path: torch.cat(parts) for path, parts in kept.items()}
    return Sample(inputs, first, len(next(iter(inputs.values()))))


def _first_tokens(batches: Sequence[Any]) -> Tensor:
    """Ids (n, 1) that up to `SEQUENCES` sequences begin with, each once: a causal model makes of a first token alone
    what it makes of it in front of others."""
    ids = [torch.empty(0, dtype=torch.int64)]
    for batch in batches:
        inputs = model_inputs(batch, torch.device("cpu"), None)
        rows = inputs["input_ids"]
        real = inputs.get("attention_mask", torch.ones_like(rows)).bool()
        ids.append(rows[real & (real.cumsum(1) == 1)])
    return torch.cat(ids)[:SEQUENCES].unique()[:, None]


def candidates(
    path: str, mlp: GatedMLP, x: Tensor, levels: Sequence[float], first: Tensor | None = None
) -> Iterator[Candidate]:
    """Every side and weights, with their error at each of ``levels``.

    Args:
        path: of the MLP, for messages.
        mlp: gated.
        x: its inputs, (tokens, d).
        levels: sparsities.
        first: its inputs at first tokens, (sequences, d).

    Raises:
        ValueError: NaN activations.
    """
    of, tokens = parts_of(mlp), len(x)
    x = x if first is None else torch.cat([x, first])
    down: Any = mlp._modules[of.down]
    gate, up = gate_and_up(mlp, x, of)
    values = {"gate": inner_activation(mlp, of)(gate), "up": up}
    neurons = values["gate"] * up
    nothing = down.forward(torch.zeros_like(neurons[:1])).float()  # forward: a mask on its input must not act
    few = torch.arange(0, tokens, -(-tokens // ERROR_TOKENS), device=x.device)
    rows = torch.cat([few, torch.arange(tokens, len(x), device=x.device)])
    whole = (down.forward(neurons[rows]).float() - nothing).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    norms = column_norms(down).to(x.device)
    for side, other in (SIDES, SIDES[::-1]):
        magnitude = values[side].float().abs()
        rms = values[other][:tokens].float().square().mean(0).sqrt()
        for kind, weights in zip(WEIGHTS, (None, rms, rms * norms), strict=True):
            scores = Histogram(x.device)
            try:
                scores.add(magnitude[:tokens] if weights is None else magnitude[:tokens] * weights)
            except ValueError as broken:
                raise ValueError(f"{path}: {broken}") from broken
            errors = []
            for level in levels:
                threshold = _threshold(scores.threshold(level), weights)
                lost = down.forward(neurons[rows].masked_fill(magnitude[rows] >= threshold, 0.0)).float() - nothing
                shares = lost.square().sum(-1) / whole
                errors.append(sum(part.mean() for part in shares.tensor_split([len(few)]) if len(part)))
            yield Candidate(side, kind, tuple(torch.stack(errors).tolist()), weights, scores)


def _threshold(quantile: float, scale: Tensor | None) -> Value:
    """Of the deciding product, where ``scale`` times it has that quantile."""
    return quantile if scale is None or quantile == 0 else quantile / scale
