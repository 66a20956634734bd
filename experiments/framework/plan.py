"""What a profile needs before it is run: models, data, disk, memory, hours and machine; nothing is downloaded.

Sizes come from the hub's metadata, or from a model's configuration on the meta device; access to every repository is
checked. Times are estimates: arithmetic for forward and backward passes, or the host's time to start their kernels
where that is longer (a small model's), and bytes for decoding, over what this device reaches in a short measurement,
and over an H200's data sheet; beside that the host's: lm-eval's items, Trainer's steps, loading, compiling, and the
start of a process. They are within 1.5 times of what committed runs on an idle machine took (`tests/test_plan.py`).

    nox -s reproduce -- --profile paper --plan
"""

import importlib
import math
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM

from cats.hub import reachable
from cats.models import load_config, resolve
from cats.structure import resolve_device
from experiments.data import on_hub
from experiments.framework.config import Config
from experiments.framework.cost import TASKS, Cost, default_cost
from experiments.framework.machine import Machine, h200, speed
from experiments.framework.profiles import EXPERIMENTS

GIB = 2**30
UNCHECKED = "is not checked"


@dataclass(frozen=True)
class Need:
    """A model or a data set: its size, and what stands in the way of having it, if anything does."""

    name: str
    parameters: int = 0
    download: int = 0
    problem: str | None = None

    @property
    def access(self) -> str:
        """Cell of the table."""
        return {None: "yes", UNCHECKED: "?"}.get(self.problem, "NO")


START, TASK_SETS = 4.0, 15.0
"""Seconds of an experiment to its first work, and of lm-eval to index its tasks and read their sets."""
ITEM, STEP = 1.4e-3, 0.03
"""Seconds of lm-eval for one item of a task; of Trainer and the optimizer for one step."""
DEQUANTISED = 1e-8
"""Seconds to load a parameter of a GGUF file."""
PROCESS = 0.75 * GIB
"""Memory of a process that has imported everything."""
LOGIT = 14
"""Bytes of a logit in training: bfloat16, float32, and a gradient of each."""
DEPTH = 28
"""Decoder layers assumed of a model whose configuration is not on this machine."""


def print_plan(configs: Sequence[Config]) -> int:
    """Print what ``configs`` need; 0, or 1 when something they need cannot be had (one sentence each on stderr)."""
    costs = [cost_of(config) for config in configs]
    pairs = list(zip(configs, costs, strict=True))
    names = list(dict.fromkeys(name for config, cost in pairs if cost.uses_models for name in config.models))
    corpora = sorted({config.data["path"] for config in configs if on_hub(config.data)})
    tasks = sorted({repository for config in configs for repository in task_repositories(config)})
    remote = [*corpora, *tasks, *(name for name in names if is_remote(name))]
    online = not remote or reachable()
    models = {name: model_need(name, online) for name in names}
    data = [repository_need(name, "dataset", online) for name in [*corpora, *tasks]]
    if models:
        rows = [(n.name, _billions(n.parameters), _size(n.download), n.access) for n in models.values()]
        _print_table(("model", "parameters", "download", "access"), rows)
    if data:
        sizes = ["read as it is used" if need.name in corpora else _size(need.download) for need in data]
        cells = [(need.name, size, need.access) for need, size in zip(data, sizes, strict=True)]
        _print_table(("data set", "download", "access"), cells)
    lines, hours = zip(*(experiment_cells(config, cost, models) for config, cost in pairs), strict=True)
    _print_table(("experiment", "models", "memory", "time here", "time on one H200", "machine"), lines)
    total = sum(n.download for n in models.values()) + sum(n.download for n in data if n.name not in corpora)
    print(f"downloads {_size(total)}; free disk {_size(shutil.disk_usage(_existing(configs[0].output)).free)}")
    here, there = (_duration(sum(column)) for column in zip(*hours, strict=True))
    print(f"in all {here} here, {there} on one H200; finished units are kept, so a run may be split")
    print("times here are estimates from the speed measured just now, which other work on the machine lowers")
    problems = [need for need in [*models.values(), *data] if need.problem]
    if not online:
        unknown = ", ".join(need.name for need in problems if need.problem == UNCHECKED)
        if unknown:
            print(f"the hub cannot be reached, so this is not known of {unknown}: ask again online", file=sys.stderr)
    for need in problems:
        if need.problem != UNCHECKED:
            print(f"{need.name}: {need.problem}", file=sys.stderr)
    return 1 if problems else 0


