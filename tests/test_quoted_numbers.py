"""Every number in README.md, and in how OWN_MODEL.md says to choose a criterion, is in results/."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.framework.tables import LatencyRow
from reports.measures.latency import COMPILED, TORCH
from reports.rules.e05 import faster_dense
from tests import quoted_numbers as quoted

ROOT = Path(__file__).parents[1]
QUOTES = quoted.DECLARED["quote"]
NUMBER = re.compile(r"(?<![\w.,-])[+\u2212-]?\d+(?:[.,]\d+)*(?![\w])")


def prose(text: str) -> str:
    """Without code, links' targets, pictures and list numbers: what is left says something of a measurement."""
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = re.sub(r"`[^`\n]+`", " ", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"(?m)^\d+\. ", "", text)


def section_of(document: str) -> str:
    """The part of a document whose numbers are declared."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return text if document == "README.md" else text.split("### Choosing a criterion")[1].split("\n## ")[0]


def undeclared(text: str, quotes: list[dict], plain: list[str]) -> list[str]:
    """Numbers of the prose that no quote and no pattern covers, each with what stands around it."""
    for quote in quotes:
        text = quoted.pattern(quote).sub(lambda found: re.sub(r"[\d]", "", found.group()), text)
    text = prose(text)
    for one in plain:
        text = re.sub(one, lambda found: re.sub(r"\d", "", found.group()), text)
    return [text[max(0, found.start() - 30) : found.end() + 30].replace("\n", " ") for found in NUMBER.finditer(text)]


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: f"{quote['document']}: {quote['text'][:40]}")
def test_a_quoted_number_is_what_was_measured(quote: dict) -> None:
    said = " ".join((ROOT / quote["document"]).read_text(encoding="utf-8").split())
    expected = " ".join(quoted.sentence(quote).split())
    assert expected in said, f"{quote['document']} does not say, as results/ do: {expected}"


@pytest.mark.parametrize("document", ["README.md", "docs/OWN_MODEL.md"])
def test_no_number_is_without_its_measurement(document: str) -> None:
    quotes = [quote for quote in QUOTES if quote["document"] == document]
    assert undeclared(section_of(document), quotes, quoted.DECLARED["plain"][document]) == []


MLP_TABLE = next(quote["values"] for quote in QUOTES if quote["text"].startswith("| 50 % |"))
H100 = sorted(f"h100/{path.name}" for path in (ROOT / "results" / "h100").iterdir())


@pytest.mark.parametrize("entry", MLP_TABLE, ids=lambda entry: f"{entry['shape']}, {entry['dtype']}")
def test_the_dense_of_the_mlp_table_is_the_strongest_timed_on_such_a_card(entry: dict) -> None:
    """Within half a percent, by which two timings of one program differ."""
    run = replace(quoted.run_at(entry["run"]), beside=tuple(map(quoted.run_at, H100)))
    table = run.tables[LatencyRow.table]
    dense = table[table["implementation"].isin([TORCH, COMPILED]) & (table["rows"] == 1)]
    dense = dense[(dense["shape"] == entry["shape"]) & (dense["dtype"] == entry["dtype"])]
    here = dense["p50_ms"].min()
    faster = faster_dense(run, dense["machine"].iloc[0], entry["shape"], entry["dtype"], here)
    assert faster is None or faster[1] > 0.995 * here, f"dense took {faster[1]} ms in {faster[0]}, {here} here"


def test_a_number_that_nobody_measured_is_seen() -> None:
    quote = {"text": "it is {:.2f} times as fast", "values": []}
    assert undeclared("At 50 % it is 1.40 times\nas fast, see `f(3)` and [a](5).", [quote], [r"\d0 %"]) == []
    assert undeclared("it is 1.40 times as fast, or 1.7", [quote], []) == ["it is . times as fast, or 1.7"]
    assert undeclared("it was 1.40 times as fast", [quote], []) != []


def test_changed_numbers_are_written_where_the_sentence_is(tmp_path, monkeypatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("Ours is 1.11 times\nas fast (+3 %).\n")
    monkeypatch.setattr(quoted, "ROOT", tmp_path)
    monkeypatch.setattr(quoted, "value_of", lambda entry: entry["value"])
    quote = {"text": "is {:.2f} times as fast ({:+.0f} %)", "values": [{"value": 1.456}, {"value": -12.3}]}
    assert quoted.update("page.md", quote)
    assert page.read_text() == "Ours is 1.46 times\nas fast (-12 %).\n"
    assert not quoted.update("page.md", quote)
    with pytest.raises(ValueError, match=r"page\.md has 0 times"):
        quoted.update("page.md", {**quote, "text": "was {:.2f}"})


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(ValueError, match=r"of must be one of mlp, .*, not speed"):
        quoted.value_of({"of": "speed"})
    with pytest.raises(ValueError, match="0 rows have"):
        quoted.value_of({"of": "accuracy", "run": "h100/gemma-3-270m", "variant": "cats-51"})
