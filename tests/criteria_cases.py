"""Which criteria there are, and their scores in float64: what the tests of criteria share."""

import torch
from torch import nn

import cats
from cats.observe import observe

ALL = ("auto", "cats", "chess", "gate-norm", "oracle", "random", "relufication", "teal", "up", "up-norm", "wina")
NEURONS = ("cats", "chess", "gate-norm", "up", "up-norm")
MASKS = ("oracle", "random", "teal", "wina")


def values(model: nn.Module, batches: list, site: str) -> dict[str, torch.Tensor]:
    """Everything seen at a site, (tokens, n) in float64 by module path."""
    seen: dict[str, list[torch.Tensor]] = {}
    observe(model, batches, lambda _site, name, v: seen.setdefault(name, []).append(v), (site,))
    return {name: torch.cat(v).double() for name, v in seen.items()}


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """Norm of each neuron's row of the transposed down projection."""
    return {n: mlp.down_proj.weight.double().norm(dim=0) for n, mlp in cats.gated_mlps(model).items()}


def rms(model: nn.Module, batches: list, site: str) -> dict[str, torch.Tensor]:
    return {name: v.square().mean(0).sqrt() for name, v in values(model, batches, site).items()}


def scores(model: nn.Module, batches: list, name: str) -> dict[str, torch.Tensor]:
    """Scores of a neuron criterion, (tokens, m) by module path, from activations kept whole: the plain two-pass way."""
    v = values(model, batches, "up" if name.startswith("up") else "gate")
    weights = {layer: torch.ones(v[layer].shape[1]).double() for layer in v}
    if name in ("chess", "gate-norm", "up-norm"):
        other = rms(model, batches, "gate" if name == "up-norm" else "up")
        weights = {layer: weights[layer] * other[layer] for layer in v}
    if name.endswith("-norm"):
        weights = {layer: weights[layer] * norm for layer, norm in norms(model).items()}
    return {layer: v[layer].abs() * weights[layer] for layer in v}
