"""Runs experiments: each in a process of its own with its log, one after the other, resumable, under a lock.

One process per experiment keeps one experiment's crash, memory or CUDA error from the next; timings are undisturbed
because nothing runs beside them. With several GPUs the same command is started through accelerate's launcher.
"""

import importlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from experiments.framework.children import command, ending, purpose, run_child
from experiments.framework.config import Config, is_main_process
from experiments.framework.entries import attempt_facts, machine_facts, provenance_entry
from experiments.framework.finished import write_after
from experiments.framework.identity import changed_models
from experiments.framework.memory import let_segments_grow, peak_gib, run_within_memory
from experiments.framework.profiles import EXPERIMENTS
from experiments.framework.provenance import now, read_provenance, write_provenance
from experiments.framework.results import damage, remove_tables, table_entries, write_tables
from experiments.framework.tables import Row
from experiments.framework.workers import WorkerFinished, is_worker, keep_to_share


def run_experiment(config: Config, force: bool = False) -> list[Path]:
    """Run one experiment in this process; write its CSVs and its provenance.

    A finished experiment with the same settings is left alone unless ``force``; an interrupted one goes on. Where this
    one is interrupted or fails, the tables of its finished units are written (`experiments.framework.finished`).

    Returns:
        The CSV files (none when it was already done, or in a process beside the first).
    """
    if force:
        if is_main_process():
            mark_forced([config])
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            PartialState().wait_for_everyone()  # else the others read units that the first is about to remove
    elif is_done(config):
        return []
    let_segments_grow(config)
    if is_worker():
        return _work(config)
    if config.device.startswith("cuda:"):
        torch.cuda.set_device(config.device)  # events, graphs and streams of the timings are the current device's
    if is_main_process():
        _begin(config)
    try:
        rows = _measure(config)
    except BaseException:
        if is_main_process():
            write_after(config)
        raise
    if not is_main_process():
        return []
    directory = config.output / "results"
    before = read_provenance(config.output)["experiments"].get(config.experiment, {})
    paths = write_tables(rows, directory)
    entry = provenance_entry(config, table_entries(paths, directory), peak_gib())
    write_provenance(config.output, config.experiment, entry)
    remove_tables(directory, before, entry)
    if not config.partial:  # else the whole run, here or where the units are copied to, goes on from them
        config.clear_state()
    return paths


def _measure(config: Config) -> list[Row]:
    try:
        return run_within_memory(importlib.import_module(EXPERIMENTS[config.experiment]), config)
    finally:
        if is_main_process():
            with suppress(OSError):  # on a full disk the error that led here counts
                config.store.tick()


def _work(config: Config) -> list[Path]:
    """Compute units beside other workers; the run that started this process writes the tables."""
    keep_to_share(config.device)
    with suppress(WorkerFinished):
        run_within_memory(importlib.import_module(EXPERIMENTS[config.experiment]), config)
    return []


def _begin(config: Config) -> None:
    """Note the attempt, and say what earlier ones have left."""
    entry = read_provenance(config.output)["experiments"].get(config.experiment)
    same = entry is not None and "incomplete" not in entry and entry["settings"] == config.settings()
    if same and (problem := _stale(config, entry)):
        print(f"{config.experiment} is measured again: {problem}", file=sys.stderr, flush=True)
    kept = config.store.kept(config.stamp)
    if kept:
        shown = ", ".join(kept[:6]) + (", ..." if len(kept) > 6 else "")
        units = f"{len(kept)} finished {'unit' if len(kept) == 1 else 'units'}"
        print(f"{config.experiment} goes on: {units} kept from before ({shown})", file=sys.stderr, flush=True)
    config.store.begin_attempt(attempt_facts(config), now(), machine_facts)
    if config.workers > 1:  # it is they who store units
        config.store.note_machine()
        config.store.tick()


def is_done(config: Config) -> bool:
    """Whether the run directory holds this experiment's tables, as they were written, with the same settings and of the
    same models; those of an unfinished run do not count."""
    entry = read_provenance(config.output)["experiments"].get(config.experiment)
    if entry is None or "incomplete" in entry or entry["settings"] != config.settings() or config.store.forced():
        return False
    return _stale(config, entry) is None


def _stale(config: Config, entry: Mapping[str, Any]) -> str | None:
    """Why a finished experiment has to be measured again although its settings are the same, if so."""
    if problem := damage(config.output / "results", entry):
        return problem
    changed = changed_models(entry.get("models", {}), entry.get("started"))
    return f"the files of {', '.join(changed)} have changed" if changed else None


def mark_forced(configs: Sequence[Config]) -> None:
    """Let what is done of ``configs`` count no more, unless that is what an interrupted --force has begun already."""
    names = [config.experiment for config in configs]
    if any(config.store.forced() == names for config in configs):
        done = [config.experiment for config in configs if is_done(config)]
        words = f": {', '.join(done)} {'is' if len(done) == 1 else 'are'} measured already" if done else ""
        print(f"going on with the --force that was interrupted{words}", file=sys.stderr, flush=True)
        return
    for config in configs:
        config.store.mark_forced(names)


def run_all(
    configs: Sequence[Config], arguments: Sequence[str], force: bool = False, processes: int = 1, typed: str = ""
) -> list[str]:
    """Run each experiment in a child process (``python -m experiments run eNN ...``) with its log under logs/.

    Args:
        configs: the experiments.
        arguments: of the command line, for the children.
        force: measure again what is done.
        processes: that share an experiment which can be shared.
        typed: the command line as the user typed it, for the provenance.

    Returns:
        One sentence for each experiment that failed, naming its log; the others have finished.
    """
    if force:
        mark_forced(configs)
    failures = []
    for number, config in enumerate(configs, 1):
        title = f"[{number}/{len(configs)}] {config.experiment}"
        if is_done(config):
            print(f"{title} is done already (--force measures it again)", flush=True)
            continue
        print(f"{title} {purpose(config.experiment)}", flush=True)
        log = config.output / "logs" / f"{config.experiment}.log"
        begin = time.monotonic()
        code = run_child(command(config, arguments, processes), log, typed)
        seconds = time.monotonic() - begin
        if code:
            failures.append(f"{config.experiment} {ending(code)} after {seconds:.0f} s; its log is {log}")
            print(f"{title} FAILED, see {log}", flush=True)
        else:
            print(f"{title} took {seconds:.0f} s", flush=True)
    return failures
