"""The first pages: one row per claim, then each claim's details, then the rules in words."""

from __future__ import annotations

import pandas as pd

from reports.core import style
from reports.core.claims import CLAIMS, Claim, counts, plain, rule_text, rules_of
from reports.core.document import Block, Heading, Picture, Table, Text, escape
from reports.core.load import Run
from reports.core.section import Section
from reports.core.verdicts import COLUMNS, FAILS, HOLDS, NOT_TESTED, POCKET, UNDECIDED

TITLES = {column: column[0].upper() + column[1:] for column in COLUMNS}
POCKET_NOTE = (
    "The pocket model is the project's own and small: it says whether everything works. A claim about models of 7 "
    "billion parameters is never more than “holds on the pocket model” there. Its checkpoint was chosen on held-out "
    "modules from which its tasks are made too."
)
HEADLINE_CAPTION = """
At a glance. Left: mean accuracy against sparsity without fine-tuning; base (grey), CATS-50 (blue), CATS-70 (green),
CATS-90 (orange), CATS at ReLUfication's own sparsity (purple), ReLUfication (diamond); bars: one standard error. Right:
speed-up of one MLP block over dense against sparsity, and the ratio of the bytes that dense and CATS read."""


def first_page(runs: list[Run], judged: pd.DataFrame, headline: str | None) -> list[Block]:
    """One table of the claims, and one figure."""
    where = f"{len(runs)} runs" if len(runs) > 1 else f"the run *{escape(runs[0].label)}*"
    intro = (
        f"The paper's claims, judged on {where} by rules that are code. {_counted(judged)} A claim holds in a column "
        "when it holds for every model and condition tested there, and is undecided where the measurement's own error "
        "(95 %) reaches the rule's bound or is unknown."
    )
    unclaimed = [f"{escape(run.label)}: {escape(', '.join(run.unclaimed))}" for run in runs if run.unclaimed]
    warning = [Text(f"**Not shown, since no section reads it:** {'; '.join(unclaimed)}.")] if unclaimed else []
    table = Table(summary(judged), "The paper's claims, one row each.", (3.4, 27, 21, 15, 20, 17))
    pictures = [Picture(headline, HEADLINE_CAPTION)] if headline else []
    return [Heading(1, "Claims"), *warning, Text(intro), table, *pictures]


def notes(judged: pd.DataFrame) -> list[Block]:
    """What has to be known of the models."""
    return [Text(POCKET_NOTE)] if (judged["column"] == POCKET).any() else []


def details_blocks(runs: list[Run], sections: list[Section], judged: pd.DataFrame) -> list[Block]:
    """Every finding, and the rules in words."""
    rules = [
        {
            "": claim.id,
            "The paper": escape(claim.paper),
            "Rule": escape(" ".join(rule_text(rule) for _, rule in rules_of(claim, sections))),
        }
        for claim in CLAIMS
    ]
    return [
        Heading(1, "Claims in detail"),
        Text(
            "Accuracies are fractions, “points” hundredths; intervals are 95 %, each for itself: a claim of many "
            "comparisons fails by one that misses for certain, and is not corrected for their number. The paper's "
            "numbers come from its own models and hardware, so a ratio or an ordering is compared, not a value."
        ),
        Table(details(judged, len(runs) > 1), "What was measured for each claim.", (3.4, 14, 24, 23, 22)),
        Table(pd.DataFrame(rules), "The paper's own figures, and the rules that give the verdicts.", (4, 24, 66)),
    ]


def _counted(judged: pd.DataFrame) -> str:
    """`By claim: pocket model: 3 hold, 1 does not hold, 4 undecided, 0 not tested; ...`."""
    words = {HOLDS: "hold", FAILS: "do not hold", UNDECIDED: "undecided", NOT_TESTED: "not tested"}
    said = [
        f"{column}: " + ", ".join(f"{of_column.get(verdict, 0)} {word}" for verdict, word in words.items())
        for column, of_column in counts(judged).items()
    ]
    return f"By claim, {'; '.join(said)}."


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """Eleven rows: the claim, the verdict with the models in each column in which the claim makes sense."""
    rows = []
    for claim in CLAIMS:
        cells = {"": claim.id, "Claim": escape(claim.statement)}
        for column in COLUMNS:
            cells[TITLES[column]] = _cell(judged, claim, column) if column in claim.columns else style.DASH
        rows.append(cells)
    return pd.DataFrame(rows)


def _cell(judged: pd.DataFrame, claim: Claim, column: str) -> str:
    """`**holds here** (Mistral-7B)`, one part per aspect and verdict; models by name."""
    rows = judged[(judged["claim"] == claim.id) & (judged["column"] == column)]
    if rows.empty:
        return NOT_TESTED
    if rows["verdict"].ne(NOT_TESTED).any():  # models that cannot decide the claim stand in the details only
        rows = rows[rows["verdict"].ne(NOT_TESTED) | rows["aspect"].ne("")]
    parts = []
    for aspect, of_aspect in rows.groupby("aspect", sort=False):
        tested = of_aspect[of_aspect["verdict"] != NOT_TESTED]
        shown = tested if len(tested) else of_aspect
        said = [_verdict_with_models(verdict, of, shown) for verdict, of in shown.groupby("verdict", sort=False)]
        parts.append((f"{escape(str(aspect))}: " if aspect else "") + ", ".join(said))
    return "; ".join(parts)


def _verdict_with_models(verdict: object, rows: pd.DataFrame, beside: pd.DataFrame) -> str:
    """The verdict with its models, and their conditions where the same model has several verdicts."""
    names = []
    rows = rows[rows["column"] != POCKET]  # whose column has named the model
    for model, of_model in rows.groupby("model", sort=False):
        split = beside.loc[beside["model"] == model, "verdict"].nunique() > 1
        conditions = [condition for condition in dict.fromkeys(of_model["condition"]) if condition]
        name = style.model_name(str(model))
        names.append(f"{name} {', '.join(conditions)}" if split and conditions else name)
    models = escape(", ".join(dict.fromkeys(filter(None, names))))
    if verdict in (UNDECIDED, NOT_TESTED):
        return f"{verdict} ({models})" if models else str(verdict)
    return f"**{verdict}** ({models})" if models else f"**{verdict}**"


def details(judged: pd.DataFrame, several_runs: bool) -> pd.DataFrame:
    """A row per finding: a claim's own cell is printed on its first row only."""
    rows, last = [], ""
    for row in judged.to_dict("records"):
        first, last = row["claim"] != last, row["claim"]
        where = ", ".join(filter(None, [style.model_name(row["model"]), row["condition"], row["aspect"]]))
        where = escape(where) + (f" ({escape(row['run'])})" if several_runs and row["run"] else "")
        clear = plain(row["verdict"]) in (HOLDS, FAILS)
        verdict = f"**{row['verdict']}**" if clear else row["verdict"]
        why = escape(row["reason"]) + (f"; run `{row['command']}`" if row["command"] and not row["ours"] else "")
        rows.append(
            {
                "": row["claim"] if first else "",
                "Measured on": where or style.DASH,
                "Ours": escape(row["ours"]) or style.DASH,
                "Interval": escape(row["uncertainty"]) or style.DASH,
                "Verdict": f"{verdict}: {why}" if why else verdict,
            }
        )
    return pd.DataFrame(rows)
