"""The paper's claims C1 to C10, each with the rule that judges it (see `reports.rules`), and the table of verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from reports import rules
from reports.load import Run, command
from reports.rules import Finding, Tables

REPRODUCED, NOT_REPRODUCED, NOT_TESTED = "reproduced", "not reproduced", "not tested here"


@dataclass(frozen=True)
class Claim:
    """One claim of the paper, where the paper shows it, the table that it is judged by, and the rule."""

    id: str
    statement: str
    paper: str
    table: str
    rule: Callable[[Tables], list[Finding]]

    @property
    def experiment(self) -> str:
        """The experiment that measures it: `e02`."""
        return self.table[:3]

    @property
    def rule_text(self) -> str:
        """The rule in one sentence: the first paragraph of the rule's docstring."""
        return " ".join((self.rule.__doc__ or "").split("\n\n")[0].split())


CLAIMS = (
    Claim("C1", "gate activations concentrate near zero", "Figure 1 (histograms)", "e01_histogram",
          rules.c1_concentration),
    Claim("C2", "CATS-50 stays within 1-2 % of base without fine-tuning",
          "0.6890 / 0.6994 (Mistral-7B), 0.6433 / 0.6589 (Llama2-7B)", "e02_zero_shot", rules.c2_near_base),
    Claim("C3", "CATS beats ReLUfication at every sparsity without fine-tuning",
          "0.4368 (CATS-90) / 0.3230 (ReLUfication), Mistral-7B", "e02_zero_shot", rules.c3_beats_relufication),
    Claim("C4", "with LoRA, every CATS level beats ReLUfication at every step; CATS-70 is near base within 500 steps",
          "CATS-70 at step 350: 0.6834 / 0.6994 (Mistral-7B), 0.6192 / 0.6589 (Llama2-7B)", "e03_finetuning",
          rules.c4_finetuned),
    Claim("C5", "sparsity stays near its target after fine-tuning",
          "41.1, 60.6, 82.5 % (Mistral-7B), 59.9, 77.1, 91.6 % (Llama2-7B) for 50, 70, 90 %", "e03_sparsity",
          rules.c5_sparsity_kept),
    Claim("C6", "after task fine-tuning CATS-50 is within 0.5 % of base, ReLUfication about 19 % below",
          "0.9059 / 0.9072; ReLUfication 0.7134 (Mistral-7B)", "e04_task_finetuning", rules.c6_task_finetuning),
    Claim("C7", "the kernel is about 40 % faster than dense at 50 % sparsity, about 70 % at 70 %",
          "1.4x at 50 %, 1.7x at 70 % (L40S, float32)", "e05_mlp_latency", rules.c7_kernel_speed),
    Claim("C8", "a fused kernel with a mask beats the unfused and the index-compacting ones", "Figure 6",
          "e05_mlp_latency", rules.c8_fused_mask),
    Claim("C9", "generation is 18 % and 21 % faster at 50 % sparsity", "1.18x (Llama2-7B), 1.21x (Mistral-7B)",
          "e06_throughput", rules.c9_generation),
    Claim("C10", "CATS extends to the attention inputs at a cost of a few points",
          "0.6684 / 0.6921 MLP only / 0.6994 base (Mistral-7B)", "e07_attention", rules.c10_attention),
)  # fmt: skip


def judge(runs: list[Run]) -> pd.DataFrame:
    """claims.csv: a row per claim, run and model; a claim that no run measured has one row with the command to run."""
    rows = []
    for claim in CLAIMS:
        of_claim = [_row(claim, run, finding) for run in runs for finding in _findings(claim, run)]
        rows += of_claim or [_row(claim, None, Finding("", ""))]
    return pd.DataFrame(rows)


def _findings(claim: Claim, run: Run) -> list[Finding]:
    if claim.table in run.problems:
        return [Finding("", f"{claim.table}.csv is broken: {run.problems[claim.table]}")]
    return claim.rule(run.tables) if claim.table in run.tables else []


def _row(claim: Claim, run: Run | None, finding: Finding) -> dict[str, str]:
    verdict = NOT_TESTED if finding.holds is None else REPRODUCED if finding.holds else NOT_REPRODUCED
    wanted = " ".join(filter(None, [command(claim.experiment, run), finding.settings]))
    return {
        "claim": claim.id,
        "statement": claim.statement,
        "paper": claim.paper,
        "run": run.label if run else "",
        "model": finding.model,
        "ours": finding.ours,
        "uncertainty": finding.uncertainty,
        "verdict": verdict,
        "undecided": "yes" if finding.undecided else "",
        "rule": claim.rule_text,
        "command": wanted if finding.holds is None else "",
    }
