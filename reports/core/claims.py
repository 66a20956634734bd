"""The paper's claims C1 to C11, and the table of verdicts: each claim's rules applied to each run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pandas as pd

from reports.core.load import Run, command
from reports.core.provenance import UNKNOWN_MACHINES, incomplete, machine
from reports.core.section import Section
from reports.core.verdicts import (
    COLUMNS,
    CPU,
    FAILS,
    GPU,
    HOLDS,
    NOT_TESTED,
    POCKET,
    REAL,
    UNDECIDED,
    Finding,
    Rule,
    combined,
)

SINGLE = "a single "
"""In the reason of a finding that one prompt, repeat or seed cannot decide."""
ACCURACY, SPEED = (REAL, POCKET), (GPU, CPU)


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, the paper's own figures, and the columns of the summary in which it makes sense."""

    id: str
    statement: str
    paper: str
    columns: tuple[str, ...]


CLAIMS = (
    Claim("C1", "gate activations concentrate near zero", "Figure 1 (histograms)", ACCURACY),
    Claim("C2", "CATS-50 stays within 1-2 % of base without fine-tuning",
          "0.6890 / 0.6994 (Mistral-7B), 0.6433 / 0.6589 (Llama2-7B)", ACCURACY),
    Claim("C3", "CATS beats ReLUfication at every sparsity without fine-tuning",
          "0.4368 (CATS-90) / 0.3230 (ReLUfication), Mistral-7B", ACCURACY),
    Claim("C4", "with LoRA, every CATS level beats ReLUfication at every step; CATS-70 is near base within 500 steps",
          "CATS-70 at step 350: 0.6834 / 0.6994 (Mistral-7B), 0.6192 / 0.6589 (Llama2-7B)", ACCURACY),
    Claim("C5", "sparsity stays near its target after fine-tuning",
          "41.1, 60.6, 82.5 % (Mistral-7B), 59.9, 77.1, 91.6 % (Llama2-7B) for 50, 70, 90 %", ACCURACY),
    Claim("C6", "after task fine-tuning CATS-50 is within 0.5 % of base, ReLUfication about 19 % below",
          "0.9059 / 0.9072; ReLUfication 0.7134 (Mistral-7B)", ACCURACY),
    Claim("C7", "the kernel is about 40 % faster than dense at 50 % sparsity, about 70 % at 70 %",
          "1.4x at 50 %, 1.7x at 70 % (L40S, float32)", SPEED),
    Claim("C8", "the paper's fused kernel with a mask beats its unfused and its index-compacting ones", "Figure 6",
          SPEED),
    Claim("C9", "generation is 18 % and 21 % faster at 50 % sparsity", "1.18x (Llama2-7B), 1.21x (Mistral-7B)", SPEED),
    Claim("C10", "CATS extends to the attention inputs at a cost of a few points",
          "0.6684 / 0.6921 MLP only / 0.6994 base (Mistral-7B)", ACCURACY),
    Claim("C11", "CATS-50 raises perplexity by about 1 %, ReLUfication by tens of percent",
          "+1.1 and +1.2 %, +42 and +25 %; fine-tuned +0.6 and +0.5 %, +20 and +15 % (Llama2-7B, Mistral-7B)",
          ACCURACY),
)  # fmt: skip


def rules_of(claim: Claim, sections: list[Section]) -> list[tuple[Section, Rule]]:
    """The rules that judge a claim, with the sections that they belong to."""
    return [(section, rule) for section in sections for name, rule in section.rules if name == claim.id]


def rule_text(rule: Rule) -> str:
    """The rule in words: its docstring."""
    return " ".join((rule.__doc__ or "").split())


def judge(runs: list[Run], sections: list[Section]) -> pd.DataFrame:
    """claims.csv: a row per claim, run, model and condition; one that no run measured has one row with the command."""
    runs = [replace(run, beside=tuple(other for other in runs if other is not run)) for run in runs]
    rows = []
    for claim in CLAIMS:
        of_claim = []
        for section, rule in rules_of(claim, sections):
            made = [(run, finding) for run in runs for finding in _findings(section, rule, run)]
            latest = _latest(made, section.experiment)
            for run, finding in made:
                other = latest.get(_condition(run, finding), run)
                if finding.verdict != NOT_TESTED and (why := _outweighed(run, other, section.experiment)):
                    finding = finding.because(NOT_TESTED, why)
                of_claim.append(_row(claim, section, rule, run, finding))
        if not of_claim:
            rules = rules_of(claim, sections)
            missing = Finding("", "", NOT_TESTED, reason="not measured")
            of_claim = [_row(claim, rules[0][0] if rules else None, rules[0][1] if rules else None, None, missing)]
        rows += of_claim
    return pd.DataFrame(rows)


