"""A GGUF file's model with the weights of its gated MLPs as they are packed in the file, read tensor by tensor.

Q8_0 and Q4_0 pack 32 neighbouring columns of a row with a float16 scale. W_gate and W_up are kept bit for bit, as int8
and int4 in groups of 32. W_down is stored along its inputs, while the sparse kernels read the outputs of one neuron:
its groups cannot be kept, so that it is dequantised, a few neurons at a time, and rounded again in groups of 32 along a
neuron's row. All other weights are dequantised as usual.
"""

import numpy as np
import torch
from cats_kernels.quantized import QuantizedWeight, from_ggml_blocks, quantize, row_chunks
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from cats.models.gguf_header import Header, TensorInfo
from cats.models.streaming import quantized_model
from cats.skeleton import empty_model

PACKED = {"Q8_0": 8, "Q4_0": 4}
"""GGML's types that are kept, and their bits."""
GROUP = 32


def load_packed(header: Header, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model of a file whose MLPs are Q8_0 or Q4_0; it needs hardly more memory than the model.

    Args:
        header: of the file.
        config: of the model, perhaps with fewer layers.
        dtype: of all weights that are dequantised, and of the activations.
        device: where to put it.

    Raises:
        ValueError: a weight of the MLPs is of another type.
    """
    tensors = Tensors(header, config, device)

    def packed(name: str, transposed: bool) -> QuantizedWeight:
        return tensors.regrouped(name) if transposed else tensors.packed(name)

    return quantized_model(config, dtype, device, tensors.names.keys(), tensors.plain, packed)


class Tensors:
    """A file's tensors under the names that they have in transformers' state dict.

    Attributes:
        names: those names to GGUF's.
    """

    def __init__(self, header: Header, config: PretrainedConfig, device: torch.device) -> None:
        self.header, self.config, self.device = header, config, device
        self.names = _names(header, config)

    def info(self, name: str) -> TensorInfo:
        return self.header.tensors[self.names[name]]

    def plain(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor, dequantised, as transformers has it."""
        stored, info = self.names[name], self.info(name)
        if len(info.shape) == 1:
            value = torch.from_numpy(self._values(stored, 0, 1).reshape(-1))
            if self.header.architecture.startswith("gemma") and stored.endswith("norm.weight"):
                value = value - 1  # a file holds what multiplies, transformers how much that is above 1
            return value.to(self.device, dtype)
        value = torch.empty(info.shape, dtype=dtype, device=self.device)
        for first, last in row_chunks(info.shape[0], info.shape[1]):
            value[first:last] = torch.from_numpy(self._values(stored, first, last))
        return self._halves(stored, value)

    def _values(self, stored: str, first: int, last: int) -> np.ndarray:
        return self.header.unpack(stored, self.header.packed(stored, first, last))

    def _halves(self, stored: str, value: Tensor) -> Tensor:
        """Rows of W_q and W_k: llama's files have the two halves of a rotary pair side by side, transformers apart."""
        heads = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
        kind = stored.split(".", 2)[-1]
        if self.header.architecture != "llama" or kind not in heads:
            return value
        count = getattr(self.config, heads[kind])
        return value.view(count, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)

    def packed(self, name: str) -> QuantizedWeight:
        """A weight of the MLPs without a change of a bit."""
        stored, (m, d), bits = self.names[name], self.info(name).shape, self.bits(name)
        made = _empty(m, d, bits, self.device)
        for first, last in row_chunks(m, d):
            blocks = torch.from_numpy(self.header.packed(stored, first, last))
            _copy(from_ggml_blocks(blocks, bits, d), made.rows(first, last))
        if not bool(made.scales.isfinite().all()):
            raise ValueError(f"{self.header.path} is damaged: {stored} has scales that are not finite")
        return made

    def regrouped(self, name: str) -> QuantizedWeight:
        """The transposed down projection, rounded again: row j of it is column j of what the file holds."""
        stored, (d, m), bits = self.names[name], self.info(name).shape, self.bits(name)
        blocks = self.header.packed(stored, 0, d)
        made = _empty(m, d, bits, self.device)
        size = blocks.shape[1] * GROUP // m
        step = max(1, row_step(d) // GROUP)
        for first in range(0, m // GROUP, step):
            last = min(m // GROUP, first + step)
            values = self.header.unpack(stored, np.ascontiguousarray(blocks[:, first * size : last * size]))
            columns = torch.from_numpy(values).T.contiguous()
            try:
                rows = quantize(columns, bits, GROUP, scale_dtype=torch.float16)
            except ValueError as error:
                raise ValueError(f"{stored} of {self.header.path} cannot be kept packed: {error}") from error
            _copy(rows, made.rows(first * GROUP, last * GROUP))
        return made

    def bits(self, name: str) -> int:
        """Of a weight of the MLPs. Raises ValueError if its type cannot be kept."""
        from gguf import GGMLQuantizationType

        kind = GGMLQuantizationType(self.info(name).kind).name
        if kind not in PACKED:
            raise ValueError(
                f"{self.header.path} holds {self.names[name]} as {kind}: {' and '.join(PACKED)} can be kept packed; "
                "others are quantised anew, by bits=4 or 8 (--bits) or cats.quantize"
            )
        return PACKED[kind]


def row_step(d: int) -> int:
    """Rows of d columns that are converted at a time."""
    return next(row_chunks(2**31, d))[1]


def _empty(m: int, d: int, bits: int, device: torch.device) -> QuantizedWeight:
    columns, dtype = (d, torch.int8) if bits == 8 else (-(-d // GROUP) * GROUP // 2, torch.uint8)
    data = torch.empty(m, columns, dtype=dtype, device=device)
    scales = torch.empty(m, -(-d // GROUP), dtype=torch.float16, device=device)
    return QuantizedWeight(data, scales, None, bits, GROUP, d)


def _copy(rows: QuantizedWeight, to: QuantizedWeight) -> None:
    to.data.copy_(rows.data)
    to.scales.copy_(rows.scales)


def _names(header: Header, config: PretrainedConfig) -> dict[str, str]:
    """Name in the state dict -> GGUF's name of the same tensor."""
    import gguf

    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    known = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    with torch.device("meta"):
        state = empty_model(config, torch.bfloat16).state_dict()
    names = {}
    for name in state:
        stored = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in header.tensors:
            names[name] = stored
    if config.tie_word_embeddings and {"token_embd.weight", "output.weight"} <= header.tensors.keys():
        # one matrix, quantised twice: the finer one
        finer = max("token_embd.weight", "output.weight", key=lambda stored: header.tensors[stored].size)
        names |= {name: finer for name, stored in names.items() if stored in ("token_embd.weight", "output.weight")}
    return names
