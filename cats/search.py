"""Choosing, for each MLP, which product decides and with what weights, by the error of its output; see `cats.search`.

One pass over the text keeps a sample of each MLP's inputs. Layer by layer the products are formed again from them, and
for every candidate and target the part of the output that would be lost is computed: its squared norm relative to the
output's, token by token, is the error, so that a few tokens with large outputs do not decide. Float32 scores are
compared as `cats.apply` compares them.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cats.calibration import column_norms
from cats.criteria.base import Searched
from cats.equation import GatedMLP, activation_of, gate_and_up
from cats.histogram import Histogram
from cats.observe import Batches, observe
from cats.structure import eval_mode, gated_mlps, parts_of
from cats.thresholds import Value

SAMPLE = 2048
"""Tokens: evenly spread over the text."""
SIDES = ("gate", "up")
WEIGHTS = ("none", "rms", "rms and norm")


@dataclass(frozen=True)
class Choice:
    """One candidate for one MLP at one level.

    Attributes:
        side: the product that decides.
        weights: one of `WEIGHTS`.
        error: squared norm of what is lost of a token's output over that of the output, the mean over tokens.
        value: the threshold, as `cats.Thresholds` holds it.
    """

    side: str
    weights: str
    error: float
    value: Value


def search(model: nn.Module, batches: Sequence[Any], targets: Sequence[float]) -> Searched:
    """Thresholds of the best candidate of every MLP at every target.

    Args:
        model: with gated MLPs; its modules' modes are restored.
        batches: as `cats.observe.observe`.
        targets: sparsities, the same in every layer.

    Raises:
        TypeError, ValueError: as `cats.observe.observe`, and for NaN activations.
    """
    inputs, seen = sample_inputs(model, batches)
    sites: dict[float, dict[str, dict[str, Value]]] = {target: {} for target in targets}
    with torch.no_grad(), eval_mode(model):
        for path, mlp in gated_mlps(model).items():
            x = inputs.pop(path)
            best: dict[float, Choice] = {}
            for target, choice in candidates(path, mlp, x, targets):
                if target not in best or choice.error < best[target].error:
                    best[target] = choice
            for target, choice in best.items():
                sites[target].setdefault(choice.side, {})[path] = choice.value
    return Searched(sites, seen)


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
        given = batch if isinstance(batch, Tensor) else batch.get("attention_mask", batch["input_ids"])
        values = torch.as_tensor(given)
        total += int(values.sum()) if given is not batch and "attention_mask" in batch else values.numel()
    return total


def candidates(path: str, mlp: GatedMLP, x: Tensor, targets: Sequence[float]) -> Iterator[tuple[float, Choice]]:
    """Every side and weights at every target, with the error of the MLP's output on ``x`` (tokens, d)."""
    of = parts_of(mlp)
    down: Any = mlp._modules[of.down]
    gate, up = gate_and_up(mlp, x, of)
    values = {"gate": _inner(mlp)(gate), "up": up}
    neurons = values["gate"] * up
    nothing = down.forward(torch.zeros_like(neurons[:1])).float()  # forward: a mask on its input must not act
    whole = (down.forward(neurons).float() - nothing).square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    norms = column_norms(down).to(x.device)
    for side, other in (SIDES, SIDES[::-1]):
        magnitude = values[side].float().abs()
        rms = values[other].float().square().mean(0).sqrt()
        for kind, weights in zip(WEIGHTS, (None, rms, rms * norms), strict=True):
            histogram = Histogram(x.device)
            try:
                histogram.add(magnitude if weights is None else magnitude * weights)
            except ValueError as broken:
                raise ValueError(f"{path}: {broken}") from broken
            for target in targets:
                quantile = histogram.threshold(target)
                value = quantile if weights is None or quantile == 0 else quantile / weights
                lost = down.forward(neurons.masked_fill(magnitude >= value, 0.0)).float() - nothing
                error = float((lost.square().sum(-1) / whole).mean())
                kept = value.cpu() if isinstance(value, Tensor) else value
                yield target, Choice(side, kind, error, kept)


def _inner(mlp: GatedMLP) -> Any:
    """The activation itself, also of a patched MLP."""
    if "cats_state" in mlp.__dict__:
        return mlp._modules[mlp.cats_state.activation_name].inner
    return activation_of(mlp, parts_of(mlp))
