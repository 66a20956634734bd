"""Whole runs in processes of their own: failures, signals, a source tree that cannot be written to.

They run a copy of the framework, with toy experiments, in a folder of its own (whose name has a space).
"""

import csv
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

TOY = '''
"""Toy {number}: {purpose}."""
import os, sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from experiments.framework.tables import Row

@dataclass(frozen=True)
class Line(Row):
    table: ClassVar[str] = "e0{number}_line"
    name: str

@dataclass(frozen=True)
class Options:
    journal: str

def unit(config, name):
    with open(config.options.journal, "a") as file:
        file.write(f"e0{number} {{name}}\\n")
    return [Line(name)]

def run(config):
    for name in ("a", "b", "c"):
        yield from config.unit(name, lambda: unit(config, name), [Line])
        {action}
'''
ACTIONS = {
    1: ("works", "pass"),
    2: ("fails", 'raise RuntimeError("the flux is broken")'),
    3: ("waits where it is told to", '''
        waiting = Path(config.options.journal + ".wait")
        while waiting.exists() and name == "b" and not config.finished_only:
            time.sleep(0.05)'''),
}  # fmt: skip
REPORT = """
from pathlib import Path
def main(words):
    (Path(words[0]) / "report.md").write_text("report")
    return 0
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source tree with the real framework, toy experiments e01 to e03 and a toy report."""
    root = tmp_path_factory.mktemp("source") / "a source tree"
    (root / "experiments" / "profiles").mkdir(parents=True)
    (root / "reports").mkdir()
    for name in ("__init__", "__main__", "cli"):
        shutil.copy(ROOT / "experiments" / f"{name}.py", root / "experiments")
    source = ROOT / "experiments" / "framework"
    shutil.copytree(source, root / "experiments" / "framework", ignore=shutil.ignore_patterns("__pycache__"))
    for number, (purpose, action) in ACTIONS.items():
        text = TOY.format(number=number, purpose=purpose, action=action)
        (root / "experiments" / f"e0{number}_toy.py").write_text(text.lstrip())
    (root / "reports" / "__init__.py").write_text("")
    (root / "reports" / "__main__.py").write_text(textwrap.dedent(REPORT))
    return root


def profile_in(folder: Path) -> Path:
    path = folder / "toy.toml"
    tables = "".join(f"[e0{n}]\njournal = '{folder / 'journal'}'\n" for n in ACTIONS)
    path.write_text(f"device = 'cpu'\n{tables}")
    return path


def start(tree: Path, folder: Path, *words: str, before: Sequence[str] = (), **options) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-m", "experiments", words[0], "--profile", str(profile_in(folder))]
    command += ["--output", str(folder / "an output"), *words[1:]]
    # a shell starts its background jobs with SIGINT ignored, and they hand that on: here Ctrl-C must count
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_journal(folder: Path, line: str, process: subprocess.Popen[str]) -> None:
    for _ in range(600):
        if (folder / "journal").exists() and line in (folder / "journal").read_text().splitlines():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    raise AssertionError(f"{line} did not come")


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root may write everywhere")
def test_a_failed_experiment_fails_the_run_after_the_others(tree: Path, tmp_path: Path) -> None:
    """In a source tree that cannot be written to, with spaces in its path and in the output's."""
    # root may write everywhere, unless it gives that up
    powerless = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    for path in [tree, *tree.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    process = start(tree, tmp_path, "reproduce", before=powerless)
    out, err = process.communicate(timeout=120)
    output = tmp_path / "an output"
    log = output / "logs" / "e02.log"
    assert process.returncode == 1, err
    assert "e02 failed with exit status 1 after" in err and f"its log is {log}" in err
    assert "RuntimeError: the flux is broken" in log.read_text() and "[2/3] e02 Toy 2: fails." in out
    assert sorted(path.name for path in (output / "results").iterdir()) == ["e01_line.csv", "e03_line.csv"]
    assert (output / "report.md").exists()
    assert not list(tree.rglob("__pycache__"))
    journal = (tmp_path / "journal").read_text().split("\n")[:-1]
    assert journal == ["e01 a", "e01 b", "e01 c", "e02 a", "e03 a", "e03 b", "e03 c"]
    # a second time only what failed, from where it was; --skip leaves it out and the run succeeds
    process = start(tree, tmp_path, "reproduce", "--skip", "e02", before=powerless)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "e01 is done already" in out, err
    assert (tmp_path / "journal").read_text().split("\n")[:-1] == journal


@pytest.mark.parametrize("how", ["Ctrl-C", "SIGTERM", "kill -9"])
def test_a_run_stopped_anywhere_goes_on(how: str, tree: Path, tmp_path: Path) -> None:
    wait = tmp_path / "journal.wait"
    wait.touch()
    process = start(tree, tmp_path, "reproduce", "--only", "e03", start_new_session=True)
    wait_for_journal(tmp_path, "e03 b", process)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.send_signal({"SIGTERM": signal.SIGTERM, "kill -9": signal.SIGKILL}[how])
    _, err = process.communicate(timeout=60)
    if how == "kill -9":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130 and "what was finished is kept" in err and "Traceback" not in err
    for _ in range(100):  # nothing goes on in the background
        if not _group_is_alive(process.pid):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the child is still running")
    assert names_in(tmp_path / "an output" / "results" / "e03_line.csv") == ["a", "b"]  # what was finished
    wait.unlink()
    process = start(tree, tmp_path, "run", "e03")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (tmp_path / "journal").read_text().split("\n")[:-1] == ["e03 a", "e03 b", "e03 c"]
    assert names_in(tmp_path / "an output" / "results" / "e03_line.csv") == ["a", "b", "c"]


def names_in(path: Path) -> list[str]:
    with path.open() as file:
        return [row["name"] for row in csv.DictReader(file)]


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
