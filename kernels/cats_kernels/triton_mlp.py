"""The sparse gated MLP on GPUs: launchers of our kernel and of the paper's, behind one signature.

"cats" is three launches (four for more rows of x): the gate product, whose epilogue thresholds and packs a word of
active neurons per tile; one persistent kernel in which every program takes an even share of the active neurons,
streams their rows of W_up and W_down^T, and keeps the output in registers; and a small reduction. It is deterministic:
two runs on the same input agree bit for bit. So is "fused-mask"; "gather" and "fused-compact" compact with atomics as
Algorithm 2 does, and are not. No launch depends on data, so a call can be captured in a CUDA graph.
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
from .triton_kernels import gate_kernel, masked_product_kernel, one_pass_kernel, up_down_kernel, up_kernel
from .triton_launch import INTERPRETED, Call, Launch, Recorded, aligned, cdiv, power_of_2, target_of
from .triton_paper import plan_down, plan_paper, plan_reduce

SPARSE_ROWS = {2: 4, 4: 8}
"""Bytes of a weight -> most rows of x for which VARIANTS["cats"] takes the sparse kernels; above it, `dense_masked`.

The mask is not known on the host, so rows and type decide. A neuron's rows are read if any row of x keeps it, so at
50 % sparsity a batch of 4 reads 94 % of them and a batch of 8 all. On an H200 (Mistral-7B) the sparse kernels were
1.06x dense at 4 rows and 50 % in bfloat16, but 0.87x at 8 rows, where `dense_masked` was 1.04x; in float32 1.5x."""


@dataclass(frozen=True)
class Config:
    """Launch parameters of "cats", chosen by measurement. A tile is a number of weight rows."""

    gate_tile: int
    gate_warps: int
    tile: int  # of the up-and-down kernel (fused), or of the up kernel
    warps: int
    programs: int  # per streaming multiprocessor, of the kernels after the gate
    stages: int = 1  # software pipelining depth: of the fused kernel, or of all with dot
    fused: bool = True  # up and down in one kernel; needs rows * d float32 sums in the registers of one program
    one_pass: bool = False  # gate, up and down in one kernel, if fused
    dot: bool = False  # products on tensor cores, not fused; tiles of 16 rows a warp
    columns: int = 128  # of x and W_gate or W_up in one stage, with dot
    down_block: int = 512  # columns, and
    down_tile: int = 16  # weight rows, of the separate down kernel
    reduce_block: int = 32  # columns that a program of the reduction sums, if fused
    dependent: bool = True  # programmatic dependent launch, where the chip has it
    prefetch: int = (
        0  # one in so many gate tiles, the last ones, fetch their active rows into L2, if dependent; 0: none
    )


TENSOR_CORES = Config(
    64, 4, tile=64, warps=4, programs=2, stages=4, fused=False, dot=True, down_block=512, down_tile=16
)
CONFIGS: dict[tuple[int, int], Config] = {
    (2, 1): Config(4, 4, tile=4, warps=8, programs=2),
    (2, 2): TENSOR_CORES,
    (2, 8): TENSOR_CORES,
    (4, 1): Config(4, 8, tile=2, warps=8, programs=2),
    (4, 2): Config(4, 8, tile=1, warps=8, programs=1, stages=3),
    (4, 8): replace(TENSOR_CORES, columns=64, down_block=128, down_tile=32, dependent=False),
}
"""(bytes of a weight, most rows of x) -> configuration, for widths from 1024 up."""
NARROW = Config(8, 4, tile=8, warps=4, programs=4)
"""For narrower weights and one or two rows: a weight row is less than one load of 8 warps."""
MAX_FUSED_WIDTH = 8192  # columns of float32 sums that one program can keep in registers


SMALL_SHARED_MEMORY = (86, 89, 120, 121)
"""Compute capabilities with 99 KB of shared memory a block; the others have at least 163 KB."""


@cache
def choose_config(element_size: int, rows: int, d: int, arch: int = 90) -> Config:
    """The launch configuration for weights of element_size bytes, rows of x (1 to 8), width d and a chip."""
    most = next(key for key in (1, 2, 8) if rows <= key)
    config = NARROW if d < 1024 and rows <= 2 else CONFIGS[element_size, most]
    # tiles of W_up and W_down wait in shared memory: at d = 5120, padded to 8192, three float32 stages need 262 KB
    waiting = 2 * (config.stages - 1) * config.tile * power_of_2(d) * element_size
    if config.fused and waiting > (99 if arch in SMALL_SHARED_MEMORY else 163) * 1024:
        config = replace(config, stages=1, programs=2)
    fits = most * power_of_2(d) <= MAX_FUSED_WIDTH
    return replace(config, fused=config.fused and fits, one_pass=config.one_pass and fits)


def plan_cats(call: Call, config: Config | None = None) -> list[Launch]:
    """The launches of "cats"; rows <= 8."""
    config = config or choose_config(call.x.element_size(), call.rows, call.d, call.target.arch)
    pdl = call.target.dependent_launch and config.dependent
    # a tensor core's tile has 8 columns
    block_rows = max(8, power_of_2(call.rows)) if config.dot else power_of_2(call.rows)
    shape = {"ROWS": call.rows, "BLOCK_ROWS": block_rows, "D": call.d, "PDL": pdl}
    if config.one_pass:
        return plan_one_pass(call, config, shape)
    columns = config.columns if config.dot else 4096 if call.rows <= 2 else 1024  # at a time, summing products only
    product = {
        "BLOCK_D": min(max(16, power_of_2(call.d)), columns),
        "DOT": config.dot,
        "STAGES": config.stages if config.dot else 1,
    }
    tiles = cdiv(call.m, config.gate_tile)
    word_rows = min(config.gate_tile, 16)
    words = cdiv(call.m, word_rows)
    v = call.buffer(call.rows, call.m)
    word, indices, count = (call.buffer(n, dtype=torch.int32) for n in (words, call.m, 1))
    gate = Launch(
        gate_kernel,
        (tiles,),
        dict(
            x_ptr=call.x,
            gate_ptr=call.gate_weight,
            up_ptr=call.up_weight,
            down_ptr=call.down_weight_t,
            v_ptr=v,
            mark_ptr=word,
            count_ptr=count,
            threshold=call.threshold,
            m=call.m,
            prefetch_from=tiles - tiles // max(1, config.prefetch),
        ),
        dict(
            shape,
            **product,
            PREFETCH=prefetch_copies(call, config) if pdl else 0,
            TILE=config.gate_tile,
            WORD_ROWS=word_rows,
            MARK="WORDS",
            ACTIVATION=call.activation,
            EVEN_M=call.m % config.gate_tile == 0,
        ),
        warps=config.gate_warps,
        dependent=pdl,
    )
    listed = dict(x_ptr=call.x, up_ptr=call.up_weight, v_ptr=v, words_ptr=word, indices_ptr=indices, words=words)
    listing = dict(WORD_ROWS=word_rows, BLOCK_WORDS=max(32, power_of_2(words)), CHUNK=256, TILE=config.tile)
    programs = count_programs(call, config)
    if config.fused:
        sums = call.buffer(programs, call.rows, call.d)
        up_down = Launch(
            up_down_kernel,
            (programs,),
            dict(listed, down_ptr=call.down_weight_t, partial_ptr=sums, m=call.m),
            dict(shape, **listing, BLOCK_D=power_of_2(call.d), STAGES=config.stages),
            warps=config.warps,
            dependent=pdl,
        )
        return [gate, up_down, plan_reduce(call, sums, pdl, config.reduce_block)]
    h = call.buffer(call.rows, call.m)
    up = Launch(
        up_kernel,
        (programs,),
        dict(listed, count_ptr=count, h_ptr=h, m=call.m),
        dict(shape, **listing, **product),
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
        stages=2 * config.stages - 1 if config.dot else 1,  # two dependent loads: index, then row
        dot=config.dot,
        dependent=pdl,
    )
    return [gate, up, *down]


def plan_one_pass(call: Call, config: Config, shape: dict[str, Any]) -> list[Launch]:
    """The launches of "cats" where one kernel computes all three products."""
    programs = count_programs(call, config)
    sums = call.buffer(programs, call.rows, call.d)
    one_pass = Launch(
        one_pass_kernel,
        (programs,),
        dict(
            x_ptr=call.x,
            gate_ptr=call.gate_weight,
            up_ptr=call.up_weight,
            down_ptr=call.down_weight_t,
            partial_ptr=sums,
            threshold=call.threshold,
            m=call.m,
        ),
        dict(shape, ACTIVATION=call.activation, BLOCK_D=power_of_2(call.d), TILE=config.tile, STAGES=config.stages),
        warps=config.warps,
        dependent=shape["PDL"],
    )
    return [one_pass, plan_reduce(call, sums, shape["PDL"], config.reduce_block)]


def prefetch_copies(call: Call, config: Config) -> int:
    """Copies of a weight row that the threads of a gate program share out, or 0: no prefetch, or rows of odd sizes."""
    copies = 32 * config.gate_warps // config.gate_tile
    whole = copies > 0 and call.d * call.x.element_size() % (16 * copies) == 0
    return copies if config.prefetch and whole else 0


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
    call = Call(rows, gate_weight, up_weight, down_weight_t, threshold, activation, y, target_of(x.device))
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
