"""The sessions, with made-up ones in place of nox's: what they run, and for how long an interrupted run may speak."""

import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from experiments.framework import children

ROOT = Path(__file__).parents[1]


@pytest.fixture
def noxfile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The project's noxfile for a project in another folder, whose name has a space."""
    nox = types.ModuleType("nox")
    nox.options = types.SimpleNamespace()  # type: ignore[attr-defined]
    nox.session = lambda **_options: lambda function: function  # type: ignore[attr-defined]
    nox.Session = Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nox", nox)
    spec = importlib.util.spec_from_file_location("noxfile", ROOT / "noxfile.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path / "a folder"
    folder.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    monkeypatch.setattr(module, "ROOT", folder)
    return module


class Session:
    """Notes what it is asked to run; an environment that it makes has its folder, as virtualenv's would."""

    def __init__(self, *posargs: str, fails: bool = False) -> None:
        self.posargs, self.fails = list(posargs), fails
        self.commands: list[tuple[str, ...]] = []
        self.options: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.env: dict[str, str] = {}

    def log(self, line: str) -> None:
        self.lines.append(line)

    def run(self, *command: str, **options: Any) -> None:
        self.commands.append(command)
        self.options.append(options)
        if "virtualenv" in command:
            Path(command[-1]).mkdir(parents=True)
        elif "install" in command and self.fails:
            raise RuntimeError("interrupted")

    def run_install(self, *command: str, **options: Any) -> None:
        self.run(*command, **options)


class Installing(Session):
    """As under ``nox --install-only``, which skips what is not of the installation."""

    def run(self, *command: str, **options: Any) -> None:
        return

    def run_install(self, *command: str, **options: Any) -> None:
        super().run(*command, **options)


def test_an_environment_is_made_once_and_says_what_it_does(noxfile: Any) -> None:
    first, second = Session("runs/mine"), Session("runs/mine")
    noxfile.report(first)
    noxfile.report(second)
    python = first.commands[-1][0]
    assert [command[2] for command in first.commands] == ["virtualenv", "pip", "reports"]
    assert "a folder" in python and second.commands == [(python, "-m", "reports", "runs/mine")]
    assert any("minutes" in line and "GB" in line for line in first.lines) and second.lines == []


def test_install_only_makes_the_environment_and_runs_nothing(noxfile: Any) -> None:
    s, later = Installing(), Session()
    noxfile.report(s)
    noxfile.report(later)
    assert [command[2] for command in s.commands] == ["virtualenv", "pip"]
    assert [command[2] for command in later.commands] == ["reports"]


def test_an_environment_that_was_not_finished_is_made_again(noxfile: Any) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        noxfile.report(Session(fails=True))
    Path(next((noxfile.ROOT / ".nox").iterdir())).rmdir()
    again = Session()
    noxfile.report(again)
    assert [command[2] for command in again.commands] == ["virtualenv", "pip", "reports"]


def test_an_interrupted_run_has_the_time_to_end_its_experiment_and_say_what_is_kept(noxfile: Any) -> None:
    s = Session("--plan")
    noxfile.reproduce(s)
    assert s.commands[-1][1:] == ("-m", "experiments", "reproduce", "--plan")
    assert s.options[-1]["interrupt_timeout"] > sum(children.PATIENCE)


def test_the_session_kernels_runs_all_tests_of_the_kernels_alone(noxfile: Any) -> None:
    """Those of the operator's package that need neither the method nor the experiments."""
    s = Session()
    noxfile.kernels(s)
    alone = {
        f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py") if packages_of(path) == {"cats_kernels"}
    }
    assert len(alone) > 10 and alone <= set(s.commands[-1])


def test_the_session_bench_says_what_its_ratios_are(noxfile: Any) -> None:
    s = Session()
    noxfile.bench(s)
    assert {f"tests/{path.name}" for path in (ROOT / "tests").glob("bench_*.py")} <= set(s.commands[-1])
    words = " ".join(s.lines)
    assert all(f"{ratio}/0.5" in words for ratio in ("bound", "dense", "self"))


def packages_of(path: Path) -> set[str]:
    """Packages of the project that a module imports at its top."""
    lines = re.findall(r"^(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return set(lines) & {"cats", "cats_kernels", "experiments", "reports"}
