"""How fast each criterion is that a kernel serves: all MLPs for one token, and a decode step of the whole model.

The thresholds are those that accuracy is measured with, and every variant runs in every round beside the dense model.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from cats_kernels import path_of
from cats_kernels.dispatch import choose_backend
from torch import Tensor, nn

import cats
from cats.equation import gate_and_up
from cats.generation.serving import obstacle
from cats.search import sample_inputs
from cats.sparsity import overall_sparsity
from cats.structure import parts_of
from cats.text_config import text_config
from experiments.e06_throughput.decoding import Decoder, make_greedy
from experiments.e08_criteria.cases import DENSE_CASE, Case
from experiments.e08_criteria.measures import Comparison
from experiments.e08_criteria.options import FASTEST
from experiments.framework.provenance import machine_name
from experiments.framework.samples import median_interval
from experiments.framework.tables import CriterionSpeedRow, CriterionSpeedSample, Row, pack_numbers
from experiments.framework.timing import measure as measure_calls

WARMUPS = 3
Times = dict[Case, Sequence[float]]


def mlp_rows(subject: Comparison) -> list[Row]:
    """Milliseconds of all MLPs for one token: cold weights, on the inputs of a few tokens of held-out text in turn."""
    options, model = subject.config.options, subject.model
    timed = {case: subject.thresholds_of(case) for case in options.timed()}
    cats.remove(model)
    sample = sample_inputs(model, [subject.heldout_on_device[0][:1]], options.speed_tokens + 1)
    inputs, count = {path: x[1:] for path, x in sample.inputs.items()}, sample.tokens - 1  # not the first token
    sparsity = {case: overall_sparsity(model, _skipped(model, inputs, timed[case])) for case in timed}
    try:
        times = _mlp_times(subject, timed_blocks(model, timed), inputs, count)
    finally:
        cats.remove(model)
    return _rows(subject, times, sparsity, "mlp", "")


def timed_blocks(model: nn.Module, timed: Mapping[Case, cats.Thresholds]) -> dict[Case, dict[str, nn.Module]]:
    """Every MLP of ``model``, dense when called, by path, as the dense model and each case has it.

    All share the weights, but for the down projection, which lies transposed in the patched ones. ``model`` is left
    patched, since its down projections are theirs.
    """
    mlps = cats.gated_mlps(model)
    blocks: dict[Case, dict[str, nn.Module]] = {DENSE_CASE: {path: _copy(mlp, False) for path, mlp in mlps.items()}}
    for case, thresholds in timed.items():
        cats.apply(model, thresholds)
        blocks[case] = {path: _copy(mlp, True) for path, mlp in cats.gated_mlps(model).items()}
    return blocks


def _copy(mlp: nn.Module, patched: bool) -> nn.Module:
    """The block with thresholds of its own over the same weights; a dense one keeps its own down projection too."""
    down = "" if patched else f"{parts_of(mlp).down}."  # type: ignore[arg-type]
    shared = {id(weight): weight for name, weight in mlp.named_parameters() if patched or not name.startswith(down)}
    return copy.deepcopy(mlp, shared)


def _mlp_times(
    subject: Comparison, blocks: dict[Case, dict[str, nn.Module]], inputs: dict[str, Tensor], count: int
) -> Times:
    options, device = subject.config.options, subject.model.device.type
    with torch.inference_mode():
        # one row each, of shape (1, 1, d) as in decoding
        calls: dict[str, Any] = {
            case.variant: [
                partial(block, inputs[path][token].view(1, 1, -1))
                for token in range(count)
                for path, block in own.items()
            ]
            for case, own in blocks.items()
        }
        layers = len(next(iter(blocks.values())))
        if device != "cuda":
            calls = {name: _in_turn(group, layers) for name, group in calls.items()}
        timings = measure_calls(calls, WARMUPS, options.speed_rounds, device=device)
    factor = layers if device == "cuda" else 1  # there a timing is per call
    return {case: [factor * ms for ms in timings[case.variant].times_ms] for case in blocks}


def _in_turn(calls: Sequence[Callable[[], object]], size: int) -> Callable[[], None]:
    """One call that makes ``size`` of ``calls``, the next ones every time."""
    groups = cycle([calls[start : start + size] for start in range(0, len(calls), size)])

    def run() -> None:
        for call in next(groups):
            call()

    return run


@torch.no_grad()
def _skipped(model: nn.Module, inputs: dict[str, Tensor], thresholds: cats.Thresholds) -> dict[str, float]:
    """Fraction of neurons that each MLP skips on ``inputs``."""
    shares = {}
    for path, mlp in cats.gated_mlps(model).items():
        of = parts_of(mlp)
        gate, up = gate_and_up(mlp, inputs[path], of)
        activation: Any = mlp._modules[of.activation] if of.activation else of.function
        by_up = thresholds.decider_of(path) == "up"
        magnitude = (up if by_up else activation(gate)).float().abs()
        limit = torch.as_tensor((thresholds.up if by_up else thresholds.gate)[path], device=magnitude.device)
        shares[path] = float((magnitude < limit).float().mean())
    return shares


def token_rows(subject: Comparison) -> list[Row]:
    """Milliseconds of one decode step of the whole model, from whole generations that take turns."""
    options, model = subject.config.options, subject.model
    timed = {case: subject.thresholds_of(case) for case in options.timed(options.token_criteria)}
    sparsity = {}
    for case in timed:  # over the same text as accuracy: what decoding skips differs from prompt to prompt
        subject.become(case)
        sparsity[case] = overall_sparsity(model, subject.heldout_pass(case)[1])
    cats.remove(model)
    before, window = model.generation_config, getattr(text_config(model), "sliding_window", None)
    length, context = options.speed_length, options.speed_prompt_tokens + options.speed_length
    make_greedy(model, context)
    loop = fastest_loop(model) if options.speed_loop == FASTEST else options.speed_loop
    decoder = Decoder(model, loop, context)
    rows = torch.cat([ids[:, : options.speed_prompt_tokens] for ids in subject.heldout])
    prompts = list(rows[: options.speed_tokens].split(1))
    order: list[Case] = [DENSE_CASE, *timed]
    times: dict[Case, list[float]] = {case: [] for case in order}
    try:
        for case in order:  # whatever is compiled, is compiled now
            _switch(model, timed.get(case))
            decoder.warm_up(prompts[0])
        for index in range(options.speed_generations):
            start = index % len(order)
            for case in order[start:] + order[:start]:
                _switch(model, timed.get(case))
                decoder.warm_up(prompts[0])
                generation = decoder.timed(prompts[index % len(prompts)], [length])
                times[case].append(1e3 * generation.decode_s[length] / (length - 1))
    finally:
        cats.remove(model)
        model.generation_config = before
        if window is not None:
            text_config(model).sliding_window = window
        torch._dynamo.reset()
    return _rows(subject, dict(times), sparsity, "token", loop)


def _switch(model: nn.Module, thresholds: cats.Thresholds | None) -> None:
    if thresholds is None:
        cats.remove(model)
    else:
        cats.apply(model, thresholds)


def fastest_loop(model: Any) -> str:
    """The fastest of e06's loops that serves ``model`` and can be had without minutes of tuning."""
    if model.device.type != "cuda":
        return "eager"
    return "compiled" if obstacle(model) else "graph"


