"""Writes a tiny transformers model and its tokenizer as a GGUF file, as llama.cpp's converter would."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "In 1984 there were 42 naïve cafés; don't count them twice, they're gone.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Whereas recognition of the inherent dignity and of the equal and inalienable rights of all members.",
] * 20
TEXTS = [
    *CORPUS[:4], " leading", "two  spaces\n\n\n  new\tTab   x ", "a\r\nb", "e\u0301 and \u00e9", "",
    "日本語 😀 12345 don't", "<|endoftext|> and <tool_call> in a text", "I'LL 3,14159 …",
]  # fmt: skip


@dataclass
class Vocabulary:
    """A tokenizer as transformers has it and as GGUF stores it."""

    original: Any
    model: str
    pre: str
    tokens: list[str]
    kinds: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None
    ids: dict[str, int] = field(default_factory=dict)  # bos, eos, padding, unknown
    add_bos: bool = False


def _byte_level(specials: list[str], padding_rows: int = 0) -> tuple[dict[str, int], list[str], list[str], list[int]]:
    """Vocabulary and merges learned from `CORPUS`; then tokens and kinds with ``specials`` and padding behind."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    state = json.loads(trained.to_str())["model"]
    merges = [" ".join(merge) for merge in state["merges"]]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    padding = [f"[PAD{i}]" for i in range(padding_rows)]
    kinds = [NORMAL] * len(tokens) + [USER_DEFINED if "tool" in s else CONTROL for s in specials]
    return state["vocab"], merges, [*tokens, *specials, *padding], [*kinds, *[UNUSED] * padding_rows]


def qwen_vocabulary() -> Vocabulary:
    """Qwen2's own class; the file has a bos that Qwen has not, and rows without a token."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    vocab, merges, tokens, kinds = _byte_level(specials, padding_rows=5)
    pairs = [tuple(merge.split(" ")) for merge in merges]
    numbers = {token: i for i, token in enumerate(tokens)}
    everything = {**vocab, **{token: numbers[token] for token in specials}}
    original = Qwen2Tokenizer(vocab=everything, merges=pairs, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    original.add_tokens(specials[:3], special_tokens=True)
    original.add_tokens(specials[3:])
    ids = {"bos": numbers["<|endoftext|>"], "eos": numbers["<|im_end|>"], "padding": numbers["<|endoftext|>"]}
    return Vocabulary(original, "gpt2", "qwen2", tokens, kinds, merges=merges, ids=ids)


def llama3_vocabulary() -> Vocabulary:
    """Byte-level with Llama 3's rule, a bos in front, and a word in the vocabulary that no merges make."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    vocab, merges, tokens, kinds = _byte_level(specials)
    whole = "Ġquick"
    merges = [merge for merge in merges if merge.replace(" ", "") != whole]
    assert whole in vocab
    inner = Tokenizer(models.BPE(vocab, [tuple(m.split(" ")) for m in merges], ignore_merges=True))
    split = pre_tokenizers.Split(_regex("llama-bpe"), behavior="isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    first = inner.token_to_id(specials[0])
    bos = [(specials[0], first)]
    inner.post_processor = processors.TemplateProcessing(single=f"{specials[0]} $A", special_tokens=bos)
    original = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=specials[0], eos_token=specials[1])
    ids = {"bos": first, "eos": first + 1}
    return Vocabulary(original, "gpt2", "llama-bpe", tokens, kinds, merges=merges, ids=ids, add_bos=True)


def _regex(pre: str) -> Any:
    from tokenizers import Regex

    return Regex(GGUF_PRE_TOKENIZER_SPLITS[pre])


def _pieces() -> list[str]:
    """Pieces learned from `CORPUS` in the order of their merges, single characters last, as sentencepiece has them."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=300))
    state = json.loads(trained.to_str())["model"]
    merged = ["".join(merge) for merge in state["merges"]]
    return [*merged, *sorted(set(state["vocab"]) - set(merged) - {"▁"}), "▁"]


def _all_merges(pieces: list[str]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, the best piece first, the shorter left part first among its pairs."""
    known = set(pieces)
    return [(p[:i], p[i:]) for p in pieces for i in range(1, len(p)) if p[:i] in known and p[i:] in known]


def _sentencepiece(control: list[str]) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    pieces = _pieces()
    tokens = [*control, *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    kinds = [UNKNOWN if t == "<unk>" else CONTROL for t in control] + [BYTE] * 256 + [NORMAL] * len(pieces)
    return tokens, kinds, _all_merges(pieces)


def llama_vocabulary() -> Vocabulary:
    """Sentencepiece as Llama 2 and Mistral have it: scores instead of merges, byte fallback, a space in front."""
    tokens, kinds, merges = _sentencepiece(["<unk>", "<s>", "</s>"])
    original = LlamaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, add_bos_token=True)
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    return Vocabulary(
        original, "llama", "default", tokens, kinds, scores, ids={"bos": 1, "eos": 2, "unknown": 0}, add_bos=True
    )


def gemma_vocabulary() -> Vocabulary:
    """Sentencepiece as Gemma has it: no space in front, pieces in the order of their merges."""
    tokens, kinds, merges = _sentencepiece(["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"])
    original = GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, add_bos_token=True)
    original.add_tokens(["<start_of_turn>", "<end_of_turn>"], special_tokens=True)
    scores = [0.0] * 262 + [-float(i) for i in range(len(tokens) - 262)]
    ids = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0}
    return Vocabulary(original, "llama", "default", tokens, kinds, scores, ids=ids, add_bos=True)


def rows_of(name: str, weight: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    """A weight as llama.cpp stores it: rotary pairs side by side in llama, and one more in Gemma's norms."""
    heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
    if architecture == "llama":
        for ending, count in heads.items():
            if name.endswith(ending):
                parts = weight.reshape(count, 2, -1, weight.shape[1])
                return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(weight.shape)
    return weight + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else weight


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    vocabulary: Vocabulary,
    architecture: str,
    kinds: Mapping[str, gguf.GGMLQuantizationType] | Callable[[str], gguf.GGMLQuantizationType] | None = None,
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    metadata: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    named: str | None = None,
) -> Path:
    """Write ``model`` and its tokenizer to ``path``.

    Args:
        path: of the file.
        model: float32, of a family of `cats.models.gguf_config`.
        vocabulary: its tokenizer.
        architecture: as GGUF names it.
        kinds: type of each matrix by GGUF's name; float32 where none is given, and for vectors.
        change: edits the tensors by GGUF's names before they are written.
        metadata: adds more keys.
        endianess: byte order.
        named: what the file says of its architecture, where that is to be wrong.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, named or architecture, endianess=endianess)
    _write_sizes(writer, config, architecture)
    _write_vocabulary(writer, vocabulary)
    metadata(writer)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    tensors = {}
    for name, tensor in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            tensors[stored] = rows_of(name, tensor.numpy(), architecture, config)
    change(tensors)
    choose = kinds.get if isinstance(kinds, Mapping) else (kinds or (lambda name: None))
    for name, tensor in tensors.items():
        kind = choose(name) if tensor.ndim == 2 else None
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
        else:
            writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: Any, architecture: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "llama":
        writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    if architecture != "qwen2" and getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    setters = {
        "bos": writer.add_bos_token_id, "eos": writer.add_eos_token_id,
        "padding": writer.add_pad_token_id, "unknown": writer.add_unk_token_id,
    }  # fmt: skip
    for role, number in vocabulary.ids.items():
        setters[role](number)
    writer.add_add_bos_token(vocabulary.add_bos)
