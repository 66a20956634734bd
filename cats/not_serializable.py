"""A quantised model refuses transformers' `save_pretrained`, whose directory would be read back with random MLPs.

transformers asks a model's attribute ``hf_quantizer`` before it saves: one that is not serializable makes it raise.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from cats.packed_linear import PackedLinear
from cats.quantized_linear import QuantizedLinear
from cats.structure import unwrapped


class _Method:
    """What transformers names in its sentence: "The model is quantized with ... and is not serializable"."""

    quant_method = "cats.quantize, which cats.save_quantized saves,"


class NotSerializable(HfQuantizer):
    """Says that `save_pretrained` cannot write a model; adapters on it are trained, compiled and saved as ever."""

    requires_calibration = False

    def __init__(self) -> None:
        self.quantization_config: Any = _Method()

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def refuse_save_pretrained(model: nn.Module) -> None:
    """Let every model of transformers in ``model`` that holds quantised layers say so: itself and the decoder in it.

    A model around ``model`` is not reached from here.
    """
    for each in _of_transformers(model):
        quantized = any(isinstance(module, QuantizedLinear | PackedLinear) for module in each.modules())
        if quantized and getattr(each, "hf_quantizer", None) is None:
            each.hf_quantizer = NotSerializable()


def allow_save_pretrained(model: nn.Module) -> None:
    """Undo `refuse_save_pretrained`."""
    for each in _of_transformers(model):
        if isinstance(getattr(each, "hf_quantizer", None), NotSerializable):
            del each.hf_quantizer


def _of_transformers(model: nn.Module) -> list[Any]:
    return [module for module in unwrapped(model).modules() if isinstance(module, PreTrainedModel)]
