"""Profiles and the command line's changes to them: typed, validated whole, one sentence for what is wrong."""

import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.cli import configs_of, parser
from experiments.framework import profiles
from experiments.framework.profiles import apply_assignments, load_profile, make_config, make_configs, override


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
    "no table": (["run", "e01", "--set", "e01=5"], "e01 must be a table of options, not 5"),
    "another experiment's table": (["run", "e01", "--set", "e02=5"], "e02 must be a table of options, not 5"),
    "another experiment's option": (["run", "e01", "--set", "e02.limt=50"], "e02 has no option limt: allowed are"),
    "seed that is no number": (["run", "e01", "--set", "seed=x"], "seed must be a whole number in [0, 2147483647]"),
    "seed out of range": (["run", "e01", "--seed", "-1"], "seed must be a whole number in [0, 2147483647], not -1"),
    "seed of one experiment": (["run", "e01", "--set", "e01.seed=4294967296"], "e01.seed must be a whole number in"),
    "empty model": (["run", "e01", "--model", ""], "models must be a list of at least one, each a string of at least"),
    "unknown data": (["run", "e01", "--set", "data.paht=a"], "data has no option paht: allowed are column, data_files"),
    "hub without a path": (["run", "e01", "--set", "data.source=hub"], "data.path is missing"),
    "no process": (["reproduce", "--processes", "0"], "--processes must be a whole number, 1 or more, not 0"),
    "empty models": (["run", "e01", "--set", "models=[]"], "models must be a list of at least one"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, tmp_path: Path, capsys) -> None:
    words, expected = BAD[case]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


BAD_VALUES = {
    "e02.limit=abc": "e02.limit must be a whole number, 2 or more, not 'abc'",
    "e02.limit=2.5": "e02.limit must be a whole number, 2 or more, not 2.5",
    "e02.limit=1": "e02.limit must be a whole number, 2 or more, not 1",
    "e08.limit=1": "e08.limit must be a whole number, 2 or more, not 1",
    "e02.levels=0.5": "e02.levels must be a list of at least one, each a number in [0, 1), not 0.5",
    "e02.levels=[]": "e02.levels must be a list of at least one, each a number in [0, 1), not []",
    "e02.batch_size=0": "e02.batch_size must be a whole number, 1 or more, not 0",
    "e02.heldout_blocks=99999999": "e02.heldout_blocks must be at most ",
    "e02.criteria=['x']": "e02.criteria must be a list of at least one, each one of auto, cats, ",
    "e01.bins=0": "e01.bins must be a whole number, 1 or more, not 0",
    "e03.steps=[20,10]": "e03.steps must be a list of at least one, each a whole number, 1 or more, rising, not [",
    "e04.epochs=0": "e04.epochs must be a whole number, 1 or more, not 0",
    "e05.sparsities={float32=[1.5]}": "e05.sparsities.float32 must be a list of at least one, each a number in [0, 1)",
    "e06.lengths={eager=[]}": "e06.lengths.eager must be a list of at least one",
    "e07.learning_rate=0": "e07.learning_rate must be a number above 0, not 0",
}


