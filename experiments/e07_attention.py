"""Appendix B: CATS on the inputs of the attention and MLP blocks as well (equation 7), beside MLP-only CATS.

Purpose: what thresholds on the inputs of whole blocks cost on top. Same measurements as e02, without fine-tuning; and
with ``steps`` above 0 once more after so many steps of LoRA (the paper's figures are from after fine-tuning), each
variant against the dense model that was trained as long with the same seed. Sparsity of each site is measured on
held-out text (metrics sparsity_gate, sparsity_attention_input, sparsity_mlp_input).
Cost: three evaluations of the tasks, and three more with as many training runs per seed; a minute for the pocket model
on two cores without training.

    nox -s experiment -- e07 --model PATH_OR_HUB_ID
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cats.calibration import Thresholds
from cats.finetuning import finetune
from experiments.framework.common_options import EvaluationOptions, TrainingOptions, check_tokens
from experiments.framework.config import Config
from experiments.framework.cost import Cost, evaluation, memory_per_parameter, text, training
from experiments.framework.options import Positive, Seed, Whole
from experiments.framework.subject import check, check_length, fractions_below, mean
from experiments.framework.tables import AttentionRow, AttentionSample, AttentionTextSample, Row
from experiments.framework.training import FinetuningSubject, adapted
from experiments.framework.variants import ALL_SITES, DENSE, Variant, make, variant
from experiments.framework.zero_shot import HELDOUT, Samples, measure_as_is

ROWS = (AttentionRow, AttentionSample, AttentionTextSample)


@dataclass(frozen=True, kw_only=True)
class Options(EvaluationOptions, TrainingOptions):
    """Options of e07.

    Attributes:
        steps: of LoRA, after which everything is measured again; 0 for no training.
        learning_rate: of that training, for all variants.
        seeds: of that training, added to the profile's seed.
    """

    steps: Whole = 0
    learning_rate: Positive = 1e-4
    seeds: tuple[Seed, ...] = (0,)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(steps=self.steps * self.train_batch_size, length=self.length)

    def variants(self) -> list[Variant]:
        """Dense, and each level without and with attention."""
        return [DENSE, *(variant("cats", level, sites) for level in self.levels for sites in (("gate",), ALL_SITES))]


def text_blocks(config: Config[Options]) -> dict[str, int]:
    """Blocks of text that it needs of each purpose."""
    options = config.options
    trained = options.steps * options.train_batch_size
    return {"train": options.calibration_blocks + trained, "heldout": options.heldout_blocks}


def run(config: Config[Options]) -> Iterable[Row]:
    """Measure the dense model, CATS and CATS with attention."""
    options = config.options
    check(config)
    check_length(config, text_blocks(config))
    for name in config.models:
        subject = FinetuningSubject(config, name, options.steps)
        dense: dict[tuple[int, int], Samples | None] = {}
        trainings = [(options.steps, config.seed + seed) for seed in options.seeds] if options.steps else []
        runs = [(v, *training) for training in [(0, config.seed), *trainings] for v in options.variants()]
        for v, steps, seed in config.progress(runs, name, len(runs)):
            rows = config.unit(*job(subject, v, steps, seed, dense.get((steps, seed))), ROWS)
            if v == DENSE:  # it comes first
                own = dense[steps, seed] = Samples.of(rows)
                others = [other for other in options.variants() if other != DENSE]
                config.compute_ahead(dict(job(subject, other, steps, seed, own) for other in others), ROWS)
            yield from rows


def job(
    subject: FinetuningSubject, v: Variant, steps: int, seed: int, dense: Samples | None
) -> tuple[str, Callable[[], list[Row]]]:
    """Key and work of one variant."""
    key = f"{subject.name}/{v.name}" + (f"/finetuned {seed}" if steps else "")
    return key, partial(measure, subject, v, steps, seed, dense)


def cost(config: Config[Options]) -> Cost:
    """Three evaluations, and after training, if any, as many again per seed."""
    options, batch = config.options, config.options.batch_size
    variants, trainings = len(options.variants()), len(options.seeds) if options.steps else 0
    heldout = text(options.heldout_blocks, options.length, batch)
    each = evaluation(options.tasks, options.limit, batch) + heldout * 3
    calibrations = text(options.calibration_blocks, options.length, batch) * 2
    trained = training(options.steps, options.train_batch_size, options.length, options.micro_batch_size)
    work = (each * (1 + trainings) + trained * trainings) * variants + calibrations
    return Cost(work, memory=memory_per_parameter([config.dtype], trains=options.steps > 0))


def measure(subject: FinetuningSubject, v: Variant, steps: int, seed: int, dense: Samples | None) -> list[Row]:
    """Rows of one variant after ``steps`` of LoRA with ``seed``; differences are from ``dense``, None for the dense
    model itself.
    """
    options = subject.config.options
    thresholds = subject.thresholds(options.variants()).get(v)
    if steps == 0:
        make(subject.model, v, thresholds)
        return _rows(subject, subject.model, v, {"finetuned": False, "seed": seed}, thresholds, dense)
    with adapted(subject, v, thresholds, seed) as model:
        workdir = subject.config.workdir(f"{subject.name}/{v.name}/finetuned {seed}")
        settings = subject.settings(steps, options.learning_rate, seed)
        finetune(model, subject.training_data, settings, workdir, range(100, steps, 100))
        return _rows(subject, model, v, {"finetuned": True, "seed": seed}, thresholds, dense)


def _rows(
    subject: FinetuningSubject,
    model: torch.nn.Module,
    v: Variant,
    training: dict[str, Any],
    thresholds: Thresholds | None,
    dense: Samples | None,
) -> list[Row]:
    measurement = measure_as_is(subject, model)
    samples = measurement.samples()
    who = {**subject.columns(v), **training}
    columns: Sequence[dict[str, Any]] = measurement.scores(dense or samples)
    if thresholds is not None:
        columns = [*columns, *_site_columns(subject, model, thresholds)]
    rows: list[Row] = [
        AttentionRow(
            **who,
            sites=" ".join(v.sites),
            path=v.path,
            sparsity_target=v.sparsity,
            sparsity_measured=measurement.sparsity,
            **one,
        )
        for one in columns
    ]
    rows += [AttentionSample(**who, task=task, correct=correct) for task, correct in samples.correct.items()]
    return [*rows, AttentionTextSample(**who, tokens_per_block=measurement.tokens_per_block, nats=samples.nats)]


def _site_columns(subject: FinetuningSubject, model: torch.nn.Module, thresholds: Thresholds) -> list[dict[str, Any]]:
    """Sparsity of each site on held-out text, the mean over layers."""
    shares: dict[str, list[float]] = {}
    for (_, site, _), share in fractions_below(model, subject.heldout, {0.0: thresholds}).items():
        shares.setdefault(site, []).append(share)
    return [{"task": HELDOUT, "metric": f"sparsity_{site}", "value": mean(values)} for site, values in shares.items()]
