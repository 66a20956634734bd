"""Options that several experiments share, to inherit from. Free of torch."""

from dataclasses import dataclass
from typing import Annotated

from experiments.framework.options import Count, NotNegative, OneOf, Positive, Range, Seed, Sparsity, Whole

MOST_TOKENS = 10**9
"""Of one text: 8 GB of token ids. The paper's profile trains on 42 million."""


def lora_names() -> tuple[str, ...]:
    """Names of `cats.lora.PRESETS`, imported when they are needed."""
    from cats.lora import PRESETS

    return tuple(PRESETS)


def check_tokens(**blocks_and_length: int) -> None:
    """Refuse texts that cannot be held. Raises ValueError naming the first option.

    Call it with the number of blocks first: ``check_tokens(heldout_blocks=64, length=512)``.
    """
    (name, blocks), (_, length) = blocks_and_length.items()
    if blocks * length > MOST_TOKENS:
        raise ValueError(f"{name} must be at most {MOST_TOKENS // length} with length = {length}, not {blocks}")


class Checked:
    """Base of dataclasses whose ``__post_init__`` each checks something and then calls that of the next."""

    def __post_init__(self) -> None:
        """Nothing more to check."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(Checked):
    """Tasks, texts and levels: what every accuracy experiment measures on.

    Attributes:
        tasks: names of lm-eval tasks, or of YAML files in ``include_path``.
        levels: target sparsities.
        limit: items per task at most, two for a standard error; all when None.
        batch_size: sequences, or lm-eval requests, at once; lowered when memory runs out.
        calibration_blocks, heldout_blocks: blocks of ``length`` tokens.
        include_path: folder of the user's own lm-eval tasks.
    """

    tasks: tuple[str, ...]
    levels: tuple[Sparsity, ...]
    limit: Annotated[int, Range(2)] | None = None
    batch_size: Count = 8
    calibration_blocks: Count = 64
    heldout_blocks: Count = 16
    length: Annotated[int, Range(2)] = 512
    include_path: str | None = None

    def __post_init__(self) -> None:
        check_tokens(calibration_blocks=self.calibration_blocks, length=self.length)
        check_tokens(heldout_blocks=self.heldout_blocks, length=self.length)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Checked):
    """LoRA training, shared by all variants.

    Attributes:
        lora: one of `cats.lora.PRESETS`.
        train_batch_size: sequences per step, over all processes.
        micro_batch_size: of them at once; all when None; lowered when memory runs out.
    """

    lora: Annotated[str, OneOf(lora_names)] = "paper"
    train_batch_size: Count = 16
    micro_batch_size: Count | None = None
    weight_decay: NotNegative = 0.01
    warmup_steps: Whole = 10

    def __post_init__(self) -> None:
        batch, micro = self.train_batch_size, self.micro_batch_size
        if micro is not None and micro < batch and batch % micro:
            raise ValueError(f"micro_batch_size must divide train_batch_size ({batch}), not be {micro}")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SweepOptions(Checked):
    """Seeds, and the short runs that choose a learning rate.

    Attributes:
        seeds: of the measured runs, added to the profile's seed.
        learning_rates: those tried; with one, nothing is swept.
        sweep_level: the target sparsity that the criterion's rate is chosen at.
    """

    seeds: tuple[Seed, ...] = (0,)
    learning_rates: tuple[Positive, ...]
    sweep_level: Sparsity = 0.7
