"""The first pages: one row per claim, then each claim's details, then the rules in words."""

from __future__ import annotations

import pandas as pd

from reports.core import style
from reports.core.claims import CLAIMS, Claim, counts, findings_of, plain, rule_text, rules_of
from reports.core.document import Block, Heading, Picture, Table, Text, escape
from reports.core.load import Run
from reports.core.provenance import incomplete_experiments
from reports.core.section import Section
from reports.core.verdicts import COLUMNS, FAILS, HOLDS, NOT_TESTED, POCKET, REAL, UNDECIDED

TITLES = {column: column[0].upper() + column[1:] for column in COLUMNS}
DETAIL_WIDTHS = (3.4, 14, 24, 23, 22)
HOW_TO_READ = (
    "In the count of claims, one holds in a column when it holds for every model and condition tested there; one "
    "that does not outweighs those that do; of runs of the same model and condition on a machine the latest counts,"
    " and one of a single prompt or repeat only where no other decides. What cannot decide a claim stands in the "
    "details of the HTML and Markdown alone."
)
UNFINISHED = "Their verdicts rest on what is finished, and may change with the rest."
POCKET_NOTE = (
    "The pocket model is the project's own and small: it says whether everything works. A claim about models of 7 "
    "billion parameters is never more than “holds on the pocket model” there. Its checkpoint was chosen on held-out "
    "modules from which its tasks are made too."
)
HEADLINE_CAPTION = """
Left: mean accuracy against sparsity without fine-tuning, ± one standard error; circles: base, then CATS-50 (blue), at
ReLUfication's sparsity (purple), CATS-70 (green) and CATS-90 (orange); diamond: ReLUfication. Right: speed-up of one
MLP block over the faster dense of the same rounds, for every machine and dtype in the run in which dense was fastest,
and (dotted) the ratio of the bytes that dense and CATS read."""


def first_page(runs: list[Run], judged: pd.DataFrame, headline: str | None) -> list[Block]:
    """One table of the claims, and one figure."""
    where = f"{len(runs)} runs" if len(runs) > 1 else f"the run *{escape(runs[0].label)}*"
    intro = (
        f"Judged on {where} by rules that are code. {_counted(judged)} Undecided: the measurement's own error (95 %) "
        "reaches the rule's bound, or is unknown."
    )
    unclaimed = [f"{escape(run.label)}: {escape(', '.join(run.unclaimed))}" for run in runs if run.unclaimed]
    warning = [Text(f"**Not shown, since no section reads it:** {'; '.join(unclaimed)}.")] if unclaimed else []
    unfinished = [f"{escape(run.label)}: {escape(words)}" for run in runs if (words := incomplete_experiments(run))]
    if unfinished:
        warning.append(Text(f"**Runs that have not ended:** {'; '.join(unfinished)}. {UNFINISHED}"))
    table = Table(summary(judged), _summary_caption(judged), (3.2, 28, 21, 15.5, 20, 18))
    pictures = [Picture(headline, HEADLINE_CAPTION)] if headline else []
    return [Heading(1, "Claims"), *warning, Text(intro), table, *pictures]


def notes(judged: pd.DataFrame) -> list[Block]:
    """How the table of claims is to be read, and what has to be known of the models."""
    return [Text(f"{HOW_TO_READ} {POCKET_NOTE if (judged['column'] == POCKET).any() else ''}".strip())]


