"""The sparse gated MLP on int8 and int4 weights on GPUs: plans of launches, and the entry point.

One persistent kernel for all three products and a small reduction, as for one or two rows of unquantised weights (see
`cats_kernels.triton.mlp`). More rows of x, up to 8, are taken one or two at a time, each time reading what they need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cats_kernels.quantized import QuantizedWeight, count_groups, data_columns
from cats_kernels.thresholds import Threshold, kind_of
from cats_kernels.triton.configs import MAX_FUSED_WIDTH
from cats_kernels.triton.launch import (
    INTERPRETED,
    Call,
    Launch,
    Target,
    cdiv,
    on,
    power_of_2,
    run,
    target_of,
)
from cats_kernels.triton.mlp import count_programs, plan_reduce
from cats_kernels.triton.quantized_configs import QuantizedConfig, choose_quantized_config, that_fit
from cats_kernels.triton.quantized_device import HIGH_BITS, LOW_BITS
from cats_kernels.triton.quantized_kernels import fused_quantized_kernel
from cats_kernels.triton.recorded import Recorded, Repeated, aligned
from cats_kernels.weights import MAX_ROWS

LIST = 64
"""Neurons that a program compares with their thresholds at a time."""


@dataclass(frozen=True, kw_only=True)
class QuantizedCall(Call):
    """One call on quantised weights: the fields of the weights hold their packed rows, uint8 (m, bytes of a row).

    Attributes:
        gate_scales, up_scales, down_scales, gate_zeros, up_zeros, down_zeros: (m, groups); zero points are the scales
            where there are none.
        bits, group_size: of all three.
        symmetric: without zero points.
    """

    TENSORS: ClassVar[tuple[str, ...]] = (
        *Call.TENSORS, "gate_scales", "up_scales", "down_scales", "gate_zeros", "up_zeros", "down_zeros",
    )  # fmt: skip
    gate_scales: Tensor
    up_scales: Tensor
    down_scales: Tensor
    gate_zeros: Tensor
    up_zeros: Tensor
    down_zeros: Tensor
    bits: int
    group_size: int
    symmetric: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of a packed row."""
        return self.gate_weight.shape[1]

    def packing(self, chunk: int = 0) -> dict[str, int]:
        """The compile-time constants that say how a row is packed; a chunk of its bytes (at most ``chunk``, where that
        is not 0) lies within one group."""
        group_bytes = self.group_size * self.bits // 8
        chunk = math.gcd(group_bytes, chunk or 16 // self.x.element_size())
        return {
            "BITS": self.bits,
            "GROUP": self.group_size,
            "GROUPS": self.gate_scales.shape[1],
            "GROUP_BYTES": group_bytes,
            "ROW_BYTES": self.row_bytes,
            "CHUNK": chunk,
            "CHUNKS": power_of_2(cdiv(self.row_bytes, chunk)),
        }

    def has_words(self, config: QuantizedConfig) -> bool:
        """Whether x has 2 bytes an element, and rows are whole words of chunks of words."""
        words = self.packing(config.chunk)["CHUNK"] % 4 == 0 and self.row_bytes % 4 == 0
        whole = words and all(
            getattr(self, name).data_ptr() % 4 == 0 for name in ("gate_weight", "up_weight", "down_weight_t")
        )
        return config.words and whole and self.x.element_size() == 2

    def has_pairs(self, config: QuantizedConfig) -> bool:
        """Whether scales and zero points are numbers of two bytes that can be loaded as words of two."""
        sides = [getattr(self, f"{name}_{kind}") for name in ("gate", "up", "down") for kind in ("scales", "zeros")]
        whole = all(side.numel() % 2 == 0 and side.data_ptr() % 4 == 0 for side in sides)
        return config.paired and whole and self.gate_scales.element_size() == 2


def make_quantized_call(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> QuantizedCall:
    """The call of these arguments, x being contiguous (rows, d); its y (rows, d) is new.

    Raises:
        ValueError: weights of different formats.
    """
    weights = {"gate": gate_weight, "up": up_weight, "down": down_weight_t}
    formats = {name: (w.bits, w.group_size, w.zeros is None, w.scales.dtype) for name, w in weights.items()}
    if len(set(formats.values())) > 1:
        raise ValueError(
            f"the weights have different formats (bits, group_size, symmetric, scales), {formats}; "
            "the Triton kernels take one."
        )
    scales = {f"{name}_scales": weight.scales for name, weight in weights.items()}
    zeros = {f"{name}_zeros": w.scales if w.zeros is None else w.zeros for name, w in weights.items()}
    return QuantizedCall(
        x,
        gate_weight.data.view(torch.uint8),
        up_weight.data.view(torch.uint8),
        down_weight_t.data.view(torch.uint8),
        threshold.contiguous() if isinstance(threshold, Tensor) else float(threshold),
        activation,
        torch.empty_like(x),
        target_of(x.device),
        decider,
        **scales,
        **zeros,
        bits=gate_weight.bits,
        group_size=gate_weight.group_size,
        symmetric=gate_weight.zeros is None,
    )


def meta_call(
    rows: int,
    d: int,
    m: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    target: Target,
    decider: str = "gate",
    threshold: Threshold = 0.5,
) -> QuantizedCall:
    """A call with tensors that hold nothing, for compiling ahead of time; the scales have x's dtype."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, scales = empty(rows, d), empty(m, count_groups(group_size, d))
    data = empty(m, data_columns(bits, group_size, d), dtype=torch.uint8)
    sides = dict.fromkeys(QuantizedCall.TENSORS[len(Call.TENSORS) :], scales)
    form = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    return QuantizedCall(x, data, data, data, threshold, "silu", x, target, decider, **sides, **form)  # type: ignore[arg-type]


def choose_for(call: QuantizedCall) -> QuantizedConfig:
    """The chosen configuration for a call; one scale of 4 bytes (or a pair) waits in shared memory for each chunk."""
    grouped = call.gate_scales.shape[1] > 1
    config = choose_quantized_config(call.bits, call.x.element_size(), call.rows, call.row_bytes, grouped)
    packing = call.packing(config.chunk)
    scale_bytes = 4 * (packing["CHUNKS"] if grouped else 1) * (1 if call.symmetric else 2)
    return that_fit(config, packing["CHUNK"] * packing["CHUNKS"] + scale_bytes, call.target.arch)


def plan_quantized(call: QuantizedCall, config: QuantizedConfig | None = None) -> list[Launch]:
    """The launches for one or two rows of x, in order; tensors on the "meta" device will do for compiling ahead."""
    config = config or choose_for(call)
    pdl = call.target.dependent_launch and config.dependent
    programs = count_programs(call, config)
    sums = call.buffer(programs, call.rows, call.d)
    deciding, other = ("gate", "up") if call.decider == "gate" else ("up", "gate")
    fields = {"x_ptr": "x", "threshold": "threshold", "down_ptr": "down_weight_t"}
    fields |= {"deciding_ptr": call.deciding, "other_ptr": call.other}
    for name, side in (("deciding", deciding), ("other", other), ("down", "down")):
        fields |= {f"{name}_scales_ptr": f"{side}_scales", f"{name}_zeros_ptr": f"{side}_zeros"}
    fused = Launch(
        fused_quantized_kernel,
        (programs,),
        call,
        fields,
        dict(
            z_ptr=call.buffer(call.rows, call.m),
            v_ptr=call.buffer(call.rows, call.m),
            indices_ptr=call.buffer(call.m, dtype=torch.int32),
            partial_ptr=sums,
            m=call.m,
            low_bits=LOW_BITS,
            high_bits=HIGH_BITS,
        ),
        dict(
            call.rule,
            **call.packing(config.chunk),
            ROWS=call.rows,
            BLOCK_ROWS=power_of_2(call.rows),
            D=call.d,
            ZEROS=not call.symmetric,
            PAIRED=call.has_pairs(config),
            GATE_TILE=config.gate_tile,
            GATE_STAGES=config.gate_stages,
            TILE=config.tile,
            STAGES=config.stages,
            PDL=pdl,
            LIST=LIST,
            WORDS=call.has_words(config),
            ASM=not INTERPRETED,
        ),
        warps=config.warps,
        dependent=pdl,
    )
    return [fused, plan_reduce(call, sums, pdl, config.reduce_block)]


def sparse_gated_mlp_quantized(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str = "silu",
    decider: str = "gate",
    config: QuantizedConfig | None = None,
) -> Tensor:
    """The sparse gated MLP (eq. 1, 4, 5) on quantised weights, which are read packed and unpacked in registers.

    Args:
        x: (..., d), float32, float16 or bfloat16, 1 to 8 rows; sums are float32.
        gate_weight, up_weight, down_weight_t: (m, d), of one format; row j of down_weight_t is neuron j.
        threshold: a number, or a float32 tensor () or (m,) on x's device, as in `sparse_gated_mlp_triton`.
        activation: "silu" or "gelu_tanh".
        decider: "gate" or "up": whose weight is read whole.
        config: launch parameters other than the chosen ones.

    Returns:
        y of x's dtype and shape.

    Raises:
        ValueError: more than 8 rows, weights of different formats, or a device the kernels cannot run on.
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not 1 <= rows.shape[0] <= MAX_ROWS:
        raise ValueError(f"x has {rows.shape[0]} rows; the Triton kernels take 1 to {MAX_ROWS}.")
    weights = (gate_weight, up_weight, down_weight_t)
    at_once = 2 if 2 * power_of_2(rows.shape[1]) <= MAX_FUSED_WIDTH else 1
    parts = [
        _launch(make_quantized_call(part, *weights, threshold, activation, decider), config)
        for part in rows.split(at_once)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


def _launch(call: QuantizedCall, config: QuantizedConfig | None) -> Tensor:
    """Enqueue a call of one or two rows; returns its y."""
    device = call.x.device
    if INTERPRETED or not aligned(call):
        run(plan_quantized(call, config), device)
        return call.y
    key = recorded_key(call, config)
    with on(device):
        if key in RECORDED:
            RECORDED[key](call)
        else:
            RECORDED[key] = Recorded(plan_quantized(call, config))
    return call.y


RECORDED: dict[tuple[Any, ...], Recorded] = {}
"""What has been launched once, by all that its kernels were compiled for."""


def recorded_key(call: QuantizedCall, config: QuantizedConfig | None = None) -> tuple[Any, ...]:
    """All that the kernels of an aligned call are compiled for."""
    form = call.gate_scales.dtype, call.bits, call.group_size, call.symmetric
    rule = call.activation, call.decider, kind_of(call.threshold)
    return call.x.shape, call.m, call.x.dtype, *form, *rule, call.x.device, config


def repeated_quantized(
    x: Tensor,
    gate_weight: QuantizedWeight,
    up_weight: QuantizedWeight,
    down_weight_t: QuantizedWeight,
    threshold: Threshold,
    activation: str,
    decider: str,
) -> Repeated | None:
    """The launches that `sparse_gated_mlp_quantized` has made for these arguments, to be made again with another x of
    this shape while weights and threshold keep their addresses; None where it has recorded none of so many rows."""
    if isinstance(threshold, Tensor) and not threshold.is_contiguous():
        return None
    rows = x.reshape(-1, x.shape[-1])
    call = make_quantized_call(rows, gate_weight, up_weight, down_weight_t, threshold, activation, decider)
    recorded = RECORDED.get(recorded_key(call)) if aligned(call) else None
    return None if recorded is None else Repeated(recorded, call)
