"""What e06 times: the profile's options, and the conditions that follow from them."""

from dataclasses import dataclass, replace
from typing import Any

from cats_kernels.operator import BACKENDS

from cats.calibration import check_sparsity
from cats.models import DTYPES
from experiments.e06_throughput.decoding import LOOPS
from experiments.framework.config import Config

ATTENTION = ("eager", "sdpa", "flash_attention_2")
GROWTH = ("loop", "batches", "contexts", "sparsities", "layers", "prompts")
LEAST = {
    "prompts": 1, "prompt_tokens": 1, "layers": 0, "calibration_tokens": 1, "check_tokens": 0, "rounds": 0,
    "growth.prompts": 1,
}  # fmt: skip
"""Options that are whole numbers, and the least that each may be."""


@dataclass(frozen=True)
class Case:
    """One condition: every variant generates from every prompt in it.

    Attributes:
        loop: one of `experiments.e06_throughput.decoding.LOOPS`.
        lengths: generated tokens; all are read from one generation, so a static cache is as large as the last needs.
        sparsities: targets of the CATS variants timed against dense.
        prompts: how many (batches of) prompts, numbered from ``first_prompt``.
    """

    loop: str
    lengths: tuple[int, ...]
    sparsities: tuple[float, ...]
    prompts: int
    prompt_tokens: int
    batch: int = 1
    first_prompt: int = 0

    @property
    def context(self) -> int:
        return self.prompt_tokens + max(self.lengths)


def options_of(config: Config) -> dict[str, Any]:
    """The experiment's options with their defaults.

    - ``lengths``: loop to generated tokens, such as {eager = [256, 512]}
    - ``separate_lengths``: a generation (and a static cache of its own size) for each length, not one read at them all
    - ``dtypes``, ``sparsities``, ``prompts``, ``prompt_tokens``, ``kernel``
    - ``attention``: dtype to transformers' implementation of attention, for dense and CATS alike, "sdpa" if not given:
      the one that is fastest when dense, such as {float32 = "eager"} on an H200
    - ``dependent_launch``: of inductor's kernels in the loop "graph", on a GPU that can; those of CATS always are
    - ``layers``: at most so many, 0 for all; fewer where memory is short
    - ``calibration_tokens``; ``calibration``: "text", or "generated" for text that the model itself has continued,
      should decoding stray more than 2 points from the target
    - ``check_tokens``: length of the greedy checks in float32, 0 for none
    - ``rounds`` of the module timings behind the Amdahl table, 0 for none
    - ``growth``: conditions to vary one at a time, eager unless its ``loop`` says otherwise: ``batches``, ``contexts``,
      ``sparsities``, ``layers``, with so many ``prompts``

    Raises:
        ValueError: an unknown option, or one of the wrong kind.
    """
    defaults: dict[str, Any] = {
        "lengths": {"eager": [16, 32]},
        "separate_lengths": False,
        "dtypes": [config.dtype],
        "sparsities": [0.5],
        "prompts": 2,
        "prompt_tokens": 32,
        "layers": 0,
        "attention": {},
        "dependent_launch": True,
        "calibration": "text",
        "calibration_tokens": 256,
        "check_tokens": 16,
        "rounds": 20,
        "kernel": "auto",
        "growth": {},
    }
    unknown = sorted(set(config.options) - set(defaults))
    if unknown:
        raise ValueError(f"e06 has no option {', '.join(unknown)}: allowed are {', '.join(defaults)}")
    options = {**defaults, **config.options}
    _check(options)
    return options


def _check(options: dict[str, Any]) -> None:
    for name in ("lengths", "attention", "growth"):
        if not isinstance(options[name], dict):
            raise ValueError(f"e06.{name} must be a table, such as {{KEY = VALUE}}: {options[name]!r}")
    for name in ("separate_lengths", "dependent_launch"):
        if not isinstance(options[name], bool):
            raise ValueError(f"e06.{name} must be true or false: {options[name]!r}")
    growth = {f"growth.{name}": value for name, value in options["growth"].items()}
    numbers = {f"lengths.{loop}": values for loop, values in options["lengths"].items()}
    for name, values in {"dtypes": options["dtypes"], "sparsities": options["sparsities"], **numbers, **growth}.items():
        if name not in ("growth.loop", "growth.prompts") and (not isinstance(values, list) or not values):
            raise ValueError(f"e06.{name} must be a list of at least one: {values!r}")
    for name, given, known in (
        ("lengths", options["lengths"], LOOPS),
        ("growth", options["growth"], GROWTH),
        ("dtypes", options["dtypes"], ("auto", *DTYPES)),
        ("attention", options["attention"], DTYPES),
        ("attention", options["attention"].values(), ATTENTION),
        ("kernel", [options["kernel"]], BACKENDS),
        ("calibration", [options["calibration"]], ("text", "generated")),
        ("growth.loop", [options["growth"].get("loop", "eager")], LOOPS),
    ):
        if strange := [str(one) for one in given if one not in known]:
            raise ValueError(f"e06.{name} cannot be {', '.join(strange)}: allowed are {', '.join(known)}")
    for sparsity in (*options["sparsities"], *options["growth"].get("sparsities", ())):
        check_sparsity(sparsity)
    if not numbers:
        raise ValueError("e06.lengths must give at least one loop its numbers of tokens, such as {eager = [256]}")
    flat = {**options, **growth, **numbers}
    for name, least in LEAST.items():
        _check_whole(name, flat.get(name, least), least)
    lists = {**dict.fromkeys(numbers, 2), "growth.batches": 1, "growth.contexts": 1, "growth.layers": 1}
    for name, least in lists.items():
        for number in flat.get(name, ()):
            _check_whole(name, number, least)


def _check_whole(name: str, value: Any, least: int) -> None:
    if type(value) is not int or value < least:
        raise ValueError(f"e06.{name} must be a whole number, {least} or more: {value!r}")


def cases_of(options: dict[str, Any]) -> list[Case]:
    """Figure 4's conditions: every loop with its lengths."""
    cases = []
    for loop, lengths in options["lengths"].items():
        groups = [(n,) for n in sorted(lengths)] if options["separate_lengths"] else [tuple(sorted(lengths))]
        sparsities = tuple(options["sparsities"])
        cases += [Case(loop, group, sparsities, options["prompts"], options["prompt_tokens"]) for group in groups]
    return cases


def growth_of(options: dict[str, Any]) -> tuple[list[Case], list[tuple[int, Case]]]:
    """Conditions that differ from Figure 4's shortest in one respect; those of other depths with their layers.

    Their static cache is as large as the shortest length needs: so is Figure 4's with ``separate_lengths`` only. Their
    prompts have numbers of their own: the report pairs dense and CATS by prompt.
    """
    growth = options["growth"]
    loop = growth.get("loop", "eager")
    shortest = min(options["lengths"].get(loop) or [n for values in options["lengths"].values() for n in values])
    base = Case(loop, (shortest,), (options["sparsities"][0],), growth.get("prompts", 1), options["prompt_tokens"])
    base = replace(base, first_prompt=options["prompts"])
    cases = [replace(base, batch=n) for n in growth.get("batches", ())]
    cases += [replace(base, prompt_tokens=n) for n in growth.get("contexts", ())]
    if growth.get("sparsities"):
        cases.append(replace(base, sparsities=tuple(growth["sparsities"])))
    return cases, [(n, base) for n in growth.get("layers", ())]
