"""Every Triton kernel and configuration compiled ahead of time for sm_80, sm_89 and sm_90, without a GPU.

Checked on the result: weights are loaded 16 bytes at a time, nothing spills or lives in local memory, shared memory
fits the chip. A table of registers and shared memory is printed (``nox -s kernels`` shows it). Two kernels broken on
purpose, one with 2-byte loads and one with too many registers, show that the checks catch them.
"""

import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
import triton.language as tl
from cats_kernels.ablation.triton import VARIANTS, launch, plan
from cats_kernels.triton.configs import CONFIGS, Config, choose_config
from cats_kernels.triton.launch import Call, Launch, Target
from cats_kernels.triton.recorded import Recorded, Repeated, aligned
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.triton_cases import DTYPES

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes a block, CUDA C++ Programming Guide, table 21
PROCESSORS = {80: 108, 89: 142, 90: 132}  # A100, L40S, H200
D, M = 4096, 14336  # Mistral-7B
WIDE = 5120  # Llama2-13B: padded to 8192, where a pipeline of three stages does not fit
WEIGHT_KERNELS = (
    *("fused_kernel", "deciding_kernel", "other_kernel", "down_kernel"),
    *("gate_kernel", "gated_up_kernel", "masked_down_kernel"),
)
KINDS = [("number", "gate"), ("number", "up"), ("one", "gate"), ("vector", "gate"), ("vector", "up")]
"""Kinds of threshold and deciders; the first with every variant, width and number of rows, the others where they
differ."""


def compile_ahead(step: Launch, arch: int) -> triton.compiler.CompiledKernel:
    """What the launch would run on that architecture: the same types, 16-byte alignment and constants."""
    signature, attributes = {}, {}
    for index, name in enumerate(step.kernel.arg_names):
        value = step.arguments.get(name)
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
        else:
            signature[name] = "constexpr" if value is None else "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(step.kernel, signature, dict(step.constants), attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=step.compiler_options())


