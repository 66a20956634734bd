"""GGUF metadata -> a transformers configuration, for the architectures whose MLP is gated.

Written from the file's own values, since transformers 5.23 leaves several of them at a class's default (Qwen3's head
size, Gemma's soft caps and attention scale), and takes a quantised Qwen2 file that holds its output matrix twice for an
untied model.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from cats.models.gguf_header import CONTROL, USER_DEFINED, Header

SAME_MATRIX = 0.15  # relative difference of two quantisations of one matrix is below it, of two matrices above 1
_ROPE_FREQUENCIES = "rope_freqs.weight"
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Family:
    """What an architecture of GGUF is in transformers.

    Attributes:
        config: configuration class.
        extra: further arguments of it, from a header and the common arguments.
        block: names of the tensors of one layer, without ``blk.N.``; ``.weight`` unless they have an ending.
    """

    config: type[PretrainedConfig]
    extra: Callable[[Header, dict[str, Any]], dict[str, Any]]
    block: tuple[str, ...]


def _value(header: Header, key: str, default: Any = None) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}", default)


def _llama(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    if _ROPE_FREQUENCIES in header.tensors:
        common["rope_parameters"] |= _llama3_rope(header, common)
    return {"head_dim": _value(header, "attention.key_length", _value(header, "rope.dimension_count")) or _head(common)}


def _head(common: dict[str, Any]) -> int:
    return int(common["hidden_size"] // common["num_attention_heads"])


def _qwen2(_header: Header, _common: dict[str, Any]) -> dict[str, Any]:
    return {}


def _qwen3(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    return {"head_dim": _value(header, "attention.key_length") or _head(common)}


def _gemma(header: Header, common: dict[str, Any], largest: int) -> dict[str, Any]:
    """The scale of attention is not in the file: llama.cpp tells the 27B model, which has another, by its layers."""
    head = _value(header, "attention.key_length", 256)
    scale = _head(common) if common["num_hidden_layers"] == largest else head
    window = _value(header, "attention.sliding_window")
    return {"head_dim": head, "query_pre_attn_scalar": scale} | ({"sliding_window": window} if window else {})


def _gemma2(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _gemma(header, common, largest=46) | {key: _value(header, key, cap) for key, cap in caps.items()}


def _gemma3(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    local = _value(header, "rope.freq_base_swa", 10000.0)
    sliding = {"rope_type": "default", "rope_theta": local}
    common["rope_parameters"] = {"full_attention": common["rope_parameters"], "sliding_attention": sliding}
    pattern = _value(header, "attention.sliding_window_pattern", 6)  # a period, or one flag per layer
    if isinstance(pattern, int):
        pattern = [(i + 1) % pattern != 0 for i in range(common["num_hidden_layers"])]
    types = ["sliding_attention" if slides else "full_attention" for slides in pattern]
    return _gemma(header, common, largest=62) | {"layer_types": types}


_BLOCK = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")
_GEMMA_BLOCK = (*_BLOCK, "post_attention_norm", "post_ffw_norm")
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
FAMILIES = {
    "llama": Family(LlamaConfig, _llama, _BLOCK),  # Mistral too: llama.cpp's converter writes it as llama
    "qwen2": Family(Qwen2Config, _qwen2, (*_BLOCK, "attn_q.bias", "attn_k.bias", "attn_v.bias")),
    "qwen3": Family(Qwen3Config, _qwen3, (*_BLOCK, *_HEAD_NORMS)),
    "gemma2": Family(Gemma2Config, _gemma2, _GEMMA_BLOCK),
    "gemma3": Family(Gemma3TextConfig, _gemma3, (*_GEMMA_BLOCK, *_HEAD_NORMS)),
}


def make_config(header: Header, layers: int | None = None) -> PretrainedConfig:
    """The configuration of the model in a file.

    Args:
        header: of the file.
        layers: keep only the first so many layers.

    Raises:
        ValueError: an architecture, a scaling of positions or tensors that are not supported.
        OSError: metadata or tensors are missing.
    """
    family = FAMILIES.get(header.architecture)
    if family is None:
        allowed = ", ".join(FAMILIES)
        kind = f"a {header.architecture} model"
        raise ValueError(f"{header.path} is {kind}: GGUF files of {allowed} (Mistral among llama) can be loaded")
    check_tensors(header, family)
    try:
        common = _common(header)
    except KeyError as error:
        raise OSError(f"{header.path} is damaged: its metadata lack {error.args[0]}") from error
    extra = family.extra(header, common)
    config = family.config(**{**common, **extra})
    config.architectures = [f"{family.config.__name__.removesuffix('Config').removesuffix('Text')}ForCausalLM"]
    if layers is not None:
        config.num_hidden_layers = layers
    return config


def _common(header: Header) -> dict[str, Any]:
    prefix, meta = header.architecture, header.metadata
    hidden, heads = meta[f"{prefix}.embedding_length"], meta[f"{prefix}.attention.head_count"]
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": _value(header, "attention.head_count_kv", heads),
        "intermediate_size": meta[f"{prefix}.feed_forward_length"],
        "num_hidden_layers": meta[f"{prefix}.block_count"],
        "max_position_embeddings": meta[f"{prefix}.context_length"],
        # a float32 in the file: 1e-6 comes out as 9.999999974752427e-07
        "rms_norm_eps": float(f"{meta[f'{prefix}.attention.layer_norm_rms_epsilon']:.6g}"),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": is_tied(header),
        "rope_parameters": {"rope_theta": _value(header, "rope.freq_base", 10000.0), **_rope_scaling(header)},
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        # Qwen2's own config.json has none, and names it in its generation settings
        "pad_token_id": None if prefix.startswith("qwen") else meta.get("tokenizer.ggml.padding_token_id"),
    }


def check_tensors(header: Header, family: Family) -> None:
    """Every tensor that the family has must be in the file, and no other: transformers drops unknown ones in silence.

    Raises:
        ValueError: tensors that a dense model of this family does not have, such as experts.
        OSError: tensors are missing.
    """
    count = _value(header, "block_count", 0)
    names = [name if "." in name else f"{name}.weight" for name in family.block]
    wanted = {f"blk.{i}.{name}" for i in range(count) for name in names} | {"token_embd.weight", "output_norm.weight"}
    if missing := sorted(wanted - header.tensors.keys()):
        raise OSError(f"{header.path} is incomplete: {len(missing)} tensors are missing, such as {missing[0]}")
    optional = {"output.weight"} | ({_ROPE_FREQUENCIES} if family.extra is _llama else set())
    if unknown := sorted(header.tensors.keys() - wanted - optional):
        kind = header.architecture
        raise ValueError(f"{header.path} has tensors that a dense {kind} model does not have, such as {unknown[0]}")


def is_tied(header: Header) -> bool:
    """Whether the output matrix is the embedding: none in the file, or one that differs by quantisation only."""
    if "output.weight" not in header.tensors:
        return True
    embedding, output = header.tensors["token_embd.weight"], header.tensors["output.weight"]
    if embedding.shape != output.shape:
        return False
    rows = np.linspace(0, embedding.shape[0] - 1, min(256, embedding.shape[0])).astype(int)
    a, b = (header.rows(name, rows) for name in ("token_embd.weight", "output.weight"))
    return bool(np.linalg.norm(a - b) < SAME_MATRIX * np.linalg.norm(b))


def _rope_scaling(header: Header) -> dict[str, Any]:
    kind = _value(header, "rope.scaling.type", "none")
    factor = _value(header, "rope.scaling.factor", _value(header, "rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return {"rope_type": "default"}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    raise ValueError(f"{header.path} scales positions by {kind}: only files with none or linear scaling can be loaded")


def _llama3_rope(header: Header, common: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1 and later: the file holds one divisor per frequency, transformers wants the rule that made them.

    Raises:
        ValueError: the divisors are not those of Llama 3's rule.
    """
    stored = header.rows(_ROPE_FREQUENCIES, np.arange(header.tensors[_ROPE_FREQUENCIES].shape[0])).reshape(-1)
    factor = float(stored.max())
    size = 2 * len(stored)
    wavelength = 2 * np.pi * common["rope_parameters"]["rope_theta"] ** (np.arange(0, size, 2) / size)
    low, high, original = (_LLAMA3_ROPE[key] for key in _LLAMA3_ROPE)
    smooth = (original / wavelength - low) / (high - low)
    expected = 1 / np.clip((1 - smooth) / factor + smooth, 1 / factor, 1)
    if not np.allclose(stored, expected, rtol=1e-3):
        raise ValueError(f"{header.path} has rotary frequencies by a rule that is not Llama 3's: it cannot be loaded")
    return {"rope_type": "llama3", "factor": round(factor, 4), **_LLAMA3_ROPE}


def end_tokens(header: Header) -> list[int]:
    """Ids of the tokens that end a text or a turn, the file's own eos first."""
    meta = header.metadata
    ids = [meta[f"tokenizer.ggml.{key}"] for key in ("eos_token_id", "eot_token_id") if f"tokenizer.ggml.{key}" in meta]
    ending = re.compile(r"<(end_of_turn|\|(im_end|eot_id|endoftext|end_of_text)\|)>")
    kinds = meta.get("tokenizer.ggml.token_type", [])
    added = [i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    named = [i for i in added if ending.fullmatch(meta["tokenizer.ggml.tokens"][i])]
    return list(dict.fromkeys([*ids, *named]))
