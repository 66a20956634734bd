"""Figure 4: generation throughput, dense against CATS, in the loops of `decoding.py`, batch 1, greedy.

Purpose: what a user gains end to end, in the paper's loop (eager) and in the fastest one here. Tokens per second from
the first to the last generated token; prefill, compile time and peak memory stand beside it. Dense and CATS take turns
on the same model in one process: on each prompt dense, CATS, CATS, dense, so that drift from run to run is in the rows.
The sparsity in effect is measured in an untimed pass over the very tokens that were generated. Also: what it costs to
grow (batch, context, sparsity, layers), where a token's time goes, what Amdahl's law allows from that, and whether
CATS generates the tokens it must. A model with a tokenizer gets text for prompts and calibration, one without
(``shape:NAME``, random weights) random tokens.
Cost: five minutes on two cores (pocket); on an H200 four minutes per 7B model and dtype with two prompts up to 512
tokens, and in the loop graph-tuned a minute and a half more per length for tuning; hours with the paper's fifty prompts
up to 2048 tokens.

    nox -s experiment -- e06 --model shape:mistral-7b
"""

from collections.abc import Iterable
from functools import partial

import torch

from experiments.e06_throughput.bench import Bench
from experiments.e06_throughput.cases import Options, cases_of, growth_of
from experiments.e06_throughput.checks import greedy_checks
from experiments.e06_throughput.decoding import LOOPS
from experiments.framework.config import Config
from experiments.framework.cost import BYTES, Cost, Work, memory_per_parameter
from experiments.framework.tables import AmdahlRow, GreedyRow, Row, ShareRow, ThroughputRow

COMPILE_SECONDS = {"eager": 0.0, "compiled": 22.0, "graph": 22.0, "graph-tuned": 50.0}
"""Of one variant's step on a GPU, by loop."""
KERNEL_SECONDS = 12.0
"""Of a model in one dtype: kernels, the timing of modules, checks."""
PREFILL, READ_TO_MAKE = 4, 40
"""A prompt, and making random weights, in times that the weights are read."""
ROWS = (ThroughputRow, ShareRow, AmdahlRow, GreedyRow)


def run(config: Config[Options]) -> Iterable[Row]:
    """Time every model in ``config.models`` in every dtype.

    Raises:
        ValueError: a loop that is one CUDA graph, on another device.
    """
    options = config.options
    graphs = sorted(loop for loop in options.loops() if LOOPS[loop].graph)
    if graphs and not config.device.startswith("cuda"):
        raise ValueError(f'the loop "{graphs[0]}" is a CUDA graph, for which {config.device} is no device: use "eager"')
    dtypes = dtypes_of(config)
    for model in config.models:
        for dtype in dtypes:
            growing = bool(options.growth) and model == config.models[0] and dtype == dtypes[0]
            yield from config.unit(f"{model}/{dtype}", partial(measure, config, model, dtype, growing), ROWS)


def measure(config: Config[Options], name: str, dtype: str, growing: bool) -> list[Row]:
    """All rows of one model in one dtype."""
    options = config.options
    cases = cases_of(options)
    grown, deeper = growth_of(options) if growing else ([], [])
    bench = Bench(config, name, dtype, options.layers, [*cases, *grown])
    rows: list[Row] = []
    for case in config.progress([*cases, *grown], f"{name} {dtype}", len(cases) + len(grown)):
        rows += bench.time(case)
    if options.rounds:
        rows += bench.shares(cases[-1], rows)
    if options.check_tokens and bench.model.dtype == torch.float32:
        rows += greedy_checks(bench, options.check_tokens)
    bench.close()
    for layers, case in deeper:
        bench = Bench(config, name, dtype, layers, [case])
        rows += bench.time(case)
        bench.close()
    return rows


def dtypes_of(config: Config[Options]) -> tuple[str, ...]:
    """Those of the options, or the profile's."""
    return config.options.dtypes or (config.dtype,)


def cost(config: Config[Options]) -> Cost:
    """Every generated token reads the weights once, dense and at each sparsity, in every turn, or on a GPU in the eager
    loop waits for the host as a pass does; making random weights and compiling take longer than a few prompts.
    """
    options, dtypes = config.options, dtypes_of(config)
    grown, deeper = growth_of(options)
    on_gpu = config.device.startswith("cuda")
    read = passes = 0.0
    for case in [*cases_of(options), *grown, *(case for _, case in deeper)]:
        tokens = case.prompts * (max(case.lengths) + PREFILL) * options.repeats * (1 + len(case.sparsities))
        if on_gpu and case.loop == "eager":
            passes += tokens * len(dtypes)
        else:
            read += tokens
    loads = len(dtypes) + len(deeper)
    compiled = sum(COMPILE_SECONDS[case.loop] * (1 + len(case.sparsities)) for case in cases_of(options)) * on_gpu
    units = len(dtypes) * len(config.models)
    return Cost(
        Work(passes=passes),
        bytes_read=read * sum(BYTES[dtype] for dtype in dtypes) + READ_TO_MAKE * loads * max(BYTES.values()),
        memory=memory_per_parameter(dtypes),
        fixed_seconds=units * (compiled + KERNEL_SECONDS),
        loads=loads,
        layers=options.layers,
    )
