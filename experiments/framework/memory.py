"""What happens when a GPU's memory runs out: smaller batches, or one sentence."""

import gc
import os
import re
import sys
from types import ModuleType

import torch

from experiments.framework.config import LOWERED, Config, RunError
from experiments.framework.tables import Row

_ALLOCATOR = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"  # what torch reads, the latter as it was called before
# what cuBLAS, the driver and Triton say, whose allocations are not torch's own
_OUT_OF_MEMORY = re.compile(r"CUBLAS_STATUS_ALLOC_FAILED|CUDA.*: out of memory")


def run_within_memory(module: ModuleType, config: Config) -> list[Row]:
    """The experiment's rows; when the GPU's memory runs out, again with smaller batches (finished units are kept).

    Raises:
        RunError: the batches cannot be smaller, or several processes would have to agree on it.
    """
    while True:
        try:
            return list(module.run(config))
        except RuntimeError as error:
            reason = str(error).split("\n")[0]
            if not isinstance(error, torch.OutOfMemoryError) and not _OUT_OF_MEMORY.search(reason):
                raise
            lowered = config.halve_batches() if int(os.environ.get("WORLD_SIZE", "1")) == 1 else {}
            if not lowered:
                needs = f"{config.experiment} needs more memory than the GPU has ({reason})"
                raise RunError(f"{needs}: choose another --model or --dtype, or {_advice(config)}") from error
        words = " and ".join(f"{key} = {value}" for key, value in lowered.items())
        print(f"{config.experiment}: out of GPU memory ({reason}); trying again with {words}", file=sys.stderr)
        gc.collect()  # outside of the except clause, whose traceback keeps the failed attempt's tensors alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def let_segments_grow(config: Config) -> None:
    """Ask torch for segments that grow, in an experiment that trains, unless the user has said how it is to allocate.

    The widths of its batches vary, and what a batch leaves does not fit the next: fine-tuning a 0.5 B model on BoolQ
    ran out of 79 GiB with 17 reserved and unused. Read by torch when it first allocates on a GPU.
    """
    trains = config.device.startswith("cuda") and hasattr(config.options, "train_batch_size")
    if trains and not any(name in os.environ for name in _ALLOCATOR):
        os.environ[_ALLOCATOR[0]] = "expandable_segments:True"


def peak_gib() -> dict[str, float | None]:
    """Most memory that this process has used, in GiB: resident, and of the GPU's that torch has reserved (None without
    one). An experiment that measures peaks itself has reset both before each, the former where Linux lets it.
    """
    import resource  # not on Windows, where nothing here runs

    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    reserved = max(map(torch.cuda.max_memory_reserved, range(torch.cuda.device_count()))) / 2**30 if used else None
    return {"resident": round(resident / 2**30, 2), "gpu": None if reserved is None else round(reserved, 2)}


def _advice(config: Config) -> str:
    """Which option lowers the memory that is needed, as far as the experiment has one."""
    keys = [f"{config.experiment}.{key}" for key in LOWERED if key in config.settings()["options"]]
    return f"lower {' and '.join(keys)} with --set" if keys else "another --device"
