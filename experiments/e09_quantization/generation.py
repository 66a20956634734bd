"""e09: tokens per second of whole models by format and sparsity, and their memory, in the loops of e06."""

import gc
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch
from transformers import PreTrainedModel

import cats
from experiments.e06_throughput.bench import Bench
from experiments.e06_throughput.cases import LoopName, Several, cases_of
from experiments.e06_throughput.cases import Options as ThroughputOptions
from experiments.e06_throughput.decoding import LOOPS
from experiments.e09_quantization.formats import NAMES_OF_MODELS, PLAIN, Format, format_of
from experiments.framework.config import Config
from experiments.framework.options import Count, MayBeEmpty, OneOf, Sparsity, Whole
from experiments.framework.tables import QuantizationThroughputRow, Row, ThroughputRow

ROWS = (QuantizationThroughputRow,)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What is generated; nothing without lengths.

    Attributes:
        lengths: loop of e06 to generated tokens.
        formats: of the MLPs' weights, or with "-all" of every linear layer's; unquantised is always timed too.
        sparsities: targets of CATS; dense is always timed too.
        prompts, prompt_tokens, repeats, layers, calibration_tokens, dependent_launch: as in e06.
    """

    lengths: Annotated[dict[LoopName, tuple[Several, ...]], MayBeEmpty()] = field(default_factory=dict)
    formats: tuple[Annotated[str, OneOf(NAMES_OF_MODELS)], ...] = ("int8-128", "int4-128")
    sparsities: tuple[Sparsity, ...] = (0.5,)
    prompts: Count = 2
    prompt_tokens: Count = 32
    repeats: Count = 2
    layers: Whole = 0
    calibration_tokens: Count = 1024
    dependent_launch: bool = True

    def as_throughput(self) -> ThroughputOptions:
        """The options of e06 for the same."""
        shared = ("lengths", "sparsities", "prompts", "prompt_tokens", "repeats", "calibration_tokens")
        values = {name: getattr(self, name) for name in (*shared, "layers", "dependent_launch")}
        return ThroughputOptions(**values, check_tokens=0, rounds=0)


def formats_of(options: Generation) -> Iterator[Format]:
    """Unquantised first."""
    yield from map(format_of, (PLAIN, *options.formats))


def check_loops(config: Config[Any]) -> None:
    """Raises ValueError for a loop that is one CUDA graph, on another device."""
    graphs = sorted(loop for loop in config.options.generation.lengths if LOOPS[loop].graph)
    if graphs and not config.device.startswith("cuda"):
        raise ValueError(f'the loop "{graphs[0]}" is a CUDA graph, for which {config.device} is no device: use "eager"')


def time_format(config: Config[Any], name: str, form: Format) -> list[Row]:
    """One model in one format: dense and CATS take turns, thresholds calibrated on the quantised model."""
    options: Generation = config.options.generation
    inner: Config[Any] = replace(config, options=options.as_throughput())

    def prepare(model: PreTrainedModel) -> None:
        if form.bits is not None:
            cats.quantize(model, form.bits, form.group_size, linears=form.linears)
        gc.collect()

    cases = cases_of(inner.options)
    bench = Bench(inner, name, config.dtype, options.layers, cases, prepare)
    weights = weight_bytes(bench.model)
    dense = [row for case in cases for row in bench.time(case)]
    threads = None if config.device.startswith("cuda") else torch.get_num_threads()
    bench.close()
    return [as_row(row, form, threads, weights) for row in dense if isinstance(row, ThroughputRow)]


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, each counted once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(tensors.values())


def as_row(row: ThroughputRow, form: Format, threads: int | None, weights: int) -> QuantizationThroughputRow:
    """A row of e06 as one of this experiment."""
    values = asdict(row)
    for key in ("condition", "batch", "cache_tokens"):
        values.pop(key)
    return QuantizationThroughputRow(**values, **form.columns, threads=threads, weight_bytes=weights)
