"""What ``--plan`` says, against what committed runs took."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import experiments.framework.profiles as profiles
import experiments.framework.timing as timing
from experiments.framework.cost import Cost, Work, evaluation, text, training
from experiments.framework.machine import READ, TOKEN, Machine, h200
from experiments.framework.plan import GIB, LOGIT, PROCESS, cost_of, memory_of, model_seconds, start_seconds

ROOT = Path(__file__).parents[1]
MODELS = {
    "pocket": (2.6e6, 5),
    "gemma-3-270m.Q4_K_M.gguf": (268e6, 18),
    "qwen2.5-coder-0.5b-instruct.Q4_K_M.gguf": (494e6, 24),
    "qwen2.5-coder-1.5b-instruct.Q4_K_M.gguf": (1.54e9, 28),
    "shape:mistral-7b": (7.24e9, 32),
    "shape:llama2-7b": (6.74e9, 32),
    "shape:llama2-13b": (13.02e9, 40),
}
"""Parameters and layers."""
TWO_LAYERS = {"shape:mistral-7b": (0.70e9, 2), "shape:llama2-7b": (0.67e9, 2)}


class Computer(NamedTuple):
    """A machine of committed runs: its device, its speeds, and the bytes of its last-level cache."""

    device: str
    speeds: Machine
    cache: int = 0


XEON = Computer("cpu", Machine.cpu(0.4 * 308e9, 22.7e9, TOKEN), 2**28)
"""Two cores of the machine of results/cpu-xeon, idle: memory as measured, layers as 0.4 of the matrix product measured
there, which fits its runs, and a cache of which four are a gigabyte."""
EPYC = Computer("cpu", Machine.cpu(140e9, 53e9, 0.92e-3), 2**25)
"""Two cores of the machine of results/cpu/pocket: what `machine.speed` measures. Its memory gave 50 to 92 GB/s within
an hour, and 46 to 63 in the run's own rounds."""
H100 = Computer("cuda", Machine.gpu(989e12, READ * 3.35e12))
ALONE = {
    "cpu/pocket": (EPYC, ("e01", "e02", "e03", "e04", "e05", "e06", "e07", "e08", "e09")),
    "cpu-xeon/pocket": (XEON, ("e01", "e02", "e03", "e04", "e05", "e06", "e07", "e08", "e09")),
    "cpu/qwen2.5-coder-1.5b-quantized-generation": (EPYC, ("e09",)),
    "cpu-xeon/qwen2.5-coder-1.5b-quantized-generation": (XEON, ("e09",)),
    "h100/paper": (H100, ("e05",)),
    "h100/llama2-13b-mlp": (H100, ("e05",)),
    "h100/mistral-7b-generation": (H100, ("e06",)),
    "h100/generation-earlier": (H100, ("e06",)),
    "h100/mistral-7b-generation-float32": (H100, ("e06",)),
    "h100/mistral-7b-generation-eager": (H100, ("e06",)),
    "h100/llama2-7b-generation": (H100, ("e06",)),
    "h100/llama2-7b-generation-float32": (H100, ("e06",)),
    "h100/llama2-13b-generation": (H100, ("e06",)),
    "h100/qwen2.5-coder-1.5b-instruct-generation": (H100, ("e06",)),
    "h100/qwen2.5-coder-0.5b-instruct": (H100, ("e02", "e03", "e04", "e06", "e08", "e09")),
    "h100/mistral-7b-quantized-generation": (H100, ("e09",)),
    "h100/llama2-7b-quantized-generation": (H100, ("e09",)),
    "h100/mistral-7b-quantized-mlp": (H100, ("e09",)),
    "h100/mistral-7b-quantized-mlp-earlier": (H100, ("e09",)),
    "h100/llama2-7b-quantized-mlp": (H100, ("e09",)),
    "h100/qwen2.5-coder-1.5b-instruct": (H100, ("e01", "e02", "e07", "e08", "e09")),
    "h100/qwen2.5-coder-1.5b-instruct-answers": (H100, ("e08",)),
    "h100/gemma-3-270m": (H100, ("e02", "e04", "e06", "e07", "e08", "e09")),
}
"""Runs that nothing ran beside on their card, of the present kind: machine, experiments. The tuned generation runs
found what they compile in the cache of the runs before, gemma's e03 had two workers and was in two parts, its e01 took
30 s for the 14 s planned; the rest shared a card with up to eleven others, so that their seconds are no timings."""