def _condition(run: Run, finding: Finding) -> tuple[str, ...]:
    place = machine(run)
    place = run.label if place in UNKNOWN_MACHINES else place  # two that nobody knows are not the same
    return place, finding.column, finding.aspect, finding.model, finding.condition


def _latest(made: list[tuple[Run, Finding]], experiment: str) -> dict[tuple[str, ...], Run]:
    """The run that counts of each condition on a machine, among those that could decide: the one measured last, since
    its code is the newest; one that has ended before one that has not."""
    latest: dict[tuple[str, ...], Run] = {}
    for run, finding in made:
        if finding.verdict == NOT_TESTED or SINGLE in finding.reason:
            continue
        other = latest.get(_condition(run, finding))
        if other is None or _rank(run, experiment) > _rank(other, experiment):
            latest[_condition(run, finding)] = run
    return latest


def _rank(run: Run, experiment: str) -> tuple[bool, str]:
    """Whether the run has ended, and when it began."""
    entry = run.provenance.get(experiment, {})
    return not incomplete(entry), str(entry.get("started") or "")


def _outweighed(run: Run, other: Run, experiment: str) -> str:
    """Why ``other`` counts instead of ``run``; empty where it does not."""
    ours, theirs = _rank(run, experiment), _rank(other, experiment)
    if theirs <= ours:
        return ""
    return f"measured again later, in {other.label}" if theirs[1] > ours[1] else f"measured to its end in {other.label}"


def _findings(section: Section, rule: Rule, run: Run) -> list[Finding]:
    """What a rule says of a run; each finding tells that units are missing, which might decide otherwise."""
    table = section.tables[0].table
    if table in run.problems:
        return [Finding("", "", NOT_TESTED, reason=f"{table}.csv is broken: {run.problems[table]}")]
    lacks = incomplete(run.provenance.get(section.experiment, {}))
    return [finding.because(finding.verdict, lacks) for finding in rule(run)]


def _row(claim: Claim, section: Section | None, rule: Rule | None, run: Run | None, finding: Finding) -> dict[str, str]:
    unclear = finding.verdict == NOT_TESTED and section is not None
    again = " ".join(filter(None, [command(section.experiment, run), finding.settings])) if unclear and section else ""
    return {
        "claim": claim.id,
        "statement": claim.statement,
        "paper": claim.paper,
        "run": run.label if run else "",
        "column": finding.column,
        "model": finding.model,
        "condition": finding.condition,
        "aspect": finding.aspect,
        "ours": finding.ours,
        "uncertainty": finding.uncertainty,
        "verdict": finding.words,
        "reason": finding.reason,
        "rule": rule_text(rule) if rule else "",
        "command": again,
    }


def plain(words: str) -> str:
    """The verdict without "on the pocket model": what `combined` and counts compare."""
    return words.replace("on the pocket model", "here")


def verdict_in(judged: pd.DataFrame, claim: Claim, column: str) -> str:
    """A claim's verdict in one column of the summary, over all models and conditions there."""
    return combined(plain(words) for words in findings_of(judged, claim, column)["verdict"])


def findings_of(judged: pd.DataFrame, claim: Claim, column: str) -> pd.DataFrame:
    """The findings of a claim in a column, without those of a single prompt, repeat or seed where another run of the
    same model, condition and aspect decides."""
    rows = judged[(judged["claim"] == claim.id) & (judged["column"] == column)]
    decided = rows["verdict"].map(plain).isin([HOLDS, FAILS])
    alike = [rows[name].fillna("") for name in ("aspect", "model", "condition")]
    elsewhere = decided.groupby(alike).transform("any")
    weak = (rows["verdict"] == UNDECIDED) & rows["reason"].fillna("").str.contains(SINGLE)
    return rows[~(weak & elsewhere)]


def counts(judged: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Column -> verdict -> number of claims: every claim counts once per column in which it makes sense."""
    counted: dict[str, dict[str, int]] = {}
    for column in COLUMNS:
        verdicts = [verdict_in(judged, claim, column) for claim in CLAIMS if column in claim.columns]
        counted[column] = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}
    return counted
