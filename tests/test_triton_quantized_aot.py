"""The Triton kernel for quantised weights compiled ahead of time for sm_80, sm_89 and sm_90, without a GPU.

Checked on the result: weights are loaded in whole chunks and read from shared memory as such, nothing spills, shared
memory fits the chip. A kernel broken on purpose, whose chunks do not match the loads of x, shows that the check catches
reads of single bytes.
"""

import functools
import itertools
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import triton
import triton.language as tl
from cats_kernels.triton import quantized_device, quantized_kernels
from cats_kernels.triton.configs import SHARED_MEMORY, rows_waiting
from cats_kernels.triton.launch import Launch, Target
from cats_kernels.triton.quantized import QuantizedCall, choose_for, meta_call, plan_quantized
from cats_kernels.triton.quantized_configs import (
    CONFIGS,
    GROUPED,
    NARROW,
    QuantizedConfig,
    choose_quantized_config,
    that_fit,
)
from cats_kernels.triton.recorded import Recorded, Repeated, aligned

from tests.test_triton_aot import PROCESSORS, SHARED_LIMIT, FakeKernel, compile_ahead, resources, workers
from tests.triton_cases import DTYPES

__all__ = ["workers"]  # a fixture
M = 14336
FORMATS = ((8, 4096, True), (8, 128, True), (4, 32, True), (4, 128, True), (4, 64, False))
BYTE_READS = 8
"""Of shared memory, at most: scans over a tile's neurons have some."""


def call_on(
    arch: int,
    form: tuple[int, int, bool],
    dtype: torch.dtype = torch.bfloat16,
    rows: int = 1,
    decider: str = "gate",
    vector: bool = False,
    d: int = 4096,
) -> QuantizedCall:
    """A call on a chip that is not there, with tensors that hold nothing."""
    target = Target(arch, PROCESSORS[arch], dependent_launch=arch >= 90)
    threshold = torch.empty(M, device="meta") if vector else 0.5
    return meta_call(rows, d, M, *form, dtype, target, decider, threshold)


@functools.cache
def launches(arch: int) -> dict[str, Launch]:
    """The kernel over formats, dtypes, rows, deciders and thresholds."""
    calls = {f"{form}": call_on(arch, form) for form in FORMATS}
    for form, rows in ((FORMATS[0], 1), (FORMATS[3], 1), (FORMATS[0], 2), (FORMATS[3], 2)):
        for dtype in DTYPES:
            calls[f"{form} {dtype} rows={rows}"] = call_on(arch, form, dtype, rows)
    calls["up decides, vector"] = call_on(arch, FORMATS[3], decider="up", vector=True)
    calls["d=5120"] = call_on(arch, FORMATS[3], d=5120)
    calls["d=512"] = call_on(arch, FORMATS[3], d=512)
    return {label: plan_quantized(call)[0] for label, call in calls.items()}


def complaints(kernel: triton.compiler.CompiledKernel, used: dict[str, int], arch: int, chunk: int) -> list[str]:
    """What is wrong with a compiled kernel; empty if nothing is."""
    found = []
    if used["STACK"] or used["LOCAL"]:
        found.append(f"spills: {used}")
    if kernel.metadata.shared > SHARED_LIMIT[arch]:
        found.append(f"{kernel.metadata.shared} bytes of shared memory, {SHARED_LIMIT[arch]} allowed")
    loads = re.findall(r"ld\.global\.L1::evict_first\S*", kernel.asm["ptx"])
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S*[^;]*?, (0x\w+)", kernel.asm["ptx"])
    sizes = {int(size, 16) for size in copies} | {4 * (4 if "v4" in one else 2 if "v2" in one else 1) for one in loads}
    if chunk not in sizes:
        found.append(f"no loads of {chunk} bytes, but {sorted(sizes)}")
    reads = len(re.findall(r"ld\.shared\.[bsu]8", kernel.asm["ptx"]))
    if reads > BYTE_READS:
        found.append(f"{reads} reads of single bytes from shared memory")
    return found