BEFORE = {"e08": {"sequential": False}}
"""Options that runs older than the option were made with, where that is not the default."""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are made for machines and models that are not at hand."""
    monkeypatch.setattr(profiles, "_device", str)
    monkeypatch.setattr(profiles, "_models", list)


@pytest.fixture
def entry(run: str, experiment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / run / "provenance.json").read_text())
    return found["experiments"][experiment]


@pytest.fixture
def planned(run: str, experiment: str, entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Seconds and bytes of an experiment as it was run."""
    machine, settings = ALONE[run][0], entry["settings"]
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: machine.cache)
    table = BEFORE.get(experiment, {}) | {k: value for k, value in settings["options"].items() if value is not None}
    profile = {key: settings[key] for key in ("dtype", "seed", "models", "data")} | {"device": machine.device}
    config = profiles.make_config(experiment, "planned", {**profile, experiment: table}, Path("nowhere"))
    cost = cost_of(config)
    sizes = {**MODELS, **(TWO_LAYERS if cost.layers else {})}
    models = [(int(sizes[name][0]), sizes[name][1]) for name in config.models] if cost.uses_models else []
    begin = start_seconds(config, cost, [(name, size) for name, (size, _) in zip(config.models, models, strict=False)])
    seconds = machine.speeds.host * begin + model_seconds(machine.speeds, cost, models)
    return seconds, memory_of(cost, max((size for size, _ in models), default=0), vocabulary=2048)


@pytest.mark.parametrize(("run", "experiment"), [(run, one) for run, (_, names) in ALONE.items() for one in names])
def test_the_time_is_within_a_factor_of_one_and_a_half_of_what_was_measured(planned, entry) -> None:
    seconds, measured = planned[0], entry["seconds"]
    assert 1 / 1.5 <= seconds / measured <= 1.5, f"planned {seconds:.0f} s, measured {measured} s"


@pytest.mark.parametrize("run", ["cpu/pocket", "cpu-xeon/pocket"])
@pytest.mark.parametrize("experiment", ["e01", "e02", "e03", "e04", "e05", "e07", "e08", "e09"])
def test_the_memory_is_within_a_factor_of_one_and_a_half_of_what_was_measured(planned, entry) -> None:
    """Not of e06, which starts the record of its process's peak afresh."""
    memory, measured = planned[1] / GIB, entry["peak_memory_gib"]["resident"]
    assert 1 / 1.5 <= memory / measured <= 1.5, f"planned {memory:.2f} GiB, measured {measured} GiB"


def test_the_time_of_a_small_model_is_that_of_its_passes_and_of_a_large_one_that_of_its_arithmetic() -> None:
    machine = Machine(1e12, 1e9, 1e-3, trained=0.1e12, trained_layer=2e-3)
    cost = Cost(Work(operations=4e6, passes=100))
    assert model_seconds(machine, cost, [(1000, 10)]) == pytest.approx(100 * 10 * 1e-3)
    assert model_seconds(machine, cost, [(10**9, 10)]) == pytest.approx(4e6 * 1e9 / 1e12)
    both = model_seconds(machine, cost, [(1000, 10), (10**9, 10)])
    assert both == pytest.approx(1.0 + 4e3)
    trained = Cost(Work(trained=4e6, micro_steps=100))
    assert model_seconds(machine, trained, [(1000, 10)]) == pytest.approx(100 * 10 * 2e-3)
    slow = replace(machine, run=7.0)
    assert model_seconds(slow, Cost(Work(runs=3)), [(1000, 10)]) == pytest.approx(21.0)
    assert model_seconds(machine, trained, [(10**9, 10)]) == pytest.approx(4e6 * 1e9 / 0.1e12)
    assert model_seconds(machine, Cost(fixed_bytes=3e9), []) == pytest.approx(3.0)


def test_what_the_host_takes_follows_the_host_and_arithmetic_does_not() -> None:
    machine = Machine(1e12, 1e9, 1e-3, trained=0.1e12, trained_layer=2e-3, run=1.0)
    of_host = Cost(Work(passes=100, items=200, steps=10, micro_steps=20, runs=3), fixed_seconds=5.0)
    of_device = Cost(Work(operations=4e6, trained=4e6), bytes_read=2.0, fixed_bytes=1e9)
    for cost, factor in ((of_host, 2.0), (of_device, 1.0)):
        seconds = model_seconds(machine, cost, [(10**9, 10)])
        assert model_seconds(replace(machine, host=2.0), cost, [(10**9, 10)]) == pytest.approx(factor * seconds)


def test_work_is_counted_in_tokens_passes_items_and_steps() -> None:
    assert text(10, 64, 4) == Work(2 * 640, 3)
    assert training(5, 16, 128, 4) == Work(steps=5, trained=6 * 5 * 16 * 128, micro_steps=5 * 4, runs=1)
    assert training(5, 16, 128, None).micro_steps == 5
    whole = evaluation(["openbookqa"], None, 16)
    assert whole == Work(2 * 500 * 4 * 20, 5, 500)
    assert evaluation(["openbookqa"], 50, 16).items == 50
    assert whole + whole == whole * 2


def test_memory_has_the_process_the_weights_and_the_logits_of_training() -> None:
    cost = Cost(memory=2.5, fixed_memory=100, logits=4096)
    assert memory_of(cost, 1000, 50) == PROCESS + 2500 + 100 + LOGIT * 4096 * 50
    assert h200("float32").flops < h200("bfloat16").flops
