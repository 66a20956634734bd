"""e05 and how it takes time, on the small shape: against hand-worked numbers, and refusing what is wrong."""

import time
from pathlib import Path

import pytest
import torch
from cats_kernels.problem import TOLERANCE, Problem
from torch import Tensor

from experiments import e05_mlp_latency as e05
from experiments.e05_mlp_latency import cases, compiled
from experiments.framework import bandwidth, timing
from experiments.framework.config import Config
from experiments.framework.options import parse
from experiments.gpu.precompile import Task, precompile
from tests.conftest import calls_compiler

pytestmark = pytest.mark.usefixtures("little_to_flush")
TARGETS, SPARSE = [0.0, 0.5, 0.9], "sparse kernel"
D, M = e05.SHAPES["small"]


TABLE = {
    "shapes": ["small"],
    "rows": [1, 2],
    "warmups": 1,
    "rounds": 2,
    "sparsities": {"float32": TARGETS},
    "ablations": {"float32": [0.5]},
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config("e05", "made-up", tmp_path, options=parse(e05.Options, TABLE, "e05"))


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own dense MLP in place of the compiled one, which takes half a minute."""
    monkeypatch.setattr(cases, "compiled_dense_mlp", lambda _: compiled.dense_mlp)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict]:
    """All rows of one run without the compiled MLP, and its notes."""
    config = Config("e05", "made-up", tmp_path_factory.mktemp("e05"), options=parse(e05.Options, TABLE, "e05"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cases, "compiled_dense_mlp", lambda _: compiled.dense_mlp)
        return list(e05.run(config)), config.notes


def rows_of(config: Config, implementation: str | None = None) -> list:
    rows = [row for row in e05.run(config) if isinstance(row, e05.LatencyRow)]
    return [row for row in rows if implementation in (None, row.implementation)]


def test_every_implementation_is_timed_with_the_bytes_it_must_read(measured: tuple[list, dict]):
    rows = [row for row in measured[0] if isinstance(row, e05.LatencyRow)]
    neuron = 3 * D * 4
    for count in (1, 2):
        timed = {(r.implementation, r.sparsity_target): r for r in rows if r.rows == count and r.condition != "check"}
        assert set(timed) == {
            *((name, target) for name in ("cats", cases.OPTIMAL) for target in TARGETS),
            *((name, 0.5) for name in e05.variants("cpu") if name != "cats"),
            *(("dense", 0.0), ("dense-compiled", 0.0)),
        }
        for dense in ("dense", "dense-compiled", "cats"):
            assert timed[dense, 0.0].bytes_moved == M * neuron
        # 704, 141 neurons to the nearest multiple of 128 (704 is in the middle)
        assert timed[cases.OPTIMAL, 0.5].bytes_moved in (640 * neuron, 768 * neuron)
        assert timed[cases.OPTIMAL, 0.9].bytes_moved == 128 * neuron
        assert timed[cases.OPTIMAL, 0.9].sparsity == pytest.approx(1 - 128 / M)
        for row in timed.values():
            assert row.geomean_ms and row.p20_ms and row.p80_ms and row.p20_ms <= row.p80_ms and row.error == ""
            assert row.bound_ms == pytest.approx(row.bytes_moved / row.bandwidth_gb_per_s / 1e6)
            assert row.fraction_of_bound == pytest.approx(row.bound_ms / row.geomean_ms)
            assert row.condition == ("figure" if count == 1 else "growth")
            assert row.path == ("dense" if "dense" in row.implementation or "opt" in row.implementation else SPARSE)
    ours = {(r.rows, r.sparsity_target): r for r in rows if r.implementation == "cats" and r.condition != "check"}
    for target in TARGETS:
        assert ours[1, target].sparsity == pytest.approx(target, abs=0.005)
        active = 1 - ours[1, target].sparsity  # one row: what is kept is what is read
        assert ours[1, target].active_neurons == round(active * M)
        assert ours[1, target].bytes_moved == pytest.approx((1 + 2 * active) / 3 * M * neuron)
        # with two rows a neuron is read if either keeps it, so at least as much as one row alone would
        assert ours[2, target].bytes_moved >= (1 + 2 * (1 - ours[2, target].sparsity)) / 3 * M * neuron
    names = (*e05.variants("cpu"), "dense", "dense-compiled")
    assert set(measured[1]["largest_error"]) == {f"{name}, float32" for name in names}


def test_the_cost_of_a_vector_and_of_the_other_decider_are_rows(measured: tuple[list, dict]):
    ours = [row for row in measured[0] if isinstance(row, e05.LatencyRow) and row.implementation == "cats"]
    checks = [row for row in ours if row.condition == "check"]
    assert [(r.rows, r.decider, r.threshold, r.sparsity_target) for r in checks] == [
        (rows, *labels, 0.5) for rows in (1, 2) for labels in (("gate", "vector"), ("up", "number"))
    ]
    plain = {row.rows: row for row in ours if row.condition != "check" and row.sparsity_target == 0.5}
    for row in checks:
        assert row.geomean_ms and row.sparsity == pytest.approx(0.5, abs=0.005)
        if row.threshold == "vector":  # the very same neurons, so that nothing but the vector differs
            assert row.active_neurons == plain[row.rows].active_neurons


def test_our_kernel_is_timed_at_sparsity_0_whatever_the_profile_says(config: Config, uncompiled: None):
    table = {**TABLE, "rows": [1], "sparsities": {"float32": [0.5]}, "ablations": {}}
    config.options = parse(e05.Options, table, "e05")
    rows = rows_of(config)
    assert {r.sparsity_target for r in rows if r.implementation == "cats"} == {0.0, 0.5}
    assert {r.implementation for r in rows} == {"dense", "dense-compiled", cases.OPTIMAL, "cats"}


def test_the_times_of_all_rounds_are_kept(measured: tuple[list, dict]):
    rows = measured[0]
    samples = {tuple(getattr(r, k) for k in r.key): r for r in rows if isinstance(r, e05.LatencySample)}
    timed = [row for row in rows if isinstance(row, e05.LatencyRow)]
    assert len(samples) == len(timed) == len({tuple(getattr(r, k) for k in r.key) for r in timed})
    for row in timed:
        times = [float(time) for time in samples[tuple(getattr(row, k) for k in row.key)].milliseconds.split(";")]
        assert len(times) == row.rounds == 2
        assert (times[0] * times[1]) ** 0.5 == pytest.approx(row.geomean_ms, rel=1e-4)


def test_nothing_is_faster_than_the_bound(config: Config, uncompiled: None, monkeypatch: pytest.MonkeyPatch):
    """The bandwidth is the best rate of the rounds, an implementation's own if that is the best."""
    kept = timing.measure

    def measure(calls, *arguments, **options):
        timings = kept(calls, *arguments, **options)
        fast = next(name for name in timings if name.isdigit())  # "dense", the first case
        best = min(t.geomean_ms for t in timings.values()) / 1000
        return {**timings, fast: timing.Timing.of([best, best])}

    monkeypatch.setattr(e05, "measure", measure)
    rows = rows_of(config)
    assert all(row.fraction_of_bound <= 1 + 1e-9 for row in rows)
    assert all(row.fraction_of_bound == pytest.approx(1) for row in rows if row.implementation == "dense")
    assert all(text.endswith("dense") for text in config.notes["bandwidth"].values())


def test_the_best_rate_is_bytes_over_time():
    timings = {"a": timing.Timing.of([1.0, 1.0]), "b": timing.Timing.of([4.0, 4.0])}
    assert bandwidth.best_rate(timings, {"a": 10**6, "b": 8 * 10**6}) == ("b", 2.0)  # 8 MB in 4 ms, 1 MB in 1 ms
    with pytest.raises(ValueError, match="without a timed call"):
        bandwidth.best_rate({}, {})


def test_plain_reads_read_one_matrix_and_all():
    weights = [torch.ones(4, 8, dtype=torch.bfloat16) for _ in range(3)]
    reads = bandwidth.plain_reads([weights, weights])
    assert {name: (read.bytes_moved, len(read.calls)) for name, read in reads.items()} == {
        "read of one matrix": (64, 2),
        "read of all matrices": (192, 2),
    }


@calls_compiler
def test_the_compiled_dense_mlp_is_a_row(config: Config):
    config.options = parse(e05.Options, {**TABLE, "rows": [1], "ablations": {}}, "e05")
    (row,) = rows_of(config, "dense-compiled")
    assert row.error == "" and row.geomean_ms and row.path == "dense" and row.bytes_moved == 3 * D * M * 4
    assert config.notes["largest_error"]["dense-compiled, float32"] < 1e-5


def test_of_several_compilations_the_fastest_is_the_baseline(config: Config, monkeypatch: pytest.MonkeyPatch):
    def slow(delay: float):
        def mlp(*weights: Tensor) -> Tensor:
            time.sleep(delay)
            return compiled.dense_mlp(*weights)

        return mlp

    delays = iter([0.02, 0.002, 0.03])
    monkeypatch.setattr(cases, "compiled_dense_mlp", lambda _: slow(next(delays)))
    config.options = parse(e05.Options, {**TABLE, "rows": [1], "ablations": {}, "compilations": 3}, "e05")
    (row,) = rows_of(config, "dense-compiled")
    times = [float(each) for each in config.notes["compiled dense, ms"]["small/float32/1"]]
    assert len(times) == 3 and times == sorted(times) and times[0] == pytest.approx(row.geomean_ms, abs=1e-4)
    assert row.geomean_ms < 15 < 20 <= times[1]


def test_each_compilation_is_a_function_of_its_own():
    """More than dynamo keeps of one function, which it would then run uncompiled; and none is compiled twice."""
    import torch._dynamo.testing as testing

    counter = testing.CompileCounter()
    x, (gate, up, down) = torch.ones(1, 4), (torch.ones(8, 4), torch.ones(8, 4), torch.ones(4, 8))
    with pytest.MonkeyPatch.context() as monkeypatch:
        plain = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: plain(function, backend=counter))
        monkeypatch.setattr(compiled, "check_compiler", lambda _: None)  # which the counter does not need
        functions = [compiled.compiled_dense_mlp("cpu") for _ in range(12)]
    for function in [*functions, *functions]:
        assert torch.equal(function(x, gate, up, down), compiled.dense_mlp(x, gate, up, down))
    assert counter.frame_count == 12


