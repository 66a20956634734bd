"""``shape:NAME``: random weights in the sizes of a published model, for timing."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from cats.models.loader import Loader, Origin, Request


@dataclass(frozen=True)
class Shape:
    """Sizes of a published model, for timing without its weights: d, m, and what else attention and head need."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int = 4096
    family: Callable[..., PretrainedConfig] = LlamaConfig

    def config(self, layers: int | None = None) -> PretrainedConfig:
        """transformers configuration of this shape with ``layers`` decoder layers (default: all)."""
        return self.family(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=layers or self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_position_embeddings,
            tie_word_embeddings=False,
            eos_token_id=None,
        )


SHAPES = {
    "mistral-7b": Shape(4096, 14336, 32, 32, 8, 32000, 32768, MistralConfig),
    "llama2-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama2-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128256, 8192),
    "small": Shape(64, 176, 2, 4, 2, 256),
}
PREFIX = "shape:"


class ShapeLoader(Loader):
    """Weights come from a seed; there is no tokenizer."""

    order = 10
    example = "shape:NAME"

    def claims(self, spec: str) -> bool:
        return spec.startswith(PREFIX)

    def resolve(self, spec: str) -> str:
        self._shape(spec)
        return spec

    def _shape(self, spec: str) -> Shape:
        name = spec.removeprefix(PREFIX)
        if name not in SHAPES:
            raise ValueError(f"unknown shape {spec!r}: allowed are {', '.join(PREFIX + name for name in SHAPES)}")
        return SHAPES[name]

    def config(self, spec: str, layers: int | None = None) -> PretrainedConfig:
        return self._shape(spec).config(layers)

    def load(self, spec: str, request: Request) -> tuple[PreTrainedModel, None]:
        config = self.config(spec, request.layers)
        if request.device == "sharded":
            raise ValueError(f"{spec} has random weights, which cannot be sharded: give one device")
        device = torch.device(request.device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
            torch.manual_seed(request.seed)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=request.dtype or torch.bfloat16)
        model.to(torch.device(request.device))  # type: ignore[arg-type]  # buffers that transformers makes on the host
        return model.eval(), None

    def tokenizer(self, spec: str) -> None:
        return None

    def origin(self, spec: str) -> Origin:
        self._shape(spec)
        return Origin("random weights")


LOADER = ShapeLoader()
