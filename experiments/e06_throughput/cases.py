"""What e06 times: the profile's options, and the conditions that follow from them."""

from dataclasses import dataclass, field, replace
from typing import Annotated

from cats_kernels import BACKENDS

from cats.models import DTYPES
from experiments.e06_throughput.decoding import ATTENTION as OWN
from experiments.e06_throughput.decoding import LOOPS
from experiments.framework.options import Count, MayBeEmpty, OneOf, Range, Sparsity, Whole

ATTENTION = ("eager", "sdpa", "flash_attention_2", OWN)
LoopName = Annotated[str, OneOf(tuple(LOOPS))]
Several = Annotated[int, Range(2)]


@dataclass(frozen=True, kw_only=True)
class Growth:
    """Conditions to vary one at a time, from the figure's shortest.

    Attributes:
        loop: the one they are generated in.
        batches: sequences at once.
        contexts: tokens of the prompt.
        sparsities: targets, in place of the figure's first.
        layers: decoder layers.
        prompts: how many (batches of) prompts.
    """

    loop: LoopName = "eager"
    batches: Annotated[tuple[Several, ...], MayBeEmpty()] = ()
    contexts: Annotated[tuple[Count, ...], MayBeEmpty()] = ()
    sparsities: Annotated[tuple[Sparsity, ...], MayBeEmpty()] = ()
    layers: Annotated[tuple[Count, ...], MayBeEmpty()] = ()
    prompts: Count = 1

    def __bool__(self) -> bool:
        return bool(self.batches or self.contexts or self.sparsities or self.layers)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of e06.

    Attributes:
        lengths: loop to generated tokens.
        separate_lengths: a generation (and a static cache of its own size) for each length, not one read at them all.
        dtypes: the profile's when not given.
        sparsities: targets of CATS.
        prompts, prompt_tokens: how many prompts, and how long.
        repeats: turns that dense and CATS take on each prompt; every second one in reverse order.
        layers: at most so many, 0 for all; fewer where memory is short.
        attention: transformers' implementation, for dense and CATS alike, by loop or by dtype (a loop's goes first);
            "sdpa" if not given, and in the loops of one graph "cats", the attention of `cats.generate`, with "sdpa" for
            the prompt (and for a model that it does not serve). Give what is fastest when dense.
        dependent_launch: of inductor's kernels in the loops of one graph, on a GPU that can; those of CATS always are.
        calibration: "text", or "generated" for text that the model itself has continued, should decoding stray more
            than 2 points from the target.
        calibration_tokens: of that text.
        check_tokens: length of the greedy checks in float32, 0 for none.
        rounds: of the module timings behind the Amdahl table, 0 for none.
        kernel: as in `cats.apply`.
        growth: conditions beyond the figure's; of the first model in the first dtype.
    """

    lengths: dict[LoopName, tuple[Several, ...]] = field(default_factory=lambda: {"eager": (16, 32)})
    separate_lengths: bool = False
    dtypes: Annotated[tuple[Annotated[str, OneOf(("auto", *DTYPES))], ...], MayBeEmpty()] = ()
    sparsities: tuple[Sparsity, ...] = (0.5,)
    prompts: Count = 2
    prompt_tokens: Count = 32
    repeats: Count = 2
    layers: Whole = 0
    attention: Annotated[
        dict[Annotated[str, OneOf((*LOOPS, *DTYPES))], Annotated[str, OneOf(ATTENTION)]], MayBeEmpty()
    ] = field(default_factory=dict)
    dependent_launch: bool = True
    calibration: Annotated[str, OneOf(("text", "generated"))] = "text"
    calibration_tokens: Count = 256
    check_tokens: Whole = 16
    rounds: Whole = 20
    kernel: Annotated[str, OneOf(BACKENDS)] = "auto"
    growth: Growth = Growth()

    def __post_init__(self) -> None:
        if self.prompt_tokens in self.growth.contexts:
            raise ValueError(f"growth.contexts must differ from prompt_tokens, which is {self.prompt_tokens}")

    def attention_in(self, loop: str, dtype: str) -> str:
        """The implementation of attention in a loop and dtype."""
        if LOOPS[loop].graph:
            return self.attention.get(loop, OWN)
        return self.attention.get(loop, self.attention.get(dtype, "sdpa"))

    def loops(self) -> set[str]:
        """All loops in use."""
        return {*self.lengths, *([self.growth.loop] if self.growth else [])}


@dataclass(frozen=True)
class Case:
    """One condition: every variant generates from every prompt in it.

    Attributes:
        loop: one of `experiments.e06_throughput.decoding.LOOPS`.
        lengths: generated tokens; all are read from one generation, so a static cache is as large as the last needs.
        sparsities: targets of the CATS variants timed against dense.
        prompts: how many (batches of) prompts.
        condition: ``figure`` or ``growth``.
    """

    loop: str
    lengths: tuple[int, ...]
    sparsities: tuple[float, ...]
    prompts: int
    prompt_tokens: int
    batch: int = 1
    condition: str = "figure"

    @property
    def context(self) -> int:
        return self.prompt_tokens + max(self.lengths)


def cases_of(options: Options) -> list[Case]:
    """Figure 4's conditions: every loop with its lengths."""
    cases = []
    for loop, lengths in options.lengths.items():
        groups = [(n,) for n in sorted(lengths)] if options.separate_lengths else [tuple(sorted(lengths))]
        for group in groups:
            cases.append(Case(loop, group, options.sparsities, options.prompts, options.prompt_tokens))
    return cases


def growth_of(options: Options) -> tuple[list[Case], list[tuple[int, Case]]]:
    """Conditions that differ from Figure 4's shortest in one respect; those of other depths with their layers.

    Their static cache is as large as the shortest length needs: so is Figure 4's with ``separate_lengths`` only.
    """
    growth = options.growth
    shortest = min(options.lengths.get(growth.loop) or [n for values in options.lengths.values() for n in values])
    base = Case(growth.loop, (shortest,), options.sparsities[:1], growth.prompts, options.prompt_tokens)
    base = replace(base, condition="growth")
    cases = [replace(base, batch=n) for n in growth.batches]
    cases += [replace(base, prompt_tokens=n) for n in growth.contexts]
    if growth.sparsities:
        cases.append(replace(base, sparsities=growth.sparsities))
    return cases, [(n, base) for n in growth.layers]
