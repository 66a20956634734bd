"""Calibration (equation 3): one pass over sample text gives one threshold a layer for each target sparsity.

Activations are streamed into histograms whose bins are the leading bits of the float32 pattern: 2048 bins to each power
of two, so a bin is at most 0.05 % wide relative to its value whatever the scale, bfloat16 values fall on bin edges
exactly, and memory (0.7 MB a layer) does not depend on how many tokens are seen.
"""

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from cats.observe import SITES, Batches, check_sites, observe

FORMAT = "cats-thresholds-1"
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
        below = torch.cat([torch.zeros(1, dtype=torch.int64), self.counts.cpu().cumsum(0)]).double() / self.total
        # `below` rises with the edge: the crossing bin's two edges are the candidates, the lower one on a tie
        upper = int(torch.searchsorted(below, torch.tensor(sparsity, dtype=torch.float64)))
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


@dataclass(frozen=True)
class Thresholds:
    """One threshold a layer: what calibration makes, `cats.apply` uses, and JSON stores.

    Attributes:
        sparsity: the target k in [0, 1).
        gate, attention_input, mlp_input: module path to threshold, for each calibrated site.
        model: what the thresholds were made for: model_type, hidden_size, intermediate_size, num_hidden_layers.
        tokens: how many tokens calibration saw.
    """

    sparsity: float
    gate: dict[str, float]
    attention_input: dict[str, float] = field(default_factory=dict)
    mlp_input: dict[str, float] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        for site in SITES:
            values = getattr(self, site)
            valid = isinstance(values, dict) and all(
                isinstance(name, str)
                and isinstance(t, int | float)
                and not isinstance(t, bool)
                and math.isfinite(t)
                and t >= 0
                for name, t in values.items()
            )
            if not valid:
                raise ValueError(f"thresholds of {site} must map module paths to finite non-negative numbers")
        if not isinstance(self.model, dict):
            raise ValueError(f"model must be a mapping of what the thresholds were made for, not {self.model!r}")
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 0:
            raise ValueError(f"tokens must be a non-negative whole number, not {self.tokens!r}")

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically."""
        write_text_atomically(Path(path), json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Thresholds":
        """Read what `save` wrote. Raises ValueError if the file is not a valid thresholds file."""
        try:
            data = json.loads(Path(path).read_text())
            if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
                raise ValueError(f'its "format" is not "{FORMAT}"')
            return cls(**data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a CATS thresholds file: {error}") from error


def write_text_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless ``sparsity`` is in [0, 1)."""
    if not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), not {sparsity!r}")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What thresholds must agree on with a model: its type and its sizes."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


def histograms(
    model: nn.Module, batches: Batches, sites: Iterable[str] = ("gate",)
) -> tuple[dict[tuple[str, str], Histogram], int]:
    """One `Histogram` per (site, module path), and the number of tokens seen. Raises as `cats.observe.observe`."""
    found: dict[tuple[str, str], Histogram] = {}

    def record(site: str, name: str, values: Tensor) -> None:
        try:
            found.setdefault((site, name), Histogram(values.device)).add(values)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    tokens = observe(model, batches, record, sites)
    return found, tokens


@overload
def calibrate(
    model: nn.Module, batches: Batches, sparsity: float = 0.5, sites: Iterable[str] = ("gate",)
) -> Thresholds: ...
@overload
def calibrate(
    model: nn.Module, batches: Batches, sparsity: Sequence[float], sites: Iterable[str] = ("gate",)
) -> dict[float, Thresholds]: ...
def calibrate(
    model: nn.Module, batches: Batches, sparsity: float | Sequence[float] = 0.5, sites: Iterable[str] = ("gate",)
) -> Thresholds | dict[float, Thresholds]:
    """Thresholds at the ``sparsity``-quantile of each layer's |act(x W_gate)| over sample text (equation 3).

    On a patched model the activations are those before its thresholds, formed with the thresholds of earlier layers in
    force: calibrating again and applying the result moves a fine-tuned model back onto its target.

    Args:
        model: a causal language model with gated MLPs, in any dtype.
        batches: mappings with ``input_ids`` and optionally ``attention_mask`` (padding is left out), as a tokenizer
            returns them, or tensors of ids.
        sparsity: the target k in [0, 1), or several, all served by the same pass.
        sites: ``gate`` (the method), and for appendix B ``attention_input`` and ``mlp_input``.

    Returns:
        Thresholds, or a dict from target to Thresholds when several were asked for.

    Raises:
        TypeError, ValueError: a target outside [0, 1), no gated MLP, NaN activations, an unknown site, and as
            `cats.observe.observe`.
    """
    targets = [sparsity] if isinstance(sparsity, int | float) else list(sparsity)
    if not targets:
        raise ValueError("no target sparsity given: sparsity must be a number in [0, 1) or a sequence of them")
    for target in targets:
        check_sparsity(target)
    sites = check_sites(sites)
    found, tokens = histograms(model, batches, sites)
    made = {}
    for target in targets:
        by_site: dict[str, dict[str, float]] = {site: {} for site in SITES}
        for (site, name), histogram in found.items():
            by_site[site][name] = histogram.threshold(target)
        made[target] = Thresholds(float(target), **by_site, model=fingerprint(model), tokens=tokens)
    return made[targets[0]] if isinstance(sparsity, int | float) else made
