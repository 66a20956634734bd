"""Words for the protocol table: what a run did, read off its tables and its provenance, beside what the paper did."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter
from typing import Any

import pandas as pd

from experiments.framework.tables import Row
from reports.core import style
from reports.core.document import escape
from reports.core.load import Run
from reports.core.provenance import incomplete
from reports.core.section import Section

MOST_NAMED = 3  # runs in the heading of a column
MOST_COLUMNS = 4  # of runs: more are too narrow to read
Words = Callable[[Run], str]


def of(row_type: type[Row], words: Callable[[pd.DataFrame], str]) -> Words:
    """Words from one table; nothing for a run without it."""

    def say(run: Run) -> str:
        table = run.table(row_type)
        return "" if table is None else words(table)

    return say


def values(table: pd.DataFrame, column: str) -> str:
    """The distinct values of a column; numbers are whole ones."""
    distinct = table[column].dropna().unique()
    if table[column].dtype == float:
        return ", ".join(f"{value:.0f}" for value in sorted(distinct))
    if column == "model":
        return ", ".join(dict.fromkeys(style.model_name(str(value)) for value in distinct))
    names = (style.model_name(style.task_name(style.dtype_name(str(value)))) for value in distinct)
    return ", ".join(dict.fromkeys(names))


def span(table: pd.DataFrame, column: str) -> str:
    """`24` or `24 to 150`."""
    low, high = table[column].min(), table[column].max()
    return f"{low:,.0f}" if low == high else f"{low:,.0f} to {high:,.0f}"


def options(run: Run, experiment: str) -> dict[str, Any]:
    """The options of the profile, as recorded, and where the text came from (`source`)."""
    settings: dict[str, Any] = run.provenance.get(experiment, {}).get("settings") or {}
    data = settings.get("data") or {}
    source = "a local folder" if data.get("folder") else data.get("path") or data.get("source")
    return {"source": source, **(settings.get("options") or {})}


def phrases(experiment: str, *templates: str) -> Words:
    """Phrases with the options filled in, `{length} tokens`; those whose options were not recorded are left out."""

    def say(run: Run) -> str:
        recorded = {name: style.listed(value) for name, value in options(run, experiment).items()}
        wanted = [(phrase, [name for _, name, _, _ in Formatter().parse(phrase) if name]) for phrase in templates]
        return "; ".join(
            phrase.format(**recorded) for phrase, names in wanted if all(recorded.get(name) for name in names)
        )

    return say


def tasks_and_items(table: pd.DataFrame) -> str:
    """`8 tasks: ...; 150 items each`, of a table in the layout of e02."""
    part = table[table["metric"] == "acc"]
    return f"{part['task'].nunique()} tasks: {values(part, 'task')}; {span(part, 'items')} items each"


def swept(table: pd.DataFrame) -> str:
    """For which variants a learning rate was swept, and what that means for the dense model."""
    names = [style.variant_name(str(name)) for name in table["variant"].unique()]
    own = "" if "dense" in set(table["variant"]) else "; the base model takes that of CATS, which favours CATS"
    return f"swept for {', '.join(names)}{own}"


CALIBRATION = ("{calibration_blocks} blocks of {length} tokens, text: {source}",)
TRAINING = (
    "LoRA with the {lora}'s settings",
    "batch {train_batch_size}",
    "weight decay {weight_decay}",
    "{warmup_steps} warm-up steps",
)


def _label(run: Run, experiment: str) -> str:
    """The run's label, and whether its run of the experiment has not ended."""
    lacks = incomplete(run.provenance.get(experiment, {}))
    return f"{run.label} ({lacks})" if lacks else run.label


def protocol(section: Section, runs: list[Run]) -> pd.DataFrame:
    """A row per aspect: the paper's, then ours. Runs that differ in the first aspect only (the models, the machine)
    share a column."""
    alike: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        alike.setdefault(tuple(aspect.ours(run) for aspect in section.protocol[1:]), []).append(run)
    first = {
        "": [aspect.name for aspect in section.protocol],
        "The paper": [escape(aspect.paper) for aspect in section.protocol],
    }
    columns = {}
    for said, members in alike.items():
        leading = dict.fromkeys(filter(None, (section.protocol[0].ours(run) for run in members)))
        label = ", ".join(escape(_label(run, section.experiment)) for run in members[:MOST_NAMED])
        label += f" and {len(members) - MOST_NAMED} more" * (len(members) > MOST_NAMED)
        columns[label] = [escape(words) or style.DASH for words in (", ".join(leading), *said)]
    return pd.DataFrame({**first, **columns})


def at_a_glance(section: Section, runs: list[Run]) -> pd.DataFrame:
    """`protocol` with one column for all runs: what each aspect was, the commonest first, with the number of runs."""
    said = []
    for aspect in section.protocol:
        counts = pd.Series([aspect.ours(run) for run in runs]).replace("", None).dropna().value_counts(sort=True)
        several = counts.sum() < len(runs) or len(counts) > 1
        parts = [f"{words} ({count})" if several else str(words) for words, count in counts.items()]
        said.append(escape(" / ".join(parts)) or style.DASH)
    names = [aspect.name for aspect in section.protocol]
    papers = [escape(aspect.paper) for aspect in section.protocol]
    return pd.DataFrame({"": names, "The paper": papers, f"{len(runs)} runs (how many of them)": said})
