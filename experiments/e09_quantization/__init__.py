"""int8 and int4 weights under sparsity: speed, memory and quality, alone and together.

Purpose: weight quantisation is what most people run, and sparsity has to come on top of it. Quality: perplexity (and
tasks) of a model whose MLPs are rounded to each format, dense and with one criterion at each level, thresholds
calibrated on the quantised model; whether the two damages add up is a question that the report answers. Speed: one MLP
block of the true shapes at batch 1, cold cache, this project's kernels on each format beside torch's own dense
kernels for it and its dense products, all but the unquantised dense ones checked against float64, and timed in the same
interleaved rounds, with the bytes that must be read at the measured bandwidth as the bound. Generation: tokens per
second and memory of whole models in e06's loops, dense and sparse in every format.
Cost: quality, a pass over the held-out text (and the tasks) per format and level, and a calibration per format; speed,
some seconds per shape and format; generation, as e06 per format.

    nox -s experiment -- e09 --model PATH_OR_HUB_ID
    nox -s experiment -- e09 --set 'e09.formats=["int4-128"]' --set 'e09.shapes=[]'
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

from experiments.e05_mlp_latency import SHAPES
from experiments.e06_throughput import COMPILE_SECONDS, KERNEL_SECONDS, PREFILL
from experiments.e09_quantization import generation, speed
from experiments.e09_quantization.formats import NAMES_OF_MODELS, PLAIN
from experiments.e09_quantization.generation import Generation
from experiments.e09_quantization.quality import ROWS, Case, QuantizedSubject, cases, measure
from experiments.framework.common_options import EvaluationOptions
from experiments.framework.config import Config
from experiments.framework.cost import BYTES, FORWARD, Cost, Work, evaluation, memory_per_parameter, text
from experiments.framework.options import Count, MayBeEmpty, OneOf, Sparsity, Whole
from experiments.framework.subject import check, check_length, check_models
from experiments.framework.tables import Row
from experiments.framework.timing import flush_bytes
from experiments.framework.zero_shot import Samples

DTYPES = ("float32", "float16", "bfloat16")


def neuron_criteria() -> tuple[str, ...]:
    """Criteria with a level that skip neurons, imported when they are needed."""
    from cats.criteria import get, names

    return tuple(name for name in names() if get(name).has_level and "mlp_linears" not in get(name).sites)


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of e09.

    Attributes:
        formats: of the MLPs' weights, or with "-all" (of quality alone) of every linear layer's; unquantised is always
            measured too.
        criterion: one that skips neurons.
        levels: its target sparsities, for quality.
        tasks: may be empty: perplexity alone.
        quality: whether a model's quality is measured at all.
        shapes: of the MLP blocks timed; may be empty.
        dtypes: of their activations.
        sparsities: of the timing; 0 is timed always.
        warmups, rounds: of the timing.
        generation: of whole models, see `Generation`.
        compiled: whether inductor's MLPs are timed too, which compile for minutes on a CPU.
    """

    formats: tuple[Annotated[str, OneOf(NAMES_OF_MODELS)], ...] = ("int8-row", "int8-128", "int4-32", "int4-128")
    criterion: Annotated[str, OneOf(neuron_criteria)] = "cats"
    levels: tuple[Sparsity, ...] = (0.3, 0.5, 0.7)
    tasks: Annotated[tuple[str, ...], MayBeEmpty()] = ()
    quality: bool = True
    shapes: Annotated[tuple[Annotated[str, OneOf(tuple(SHAPES))], ...], MayBeEmpty()] = ()
    dtypes: tuple[Annotated[str, OneOf(DTYPES)], ...] = ("bfloat16",)
    sparsities: tuple[Sparsity, ...] = (0.5, 0.7, 0.9)
    warmups: Whole = 5
    rounds: Count = 40
    compiled: bool = True
    generation: Generation = field(default_factory=Generation)

    def cases(self) -> list[Case]:
        """What is measured of a model."""
        return cases(self.formats, self.criterion, self.levels) if self.quality else []


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose."""
    options = config.options
    return {"train": options.calibration_blocks, "heldout": options.heldout_blocks} if options.quality else {}


def run(config: Config[Options]) -> Iterable[Row]:
    """Quality of each model, then speed of each shape, then generation by each model."""
    options = config.options
    generation.check_loops(config)
    if options.quality:
        if options.tasks:
            check(config)
        check_models(config)
        check_length(config, text_blocks(config))
        for name in config.models:
            yield from measure_model(config, name)
    units = [(shape, dtype) for shape in options.shapes for dtype in options.dtypes]
    for shape, dtype in config.progress(units, "MLP latency", total=len(units)):
        key = f"speed/{shape}/{dtype}"
        yield from config.unit(key, partial(speed.time_shape, config, shape, dtype), speed.ROWS)
    for name in config.models if options.generation.lengths else ():
        for form in generation.formats_of(options.generation):
            key = f"generation/{name}/{form.name}"
            yield from config.unit(key, partial(generation.time_format, config, name, form), generation.ROWS)


def measure_model(config: Config[Options], name: str) -> list[Row]:
    """All rows of one model; a format at a level is a unit of work of its own."""
    subject, every = QuantizedSubject(config, name), config.options.cases()
    rows: list[Row] = []
    dense: dict[str, Samples | None] = {}
    for case in config.progress(every, name, len(every)):
        given = dense.get(PLAIN), dense.get(case.format.name)
        own = config.unit(f"{name}/{case.key}", partial(measure, subject, case, *given), ROWS)
        if case.level is None:
            dense[case.format.name] = Samples.of(own)
        rows += own
    return rows


def cost(config: Config[Options]) -> Cost:
    """A pass over the held-out text and the tasks per case and a calibration per format; and the timing."""
    options, on_gpu = config.options, config.device.startswith("cuda")
    batch = options.batch_size
    each = evaluation(options.tasks, options.limit, batch) + text(options.heldout_blocks, options.length, batch)
    calibration = text(options.calibration_blocks, options.length, batch) * (2 * (len(options.formats) + 1))
    through = each * len(options.cases()) + calibration * bool(options.quality)
    seconds = read = fixed = 0.0
    for shape in options.shapes:
        d, m = SHAPES[shape]
        for dtype in options.dtypes:
            weights = 3.0 * d * m * BYTES[dtype]
            fixed = max(fixed, 8 * weights)  # float32 and float64 for the reference, and copies
            calls = (len(options.formats) + 1) * (len(options.sparsities) + 3) * (options.warmups + options.rounds)
            read += 0.0 if on_gpu else calls * (0.5 * weights + flush_bytes())
            seconds += 6.5 * (len(options.formats) + 1) if on_gpu else 10.0  # to compile
    generated = options.generation
    models = (1 + len(generated.formats)) * bool(generated.lengths)
    through += Work(FORWARD * generated.calibration_tokens) * models
    tokens = generated.prompts * sum(max(lengths) + PREFILL for lengths in generated.lengths.values())
    turns = generated.repeats * (1 + len(generated.sparsities)) * (1 + len(generated.formats))
    compiled = sum(COMPILE_SECONDS[loop] for loop in generated.lengths) * (1 + len(generated.sparsities)) * on_gpu
    seconds += len(config.models) * models * (compiled + KERNEL_SECONDS)
    uses = options.quality or bool(generated.lengths)
    return Cost(
        through,
        bytes_read=tokens * turns * BYTES.get(config.dtype, 2),
        memory=2.0 * memory_per_parameter([config.dtype]) if uses else 0.0,
        fixed_bytes=read,
        fixed_memory=fixed,
        fixed_seconds=seconds,
        loads=options.quality + models,
        uses_models=uses,
    )