def resources(kernel: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Registers a thread, stack and local memory (both 0 unless something spilled), as cuobjdump reads them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        Path(binary.name).write_bytes(kernel.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", output)}


def complaints(
    kernel: triton.compiler.CompiledKernel, used: dict[str, int], arch: int, reads_weights: bool
) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is. Weight loads are those marked evict-first, and the
    asynchronous copies of more than one element (4-byte copies fetch indices and activations)."""
    found = []
    if used["STACK"] or used["LOCAL"]:
        found.append(f"spills: {used}")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        found.append(f"{kernel.metadata.shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
    loads = re.findall(r"ld\.global\.L1::evict_first\S*", kernel.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S*[^;]*?, (0x\w+)", kernel.asm["ptx"])
    narrow = [load for load in loads if not load.endswith(".v4.b32")] + [copy for copy in copies if copy == "0x8"]
    wide = [load for load in loads if load.endswith(".v4.b32")] + [copy for copy in copies if copy == "0x10"]
    if reads_weights and (narrow or not wide):
        found.append(f"weight loads are not 16 bytes wide: {sorted(set(narrow))}")
    return found


@functools.cache
def launches(arch: int) -> dict[str, Launch]:
    """Every distinct kernel that the variants launch at the widths of Mistral-7B and Llama2-13B, over dtypes, rows and
    configurations."""
    found: dict[str, Launch] = {}
    for dtype, rows, (kind, decider) in itertools.product(DTYPES, (1, 2, 4, 8), KINDS):
        usual = (kind, decider) == KINDS[0]
        if not usual and rows not in (1, 4):
            continue
        for name in VARIANTS if usual and rows == 1 else ("cats",):
            for width in (D, WIDE) if usual else (D,):
                for step in plan(name, meta_call(arch, dtype, rows, width, kind, decider)):
                    constants = {key: value for key, value in step.constants.items() if key not in ("D", "ACTIVATION")}
                    words = " ".join(f"{key}={value}" for key, value in constants.items())
                    label = f"{step.kernel.__name__} {dtype} warps={step.warps} {words}"
                    found.setdefault(label.replace("torch.", ""), step)
    return found


def meta_call(
    arch: int, dtype: torch.dtype, rows: int, width: int = D, kind: str = "number", decider: str = "gate"
) -> Call:
    """A call on a chip that is not there, with tensors that hold nothing."""
    x, weight = (torch.empty(n, width, dtype=dtype, device="meta") for n in (rows, M))
    threshold = 0.5 if kind == "number" else torch.empty((M,) if kind == "vector" else (), device="meta")
    target = Target(arch, PROCESSORS[arch], dependent_launch=arch >= 90)
    return Call(x, weight, weight, weight, threshold, "silu", x, target, decider)


def examine(arch: int, label: str) -> tuple[str, list[str]]:
    """A kernel's row of the table, and what is wrong with it."""
    step = launches(arch)[label]
    kernel = compile_ahead(step, arch)
    used = resources(kernel)
    row = f"sm_{arch} {used['REG']:4d} registers {kernel.metadata.shared:7d} B shared  {label}"
    return row, complaints(kernel, used, arch, step.kernel.__name__ in WEIGHT_KERNELS)


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    """Processes: Python 3.11 parses wrongly in several threads at once ("AST constructor recursion depth mismatch")."""
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("arch", [90, 80, 89])
def test_every_kernel_compiles_well(arch: int, workers: ProcessPoolExecutor):
    labels = list(launches(arch))
    table, wrong = [], []
    for label, (row, problems) in zip(labels, workers.map(examine, [arch] * len(labels), labels), strict=True):
        table.append(row)
        wrong += [f"{label}: {problem}" for problem in problems]
    print("\n".join(["", *table]))
    assert not wrong, "\n".join(wrong)


@triton.jit
def narrow_kernel(w_ptr, y_ptr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Broken on purpose: neighbouring threads read down a column, 2 bytes each."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for column in range(COLUMNS):
        total += tl.load(w_ptr + row * COLUMNS + column, eviction_policy="evict_first").to(tl.float32)
    tl.store(y_ptr + row, total)


def test_the_check_catches_2_byte_loads():
    weight, y = torch.empty(M, D, dtype=torch.bfloat16, device="meta"), torch.empty(M, device="meta")
    call, buffers = meta_call(90, torch.bfloat16, 1), {"w_ptr": weight, "y_ptr": y}
    step = Launch(narrow_kernel, (M // 128,), call, {}, buffers, {"COLUMNS": D, "BLOCK": 128}, warps=4)
    kernel = compile_ahead(step, 90)
    found = complaints(kernel, resources(kernel), 90, reads_weights=True)
    assert len(found) == 1 and "not 16 bytes wide" in found[0]


def test_the_check_catches_spills():
    greedy = Config(16, 16, warps=4, programs=1)
    steps = plan("cats", meta_call(90, torch.float32, 2), greedy)
    kernel = compile_ahead(steps[0], 90)
    assert any("spills" in text for text in complaints(kernel, resources(kernel), 90, reads_weights=True))


def test_dependent_launch_only_where_the_chip_has_it():
    for arch in (80, 90):
        steps = plan("cats", meta_call(arch, torch.bfloat16, 1))
        waits = ["griddepcontrol" in compile_ahead(step, arch).asm["ptx"] for step in steps]
        assert waits == [arch >= 90] * 2


@pytest.mark.parametrize("early", [False, True])
def test_early_asks_for_weight_rows_before_it_waits(early: bool):
    config = replace(choose_config(2, 1, D), early=early, gate_stages=6)
    step = plan("cats", meta_call(90, torch.bfloat16, 1), config)[0]
    kernel = compile_ahead(step, 90)
    before = kernel.asm["ttgir"].split("griddepcontrol.wait")[0]
    assert before.count("async_copy_global_to_local") == (5 if early else 0)
    assert not complaints(kernel, resources(kernel), 90, reads_weights=True)


class FakeKernel:
    """Stands for a compiled kernel: notes the arguments of each launch, so that recording is tested without a GPU."""

    def __init__(self, kernel: object) -> None:
        self.arg_names = kernel.arg_names
        self.launches: list[dict[str, object]] = []

    def __getitem__(self, grid: tuple[int, ...]):
        if len(grid) == 3:  # of the compiled kernel: a recorded launch
            return lambda *values: self.launches.append(dict(zip(self.arg_names, values, strict=True)))
        return lambda **arguments: (self.launches.append(arguments), self)[1]


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize(("kind", "decider"), KINDS)
def test_a_recorded_launch_takes_the_next_calls_tensors_and_threshold(rows: int, kind: str, decider: str):
    target = Target(90, 132, True)

    def call(number: float) -> Call:
        x, gate, up, down_t = (torch.zeros(n, 1024) for n in (rows, 640, 640, 640))
        threshold = {"number": number, "one": torch.tensor(number), "vector": torch.full((640,), number)}[kind]
        return Call(x, gate, up, down_t, threshold, "silu", torch.empty_like(x), target, decider)

    steps = plan("cats", call(0.25))
    kernels = [FakeKernel(step.kernel) for step in steps]
    for step, kernel in zip(steps, kernels, strict=True):
        step.kernel = kernel
    recorded, second = Recorded(steps), call(0.5)
    recorded(second)
    y = Repeated(recorded, second)(second.x)
    assert y is not None and y.shape == second.x.shape
    for step, kernel in zip(steps, kernels, strict=True):
        first, again, repeated = kernel.launches
        assert set(repeated) == set(again)
        moved = {name for name in again if again[name] != repeated[name]}
        assert moved <= {name for name, value in step.buffers.items() if isinstance(value, torch.Tensor)} | {"y_ptr"}
        assert repeated.get("y_ptr", y.data_ptr()) == y.data_ptr()
        assert set(first) - set(again) <= {"num_warps", "launch_pdl"} and set(again) <= set(first)
        for name, field in step.fields.items():
            value = getattr(second, field)
            assert again[name] == (value.data_ptr() if isinstance(value, torch.Tensor) else 0.5)
        buffers = {name: value for name, value in step.buffers.items() if isinstance(value, torch.Tensor)}
        assert all(isinstance(again[name], int) and again[name] % 16 == 0 for name in buffers)
        assert {name: again[name] for name in step.constants} == step.constants
        assert all(again[name] == value for name, value in step.buffers.items() if name not in buffers)
    weights = kernels[0].launches[1]
    deciding = second.gate_weight if decider == "gate" else second.up_weight
    assert weights.get("deciding_ptr", weights.get("w_ptr")) == deciding.data_ptr()


def test_a_repeated_launch_refuses_an_unaligned_input():
    x, weight = torch.zeros(1, 64), torch.zeros(640, 64)
    call = Call(x, weight, weight, weight, 0.5, "silu", torch.empty_like(x), Target(90, 132, True))
    steps = plan("cats", call)
    kernels = [FakeKernel(step.kernel) for step in steps]
    for step, kernel in zip(steps, kernels, strict=True):
        step.kernel = kernel
    repeated = Repeated(Recorded(steps), call)
    assert repeated(torch.zeros(65)[1:].view(1, 64)) is None and repeated(x) is not None
    assert [len(kernel.launches) for kernel in kernels] == [2, 2]


@pytest.mark.parametrize(("kind", "offset", "expected"), [("one", 1, True), ("vector", 1, False), ("vector", 4, True)])
def test_only_aligned_vectors_are_recorded(kind: str, offset: int, expected: bool):
    room = torch.zeros(700)
    threshold = room[offset] if kind == "one" else room[offset : offset + 640]
    x, weight = torch.zeros(1, 64), torch.zeros(640, 64)
    assert aligned(Call(x, weight, weight, weight, threshold, "silu", x, Target(90, 132, True))) == expected


def test_cpu_tensors_are_refused_without_the_interpreter():
    x, weight = torch.ones(1, 8), torch.ones(4, 8)
    with pytest.raises(ValueError, match="need CUDA tensors, or TRITON_INTERPRET=1"):
        launch("cats", x, weight, weight, weight, 0.5)


def test_every_configuration_of_the_table_is_used():
    used = {choose_config(size, rows, 1024) for size in (2, 4) for rows in range(1, 9)}
    assert used == set(CONFIGS.values())


@pytest.mark.parametrize(
    ("element_size", "d", "fused"), [(2, 4096, 2), (4, 4096, 4), (4, 1024, 4), (4, 1000, 2), (4, 5120, 1), (2, 8192, 1)]
)
def test_rows_that_the_fused_kernel_takes(element_size: int, d: int, fused: int):
    """Up to four in float32, where their columns fit the registers of eight warps."""
    for rows in range(1, 9):
        assert choose_config(element_size, rows, d).dot == (rows > fused)
