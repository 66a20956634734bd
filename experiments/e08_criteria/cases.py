"""What e08 compares: each criterion at levels that read the same bytes per token, and how many bytes those are.

Of an MLP with as many weights in each of its three products, a neuron criterion that skips the fraction k reads the
deciding product and 1 - k of the two others: it saves 2k/3. An input criterion that skips the fraction s of the inputs
saves s of what it covers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

import cats
from cats import criteria
from cats.structure import attention_linears, mlp_linears
from experiments.framework.variants import DENSE

MLP, MODEL = "mlp", "model"
"""Scopes: the MLPs alone, or the linear layers of the attention too."""
SAVED = 2 / 3
"""Of an MLP's weights, for each neuron skipped."""


@dataclass(frozen=True)
class Case:
    """One criterion at one level.

    Attributes:
        criterion: a name in `cats.criteria`, or ``dense``.
        scope: ``mlp`` or ``model``.
        level: k of the neuron criterion that reads as many bytes; None for what has no level.
    """

    criterion: str
    scope: str = MLP
    level: float | None = None

    @property
    def variant(self) -> str:
        """As result files hold it: ``cats-50``."""
        return self.criterion if self.level is None else f"{self.criterion}-{100 * self.level:g}"

    @property
    def key(self) -> str:
        """Unique within a model."""
        return self.variant if self.scope == MLP else f"{self.variant}/{self.scope}"

    @property
    def sites(self) -> tuple[str, ...]:
        """Where its thresholds act."""
        sites = criteria.get(self.criterion).sites
        return (*sites, "attention_linears") if self.scope == MODEL else sites

    def target(self, weights: "Weights") -> float:
        """What its calibration is asked for: k, or the fraction s of inputs that reads as many bytes."""
        if self.level is None or not skips_inputs(self.criterion):
            return self.level or 0.0
        covered = weights.total(weights.mlp) + (weights.total(weights.attention) if self.scope == MODEL else 0)
        return SAVED * self.level * weights.total(weights.mlp) / covered


DENSE_CASE = Case(DENSE.criterion)


def skips_inputs(criterion: str) -> bool:
    """Whether it skips inputs of linear layers, and not neurons."""
    return "mlp_linears" in criteria.get(criterion).sites


def cases(names: Sequence[str], levels: Sequence[float]) -> list[Case]:
    """Dense, then cats, which others are paired with, then all others; input criteria in both scopes."""
    made = [DENSE_CASE]
    for name in sorted(names, key=lambda name: name != "cats"):  # stable: the order given, but for cats
        criterion = criteria.get(name)
        if not criterion.has_level:
            made.append(Case(name))
            continue
        scopes = (MLP, MODEL) if "attention_linears" in criterion.other_sites else (MLP,)
        made += [Case(name, scope, level) for scope in scopes for level in levels]
    return made


@dataclass(frozen=True)
class Read:
    """What one case skips and reads, as fractions: the columns of `CriterionRow`."""

    sparsity_measured: float | None
    input_sparsity: float | None
    mlp_bytes: float
    model_bytes: float


class Weights:
    """How many weights a token reads.

    Attributes:
        mlp: of each linear layer of the MLPs, by module path.
        attention: likewise; empty where the layers have no ``self_attn``.
        everything: all parameters but a table of input embeddings, of which a token reads one row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mlps = {path: [] for path in cats.gated_mlps(model)}  # type: dict[str, list[str]]
        self.mlp: dict[str, int] = {}
        for path, (mlp, name) in mlp_linears(model).items():
            self.mlp[path] = _numel(mlp._modules[name])
            self._mlps[path.removesuffix(f".{name}")].append(path)
        try:
            self.attention = {path: _numel(linear) for path, linear in attention_linears(model).items()}
        except ValueError:  # no self_attn
            self.attention = {}
        self._model = model

    @staticmethod
    def total(weights: Mapping[str, int]) -> int:
        """Sum over modules."""
        return sum(weights.values())

    @cached_property
    def everything(self) -> int:
        model: Any = self._model
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        unread = 0 if head is not None and head.weight is table.weight else table.weight.numel()
        return sum(parameter.numel() for parameter in model.parameters()) - unread

    def read(self, case: Case, skipped: Mapping[str, float]) -> Read:
        """What is read where the fractions ``skipped``, by module path (of MLPs or of linear layers), are skipped."""
        if case == DENSE_CASE:
            return Read(None, None, 1.0, 1.0)
        mlp, attention, inputs = 0.0, 0.0, None
        if skips_inputs(case.criterion):
            mlp = sum(share * self.mlp[path] for path, share in skipped.items() if path in self.mlp)
            attention = sum(share * self.attention[path] for path, share in skipped.items() if path in self.attention)
            covered = self.total(self.mlp) + (self.total(self.attention) if case.scope == MODEL else 0)
            inputs = (mlp + attention) / covered
        else:
            for path, share in skipped.items():
                mlp += SAVED * share * sum(self.mlp[linear] for linear in self._mlps[path])
        own = self.total(self.mlp)
        return Read(
            sparsity_measured=(mlp + attention) / (SAVED * own),
            input_sparsity=inputs,
            mlp_bytes=1 - mlp / own,
            model_bytes=1 - (mlp + attention) / self.everything,
        )


def _numel(linear: nn.Module | None) -> int:
    weight: Any = linear.weight if linear is not None else None
    return int(weight.numel())
