"""The Triton kernels through Triton's interpreter, on the CPU, against the float64 reference.

Triton decides at import whether to interpret, so outside TRITON_INTERPRET=1 this file runs itself in a subprocess.
Run: ``TRITON_INTERPRET=1 python -m pytest tests/test_triton_interpret.py``
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":

    @pytest.mark.slow
    def test_kernels_in_the_interpreter():
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
        done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

else:
    import triton
    import triton.language as tl
    from cats_kernels import MAX_ROWS, dispatch, sparse_gated_mlp
    from cats_kernels.ablation import triton as paper
    from cats_kernels.ablation.triton import VARIANTS, launch, launch_counted
    from cats_kernels.problem import TOLERANCE, oracle, relative_error
    from cats_kernels.triton import kernels
    from cats_kernels.triton.configs import TENSOR_CORES, Config
    from cats_kernels.triton.mlp import dense_masked, sparse_gated_mlp_triton
    from hypothesis import given, settings
    from hypothesis import strategies as st

    from tests.triton_cases import ACTIVATIONS, DTYPES, Case, case, tie_case

    KINDS = [(kind, decider) for kind in ("number", "one", "vector") for decider in ("gate", "up")]

    def check(variant: str, problem: Case, config: Config | None = None) -> None:
        y, x = launch(variant, *problem, config=config), problem[0]
        assert y.shape == x.shape and y.dtype == x.dtype
        error = relative_error(y, oracle(*problem))
        assert error < TOLERANCE[x.dtype], f"{variant}: {error:.2e}"

    @contextmanager
    def no_host_read() -> Iterator[None]:
        """No value of a tensor becomes one of Python's, for which a GPU's host would wait."""

        def refuse(*_):
            raise RuntimeError("a value of a tensor is read")

        with pytest.MonkeyPatch.context() as patch:
            for name in ("item", "tolist", "__float__", "__int__", "__bool__"):
                patch.setattr(torch.Tensor, name, refuse)
            yield

    @pytest.mark.parametrize("kind", ["number", "one", "vector"])
    @pytest.mark.parametrize("backend", ["triton", "reference"])
    @pytest.mark.parametrize("rows", [1, 2, 8])
    def test_no_threshold_is_read_by_the_host(kind: str, backend: str, rows: int):
        x, *weights, threshold, activation, decider = case(rows, 48, 77, torch.float32, 0.5, kind=kind)
        tensor = torch.full((), 0.1)
        with no_host_read():
            for read in (float, bool, torch.Tensor.item):
                with pytest.raises(RuntimeError, match="is read"):
                    read(tensor)
            y = sparse_gated_mlp(x, *weights, threshold, activation, backend, decider)
            again = torch.ops.cats.sparse_gated_mlp(x, *weights, tensor, activation, backend, decider)
        for result, value in ((y, threshold), (again, 0.1)):
            assert relative_error(result, oracle(x, *weights, value, activation, decider)) < 1e-5

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 3, 8])
    def test_matches_the_float64_reference(variant: str, dtype: torch.dtype, rows: int):
        check(variant, case(rows, 48, 77, dtype, 0.6, ACTIVATIONS[rows % 2]))

    @pytest.mark.parametrize(("kind", "decider"), KINDS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rows", [1, 2, 5])
    def test_thresholds_of_every_kind_and_both_deciders(kind: str, decider: str, dtype: torch.dtype, rows: int):
        problem = case(rows, 48, 77, dtype, 0.6, ACTIVATIONS[rows % 2], kind=kind, decider=decider)
        check("cats", problem)
        # dense_masked compares a product that was rounded to the dtype, so only float32 is clear of rounding
        if dtype == torch.float32:
            assert relative_error(dense_masked(*problem), oracle(*problem)) < 1e-5

    @pytest.mark.parametrize("decider", ["gate", "up"])
    @pytest.mark.parametrize("rows", [1, 3])
    def test_a_vector_is_one_threshold_per_neuron(decider: str, rows: int):
        """Neuron j has threshold 0 or infinity: what is kept is known from the vector alone."""
        x, gate, up, down_t, *_ = case(rows, 32, 50, torch.float32, 0.5)
        vector = torch.zeros(50)
        vector[::3] = float("inf")
        for call in (dense_masked, sparse_gated_mlp_triton):
            y = call(x, gate, up, down_t, vector, "silu", decider)
            keep = vector == 0
            dense = oracle(x, gate[keep], up[keep], down_t[keep], 0.0)
            assert relative_error(y, dense) < 1e-5

    @pytest.mark.parametrize("decider", ["gate", "up"])
    @pytest.mark.parametrize("kind", ["one", "vector"])
    def test_a_tensor_of_the_same_number_gives_the_same_bits(decider: str, kind: str):
        for rows in (1, 2, 5):
            x, gate, up, down_t, number, *_ = case(rows, 48, 77, torch.float32, 0.5, decider=decider)
            tensor = torch.tensor(number) if kind == "one" else torch.full((77,), number)
            for call in (dense_masked, sparse_gated_mlp_triton):
                outputs = [call(x, gate, up, down_t, t, "silu", decider) for t in (number, tensor)]
                assert torch.equal(*outputs)

    @pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "cats"])
    def test_the_papers_kernels_say_what_they_do_not_take(variant: str):
        for options in ({"kind": "vector"}, {"kind": "one"}, {"decider": "up"}):
            with pytest.raises(ValueError, match="take one number as threshold and decider 'gate'"):
                launch(variant, *case(1, 8, 8, torch.float32, 0.5, **options))

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
            early=data.draw(st.booleans()),
        )
        if data.draw(st.booleans()):
            config = replace(TENSOR_CORES, gate_tile=data.draw(st.sampled_from((16, 64))), columns=64, down_block=64)
        kind, decider = data.draw(st.sampled_from(KINDS))
        seed = data.draw(st.integers(0, 99))
        check("cats", case(rows, d, m, dtype, sparsity, activation, seed, kind=kind, decider=decider), config)

    @pytest.mark.parametrize(
        ("rows", "d"), [(5, 1100), (3, 1100), (1, 4100), (1, 8200)], ids=["chunks", "four", "wide", "split"]
    )
    def test_widths_over_one_block(rows: int, d: int):
        for variant in ("cats", "fused-mask"):
            problem = case(rows, d, 5, torch.float32, 0.5)
            assert oracle(*problem).norm() > 0
            check(variant, problem)

    def test_long_runs_of_dropped_neurons():
        """Active neurons far apart: where the up kernel divides them, a share spans several chunks of words."""
        x, gate, up, down_t, *_ = case(1, 16, 620, torch.float32, 0.0)
        gate[3:300] = 0
        gate[302:612] = 0
        for config in (Config(16, 2, warps=4, programs=2), replace(TENSOR_CORES, gate_tile=16, programs=2)):
            check("cats", (x, gate, up, down_t, 1e-4, "silu", "gate"), config)

    def check_ties(variant: str, decider: str = "gate", kind: str = "number") -> None:
        for (x, gate, up, down_t, threshold, *options), expected in zip(
            tie_case(decider=decider), (16384, 0), strict=True
        ):
            given = {"number": threshold, "one": torch.tensor(threshold), "vector": torch.full((24,), threshold)}[kind]
            assert (launch(variant, x, gate, up, down_t, given, *options) == expected).all()

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_ties_are_kept_and_the_next_float_drops_them(variant: str):
        check_ties(variant)

    @pytest.mark.parametrize(("kind", "decider"), KINDS)
    def test_ties_with_every_kind_of_threshold(kind: str, decider: str):
        check_ties("cats", decider, kind)

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_inputs_come_out_as_in_the_reference(variant: str, value: float):
        check_non_finite(variant, case(3, 24, 30, torch.float32, 0.5), value)

    @pytest.mark.parametrize(("kind", "decider"), KINDS)
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite_inputs_with_every_kind_of_threshold(kind: str, decider: str, value: float):
        for rows in (2, 3):
            check_non_finite("cats", case(rows, 24, 30, torch.float32, 0.5, kind=kind, decider=decider), value)

    def check_non_finite(variant: str, problem: Case, value: float) -> None:
        x, *rest = problem
        x[0, 3] = value
        y, reference = launch(variant, x, *rest), oracle(x, *rest)
        assert torch.equal(y.isnan(), reference.isnan())
        assert torch.equal(y.isinf(), reference.isinf())
        assert relative_error(y[1:], reference[1:]) < 1e-5

    @pytest.mark.parametrize("decider", ["gate", "up"])
    def test_a_dropped_neuron_brings_in_no_infinity(decider: str):
        x, gate, up, down_t, threshold, *options = case(2, 16, 20, torch.float32, 0.5, decider=decider)
        deciding = torch.nn.functional.silu(x @ gate.T) if decider == "gate" else x @ up.T
        (up if decider == "gate" else gate)[(deciding.abs() < threshold).any(0)] = float("inf")
        reference = oracle(x, gate, up, down_t, threshold, *options)
        for variant in VARIANTS if decider == "gate" else ["cats"]:
            y = launch(variant, x, gate, up, down_t, threshold, *options)
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

    @pytest.mark.parametrize("sparsity", [0.0, 0.6, 1.0])
    def test_compacting_with_the_count_on_the_host(sparsity: float):
        problem = case(2, 48, 77, torch.float32, sparsity)
        assert relative_error(launch_counted(*problem), oracle(*problem)) < 1e-5

    def test_through_the_operator_with_leading_dimensions():
        x, *rest = case(6, 32, 40, torch.float32, 0.5)
        with torch.no_grad():
            y = sparse_gated_mlp(x.view(2, 3, 32), *rest[:-1], backend="triton", decider="gate")
        assert y.shape == (2, 3, 32)
        assert relative_error(y.view(6, 32), oracle(x, *rest)) < 1e-5

    def test_too_many_rows_are_refused():
        with pytest.raises(ValueError, match="9 rows; the Triton kernels take 1 to 8"):
            launch("cats", *case(9, 8, 8, torch.float32, 0.5))

    def test_more_rows_than_pay_take_dense_products(monkeypatch: pytest.MonkeyPatch):
        problem = case(9, 24, 30, torch.float32, 0.5)
        paths: list[str] = []
        implementations = [lambda *_: paths.append("sparse kernel"), lambda *_: paths.append("dense masked")]
        monkeypatch.setattr(dispatch, "_triton", lambda: implementations)
        for dtype in DTYPES:
            most = dispatch.SPARSE_ROWS["triton", dtype]
            for rows in (most, most + 1):
                VARIANTS["cats"](torch.ones(rows, 24, dtype=dtype), *problem[1:])
                assert paths[-1] == dispatch.path_of(rows, dtype, "cuda", "triton")
        assert paths == ["sparse kernel", "dense masked"] * 3

    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_the_dense_masked_path_agrees(activation: str):
        problem = case(9, 24, 30, torch.float32, 0.5, activation)
        assert relative_error(dense_masked(*problem), oracle(*problem)) < 1e-5

    @triton.jit
    def strictly_above(v, threshold):
        return tl.abs(v) > threshold

    @triton.jit
    def wrong_side(v, threshold):
        return tl.abs(v) < threshold

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("rule", [strictly_above, wrong_side])
    def test_these_checks_catch_a_wrong_mask(variant: str, rule: object, monkeypatch: pytest.MonkeyPatch):
        for module in (kernels, paper):
            monkeypatch.setattr(module, "kept", rule)
        with pytest.raises(AssertionError):
            check_ties(variant)

    def test_the_variants_are_the_four_of_the_ablation():
        assert list(VARIANTS) == ["gather", "fused-compact", "fused-mask", "cats"]
