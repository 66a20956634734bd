"""The format of quantised weights: how values are rounded, packed and read, and what is refused."""

import itertools

import numpy as np
import pytest
import torch
from cats_kernels import QuantizedWeight, dequantize, quantize
from cats_kernels.quantized import BITS, GROUP_SIZES, from_ggml_blocks, pack
from hypothesis import example, given, settings
from hypothesis import strategies as st

FORMATS = [(8, None), *itertools.product(BITS, GROUP_SIZES)]
"""(bits, group size), all there are."""


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 600),
    m=st.integers(1, 20),
    form=st.sampled_from(FORMATS),
    symmetric=st.booleans(),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-2, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
@example(1, 1, (8, None), True, 0.001, 0.0, torch.float16, 541)
def test_rounding_is_to_the_nearest_value_of_the_grid(d, m, form, symmetric, scale, shift, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = (scale * (torch.randn(m, d, generator=generator) + shift)).to(dtype)
    made = quantize(weight, *form, symmetric=symmetric)
    bits, group = made.bits, made.group_size
    assert made.shape == (m, d) and made.scales.dtype == dtype and (made.zeros is None) == symmetric
    error = (dequantize(made) - weight.float()).abs()
    each = lambda side: side.float().repeat_interleave(group, 1)[:, :d]  # noqa: E731
    step = each(made.scales).abs()
    size = weight.float().abs().amax(1, keepdim=True)
    if symmetric and bits == 4:  # the extreme of the other sign has a step less
        inside = weight.float() / torch.where(step == 0, 1, each(made.scales)) < 7.5
    else:
        inside = torch.ones_like(weight, dtype=torch.bool)
    slack = size * 2**-7 if dtype == torch.bfloat16 else size * 2**-9
    if dtype == torch.float16:  # of small weights scale and zero point are subnormal: 128 steps off by 2^-25 each
        slack = slack + 129 * 2**-25
    assert (error[inside] <= (step / 2 + slack)[inside]).all()
    assert (error <= step + slack).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_are_rounded_to_the_grid_of_the_scales_as_stored(symmetric):
    """A bfloat16 scale is up to 0.4 % off, which at 127 steps is half a step."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    made = quantize(weight, 8, symmetric=symmetric, scale_dtype=torch.bfloat16)
    scale = made.scales.float()
    zero = torch.zeros_like(scale) if made.zeros is None else made.zeros.float()
    steps = (weight - zero) / scale
    on_grid = (steps > -127.5) & (steps < 127.5)
    assert on_grid.float().mean() > 0.99
    assert ((dequantize(made) - weight).abs() <= 0.501 * scale)[on_grid].all()


def test_values_by_hand():
    weight = torch.tensor([[-8.0, 7.0, 0.0, 3.4] + [0.0] * 12 + [1.0, -1.0] + [0.0] * 14])
    made = quantize(weight, 4, 32)
    assert made.scales.tolist() == [[1.0]]
    assert made.data[0, :4].tolist() == [0 | 9 << 4, 15 | 7 << 4, 8 | 8 << 4, 11 | 8 << 4]
    assert dequantize(made)[0, :4].tolist() == [-8.0, 7.0, 0.0, 3.0]
    ragged = quantize(torch.full((1, 5), 2.0), 4, 32)
    assert ragged.data[0].tolist() == [0 | 8 << 4] * 5 + [8 | 8 << 4] * 11  # -8 times the scale of -1/4
    assert dequantize(ragged).tolist() == [[2.0] * 5]
    assert dequantize(quantize(torch.zeros(2, 40), 4, 32)).eq(0).all()
    assert dequantize(quantize(torch.full((1, 40), 3.0), 8, 32, symmetric=False)).eq(3).all()


@pytest.mark.parametrize("group", GROUP_SIZES)
def test_pack_is_the_layout_of_q4_0(group):
    nibbles = torch.randint(0, 16, (3, 2 * group))
    data = pack(nibbles, group)
    assert data.shape == (3, group)
    for j in range(group // 2):
        assert torch.equal(data[:, j], (nibbles[:, j] + 16 * nibbles[:, j + group // 2]).to(torch.uint8))


def test_what_is_not_a_format():
    weight = torch.randn(4, 64)
    made = quantize(weight, 4, 32)
    data, scales, _ = made.tensors
    cases: list[tuple[type[Exception], str, object]] = [
        (ValueError, "bits is 3; allowed: 8 or 4", lambda: quantize(weight, 3)),
        (ValueError, "group_size is 48; allowed: 32, 64, 128, 256", lambda: quantize(weight, 4, 48)),
        (ValueError, "group_size is 60; .* or d = 64, one group per row", lambda: quantize(weight, 8, 60)),
        (ValueError, "weight has NaN or infinity", lambda: quantize(weight / 0, 4)),
        (TypeError, "weight is torch.int64", lambda: quantize(weight.long(), 4)),
        (ValueError, r"weight is \(64,\)", lambda: quantize(weight[0], 4)),
        (
            ValueError,
            "too large for scales of torch.float16",
            lambda: quantize(1e9 * weight, 8, scale_dtype=torch.half),
        ),
        (TypeError, "data is torch.uint8; with 8 bits it must be torch.int8", lambda: _made(data, scales, bits=8)),
        (ValueError, r"data is \(4, 32\); it must be \(m, 48\) for d = 96", lambda: _made(data, scales, d=96)),
        (ValueError, r"scales are \(4, 1\); they must be \(m, groups\)", lambda: _made(data, scales[:, :1])),
        (ValueError, r"scales are \(3, 2\)", lambda: _made(data, scales[:3])),
        (TypeError, "scales are torch.float64", lambda: _made(data, scales.double())),
        (TypeError, "zeros are torch.float16", lambda: _made(data, scales, scales.half())),
        (ValueError, "d is 0", lambda: _made(data, scales, d=0)),
    ]
    for error, sentence, call in cases:
        with pytest.raises(error, match=sentence):
            call()  # type: ignore[operator]


def _made(data, scales, zeros=None, bits=4, group_size=32, d=64):
    return QuantizedWeight(data, scales, zeros, bits, group_size, d)


@pytest.mark.parametrize("bits", [8, 4])
def test_blocks_of_gguf_files_are_taken_as_they_are(bits):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0 if bits == 8 else gguf.GGMLQuantizationType.Q4_0
    weight = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32)
    blocks = gguf.quants.quantize(weight, kind)
    made = from_ggml_blocks(torch.from_numpy(blocks.view(np.uint8).reshape(5, -1)), bits, 96)
    assert made.scales.dtype == torch.float16
    assert np.array_equal(dequantize(made).numpy(), gguf.quants.dequantize(blocks, kind))
    with pytest.raises(ValueError, match=r"blocks are \(5, \d+\); they must be"):
        from_ggml_blocks(torch.from_numpy(blocks.view(np.uint8).reshape(5, -1)), bits, 64)
