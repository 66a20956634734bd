"""e05 and how it takes time, on the small shape: against hand-worked numbers, and refusing what is wrong."""

import time
from pathlib import Path

import pytest
import torch
from cats_kernels.problem import TOLERANCE, Problem
from torch import Tensor

from experiments import e05_mlp_latency as e05
from experiments import timing
from experiments.config import Config
from experiments.precompile import Task, precompile

TARGETS = [0.0, 0.5, 0.9]
D, M = e05.SHAPES["small"]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    options = {
        "shapes": ["small"],
        "rows": [1, 2],
        "warmups": 1,
        "rounds": 2,
        "sparsities": {"float32": TARGETS},
        "ablations": {"float32": [0.5]},
    }
    return Config("e05", "made-up", tmp_path, options=options)


def test_every_implementation_is_timed_with_the_bytes_it_must_read(config: Config):
    rows = [row for row in e05.run(config) if isinstance(row, e05.LatencyRow)]
    neuron = 3 * D * 4
    for count in (1, 2):
        found = {(r.implementation, r.sparsity_target): r for r in rows if r.rows == count}
        assert set(found) == {
            *((name, target) for name in ("cats", e05.OPTIMAL) for target in TARGETS),
            *((name, 0.5) for name in e05.variants("cpu") if name != "cats"),
            ("dense", 0.0),
        }
        assert found["dense", 0.0].bytes_moved == found["cats", 0.0].bytes_moved == M * neuron
        # 704, 141 neurons to the nearest multiple of 128 (704 is in the middle)
        assert found[e05.OPTIMAL, 0.5].bytes_moved in (640 * neuron, 768 * neuron)
        assert found[e05.OPTIMAL, 0.9].bytes_moved == 128 * neuron
        assert found[e05.OPTIMAL, 0.9].sparsity == pytest.approx(1 - 128 / M)
        for row in found.values():
            assert row.geomean_ms and row.p20_ms and row.p80_ms and row.p20_ms <= row.p80_ms and row.error == ""
            assert row.bound_ms == pytest.approx(row.bytes_moved / row.bandwidth_gb_per_s / 1e6)
            assert row.fraction_of_bound == pytest.approx(row.bound_ms / row.geomean_ms)
    ours = {(r.rows, r.sparsity_target): r for r in rows if r.implementation == "cats"}
    for target in TARGETS:
        assert ours[1, target].sparsity == pytest.approx(target, abs=0.005)
        active = 1 - ours[1, target].sparsity  # one row: what is kept is what is read
        assert ours[1, target].bytes_moved == pytest.approx((1 + 2 * active) / 3 * M * neuron)
        # with two rows a neuron is read if either keeps it, so at least as much as one row alone would
        assert ours[2, target].bytes_moved >= (1 + 2 * (1 - ours[2, target].sparsity)) / 3 * M * neuron
    assert set(config.notes["largest_error"]) == {f"{name}, float32" for name in e05.variants("cpu")}


def test_a_wrong_kernel_is_refused_before_it_is_timed(config: Config, monkeypatch: pytest.MonkeyPatch):
    def wrong(x: Tensor, *_: object) -> Tensor:
        return x

    monkeypatch.setattr(e05, "variants", lambda _: {"cats": wrong})
    monkeypatch.setattr(e05, "measure", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(ValueError, match=r"cats is wrong by .* against the float64 reference; allowed: 1e-05"):
        list(e05.run(config))


def test_a_path_that_rounds_before_it_compares_is_held_to_its_own_mask():
    """torch's own products in bfloat16, whose v is rounded; and the same with one neuron of 500 lost."""
    problem = Problem(256, 4000, 8, torch.bfloat16, "cpu", 0)
    for sparsity in (0.5, 0.9):
        threshold = problem.threshold(sparsity)
        v = torch.nn.functional.silu((problem.x @ problem.gate.T).float())
        h = torch.where(v.abs() < threshold, 0, v) * (problem.x @ problem.up.T)
        lost = h.index_fill(1, torch.arange(0, 4000, 500), 0.0)
        right, wrong = (y.bfloat16() @ problem.down_t for y in (h, lost))
        errors = [problem.errors({threshold: y}, rounded=True)[threshold] for y in (right, wrong)]
        assert errors[0] < TOLERANCE[torch.bfloat16] < errors[1]
        assert problem.errors({threshold: right})[threshold] > 2 * errors[0]


def test_an_implementation_that_cannot_run_is_a_row_that_says_so(config: Config, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("out of resource:\n shared memory")

    cats = e05.variants("cpu")["cats"]
    monkeypatch.setattr(e05, "variants", lambda _: {"cats": cats, "fused-mask": broken})
    rows = [row for row in e05.run(config) if isinstance(row, e05.LatencyRow) and row.implementation == "fused-mask"]
    assert [(row.error, row.geomean_ms, row.sparsity) for row in rows] == [
        ("out of resource: shared memory", None, None)
    ] * 2


def test_unknown_shapes_and_dtypes_are_named(config: Config):
    config.options["sparsities"]["float64"] = [0.5]
    with pytest.raises(ValueError, match="e05 cannot time 'float64'; allowed: float32, float16, bfloat16"):
        list(e05.run(config))
    config.options["shapes"] = ["GPT-9"]
    with pytest.raises(ValueError, match=r"does not know the shapes \['GPT-9'\]; allowed: Mistral-7B"):
        list(e05.run(config))


def test_kernels_that_do_not_compile_are_told_by_name():
    """Without a CUDA device none does: the worker processes answer with the reason."""
    if torch.cuda.is_available():
        pytest.skip("kernels compile here")
    messages = precompile([Task("cats", 64, 96, torch.float32, rows) for rows in (1, 2)], workers=1)
    assert [f"rows={rows}" in message for rows, message in zip((1, 2), messages, strict=True)] == [True, True]


def test_warmups_are_dropped_and_every_call_runs_in_every_round(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10**9))  # every reading is one nanosecond later, so every call takes one
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(clock))
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    found = timing.measure(calls, warmups=2, rounds=4, flush=False)
    assert {name: (t.geomean_ms, t.p50_ms, t.rounds) for name, t in found.items()} == {
        name: (pytest.approx(1e-6), 1e-6, 4) for name in "abc"
    }
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert len(order) == 18 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {r[0] for r in rounds} == {"a", "b", "c"}  # nobody always runs after the same neighbour


def test_a_timing_is_its_geometric_mean_and_percentiles():
    found = timing.Timing.of([1.0, 2.0, 4.0, 8.0, 16.0])
    assert (found.geomean_ms, found.p50_ms, found.rounds) == (pytest.approx(4.0), 4.0, 5)
    assert (found.p20_ms, found.p80_ms) == (pytest.approx(1.8), pytest.approx(9.6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calls": {}}, "at least one call"),
        ({"rounds": 0}, "at least one call and one round"),
        ({"device": "tpu"}, "tpu"),
        ({"calls": {"a": [print]}}, "a: a sequence of calls is for device 'cuda' only"),
    ],
)
def test_bad_timing_requests(options: dict, message: str):
    with pytest.raises((ValueError, RuntimeError), match=message):
        timing.measure(**{"calls": {"a": int}, "warmups": 0, "rounds": 1, **options})
