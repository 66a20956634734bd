"""Attention of a decode step: one new token per sequence over a cache of fixed size, grouped queries without copies.

A block of `self_attn` kind (query, key and value projections, rotary embedding by halves, softmax, output projection)
is recognised by running it: what `DecodeBlock` computes must agree with the block's own forward. While a step is
decoded, such a block projects queries, keys and values in one product and leaves the rest to `decode_attention`. Any
other block keeps its own forward, over the whole cache under a mask.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cats.generation.cache import DecodeCache

TOLERANCE = 3e-4
"""Of the norm of a block's output in float32, against the block's own forward."""
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Of the norm of what the kernel computes, against plain operations in float32."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding by halves of x (batch, heads, 1, d), with cos and sin (batch, 1, 1, d)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def plain_decode_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor,
    first: Tensor, scale: float, window: int,
) -> Tensor:  # fmt: skip
    """`decode_attention` in plain operations, which torch.compile can fuse; it reads the whole cache."""
    batch, kv_heads, capacity, d = keys.shape
    cos, sin = cos.view(-1, 1, 1, d), sin.view(-1, 1, 1, d)
    keys.index_copy_(2, position, rotate(k.view(batch, kv_heads, 1, d), cos, sin))
    values.index_copy_(2, position, v.view(batch, kv_heads, 1, d))
    grouped = rotate(q.view(batch, -1, 1, d), cos, sin).view(batch, kv_heads, -1, d)
    place = torch.arange(capacity, device=q.device)
    seen = (place <= position) & (place >= first[:, None])
    if window:
        seen &= place > position - window
    scores = (grouped @ keys.mT).float() * scale
    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).to(q.dtype)
    return (weights @ values).reshape(q.shape)


@torch.library.custom_op("cats::decode_attention", mutates_args=("keys", "values"))
def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor,
    first: Tensor, arrived: Tensor, scale: float, window: int,
) -> Tensor:  # fmt: skip
    """Rotate the new queries and keys, write the new keys and values, and attend to the filled part of the cache.

    Args:
        q: (batch, 1, heads * d), as projected; k and v likewise, (batch, 1, kv_heads * d). Query head h reads
            key-value head h * kv_heads // heads. Rows may lie apart, their elements may not.
        cos, sin: (batch, 1, d) or (1, 1, d), of the token's position.
        keys, values: (batch, kv_heads, capacity, d), contiguous; written at ``position``.
        position: int64 (1,), the number of tokens in the cache.
        first: int64 (batch,), the first place that is not padding.
        arrived: int32 zeros, at least batch * kv_heads; zeros again afterwards.
        scale: factor of the scores.
        window: places that the token sees, its own included; 0 for all.

    Returns:
        (batch, 1, heads * d), of q's dtype.
    """
    if q.device.type == "cuda" or _interpreted():
        from cats.generation.triton_attention import decode_attention_triton

        return decode_attention_triton(q, k, v, cos, sin, keys, values, position, first, arrived, scale, window)
    return plain_decode_attention(q, k, v, cos, sin, keys, values, position, first, scale, window)


@decode_attention.register_fake
def _fake(q: Tensor, *_arguments: Any) -> Tensor:
    return q.new_empty(q.shape)


def _interpreted() -> bool:
    try:
        from cats.generation.triton_attention import INTERPRETED
    except ImportError:
        return False
    return bool(INTERPRETED)


class DecodeBlock:
    """What stands in for the forward of one attention block while a step is decoded.

    Attributes:
        window: as in `decode_attention`.
        weight, bias: of the three projections in one; None where each is called by itself.
        kernel: whether `decode_attention` is one operator; else it is written out for torch.compile.
    """

    def __init__(self, attention: Any, window: int, fused: bool, kernel: bool) -> None:
        self.window, self.kernel = window, kernel
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.sizes = [getattr(attention, name).out_features for name in PROJECTIONS[:3]]
        if fused and _fusible(attention):
            self.weight, self.bias = _fuse(attention)

    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (batch, 1, heads * d), before the rotary embedding."""
        if self.weight is not None:
            q, k, v = F.linear(x, self.weight, self.bias).split(self.sizes, -1)
        else:
            q, k, v = (attention._modules[name](x) for name in PROJECTIONS[:3])
        d = attention.head_dim
        norms = attention._modules
        if "q_norm" in norms:
            q, k = (norms[n](x.view(*x.shape[:-1], -1, d)).view(x.shape) for n, x in (("q_norm", q), ("k_norm", k)))
        return q, k, v

    def __call__(self, attention: Any, x: Tensor, embeddings: tuple[Tensor, Tensor], cache: DecodeCache) -> Tensor:
        layer: Any = cache.layers[attention.layer_idx]
        tensors = *self.project(attention, x), *embeddings, layer.keys, layer.values, cache.position, cache.first
        if self.kernel:
            out = decode_attention(*tensors, cache.arrived, attention.scaling, self.window)
        else:
            out = plain_decode_attention(*tensors, attention.scaling, self.window)
        result: Tensor = attention.o_proj(out)
        return result


