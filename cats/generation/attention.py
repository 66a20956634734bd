"""Attention of a decode step: one new token per sequence over a cache of fixed size, grouped queries without copies.

A block of `self_attn` kind (query, key and value projections, rotary embedding by halves, softmax, output projection)
is recognised by running it: what `DecodeBlock` computes must agree with the block's own forward. While a step is
decoded, such a block projects queries, keys and values in one product and leaves the rest to `decode_attention`. Any
other block keeps its own forward, over the whole cache under a mask.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from cats.generation.cache import DecodeCache
from cats.generation.projections import PROJECTIONS, Joined, floats_of, join, joinable, make_dense

TOLERANCE = 3e-4
"""Of the norm of a block's output in float32, against the block's own forward."""
KERNEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.005}
"""Of the norm of what the kernel computes, against plain operations in float32."""


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
    projected: Sequence[Tensor], cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, position: Tensor,
    first: Tensor, arrived: Tensor, scale: float, window: int,
) -> Tensor:  # fmt: skip
    """Rotate the new queries and keys, write the new keys and values, and attend to the filled part of the cache.

    Under programmatic dependent launch ``position``, ``first`` and what the cache holds are read before the kernel
    before this one has ended, so that one must not write them.

    Args:
        projected: q (batch, 1, heads * d), k and v (batch, 1, kv_heads * d), or one tensor of all three side by side:
            given slices of what it computes itself, inductor would copy each in a kernel of its own. Query head h reads
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
    q, k, v = split_projected(projected, keys)
    if q.device.type == "cuda" or _interpreted():
        from cats.generation.triton_attention import decode_attention_triton

        return decode_attention_triton(q, k, v, cos, sin, keys, values, position, first, arrived, scale, window)
    return plain_decode_attention(q, k, v, cos, sin, keys, values, position, first, scale, window)


@decode_attention.register_fake
def _fake(projected: Sequence[Tensor], _cos: Tensor, _sin: Tensor, keys: Tensor, *_arguments: Any) -> Tensor:
    q = split_projected(projected, keys)[0]
    return q.new_empty(q.shape)


def split_projected(projected: Sequence[Tensor], keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views, see `decode_attention`."""
    if len(projected) == 3:
        q, k, v = projected
        return q, k, v
    one, size = projected[0], keys.shape[1] * keys.shape[3]
    q, k, v = one.split([one.shape[-1] - 2 * size, size, size], -1)
    return q, k, v


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
        sizes: of queries, keys and values.
        joined: the three projections in one; None where each is called by itself.
        kernel: whether `decode_attention` is one operator; else it is written out for torch.compile.
    """

    def __init__(self, attention: Any, window: int, fused: bool, kernel: bool) -> None:
        self.window, self.kernel = window, kernel
        self.joined: Joined | None = None
        self.sizes = [getattr(attention, name).out_features for name in PROJECTIONS[:3]]
        if fused and joinable(attention):
            self.joined = join(attention)

    def project(self, attention: Any, x: Tensor) -> list[Tensor]:
        """Queries, keys and values before the rotary embedding, as `decode_attention` takes them."""
        norms, d = attention._modules, attention.head_dim
        if self.joined is None:
            projected = [attention._modules[name](x) for name in PROJECTIONS[:3]]
        else:
            projected = [self.joined(x)]
        if "q_norm" not in norms:
            return projected
        q, k, v = projected if len(projected) == 3 else projected[0].split(self.sizes, -1)
        q, k = (norms[n](x.view(*x.shape[:-1], -1, d)).view(x.shape) for n, x in (("q_norm", q), ("k_norm", k)))
        return [q, k, v]

    def __call__(self, attention: Any, x: Tensor, embeddings: tuple[Tensor, Tensor], cache: DecodeCache) -> Tensor:
        layer: Any = cache.layers[attention.layer_idx]
        projected = self.project(attention, x)
        tensors = *embeddings, layer.keys, layer.values, cache.position, cache.first
        if self.kernel:
            out = decode_attention(projected, *tensors, cache.arrived, attention.scaling, self.window)
        else:
            each = split_projected(projected, layer.keys)
            out = plain_decode_attention(*each, *tensors, attention.scaling, self.window)
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


def decode_blocks(model: Any, fused: bool = True, kernel: bool | None = None) -> dict[nn.Module, DecodeBlock]:
    """A `DecodeBlock` for every attention block of ``model``, or none at all unless all can have one.

    Args:
        model: a causal language model.
        fused: join the projections' weights, see `cats.generation.projections.join`.
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
        kind = _kind(module)
        if kind not in seen:
            seen[kind] = _agrees(module, config) and (not kernel or kernel_agrees(module))
        if not seen[kind]:
            return {}
        blocks[module] = DecodeBlock(module, _window(config, module), fused, kernel)
    return blocks if len(blocks) == config.num_hidden_layers else {}


def _kind(attention: Any) -> tuple[Any, ...]:
    """What blocks that compute alike have in common: class, shapes, parts, and settings such as whether a layer rotates
    (SmolLM3 leaves rotary embedding out in every fourth)."""
    settings = {
        name: value
        for name, value in vars(attention).items()
        if isinstance(value, bool | int | float | str | None) and name != "layer_idx"
    }
    linears = [attention._modules[name] for name in PROJECTIONS]
    shapes = ((linear.out_features, linear.in_features) for linear in linears)
    return (type(attention), *shapes, frozenset(attention._modules), frozenset(settings.items()))


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
        and floats_of(attention._modules["q_proj"]).dtype in KERNEL_TOLERANCE
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
    own = make_dense(copy.deepcopy(attention)).float()
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
    like, d = floats_of(attention.q_proj), attention.head_dim
    heads, kv_heads = (attention._modules[name].out_features // d for name in PROJECTIONS[:2])
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(like)

    cache = [random(2, kv_heads, 256, d) for _ in range(2)]
    exact = [tensor.float() for tensor in cache]
    first = torch.tensor([0, 3], device=like.device)
    arrived = torch.zeros(2 * heads, dtype=torch.int32, device=like.device)
    for place in (199, 200):
        joined = random(2, 1, (heads + 2 * kv_heads) * d)
        embeddings = random(2, 1, d).cos(), random(2, 1, d).sin()
        position = torch.tensor([place], device=like.device)
        out = decode_attention([joined], *embeddings, *cache, position, first, arrived, d**-0.5, 0)
        given = *split_projected([joined], cache[0]), *embeddings
        plain: Any = (*map(Tensor.float, given), *exact, position, first, d**-0.5, 0)
        expected = plain_decode_attention(*plain)
        pairs = ((out, expected), *zip(cache, exact, strict=True))
        if not all(_near(actual, right, KERNEL_TOLERANCE[like.dtype]) for actual, right in pairs):
            return False
    return not bool(arrived.any())
