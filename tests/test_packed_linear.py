"""One `PackedLinear`: its products in every form and on a GPU, and its order of nibbles."""

import copy

import pytest
import torch
from cats_kernels.cpu import pieces, torch_int4
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cats import packed_linear
from cats.packed_linear import packed_product, unpacked
from tests.packed_cases import exact, layer
from tests.test_quantization import close

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
KNOWN_ROWS = torch_int4.block_rows()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, None, True), (4, 32, True), (4, 32, False), (4, 64, True), (4, 128, False)]
)
@pytest.mark.parametrize(("m", "d"), [(16, 128), (80, 256), (192, 384)])
def test_a_layer_multiplies_with_what_its_weight_dequantises_to(m, d, bits, group, symmetric, dtype):
    weight, linear = layer(m, d, bits, group, symmetric, dtype)
    for shape in ((d,), (1, d), (2, 3, d), (600, d)):  # the last is dequantised in pieces
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y = linear(x)
        assert y.dtype == dtype and y.shape == (*shape[:-1], m)
        assert close(y.double(), exact(x, weight, linear.bias), TOLERANCE[dtype])
    assert close(linear(x[:, None].expand(-1, 2, -1)[:, 1:]).double()[:, 0], exact(x, weight, linear.bias), 0.01)
    own = linear.quantized
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(own.tensors, weight.tensors, strict=True))
    assert (own.bits, own.group_size, own.d) == (weight.bits, weight.group_size, weight.d)


def test_nibbles_are_found_again_in_blocks(monkeypatch):
    nibbles = torch.randint(0, 16, (208, 128), dtype=torch.uint8)
    packed = packed_linear._packed(nibbles)
    for first, last in ((0, 64), (64, 192), (128, 208), (0, 208)):
        assert torch.equal(unpacked(packed, 208, 128, first, last), nibbles[first:last])
    monkeypatch.setattr(packed_linear, "row_chunks", lambda *_: iter([(0, 70)]))
    weight, linear = layer(208, 128, 4, 32, True, torch.float32)
    assert list(packed_linear._chunks(208, 128, nibbles.device)) == [(0, 64), (64, 128), (128, 192), (192, 208)]
    assert torch.equal(linear.quantized.data, weight.data)
    x = torch.randn(100, 128)
    assert close(linear(x).double(), exact(x, weight, linear.bias))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("symmetric", [True, False])
def test_many_rows_on_a_cpu_take_pieces_in_the_order_of_torch(symmetric, dtype, monkeypatch):
    assert torch_int4.block_rows() in (64, 32, 0)
    monkeypatch.setattr(torch_int4, "block_rows", lambda: torch_int4_rows)
    weight, linear = layer(320, 256, 4, 32, symmetric, dtype)
    x = torch.randn(packed_linear.FEWEST_ROWS[4], 256).to(dtype)
    seen: list[Tensor] = []
    compute = packed_linear.multiply_int4
    monkeypatch.setattr(packed_linear, "multiply_int4", lambda *a: (seen.append(compute(*a)), seen[-1])[1])
    with torch.no_grad():
        for torch_int4_rows in (KNOWN_ROWS, 0):  # an order that is not known
            for most in (2**22, 256 * 130):
                monkeypatch.setattr(pieces, "WEIGHTS", most)
                assert close(linear(x).double(), exact(x, weight, linear.bias), TOLERANCE[dtype])
                assert (seen.pop() is None) == (torch_int4_rows == 0)


def test_the_compiled_product_of_one_row_on_a_gpu_in_plain_operations():
    """What inductor gets there, computed here."""
    weight, linear = layer(48, 64, 8, None, True, torch.bfloat16)
    x = torch.randn(1, 64).bfloat16()
    made = packed_linear._one_row_of_8_bits(x, linear.packed, linear.scales)
    assert made.shape == (1, 48) and made.dtype == torch.bfloat16
    assert close(made.double(), exact(x, weight, torch.zeros(48)), 0.01)


def test_the_order_of_nibbles_on_a_gpu_has_the_shape_that_its_product_takes():
    """By torch's functions for tensors without values, of a GPU that need not be there."""
    packed = packed_linear._packed(torch.empty(48, 256, dtype=torch.uint8, device="meta"))
    assert packed.shape == (6, 2, 32, 4) and packed.dtype == torch.int32
    with FakeTensorMode():
        shapes = (2, 256), (8, 48, 2)
        x, scales = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        weight = torch.empty(packed.shape, dtype=packed.dtype, device="cuda")
        assert packed_product(x, weight, scales, 4).shape == (2, 48)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("bits", "group", "symmetric"), [(8, None, True), (4, 32, False), (4, 128, True)])
def test_a_layer_on_a_gpu(bits, group, symmetric):
    weight, linear = layer(208, 384, bits, group, symmetric, torch.bfloat16)
    moved = copy.deepcopy(linear).cuda()
    own = moved.quantized.to("cpu")
    assert torch.equal(own.data, weight.data) and torch.equal(own.scales, weight.scales)
    for rows in (1, 3, 40, 600):
        x = torch.randn(rows, 384).bfloat16()
        assert close(moved(x.cuda()).double().cpu(), exact(x, weight, linear.bias), 0.01)
    compiled = torch.compile(moved)
    for rows in (1, 3):
        x = torch.randn(rows, 384).bfloat16()
        assert close(compiled(x.cuda()).double().cpu(), exact(x, weight, linear.bias), 0.01)
    back = moved.cpu()
    assert torch.equal(back.packed, linear.packed) and torch.equal(back.scales, linear.scales)
