"""The Triton kernels through Triton's interpreter, on the CPU, against the float64 reference.

Triton decides at import whether to interpret, so outside TRITON_INTERPRET=1 this file runs itself in a subprocess.
Run: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_interpret.py``
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    def test_kernels_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import triton
    import triton.language as tl
    from cats_kernels import sparse_gated_mlp, triton_kernels, triton_mlp, triton_paper
    from cats_kernels.triton_mlp import MAX_ROWS, SPARSE_ROWS, TENSOR_CORES, VARIANTS, Config, dense_masked, launch
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from tests.triton_cases import ACTIVATIONS, DTYPES, TOLERANCE, Case, case, expected, relative_error, tie_case

    def check(variant: str, problem: Case, config: Config | None = None) -> None:
        y, x = launch(variant, *problem, config=config), problem[0]
        assert y.shape == x.shape and y.dtype == x.dtype
        error = relative_error(y, expected(*problem))
        assert error < TOLERANCE[x.dtype], f"{variant}: {error:.2e}"

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 3, 8])
    def test_matches_the_float64_reference(variant: str, dtype: torch.dtype, rows: int):
        check(variant, case(rows, 48, 77, dtype, 0.6, ACTIVATIONS[rows % 2]))

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rows", [1, 4])
    @pytest.mark.parametrize("sparsity", [0.0, 1.0])
    def test_nothing_and_everything_dropped(variant: str, rows: int, sparsity: float):
        problem = case(rows, 32, 40, torch.float32, sparsity)
        check(variant, problem)
        assert (launch(variant, *problem).abs().max() == 0) == (sparsity == 1)

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(data=st.data())
    def test_any_shape_and_configuration(data: st.DataObject):
        rows = data.draw(st.integers(1, MAX_ROWS))
        d, m = data.draw(st.integers(1, 150)), data.draw(st.integers(1, 150))
        dtype, activation = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(ACTIVATIONS))
        sparsity = data.draw(st.sampled_from((0.0, 0.3, 0.5, 0.9, 0.97, 1.0)))
        config = Config(
            gate_tile=data.draw(st.sampled_from((1, 2, 8, 16))),
            tile=data.draw(st.sampled_from((1, 2, 8))),
            warps=4,
            programs=data.draw(st.integers(1, 4)),
            parts=data.draw(st.sampled_from((1, 2, 5))),
        )
        if data.draw(st.booleans()):
            config = replace(TENSOR_CORES, gate_tile=data.draw(st.sampled_from((16, 64))), columns=64, down_block=64)
        check("cats", case(rows, d, m, dtype, sparsity, activation, seed=data.draw(st.integers(0, 99))), config)

    @pytest.mark.parametrize(("rows", "d"), [(3, 1100), (1, 4100), (1, 8200)], ids=["chunks", "wide", "split"])
    def test_widths_over_one_block(rows: int, d: int):
        for variant in ("cats", "fused-mask"):
            problem = case(rows, d, 5, torch.float32, 0.5)
            assert expected(*problem).norm() > 0
            check(variant, problem)

    def test_long_runs_of_dropped_neurons():
        """Active neurons far apart: where the up kernel divides them, a share spans several chunks of words."""
        x, gate, up, down_t, _, activation = case(1, 16, 620, torch.float32, 0.0)
        gate[3:300] = 0
        gate[302:612] = 0
        for config in (Config(16, 2, warps=4, programs=2), replace(TENSOR_CORES, gate_tile=16, programs=2)):
            check("cats", (x, gate, up, down_t, 1e-4, activation), config)

    def check_ties(variant: str) -> None:
        kept, dropped = tie_case()
        assert (launch(variant, *kept) == 16384).all()
        assert (launch(variant, *dropped) == 0).all()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_ties_are_kept_and_the_next_float_drops_them(variant: str):
        check_ties(variant)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_inputs_come_out_as_in_the_reference(variant: str, value: float):
        x, *rest = case(3, 24, 30, torch.float32, 0.5)
        x[0, 3] = value
        y, reference = launch(variant, x, *rest), expected(x, *rest)
        assert torch.equal(y.isnan(), reference.isnan())
        assert torch.equal(y.isinf(), reference.isinf())
        assert relative_error(y[1:], reference[1:]) < 1e-5

    def test_a_dropped_neuron_brings_in_no_infinity():
        x, gate, up, *rest = case(2, 16, 20, torch.float32, 0.5)
        v = torch.nn.functional.silu(x @ gate.T).abs()
        up[(v < rest[1]).any(0)] = float("inf")
        reference = expected(x, gate, up, *rest)
        for variant in VARIANTS:
            y = launch(variant, x, gate, up, *rest)
            assert torch.equal(y.isfinite(), reference.isfinite())

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rows", [1, 4])
    def test_poisoned_buffers_are_overwritten(variant: str, rows: int, monkeypatch: pytest.MonkeyPatch):
        clean = torch.empty

        def poisoned(*size: object, **options: object) -> torch.Tensor:
            tensor = clean(*size, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**31 - 1)

        monkeypatch.setattr(torch, "empty", poisoned)
        monkeypatch.setattr(torch, "empty_like", lambda tensor: poisoned(tensor.shape, dtype=tensor.dtype))
        problem = case(rows, 40, 50, torch.float16, 0.5)
        check(variant, problem)

    @pytest.mark.parametrize("variant", ["cats", "fused-mask"])
    def test_two_runs_agree_bit_for_bit(variant: str):
        problem = case(2, 64, 90, torch.float32, 0.5)
        assert torch.equal(launch(variant, *problem), launch(variant, *problem))

    def test_through_the_operator_with_leading_dimensions():
        x, *rest = case(6, 32, 40, torch.float32, 0.5)
        with torch.no_grad():
            y = sparse_gated_mlp(x.view(2, 3, 32), *rest, backend="triton")
        assert y.shape == (2, 3, 32)
        assert relative_error(y.view(6, 32), expected(x, *rest)) < 1e-5

    def test_too_many_rows_are_refused():
        with pytest.raises(ValueError, match="9 rows; the Triton kernels take 1 to 8"):
            launch("cats", *case(9, 8, 8, torch.float32, 0.5))

    def test_more_rows_than_pay_take_dense_products(monkeypatch: pytest.MonkeyPatch):
        problem = case(9, 24, 30, torch.float32, 0.5)
        taken = []
        monkeypatch.setattr(triton_mlp, "launch", lambda *_: taken.append("sparse"))
        monkeypatch.setattr(triton_mlp, "dense_masked", lambda *_: taken.append("dense"))
        for size, dtype in ((2, torch.bfloat16), (4, torch.float32)):
            for rows in (SPARSE_ROWS[size], SPARSE_ROWS[size] + 1):
                VARIANTS["cats"](torch.ones(rows, 24, dtype=dtype), *problem[1:])
        assert taken == ["sparse", "dense"] * 2

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_the_dense_masked_path_agrees(activation: str):
        problem = case(9, 24, 30, torch.float32, 0.5, activation)
        assert relative_error(dense_masked(*problem), expected(*problem)) < 1e-5

    @triton.jit
    def strictly_above(v, threshold):
        return tl.abs(v) > threshold

    @triton.jit
    def wrong_side(v, threshold):
        return tl.abs(v) < threshold

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rule", [strictly_above, wrong_side])
    def test_these_checks_catch_a_wrong_mask(variant: str, rule: object, monkeypatch: pytest.MonkeyPatch):
        for module in (triton_kernels, triton_paper):
            monkeypatch.setattr(module, "kept", rule)
        with pytest.raises(AssertionError):
            check_ties(variant)

    def test_the_variants_are_the_four_of_the_ablation():
        assert list(triton_mlp.VARIANTS) == ["gather", "fused-compact", "fused-mask", "cats"]
