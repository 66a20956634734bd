"""Attention of one new token per sequence as one kernel: rotary embedding, cache write, softmax and weighted sum.

The grid does not depend on how much is filled, so that a captured launch serves every token: what is filled (or seen,
where there is a window) is divided among a fixed number of splits, as many as let the chip's programs read at one time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from cats_kernels.triton.launch import INTERPRETED, Target, on, power_of_2, target_of
from torch import Tensor

from cats.generation.attention_kernels import decode_attention_kernel

MAX_SPLITS = 64


@dataclass(frozen=True)
class AttentionConfig:
    """Launch parameters, to be chosen by ``python -m experiments.gpu.attention``."""

    tile: int  # places that a program holds at a time
    warps: int = 4
    programs: int = 2  # per streaming multiprocessor
    dot: bool = False  # on tensor cores
    stages: int = 2  # tiles asked for before they are needed, with dot; 1, and always without: one, in registers
    ahead: bool = True  # the first tile is asked for before the previous kernel has ended; only of those in registers
    together: bool = False  # all queries' partial sums are added at once, the new key and value are read first

    @property
    def held(self) -> bool:
        """Whether tiles are read into registers."""
        return not self.dot or self.stages == 1


def choose_attention_config(group: int, d: int, element_size: int) -> AttentionConfig:
    """For queries per key-value head, head size and bytes of an element.

    Measured on one H100 (results/h100-profile/attention_gpu.csv) with heads of 128 in bfloat16 at 160 to 2048 places:
    the fastest of all candidates over these. Up to 16 queries are padded to 16 on tensor cores like four: carried over,
    not measured. Heads of 64 have the configuration of an earlier measurement of 128, with as many bytes at a time.
    Nothing else is measured: what a lane keeps of a group fits its registers, and 16 to 32 KB of a program's keys and
    values are on their way.
    """
    if element_size == 2 and d in (64, 128):
        if group == 1:
            tile = 8 * lanes_of(d, element_size, 2)
            return AttentionConfig(tile=tile, warps=2, programs=4, together=d == 128)
        if 4 <= group <= 16 and d == 128:
            return AttentionConfig(tile=16, warps=2, programs=4, dot=True, stages=1, together=True)
        if 4 <= group <= 16:
            return AttentionConfig(tile=4096 // d, dot=True)
    if group > 4:
        return AttentionConfig(tile=64, dot=True) if element_size == 2 else AttentionConfig(tile=32, dot=True, warps=8)
    return AttentionConfig(tile=lanes_of(d, element_size, 4) * (4 if group == 1 else 2))


def lanes_of(d: int, element_size: int, warps: int) -> int:
    """Places that the threads of a program read at a time, each 16 bytes: one at least."""
    threads = min(32, max(1, d * element_size // 16))  # of a place
    return warps * 32 // threads


def count_splits(heads: int, config: AttentionConfig, target: Target) -> int:
    """Programs for each of all sequences' key-value heads."""
    return max(1, min(config.programs * target.processors // heads, MAX_SPLITS))


def constants_of(
    heads: int, kv_heads: int, group: int, d: int, element_size: int, target: Target, config: AttentionConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants of the kernel, and Triton's options; heads are the key-value heads of all sequences."""
    splits = count_splits(heads, config, target)
    lanes = min(config.tile, lanes_of(d, element_size, config.warps))
    constants = dict(
        KV_HEADS=kv_heads,
        GROUP=group,
        BLOCK_GROUP=max(16, power_of_2(group)) if config.dot else power_of_2(group),
        D=d,
        TILE=config.tile,
        LANES=lanes,
        SPLITS=splits,
        BLOCK_SPLITS=power_of_2(splits),
        DOT=config.dot,
        STAGES=config.stages,
        HELD=config.held,
        AHEAD=config.ahead and config.held,
        TOGETHER=config.together,
        MEMBERS=power_of_2(group),
        PDL=target.dependent_launch,
    )
    return constants, {"num_warps": config.warps, **({"launch_pdl": True} if target.dependent_launch else {})}


def decode_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    first: Tensor,
    arrived: Tensor,
    scale: float,
    window: int,
    config: AttentionConfig | None = None,
) -> Tensor:
    """`cats.generation.attention.decode_attention` on a GPU, or in Triton's interpreter.

    Under programmatic dependent launch ``position``, ``first`` and older keys and values are read before the previous
    kernel has ended, so that kernel must not write them.
    """
    batch, kv_heads, capacity, d = keys.shape
    group, heads = q.shape[-1] // (kv_heads * d), batch * kv_heads
    config = config or choose_attention_config(group, d, keys.element_size())
    constants, options = constants_of(heads, kv_heads, group, d, keys.element_size(), target_of(q.device), config)
    splits = constants["SPLITS"]
    parts = heads * splits * group
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    buffer = torch.empty(parts * (d + 2), dtype=torch.float32, device=q.device)
    with on(q.device):
        decode_attention_kernel[(splits, heads)](
            q, k, v, cos, sin, keys, values, position, first, out, buffer, buffer[parts * d :], arrived,
            capacity, window or 2**30, scale * 1.4426950408889634,
            q.stride(0), k.stride(0), v.stride(0), cos.stride(0), **constants, **options,
        )  # fmt: skip
    return out


__all__ = [
    "INTERPRETED", "AttentionConfig", "choose_attention_config", "constants_of", "count_splits",
    "decode_attention_kernel", "decode_attention_triton", "lanes_of",
]  # fmt: skip