def _decode_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    return self.cats_decode(self, hidden_states, position_embeddings, past_key_values), None


@contextmanager
def decoding(blocks: dict[nn.Module, DecodeBlock]) -> Iterator[None]:
    """Let ``blocks`` stand in for the forward of their modules."""
    module: Any
    for module, block in blocks.items():
        module.cats_decode = block
        module.forward = MethodType(_decode_forward, module)
    try:
        yield
    finally:
        for module in blocks:
            module.__dict__.pop("forward", None)
            module.__dict__.pop("cats_decode", None)


def _plain_linear(linear: Any) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    return (
        type(linear) is nn.Linear
        and type(linear.weight) is nn.Parameter
        and not any(getattr(linear, name) for name in hooks)
        and "forward" not in linear.__dict__
    )


def _fusible(attention: Any) -> bool:
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    return all(map(_plain_linear, linears)) and len({linear.bias is None for linear in linears}) == 1


@torch.no_grad()
def _fuse(attention: Any) -> tuple[Tensor, Tensor | None]:
    """One weight and one bias of which the three projections' own become views: the same values, no more memory."""
    linears = [attention._modules[name] for name in PROJECTIONS[:3]]
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = _already_joined(parts)
        if whole is None:
            whole = torch.cat([part.data for part in parts])
            for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
                part.data = view
        joined.append(whole)
    assert joined[0] is not None
    return joined[0], joined[1]


def _already_joined(parts: list[Tensor]) -> Tensor | None:
    """The tensor of which ``parts`` are consecutive views, if they are."""
    base, start = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != base.untyped_storage().data_ptr() or not part.is_contiguous():
            return None
        if part.storage_offset() != start:
            return None
        start += part.numel()
    rows = sum(len(part) for part in parts)
    return base.data.as_strided((rows, *base.shape[1:]), base.stride(), base.storage_offset())


@torch.no_grad()
def separate(model: nn.Module) -> None:
    """Give each projection that is a view of a joined one storage of its own again."""
    for module in model.modules():
        if all(name in module._modules for name in PROJECTIONS[:3]):
            for name in PROJECTIONS[:3]:
                for parameter in module._modules[name].parameters(recurse=False):  # type: ignore[union-attr]
                    if parameter.untyped_storage().nbytes() > parameter.nbytes:
                        parameter.data = parameter.data.clone()


def decode_blocks(model: Any, fused: bool = True, kernel: bool | None = None) -> dict[nn.Module, DecodeBlock]:
    """A `DecodeBlock` for every attention block of ``model``, or none at all unless all can have one.

    Args:
        model: a causal language model.
        fused: join the projections' weights, see `_fuse`.
        kernel: as `DecodeBlock`; by default on a GPU.
    """
    kernel = model.device.type == "cuda" if kernel is None else kernel
    config = model.config.get_text_config(decoder=True)
    blocks: dict[nn.Module, DecodeBlock] = {}
    seen: dict[Any, bool] = {}
    for module in model.modules():
        if not isinstance(getattr(module, "layer_idx", None), int) or "o_proj" not in module._modules:
            continue
        if not _candidate(module, kernel):
            return {}
        kind = (type(module), *(module._modules[name].weight.shape for name in PROJECTIONS))
        if kind not in seen:
            seen[kind] = _agrees(module, config) and (not kernel or kernel_agrees(module))
        if not seen[kind]:
            return {}
        blocks[module] = DecodeBlock(module, _window(config, module), fused, kernel)
    return blocks if len(blocks) == config.num_hidden_layers else {}


