"""Command line: ``python -m experiments reproduce | run`` (usually through nox).

python -m experiments reproduce --profile pocket                 # everything, then the report
python -m experiments run e02 --model PATH_OR_HUB_ID             # one experiment alone
"""

import argparse
import math
import os
import re
import shlex
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from experiments.framework.config import Config, RunError
from experiments.framework.parent import PARENT
from experiments.framework.profiles import (
    EXPERIMENTS,
    PROFILES,
    apply_assignments,
    load_profile,
    make_configs,
)
from experiments.framework.workers import SHARED, is_worker

SAME_INTERRUPTION = 5.0
"""Seconds after a signal within which another counts as the same."""
# two of the messages are torch.save's, which does not say why it could not write
_DISK_FULL = re.compile(
    r"No space left|Disk quota exceeded|File too large|failed writing file|unexpected pos \d+ vs \d+"
)


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--profile", default="pocket", help="pocket (default), laptop, small, paper, or a .toml file")
    shared.add_argument("--output", type=Path, help="run directory (default runs/PROFILE)")
    shared.add_argument(
        "--model", action="append", metavar="PATH_OR_HUB_ID", help="instead of the profile's models; repeatable"
    )
    shared.add_argument(
        "--data", metavar="DIR", help="folder with data sets by the hub's names and text; nothing is downloaded"
    )
    shared.add_argument("--device", help="auto, cpu, cuda, cuda:N or sharded (over all GPUs)")
    shared.add_argument("--dtype", help="auto, float32, float16 or bfloat16")
    shared.add_argument("--seed", type=int, help="instead of the profile's")
    shared.add_argument(
        "--set", action="append", default=[], metavar="e02.limit=50", help="any option of the profile; repeatable"
    )
    shared.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes that compute variants side by side, over all GPUs (e02, e03, e04, e07 and e08)",
    )  # fmt: skip
    shared.add_argument("--force", action="store_true", help="measure again what is done already")
    reproduce = commands.add_parser(
        "reproduce", parents=[shared], help="run the experiments of a profile, then the report"
    )
    reproduce.add_argument("--only", nargs="+", metavar="eNN", choices=list(EXPERIMENTS))
    reproduce.add_argument("--skip", nargs="+", metavar="eNN", default=[], choices=list(EXPERIMENTS))
    reproduce.add_argument("--processes", type=int, default=1, help="processes (GPUs) for e02, e03, e04 and e07")
    reproduce.add_argument(
        "--plan", action="store_true", help="print models, data, disk, memory and hours; run nothing"
    )
    run = commands.add_parser("run", parents=[shared], help="run one experiment in this process")
    run.add_argument("experiment", choices=list(EXPERIMENTS))
    run.add_argument(
        "--finished-only", action="store_true",
        help="compute nothing: write the tables of the units that an interrupted run of this command has finished",
    )  # fmt: skip
    return root


def profile_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The profile with the command line's changes."""
    profile = load_profile(arguments.profile)
    for key, value in (
        ("models", arguments.model),
        ("device", arguments.device),
        ("dtype", arguments.dtype),
        ("seed", arguments.seed),
    ):
        if value is not None:
            profile[key] = value
            for table in EXPERIMENTS:  # the command line wins over an experiment's own table
                profile.get(table, {}).pop(key, None)
    if arguments.data is not None:
        profile.setdefault("data", {})["folder"] = arguments.data
        for table in EXPERIMENTS:
            profile.get(table, {}).pop("data", None)
    apply_assignments(profile, arguments.set)
    return profile


