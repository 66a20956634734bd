"""Every job of the project; ``nox`` alone runs lint and tests. Sessions share one environment: set-up is paid once."""

import hashlib
import sys
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
ENVIRONMENT = ROOT / ".nox" / f"python{sys.version_info.major}.{sys.version_info.minor}"
BIN = ENVIRONMENT / ("Scripts" if sys.platform == "win32" else "bin")
session = nox.session(venv_backend="none")  # nox would make one environment a session: gigabytes and minutes each


def run(s: nox.Session, *command: str) -> None:
    """Run ``python *command`` in the shared environment, after installing the project there at the locked versions."""
    stamp = ENVIRONMENT / "cats-installed"
    wanted = hashlib.sha256(
        b"".join((ROOT / f).read_bytes() for f in ("pyproject.toml", "constraints.txt"))
    ).hexdigest()
    python = str(BIN / "python")
    if not stamp.exists() or stamp.read_text() != wanted:
        s.run(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(ENVIRONMENT), external=True)
        extras = ".[experiments,reports,tests,lint]"
        s.run(python, "-m", "pip", "install", "--quiet", "-c", "constraints.txt", "-e", extras, external=True)
        stamp.write_text(wanted)
    s.run(python, *command, external=True)


@session
def reproduce(s: nox.Session) -> None:
    """Run every experiment of a profile (default pocket: offline, CPU) and render the report."""
    run(s, "-m", "experiments", "reproduce", *s.posargs)


@session
def experiment(s: nox.Session) -> None:
    """Run one experiment alone: nox -s experiment -- e02 --model PATH_OR_HUB_ID"""
    run(s, "-m", "experiments", "run", *s.posargs)


@session
def report(s: nox.Session) -> None:
    """Render the report again from the CSVs of one or several run directories."""
    run(s, "-m", "reports", *(s.posargs or ["runs/pocket"]))


@session
def tests(s: nox.Session) -> None:
    """Run the test suite with coverage of cats and cats_kernels."""
    run(s, "-m", "pytest", "--cov=cats", "--cov=cats_kernels", "--cov-report=term", *s.posargs)


@session
def kernels(s: nox.Session) -> None:
    """Check every kernel backend: CPU, Triton interpreted, Triton compiled ahead of time, and a GPU if there is one."""
    run(s, "-m", "pytest", "-rsP", "--show-capture=stdout", *(s.posargs or KERNEL_TESTS))


@session
def bench(s: nox.Session) -> None:
    """Measure kernel speed as ratios in one run and compare them with the committed baseline."""
    run(s, "-m", "pytest", "tests/bench_cpu.py", "--benchmark-only", *s.posargs)


@session
def lint(s: nox.Session) -> None:
    """Check style and types."""
    run(s, "-m", "ruff", "check", ".")
    run(s, "-m", "ruff", "format", "--check", ".")
    run(s, "-m", "mypy")


@session
def pretrain(s: nox.Session) -> None:
    """Train the pocket model again from the standard library's source, on a GPU if there is one, else on the CPU."""
    run(s, "-m", "experiments.pocket.pretrain", *s.posargs)


KERNEL_TESTS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_*kernel*.py"))
KERNEL_TESTS += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/test_triton*.py"))
KERNEL_TESTS += [
    f"tests/test_{name}.py" for name in ("reference", "operator", "operator_recorded", "problem", "cpu_threads")
]
