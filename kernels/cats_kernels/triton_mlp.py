"""The sparse gated MLP on GPUs: launchers of our kernel and of the paper's, behind one signature.

"cats" is three launches (four for more rows of x): the gate product, whose epilogue thresholds and packs a word of
active neurons per tile; one persistent kernel in which every program takes an even share of the active neurons,
streams their rows of W_up and W_down^T, and keeps the output in registers; and a small reduction. It is deterministic:
two runs on the same input agree bit for bit. So is "fused-mask"; "gather" and "fused-compact" compact with atomics as
Algorithm 2 does, and are not. No launch depends on data, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from .triton_kernels import gate_kernel, up_down_kernel, up_kernel
from .triton_launch import Launch, Target, power_of_2, target_of
from .triton_paper import plan_down, plan_paper, plan_reduce

MAX_ROWS = 8
"""Rows of x that share each weight load; more rows belong on the dense path."""


@dataclass(frozen=True)
class Config:
    """Launch parameters of "cats", chosen by measurement. A tile is a number of weight rows."""

    gate_tile: int
    gate_warps: int
    gate_tiles: int  # per program, and
    gate_stages: int  # software pipelining depth over them
    tile: int  # of the up-and-down kernel (fused), or of the up kernel
    warps: int
    programs: int  # per streaming multiprocessor
    stages: int = 1  # software pipelining depth of the fused kernel
    fused: bool = True  # up and down in one kernel; needs rows * d float32 sums in the registers of one program
    down_block: int = 512  # columns, and
    down_tile: int = 16  # weight rows, of the separate down kernel
    dependent: bool = True  # programmatic dependent launch, where the chip has it


CONFIGS: dict[tuple[int, int], Config] = {
    (2, 1): Config(8, 8, 1, 1, tile=4, warps=8, programs=2),
    (2, 2): Config(8, 8, 1, 1, tile=4, warps=8, programs=1),
    (2, 8): Config(8, 8, 1, 1, tile=8, warps=8, programs=4, fused=False),
    (4, 1): Config(4, 8, 1, 1, tile=2, warps=8, programs=2),
    (4, 2): Config(4, 8, 1, 1, tile=2, warps=8, programs=1),
    (4, 8): Config(4, 8, 1, 1, tile=4, warps=8, programs=4, fused=False),
}
"""(bytes of a weight, most rows of x) -> configuration, for widths from 1024 up."""
NARROW = Config(8, 4, 1, 1, tile=8, warps=4, programs=4)
"""For narrower weights: a row is less than one load of 8 warps."""
MAX_FUSED_WIDTH = 8192  # columns of float32 sums that one program can keep in registers


def choose_config(element_size: int, rows: int, d: int) -> Config:
    """The launch configuration for weights of element_size bytes, rows of x (1 to 8) and width d."""
    most = next(key for key in (1, 2, 8) if rows <= key)
    config = CONFIGS[element_size, most] if d >= 1024 else NARROW
    return replace(config, fused=config.fused and most * power_of_2(d) <= MAX_FUSED_WIDTH)


def plan_cats(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str,
    y: Tensor,
    target: Target,
    config: Config | None = None,
) -> list[Launch]:
    """The launches of "cats" for x (rows, d), rows <= 8, into y."""
    rows, d = x.shape
    m = gate_weight.shape[0]
    config = config or choose_config(x.element_size(), rows, d)
    pdl = target.dependent_launch and config.dependent
    shape: dict[str, Any] = {"ROWS": rows, "BLOCK_ROWS": power_of_2(rows), "D": d, "PDL": pdl}
    block_d = power_of_2(d)
    part_d = min(block_d, 4096 if rows <= 2 else 1024)  # columns at a time where the sums are only of products
    words = triton.cdiv(m, config.gate_tile)
    programs = min(target.processors * config.programs, triton.cdiv(m, config.tile))
    v = torch.empty((rows, m), dtype=torch.float32, device=x.device)
    word, indices, count = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (words, m, 1))
    gate = Launch(
        gate_kernel,
        (triton.cdiv(words, config.gate_tiles),),
        dict(x_ptr=x, gate_ptr=gate_weight, v_ptr=v, mark_ptr=word, count_ptr=count, threshold=threshold, m=m),
        dict(
            shape,
            BLOCK_D=part_d,
            TILE=config.gate_tile,
            TILES=config.gate_tiles,
            STAGES=config.gate_stages,
            MARK="WORDS",
            ACTIVATION=activation,
            EVEN_M=m % (config.gate_tile * config.gate_tiles) == 0,
        ),
        warps=config.gate_warps,
    )
    listing = dict(
        WORD_ROWS=config.gate_tile,
        BLOCK_WORDS=max(32, power_of_2(words)),
        CHUNK=256,
        TILE=config.tile,
    )
    if config.fused:
        sums = torch.empty((programs, rows, d), dtype=torch.float32, device=x.device)
        up_down = Launch(
            up_down_kernel,
            (programs,),
            dict(
                x_ptr=x,
                up_ptr=up_weight,
                down_ptr=down_weight_t,
                v_ptr=v,
                words_ptr=word,
                indices_ptr=indices,
                partial_ptr=sums,
                words=words,
                m=m,
            ),
            dict(shape, **listing, BLOCK_D=block_d, STAGES=config.stages),
            warps=config.warps,
            dependent=pdl,
        )
        return [gate, up_down, plan_reduce(sums, y, pdl)]
    h = torch.empty((rows, m), dtype=torch.float32, device=x.device)
    up = Launch(
        up_kernel,
        (programs,),
        dict(
            x_ptr=x,
            up_ptr=up_weight,
            v_ptr=v,
            words_ptr=word,
            indices_ptr=indices,
            count_ptr=count,
            h_ptr=h,
            words=words,
            m=m,
        ),
        dict(shape, **listing, BLOCK_D=part_d),
        warps=config.warps,
        dependent=pdl,
    )
    down = plan_down(
        h,
        down_weight_t,
        indices,
        count,
        y,
        by_mask=False,
        target=target,
        block_d=config.down_block,
        tile=config.down_tile,
        programs_per_processor=config.programs,
        dependent=pdl,
    )
    return [gate, up, *down]


def plan(
    variant: str,
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: float,
    activation: str,
    y: Tensor,
    target: Target,
    config: Config | None = None,
) -> list[Launch]:
    """The launches of a variant, in order; tensors on the "meta" device will do for compiling ahead of time."""
    arguments = (x, gate_weight, up_weight, down_weight_t, threshold, activation, y, target)
    return plan_cats(*arguments, config=config) if variant == "cats" else plan_paper(variant, *arguments)


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
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not 1 <= rows.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {rows.shape[0]} rows; the Triton kernels take 1 to {MAX_ROWS}.")
    arguments = (rows, gate_weight, up_weight, down_weight_t, threshold, activation, y, target_of(x.device))
    if not x.is_cuda:
        for step in plan(variant, *arguments, config=config):
            step()
        return y
    with torch.cuda.device(x.device):
        for step in plan(variant, *arguments, config=config):
            step()
    return y


VARIANTS: dict[str, Callable[..., Tensor]] = {
    name: partial(launch, name) for name in ("gather", "fused-compact", "fused-mask", "cats")
}
"""The kernels of Figure 6 and ours ("cats"), by name."""
