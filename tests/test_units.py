"""Units of work and tables on disk: what is kept, what is measured again, and that it is said."""

import errno
import gzip
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import experiments.framework.config as config_module
from experiments.framework.config import Config, RunError
from experiments.framework.provenance import read_provenance
from experiments.framework.results import write_tables
from experiments.framework.runner import is_done, mark_forced, run_experiment
from experiments.framework.tables import Row
from tests.toy_experiments import Measured, Sample, config_in, rows_of


def test_unit_runs_once_and_again_when_settings_change(tmp_path: Path) -> None:
    done: list[int] = []

    def compute() -> list[Row]:
        done.append(1)
        return [Measured("a", None, 3), Measured("b", 0.1 + 0.2, 4)]

    first = config_in(tmp_path, limit=1).unit("model/cats-50", compute, (Measured,))
    assert config_in(tmp_path, limit=1).unit("model/cats-50", compute, (Measured,)) == first and len(done) == 1
    assert first[1] == Measured("b", 0.30000000000000004, 4)
    config_in(tmp_path, limit=2).unit("model/cats-50", compute, (Measured,))
    config_in(tmp_path, limit=2).unit("model/cats 50", compute, (Measured,))  # another key with the same slug
    assert len(done) == 3


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in the way")


def _edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "truncated": lambda path: path.write_text(path.read_text()[:-20]),
    "binary": lambda path: path.write_bytes(bytes(range(128, 256))),
    "another type": lambda path: path.write_text("[]"),
    "a directory": _directory,
    "no rows": _edited(lambda content: content.update(rows=[])),
    "a string for a number": _edited(lambda content: content["rows"][0][1].update(value="1.0")),
    "another number": _edited(lambda content: content["rows"][0][1].update(value=2.0)),
    "another commit": _edited(lambda content: content.update(commit="0" * 40)),
    "an older version's": lambda path: path.write_text('{"settings": 1, "rows": []}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_unit_is_measured_again_and_said(damage: str, tmp_path: Path, capsys) -> None:
    done: list[int] = []

    def compute() -> list[Row]:
        done.append(1)
        return [Measured("a", 1.0, 1)]

    config = config_in(tmp_path)
    expected = config.unit("one", compute, (Measured,))
    path = config.store.path("one")
    DAMAGE[damage](path)
    assert config_in(tmp_path).unit("one", compute, (Measured,)) == expected and len(done) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"e90: one is measured again: what {path} holds cannot be used (") and said.count("\n") == 1
    assert config_in(tmp_path).unit("one", compute, (Measured,)) == expected and len(done) == 2
    assert capsys.readouterr().err == ""


def test_units_of_other_settings_or_rows_of_a_gone_table_are_measured_again(tmp_path: Path, capsys) -> None:
    config_in(tmp_path).unit("one", lambda: [Measured("a", 1.0, 1)], (Measured,))
    config_in(tmp_path).unit("one", lambda: [Sample("a", "01")], (Sample,))
    assert "cannot be used ('e90_measured')" in capsys.readouterr().err
    config_in(tmp_path, limit=2).unit("one", lambda: [Sample("a", "01")], (Sample,))
    assert "it was measured with other settings" in capsys.readouterr().err


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    rows: list[Row] = [Measured("a", 0.1 + 0.2, 1), Measured("b", math.nan, 2), Measured("c", math.inf, 3)]
    config_in(tmp_path).unit("one", lambda: rows, (Measured,))
    kept = config_in(tmp_path).unit("one", lambda: [], (Measured,))
    assert repr(kept) == repr(rows)


@pytest.mark.parametrize("later", ["computed", "stored by a worker"])
def test_units_of_a_model_that_has_changed_since_are_not_put_beside_others(
    later: str, tmp_path: Path, monkeypatch
) -> None:
    """Settings have a model's name, which says nothing of the files that lie there."""
    model = tmp_path / "model.gguf"
    identity = lambda _model: {"weights": model.read_text(), "revision": str(len(model.read_text()))}  # noqa: E731
    monkeypatch.setattr(config_module, "model_identity", identity)

    def measure(config: Config, key: str) -> list[Row]:
        return config.unit(key, lambda: config.identify("mine") or [Measured(key, 1.0, 1)], (Measured,))

    model.write_text("first")
    measure(config_in(tmp_path), "one")
    measure(config_in(tmp_path), "two")  # by another process
    model.write_text("second")
    if later == "stored by a worker":
        measure(config_in(tmp_path), "three")
    resumed = config_in(tmp_path)
    for key in ("one", "two"):
        measure(resumed, key)
    with pytest.raises(RunError, match=r"e90: mine is not what it was when other units in .* were measured: --force"):
        measure(resumed, "three")