def examine(arch: int, label: str) -> tuple[str, list[str]]:
    """A kernel's row of the table, and what is wrong with it."""
    step = launches(arch)[label]
    kernel = compile_ahead(step, arch)
    used = resources(kernel)
    row = f"sm_{arch} {used['REG']:4d} registers {kernel.metadata.shared:7d} B shared  {label}"
    return row, complaints(kernel, used, arch, step.constants["CHUNK"])


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
def hidden_columns(GROUP: tl.constexpr, BITS: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """Like `chunk_columns` of int4, but with neighbours that the compiler cannot see to be such."""
    byte = tl.arange(0, CHUNKS)[None, None, :, None] * CHUNK + tl.arange(0, CHUNK)[None, None, None, :]
    return byte // (GROUP // 2) * GROUP + (byte ^ 1) % (GROUP // 2)


def test_the_check_catches_reads_of_single_bytes(monkeypatch: pytest.MonkeyPatch):
    """The compiler then loads x by single columns, and gives the weights to threads in the same way."""
    for module in (quantized_device, quantized_kernels):
        monkeypatch.setattr(module, "chunk_columns", hidden_columns)
    config = QuantizedConfig(4, 2, warps=4, programs=3, gate_stages=4, stages=4, words=False)
    kernel = compile_ahead(plan_quantized(call_on(90, FORMATS[3]), config)[0], 90)
    assert any("single bytes" in text for text in complaints(kernel, resources(kernel), 90, 8))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_words_take_the_instructions_of_bytes(form: tuple[int, int, bool]):
    """Four products an instruction, for each half of a byte with 4 bits, and for fine and coarse bytes of x."""
    call = call_on(90, form)
    of_words, of_bytes = (
        compile_ahead(plan_quantized(call, replace(choose_for(call), words=words))[0], 90).asm["ptx"]
        for words in (True, False)
    )
    per_row = 2 * call.row_bytes // (4 * 128) * (8 // form[0])
    config = choose_for(call)
    assert of_words.count("dp4a.") == per_row * (config.gate_tile + config.tile) and "dp4a." not in of_bytes
    assert of_words.count("prmt.b32") >= 8 // form[0] * call.row_bytes // 128 * config.tile


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("decider", ["gate", "up"])
def test_a_recorded_launch_takes_the_next_calls_tensors(symmetric: bool, decider: str):
    def call(number: float) -> QuantizedCall:
        x, data, scales = torch.zeros(1, 256), torch.zeros(640, 128, dtype=torch.uint8), torch.zeros(640, 8)
        tensors = {name: scales.clone() for name in QuantizedCall.TENSORS[5:]}
        target = Target(90, 132, True)
        weights = (data.clone(), data.clone(), data.clone())
        form = {"bits": 4, "group_size": 32, "symmetric": symmetric}
        return QuantizedCall(x, *weights, number, "silu", torch.empty_like(x), target, decider, **tensors, **form)

    steps = plan_quantized(call(0.25))
    kernels = [FakeKernel(step.kernel) for step in steps]
    for step, kernel in zip(steps, kernels, strict=True):
        step.kernel = kernel
    recorded, second = Recorded(steps), call(0.5)
    recorded(second)
    again = kernels[0].launches[1]
    side = "gate" if decider == "gate" else "up"
    assert again["deciding_ptr"] == getattr(second, f"{side}_weight").data_ptr()
    assert again["deciding_scales_ptr"] == getattr(second, f"{side}_scales").data_ptr()
    assert again["down_zeros_ptr"] == second.down_zeros.data_ptr()
    assert again["threshold"] == 0.5
    assert kernels[1].launches[1]["y_ptr"] == second.y.data_ptr()
    y = Repeated(recorded, second)(second.x)
    assert y is not None and kernels[1].launches[2]["y_ptr"] == y.data_ptr()
    repeated = kernels[0].launches[2]
    assert {name for name in again if again[name] != repeated[name]} <= {"z_ptr", "v_ptr", "indices_ptr", "partial_ptr"}


def test_only_aligned_scales_are_recorded():
    call = call_on(90, FORMATS[3])
    room = torch.zeros(641)
    tensors = {name: torch.zeros(640) for name in QuantizedCall.TENSORS}
    for offset, expected in ((0, True), (1, False)):
        made = QuantizedCall(
            **{**vars(call), **tensors, "up_scales": room[offset : offset + 640]},
        )
        assert aligned(made) == expected


def test_every_configuration_of_the_table_is_used():
    sizes = itertools.product((8, 4), (2, 4), (1, 2), (512, 2048), (False, True))
    assert {choose_quantized_config(*size) for size in sizes} == {*CONFIGS.values(), *GROUPED.values(), NARROW}


def test_no_more_programs_than_shared_memory_has_room_for():
    for arch, form, d in itertools.product((80, 89, 90), FORMATS, (4096, 5120)):
        call = call_on(arch, form, d=d)
        config = choose_for(call)
        packing = call.packing(config.chunk)
        waiting = rows_waiting(config) * packing["CHUNK"] * packing["CHUNKS"]
        assert config.programs == 1 or config.programs * waiting <= 1024 * SHARED_MEMORY[arch]
    config = CONFIGS[8, 2, 1]
    assert that_fit(config, 8192, 89).programs < that_fit(config, 8192, 90).programs == config.programs
