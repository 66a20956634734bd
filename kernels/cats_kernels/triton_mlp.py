"""The sparse gated MLP on GPUs: launchers of our kernel and of the paper's, behind one signature.

"cats" is two launches for one or two rows of x (of at most MAX_FUSED_WIDTH columns together): one persistent kernel in
which every program takes an even share of the neurons, streams their rows of W_gate, lists the active ones, streams
their rows of W_up and W_down^T and keeps the output in registers; and a small reduction. More rows go through tensor
cores, a kernel a product. It is deterministic: two runs on the same input agree bit for bit. So is "fused-mask";
"gather" and "fused-compact" compact with atomics as Algorithm 2 does, and are not. No launch depends on data, so a call
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .operator import MAX_ROWS
from .triton_kernels import fused_kernel, gate_kernel, masked_product_kernel, up_kernel
from .triton_launch import INTERPRETED, Call, Launch, Recorded, aligned, cdiv, power_of_2, target_of
from .triton_paper import plan_down, plan_paper, plan_reduce

SPARSE_ROWS = {2: 4, 4: 8}
"""Bytes of a weight -> most rows of x for which VARIANTS["cats"] takes the sparse kernels; above it, `dense_masked`.

The mask is not known on the host, so rows and type decide. A neuron's rows are read if any row of x keeps it, so at
50 % sparsity a batch of 4 reads 94 % of them and a batch of 8 all. On an H200 (Mistral-7B) the sparse kernels were
1.06x dense at 4 rows and 50 % in bfloat16, but 0.99x at 8 rows, where `dense_masked` was 1.04x; in float32 1.8x."""


@dataclass(frozen=True)
class Config:
    """Launch parameters of "cats", chosen by measurement. A tile is a number of weight rows, a stage a tile that a
    program has asked for before it needs it."""

    gate_tile: int
    tile: int  # of W_up and W_down (fused), or of W_up
    warps: int
    programs: int  # per streaming multiprocessor
    gate_stages: int = 1  # of W_gate, if fused
    stages: int = 1  # of W_up and W_down, or of all weights with dot
    parts: int = 1  # fused, if over 1: each program takes its neurons in two parts, divided at one of so many places
    dot: bool = False  # products on tensor cores, each in a kernel of its own; tiles of 16 rows a warp
    columns: int = 128  # of x and W_gate or W_up in one stage, with dot
    down_block: int = 512  # columns, and
    down_tile: int = 16  # weight rows, of the down kernel, with dot
    reduce_block: int = 32  # columns that a program of the reduction sums, if fused
    dependent: bool = True  # programmatic dependent launch, where the chip has it


TENSOR_CORES = Config(64, 64, warps=4, programs=2, stages=4, dot=True, down_block=512, down_tile=16)
CONFIGS: dict[tuple[int, int], Config] = {
    (2, 1): Config(2, 1, warps=4, programs=2, gate_stages=4, stages=4),
    (2, 2): Config(4, 2, warps=4, programs=1, gate_stages=4, stages=4),
    (2, 8): TENSOR_CORES,
    (4, 1): Config(1, 2, warps=8, programs=1, gate_stages=6, stages=3, parts=8),
    (4, 2): Config(1, 1, warps=4, programs=1, gate_stages=6, stages=5, parts=8),
    (4, 8): replace(TENSOR_CORES, columns=64, down_block=256, dependent=False),
}
"""(bytes of a weight, most rows of x) -> configuration, for widths from 1024 up."""
NARROW = Config(8, 8, warps=4, programs=4)
"""For narrower weights and one or two rows: a weight row is less than one load of 8 warps."""
MAX_FUSED_WIDTH = 8192  # columns of x and of sums, in float32, that one program can keep in registers


SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
"""Compute capability -> KB of shared memory that a program can have (CUDA C++ Programming Guide); 64 elsewhere."""


@cache
def choose_config(element_size: int, rows: int, d: int, arch: int = 90) -> Config:
    """The launch configuration for weights of element_size bytes, rows of x (1 to 8), width d and a chip."""
    most = next(key for key in (1, 2, 8) if rows <= key)
    width = power_of_2(d)
    if most * width > MAX_FUSED_WIDTH:
        return CONFIGS[element_size, 8]
    config = NARROW if d < 1024 and rows <= 2 else CONFIGS[element_size, most]
    if config.dot:
        return config
    # d = 5120 is padded to 8192, where two rows in three stages of float32 are 262 KB
    one = replace(config, programs=1)
    smaller = (config, one, replace(one, gate_tile=1, tile=1), replace(config, gate_stages=1, stages=1, programs=2))
    room = SHARED_MEMORY.get(arch, 64) * 1024 // (width * element_size)
    return next(found for found in smaller if found.programs * rows_waiting(found) <= room)


def rows_waiting(config: Config) -> int:
    """Weight rows that a program of the fused kernel has in shared memory at a time."""
    return max((config.gate_stages - 1) * config.gate_tile, 2 * (config.stages - 1) * config.tile)


def plan_cats(call: Call, config: Config | None = None) -> list[Launch]:
    """The launches of "cats"; rows <= 8."""
    config = config or choose_config(call.x.element_size(), call.rows, call.d, call.target.arch)
    return plan_split(call, config) if config.dot else plan_fused(call, config)


def plan_fused(call: Call, config: Config) -> list[Launch]:
    """One kernel for all three products, and the reduction."""
    pdl = call.target.dependent_launch and config.dependent
    programs = count_programs(call, config)
    sums = call.buffer(programs, call.rows, call.d)
    fused = Launch(
        fused_kernel,
        (programs,),
        dict(
            x_ptr=call.x,
            gate_ptr=call.gate_weight,
            up_ptr=call.up_weight,
            down_ptr=call.down_weight_t,
            v_ptr=call.buffer(call.rows, call.m),
            indices_ptr=call.buffer(call.m, dtype=torch.int32),
            partial_ptr=sums,
            threshold=call.threshold,
            m=call.m,
        ),
        dict(
            ROWS=call.rows,
            BLOCK_ROWS=power_of_2(call.rows),
            D=call.d,
            BLOCK_D=power_of_2(call.d),
            ACTIVATION=call.activation,
            GATE_TILE=config.gate_tile,
            GATE_STAGES=config.gate_stages,
            TILE=config.tile,
            STAGES=config.stages,
            PARTS=config.parts,
            PDL=pdl,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    return [fused, plan_reduce(call, sums, pdl, config.reduce_block)]


def plan_split(call: Call, config: Config) -> list[Launch]:
    """A kernel a product, on tensor cores, and the reduction."""
    pdl = call.target.dependent_launch and config.dependent
    product = {
        "ROWS": call.rows,
        "BLOCK_ROWS": max(8, power_of_2(call.rows)),  # a tensor core's tile has 8 columns
        "D": call.d,
        "BLOCK_D": min(max(16, power_of_2(call.d)), config.columns),
        "STAGES": config.stages,
        "PDL": pdl,
    }
    word_rows = min(config.gate_tile, 16)
    words = cdiv(call.m, word_rows)
    v, h = call.buffer(call.rows, call.m), call.buffer(call.rows, call.m)
    word, indices, count = (call.buffer(n, dtype=torch.int32) for n in (words, call.m, 1))
    gate = Launch(
        gate_kernel,
        (cdiv(call.m, config.gate_tile),),
        dict(
            x_ptr=call.x,
            gate_ptr=call.gate_weight,
            v_ptr=v,
            mark_ptr=word,
            count_ptr=count,
            threshold=call.threshold,
            m=call.m,
        ),
        dict(
            product,
            DOT=True,
            TILE=config.gate_tile,
            WORD_ROWS=word_rows,
            MARK="WORDS",
            ACTIVATION=call.activation,
            EVEN_M=call.m % config.gate_tile == 0,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    up = Launch(
        up_kernel,
        (count_programs(call, config),),
        dict(
            x_ptr=call.x,
            up_ptr=call.up_weight,
            v_ptr=v,
            words_ptr=word,
            indices_ptr=indices,
            count_ptr=count,
            h_ptr=h,
            words=words,
            m=call.m,
        ),
        dict(
            product,
            WORD_ROWS=word_rows,
            BLOCK_WORDS=max(32, power_of_2(words)),
            CHUNK=256,
            TILE=config.tile,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    down = plan_down(
        call,
        h,
        indices,
        count,
        by_mask=False,
        block_d=config.down_block,
        tile=config.down_tile,
        programs_per_processor=config.programs,
        stages=2 * config.stages - 1,  # two dependent loads: index, then row
        dot=True,
        dependent=pdl,
    )
    return [gate, up, *down]


def count_programs(call: Call, config: Config) -> int:
    """Programs of a kernel that shares the neurons out evenly: no more than there are tiles."""
    return min(call.target.processors * config.programs, cdiv(call.m, config.tile))


def plan(variant: str, call: Call, config: Config | None = None) -> list[Launch]:
    """The launches of a variant, in order; tensors on the "meta" device will do for compiling ahead of time."""
    return plan_cats(call, config) if variant == "cats" else plan_paper(variant, call)


def launch(
    variant: str,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
    config: Config | None = None,
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) by one variant.

    Args:
        x: (..., d), float32, float16 or bfloat16, 1 to 8 rows; sums are float32.
        gate_weight, up_weight, down_weight_t: (m, d), row-major, of x's dtype; row j of down_weight_t is neuron j.
        threshold: neurons with |v| < threshold (compared in float32) are skipped; ties and NaN are kept.
        activation: "silu" or "gelu_tanh".
        config: launch parameters of "cats" other than the chosen ones.

    Returns:
        y of x's dtype and shape.

    Raises:
        ValueError: more than 8 rows, or a device the kernels cannot run on.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not 1 <= rows.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {rows.shape[0]} rows; the Triton kernels take 1 to {MAX_ROWS}.")
    y = torch.empty_like(rows)
    call = Call(rows, gate_weight, up_weight, down_weight_t, float(threshold), activation, y, target_of(x.device))
    if variant != "cats" or INTERPRETED or not aligned(call):
        run(plan(variant, call, config), x.device)
        return y.view(x.shape)
    key = (rows.shape, call.m, x.dtype, activation, x.device, config)
    with on(x.device):
        if key in RECORDED:
            RECORDED[key](call)
        else:
            RECORDED[key] = Recorded(plan_cats(call, config))
    return y.view(x.shape)


RECORDED: dict[tuple[Any, ...], Recorded] = {}
"""What has been launched once, by all that its kernels were compiled for."""


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one, at no cost where it is, or where it is no GPU."""
    here = device.type != "cuda" or device.index in (None, torch.cuda.current_device())
    return nullcontext() if here else torch.cuda.device(device)