def cost_of(config: Config) -> Cost:
    """What the experiment's module says of its cost; `default_cost` where it says nothing."""
    module = importlib.import_module(EXPERIMENTS[config.experiment])
    cost: Cost = getattr(module, "cost", default_cost)(config)
    return cost


def task_repositories(config: Config) -> set[str]:
    """Repositories of the hub that the experiment's tasks are read from; none with a data folder."""
    tasks = () if "folder" in config.data else getattr(config.options, "tasks", ())
    return {TASKS[task][0] for task in tasks if task in TASKS}


def is_remote(name: str) -> bool:
    """Whether a model's name is a hub id."""
    where = resolve(name)
    return not where.startswith("shape:") and not Path(where).exists()


def model_need(name: str, online: bool) -> Need:
    """Parameters and download of a model; of a hub model from the hub's metadata alone, or from the download cache."""
    if is_remote(name) and online:
        return repository_need(name, "model", online)
    try:
        return Need(name, parameters_of(name))
    except OSError as error:
        return Need(name, problem=UNCHECKED if is_remote(name) else str(error))


@cache
def parameters_of(name: str, layers: int | None = None) -> int:
    """Parameters of a model with at most so many decoder layers, from its configuration alone.

    Raises:
        OSError: the configuration cannot be read.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name, layers))
    return sum(parameter.numel() for parameter in model.parameters())


def repository_need(name: str, kind: str, online: bool) -> Need:
    """Size of a hub repository and whether this user may download from it."""
    if not online:
        return Need(name, problem=UNCHECKED)
    hub = HfApi()
    try:
        information: Any = hub.repo_info(name, repo_type=kind, files_metadata=True)
        kept = (".safetensors", ".json") if kind == "model" else ""  # every name ends in ""
        wanted = [file for file in information.siblings if file.rfilename.endswith(kept)]
        count = getattr(getattr(information, "safetensors", None), "total", 0)
        need = Need(name, count or 0, sum(file.size or 0 for file in wanted))
        if kind == "model" and not any(file.rfilename.endswith(".safetensors") for file in wanted):
            return Need(name, problem="has no safetensors weights; pickled weights are not loaded")
    except RepositoryNotFoundError:
        return Need(name, problem="is not on the hub, or is private: check the name, or log in with `hf auth login`")
    except HfHubHTTPError as error:
        return Need(name, problem=" ".join(str(error).split()))
    try:
        hub.auth_check(name, repo_type=kind)
    except GatedRepoError:
        advice = f"ask for access at https://huggingface.co/{name}, then log in with `hf auth login` or set HF_TOKEN"
        return Need(name, need.parameters, need.download, f"is gated: {advice}")
    except HfHubHTTPError as error:
        return Need(name, need.parameters, need.download, " ".join(str(error).split()))
    return need


def experiment_cells(
    config: Config, cost: Cost, models: dict[str, Need]
) -> tuple[tuple[str, ...], tuple[float, float]]:
    """One line of the table of experiments, and its hours here and on one H200 (NaN where that is not known)."""
    names = config.models if cost.uses_models else []
    sizes = [run_parameters(name, cost.layers, models[name]) for name in names]
    if not all(sizes):
        return (config.experiment, str(len(sizes)), "?", "?", "?", "?"), (math.nan, math.nan)
    device = config.device if config.device != "sharded" else resolve_device("auto")
    memory = memory_of(cost, max(sizes, default=0), max((vocabulary_of(name) for name in names), default=0))
    dtype = config.dtype if config.dtype != "auto" else "bfloat16"
    depths = [depth_of(name, cost.layers) for name in names]
    begin = start_seconds(config, cost, list(zip(names, sizes, strict=True)))
    here, there = (
        (machine.host * begin + model_seconds(machine, cost, list(zip(sizes, depths, strict=True)))) / 3600
        for machine in (speed(device, dtype), h200(dtype))
    )
    cells = config.experiment, str(len(sizes)), _size(memory), _duration(here), _duration(there)
    return (*cells, machine_for(device, memory, here)), (here, there)


def memory_of(cost: Cost, parameters: int, vocabulary: int) -> float:
    """Bytes at the peak, on a CPU; on a GPU without the process itself."""
    return PROCESS + cost.memory * parameters + cost.fixed_memory + LOGIT * cost.logits * vocabulary


def vocabulary_of(name: str) -> int:
    """Entries of a model's vocabulary; 0 where its configuration would have to be downloaded."""
    try:
        return 0 if is_remote(name) else int(load_config(name).get_text_config(decoder=True).vocab_size)
    except OSError:
        return 0


