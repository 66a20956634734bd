"""The speed guard on made-up times: a kernel as fast as expected passes, one that lost half of its gain fails, in every
backend, with or without a GPU. ``nox -s bench`` slows the real kernels down."""

import json
from collections.abc import Callable

import pytest

from experiments.framework.timing import Timing
from tests import bench_cpu, bench_quantized_cpu, bench_triton
from tests.bench_cpu import BAND, BASELINE
from tests.speed_guard import KEPT, SPARSITIES, Measure, Ratios, best_of, bytes_needed, floors, too_slow

Slower = Callable[[float, float], float]

SMALL = 64
BACKENDS: dict[tuple[str, str], Callable[[Measure], Ratios]] = {
    ("cpu", "float32"): lambda measure: bench_cpu.ratios("float32", m=SMALL, measure=measure),
    ("cpu", "bfloat16"): lambda measure: bench_cpu.ratios("bfloat16", m=SMALL, measure=measure),
    ("triton", "float32"): lambda measure: bench_triton.ratios(
        "float32", shape=(32, SMALL), measure=measure, device="cpu"
    ),
    ("triton", "bfloat16"): lambda measure: bench_triton.ratios(
        "bfloat16", shape=(32, SMALL), measure=measure, device="cpu"
    ),
}
DENSE = {
    ("cpu", "float32"): (0.70, 0.99),
    ("cpu", "bfloat16"): (0.55, 0.81),
    ("triton", "float32"): (0.85, 0.90),
    ("triton", "bfloat16"): (0.80, 0.87),
}
"""Fractions of the byte bound that torch's dense MLP takes: lowest and highest of e05 on the machines measured."""
CASES = [(*case, dense) for case, fractions in DENSE.items() for dense in fractions]


def made_up(backend: str, dtype: str, dense: float, slower: Slower) -> Measure:
    """Times in units of one matrix read: the kernel's as expected, then as ``slower`` (dense time, own time) says."""
    expected = {name.split("/")[1]: floor / KEPT for name, floor in floors(backend, dtype).items()}

    def time_of(name: str) -> float:
        if name.startswith("read"):
            return 1.0 if "one" in name else 3.0
        if name == "dense":
            return 3.0 / dense
        return slower(3.0 / dense, bytes_needed(1.0, float(name)) / expected[name])

    return lambda calls, **_: {name: Timing.of([time_of(name)]) for name in calls}


def as_expected(_dense: float, own: float) -> float:
    return own


def half_the_gain(dense: float, own: float) -> float:
    return dense / (1 + (dense / own - 1) / 2)


def twice(_dense: float, own: float) -> float:
    return 2 * own


@pytest.mark.parametrize(("backend", "dtype", "dense"), CASES)
def test_a_kernel_that_lost_half_its_gain_fails_in_every_backend(backend: str, dtype: str, dense: float):
    ratios, allowed = BACKENDS[backend, dtype], floors(backend, dtype)
    measured = ratios(made_up(backend, dtype, dense, as_expected))
    assert too_slow(measured, allowed) == []
    assert measured["dense/0.5"] > 1.2
    halved = ratios(made_up(backend, dtype, dense, half_the_gain))
    assert halved["dense/0.5"] - 1 == pytest.approx((measured["dense/0.5"] - 1) / 2)
    caught = {line.split()[0] for line in too_slow(halved, allowed)}
    assert caught >= {f"bound/{s}" for s in SPARSITIES[1:]}


@pytest.mark.parametrize("rate", [10.0, 21.0, 45.0, 56.0, 90.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_memory_is_fast_a_kernel_may_be_farther_from_it_and_half_its_gain_is_still_missed(
    dtype: str, rate: float
):
    """On the one machine with such memory dense takes 0.28 to 0.42 of the bound, elsewhere what `DENSE` says."""
    per_byte = {"float32": 0.0055, "bfloat16": 0.0094}[dtype]
    slowest = {"float32": 0.92, "bfloat16": 0.85}[dtype]
    fraction, dense = min(slowest, 1 / (1 + rate * per_byte)), 0.42 if rate > 30 else DENSE["cpu", dtype][1]
    millisecond = rate * 1e6  # bytes
    matrix = SMALL * bench_cpu.D * (4 if dtype == "float32" else 2)

    def at_rate(slower: Slower) -> Measure:
        made = made_up(
            "cpu", dtype, dense, lambda d, own: slower(d, own * floors("cpu", dtype)["bound/0.0"] / KEPT / fraction)
        )

        def measure(calls: object, **options: object) -> dict[str, Timing]:
            return {
                name: Timing.of([matrix / millisecond * one.p50_ms]) for name, one in made(calls, **options).items()
            }

        return measure

    measured = bench_cpu.ratios(dtype, m=SMALL, measure=at_rate(as_expected))
    assert too_slow(measured, floors("cpu", dtype)) == []
    assert measured["bound/0.0"] == pytest.approx(slowest)
    halved = bench_cpu.ratios(dtype, m=SMALL, measure=at_rate(half_the_gain))
    assert len(too_slow(halved, floors("cpu", dtype))) >= 3


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_kernel_that_works_twice_fails_at_every_sparsity(backend: str, dtype: str):
    measured = BACKENDS[backend, dtype](made_up(backend, dtype, 0.9, twice))
    assert len(too_slow(measured, floors(backend, dtype))) == len(SPARSITIES)


@pytest.mark.parametrize("bits", bench_quantized_cpu.FORMATS)
def test_a_quantized_kernel_at_half_speed_fails(bits: int):
    """At its floors it passes, and slowed to half of its best committed ratios it does not."""
    floor = bench_quantized_cpu.FLOORS[bits]
    assert too_slow(dict(floor), floor) == []
    calls = {"torch": 2.0, **{f"ours/{s}": 1.0 for s in bench_quantized_cpu.SPARSITIES}}
    measured = bench_quantized_cpu.ratios(
        128, SMALL, bits, measure=lambda names, **_: {name: Timing.of([calls.get(name, 2.0)]) for name in names}
    )
    assert measured["torch/0.5"] == 2.0 and set(floor) <= set(measured)
    assert {line.split()[0] for line in too_slow({k: v / 2 for k, v in measured.items()}, floor)} >= {"torch/0.5"}


@pytest.mark.parametrize("slower", [1.0, 2.0])
def test_the_committed_ratios_pass_and_half_of_them_do_not(slower: float):
    for machine in json.loads(BASELINE.read_text()).values():
        for baseline in machine.values():
            allowed = {name: (1 - BAND) * value for name, value in baseline.items()}
            assert bool(too_slow({name: value / slower for name, value in baseline.items()}, allowed)) == (slower > 1)


def test_what_is_too_slow_is_said_and_nan_never_passes():
    assert too_slow({"bound/0.5": 0.5}, {"bound/0.5": 0.75}) == ["bound/0.5 is 0.50, allowed 0.75"]
    assert too_slow({"bound/0.5": float("nan")}, {"bound/0.5": 0.75}) != []


def test_a_busy_moment_is_measured_again_and_a_slow_kernel_is_slow_each_time():
    allowed = {"a": 0.8, "b": 0.8}
    runs = iter([{"a": 0.5, "b": 0.9}, {"a": 0.9, "b": 0.6}])
    assert best_of(lambda: next(runs), allowed) == {"a": 0.9, "b": 0.9}
    tries = []
    assert best_of(lambda: tries.append(1) or {"a": 0.5, "b": 0.9}, allowed) == {"a": 0.5, "b": 0.9}
    assert len(tries) == 3
