"""The Triton kernel for quantised weights through Triton's interpreter, on the CPU, against the float64 reference on
the dequantised weights.

Run: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_quantized_interpret.py``
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_the_kernel_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import triton
    import triton.language as tl
    from cats_kernels.problem import TOLERANCE, relative_error
    from cats_kernels.quantized import GROUP_SIZES, QuantizedWeight, dequantize, quantize
    from cats_kernels.triton import quantized_device, quantized_kernels, quantized_words
    from cats_kernels.triton.quantized import LIST, make_quantized_call, sparse_gated_mlp_quantized
    from cats_kernels.triton.quantized_configs import QuantizedConfig
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from tests.quantized_cases import FORMATS, KINDS, quantized_case, quantized_tie_case
    from tests.triton_cases import ACTIVATIONS, DTYPES

    SMALL = QuantizedConfig(4, 2, warps=4, programs=2)

    def error_of(case: tuple, config: QuantizedConfig | None = SMALL) -> float:
        problem, threshold = case
        y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold), config)
        assert y.shape == problem.x.shape and y.dtype == problem.x.dtype
        return problem.error(y, threshold)

    @pytest.mark.parametrize("form", FORMATS, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_matches_the_float64_reference(form: tuple, dtype: torch.dtype):
        for rows, activation in ((1, "silu"), (2, "gelu_tanh")):
            assert error_of(quantized_case(rows, 77, 21, form, dtype, 0.6, activation)) < TOLERANCE[dtype]

    @pytest.mark.parametrize(("kind", "decider"), KINDS)
    def test_thresholds_of_every_kind_and_both_deciders(kind: str, decider: str):
        for form in FORMATS[::3]:
            case = quantized_case(2, 64, 19, form, torch.float32, 0.5, kind=kind, decider=decider)
            assert error_of(case) < 1e-5

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_shape_group_and_configuration(data: st.DataObject):
        rows, d, m = (data.draw(st.integers(1, most)) for most in (8, 300, 30))
        bits = data.draw(st.sampled_from((8, 4)))
        group = data.draw(st.sampled_from(GROUP_SIZES if bits == 4 else (*GROUP_SIZES, None)))
        form = bits, group, data.draw(st.booleans())
        dtype, activation = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ACTIVATIONS))
        config = QuantizedConfig(
            gate_tile=data.draw(st.sampled_from((1, 4, 8))),
            tile=data.draw(st.sampled_from((1, 2, 8))),
            warps=4,
            programs=data.draw(st.integers(1, 3)),
            words=data.draw(st.booleans()),
            paired=data.draw(st.booleans()),
            chunk=data.draw(st.sampled_from((0, 1, 16))),
        )
        kind, decider = data.draw(st.sampled_from(KINDS))
        sparsity = data.draw(st.sampled_from((0.0, 0.5, 0.9, 1.0)))
        case = quantized_case(rows, d, m, form, dtype, sparsity, activation, kind=kind, decider=decider)
        assert error_of(case, config) < TOLERANCE[dtype]

    @pytest.mark.parametrize("scales", [torch.float16, torch.bfloat16])
    def test_scales_of_another_dtype(scales: torch.dtype):
        """As llama.cpp's blocks have them: float16, whatever the dtype of x."""
        problem, threshold = quantized_case(1, 64, 20, (4, 32, True), torch.float32, 0.5)
        weights = [quantize(weight, 4, 32, scale_dtype=scales) for weight in problem.original]
        problem.requantize(*weights)
        threshold = problem.threshold(0.5)
        assert error_of((problem, threshold)) < 1e-5

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("decider", ["gate", "up"])
    def test_ties_are_kept_and_the_next_float_drops_them(bits: int, decider: str):
        for arguments, expected in zip(quantized_tie_case(bits, decider), (16384, 0), strict=True):
            assert (sparse_gated_mlp_quantized(*arguments) == expected).all()

    @triton.jit
    def wrong_side(v, threshold):
        return tl.abs(v) < threshold

    def test_the_check_of_ties_catches_a_wrong_mask(monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(quantized_kernels, "kept", wrong_side)
        with pytest.raises(AssertionError):
            test_ties_are_kept_and_the_next_float_drops_them(4, "gate")

    @triton.jit
    def swapped(w, high_bits):
        return (w.to(tl.int32) & 0x0F).to(tl.float32) - 8.0

    @triton.jit
    def next_byte(word, BYTE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
        return ((word >> (8 * ((BYTE + 1) % 4)) & 0xFF) << 16 | 0x43000000).to(tl.float32, bitcast=True)

    @triton.jit
    def first_byte_only(a, b, sums, BITS: tl.constexpr, ASM: tl.constexpr):
        return sums + (a << 24 >> 24) * (b << 24 >> 24)

    @pytest.mark.parametrize(
        ("module", "name", "wrong", "dtype"),
        [
            (quantized_device, "high_values", swapped, torch.float32),
            (quantized_words, "byte_value", next_byte, torch.bfloat16),
            (quantized_words, "dot_bytes", first_byte_only, torch.bfloat16),
        ],
        ids=["nibbles", "bytes of sums", "bytes of products"],
    )
    def test_the_check_of_values_catches_wrong_bytes(
        module: object, name: str, wrong: object, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ):
        case = quantized_case(1, 64, 20, (4, 32, True), dtype, 0.5)
        assert error_of(case) < TOLERANCE[dtype]
        monkeypatch.setattr(module, name, wrong)
        assert error_of(case) > 0.1

    @triton.jit
    def product_kernel(x_ptr, w_ptr, z_ptr, BITS: tl.constexpr, ROW_BYTES: tl.constexpr, D: tl.constexpr):
        chunks: tl.constexpr = ROW_BYTES // 16
        x = quantized_words.load_fixed(x_ptr, 1, 1, D, BITS, 32, 16, chunks)
        row = tl.arange(0, 4)
        w = quantized_device.load_packed(w_ptr, row, row < 4, ROW_BYTES, 16, chunks, True)
        scale = tl.full([1, 4, chunks, 1], 1.0, tl.float32)
        z = quantized_words.dot_words(x, w, scale, scale, BITS, False, False)
        tl.store(z_ptr + row[None, :], z)

    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_small_numbers_beside_a_large_one_in_their_chunk(bits: int, dtype: torch.dtype):
        """Exact where they are multiples of 2^-13 of its power of two, else rounded by half of that at most."""
        torch.manual_seed(0)
        weight = quantize(torch.randn(4, 64), bits, 32)
        q = dequantize(replace(weight, scales=torch.ones_like(weight.scales))).double()
        exact = torch.randint(-16, 17, (64,)) * 2.0**-13
        between = torch.rand(64) * 2.0**-9
        for small, error in ((exact, 0.0), (between, 2.0**-14)):
            x = small.to(dtype)
            x[::8] = 1.9921875  # the largest of its power of two in bfloat16
            z = torch.empty(4)
            product_kernel[(1,)](x, weight.data.view(torch.uint8), z, bits, weight.data.shape[1], 64)
            difference = (z.double() - q @ x.double()).abs()
            assert (difference <= error * q.abs().sum(1)).all()
            assert bool(error) == bool(difference.any())

    @pytest.mark.parametrize("rows", [1, 2])
    def test_a_program_of_more_neurons_than_are_listed_at_a_time(rows: int):
        config = QuantizedConfig(4, 1, warps=4, programs=1, chunk=16)
        for kind in ("one", "vector"):
            case = quantized_case(rows, 64, 3 * 2 * LIST - 5, (4, 32, True), torch.bfloat16, 0.5, kind=kind)
            assert error_of(case, config) < TOLERANCE[torch.bfloat16]

    def test_words_are_taken_where_rows_and_addresses_have_them():
        def has_words(d: int, dtype: torch.dtype, offset: int = 0, group: int | None = None, **options: bool) -> bool:
            problem, _ = quantized_case(1, d, 8, (8, group, True), dtype, 0.5)
            call = make_quantized_call(*problem.quantized_arguments(0.5))
            room = torch.empty(8 * d + 4, dtype=torch.uint8)[offset : offset + 8 * d].view(8, d)
            return replace(call, up_weight=room).has_words(QuantizedConfig(1, 1, warps=4, programs=1, **options))

        assert (
            has_words(64, torch.bfloat16) and has_words(64, torch.float16) and has_words(68, torch.bfloat16, group=32)
        )
        assert not has_words(64, torch.float32) and not has_words(66, torch.bfloat16, group=32)
        assert not has_words(66, torch.bfloat16) and not has_words(64, torch.bfloat16, offset=1)
        assert not has_words(64, torch.bfloat16, words=False)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("form", FORMATS[::3], ids=str)
    def test_words_of_numbers_that_are_not_finite_give_nan(form: tuple, value: float):
        """Integers have no infinity: where the reference has one or NaN, NaN comes out; other rows are untouched."""
        problem, threshold = quantized_case(2, 64, 20, form, torch.bfloat16, 0.5)
        problem.x[0, 3] = value
        assert not problem.oracle(threshold)[0].isfinite().any()
        y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
        assert y[0].isnan().all() and relative_error(y[1:], problem.oracle(threshold)[1:]) < TOLERANCE[torch.bfloat16]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("form", FORMATS[::3], ids=str)
    def test_non_finite_inputs_come_out_as_in_the_reference(form: tuple, value: float):
        problem, threshold = quantized_case(2, 64, 20, form, torch.float32, 0.5)
        problem.x[0, 3] = value
        expected = problem.oracle(threshold)
        y = sparse_gated_mlp_quantized(*problem.quantized_arguments(threshold))
        assert torch.equal(y.isnan(), expected.isnan())
        assert relative_error(y[1:], expected[1:]) < 1e-5

    def test_poisoned_buffers_are_overwritten(monkeypatch: pytest.MonkeyPatch):
        case = quantized_case(2, 64, 20, (4, 32, True), torch.float16, 0.5)
        clean = torch.empty

        def poisoned(*size: object, **options: object) -> torch.Tensor:
            tensor = clean(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**31 - 1)

        monkeypatch.setattr(torch, "empty", poisoned)
        assert error_of(case) < TOLERANCE[torch.float16]

    def test_what_is_refused():
        problem, threshold = quantized_case(1, 64, 20, (4, 32, True), torch.float32, 0.5)
        x, gate, up, down, *rest = problem.quantized_arguments(threshold)
        with pytest.raises(ValueError, match="9 rows; the Triton kernels take 1 to 8"):
            sparse_gated_mlp_quantized(x.expand(9, -1), gate, up, down, *rest)
        with_zeros = QuantizedWeight(up.data, up.scales, up.scales, 4, 32, 64)
        of_half = QuantizedWeight(up.data, up.scales.half(), None, 4, 32, 64)
        for other in (with_zeros, of_half):
            with pytest.raises(ValueError, match="different formats"):
                sparse_gated_mlp_quantized(x, gate, other, down, *rest)

    def test_leading_dimensions():
        problem, threshold = quantized_case(6, 64, 20, (8, None, True), torch.float32, 0.5)
        x, *rest = problem.quantized_arguments(threshold)
        y = sparse_gated_mlp_quantized(x.view(2, 3, 64), *rest)
        assert y.shape == (2, 3, 64) and problem.error(y.view(6, 64), threshold) < 1e-5
