"""Appendix B: CATS on the inputs of the attention and MLP blocks as well (equation 7), beside MLP-only CATS.

Same measurements as e02, without fine-tuning; and with ``steps`` above 0 once more after so many steps of LoRA (the
paper's figures are from after fine-tuning), as variants named ...-finetuned. Sparsity of each site is measured on
held-out text (metric sparsity_gate, sparsity_attention_input, sparsity_mlp_input).
Cost: three evaluations of the tasks, or six and three training runs; under 90 seconds for the pocket model on two
cores.

    nox -s experiment -- e07 --model PATH_OR_HUB_ID
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch

from cats.calibration import Thresholds
from cats.finetuning import finetune, preset
from experiments.e02_zero_shot import ZeroShotRow, zero_shot_rows
from experiments.e03_finetuning import FinetuningSubject, tuned
from experiments.framework.config import Config
from experiments.framework.results import Row
from experiments.framework.subject import ALL_SITES, DENSE, Variant, cats_variant, check, fractions_below, mean, put


@dataclass(frozen=True)
class AttentionRow(ZeroShotRow):
    """As `ZeroShotRow`, of appendix B's variants."""

    table: ClassVar[str] = "e07_attention"


def run(config: Config) -> Iterable[Row]:
    """Measure the dense model, CATS and CATS with attention. Options: levels, steps, and those of e02 and e03."""
    options = config.options
    preset(options.get("lora", "paper"))
    check(config, options["levels"])
    variants = [DENSE]
    for level in options["levels"]:
        variants += [cats_variant(level), cats_variant(level, ALL_SITES)]
    for name in config.models:
        subject = FinetuningSubject(config, name, options["steps"])
        runs = [(variant, steps) for steps in sorted({0, options["steps"]}) for variant in variants]
        for variant, steps in config.progress(runs, name, len(runs)):
            shown = replace(variant, name=f"{variant.name}-finetuned") if steps else variant
            compute = partial(measure, subject, variant, shown, variants, steps)
            yield from config.unit(f"{name}/{shown.name}", compute, (AttentionRow,))


def measure(
    subject: FinetuningSubject, variant: Variant, shown: Variant, variants: Sequence[Variant], steps: int
) -> list[Row]:
    """Rows of one variant under the name of ``shown``, after ``steps`` of LoRA."""
    thresholds = subject.thresholds(variants).get(variant)
    if steps == 0:
        put(subject.model, variant, thresholds)
        return _rows(subject, subject.model, shown, thresholds)
    options = subject.config.options
    with tuned(subject, variant, variants, subject.config.seed) as model:
        workdir = subject.config.workdir(f"{subject.name}/{shown.name}")
        settings = subject.settings(steps, options["learning_rate"], subject.config.seed)
        finetune(model, subject.training_data, settings, workdir, range(100, steps, 100))
        return _rows(subject, model, shown, thresholds)


def _rows(
    subject: FinetuningSubject, model: torch.nn.Module, shown: Variant, thresholds: Thresholds | None
) -> list[Row]:
    rows = zero_shot_rows(subject, shown, AttentionRow, model)
    if thresholds is None:
        return [*rows]
    start = (subject.name, shown.name, shown.sparsity, rows[0].sparsity_measured, "heldout_text")
    shares: dict[str, list[float]] = {}
    for (_, site, _), share in fractions_below(model, subject.heldout, {0.0: thresholds}).items():
        shares.setdefault(site, []).append(share)
    return [*rows, *(AttentionRow(*start, f"sparsity_{site}", mean(found)) for site, found in shares.items())]
