"""Options of e08, and the units of work that follow from them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated

from cats.criteria import get, names
from experiments.e06_throughput.decoding import LOOPS
from experiments.e08_criteria.cases import DENSE_CASE, MLP, Case, cases
from experiments.e08_criteria.heldout import SHORTEST
from experiments.framework.common_options import EvaluationOptions
from experiments.framework.options import Count, MayBeEmpty, OneOf, Range, Sparsity

MASKED, DENSE_PROMPT = "masked", "dense"
"""Values of the column ``prompt``."""
FASTEST = "fastest"
CriterionName = Annotated[str, OneOf(names)]
Levels = Annotated[tuple[Sparsity, ...], MayBeEmpty()]


@dataclass(frozen=True)
class Piece:
    """One unit of work: what is measured (``kind``) of one case, with prompts masked or dense, or of all together."""

    kind: str
    case: Case | None = None
    prompt: str = MASKED

    @property
    def key(self) -> str:
        """Unique within a model: ``tasks/cats-50``, ``mlp-speed``."""
        parts = [self.kind, self.case.key if self.case else "", "" if self.prompt == MASKED else "dense prompt"]
        return "/".join(part for part in parts if part)


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions):
    """Options of e08.

    Attributes:
        criteria: names in `cats.criteria`; all of them by default.
        levels: k of the neuron criteria; the others are measured at as many bytes. Perplexity is measured at all.
        sequential: thresholds are moved layer by layer, each behind those of the layers before it, to where the sparse
            model is on its target (`cats.sequential.settle`); else they are those of the dense model, as in the paper.
        tasks: may be empty.
        task_levels, task_criteria: at which of ``levels``, of which of ``criteria``; all where empty.
        continuation_levels: where perplexity after masked and after dense prompts is measured; nowhere where empty.
        generation_tasks: lm-eval tasks with generated answers, such as ``gsm8k``; may be empty.
        generation_levels, generation_criteria: where; prompts masked and dense.
        generation_items: items per task.
        generation_batch_size: sequences generated at once; lowered when memory runs out.
        speed_levels, speed_criteria: of what is timed, where a kernel serves it; nothing where the levels are empty.
        token_criteria: those of them whose decode steps are timed too (on a GPU each is compiled, for half a minute).
        speed_tokens: tokens of held-out text whose inputs the MLPs are timed on, and so many prompts of
            ``speed_prompt_tokens`` are generated from.
        speed_rounds: of the MLPs; ``speed_generations``: of whole generations.
        speed_length: tokens of a generation.
        speed_loop: one of `experiments.e06_throughput.decoding.LOOPS`; ``fastest``: on a GPU "graph", or "compiled" for
            a model that it does not serve; on a CPU "eager".
        only: patterns of units, such as ``tasks/*`` or ``*/cats-50``, that a run of a part measures; all where empty.
            A part's units are kept in ``state/``, from where a whole run goes on.
    """

    criteria: tuple[CriterionName, ...] = field(default_factory=names)
    levels: tuple[Sparsity, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    sequential: bool = True
    tasks: Annotated[tuple[str, ...], MayBeEmpty()] = ()
    task_levels: Levels = ()
    task_criteria: Annotated[tuple[CriterionName, ...], MayBeEmpty()] = ()
    continuation_levels: Levels = ()
    generation_tasks: Annotated[tuple[str, ...], MayBeEmpty()] = ()
    generation_levels: tuple[Sparsity, ...] = (0.5,)
    generation_criteria: tuple[CriterionName, ...] = ("cats", "up-norm", "auto")
    generation_items: Annotated[int, Range(2)] = 200
    generation_batch_size: Count = 32
    speed_levels: Levels = ()
    speed_criteria: tuple[CriterionName, ...] = ("cats", "chess", "gate-norm", "up", "up-norm", "auto")
    token_criteria: tuple[CriterionName, ...] = ("cats", "up-norm", "auto")
    speed_tokens: Count = 4
    speed_rounds: Count = 30
    speed_generations: Count = 8
    speed_prompt_tokens: Count = 32
    speed_length: Annotated[int, Range(2)] = 64
    speed_loop: Annotated[str, OneOf((FASTEST, *LOOPS))] = FASTEST
    only: Annotated[tuple[str, ...], MayBeEmpty()] = ()

    def __post_init__(self) -> None:
        for name in ("task", "continuation", "speed", *(["generation"] if self.generation_tasks else [])):
            wrong = [level for level in getattr(self, f"{name}_levels") if level not in self.levels]
            if wrong:
                raise ValueError(f"{name}_levels must be among levels, which lack {wrong[0]:g}")
        if self.continuation_levels and self.length < SHORTEST:
            raise ValueError(f"length must be at least {SHORTEST} with continuation_levels, not {self.length}")
        if self.only and not self.pieces():
            raise ValueError(f"only must match a unit, such as {', '.join(piece.key for piece in self.every()[:3])}")
        super().__post_init__()

    def cases(self) -> list[Case]:
        """Dense first, then cats, then the others."""
        return cases(self.criteria, self.levels)

    def pieces(self) -> list[Piece]:
        """The units of work that ``only`` leaves."""
        every = self.every()
        return [p for p in every if not self.only or any(fnmatchcase(p.key, pattern) for pattern in self.only)]

    def every(self) -> list[Piece]:
        """All units of work of a model, perplexity first."""
        made = [Piece("perplexity", case) for case in self.cases()]
        made += self._continuations()
        if self.tasks:
            levels, criteria = self.task_levels or self.levels, self.task_criteria or self.criteria
            made += [Piece("tasks", case) for case in self._at(levels, criteria)]
        if self.generation_tasks:
            for case in self._at(self.generation_levels, self.generation_criteria):
                made += [Piece("answers", case, prompt) for prompt in prompts(case) if case.scope == MLP]
        if self.timed():
            made += [Piece("mlp-speed"), Piece("token-speed")]
        return made

    def _continuations(self) -> Iterator[Piece]:
        for case in self._at(self.continuation_levels, self.criteria) if self.continuation_levels else ():
            yield from (Piece("continuations", case, prompt) for prompt in prompts(case))

    def _at(self, levels: Sequence[float], criteria: Sequence[str]) -> list[Case]:
        """Dense and the cases of ``criteria`` at ``levels``, or without a level."""
        chosen = [case for case in self.cases() if case.criterion in criteria and case.level in (None, *levels)]
        return [DENSE_CASE, *chosen]

    def timed(self, criteria: Sequence[str] | None = None) -> list[Case]:
        """Cases whose speed is measured, of ``criteria`` alone if given: those that a kernel serves."""
        served = [name for name in self.speed_criteria if not get(name).no_kernel and name in (criteria or names())]
        return [case for case in self.cases() if case.criterion in served and case.level in self.speed_levels]


def prompts(case: Case) -> tuple[str, ...]:
    """How prompts may run: for the dense model, and where the activation itself is another, in one way only."""
    plain = case == DENSE_CASE or get(case.criterion).activation is not None
    return (MASKED,) if plain else (MASKED, DENSE_PROMPT)
