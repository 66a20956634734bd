"""Threads of the CPU kernel: how many, several callers at once and processes forked after the first call, by layer."""

import os
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from cats_kernels.cpu import threads
from cats_kernels.cpu.compiling import SOURCES
from cats_kernels.cpu.kernels import serial_kernel
from cats_kernels.cpu.launch import as_array, as_thresholds, sparse_gated_mlp_cpu
from cats_kernels.cpu.team import member, region_address, team_kernel
from cats_kernels.problem import Problem
from torch.nn.functional import linear, silu

LAYERS = ("torch", "workqueue", "omp", "tbb")
"""torch: its own OpenMP threads; the others are numba's layers."""
NOT_HERE = 77
SETUP = """
import multiprocessing, os, sys, threading, warnings
import numba, torch
from cats_kernels import sparse_gated_mlp
from cats_kernels.cpu.team import region_address
from cats_kernels.problem import Problem
if {layer!r} == "torch":
    if region_address() is None: raise SystemExit(77)
else:
    assert region_address() is None
    try: __import__("numba.np.ufunc." + ({layer!r} if {layer!r} == "workqueue" else {layer!r} + "pool"))
    except ImportError: raise SystemExit(77)
torch.set_num_threads(2)
made = Problem(256, 2048, 1)  # enough weights for two threads
arguments = made.arguments(made.threshold(0.5))[:5]
call = lambda: sparse_gated_mlp(*arguments, backend="cpu")
expected = call()
if numba.config.NUMBA_NUM_THREADS > 1 and {layer!r} != "torch":
    assert numba.threading_layer() == {layer!r}, numba.threading_layer()
"""
SIX_CALLERS = """
wrong = []
def work():
    torch.set_num_threads(2)
    wrong.extend(1 for _ in range(60) if not torch.equal(call(), expected))
workers = [threading.Thread(target=work) for _ in range(6)]
for worker in workers: worker.start()
for worker in workers: worker.join()
assert not wrong, len(wrong)
print("callers")
"""
FORKED = """
def child():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = all(torch.equal(call(), expected) for _ in range(3))
    said = [str(w.message) for w in caught if "forked" in str(w.message)]
    os._exit(0 if same and len(said) == 1 and "spawn" in said[0] else 3)
children = [multiprocessing.get_context("fork").Process(target=child) for _ in range(2)]
for process in children: process.start()
for process in children: process.join(60)
codes = [process.exitcode for process in children]
for process in children: process.kill()
assert codes == [0, 0], codes
assert torch.equal(call(), expected)  # the parent goes on with its threads
print("fork")
"""
FORKED_WHILE_CALLING = """
stop = threading.Event()
def work():
    while not stop.is_set(): call()
worker = threading.Thread(target=work)
worker.start()
codes = []
def child():
    os._exit(0 if torch.equal(call(), expected) else 3)
for _ in range(5):
    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    codes.append(process.exitcode)
    process.kill()
stop.set()
worker.join()
assert codes == [0] * 5, codes
print("fork-busy")
"""


@pytest.mark.parametrize("layer", LAYERS)
def test_every_threading_layer_is_safe(layer: str):
    """Several callers at once, forks afterwards, and forks while another thread calls; in one process, for its start
    takes longer than they do."""
    scripts = [SIX_CALLERS, *((FORKED, FORKED_WHILE_CALLING) if hasattr(os, "fork") else ())]
    code = SETUP.format(layer=layer) + "".join(scripts)
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "" if layer == "torch" else layer}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode == NOT_HERE:
        pytest.skip(f"no {layer} threads here")
    expected = ["callers", "fork", "fork-busy"][: len(scripts)]
    # TBB prints a note of its own about a fork
    lines = [line for line in done.stdout.split() if line in expected]
    assert done.returncode == 0 and lines == expected, (done.returncode, lines, done.stderr[-2000:])


@pytest.fixture(autouse=True)
def restore_threads():
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