def _rows(subject: Comparison, times: Times, sparsity: dict[Case, float], what: str, loop: str) -> list[Row]:
    model, device = subject.model, subject.model.device
    common: dict[str, Any] = {
        "machine": machine_name(subject.config.device),
        "model": subject.name,
        "backend": choose_backend("auto", device.type, model.dtype),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "what": what,
        "loop": loop,
    }
    rows: list[Row] = []
    dense = times[DENSE_CASE]
    for case, own in times.items():
        who: dict[str, Any] = {**common, "criterion": case.criterion, "variant": case.variant}
        rows.append(CriterionSpeedSample(**who, milliseconds=pack_numbers(own)))
        if case == DENSE_CASE or case.level is None:
            continue
        speedup, low, high = median_interval([base / ms for base, ms in zip(dense, own, strict=True)])
        value, dense_value = median_interval(own)[0], median_interval(dense)[0]
        if what == "token":
            value, dense_value = 1e3 / value, 1e3 / dense_value
        row = CriterionSpeedRow(
            **who,
            path=path_of(1, model.dtype, device),
            sparsity_target=case.level,
            sparsity=sparsity[case],
            unit="tokens/s" if what == "token" else "ms",
            value=value,
            dense_value=dense_value,
            speedup=speedup,
            speedup_low=low,
            speedup_high=high,
            rounds=len(own),
        )
        rows.append(row)
    return rows
