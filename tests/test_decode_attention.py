"""The decode attention kernel: in Triton's interpreter against plain operations, and compiled ahead of time.

Triton decides at import whether to interpret, so outside TRITON_INTERPRET=1 this file runs itself in a subprocess, too.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cats.generation.attention import plain_decode_attention

triton = pytest.importorskip("triton")

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.02}
SHAPES = [(1, 2, 1), (2, 2, 4), (2, 1, 7)]  # sequences, key-value heads, queries of each


def problem(
    batch: int, kv_heads: int, group: int, capacity: int, position: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random arguments; queries, keys and values are slices of one projection."""
    d = 16
    generator = torch.Generator().manual_seed(batch + group + position)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    q, k, v = random(batch, 1, (group + 2) * kv_heads * d).split([n * kv_heads * d for n in (group, 1, 1)], -1)
    angle = 6 * torch.rand(batch, 1, d, generator=generator)
    first = torch.tensor([0, 3][:batch]).clamp(max=position)
    return {
        "q": q, "k": k, "v": v, "cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype),
        "keys": random(batch, kv_heads, capacity, d), "values": random(batch, kv_heads, capacity, d),
        "position": torch.tensor([position]), "first": first,
    }  # fmt: skip


def test_plain_operations_are_softmax_attention_over_what_is_seen() -> None:
    """Against torch's attention over the places that are seen, with every query head's keys repeated."""
    given = problem(2, 2, 4, 64, 20, torch.float32)
    window = 9
    keys, values = given["keys"].clone(), given["values"].clone()
    out = plain_decode_attention(**given, scale=0.3, window=window)
    new_k, new_v = given["keys"][:, :, 20], given["values"][:, :, 20]
    assert torch.equal(new_v, given["v"].view(2, 2, 16))
    half = torch.cat((-given["k"].view(2, 2, 16)[..., 8:], given["k"].view(2, 2, 16)[..., :8]), -1)
    assert torch.allclose(new_k, given["k"].view(2, 2, 16) * given["cos"] + half * given["sin"], atol=1e-6)
    others = torch.arange(64) != 20
    assert torch.equal(given["keys"][:, :, others], keys[:, :, others])
    q = given["q"].view(2, 8, 16)
    q = q * given["cos"] + torch.cat((-q[..., 8:], q[..., :8]), -1) * given["sin"]
    for row in range(2):
        seen = range(max(int(given["first"][row]), 21 - window), 21)
        k, v = (given[name][row, :, list(seen)].repeat_interleave(4, 0) for name in ("keys", "values"))
        expected = torch.nn.functional.scaled_dot_product_attention(q[row, :, None], k, v, scale=0.3)
        assert torch.allclose(out[row, 0], expected.flatten(), atol=1e-5)
    assert not torch.equal(values, given["values"])


if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernel_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

    @pytest.mark.parametrize(("arch", "kv_heads", "group"), [(80, 8, 4), (89, 8, 4), (90, 8, 4), (90, 32, 1)])
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_kernel_compiled_ahead_of_time(dtype: torch.dtype, kv_heads: int, group: int, arch: int) -> None:
        """Nothing spills, shared memory fits, keys and values are loaded 16 bytes at a time."""
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from cats.generation.triton_attention import constants_of, decode_attention_kernel

        constants, options = constants_of(kv_heads, group, 128, 512, dtype.itemsize, arch >= 90)
        named = {"position_ptr": "*i64", "first_ptr": "*i64", "partial_ptr": "*fp32", "stats_ptr": "*fp32"}
        named |= {"arrived_ptr": "*i32", "scale": "fp32"}
        pointer = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[dtype]
        signature, attributes = {}, {}
        for index, name in enumerate(decode_attention_kernel.arg_names):
            kind = "constexpr" if name in constants else named.get(name, pointer if name.endswith("_ptr") else "i32")
            signature[name] = kind
            if kind != "constexpr" and name not in ("scale", "window"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(decode_attention_kernel, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
            Path(binary.name).write_bytes(kernel.asm["cubin"])
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", binary.name]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        used = dict(re.findall(r"(STACK|LOCAL):(\d+)", output))
        assert used == {"STACK": "0", "LOCAL": "0"}
        assert kernel.metadata.shared <= 99 * 1024  # a block's on sm_89
        wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[.*?\], \[.*?\], 0x10", kernel.asm["ptx"]))
        assert wide >= 4

else:
    CASES = [(shape, *place) for shape in SHAPES for place in ((128, 0), (128, 64), (256, 255))]

    @pytest.mark.parametrize("dtype", list(DTYPES))
    @pytest.mark.parametrize(("shape", "capacity", "position"), [*CASES, (SHAPES[0], 4096, 300)])
    def test_matches_plain_operations(shape: tuple, capacity: int, position: int, dtype: torch.dtype) -> None:
        from cats.generation.triton_attention import decode_attention_triton

        for window in (0, 5):
            given = problem(*shape, capacity, position, dtype)
            exact = {n: t.clone().float() if t.is_floating_point() else t for n, t in given.items()}
            expected = plain_decode_attention(**exact, scale=0.25, window=window)
            arrived = torch.zeros(64, dtype=torch.int32)
            out = decode_attention_triton(**given, arrived=arrived, scale=0.25, window=window)
            assert out.shape == given["q"].shape and out.dtype == dtype
            assert float((out.float() - expected).norm() / expected.norm()) < DTYPES[dtype]
            for name in ("keys", "values"):
                assert torch.allclose(given[name].float(), exact[name], rtol=DTYPES[dtype], atol=1e-6)
            assert not arrived.any()  # ready for the next call

    def test_what_lies_beyond_the_token_or_before_the_first_is_not_read() -> None:
        from cats.generation.triton_attention import decode_attention_triton

        given = problem(2, 2, 4, 256, 100, torch.float32)
        for name, splits in itertools.product(("keys", "values"), (slice(101, None), slice(0, 0))):
            given[name][:, :, splits] = torch.nan
        given["keys"][1, :, :3] = torch.inf
        arrived = torch.zeros(64, dtype=torch.int32)
        assert decode_attention_triton(**given, arrived=arrived, scale=0.25, window=0).isfinite().all()
