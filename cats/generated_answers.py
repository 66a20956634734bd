"""Exact match of generated answers through lm-eval: its own prompts, stop sequences and extraction of the answer.

    tasks = load_answer_tasks(["gsm8k"])
    results = evaluate_answers(model, tokenizer, tasks, limit=200)

The task gsm8k has five worked examples in its prompt, "Question: ...\\nAnswer: ...", drawn from the training split and
the same for every model. Generation is plain greedy decoding, in batches padded on the left, and ends at "Question:",
at an end token or after `MOST_TOKENS`; a model's own settings (temperature, repetition penalty) are put aside. lm-eval
reads the answer twice: ``strict-match`` takes the number after "#### ", the form of the examples; ``flexible-extract``
the last number.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationConfig

from cats.evaluation import Tasks, load_tasks, run_tasks
from cats.structure import unwrapped
from cats.text_config import text_config

METRIC = "exact_match"
MOST_TOKENS = 256
"""New tokens of an answer where its task does not say it; lm-eval's own default."""


@dataclass(frozen=True)
class AnswerResult:
    """Exact match on one task, with the answers read in one way.

    Attributes:
        reading: lm-eval's name of the filter, such as ``strict-match``.
        accuracy, stderr: lm-eval's ``exact_match`` and its standard error, as fractions.
        items: how many items were scored.
        correct: 1.0 or 0.0 for each item in the task's order.
    """

    task: str
    reading: str
    accuracy: float
    stderr: float
    items: int
    correct: tuple[float, ...]


def load_answer_tasks(
    names: Sequence[str], include_path: str | Path | None = None, data_folder: str | Path | None = None
) -> Tasks:
    """As `cats.evaluation.load_tasks`, of tasks whose answers are generated.

    Raises:
        ValueError, OSError: as there; a task whose metric is not ``exact_match``, or whose first item has no answer.
    """
    tasks = load_tasks(names, include_path, data_folder, METRIC)
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"the answers of task {name} are not generated: its kind is {task.OUTPUT_TYPE}")
        task.config.generation_kwargs.setdefault("max_gen_toks", MOST_TOKENS)
        answer = task.doc_to_target(task.eval_docs[0])
        if not (isinstance(answer, str) and answer.strip()):
            raise ValueError(f"the first item of task {name} has no answer, but {answer!r}")
    return tasks


def evaluate_answers(
    model: nn.Module, tokenizer: Any, tasks: Tasks, limit: int | None = None, batch_size: int = 16
) -> list[AnswerResult]:
    """Exact match of ``model``, patched or not, on every task, in each way in which the task reads answers.

    Args:
        model: a causal language model; its generation settings are as before afterwards.
        tokenizer: its Hugging Face tokenizer.
        tasks: from `load_answer_tasks`.
        limit: only the first so many items of each task.
        batch_size: sequences generated at once.

    Raises:
        ValueError: ``limit`` below 2, or a model with too few positions for the tasks' prompts and an answer.
    """
    check_positions(model, tokenizer, tasks)
    with _plain_greedy(model):
        return run_tasks(model, tokenizer, tasks, limit, batch_size, _results)


def check_positions(model: nn.Module, tokenizer: Any, tasks: Tasks) -> None:
    """Refuse a model whose positions do not hold a prompt and an answer: lm-eval would cut the examples off silently.

    Raises:
        ValueError: the first item of a task does not fit.
    """
    positions = getattr(text_config(model), "max_position_embeddings", None)
    for name, task in tasks.items() if positions is not None else ():
        prompt = task.fewshot_context(task.eval_docs[0], task.get_config("num_fewshot") or 0)
        needed = len(tokenizer.encode(prompt)) + task.config.generation_kwargs["max_gen_toks"]
        if needed > positions:
            raise ValueError(
                f"task {name} needs {needed} positions for a prompt and an answer, the model has {positions}"
            )


@contextmanager
def _plain_greedy(model: nn.Module) -> Iterator[None]:
    """Greedy decoding whatever the model's own generation settings say; its end tokens stay."""
    inner: Any = unwrapped(model)
    before = inner.generation_config
    ends = {key: getattr(before, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    inner.generation_config = GenerationConfig(do_sample=False, **ends)
    try:
        yield
    finally:
        inner.generation_config = before


def _results(names: Sequence[str], found: Any) -> list[AnswerResult]:
    return [result for name in names for result in _of_task(name, found)]


def _of_task(name: str, found: Any) -> Iterator[AnswerResult]:
    """A result for each reading; lm-eval lists every item once for each."""
    samples, scores = found["samples"][name], found["results"][name]
    for reading in dict.fromkeys(sample["filter"] for sample in samples):
        own = sorted((s for s in samples if s["filter"] == reading), key=lambda sample: sample["doc_id"])
        correct = tuple(float(sample[METRIC]) for sample in own)
        accuracy, stderr = scores[f"{METRIC},{reading}"], scores[f"{METRIC}_stderr,{reading}"]
        yield AnswerResult(name, reading, float(accuracy), float(stderr), len(correct), correct)