@pytest.mark.parametrize("assignment", BAD_VALUES)
def test_a_bad_value_is_refused_before_any_experiment(assignment: str, tmp_path: Path, capsys) -> None:
    assert main(["reproduce", "--only", "e01", "--output", str(tmp_path / "out"), "--set", assignment]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {BAD_VALUES[assignment]}") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_pocket_plan_asks_for_no_gpu(tmp_path: Path, capsys) -> None:
    """Two layers of the 7B shapes run, not all: 33.7 GB of float32 are not needed."""
    assert main(["reproduce", "--plan", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("e06")]
    memory = re.search(r"([\d.]+) GiB", line)
    assert memory is not None and float(memory.group(1)) < 6 and "GPU" not in line
    (here, there), each = in_minutes(out, r"^in all.*$")[0], in_minutes(out, r"^e\d\d.*$")
    assert len(each) == len(profiles.EXPERIMENTS)
    for total, parts in zip((here, there), zip(*each, strict=True), strict=True):
        assert total == pytest.approx(sum(parts), rel=0.06, abs=1)  # each is rounded


def in_minutes(text: str, lines: str) -> list[list[float]]:
    """Durations in each line of ``text`` that matches."""
    durations = [re.findall(r"([\d.]+) (min|h)\b", line) for line in re.findall(lines, text, re.MULTILINE)]
    return [[float(number) * (60 if unit == "h" else 1) for number, unit in line] for line in durations]


def test_unknown_experiments_are_refused_with_the_known_ones(tmp_path: Path, capsys) -> None:
    for words in (["run", "e99"], ["reproduce", "--only", "e99"], ["reproduce", "--skip", "e99"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--output", str(tmp_path)])
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "e99" in said and "e01" in said


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("models = [", "is not valid TOML"),
        ("\xff\xfe", "is not valid TOML"),
        ("modles = []", "unknown keys modles"),
        ("[e01]\n", "no table [e90]"),
        ("e90 = 3\n", "e90 must be a table of options, [e90], not 3"),
        ("data = 'x'\n[e90]\n", "data must be a table of options, [data], not 'x'"),
        ("[e90]\nlimt = 1\n", "e90 has no option limt: allowed are batch_size, levels, limit, train_batch_size"),
        ("[e90]\nlevels = []\n", "e90.levels must be a list of at least one, each a number, not []"),
        ("seed = 1.5\n[e90]\n", "seed must be a whole number in [0, 2147483647], not 1.5"),
    ],
)
def test_a_profile_of_ones_own_is_checked(content: str, expected: str, tmp_path: Path, toy: Callable, capsys) -> None:
    toy(lambda config: [])
    profile = tmp_path / "own.toml"
    profile.write_text(content, encoding="latin-1")
    assert main(["run", "e90", "--profile", str(profile), "--output", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


def test_overrides_are_typed_and_reach_the_experiment(tmp_path: Path) -> None:
    profile = load_profile("pocket")
    for assignment in (
        "e02.limit=7",
        "e02.levels=[0.25]",
        "data.path=a/b",
        "data.split=c",
        "e02.include_path = a word",
        "e02.models=['x']",
    ):
        override(profile, assignment)
    made = make_config("e02", "pocket", profile, tmp_path)
    assert (made.options.limit, made.options.levels, made.options.include_path) == (7, (0.25,), "a word")
    assert made.models == ["x"] and made.data["path"] == "a/b"
    assert make_config("e02", "pocket", load_profile("pocket"), tmp_path).models == ["pocket"]


def test_processes_that_cannot_share_a_batch_or_have_no_gpu_are_refused(
    tmp_path: Path, toy: Callable, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy(lambda config: [])
    profile = tmp_path / "own.toml"
    profile.write_text("[e90]\ntrain_batch_size = 4\n")
    words = ["reproduce", "--profile", str(profile), "--output", str(tmp_path / "out"), "--processes"]
    assert main([*words, "3", "--device", "cpu"]) == 2
    assert "--processes must divide e90.train_batch_size (4) evenly, not be 3" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*words, "2", "--device", "cuda"]) == 2
    assert "--processes must be at most 1, the number of GPUs here, not 2" in capsys.readouterr().err


def test_another_data_set_takes_the_profile_s_own_with_it(tmp_path: Path) -> None:
    profile = load_profile("laptop")
    assert profile["data"]["name"] == "wikitext-103-raw-v1"
    apply_assignments(profile, ["data.split=test", "data.path=json", "data.data_files=a.jsonl"])
    data = make_config("e01", "laptop", profile, tmp_path).data
    assert data == {"source": "hub", "path": "json", "data_files": "a.jsonl", "split": "test"}


def test_what_differs_from_the_profile_is_noted(tmp_path: Path, toy: Callable) -> None:
    toy(lambda config: [])
    original = {"device": "cpu", "e90": {"limit": 3}}
    changed = {**original, "seed": 1, "models": ["pocket", "shape:small"], "e90": {"limit": 5, "levels": [0.7]}}
    (same,) = make_configs(["e90"], "own", original, tmp_path, original)
    (other,) = make_configs(["e90"], "own", changed, tmp_path, original)
    (added,) = make_configs(["e90"], "own", changed, tmp_path, {"device": "cpu"})
    assert same.differs == {}
    assert other.differs == {
        "models": [["pocket"], ["pocket", "shape:small"]],
        "options.levels": [[0.5], [0.7]],
        "options.limit": [3, 5],
        "seed": [0, 1],
    }
    assert added.differs == {"e90": ["not in the profile", "measured"]}


def test_a_file_named_like_a_shipped_profile_is_compared_with_that(tmp_path: Path) -> None:
    own = tmp_path / "pocket.toml"
    own.write_text((profiles.PROFILES / "pocket.toml").read_text().replace("bins = 800", "bins = 7"))
    for name, differs in (("pocket", {}), (str(own), {"options.bins": [800, 7]})):
        arguments = parser().parse_args(["run", "e01", "--profile", name, "--output", str(tmp_path)])
        (config,) = configs_of(arguments, ["e01"])
        assert config.differs == differs


@pytest.mark.parametrize("name", sorted(path.stem for path in profiles.PROFILES.glob("*.toml")))
def test_shipped_profiles_are_valid_whole(name: str, tmp_path: Path) -> None:
    profile = load_profile(name)
    chosen = [one for one in profiles.EXPERIMENTS if one in profile]
    assert len(chosen) >= 6
    for config in make_configs(chosen, name, profile, tmp_path, profile):
        assert config.differs == {}


def test_experiments_are_found_by_name_and_each_number_once(tmp_path: Path) -> None:
    (tmp_path / "e91_toy.py").write_text("")
    (tmp_path / "e92_folder").mkdir()
    (tmp_path / "e92_folder" / "__init__.py").write_text("")
    (tmp_path / "helper.py").write_text("")
    assert profiles.discover([str(tmp_path)]) == {"e91": "experiments.e91_toy", "e92": "experiments.e92_folder"}
    (tmp_path / "e91_other.py").write_text("")
    with pytest.raises(ImportError, match="are both experiment e91"):
        profiles.discover([str(tmp_path)])
