"""Every job of the project; ``nox`` alone runs lint and tests.

Sessions share one environment, so that set-up is paid once; lint has a small one of its own, without torch.
"""

import hashlib
import json
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PROJECT = ("-e", ".[experiments,gguf,reports]", "--group", "tests")
PATIENCE = 30.0  # seconds in which a command may end by itself after Ctrl-C
session = nox.session(venv_backend="none")  # nox would make one environment per session: gigabytes and minutes each


def environment(s: nox.Session, name: str, *packages: str) -> str:
    """Python of the environment ``.nox/NAME``, which is made when it is not there or its dependencies have changed.

    What an interruption left unfinished has no stamp, and is made again from the beginning; pip keeps its downloads.
    """
    folder = ROOT / ".nox" / name
    python = str(folder / ("Scripts" if sys.platform == "win32" else "bin") / "python")
    stamp, wanted = folder / "cats-installed", fingerprint(*packages)
    if not stamp.exists() or stamp.read_text() != wanted:
        s.log(f"step 1 of 2, seconds: an empty environment, {folder}")
        s.run_install(sys.executable, "-m", "virtualenv", "--quiet", "--clear", str(folder), external=True)
        s.log(f"step 2 of 2, once: packages in the versions of constraints.txt, for {' '.join(packages)}")
        if packages == PROJECT:
            s.log("with torch: 3 to 10 minutes; 3 GB on the disk, 6 with CUDA; pip names each package below")
        with growing(s, folder):
            pip = (python, "-m", "pip", "install", "--no-input", "-c", "constraints.txt")
            s.run_install(*pip, *packages, external=True)
        stamp.write_text(wanted)
        s.log("installed; the next run begins at once")
    return python


def gigabytes(folder: Path) -> float:
    """Size of all files below ``folder``, which may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.lstat().st_size
    return total / 1e9


@contextmanager
def growing(s: nox.Session, folder: Path, every: float = 20.0) -> Iterator[None]:
    """Say how large ``folder`` is and how long it has taken, again and again: pip is silent while it unpacks."""
    begin, done = time.monotonic(), threading.Event()

    def tell() -> None:
        while not done.wait(every):
            s.log(f"installing for {time.monotonic() - begin:.0f} s, {gigabytes(folder):.1f} GB unpacked")

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def fingerprint(*packages: str) -> str:
    """Hash of what an environment is made from: other lines of pyproject.toml, such as ruff's, change nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [packages, project["project"], project["dependency-groups"], project["build-system"]]
    text = json.dumps(parts) + (ROOT / "constraints.txt").read_text()
    return hashlib.sha256(text.encode()).hexdigest()


def run(s: nox.Session, *command: str) -> None:
    """Run ``python *command`` in the shared environment, with the project installed.

    After Ctrl-C it may end by itself and say what is kept; nox would kill it after half a second.
    """
    python = environment(s, VERSION, *PROJECT)
    s.run(python, *command, external=True, interrupt_timeout=PATIENCE, terminate_timeout=PATIENCE)


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
    """Check types, then run the test suite in several processes; with coverage: nox -s tests -- --cov=cats"""
    options = list(s.posargs)
    if not options:  # here and not in lint, since types of torch's tensors are known only where torch is installed
        run(s, "-m", "mypy")
        options = ["--numprocesses=auto", "--maxprocesses=4", "--dist=loadfile"]  # each imports torch: half a gigabyte
        options += ["--no-loadscope-reorder"]  # which would begin files of one or two long tests last of all
        s.env["OMP_WAIT_POLICY"] = "passive"  # else the waiting threads of each keep the others from the cores
    run(s, "-m", "pytest", "--durations=25", *options)


@session
def kernels(s: nox.Session) -> None:
    """Check every kernel backend: CPU, Triton interpreted, Triton compiled ahead of time, and a GPU if there is one."""
    run(s, "-m", "pytest", "-rsP", "--show-capture=stdout", *(s.posargs or KERNEL_TESTS))


@session
def bench(s: nox.Session) -> None:
    """Measure kernel speed as ratios in one run; fail where a kernel has lost half of the gain expected of it."""
    s.log("several minutes, on a machine that does nothing else: other work lowers every ratio")
    s.log("bound/0.5 is the fraction of the memory's speed that a kernel reaches where it skips 50 % of the neurons,")
    s.log("dense/0.5 its speed over torch's dense MLP, self/0.5 over itself where it skips nothing")
    run(s, "-m", "pytest", *BENCHES, "--benchmark-only", "-rsP", "--show-capture=stdout", *s.posargs)


@session
def lint(s: nox.Session) -> None:
    """Check style, in a small environment of its own; types are checked in tests."""
    python = environment(s, f"lint-{VERSION}", "--group", "lint")
    s.run(python, "-m", "ruff", "check", ".", external=True)
    s.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@session
def pretrain(s: nox.Session) -> None:
    """Train the pocket model again from the standard library's source, on a GPU if there is one, else on the CPU."""
    run(s, "-m", "experiments.pocket.pretrain", *s.posargs)


KERNEL_FILES = (
    "*kernel*", "triton*", "quantized_cpu*", "packed_sums", "quantized_formats", "quantized_weights",
    "decode_attention", "repeated*", "reference", "operator*", "problem", "cpu_threads",
)  # fmt: skip
KERNEL_TESTS = sorted(
    {str(path.relative_to(ROOT)) for name in KERNEL_FILES for path in ROOT.glob(f"tests/test_{name}.py")}
)
BENCHES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/bench_*.py"))
