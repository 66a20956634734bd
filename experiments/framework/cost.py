"""What an experiment costs, for ``--plan``: each experiment module may define ``cost(config) -> Cost``.

Everything is given per parameter of the model, since only the plan knows the models' sizes (from the hub's metadata).
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

# lm-eval task: repository, items of the evaluated split, inputs of an item that differ but for the last token of a
# continuation, and roughly how many tokens an input has
TASKS = {
    "openbookqa": ("allenai/openbookqa", 500, 4, 20),
    "arc_easy": ("allenai/ai2_arc", 2376, 4, 40),
    "arc_challenge": ("allenai/ai2_arc", 1172, 4, 45),
    "winogrande": ("allenai/winogrande", 1267, 2, 30),
    "hellaswag": ("Rowan/hellaswag", 10042, 4, 100),
    "piqa": ("baber/piqa", 1838, 2, 45),
    "boolq": ("aps/super_glue", 3270, 1, 160),
    "sciq": ("allenai/sciq", 1000, 4, 130),
    "instruct_boolq": ("aps/super_glue", 3270, 1, 170),
    "instruct_cola": ("nyu-mll/glue", 1043, 1, 35),
    "instruct_sst2": ("nyu-mll/glue", 872, 1, 50),
}
TRAINING_ITEMS = {"instruct_boolq": 9427, "instruct_cola": 8551, "instruct_sst2": 67349}
OTHER_TASK = ("", 400, 2, 50)
"""Assumed of any other, and what those of the pocket profile have."""
LONGEST, LONGEST_OTHER = 600, 100
"""Tokens of the longest input of the tasks, and where all are such others."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
FORWARD = 2.0
"""Float operations per parameter and token."""
TRAINING = 6.0
"""The same forward and backward."""


@dataclass(frozen=True)
class Work:
    """What goes through a model, and what lm-eval handles beside it.

    Attributes:
        operations: float operations per parameter, forward alone.
        passes: of a batch forward through the layers. A small model waits for the host to start its kernels, so its
            time is that of the passes.
        items: of tasks, made into requests and scored.
        steps: of training, for what Trainer and the optimizer do beside the model.
        trained, micro_steps: operations and passes of training, forward and backward with adapters.
        runs: of training, each with adapters and a Trainer of its own, and compiled where that pays.
    """

    operations: float = 0.0
    passes: float = 0.0
    items: float = 0.0
    steps: float = 0.0
    trained: float = 0.0
    micro_steps: float = 0.0
    runs: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        sums = (own + its for own, its in zip(astuple(self), astuple(other), strict=True))
        return Work(*sums)

    def __mul__(self, times: float) -> "Work":
        return Work(*(times * own for own in astuple(self)))


@dataclass(frozen=True)
class Cost:
    """Cost of one experiment on one model.

    Attributes:
        work: through the model.
        bytes_read: per parameter, for work that reads weights rather than computes.
        fixed_bytes: bytes read that do not depend on the model.
        memory: bytes per parameter at the peak: weights with what comes on top of them.
        fixed_memory: bytes at the peak that do not depend on the model.
        logits: tokens whose logits, and in training their gradients, are held at once.
        fixed_seconds: seconds of the host that do not depend on the model: most of them to compile.
        loads: how often a model is loaded.
        layers: decoder layers run at most, 0 for all; fewer are run where memory is short.
        uses_models: False for an experiment that does not load ``config.models``.
    """

    work: Work = Work()
    bytes_read: float = 0.0
    fixed_bytes: float = 0.0
    memory: float = 0.0
    fixed_memory: float = 0.0
    logits: int = 0
    fixed_seconds: float = 0.0
    loads: int = 1
    layers: int = 0
    uses_models: bool = True


def memory_per_parameter(dtypes: Sequence[str], trains: bool = False) -> float:
    """Weights in the widest of ``dtypes``, and a quarter more for activations and cache; for LoRA twice that."""
    return max(BYTES[dtype] for dtype in dtypes) * (2.5 if trains else 1.25)


def text(blocks: int, length: int, batch: int) -> Work:
    """Blocks of text, forward."""
    return Work(FORWARD * blocks * length, math.ceil(blocks / batch))


def evaluation(tasks: Sequence[str], limit: int | None, batch: int) -> Work:
    """One evaluation of ``tasks``, in batches of as many tokens as ``batch`` of the longest inputs have."""
    items = tokens = 0
    for task in tasks:
        _, count, inputs, length = TASKS.get(task, OTHER_TASK)
        count = min(count, limit or count)
        items, tokens = items + count, tokens + count * inputs * length
    longest = LONGEST if any(task in TASKS for task in tasks) else LONGEST_OTHER
    return Work(FORWARD * tokens, math.ceil(tokens / (batch * longest)), items)


def training(steps: float, sequences: int, length: float, at_once: int | None) -> Work:
    """Steps of LoRA on so many sequences each, ``at_once`` of them together."""
    micro = math.ceil(sequences / min(at_once or sequences, sequences))
    trained = TRAINING * steps * sequences * length
    return Work(steps=steps, trained=trained, micro_steps=steps * micro, runs=1)


def default_cost(config: Any) -> Cost:
    """Of an experiment without a ``cost``: the memory of the model, and an unknown time."""
    return Cost(memory=memory_per_parameter([config.dtype]), fixed_seconds=float("nan"))
