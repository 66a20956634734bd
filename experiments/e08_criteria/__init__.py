"""Which criterion keeps the most quality at the same bytes: every criterion of `cats.criteria` on the same model.

Purpose: the printed comparisons of training-free criteria contradict each other. Here all of them run as masks,
compared in float32, on the same model, text and tasks, at levels that read the same bytes per token: neuron criteria at
k, input criteria (teal, wina) at 2k/3 of the MLPs' inputs, and once more over attention and MLPs at the bytes of the
model. Random is the floor and oracle the ceiling. Thresholds are calibrated layer by layer, each behind those before
it: with thresholds of the dense model, as in the paper (``sequential = false``), each criterion would skip up to four
points more than its target, and not all alike. What is skipped is measured on held-out text; a row whose sparsity
misses its target by more than a point says so (``on_target``). Differences from the dense model and from cats are
paired.
Measures, each a unit of work of its own, at levels of its own: perplexity; perplexity of continuations after prompts
that run masked or dense; multiple-choice tasks; answers generated greedily (``gsm8k``), prompts masked and dense; and
the speed of what a kernel serves, with the same thresholds and float32 comparisons: all MLPs for one token, and decode
steps of the whole model, in rounds with the dense model.
Cost: one calibration per family of criteria whatever the number of levels, then a pass over the calibration text, one
over the held-out text and an evaluation of the tasks per criterion and level; a minute for the pocket model on two
cores without tasks.

    nox -s experiment -- e08 --model PATH_OR_HUB_ID
    nox -s experiment -- e08 --set 'e08.criteria=["cats", "up-norm", "auto"]' --set 'e08.tasks=["arc_easy", "boolq"]'
    nox -s experiment -- e08 --profile small --set 'e08.generation_tasks=["gsm8k"]' --set 'e08.only=["answers/*"]'

The last one measures a part: its units stay in ``state/`` of the run directory, and a whole run there, or where they
are copied to, goes on from them.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cats.generated_answers import MOST_TOKENS, load_answer_tasks
from experiments.e08_criteria.measures import Comparison, measure, with_differences
from experiments.e08_criteria.options import Options, Piece
from experiments.e08_criteria.speed import mlp_rows, token_rows
from experiments.framework.config import Config
from experiments.framework.cost import BYTES, Cost, Work, evaluation, memory_per_parameter, text
from experiments.framework.subject import check, check_length, check_models, task_folder
from experiments.framework.tables import (
    CriterionRow,
    CriterionSample,
    CriterionSpeedRow,
    CriterionSpeedSample,
    CriterionTextSample,
    Row,
)

__all__ = ["ROWS", "Options", "cost", "run"]

ROWS = (CriterionRow, CriterionSample, CriterionTextSample, CriterionSpeedRow, CriterionSpeedSample)
CALIBRATION_PASSES = 12
"""Two for neuron criteria, one or two for inputs in each scope, and what `auto` computes beyond a pass or two."""
ANSWER_PROMPT = 900
"""Tokens of a prompt with five worked examples."""
STEP_SECONDS, COMPILE_SECONDS, KERNEL_SECONDS = 0.03, 18.0, 10.0
"""Of a decode step in the eager loop on a GPU, whatever the model; of a variant's compiled step there; of the kernels
that the MLPs are timed with."""


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose."""
    return {"train": config.options.calibration_blocks, "heldout": config.options.heldout_blocks}


def run(config: Config[Options]) -> Iterable[Row]:
    """Measure every criterion at every level on each model."""
    options, kinds = config.options, {piece.kind for piece in config.options.pieces()}
    if "tasks" in kinds:
        check(config)
    check_models(config)
    check_length(config, text_blocks(config))
    if "answers" in kinds and "folder" in config.data and not config.finished_only:
        load_answer_tasks(options.generation_tasks, task_folder(config), config.data["folder"])
    for name in config.models:
        yield from measure_model(config, name)


def measure_model(config: Config[Options], name: str) -> list[Row]:
    """All rows of one model; a kind of measurement of a case is a unit of work of its own."""
    subject, pieces = Comparison(config, name), config.options.pieces()
    rows: list[Row] = []
    for piece in config.progress(pieces, Path(name).name, len(pieces)):
        rows += config.unit(f"{name}/{piece.key}", partial(measure_piece, subject, piece), ROWS)
    return with_differences(rows)


def measure_piece(subject: Comparison, piece: Piece) -> list[Row]:
    """Rows of one unit of work."""
    timed = {"mlp-speed": mlp_rows, "token-speed": token_rows}
    return timed[piece.kind](subject) if piece.kind in timed else measure(subject, piece)


def cost(config: Config[Options]) -> Cost:
    """Passes over the held-out text, the tasks and generated answers of each unit, calibration, and timing."""
    options, batch = config.options, config.options.batch_size
    heldout = text(options.heldout_blocks, options.length, batch)
    prompts = text(options.generation_items, ANSWER_PROMPT, options.generation_batch_size)
    of_kind = {"perplexity": heldout, "continuations": heldout * 3}  # its blocks' sparsity, then in two halves
    of_kind["answers"] = heldout + prompts * len(options.generation_tasks)
    of_kind["tasks"] = heldout + evaluation(options.tasks, options.limit, batch)
    kinds = [piece.kind for piece in options.pieces()]
    settled = {piece.case for piece in options.pieces() if piece.case and piece.case.level is not None}
    passes = CALIBRATION_PASSES + options.sequential * len(settled)
    work = text(options.calibration_blocks, options.length, batch) * passes
    for kind in kinds:
        work += of_kind.get(kind, Work())
    batches = -(-options.generation_items // options.generation_batch_size) * len(options.generation_tasks)
    steps = kinds.count("answers") * batches * MOST_TOKENS
    fixed = STEP_SECONDS * steps
    if "mlp-speed" in kinds:
        fixed += KERNEL_SECONDS
        steps += (len(options.timed()) + 1) * options.speed_rounds
    if "token-speed" in kinds:
        variants = len(options.timed(options.token_criteria)) + 1
        steps += variants * options.speed_generations * options.speed_length
        fixed += COMPILE_SECONDS * variants
    read = steps * BYTES[config.dtype]
    return Cost(work, bytes_read=read, fixed_seconds=fixed, memory=memory_per_parameter([config.dtype]))
