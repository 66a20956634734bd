"""What a profile needs before it is run: models, data, disk, memory, hours and machine; nothing is downloaded.

Sizes come from the hub's metadata, or from a model's configuration on the meta device; access to every repository is
checked. Hours are estimates within a factor of two or three: arithmetic for forward and backward passes and bytes for
decoding, over what this device reaches in a short measurement, and over 40 % of an H200's data sheet.

    nox -s reproduce -- --profile paper --plan
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
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

# lm-eval task: repository, scored continuations in the evaluated split, and roughly how many tokens each has
TASKS = {
    "openbookqa": ("allenai/openbookqa", 2000, 20),
    "arc_easy": ("allenai/ai2_arc", 9504, 40),
    "arc_challenge": ("allenai/ai2_arc", 4688, 45),
    "winogrande": ("allenai/winogrande", 2534, 30),
    "hellaswag": ("Rowan/hellaswag", 40168, 100),
    "piqa": ("baber/piqa", 3676, 45),
    "boolq": ("aps/super_glue", 6540, 160),
    "sciq": ("allenai/sciq", 4000, 130),
    "instruct_boolq": ("aps/super_glue", 6540, 170),
    "instruct_cola": ("nyu-mll/glue", 2086, 35),
    "instruct_sst2": ("nyu-mll/glue", 1744, 50),
}
TRAINING_ITEMS = {"instruct_boolq": 9427, "instruct_cola": 8551, "instruct_sst2": 67349}
OTHER_TASK = ("", 1600, 60)  # assumed of any other, such as those of the pocket profile
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "auto": 2}
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


@dataclass(frozen=True)
class Machine:
    """Speeds that estimates divide by: float operations a second in the profile's dtype, bytes read a second."""

    flops: float
    bandwidth: float


def print_plan(configs: Sequence[Config]) -> int:
    """Print what ``configs`` need; 0, or 1 when something they need cannot be had (one sentence each on stderr)."""
    names = {name: None for config in configs for name in config.models}
    corpora = sorted({config.data["path"] for config in configs if on_hub(config.data)})
    online_tasks = [t for c in configs if "folder" not in c.data for t in c.options.get("tasks", [])]
    tasks = sorted({TASKS[t][0] for t in online_tasks if t in TASKS})
    remote = [*corpora, *tasks, *(name for name in names if is_remote(name))]
    online = not remote or reachable()
    models = {name: model_need(name, online) for name in names}
    data = [repository_need(name, "dataset", online) for name in [*corpora, *tasks]]
    rows = [(n.name, _billions(n.parameters), _size(n.download), n.access) for n in models.values()]
    _print_table(("model", "parameters", "download", "access"), rows)
    if data:
        sizes = ["read as it is used" if need.name in corpora else _size(need.download) for need in data]
        pairs = zip(data, sizes, strict=True)
        _print_table(("data set", "download", "access"), [(need.name, size, need.access) for need, size in pairs])
    lines = [experiment_cells(config, models) for config in configs]
    _print_table(("experiment", "models", "memory", "time here", "time on one H200", "machine"), lines)
    total = sum(n.download for n in models.values()) + sum(n.download for n in data if n.name not in corpora)
    print(f"downloads {_size(total)}; free disk {_size(shutil.disk_usage(_existing(configs[0].output)).free)}")
    print("times are estimates within a factor of two or three; finished units are kept, so a run may be split")
    if not online:
        print("the hub cannot be reached, so sizes and access are not known: ask again with a network", file=sys.stderr)
        return 1
    problems = [need for need in [*models.values(), *data] if need.problem]
    for need in problems:
        print(f"{need.name}: {need.problem}", file=sys.stderr)
    return 1 if problems else 0


def is_remote(name: str) -> bool:
    """Whether a model's name is a hub id."""
    where = resolve(name)
    return not where.startswith("shape:") and not Path(where).exists()


def model_need(name: str, online: bool) -> Need:
    """Parameters and download of a model; of a hub model from the hub's metadata alone."""
    if is_remote(name):
        return repository_need(name, "model", online)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(name))
    return Need(name, sum(parameter.numel() for parameter in model.parameters()))


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


def experiment_cells(config: Config, models: dict[str, Need]) -> tuple[str, ...]:
    """One line of the table of experiments."""
    sizes = [models[name].parameters for name in config.models]
    device = config.device if config.device != "sharded" else resolve_device("auto")
    if not all(sizes):
        return config.experiment, str(len(sizes)), "?", "?", "?", "?"
    dtype = config.dtype if config.dtype != "auto" else "bfloat16"
    memory = memory_bytes(config, max(sizes))
    here, other = speed(device, dtype), h200(dtype)
    work = [workload(config, parameters) for parameters in sizes]
    hours = [sum(f / m.flops + b / m.bandwidth for f, b in work) / 3600 for m in (here, other)]
    cells = config.experiment, str(len(sizes)), _size(memory), *map(_duration, hours)
    return *cells, machine_for(device, memory, hours[0])