def test_a_unit_says_that_it_was_computed_in_smaller_batches(tmp_path: Path) -> None:
    """Of a worker, or of an attempt before this one, nothing but its units remains."""
    worker = config_in(tmp_path, batch_size=16, train_batch_size=8)
    worker.unit("whole", lambda: [Measured("a", 1.0, 1)], (Measured,))
    worker.halve_batches()
    worker.unit("halved", lambda: [Measured("b", 1.0, 1)], (Measured,))
    reader = config_in(tmp_path, batch_size=16, train_batch_size=8)
    reader.unit("whole", list, (Measured,))
    assert "lowered_for_memory" not in reader.notes
    reader.unit("halved", list, (Measured,))
    assert reader.notes["lowered_for_memory"] == {"batch_size": 8} and not reader.reduced


def test_notes_of_a_unit_outlive_an_interruption(tmp_path: Path) -> None:
    def compute(config: Config, name: str) -> list[Row]:
        config.notes["tokens"] = 7
        config.notes.setdefault("largest", {})[name] = 0.5
        config.identify_data(f"task {name}", {"version": 1})
        return [Measured(name, 1.0, 1)]

    first = config_in(tmp_path)
    for name in ("a", "b"):
        first.unit(name, lambda name=name: compute(first, name), (Measured,))
    second = config_in(tmp_path)
    second.notes["largest"] = {"c": 0.25}
    for name in ("a", "b"):
        second.unit(name, lambda: [], (Measured,))
    assert second.notes == {**first.notes, "largest": {"a": 0.5, "b": 0.5, "c": 0.25}}


def test_a_file_in_the_way_of_checkpoints_is_removed(tmp_path: Path, capsys) -> None:
    config = config_in(tmp_path)
    folder = config.workdir("one")
    folder.rmdir()
    folder.write_text("")
    assert config.workdir("one").is_dir() and f"{folder} is in the way" in capsys.readouterr().err


def test_an_interrupted_experiment_goes_on(tmp_path: Path, toy: Callable) -> None:
    measured: list[str] = []

    def measure(name: str) -> list[Row]:
        measured.append(name)
        if measured == ["a", "b"]:
            raise KeyboardInterrupt
        return [Measured(name, 1.0, 1)]

    def run(config: Config) -> Iterable[Row]:
        for name in ("a", "b", "c"):
            yield from config.unit(name, lambda name=name: measure(name), [Measured])

    toy(run)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path))
    assert [row["name"] for row in rows_of(tmp_path / "results" / "e90_measured.csv")] == ["a"]
    assert not is_done(config_in(tmp_path)) and config_in(tmp_path).store.kept(config_in(tmp_path).stamp) == ["a"]
    (path,) = run_experiment(config_in(tmp_path))
    assert [row["name"] for row in rows_of(path)] == ["a", "b", "c"]
    assert measured == ["a", "b", "b", "c"]  # "a" once
    assert not (tmp_path / "state" / "e90").exists() and is_done(config_in(tmp_path))
    assert run_experiment(config_in(tmp_path)) == []
    assert run_experiment(config_in(tmp_path), force=True) == [path] and measured[4:] == ["a", "b", "c"]
    path.unlink()
    assert not is_done(config_in(tmp_path))
    assert not is_done(config_in(tmp_path, limit=2))


def test_csv_cells(tmp_path: Path) -> None:
    rows: list[Row] = [Measured('with "quotes", and comma', None, 0), Measured("nan", float("nan"), 2)]
    (path,) = write_tables([*rows, Measured("third", 1 / 3, 10**12)], tmp_path)
    assert path.name == "e90_measured.csv"
    assert path.read_text() == (
        'name,value,count\n"with ""quotes"", and comma",,0\nnan,nan,2\nthird,0.3333333,1000000000000\n'
    )
    with pytest.raises(ValueError, match="produced no rows"):
        write_tables([], tmp_path)


def test_a_table_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables([Measured("old", 1.0, 1)], tmp_path)
    before = (tmp_path / "e90_measured.csv").read_text()

    def full(*_arguments) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_tables([Measured("new", 2.0, 2)], tmp_path)
    assert (tmp_path / "e90_measured.csv").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["e90_measured.csv"]  # and no temporary file stays


