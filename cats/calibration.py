"""Calibration (equation 3): sample text gives thresholds per layer, for every criterion and target sparsity at once.

Scores are streamed into histograms (`cats.histogram`). Criteria whose score is weighted by a root mean square over the
same text need a second pass: the first one streams the squares (and whatever needs no weights), the second the weighted
scores, so that the quantile is that of the very score that is applied. The batches are kept for it, token ids only.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from cats.criteria import BLOCK_INPUTS, Criterion, get
from cats.criteria.base import Searched
from cats.devices import compute_dtype, execution_device
from cats.files import write_text_atomically
from cats.histogram import Histogram
from cats.observe import Batches, check_sites, observe
from cats.sequential import check_dense, settle
from cats.structure import attention_linears, gated_mlps, mlp_linears, parts_of
from cats.text_config import fingerprint
from cats.thresholds import Thresholds, Value, check_sparsity

__all__ = [
    "FEW_TOKENS",
    "Histogram",
    "Thresholds",
    "calibrate",
    "check_sparsity",
    "column_norms",
    "histograms",
    "write_text_atomically",
]

FEW_TOKENS = 256
"""Fewer tokens than this are warned about: quantiles settle with a few thousand."""


def histograms(
    model: nn.Module, batches: Batches, sites: Iterable[str] = ("gate",)
) -> tuple[dict[tuple[str, str], Histogram], int]:
    """One `Histogram` per (site, module path), and the number of tokens seen. Raises as `cats.observe.observe`."""
    statistics = _Statistics(plain=check_sites(sites))
    tokens = observe(model, batches, statistics.record, statistics.sites())
    return {key[1:]: histogram for key, histogram in statistics.histograms.items()}, tokens


@torch.no_grad()
def column_norms(linear: nn.Module) -> Tensor:
    """Euclidean norm of each column of a linear layer's weight, float32 (in_features,) on the CPU.

    A layer of another kind than torch's (adapters, quantised weights, offloaded ones) is fed with unit vectors.
    """
    weight: Any = linear._parameters.get("weight")
    if hasattr(weight, "full_tensor"):  # sharded by fully_shard
        weight = nn.Parameter(weight.full_tensor(), requires_grad=False)
    if type(linear) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta:
        return torch.linalg.vector_norm(weight, dim=0, dtype=torch.float32).cpu()
    width = int(cast(Any, linear).in_features)
    options: dict[str, Any] = {"dtype": compute_dtype(linear), "device": execution_device(linear)}
    # forward, and not the call: a mask that a patch has put on the input must not act
    bias = linear.forward(torch.zeros(1, width, **options)).float()
    norms = []
    for start in range(0, width, 256):
        unit = torch.zeros(min(256, width - start), width, **options)
        unit[torch.arange(len(unit)), torch.arange(len(unit)) + start] = 1
        norms.append((linear.forward(unit).float() - bias).norm(dim=-1).cpu())
    return torch.cat(norms)


@dataclass
class _Statistics:
    """What one pass streams.

    Attributes:
        plain: sites whose values get a histogram as they are.
        squares_of: sites whose mean squares are wanted.
        weights: (criterion, site, module path) to the weights of a score that gets a histogram.
        histograms: (criterion, site, module path) to histogram, the criterion "" for plain values.
        squares: (site, module path) to the sum of squares per neuron, float64.
    """

    plain: tuple[str, ...] = ()
    squares_of: tuple[str, ...] = ()
    weights: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    histograms: dict[tuple[str, str, str], Histogram] = field(default_factory=dict)
    squares: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def sites(self) -> tuple[str, ...]:
        """What has to be watched."""
        return tuple(dict.fromkeys((*self.plain, *self.squares_of, *(site for _, site, _ in self.weights))))

    def record(self, site: str, name: str, values: Tensor) -> None:
        if site in self.plain:
            self._add(("", site, name), values)
        for key, weights in self.weights.items():
            if key[1:] == (site, name):
                if weights.device != values.device:
                    self.weights[key] = weights = weights.to(values.device)
                self._add(key, values.float() * weights)
        if site in self.squares_of:
            total = values.float().square().sum(0, dtype=torch.float64)
            self.squares[site, name] = self.squares[site, name] + total if (site, name) in self.squares else total
            self.counts[site, name] = self.counts.get((site, name), 0) + len(values)

    def _add(self, key: tuple[str, str, str], values: Tensor) -> None:
        try:
            self.histograms.setdefault(key, Histogram(values.device)).add(values)
        except ValueError as error:
            raise ValueError(f"{key[2]}: {error}") from error

    def rms(self, site: str, name: str) -> Tensor:
        return (self.squares[site, name] / self.counts[site, name]).sqrt().float().cpu()


@dataclass
class _Layer:
    """`cats.criteria.Layer` of one module."""

    name: str
    linear: nn.Module
    statistics: _Statistics

    def rms(self, site: str) -> Tensor:
        if (site, self.name) not in self.statistics.squares:
            raise ValueError(f"the root mean square of {site} is not known: the criterion's rms_of lacks {site!r}")
        return self.statistics.rms(site, self.name)

    def norms(self) -> Tensor:
        return column_norms(self.linear)


def _modules(model: nn.Module, site: str) -> dict[str, nn.Module]:
    """Path of each module that gets a value at ``site``, to the linear layer that multiplies what is scored there."""
    if site == "mlp_linears":
        return {path: mlp._modules[part] for path, (mlp, part) in mlp_linears(model).items()}
    if site == "attention_linears":
        return attention_linears(model)
    return {path: mlp._modules[parts_of(mlp).down] for path, mlp in gated_mlps(model).items()}


def _sites_of(criterion: Criterion, sites: Iterable[str] | None) -> tuple[str, ...]:
    if sites is None:
        return criterion.sites
    sites = check_sites(sites)
    allowed = (*criterion.sites, *criterion.other_sites)
    wrong = [site for site in sites if site not in allowed]
    if wrong:
        raise ValueError(f"criterion {criterion.name!r} has no site {wrong[0]}: allowed are {', '.join(allowed)}")
    return sites


def _weights(
    model: nn.Module, criterion: Criterion, sites: Iterable[str], statistics: _Statistics
) -> dict[tuple[str, str, str], Tensor]:
    weights = {}
    for site in sites:
        if site in BLOCK_INPUTS:
            continue
        for path, linear in _modules(model, site).items():
            own = criterion.weights(_Layer(path, linear, statistics))
            if own is not None:
                weights[criterion.name, site, path] = own.detach().float().cpu()
    return weights


def _stream(
    model: nn.Module, batches: Batches, criteria: Sequence[Criterion], sites: dict[str, tuple[str, ...]]
) -> tuple[_Statistics, int]:
    """Histograms of all scores and the weights in them, in one pass or two; and how many tokens were seen."""
    gated_mlps(model)  # says what is wrong with the model first
    rms_of = tuple(dict.fromkeys(site for criterion in criteria for site in criterion.rms_of))
    statistics = _Statistics(squares_of=rms_of)
    for criterion in criteria:
        if not criterion.rms_of:
            statistics.weights |= _weights(model, criterion, sites[criterion.name], statistics)
    all_weights, scored = dict(statistics.weights), [c for c in criteria if c.scored]
    statistics.weights = {k: w for k, w in all_weights.items() if get(k[0]).scored}
    weighted = {(criterion, site) for criterion, site, _ in all_weights}
    statistics.plain = tuple(
        dict.fromkeys(
            site
            for c in scored
            for site in sites[c.name]
            if site in BLOCK_INPUTS or not (c.rms_of or (c.name, site) in weighted)
        )
    )
    if not statistics.sites():
        statistics.weights = all_weights
        return statistics, 0
    if rms_of:
        batches = list(batches)
    tokens = observe(model, batches, statistics.record, statistics.sites())
    if rms_of:
        second = _Statistics()
        for criterion in criteria:
            if criterion.rms_of:
                second.weights |= _weights(model, criterion, sites[criterion.name], statistics)
        if second.weights:
            observe(model, batches, second.record, second.sites())
        statistics.histograms |= second.histograms
        all_weights |= second.weights
    statistics.weights = all_weights
    return statistics, tokens


def _thresholds(
    model: nn.Module,
    criterion: Criterion,
    sites: tuple[str, ...],
    target: float,
    statistics: _Statistics,
    tokens: int,
) -> Thresholds:
    by_site: dict[str, Any] = {}  # module path to value
    for site in sites:
        if site in BLOCK_INPUTS:
            plain = {name: h for (_, s, name), h in statistics.histograms.items() if s == site}
            by_site[site] = {name: histogram.threshold(target) for name, histogram in plain.items()}
            continue
        by_site[site] = {}
        for path in _modules(model, site):
            key = (criterion.name, site, path)
            weights = statistics.weights.get(key)
            histogram = statistics.histograms.get(key if weights is not None else ("", site, path))
            by_site[site][path] = _parameter(criterion, target, weights, histogram)
    level = float(target) if criterion.has_level else 0.0
    seen = tokens if criterion.scored or criterion.rms_of else 0
    return Thresholds(level, model=fingerprint(model), tokens=seen, criterion=criterion.name, **by_site)


def _of_search(model: nn.Module, criterion: Criterion, target: float, searched: Searched) -> Thresholds:
    sites: dict[str, Any] = searched.sites[target]
    return Thresholds(target, model=fingerprint(model), tokens=searched.tokens, criterion=criterion.name, **sites)


def _parameter(criterion: Criterion, target: float, weights: Tensor | None, histogram: Histogram | None) -> Value:
    return criterion.parameter(target, weights, histogram.threshold if histogram is not None else lambda _k: math.nan)


def _plain_numbers(sparsity: Any) -> Any:
    """A number, or a list of several; those of numpy and torch become Python's."""
    if hasattr(sparsity, "tolist"):
        return sparsity.tolist()
    if isinstance(sparsity, Iterable) and not isinstance(sparsity, str):
        return [one.item() if hasattr(one, "item") else one for one in sparsity]
    return sparsity


