"""How far the model's own output moves when its MLPs skip neurons: Kullback-Leibler divergence on sample text.

The error of an MLP's output does not tell what later layers make of it. Here the whole model runs on a little text with
MLPs skipping as given thresholds say, and its distribution of the next token is compared with the dense model's.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from cats.devices import eval_mode, execution_device
from cats.equation import GatedMLP, gate_and_up, inner_activation
from cats.histogram import Histogram
from cats.observe import dense_path, keeps_logits, model_inputs, vocabulary_of
from cats.structure import gated_mlps, parts_of
from cats.thresholds import Value

TOKENS = 1024
"""Of the text that the model runs on, rows spread evenly over it."""
POSITIONS = 512
"""Among them, evenly spread, where distributions are compared."""
SCORED_TOKENS = 4096
"""Of the text that thresholds are settled on."""
See: TypeAlias = Callable[[str, Tensor], None]
Skips: TypeAlias = Mapping[str, tuple[str, Value]]
"""Module path of an MLP to the product that decides, "gate" or "up", and its threshold."""


class Output:
    """The output of one model on sample text, dense and with MLPs that skip; patches are not in force.

    Raises:
        TypeError, ValueError: as `cats.observe.observe`.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any]) -> None:
        self._model = model
        self._rows = sample_rows(model, batches, TOKENS)
        self._dense = list(self._logits({}))

    def divergence(self, skips: Skips) -> float:
        """Nats from the dense model's distribution to that with ``skips``, the mean over positions; 0 without any."""
        total, count = 0.0, 0
        for dense, sparse in zip(self._dense, self._logits(skips), strict=True):
            expected, given = (logits.float().log_softmax(-1) for logits in (dense, sparse))
            total += float((expected.exp() * (expected - given)).sum())
            count += len(expected)
        return total / count

    def _logits(self, skips: Skips) -> Iterator[Tensor]:
        """Logits (positions, vocabulary) of each row."""
        # of a model spread over devices only its last one could be indexed, and accelerate moves arguments to the first
        keeps = keeps_logits(self._model) and len({weight.device for weight in self._model.parameters()}) < 2
        with torch.no_grad(), eval_mode(self._model), _skipping(self._model, skips):
            for inputs, positions in self._rows:
                options: dict[str, Any] = {"logits_to_keep": positions} if keeps else {}
                logits = self._model(**inputs, use_cache=False, **options).logits[0]
                yield logits if keeps else logits[positions]


def scores_with(
    model: nn.Module, batches: Sequence[Any], skips: Skips, scales: Mapping[str, Tensor | None]
) -> dict[str, Histogram]:
    """Histograms of each MLP's deciding product, times its scale, while all MLPs skip as ``skips`` says.

    The text is what `sample_rows` makes of `SCORED_TOKENS`. Raises as `cats.observe.observe`.
    """
    histograms: dict[str, Histogram] = {}

    def add(path: str, magnitude: Tensor) -> None:
        scale = scales[path]
        score = magnitude if scale is None else magnitude * scale.to(magnitude.device)
        histograms.setdefault(path, Histogram(magnitude.device)).add(score)

    fewest: dict[str, Any] = {"logits_to_keep": 1} if keeps_logits(model) else {}
    with torch.no_grad(), eval_mode(model), _skipping(model, skips, add):
        for inputs, _positions in sample_rows(model, batches, SCORED_TOKENS):
            model(**inputs, use_cache=False, **fewest)
    return histograms


def sample_rows(model: nn.Module, batches: Sequence[Any], most: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Up to ``most`` tokens of the text as inputs of the model, one row each and without padding, and which of their
    positions, evenly spread, are compared."""
    device, vocabulary = execution_device(model), vocabulary_of(model)
    rows: list[Tensor] = []
    for batch in batches:
        inputs = model_inputs(batch, device, vocabulary)
        for index in range(len(inputs["input_ids"])):
            ids = inputs["input_ids"][index]
            real = ids[inputs["attention_mask"][index].bool()] if "attention_mask" in inputs else ids
            if len(real):
                rows.append(real[None, :most])
    chosen = spread_over(rows, most)
    step = -(-sum(row.numel() for row in chosen) // POSITIONS)
    return [({"input_ids": row}, torch.arange(0, row.numel(), step)) for row in chosen]  # to index on any device


def spread_over(rows: Sequence[Tensor], most: int) -> list[Tensor]:
    """Those of some rows (1, length) that make up ``most`` of their tokens, or as many as there are, evenly spread over
    the tokens of all; the last one perhaps cut."""
    total = sum(row.numel() for row in rows)
    chosen: list[Tensor] = []
    passed = taken = 0
    for row in rows:
        if taken < most and taken * total <= passed * most:
            chosen.append(row[:, : most - taken])
            taken += chosen[-1].numel()
        passed += row.numel()
    return chosen


@contextmanager
def _skipping(model: nn.Module, skips: Skips, see: See | None = None) -> Iterator[None]:
    """While it is in force, MLPs give what ``skips`` leaves of their output, whatever patch is on them; ``see`` gets
    the path and the magnitude (tokens, m) of the product that decides."""
    with ExitStack() as undo, dense_path(model), torch.compiler.set_stance("force_eager"):
        for path, mlp in gated_mlps(model).items():
            if path in skips or "cats_state" in mlp.__dict__:
                undo.callback(_replace(mlp, partial(_left, mlp, skips.get(path), partial(see, path) if see else None)))
        yield


def _replace(mlp: GatedMLP, left: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Make ``mlp`` compute ``left``; what undoes it.

    A forward that patches have put on the instance may look after devices: it runs too, and its output is not used.
    """

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return left(args[0] if args else next(iter(kwargs.values())))

    if "forward" in mlp.__dict__:
        return mlp.register_forward_hook(
            lambda _mlp, args, kwargs, _output: forward(*args, **kwargs), with_kwargs=True
        ).remove
    mlp.forward = forward
    return partial(delattr, mlp, "forward")


def _left(mlp: GatedMLP, skip: tuple[str, Value] | None, see: Callable[[Tensor], None] | None, x: Tensor) -> Tensor:
    """Output of ``mlp`` (..., d) without the neurons skipped."""
    of = parts_of(mlp)
    gate, up = gate_and_up(mlp, x, of)
    gate = inner_activation(mlp, of)(gate)
    neurons = gate * up
    if skip is not None:
        side, threshold = skip
        magnitude = (gate if side == "gate" else up).float().abs()
        if see is not None:
            see(magnitude.flatten(0, -2))
        limit = torch.as_tensor(threshold, dtype=torch.float32, device=magnitude.device)
        neurons = neurons.masked_fill(magnitude < limit, 0.0)
    down: Any = mlp._modules[of.down]
    left: Tensor = down.forward(neurons)  # forward: a mask on its input must not act
    return left