def three_units(measured: list[str], stop_at: list[str]) -> Callable[[Config], Iterable[Row]]:
    """An experiment of the units a, b and c, that is interrupted in those of ``stop_at`` once."""

    def measure(name: str) -> list[Row]:
        measured.append(name)
        if name in stop_at:
            stop_at.remove(name)
            raise KeyboardInterrupt
        return [Measured(name, float(len(measured)), 1), Sample(name, "01")]

    def run(config: Config) -> Iterable[Row]:
        for name in ("a", "b", "c"):
            yield from config.unit(name, lambda name=name: measure(name), [Measured, Sample])

    return run


def test_a_forced_run_that_was_interrupted_goes_on_when_repeated(tmp_path: Path, toy: Callable, capsys) -> None:
    measured: list[str] = []
    stop_at: list[str] = []
    toy(three_units(measured, stop_at))
    run_experiment(config_in(tmp_path))
    stop_at.append("c")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path), force=True)
    assert measured[3:] == ["a", "b", "c"] and not is_done(config_in(tmp_path))
    run_experiment(config_in(tmp_path), force=True)
    assert measured[6:] == ["c"]
    said = capsys.readouterr().err
    assert "going on with the --force that was interrupted" in said
    assert "e90 goes on: 2 finished units kept from before (a, b)" in said
    assert [row["value"] for row in rows_of(tmp_path / "results" / "e90_measured.csv")] == ["4", "5", "7"]
    run_experiment(config_in(tmp_path), force=True)  # the one before had finished: this one is new
    assert measured[7:] == ["a", "b", "c"]


def test_after_an_interrupted_force_the_plain_command_goes_on_too(tmp_path: Path, toy: Callable) -> None:
    measured: list[str] = []
    stop_at: list[str] = []
    toy(three_units(measured, stop_at))
    run_experiment(config_in(tmp_path))
    stop_at.append("b")
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path), force=True)
    assert run_experiment(config_in(tmp_path)) and measured[3:] == ["a", "b", "b", "c"]


def test_a_force_of_other_experiments_is_another_one(tmp_path: Path, toy: Callable) -> None:
    toy(three_units([], ["b"]))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_in(tmp_path), force=True)
    other = Config("e91", "toy", tmp_path)
    mark_forced([config_in(tmp_path), other])
    assert config_in(tmp_path).store.forced() == other.store.forced() == ["e90", "e91"]
    assert config_in(tmp_path).store.kept(config_in(tmp_path).stamp) == []


@pytest.mark.parametrize("name", ["e90_measured.csv", "samples/e90_sample.csv.gz"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "edited"])
def test_a_table_that_is_not_what_was_written_does_not_count(
    name: str, damage: str, tmp_path: Path, toy: Callable, capsys
) -> None:
    toy(three_units([], []))
    run_experiment(config_in(tmp_path))
    path = tmp_path / "results" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-3] if damage == "truncated" else content[:-3] + b"abc")
    assert not is_done(config_in(tmp_path))
    assert run_experiment(config_in(tmp_path)) and is_done(config_in(tmp_path))
    said = capsys.readouterr().err
    assert f"e90 is measured again: {path} is {'missing' if damage == 'missing' else 'not what was written'}" in said


def test_samples_are_compressed_and_listed(tmp_path: Path, toy: Callable) -> None:
    toy(three_units([], []))
    paths = run_experiment(config_in(tmp_path))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "results/e90_measured.csv",
        "results/samples/e90_sample.csv.gz",
    ]
    assert gzip.decompress(paths[1].read_bytes()).decode() == "name,correct\na,01\nb,01\nc,01\n"
    entry = read_provenance(tmp_path)["experiments"]["e90"]
    assert entry["tables"] == ["e90_measured.csv", "samples/e90_sample.csv.gz"]
    assert entry["checksums"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in zip(entry["tables"], paths, strict=True)
    }


def test_a_table_that_is_no_longer_written_goes(tmp_path: Path, toy: Callable) -> None:
    toy(three_units([], []))
    run_experiment(config_in(tmp_path))
    toy(lambda config: [Measured("a", 1.0, 1)])
    run_experiment(config_in(tmp_path), force=True)
    assert not (tmp_path / "results" / "samples" / "e90_sample.csv.gz").exists()
    assert read_provenance(tmp_path)["experiments"]["e90"]["tables"] == ["e90_measured.csv"]
