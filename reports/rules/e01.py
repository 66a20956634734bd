"""The rule of C1: gate activations concentrate near zero."""

from __future__ import annotations

import math

from experiments.framework.tables import HistogramRow
from reports.core.load import Run
from reports.core.statistics import Estimate
from reports.core.style import percent, points
from reports.core.verdicts import UNDECIDED, Finding, column_of, decide, untested
from reports.measures.histogram import Concentration, concentration

MARGIN = 0.10
TEXT = 0.02  # half-width allowed for the choice of text and of random weights, which nobody measures again


def c1_concentration(run: Run) -> list[Finding]:
    """Holds here if, in each layer shown, the share of gate activations whose magnitude is below a tenth of its 99.9th
    percentile is at least 10 points larger than in the same model with random weights on the same text.

    SiLU alone makes a random network look concentrated, hence the control; without one the claim is not tested. The
    choice of text and of random weights is not repeated: 2 points either way count as undecided. Where the percentile
    lies beyond the histogram's last edge, the share is known only from below.
    """
    table = run.tables.get(HistogramRow.table)
    if table is None:
        return []
    findings = []
    for name, part in table.groupby("model", sort=False):
        model = str(name)
        by_weights = {
            str(weights): {int(float(str(index))): concentration(layer) for index, layer in of.groupby("layer_index")}
            for weights, of in part.groupby("weights")
        }
        if "pretrained" not in by_weights:
            continue
        findings.append(_finding(model, by_weights["pretrained"], by_weights.get("random", {})))
    return findings


def _finding(model: str, trained: dict[int, Concentration], control: dict[int, Concentration]) -> Finding:
    absent = [str(layer) for layer in trained if layer not in control]
    ours = "; ".join(
        f"layer {layer}: {_share(at)}" + (f" / control {_share(control[layer])}" if layer in control else "")
        for layer, at in trained.items()
    )
    if absent:
        reason = f"no control with random weights on the same text for layer {', '.join(absent)}"
        return untested(model, reason, ours=ours)
    gains = {layer: at.share - control[layer].share for layer, at in trained.items()}
    margins = [
        (f"layer {layer}", _margin(gain - MARGIN, trained[layer].beyond, control[layer].beyond))
        for layer, gain in gains.items()
    ]
    verdict, reason = decide(margins)
    settings = ""
    unseen = [at for at in [*trained.values(), *control.values()] if at.beyond]
    if verdict == UNDECIDED and unseen:
        widest = max(unseen, key=lambda at: at.edge)
        reason = f"the 99.9th percentile lies beyond the histogram's end at {widest.edge:g}"
        settings = f"--set e01.largest={8 * widest.edge:g} --set e01.bins={8 * widest.bins}"
    uncertainty = "over the control: " + "; ".join(f"layer {layer} {points(gain)}" for layer, gain in gains.items())
    return Finding(model, column_of(model), verdict, ours, f"{uncertainty} points", reason, settings=settings)


def _share(at: Concentration) -> str:
    return ("over " if at.beyond else "") + percent(at.share)


def _margin(margin: float, trained_beyond: bool, control_beyond: bool) -> Estimate:
    """A share known only from below leaves one end of the margin open."""
    high = math.inf if trained_beyond else margin + TEXT
    low = -math.inf if control_beyond else margin - TEXT
    if not trained_beyond and not control_beyond:
        return Estimate(margin, low, high)
    if trained_beyond and not control_beyond and low >= 0:  # larger still: that holds
        return Estimate(margin, low, margin + TEXT)
    if control_beyond and not trained_beyond and high < 0:  # smaller still: that does not
        return Estimate(margin, margin - TEXT, high)
    return Estimate(margin)