def test_uses_as_many_threads_as_torch_and_fewer_for_little_work():
    import numba

    torch.set_num_threads(2)
    many = min(2, numba.config.NUMBA_NUM_THREADS)
    assert threads.threads_for(100 * threads.WEIGHTS_PER_THREAD) == many
    with threads.parallel_region(many):
        assert numba.get_num_threads() == many
    assert threads.threads_for(100) == 1
    torch.set_num_threads(1)
    assert threads.threads_for(100 * threads.WEIGHTS_PER_THREAD) == 1


def test_one_thread_needs_no_lock():
    """Servers with one thread per worker run side by side: a call goes through while another holds the lock."""
    made = Problem(16, 24, 1)
    expected = sparse_gated_mlp_cpu(*made.arguments(0.1))
    done = []
    with threads.parallel_region(1):
        worker = threading.Thread(target=lambda: done.append(sparse_gated_mlp_cpu(*made.arguments(0.1))))
        worker.start()
        worker.join(60)
    assert len(done) == 1 and torch.equal(done[0], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "m"), [(1, 256), (1, 1000), (3, 700), (8, 2050)])
def test_a_team_computes_what_one_thread_does(dtype: torch.dtype, rows: int, m: int):
    team = team_kernel(dtype)
    if team is None:
        pytest.skip("torch has no OpenMP threads to call here")
    x, gate, up, down, t = Problem(96, m, rows, dtype=dtype).arguments(0.1)[:5]
    vector = torch.rand(m) * 0.2
    for threshold, options in ((t, (False, False)), (vector, (True, False)), (vector, (False, True))):
        inputs, limits = x.float(), as_thresholds(threshold)
        expected, y = np.empty((rows, 96), np.float32), torch.empty(rows, 96)
        serial_kernel(as_array(inputs), *map(as_array, (gate, up, down)), limits, *options, expected)
        addresses = [tensor.data_ptr() for tensor in (inputs, gate, up, down)]
        for number in (1, 2, 5):  # more threads than cores and than blocks
            y.fill_(float("nan"))
            team(*addresses, limits.ctypes.data, y.data_ptr(), rows, 96, m, limits.size, *options, number)
            assert np.array_equal(y.numpy(), expected)


NEIGHBOUR = """
import torch
torch.set_num_threads(2)
a = torch.randn(1000, 1000)
print("ready", flush=True)
while True: a @ a
"""


def test_faster_than_dense_beside_a_busy_neighbour():
    """Another program with two threads on the cores: 0.8 to 0.9 times dense with numba's OpenMP threads beside torch's,
    1.5 to 1.6 on torch's own (two cores, float32, 50 %)."""
    if region_address() is None or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs torch's OpenMP threads and two cores")
    torch.set_num_threads(2)
    made = Problem(2048, 8192, 1)
    x, gate, up, down_t, t = made.arguments(made.threshold(0.5))[:5]
    down = down_t.t().contiguous()
    calls = {
        "dense": lambda: linear(silu(linear(x, gate)) * linear(x, up), down),
        "sparse": lambda: sparse_gated_mlp_cpu(x, gate, up, down_t, t),
    }
    neighbour = subprocess.Popen([sys.executable, "-c", NEIGHBOUR], stdout=subprocess.PIPE)
    ratios = []
    try:
        assert neighbour.stdout is not None and neighbour.stdout.readline() == b"ready\n"
        for _ in range(4):
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            with torch.no_grad():
                for _ in range(12):
                    for name, call in calls.items():
                        for _ in range(3):
                            start = time.perf_counter()
                            call()
                            seconds[name].append(time.perf_counter() - start)
            ratios.append(statistics.median(seconds["dense"]) / statistics.median(seconds["sparse"]))
            if ratios[-1] > 1:
                return
    finally:
        neighbour.kill()
        neighbour.wait()
        neighbour.stdout.close()
    raise AssertionError(ratios)


def test_what_is_compiled_follows_every_source_file():
    """Numba alone looks at the file of the function itself: one that it calls would stay as it was compiled before."""
    cached = [serial_kernel._cache, team_kernel(torch.float32) and member(torch.float32)._cache]
    for cache in filter(None, cached):
        assert cache._cache_file._source_stamp == SOURCES