def test_without_a_compiler_the_compiled_mlp_is_a_row_that_says_so(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda _: None)
    rows = rows_of(config, "dense-compiled")
    assert [(row.error, row.geomean_ms, row.fraction_of_bound) for row in rows] == [
        ("compiling on a CPU needs a C++ compiler (c++, g++ or clang++)", None, None)
    ] * 2


def test_a_wrong_compiled_mlp_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cases, "compiled_dense_mlp", lambda _: lambda *weights: 1.001 * compiled.dense_mlp(*weights))
    with pytest.raises(ValueError, match=r"dense-compiled is wrong by 1\.0e-03"):
        list(e05.run(config))


def test_a_wrong_kernel_is_refused_before_it_is_timed(
    config: Config, uncompiled: None, monkeypatch: pytest.MonkeyPatch
):
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


def test_an_implementation_that_cannot_run_is_a_row_that_says_so(
    config: Config, uncompiled: None, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: object) -> Tensor:
        raise RuntimeError("out of resource:\n shared memory")

    cats = e05.variants("cpu")["cats"]
    monkeypatch.setattr(e05, "variants", lambda _: {"cats": cats, "fused-mask": broken})
    rows = rows_of(config, "fused-mask")
    assert [(row.error, row.geomean_ms, row.sparsity) for row in rows] == [
        ("out of resource: shared memory", None, None)
    ] * 2