@overload
def calibrate(
    model: nn.Module,
    batches: Batches,
    sparsity: float = 0.5,
    sites: Iterable[str] | None = None,
    criterion: str = "cats",
    *,
    sequential: bool = False,
) -> Thresholds: ...
@overload
def calibrate(
    model: nn.Module,
    batches: Batches,
    sparsity: Sequence[float],
    sites: Iterable[str] | None = None,
    criterion: str = "cats",
    *,
    sequential: bool = False,
) -> dict[float, Thresholds]: ...
@overload
def calibrate(
    model: nn.Module,
    batches: Batches,
    sparsity: Any = 0.5,
    sites: Iterable[str] | None = None,
    criterion: Any = "cats",
    *,
    sequential: bool = False,
) -> Any: ...
def calibrate(
    model: nn.Module,
    batches: Batches,
    sparsity: Any = 0.5,
    sites: Iterable[str] | None = None,
    criterion: Any = "cats",
    *,
    sequential: bool = False,
) -> Any:
    """Thresholds at the ``sparsity``-quantile of a criterion's score per layer over sample text (equation 3).

    The values are those of the model as it is, so of a dense one those that no threshold has touched, as in the paper;
    behind the thresholds of earlier layers they are others, and the sparse model skips a point or three more than its
    target. ``sequential`` calibrates layer by layer instead, each behind the thresholds of those before it.

    On a patched model the values are those before its thresholds, formed with the thresholds of earlier layers in
    force: calibrating again and applying the result moves a fine-tuned model back onto its target.

    Args:
        model: a causal language model with gated MLPs, in any dtype.
        batches: mappings with ``input_ids`` and optionally ``attention_mask`` (padding is left out), as a tokenizer
            returns them, or tensors of ids. Gone through once, however many targets and criteria there are; twice, over
            a copy of the ids, where a criterion weighs its score with a root mean square (chess, gate-norm, up-norm);
            not at all where none has a score (oracle, random, relufication). One that searches (auto) keeps a sample.
        sparsity: the target k in [0, 1), or several.
        sites: where thresholds act: None for the criterion's own; for CATS ``gate``, and for appendix B
            ``attention_input`` and ``mlp_input`` too; for teal and wina ``mlp_linears`` and ``attention_linears``.
        criterion: name of a criterion (`cats.criteria.names`), or several.
        sequential: move the thresholds, each layer's by one factor, to where the model that they have made sparse skips
            its target: one pass more over the batches for every criterion and target (see `cats.sequential.settle`).

    Returns:
        Thresholds; a dict from target to Thresholds when several targets were asked for; and a dict from criterion to
        these when several criteria were.

    Raises:
        TypeError, ValueError: a target outside [0, 1), an unknown criterion or site, no gated MLP, NaN
            activations, a patched model with ``sequential``, and as `cats.observe.observe`.
    """
    sparsity, sites = _plain_numbers(sparsity), None if sites is None else check_sites(sites)
    targets = sparsity if isinstance(sparsity, list) else [sparsity]
    if not targets:
        raise ValueError("no target sparsity given: sparsity must be a number in [0, 1) or a sequence of them")
    for target in targets:
        check_sparsity(target)
    criteria = [get(name) for name in ([criterion] if isinstance(criterion, str) else list(criterion))]
    if not criteria:
        raise ValueError("no criterion given: criterion must be a name or a sequence of names")
    sites_of = {c.name: _sites_of(c, sites) for c in criteria}
    if sequential:
        check_dense(model)
    if sequential or any(c.searches for c in criteria):
        batches = list(batches)
    plain = [c for c in criteria if not c.searches]
    statistics, tokens = _stream(model, batches, plain, sites_of)
    searched = {c.name: c.search(model, cast(list[Any], batches), targets) for c in criteria if c.searches}
    tokens = max([tokens, *(result.tokens for result in searched.values())])
    if 0 < tokens < FEW_TOKENS:
        warnings.warn(
            f"these thresholds come from {tokens} tokens only; quantiles settle with a few thousand", stacklevel=2
        )
    made: dict[str, Any] = {}
    for c in criteria:
        if c.searches:
            by_target = {t: _of_search(model, c, t, searched[c.name]) for t in targets}
        else:
            by_target = {t: _thresholds(model, c, sites_of[c.name], t, statistics, tokens) for t in targets}
        if sequential:
            by_target = {t: settle(model, thresholds, cast(list[Any], batches)) for t, thresholds in by_target.items()}
        made[c.name] = by_target if isinstance(sparsity, list) else by_target[targets[0]]
    return made[criterion] if isinstance(criterion, str) else made