def _window(config: Any, attention: Any) -> int:
    types = getattr(config, "layer_types", None)
    sliding = types[attention.layer_idx] == "sliding_attention" if types else True
    return (getattr(config, "sliding_window", None) or 0) if sliding else 0


def _candidate(attention: Any, kernel: bool) -> bool:
    """Whether the block has the parts that `DecodeBlock` needs and no others."""
    parts = set(attention._modules) - {"q_norm", "k_norm"}
    norms = set(attention._modules) & {"q_norm", "k_norm"}
    d = getattr(attention, "head_dim", 0)
    return (
        parts == set(PROJECTIONS)
        and len(norms) in (0, 2)
        and not any(True for _ in attention.parameters(recurse=False))
        and isinstance(getattr(attention, "scaling", None), float)
        and isinstance(d, int)
        and "forward" not in attention.__dict__
        and all(isinstance(getattr(attention._modules[name], "out_features", None), int) for name in PROJECTIONS)
        and (not kernel or (d >= 16 and d & (d - 1) == 0))
        and attention._modules["q_proj"].weight.dtype in KERNEL_TOLERANCE
    )


def _near(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    error = (actual.float() - expected.float()).norm()
    return actual.shape == expected.shape and bool(error <= tolerance * expected.float().norm())


@torch.no_grad()
def _agrees(attention: Any, config: Any) -> bool:
    """Whether a `DecodeBlock` computes what the block's own forward does, on random input after a random past.

    Both run on a copy in float32: in 16 bits the scores of some models (Qwen2's biases) are too large to compare. Input
    is twice the size that a norm would give it, so that a cap on the scores would show.
    """
    own = copy.deepcopy(attention).float()
    device, d = own.q_proj.weight.device, own.head_dim
    block = DecodeBlock(own, 0, fused=False, kernel=False)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return 2 * torch.randn(*shape, generator=generator).to(device)

    x, past = random(1, 1, own.q_proj.weight.shape[1]), random(2, 1, block.sizes[1] // d, 40, d)
    angles = 3 * random(1, 1, d)
    embeddings = angles.cos(), angles.sin()
    mask = torch.full((1, 1, 1, 64), torch.finfo(torch.float32).min, device=device)
    mask[..., 3:41] = 0  # the first three are padding
    own.config._attn_implementation = "eager"
    results = []
    try:
        for run in ("own", "block"):
            cache = DecodeCache(config, 64, 1, device)
            cache.layers[own.layer_idx].update(past[0], past[1])
            cache.start(40)
            cache.first.fill_(3)
            if run == "own":
                out = own(x, position_embeddings=embeddings, attention_mask=mask, past_key_values=cache)[0]
            else:
                out = block(own, x, embeddings, cache)
            layer: Any = cache.layers[own.layer_idx]
            results.append((out, layer.keys, layer.values))
    except Exception:  # whatever another kind of block needs
        return False
    return all(_near(block, own, TOLERANCE) for own, block in zip(*results, strict=True))


@torch.no_grad()
def kernel_agrees(attention: Any) -> bool:
    """Whether `decode_attention` computes on this device what it should for heads like those of ``attention``: two
    sequences over several splits of the cache, two tokens one after another.
    """
    weight, d = attention.q_proj.weight, attention.head_dim
    heads, kv_heads = (attention._modules[name].out_features // d for name in PROJECTIONS[:2])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, weight.dtype)

    cache = [random(2, kv_heads, 256, d) for _ in range(2)]
    exact = [tensor.float() for tensor in cache]
    first = torch.tensor([0, 3], device=weight.device)
    arrived = torch.zeros(2 * heads, dtype=torch.int32, device=weight.device)
    for place in (199, 200):
        q, k, v = random(2, 1, (heads + 2 * kv_heads) * d).split([heads * d, kv_heads * d, kv_heads * d], -1)
        given = (q, k, v, random(2, 1, d).cos(), random(2, 1, d).sin())
        position = torch.tensor([place], device=weight.device)
        out = decode_attention(*given, *cache, position, first, arrived, d**-0.5, 0)
        in_float32: list[Any] = [*(t.float() for t in given), *exact, position, first, d**-0.5, 0]
        expected = plain_decode_attention(*in_float32)
        pairs = ((out, expected), *zip(cache, exact, strict=True))
        if not all(_near(actual, right, KERNEL_TOLERANCE[weight.dtype]) for actual, right in pairs):
            return False
    return not bool(arrived.any())