def test_bad_options_are_named():
    for table, message in (
        ({"sparsities": {"float64": [0.5]}}, "a key of e05.sparsities must be one of float32, float16, bfloat16"),
        ({"shapes": ["GPT-9"]}, "e05.shapes must be .* one of Mistral-7B"),
        ({"ablations": {"bfloat16": [0.5]}}, "e05.ablations has bfloat16, which sparsities lacks"),
        ({"rounds": 0}, "e05.rounds must be a whole number, 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(e05.Options, {**TABLE, **table}, "e05")


def test_kernels_that_do_not_compile_are_told_by_name():
    """Without a CUDA device none does: the worker processes answer with the reason."""
    if torch.cuda.is_available():
        pytest.skip("kernels compile here")
    messages = precompile([Task("cats", 64, 96, torch.float32, rows) for rows in (1, 2)], workers=1)
    assert [f"rows={rows}" in message for rows, message in zip((1, 2), messages, strict=True)] == [True, True]


@pytest.mark.parametrize(("cache", "floats"), [(2**10, 2**18), (2**20, 2**20)])
def test_the_flush_reads_a_fixed_size_or_four_times_the_last_cache(
    cache: int, floats: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: cache)
    assert timing.cpu_flush()() == floats  # each is 1, and none is left out


def test_the_caches_are_flushed_before_every_call(monkeypatch: pytest.MonkeyPatch):
    order: list[str] = []
    monkeypatch.setattr(timing, "cpu_flush", lambda: lambda: order.append("flush"))
    timing.measure({name: (lambda name=name: order.append(name)) for name in "ab"}, warmups=1, rounds=1)
    assert order[::2] == ["flush"] * 4 and sorted(order[1::2]) == ["a", "a", "b", "b"]


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
    assert {r[0] for r in rounds} == {"a", "b", "c"}  # no call always follows the same other one


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
