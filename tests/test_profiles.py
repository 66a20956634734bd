"""Profiles and the command line's changes to them: typed, validated whole, one sentence for what is wrong."""

import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.framework.profiles import load_profile, make_config, override


@pytest.fixture(autouse=True)
def _sigterm() -> Iterable[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


BAD = {
    "profile": (["run", "e01", "--profile", "laptp"], "no profile 'laptp': allowed are "),
    "device": (["run", "e01", "--device", "tpu"], "unknown device 'tpu': allowed are auto, cpu, cuda, cuda:N"),
    "dtype": (["run", "e01", "--dtype", "int4"], "dtype must be one of auto, float32, float16, bfloat16, not 'int4'"),
    "set without =": (["run", "e01", "--set", "e01.bins"], "must look like e02.limit=50"),
    "set of an unknown table": (["run", "e01", "--set", "e99.bins=3"], "must look like e02.limit=50"),
    "set of an unknown option": (
        ["run", "e02", "--set", "e02.limt=50"],
        "e02 has no option limt: allowed are batch_size",
    ),
    "set below a value": (["run", "e01", "--set", "e01.bins.x=3"], "bins is not a table"),
    "nothing left": (["reproduce", "--only", "e01", "--skip", "e01"], "nothing to run"),
    "data without a split": (["run", "e01", "--set", "data.path=a/b"], "a path but no split"),
    "empty models": (["run", "e01", "--set", "models=[]"], "models must be a list of at least one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, capsys) -> None:
    words, expected = BAD[case]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown_experiments_are_refused_with_the_known_ones(tmp_path: Path, capsys) -> None:
    for words in (["run", "e99"], ["reproduce", "--only", "e99"], ["reproduce", "--skip", "e99"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--output", str(tmp_path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "e99" in said and "e01" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [("models = [", "is not valid TOML"), ("modles = []", "unknown keys modles"), ("[e01]\n", "no table [e90]")],
)
def test_a_profile_of_ones_own_is_checked(content: str, expected: str, tmp_path: Path, toy: Callable, capsys) -> None:
    toy(lambda config: [])
    profile = tmp_path / "own.toml"
    profile.write_text(content)
    assert main(["run", "e90", "--profile", str(profile), "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_overrides_are_typed_and_reach_the_experiment(tmp_path: Path) -> None:
    profile = load_profile("pocket")
    for assignment in (
        "e01.bins=7",
        "e01.targets=[0.25]",
        "data.path=a/b",
        "data.split=c",
        "e01.include_path = a word",
        "e01.models=['x']",
    ):
        override(profile, assignment)
    made = make_config("e01", "pocket", profile, tmp_path)
    assert made.options["bins"] == 7 and made.options["targets"] == [0.25] and made.options["include_path"] == "a word"
    assert made.models == ["x"] and made.data["path"] == "a/b"
    assert make_config("e01", "pocket", load_profile("pocket"), tmp_path).models == ["pocket"]
