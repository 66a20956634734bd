"""The decode attention kernel: in Triton's interpreter against plain operations, and compiled ahead of time.

Triton decides at import whether to interpret, so outside TRITON_INTERPRET=1 this file runs itself in a subprocess, too.
"""

import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

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

    def compile_ahead(
        arch: int, kv_heads: int, group: int, d: int, dtype: torch.dtype, config: Any
    ) -> tuple[Any, dict[str, int]]:
        """What a launch would run on that architecture, and its stack and local memory."""
        from cats_kernels.triton.launch import Target
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from cats.generation.triton_attention import constants_of, decode_attention_kernel

        target = Target(arch, 132, arch >= 90)
        constants, options = constants_of(kv_heads, kv_heads, group, d, dtype.itemsize, target, config)
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
        return kernel, {name: int(count) for name, count in re.findall(r"(STACK|LOCAL):(\d+)", output)}

    def check_compiled(arch: int, kv_heads: int, group: int, d: int, dtype: torch.dtype, config: Any) -> None:
        """Nothing spills, shared memory fits, keys and values are loaded 16 bytes at a time. In registers the threads
        of a program do not wait for each other while they read, and the first tile does not wait for the previous
        kernel, before whose end nothing is written. Below sm_90 there is no such waiting."""
        kernel, used = compile_ahead(arch, kv_heads, group, d, dtype, config)
        assert used == {"STACK": 0, "LOCAL": 0}
        assert kernel.metadata.shared <= 99 * 1024  # a block's on sm_89
        ptx = kernel.asm["ptx"]
        wide = len(re.findall(r"ld\.global\S*\.v4|cp\.async\S* \[.*?\], \[.*?\], 0x10", ptx))
        assert wide >= 4
        reading = [loop for loop in loops(ptx) if re.search(r"ld\.global\.(?!cg)", loop)]  # .cg: partial sums
        assert config.dot or (reading and not any("bar.sync" in loop for loop in reading))
        before, *after = ptx.split("griddepcontrol.wait")
        assert len(after) == (arch >= 90)
        if after:
            assert ("ld.global.v4" in before) == (config.held and config.ahead)
            assert "st.global" not in before and "atom" not in before

    CHIPS_AND_HEADS = [(80, 8, 4), (80, 32, 1), (89, 2, 7), (89, 32, 1), (90, 8, 4), (90, 32, 1)]

    @pytest.mark.parametrize(("arch", "kv_heads", "group"), CHIPS_AND_HEADS)
    @pytest.mark.parametrize("dtype", list(DTYPES))
    def test_kernel_compiled_ahead_of_time(dtype: torch.dtype, kv_heads: int, group: int, arch: int) -> None:
        from cats.generation.triton_attention import choose_attention_config

        config = choose_attention_config(group, 128, dtype.itemsize)
        check_compiled(arch, kv_heads, group, 128, dtype, config)

    @pytest.mark.parametrize(("kv_heads", "group"), [(32, 1), (2, 7)])
    def test_heads_of_64_compiled_ahead_of_time(kv_heads: int, group: int) -> None:
        from cats.generation.triton_attention import choose_attention_config

        check_compiled(90, kv_heads, group, 64, torch.bfloat16, choose_attention_config(group, 64, 2))

    @pytest.mark.parametrize("group", [1, 4])
    def test_what_the_tuner_tries_beside_what_was_measured_compiles(group: int) -> None:
        from experiments.gpu.attention import CONFIGS, SHAPES

        kv_heads = {group: kv_heads for kv_heads, group in SHAPES.values()}[group]
        candidates = [config for config in CONFIGS[group] if config.together or (config.dot and config.held)]
        assert candidates
        for config in candidates:
            check_compiled(90, kv_heads, group, 128, torch.bfloat16, config)

    def test_the_chosen_configurations_are_those_that_were_measured_fastest() -> None:
        """Over the positions of the committed measurement, of those that the kernel can take."""
        from cats.generation.triton_attention import AttentionConfig, choose_attention_config
        from experiments.gpu.attention import SHAPES

        with (Path(__file__).parents[1] / "results/h100-profile/attention_gpu.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["implementation"] == "config"]
        for shape, (_, group) in SHAPES.items():
            ratios: dict[str, float] = {}
            own = [row for row in rows if row["shape"] == shape]
            for position in {row["position"] for row in own}:
                times = {row["config"]: float(row["p50_us"]) for row in own if row["position"] == position}
                for config, time in times.items():
                    ratios[config] = ratios.get(config, 0.0) + time / min(times.values())
            fastest = eval(min(ratios, key=ratios.get), {"AttentionConfig": AttentionConfig})
            assert choose_attention_config(group, 128, 2) == fastest

    def test_a_chip_without_dependent_launch_gets_none() -> None:
        from cats_kernels.triton.launch import Target

        from cats.generation.triton_attention import choose_attention_config, constants_of

        for arch in (80, 89, 90):
            config = choose_attention_config(1, 128, 2)
            constants, options = constants_of(32, 32, 1, 128, 2, Target(arch, 132, arch >= 90), config)
            assert constants["AHEAD"] and constants["PDL"] == (arch >= 90) == ("launch_pdl" in options)

    def loops(ptx: str) -> list[str]:
        """The code of every loop, from its label to the branch back to it."""
        labels = {match[1]: match.start() for match in re.finditer(r"^\s*(\$\w+):", ptx, re.MULTILINE)}
        branches = [(match[1], match.start()) for match in re.finditer(r"bra\S*\s+(\$\w+);", ptx)]
        return [ptx[labels[label] : end] for label, end in branches if labels.get(label, end) < end]

    def test_what_the_check_for_waiting_calls_a_loop() -> None:
        assert loops("$L0: a;\n$L1: bar.sync 0;\n@%p1 bra $L2;\n@%p2 bra $L1;\n$L2: ret;")[0].count("bar.sync") == 1

    @pytest.mark.parametrize(("heads", "expected"), [(8, 33), (32, 8), (256, 1), (1000, 1), (1, 64)])
    def test_splits_fill_the_chip_once(heads: int, expected: int) -> None:
        from cats_kernels.triton.launch import Target

        from cats.generation.triton_attention import AttentionConfig, count_splits

        assert count_splits(heads, AttentionConfig(32, programs=2), Target(90, 132, True)) == expected

else:
    from cats.generation.triton_attention import AttentionConfig

    # the interpreter's chip has two processors: so many programs make up to 12 splits
    CONFIGS = [
        AttentionConfig(tile=16, programs=12),
        AttentionConfig(tile=64, warps=8, programs=6, ahead=False),
        AttentionConfig(tile=32, programs=12, dot=True),
        AttentionConfig(tile=16, programs=12, together=True),
        AttentionConfig(tile=16, programs=12, dot=True, stages=1, together=True),
        AttentionConfig(tile=64, programs=12, dot=True, stages=1, ahead=False),
    ]
    CASES = [(shape, *place) for shape in SHAPES for place in ((128, 0), (128, 64), (256, 255))]

    @pytest.mark.parametrize("dtype", list(DTYPES))
    @pytest.mark.parametrize(
        ("shape", "capacity", "position", "config"),
        [
            *((*case, None) for case in CASES),
            *((shape, 256, 200, config) for shape in SHAPES[:2] for config in CONFIGS),
            *((SHAPES[2], 256, 200, config) for config in CONFIGS if config.together),
            *((SHAPES[1], 128, 0, config) for config in CONFIGS if config.together),
            (SHAPES[0], 4096, 300, CONFIGS[0]),
        ],
    )
    def test_matches_plain_operations(shape: tuple, capacity: int, position: int, dtype: torch.dtype, config) -> None:
        from cats.generation.triton_attention import decode_attention_triton

        for window in (0, 5, 70):
            given = problem(*shape, capacity, position, dtype)
            exact = {n: t.clone().float() if t.is_floating_point() else t for n, t in given.items()}
            expected = plain_decode_attention(**exact, scale=0.25, window=window)
            arrived = torch.zeros(64, dtype=torch.int32)
            out = decode_attention_triton(**given, arrived=arrived, scale=0.25, window=window, config=config)
            assert out.shape == given["q"].shape and out.dtype == dtype
            assert float((out.float() - expected).norm() / expected.norm()) < DTYPES[dtype]
            for name in ("keys", "values"):
                assert torch.allclose(given[name].float(), exact[name], rtol=DTYPES[dtype], atol=1e-6)
            assert not arrived.any()  # ready for the next call

    @pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[4]])
    def test_what_is_read_ahead_changes_nothing_where_kernels_run_one_after_another(config: AttentionConfig) -> None:
        """Token after token, each at the position after the last one's, whose key and value it reads."""
        from cats.generation.triton_attention import decode_attention_triton

        outs = []
        for ahead in (True, False):
            given = problem(1, 2, 4, 128, 62, torch.float32)
            arrived = torch.zeros(2, dtype=torch.int32)
            for _ in range(4):
                this = replace(config, ahead=ahead)
                outs.append(decode_attention_triton(**given, arrived=arrived, scale=0.25, window=0, config=this))
                given["position"].add_(1)
        assert all(torch.equal(early, late) for early, late in zip(outs[:4], outs[4:], strict=True))
        assert not torch.equal(outs[0], outs[1])

    @pytest.mark.parametrize("shape", [(2, 1), (1, 4)])
    def test_the_experiments_check_measures_an_error(shape: tuple[int, int], monkeypatch) -> None:
        """Small for the kernel, and not for a scale that is wrong."""
        from experiments.gpu import attention

        for config in (None, attention.CONFIGS[shape[1]][-1]):
            given = attention.problem(*shape, 70, torch.float32, "cpu", 0)
            arrived = torch.zeros(2, dtype=torch.int32)
            assert attention.error_of(given, arrived, config) < attention.TOLERANCE[torch.float32]
        given["q"] = given["q"] * 1.1
        expected = attention.exact(given)
        given["q"] = given["q"] / 1.2
        monkeypatch.setattr(attention, "exact", lambda _: expected)
        assert attention.error_of(given, arrived, None) > attention.TOLERANCE[torch.bfloat16]

    def test_what_lies_beyond_the_token_or_before_the_first_is_not_read() -> None:
        from cats.generation.triton_attention import decode_attention_triton

        given = problem(2, 2, 4, 256, 100, torch.float32)
        for name, splits in itertools.product(("keys", "values"), (slice(101, None), slice(0, 0))):
            given[name][:, :, splits] = torch.nan
        given["keys"][1, :, :3] = torch.inf
        arrived = torch.zeros(64, dtype=torch.int32)
        assert decode_attention_triton(**given, arrived=arrived, scale=0.25, window=0).isfinite().all()