def depth_of(name: str, most: int) -> int:
    """Decoder layers that are run of a model; `DEPTH` where its configuration would have to be downloaded."""
    try:
        layers = DEPTH if is_remote(name) else int(load_config(name).get_text_config(decoder=True).num_hidden_layers)
    except OSError:
        layers = DEPTH
    return min(layers, most) if most else layers


def start_seconds(config: Config, cost: Cost, models: Sequence[tuple[str, int]]) -> float:
    """Seconds before the first work on models: the process, lm-eval's sets, and the loading of (name, parameters)."""
    if not cost.uses_models:
        return 0.0
    of_lm_eval = any(task in TASKS for task in getattr(config.options, "tasks", ()))
    loading = sum(DEQUANTISED * size for name, size in models if name.endswith(".gguf"))
    return START + TASK_SETS * of_lm_eval + cost.loads * loading


def run_parameters(name: str, layers: int, need: Need) -> int:
    """Parameters of as many layers of a model as are run; of all where only the hub knows them. 0 if unknown."""
    if not layers or (is_remote(name) and need.parameters):
        return need.parameters
    try:
        full = load_config(name).get_text_config(decoder=True).num_hidden_layers
        return parameters_of(name, layers if layers < full else None)
    except OSError:
        return 0


def model_seconds(machine: Machine, cost: Cost, models: Sequence[tuple[int, int]]) -> float:
    """Seconds that an experiment's work takes on models of (parameters, layers); NaN where that is not known."""
    work, host = cost.work, machine.host
    seconds = host * cost.fixed_seconds + cost.fixed_bytes / machine.bandwidth
    for parameters, layers in models:
        seconds += max(parameters * work.operations / machine.flops, host * work.passes * layers * machine.layer)
        started = host * work.micro_steps * layers * machine.trained_layer
        seconds += max(parameters * work.trained / machine.trained, started)
        seconds += parameters * cost.bytes_read / machine.bandwidth
        seconds += host * (work.items * ITEM + work.steps * STEP + work.runs * machine.run)
    return seconds


def machine_for(device: str, memory: float, hours: float) -> str:
    """Where an experiment should run: here if it fits and takes less than a day, else on GPUs of some size."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        available: float = torch.cuda.get_device_properties(torch.device(device)).total_memory
    else:
        available = psutil.virtual_memory().total
    if memory < 0.9 * available and not hours >= 24:
        return "this one"
    if memory < 0.9 * available and on_gpu:
        return "this one, or several of its kind (--processes)"
    return f"a GPU with {_size(memory)}, or several with --device sharded"


def _existing(path: Path) -> Path:
    return next(parent for parent in [path.resolve(), *path.resolve().parents] if parent.exists())


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB" if count else "-"


def _duration(hours: float) -> str:
    if math.isnan(hours):
        return "?"
    if not hours:
        return "minutes"
    return f"{60 * hours:.1f} min" if hours < 1 else f"{hours:.1f} h" if hours < 1000 else "over 1000 h"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3g} B" if count >= 1e8 else f"{count / 1e6:.3g} M" if count else "?"


def _print_table(header: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