def details_blocks(runs: list[Run], sections: list[Section], judged: pd.DataFrame) -> tuple[list[Block], list[Block]]:
    """Findings and the rules in words; then, for where there is room, findings that decide nothing beside others."""
    rules = [
        {
            "": claim.id,
            "The paper": escape(claim.paper),
            "Rule": escape(" ".join(rule_text(rule) for _, rule in rules_of(claim, sections))),
        }
        for claim in CLAIMS
    ]
    beside = decides_nothing(judged)
    main: list[Block] = [
        Heading(1, "Claims in detail"),
        Text(
            "Accuracies are fractions, “points” hundredths; intervals are 95 %, each for itself: a claim of many "
            "comparisons fails by one that misses for certain, and is not corrected for their number. The paper's "
            "numbers come from its own models and hardware, so a ratio or an ordering is compared, not a value."
        ),
        Table(details(judged[~beside], len(runs) > 1), "What was measured for each claim.", DETAIL_WIDTHS),
        Table(pd.DataFrame(rules), "The paper's own figures, and the rules that give the verdicts.", (4, 24, 66)),
    ]
    if not beside.any():
        return main, []
    caption = "Measured for a claim, and unable to decide it."
    return main, [Heading(2, "Claims"), Table(details(judged[beside], len(runs) > 1), caption, DETAIL_WIDTHS)]


def decides_nothing(judged: pd.DataFrame) -> pd.Series:
    """Which findings are "not tested" where the same claim has others in that column that are not."""
    untested = judged["verdict"] == NOT_TESTED
    return untested & (~untested).groupby([judged["claim"], judged["column"]]).transform("any")


def _counted(judged: pd.DataFrame) -> str:
    """`By claim, pocket model: 3 hold, 1 fail, 4 undecided, 0 not tested; ...`."""
    words = {HOLDS: "hold", FAILS: "fail", UNDECIDED: "undecided", NOT_TESTED: "not tested"}
    said = [
        f"{column}: " + ", ".join(f"{of_column.get(verdict, 0)} {word}" for verdict, word in words.items())
        for column, of_column in counts(judged).items()
    ]
    return f"By claim, {'; '.join(said)}."


def real_models(judged: pd.DataFrame) -> dict[str, str]:
    """Real model -> its name in the summary: by size where there are several and their sizes tell them apart."""
    models = list(dict.fromkeys(judged.loc[(judged["column"] == REAL) & (judged["model"] != ""), "model"]))
    sizes = [style.size_name(model) for model in models]
    by_size = len(models) > 1 and all(sizes) and len(set(sizes)) == len(models)
    return {model: size if by_size else style.short_name(model) for model, size in zip(models, sizes, strict=True)}


def _summary_caption(judged: pd.DataFrame) -> str:
    named = [
        f"{name}: {style.plain_name(model)}"
        for model, name in real_models(judged).items()
        if name != style.short_name(model)
    ]
    return "The paper's claims, one row each." + (f" Real models, {escape(', '.join(named))}." if named else "")


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
    rows = findings_of(judged, claim, column)
    if rows.empty:
        return NOT_TESTED
    if rows["verdict"].ne(NOT_TESTED).any():  # models that cannot decide the claim stand in the details only
        rows = rows[rows["verdict"].ne(NOT_TESTED) | rows["aspect"].ne("")]
    parts: dict[str, list[str]] = {}
    short = real_models(judged)
    for aspect, of_aspect in rows.groupby("aspect", sort=False):
        tested = of_aspect[of_aspect["verdict"] != NOT_TESTED]
        shown = tested if len(tested) else of_aspect
        said = [_verdict_with_models(verdict, of, shown, short) for verdict, of in shown.groupby("verdict", sort=False)]
        parts.setdefault(", ".join(said), []).append(escape(str(aspect)))
    return "; ".join((f"{' / '.join(aspects)}: " if any(aspects) else "") + said for said, aspects in parts.items())


def _verdict_with_models(verdict: object, rows: pd.DataFrame, beside: pd.DataFrame, short: dict[str, str]) -> str:
    """The verdict with its models, and their conditions where the same model has several verdicts."""
    names = []
    rows = rows[rows["column"] != POCKET]  # whose column has named the model
    for model, of_model in rows.groupby("model", sort=False):
        split = beside.loc[beside["model"] == model, "verdict"].nunique() > 1
        conditions = [condition for condition in dict.fromkeys(of_model["condition"]) if condition]
        name = short.get(str(model), style.short_name(str(model)))
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
        run = row["run"].replace(style.plain_name(row["model"]), "").strip(" -")  # a run is often named after its model
        where = escape(where) + (f" ({escape(run)})" if several_runs and run else "")
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
