"""Threads of the CPU kernel: how many, several callers at once and processes forked after the first call, by layer."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from cats_kernels.cpu import threads
from cats_kernels.cpu.launch import sparse_gated_mlp_cpu
from cats_kernels.problem import Problem

LAYERS = ("workqueue", "omp", "tbb")
NOT_HERE = 77
SETUP = """
try: import numba.np.ufunc.{module}
except ImportError: raise SystemExit(77)
import multiprocessing, os, sys, threading, warnings
import numba, torch
from cats_kernels import sparse_gated_mlp
from cats_kernels.problem import Problem
torch.set_num_threads(2)
made = Problem(256, 2048, 1)  # enough weights for two threads
arguments = made.arguments(made.threshold(0.5))[:5]
call = lambda: sparse_gated_mlp(*arguments, backend="cpu")
expected = call()
if numba.config.NUMBA_NUM_THREADS > 1:
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
    module = "workqueue" if layer == "workqueue" else f"{layer}pool"
    scripts = [SIX_CALLERS, *((FORKED, FORKED_WHILE_CALLING) if hasattr(os, "fork") else ())]
    code = SETUP.format(layer=layer, module=module) + "".join(scripts)
    environment = {**os.environ, "NUMBA_THREADING_LAYER": layer}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode == NOT_HERE:
        pytest.skip(f"numba has no {layer} layer here")
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
