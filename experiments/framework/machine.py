"""What a machine reaches, measured in a second or two or taken from a data sheet: the speeds that a plan divides by."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from transformers import AutoModelForCausalLM

from cats.models import load_config
from experiments.framework.cost import FORWARD


@dataclass(frozen=True)
class Machine:
    """Speeds that estimates divide by.

    Attributes:
        flops: float operations a second of a model's layers, in the profile's dtype.
        bandwidth: bytes read a second.
        layer: seconds that the host needs to start a decoder layer's kernels, dense or masked.
        trained, trained_layer: ``flops`` of training, and ``layer`` for a layer of a micro-step, forward and backward,
            with adapters.
        run: seconds that a run of training takes besides its steps: adapters, items, and compiling on a GPU.
        host: what the host takes for anything, in times of the host that ``layer``, ``trained_layer``, ``run`` and the
            seconds of `experiments.framework.plan` were measured on.
    """

    flops: float
    bandwidth: float
    layer: float
    trained: float
    trained_layer: float
    run: float = 0.0
    host: float = 1.0

    @classmethod
    def gpu(cls, product: float, bandwidth: float) -> "Machine":
        """With a matrix product's float operations a second, and with what was measured on an H100 and its host."""
        return cls(0.4 * product, bandwidth, 1e-3, 0.3 * product, 3.5e-3, run=10.0)

    @classmethod
    def cpu(cls, flops: float, bandwidth: float, token: float) -> "Machine":
        """With the seconds of `TOKEN`, and with what was measured on two cores of a Xeon."""
        return cls(flops, bandwidth, 4e-4, flops, 1.2e-3, host=token / TOKEN)


TOKEN = 1.42e-3
"""Seconds of the pocket model for one token on the Xeon: not measured there, but what an EPYC takes (0.92 ms) over the
share of the Xeon's constants (0.65) with which the plan comes nearest to a whole run on the EPYC."""
READ = 0.65
"""Of the data sheet's bandwidth, in decoding."""


@cache
def speed(device: str, dtype: str) -> Machine:
    """What this device reaches in reading memory, and in a matrix product or, on a CPU, in the pocket model: a batch is
    arithmetic, one token is what the host takes to start it. Two seconds on an idle CPU."""
    on_gpu = device.startswith("cuda")
    buffer = torch.ones(2**28 if on_gpu else 2**26, device=device)
    bandwidth = buffer.nbytes / _fastest(buffer.sum, device)
    if on_gpu:
        a = torch.randn(4096, 4096, device=device, dtype=getattr(torch, dtype))
        return Machine.gpu(2 * 4096**3 / _fastest(lambda: a @ a, device), bandwidth)
    model = AutoModelForCausalLM.from_config(load_config("pocket"), dtype=getattr(torch, dtype)).eval()
    batch, token = (torch.zeros(shape, dtype=torch.long) for shape in ((4, 256), (1, 1)))
    with torch.inference_mode():
        flops = FORWARD * model.num_parameters() * batch.numel() / _fastest(lambda: model(batch), device)
        model.float()
        with one_thread():  # as fast as several, which beside other work wait for each other 25 times as long
            return Machine.cpu(flops, bandwidth, _fastest(lambda: model(token), device))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fastest(call: Callable[[], object], device: str, rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def h200(dtype: str) -> Machine:
    """The data sheet: 989 TFLOP/s in half precision, 67 in float32, 4.8 TB/s."""
    return Machine.gpu(67e12 if dtype == "float32" else 989e12, READ * 4.8e12)
