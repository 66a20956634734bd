"""Decoder layers and loss as compiled code while a model is trained.

With adapters a small model's step is bound by the host, which starts a thousand kernels per layer, and by the memory
of its logits; compiled, a step of a 0.5 B model (8 x 1024 tokens, one H100) takes half the time and memory. All layers
share one graph per kind of layer, so that compiling takes as long as for one of them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

GRAPHS = 64
"""Most versions of a layer: by kind of layer and mask, static and dynamic lengths, and variants trained before."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of ``model``, all parts of it that transformers can checkpoint."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def compiled_layers(model: PreTrainedModel) -> Iterator[None]:
    """Compile the decoder layers and the loss of ``model`` at their first calls in here; afterwards it is as before.

    Raises:
        ValueError: a model without layers of transformers.
    """
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder layers of transformers to compile")
    loss = model.__dict__.get("_loss_function")
    hook = model.get_input_embeddings().register_forward_hook(_require_gradient)
    model.loss_function = torch.compile(model.loss_function)
    own = {layer: vars(layer).get("forward") for layer in layers}  # accelerate's, of a model spread over GPUs
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    finally:
        for layer, forward in own.items():
            del layer.forward
            if forward is not None:
                layer.forward = forward
        del model._loss_function
        if loss is not None:
            model.loss_function = loss
        hook.remove()


def _require_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
    """Else the first layer, whose input is of frozen weights, were another graph than the others."""
    if torch.is_grad_enabled():
        output.requires_grad_(True)