def original_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The profile that runs of this name are expected to be of: the shipped one of that name, else the file itself."""
    stem = Path(arguments.profile).stem
    return load_profile(stem if (PROFILES / f"{stem}.toml").exists() else arguments.profile)


def configs_of(arguments: argparse.Namespace, chosen: list[str]) -> list[Config]:
    """The `Config` of each chosen experiment, after the whole profile has been validated (a child's parent has)."""
    profile, name = profile_of(arguments), Path(arguments.profile).stem
    whole = PARENT not in os.environ
    configs = make_configs(chosen, name, profile, arguments.output, original_of(arguments), whole)
    if arguments.workers < 1:
        raise ValueError(f"--workers must be a whole number, 1 or more, not {arguments.workers}")
    for config in configs:
        if config.experiment in SHARED and "WORLD_SIZE" not in os.environ:
            words = ["experiments", "run", config.experiment, *forwarded(arguments)]
            config.workers, config.command = arguments.workers, [sys.executable, "-m", *words]
    return configs


def finished_config(arguments: argparse.Namespace) -> Config:
    """The `Config` of a run whose finished units are to be written, on whatever device that was."""
    profile, original = profile_of(arguments), original_of(arguments)
    for auto in ("cuda", "cpu"):  # what auto may have stood for there
        (config,) = make_configs(
            [arguments.experiment], Path(arguments.profile).stem, profile, arguments.output, original, False, auto
        )
        if config.store.kept(config.stamp):
            break
    return config


def forwarded(arguments: argparse.Namespace) -> list[str]:
    """The shared options again, for a child process."""
    words = ["--profile", arguments.profile, "--output", str(arguments.output)]
    for key in ("data", "device", "dtype", "seed"):
        if getattr(arguments, key) is not None:
            words += [f"--{key}", str(getattr(arguments, key))]
    if arguments.workers > 1:
        words += ["--workers", str(arguments.workers)]
    for model in arguments.model or []:
        words += ["--model", model]
    for assignment in arguments.set:
        words += ["--set", assignment]
    return words


def check_processes(configs: list[Config], processes: int) -> None:
    """Refuse a number of processes that the machine or a batch cannot be shared by. Raises ValueError."""
    if processes < 1:
        raise ValueError(f"--processes must be a whole number, 1 or more, not {processes}")
    for config in configs if processes > 1 else []:
        if config.device.startswith("cuda"):
            import torch

            if processes > torch.cuda.device_count():
                there = torch.cuda.device_count()
                raise ValueError(f"--processes must be at most {there}, the number of GPUs here, not {processes}")
        batch = getattr(config.options, "train_batch_size", processes)
        if batch % processes:
            raise ValueError(
                f"--processes must divide {config.experiment}.train_batch_size ({batch}) evenly, not be {processes}"
            )


def reproduce(arguments: argparse.Namespace) -> int:
    """Run the chosen experiments, render the report, and say what failed; the exit status."""
    present = arguments.only or load_profile(arguments.profile)
    chosen = [e for e in EXPERIMENTS if e in present and e not in arguments.skip]
    if not chosen:
        raise ValueError("nothing to run: --only and --skip leave no experiment of this profile")
    configs = configs_of(arguments, chosen)
    check_processes(configs, arguments.processes)
    if arguments.plan:
        from experiments.framework.plan import print_plan

        return print_plan(configs)
    from experiments.framework.locks import locked
    from experiments.framework.runner import is_done, run_all

    typed = shlex.join(["python", "-m", "experiments", *arguments.words])
    with locked(arguments.output, works=False):
        if any("folder" in config.data for config in configs):
            from experiments.framework.inputs import check_folders

            check_folders([config for config in configs if arguments.force or not is_done(config)])
        failures = run_all(configs, forwarded(arguments), arguments.force, arguments.processes, typed)
        from reports.__main__ import main as report

        unreported = report([str(arguments.output)])
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures or unreported else 0


def run(arguments: argparse.Namespace) -> int:
    """Run one experiment in this process; the exit status."""
    from experiments.framework.config import is_main_process
    from experiments.framework.locks import locked
    from experiments.framework.runner import run_experiment

    if arguments.finished_only:
        return write_what_is_finished(arguments)
    (config,) = configs_of(arguments, [arguments.experiment])
    alone = is_main_process() and not is_worker()
    with locked(arguments.output) if alone else nullcontext():
        paths = run_experiment(config, arguments.force)
    if alone:
        for path in paths:
            print(f"wrote {path}")
        if not paths:
            print(f"{arguments.experiment} is done already in {arguments.output} (--force measures it again)")
    return 0


def write_what_is_finished(arguments: argparse.Namespace) -> int:
    """Write the tables of the finished units of a run that has not ended; the exit status."""
    from experiments.framework.finished import write_finished
    from experiments.framework.locks import locked
    from experiments.framework.runner import is_done

    if arguments.force:
        raise ValueError("--force measures again what --finished-only is to write: give one of the two")
    config = finished_config(arguments)
    with locked(arguments.output):
        if is_done(config):
            print(f"{arguments.experiment} is done already in {arguments.output}")
            return 0
        finished = write_finished(config)
    for path in finished.paths:
        print(f"wrote {path}")
    print(finished)
    return 0


def disk_full(error: BaseException | None) -> str | None:
    """What says that a disk is full, in ``error`` or in those that led to it (libraries wrap it in their own)."""
    while error is not None:
        if _DISK_FULL.search(str(error)):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def end_once_by_signals() -> None:
    """Let a scheduler's kill (SIGTERM) end a run as Ctrl-C does, and one interruption count once.

    coreutils' ``timeout`` sends its signal twice, and a parent sends SIGTERM some seconds after a Ctrl-C: neither may
    cut short what an interrupted run still writes. Where SIGINT is ignored, as in a background job, it stays so.
    """
    last = -math.inf

    def interrupt(_number: int, _frame: object) -> None:
        nonlocal last
        if time.monotonic() - last > SAME_INTERRUPTION:
            last = time.monotonic()
            raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupt)


def execute(words: list[str] | None = None) -> int:
    """Do what the command line says; the exit status. Bad input is one sentence on stderr and status 2."""
    arguments = parser().parse_args(words)
    arguments.words = sys.argv[1:] if words is None else words
    if arguments.output is None:
        arguments.output = Path("runs") / Path(arguments.profile).stem
    end_once_by_signals()
    try:
        return reproduce(arguments) if arguments.command == "reproduce" else run(arguments)
    except Exception as error:
        if full := disk_full(error):
            kept = f"what was finished is kept in {arguments.output}, the same command goes on from there"
            print(f"error: the disk is full ({full}): make room; {kept}", file=sys.stderr)
        elif isinstance(error, (OSError, ValueError, RunError)):
            print(f"error: {error}", file=sys.stderr)
        else:
            raise
        return 2