def memory_bytes(config: Config, parameters: int) -> float:
    """Bytes: weights, a quarter more for activations and cache; for LoRA training twice that."""
    if config.experiment == "e05":
        return 4.0 * 3 * 5120 * 13824 * 4  # copies of one float32 block of the largest shape, whatever the models
    trains = config.experiment in ("e03", "e04") or config.options.get("steps", 0)
    return parameters * max(BYTES[dtype] for dtype in dtypes_of(config)) * (2.5 if trains else 1.25)


def dtypes_of(config: Config) -> list[str]:
    """What the experiment runs in: e06 in several dtypes, one after another."""
    return list(config.options.get("dtypes", [config.dtype]))


def workload(config: Config, parameters: int) -> tuple[float, float]:
    """Float operations and bytes of one model's part: 2 a parameter and token forward, 6 with backward (LoRA)."""
    o = config.options
    levels = len(o.get("levels", []))
    text = o.get("length", 0) * (o.get("calibration_blocks", o.get("blocks", 0)) + o.get("heldout_blocks", 0))
    evaluation = sum(evaluation_tokens(task, o.get("limit")) for task in o.get("tasks", []))
    seeds = len(o.get("seeds", [0]))
    if config.experiment == "e03":
        batch = o.get("train_batch_size", 1) * o.get("length", 0)
        trained = o["steps"][-1] * seeds * (levels + 2) + 2 * o.get("sweep_steps", 0) * len(o.get("learning_rates", []))
        evaluated = evaluation * (len(o["steps"]) + 1) * seeds * (levels + 2)
        return parameters * (6.0 * trained * batch + 2 * (evaluated + text)), 0
    if config.experiment == "e04":
        runs = seeds * (levels + 2)
        items = {t: min(o.get("train_items", 0), TRAINING_ITEMS.get(t, 10**9)) for t in o["tasks"]}
        trained = sum(o.get("epochs", 1) * n * TASKS.get(t, OTHER_TASK)[2] for t, n in items.items())
        swept = 2 * len(o["learning_rates"]) * o["sweep_items"] * sum(TASKS.get(t, OTHER_TASK)[2] for t in o["tasks"])
        return parameters * (runs * (6.0 * trained + 2 * evaluation) + 8.0 * swept), 0
    if config.experiment == "e06":
        generated = sum(n for lengths in o["lengths"].values() for n in lengths) * o.get("prompts", 1)
        size = sum(BYTES[dtype] for dtype in dtypes_of(config))
        return 0, generated * 2.0 * (1 + len(o.get("sparsities", []))) * parameters * size
    if config.experiment == "e05":
        return 0, 0
    trained = o.get("steps", 0) if isinstance(o.get("steps", 0), int) else 0
    trained *= 3 * o.get("train_batch_size", 1) * o.get("length", 0)
    passes = 1 if config.experiment == "e01" else levels + 3
    return parameters * (2.0 * (passes * (evaluation + text) + text) + 6.0 * trained), 0


def evaluation_tokens(task: str, limit: int | None) -> int:
    """Tokens that one evaluation of a task reads."""
    _, requests, tokens = TASKS.get(task, OTHER_TASK)
    return (min(requests, 4 * limit) if limit else requests) * tokens


def machine_for(device: str, memory: float, hours: float) -> str:
    """Where an experiment should run: here if it fits and takes less than a day, else on GPUs of some size."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        available: float = torch.cuda.get_device_properties(torch.device(device)).total_memory
    else:
        available = psutil.virtual_memory().total
    if memory < 0.9 * available and hours < 24:
        return "this one"
    if memory < 0.9 * available and on_gpu:
        return "this one, or several of its kind (--processes)"
    return f"a GPU with {_size(memory)}, or several with --device sharded"


@cache
def speed(device: str, dtype: str) -> Machine:
    """What this device reaches in a matrix product and in reading memory; a second on a CPU."""
    kind = getattr(torch, dtype)
    side, numbers = (4096, 2**28) if device.startswith("cuda") else (512, 2**26)
    a = torch.randn(side, side, device=device, dtype=kind)
    buffer = torch.ones(numbers, device=device)
    product = _fastest(lambda: a @ a, device)
    return Machine(2 * side**3 / product, buffer.numel() * 4 / _fastest(buffer.sum, device))


def _fastest(call: Callable[[], object], device: str, rounds: int = 3) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def h200(dtype: str) -> Machine:
    """40 % of the data sheet: 989 TFLOP/s in half precision, 67 in float32, 4.8 TB/s."""
    return Machine(0.4 * (67e12 if dtype == "float32" else 989e12), 0.4 * 4.8e12)


def _existing(path: Path) -> Path:
    return next(parent for parent in [path.resolve(), *path.resolve().parents] if parent.exists())


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB" if count else "-"


def _duration(hours: float) -> str:
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
