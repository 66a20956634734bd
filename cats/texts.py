"""How a tokenizer begins texts."""

from transformers import PreTrainedTokenizerBase


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that ``tokenizer`` puts before every text, as a list of one id; empty where there is none.

    Models that were trained with it read a block of text without it badly, gemma-3-270m for one.
    """
    first: list[int] = tokenizer("")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []
