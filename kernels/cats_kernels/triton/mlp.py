"""The sparse gated MLP on GPUs: plans of launches, and the two paths behind one signature.

For one or two rows of x, and up to four in float32, two launches: one persistent kernel in which every program takes an
even share of the neurons, streams their rows of the deciding weight, lists the active ones, streams their rows of the
other weight and of W_down^T and keeps the output in registers; and a small reduction. More rows, and wider ones than
registers hold, go through tensor cores, a kernel per product. It is deterministic: two runs on the same input agree bit
for bit. No launch depends on data, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cats_kernels.thresholds import VECTOR, Threshold, kind_of
from cats_kernels.triton.configs import Config, choose_config
from cats_kernels.triton.kernels import (
    deciding_kernel,
    down_kernel,
    fused_kernel,
    masked_product_kernel,
    other_kernel,
    reduce_kernel,
)
from cats_kernels.triton.launch import (
    INTERPRETED,
    Call,
    Launch,
    cdiv,
    on,
    power_of_2,
    run,
    target_of,
)
from cats_kernels.triton.recorded import Recorded, Repeated, aligned
from cats_kernels.weights import MAX_ROWS


def plan(call: Call, config: Config | None = None) -> list[Launch]:
    """The launches of our sparse kernels, in order, for 1 to MAX_ROWS rows; tensors on the "meta" device will do for
    compiling ahead of time."""
    config = config or choose_config(call.x.element_size(), call.rows, call.d, call.target.arch)
    return plan_split(call, config) if config.dot else plan_fused(call, config)


def plan_fused(call: Call, config: Config) -> list[Launch]:
    """One kernel for all three products, and the reduction."""
    pdl = call.target.dependent_launch and config.dependent
    programs = count_programs(call, config)
    sums = call.buffer(programs, call.rows, call.d)
    weights = dict(deciding_ptr=call.deciding, other_ptr=call.other, down_ptr="down_weight_t")
    fused = Launch(
        fused_kernel,
        (programs,),
        call,
        dict(weights, x_ptr="x", threshold="threshold"),
        dict(
            v_ptr=call.buffer(call.rows, call.m),
            indices_ptr=call.buffer(call.m, dtype=torch.int32),
            partial_ptr=sums,
            m=call.m,
        ),
        dict(
            call.rule,
            ROWS=call.rows,
            BLOCK_ROWS=power_of_2(call.rows),
            D=call.d,
            BLOCK_D=power_of_2(call.d),
            GATE_TILE=config.gate_tile,
            GATE_STAGES=config.gate_stages,
            TILE=config.tile,
            STAGES=config.stages,
            PARTS=config.parts,
            EARLY=config.early,
            PDL=pdl,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    return [fused, plan_reduce(call, sums, pdl, config.reduce_block, config.early)]


def plan_split(call: Call, config: Config) -> list[Launch]:
    """A kernel per product, on tensor cores, and the reduction."""
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
    first = Launch(
        deciding_kernel,
        (cdiv(call.m, config.gate_tile),),
        call,
        dict(x_ptr="x", w_ptr=call.deciding, threshold="threshold"),
        dict(v_ptr=v, words_ptr=word, m=call.m),
        dict(product, **call.rule, TILE=config.gate_tile, WORD_ROWS=word_rows, EVEN_M=call.m % config.gate_tile == 0),
        warps=config.warps,
        dependent=pdl,
    )
    rule = {"UP_DECIDES": call.decider == "up", "ACTIVATION": call.activation}
    second = Launch(
        other_kernel,
        (count_programs(call, config),),
        call,
        dict(x_ptr="x", w_ptr=call.other),
        dict(v_ptr=v, words_ptr=word, indices_ptr=indices, count_ptr=count, h_ptr=h, words=words, m=call.m),
        dict(
            product,
            **rule,
            WORD_ROWS=word_rows,
            BLOCK_WORDS=max(32, power_of_2(words)),
            CHUNK=256,
            TILE=config.tile,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    return [first, second, *plan_down(call, config, h, indices, count)]


def plan_down(call: Call, config: Config, h: Tensor, indices: Tensor, count: Tensor) -> list[Launch]:
    """The down projection of h (rows, m) over the active rows on tensor cores: partial sums over splits of the active
    neurons, then one reduction into y."""
    pdl = call.target.dependent_launch and config.dependent
    stages = 2 * config.stages - 1  # two dependent loads: index, then row
    block_d = min(max(16, power_of_2(call.d)), config.down_block)
    blocks = cdiv(call.d, block_d)
    splits = max(1, min(config.programs * call.target.processors // blocks, cdiv(call.m, config.down_tile)))
    partial = call.buffer(splits, call.rows, call.d)
    down = Launch(
        down_kernel,
        (splits, blocks),
        call,
        dict(down_ptr="down_weight_t"),
        dict(h_ptr=h, indices_ptr=indices, count_ptr=count, partial_ptr=partial, m=call.m),
        dict(
            ROWS=call.rows,
            BLOCK_ROWS=16,  # a tensor core's tile has 16 rows
            D=call.d,
            BLOCK_D=block_d,
            TILE=config.down_tile,
            DOT=True,
            STAGES=stages,
            PDL=pdl,
        ),
        warps=4,
        dependent=pdl,
    )
    return [down, plan_reduce(call, partial, pdl, block=128)]


def plan_reduce(call: Call, partial: Tensor, dependent: bool, block: int, early: bool = False) -> Launch:
    """The sum of partial (parts, rows, d) into y; a program sums a block of elements."""
    parts, n = partial.shape[0], call.y.numel()
    return Launch(
        reduce_kernel,
        (cdiv(n, block),),
        call,
        dict(y_ptr="y"),
        dict(partial_ptr=partial, parts=parts, n=n),
        dict(BLOCK_PARTS=power_of_2(parts), BLOCK=block, EARLY=early, PDL=dependent),
        warps=8,
        dependent=dependent,
    )


def count_programs(call: Call, config: Config) -> int:
    """Programs of a kernel that shares the neurons out evenly: no more than there are tiles."""
    return min(call.target.processors * config.programs, cdiv(call.m, config.tile))


def make_call(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Call:
    """The call of these arguments, x being (..., d) of 1 to MAX_ROWS rows; its y (rows, d) is new."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not 1 <= rows.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {rows.shape[0]} rows; the Triton kernels take 1 to {MAX_ROWS}.")
    threshold = threshold.contiguous() if isinstance(threshold, Tensor) else float(threshold)
    y = torch.empty_like(rows)
    return Call(rows, gate_weight, up_weight, down_weight_t, threshold, activation, y, target_of(x.device), decider)


def sparse_gated_mlp_triton(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
    config: Config | None = None,
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) by our sparse kernels.

    Args:
        x: (..., d), float32, float16 or bfloat16, 1 to 8 rows; sums are float32.
        gate_weight, up_weight, down_weight_t: (m, d), row-major, of x's dtype; row j of down_weight_t is neuron j.
        threshold: a number, or a float32 tensor () or (m,) on x's device; neurons whose deciding product is below it
            (compared in float32) are skipped; ties and NaN are kept. A tensor's values are read by the kernel alone, so
            the host never waits.
        activation: "silu" or "gelu_tanh".
        decider: "gate" or "up": whose weight is read whole.
        config: launch parameters other than the chosen ones.

    Returns:
        y of x's dtype and shape.

    Raises:
        ValueError: more than 8 rows, or a device the kernels cannot run on.
    """
    call = make_call(x, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    if INTERPRETED or not aligned(call):
        run(plan(call, config), x.device)
        return call.y.view(x.shape)
    key = recorded_key(call, config)
    with on(x.device):
        if key in RECORDED:
            RECORDED[key](call)
        else:
            RECORDED[key] = Recorded(plan(call, config))
    return call.y.view(x.shape)


RECORDED: dict[tuple[Any, ...], Recorded] = {}
"""What has been launched once, by all that its kernels were compiled for."""


def recorded_key(call: Call, config: Config | None = None) -> tuple[Any, ...]:
    """All that the kernels of an aligned call are compiled for."""
    rule = call.activation, call.decider, kind_of(call.threshold)
    return call.x.shape, call.m, call.x.dtype, *rule, call.x.device, config


def repeated(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Repeated | None:
    """The launches that `sparse_gated_mlp_triton` has made for these arguments, to be made again with another x of this
    shape while weights and threshold keep their addresses; None where it has recorded none."""
    if isinstance(threshold, Tensor) and not threshold.is_contiguous():
        return None
    call = make_call(x, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    recorded = RECORDED.get(recorded_key(call)) if aligned(call) else None
    return None if recorded is None else Repeated(recorded, call)


def dense_masked(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight_t: Tensor,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
) -> Tensor:
    """The same function by three dense products of torch with one kernel between them, for any number of rows.

    The deciding product is compared with the threshold after it was rounded to x's dtype, as in the reference (but its
    activation is not rounded).
    """
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    h, n = torch.empty_like(gate), gate.numel()
    threshold = threshold.contiguous() if isinstance(threshold, Tensor) else float(threshold)
    kind = kind_of(threshold)
    rule = {"THRESHOLD": kind, "UP_DECIDES": decider == "up", "ACTIVATION": activation}
    per_neuron = gate_weight.shape[0] if kind == VECTOR else 1
    with on(x.device):
        masked_product_kernel[(cdiv(n, 256),)](gate, up, h, threshold, n, per_neuron, **rule, BLOCK=256, num_warps=4)
    return h @ down_weight_t
