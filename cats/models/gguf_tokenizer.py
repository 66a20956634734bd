"""The tokenizer in a GGUF file, as the model's own repository has it.

Sentencepiece vocabularies (Llama 2, Mistral, Gemma) come from transformers' own reading. Byte-level ones (Llama 3,
Qwen, SmolLM) are built here, since transformers 5.23 makes GPT-2's tokenizer of them: without Qwen's NFC normaliser and
with a bos that Qwen has not (an artefact of the format), with padding rows of the embedding as tokens named
``[PAD151936]``, with an ``<|endoftext|>`` beyond the vocabulary where the model has none, with words split that Llama 3
takes whole, with digits together that SmolLM takes one at a time, and with GPT-2's way of splitting text where it does
not know the rule.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, GemmaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cats.models.gguf_header import CONTROL, UNUSED, USER_DEFINED, Header

# the expressions that split text before merging, from the models' tokenizer.json
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


@dataclass(frozen=True)
class Rule:
    """How a byte-level tokenizer prepares text: an expression (None: GPT-2's), digits apart, NFC, whole words first."""

    expression: str | None = None
    single_digits: bool = False
    nfc: bool = False
    whole_words: bool = False

    def pre_tokenizer(self) -> Any:
        """As a `tokenizers` object."""
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.expression is None)
        parts: list[Any] = [bytes_]
        if self.expression:
            parts.insert(0, pre_tokenizers.Split(Regex(self.expression), behavior="isolated"))
        if self.single_digits:
            parts.insert(0, pre_tokenizers.Digits(individual_digits=True))
        return pre_tokenizers.Sequence(parts)


_LLAMA3_RULE = Rule(_LLAMA3, whole_words=True)
RULES = {  # by llama.cpp's names
    "qwen2": Rule(_QWEN2, nfc=True),
    "llama-bpe": _LLAMA3_RULE,
    "llama3": _LLAMA3_RULE,
    "llama-v3": _LLAMA3_RULE,
    "smollm": Rule(single_digits=True),
    "gpt-2": Rule(),
}


def make_tokenizer(header: Header) -> PreTrainedTokenizerBase:
    """The tokenizer of the model in a file.

    Raises:
        ValueError: the file has none, or one of a kind that is not known.
    """
    meta = header.metadata
    model, name = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if "tokenizer.ggml.tokens" not in meta:
        raise ValueError(f"{header.path} holds no tokenizer: convert the model again together with its tokenizer")
    if model == "gpt2" and name in RULES:
        tokenizer = _byte_level(header, RULES[name])
    elif model == "llama":
        kind = GemmaTokenizer if header.architecture.startswith("gemma") else PreTrainedTokenizerFast
        tokenizer = kind.from_pretrained(header.path.parent, gguf_file=header.path.name)
        for key in ("gguf_file", "name_or_path", "is_local", "local_files_only"):  # of this machine
            tokenizer.init_kwargs.pop(key, None)
        tokenizer.name_or_path = ""
    else:
        raise ValueError(
            f"{header.path} has a tokenizer of the kind {model} with the splitting rule {name}: "
            f"known are llama, and gpt2 with {', '.join(RULES)}"
        )
    tokenizer.model_max_length = meta[f"{header.architecture}.context_length"]
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    return tokenizer


def _byte_level(header: Header, rule: Rule) -> PreTrainedTokenizerBase:
    meta: dict[str, Any] = header.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    kinds = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.whole_words))
    inner.pre_tokenizer = rule.pre_tokenizer()
    inner.decoder = decoders.ByteLevel()
    if rule.nfc:
        inner.normalizer = normalizers.NFC()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            special = kind == CONTROL
            (inner.add_special_tokens if special else inner.add_tokens)(
                [AddedToken(token, normalized=False, special=special)]
            )
    roles = {"eos": "eos", "pad": "padding", "unk": "unknown"}
    if not header.architecture.startswith("qwen"):
        roles["bos"] = "bos"
    numbers = {role: meta.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
    special_tokens = {f"{role}_token": None if i is None else tokens[i] for role, i in numbers.items()}
    add_bos = "bos" in roles and bool(meta.get("tokenizer.ggml.add_bos_token", False))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"bos_token": None, **special_tokens}, add_bos_token=add_bos, add_eos_token=False
    )