def run(launches: list[Launch], device: torch.device) -> None:
    """Enqueue launches on the current stream of a device, or interpret them on the CPU."""
    with on(device):
        for step in launches:
            step()


def dense_masked(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
) -> Tensor:
    """The same function by three dense products of torch with one kernel between them, for any number of rows.

    v is compared with the threshold after its product was rounded to x's dtype, as in the reference.
    """
    z, u = F.linear(x, gate_weight), F.linear(x, up_weight)
    h = torch.empty_like(z)
    launches = [
        Launch(
            masked_product_kernel,
            (cdiv(z.numel(), 256),),
            dict(z_ptr=z, u_ptr=u, h_ptr=h, threshold=threshold, n=z.numel()),
            dict(ACTIVATION=activation, BLOCK=256),
            warps=4,
        )
    ]
    run(launches, x.device)
    return h @ down_weight_t


def sparse_gated_mlp_triton(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str = "silu",
) -> Tensor:
    """Our kernels up to SPARSE_ROWS rows of x, the dense masked path above; arguments as in `launch`."""
    arguments = (x, gate_weight, up_weight, down_weight_t, threshold, activation)
    rows = x.numel() // x.shape[-1]
    return launch("cats", *arguments) if rows <= SPARSE_ROWS[x.element_size()] else dense_masked(*arguments)


VARIANTS: dict[str, Callable[..., Tensor]] = {
    **{name: partial(launch, name) for name in ("gather", "fused-compact", "fused-mask")},
    "cats": sparse_gated_mlp_triton,
}
"""The kernels of Figure 6 and ours ("cats"), by name."""
