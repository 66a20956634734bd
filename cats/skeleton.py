"""A model without memory for its weights, to be filled tensor by tensor: memory then holds nothing but the model."""

from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cats.packed_linear import PackedLinear
from cats.quantized_linear import QuantizedLinear


def empty_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a configuration with its parameters on the meta device; buffers, which a file does
    not hold, are there."""
    with _meta_parameters():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(deepcopy(config), dtype=dtype)
    return model


@contextmanager
def _meta_parameters() -> Iterator[None]:
    """Parameters of modules made inside go to the meta device as soon as they are registered."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def fill(model: Any, take: Callable[[str, Tensor], Tensor], names: Set[str], device: torch.device) -> None:
    """Give every parameter and saved buffer its value, but for those of quantised layers, and move the other buffers.

    Args:
        model: of `empty_model`.
        take: (name in the state dict, what the model holds there) to the value, on ``device``.
        names: of the tensors that there are; one of several names of a tied tensor is enough.
        device: of the whole model afterwards.
    """
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    quantized = QuantizedLinear | PackedLinear
    filled = {id(t) for module in model.modules() if isinstance(module, quantized) for t in module.buffers()}
    tied = {id(tensor) for name, tensor in state.items() if name in names}
    for name, tensor in state.items():
        if id(tensor) in filled or (name not in names and id(tensor) in tied):
            continue
        _assign(model, tensor, take(name, tensor))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _assign(model: nn.Module, old: Tensor, value: Tensor) -> None:
    """Put ``value`` wherever the model holds ``old``: tied weights stay tied."""
    new = nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is old:
                    held[name] = new  # type: ignore[assignment]
