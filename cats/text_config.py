"""The configuration of a model's language part: of a composite model (Gemma 3 with its vision tower) not its own."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from cats.structure import unwrapped

_MISSING = object()


def text_config(model: nn.Module) -> Any:
    """With the sizes, positions and vocabulary of the language part; None where ``model`` has no configuration."""
    config: Any = getattr(unwrapped(model), "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What thresholds must agree on with a model: the type and the sizes of its language part."""
    config = text_config(model)
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers")
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


@contextlib.contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """No cache of keys and values by default in here, and the configurations as they were afterwards.

    transformers' Trainer sets ``use_cache`` in the model's own configuration, which a composite model does not read.
    """
    own: Any = getattr(unwrapped(model), "config", None)
    text = text_config(model)
    before = [(config, vars(config).get("use_cache", _MISSING)) for config in (own, text) if config is not None]
    if text is not None:
        text.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            if value is _MISSING:
                vars(config).pop("use_cache", None)
            else:
                config.use_cache = value
