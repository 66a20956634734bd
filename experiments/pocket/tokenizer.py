"""Byte-level BPE of the pocket model: 2048 pieces learned from the training modules.

A line break and the indentation that follows it become one piece, so that code costs few tokens (about 3.4 bytes each).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 2048


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """Learn a byte-level BPE of `vocabulary` pieces, the end-of-text piece included, from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_pretrained(tokenizer: Tokenizer, context: int) -> PreTrainedTokenizerFast:
    """Wrap for transformers; `context` tokens is the longest input."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def encode_texts(tokenizer: Tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one stream of uint16 ids, each text preceded by the end-of-text piece."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.asarray([end, *encoding.ids], dtype=np.uint16) for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate(pieces)
