"""What an experiment costs, for ``--plan``: each experiment module may define ``cost(config) -> Cost``.

Everything is given per parameter of the model, since only the plan knows the models' sizes (from the hub's metadata).
"""

from dataclasses import dataclass
from typing import Any

# lm-eval task: repository, scored continuations in the evaluated split, and roughly how many tokens each has
TASKS = {
    "openbookqa": ("allenai/openbookqa", 2000, 20),
    "arc_easy": ("allenai/ai2_arc", 9504, 40),
    "arc_challenge": ("allenai/ai2_arc", 4688, 45),
    "winogrande": ("allenai/winogrande", 2534, 30),
    "hellaswag": ("Rowan/hellaswag", 40168, 100),
    "piqa": ("baber/piqa", 3676, 45),
    "boolq": ("aps/super_glue", 6540, 160),
    "sciq": ("allenai/sciq", 4000, 130),
    "instruct_boolq": ("aps/super_glue", 6540, 170),
    "instruct_cola": ("nyu-mll/glue", 2086, 35),
    "instruct_sst2": ("nyu-mll/glue", 1744, 50),
}
TRAINING_ITEMS = {"instruct_boolq": 9427, "instruct_cola": 8551, "instruct_sst2": 67349}
OTHER_TASK = ("", 1600, 60)
"""Assumed of any other, such as those of the pocket profile."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
FORWARD = 2.0
"""Float operations per parameter and token."""
TRAINING = 6.0
"""The same forward and backward."""


@dataclass(frozen=True)
class Cost:
    """Cost of one experiment on one model.

    Attributes:
        flops: float operations per parameter.
        bytes_read: per parameter, for work that reads weights rather than computes.
        memory: bytes per parameter at the peak: weights with what comes on top of them.
        fixed_memory: bytes at the peak that do not depend on the model.
        fixed_seconds: seconds on any machine that do not depend on the model.
        layers: decoder layers run at most, 0 for all; fewer are run where memory is short.
        uses_models: False for an experiment that does not load ``config.models``.
    """

    flops: float = 0.0
    bytes_read: float = 0.0
    memory: float = 0.0
    fixed_memory: float = 0.0
    fixed_seconds: float = 0.0
    layers: int = 0
    uses_models: bool = True


def memory_per_parameter(dtypes: tuple[str, ...] | list[str], trains: bool = False) -> float:
    """Weights in the widest of ``dtypes``, and a quarter more for activations and cache; for LoRA twice that."""
    return max(BYTES[dtype] for dtype in dtypes) * (2.5 if trains else 1.25)


def evaluation_tokens(tasks: tuple[str, ...] | list[str], limit: int | None) -> int:
    """Tokens that one evaluation of ``tasks`` reads."""
    total = 0
    for task in tasks:
        _, requests, tokens = TASKS.get(task, OTHER_TASK)
        total += (min(requests, 4 * limit) if limit else requests) * tokens
    return total


def default_cost(config: Any) -> Cost:
    """Of an experiment without a ``cost``: the memory of the model, and an unknown time."""
    return Cost(memory=memory_per_parameter([config.dtype]), fixed_seconds=float("nan"))
