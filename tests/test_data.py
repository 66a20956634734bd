"""Blocks of token ids from text."""

import tracemalloc
from itertools import islice
from typing import Any

import pytest
import torch

from cats.models import load_tokenizer
from experiments import data
from experiments.data import blocks, texts


class Tokenizer:
    """A token a character: its code point."""

    eos_token_id: int | None = 0
    bos_token_id: int | None = None
    begins: tuple[int, ...] = ()

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_options: object) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        return {"input_ids": [*self.begins * add_special_tokens, *map(ord, text)]}


def test_documents_are_joined_end_to_end_and_only_as_many_are_read_as_needed() -> None:
    read: list[str] = []

    def documents():
        for document in ("abc", "", "defgh", "never read"):
            read.append(document)
            yield document

    found = blocks(documents(), Tokenizer(), count=2, length=4)  # type: ignore[arg-type]
    assert found.dtype == torch.int64
    assert found.tolist() == [[97, 98, 99, 0], [0, 100, 101, 102]]
    assert read == ["abc", "", "defgh"]
    bare = Tokenizer()
    bare.eos_token_id = None
    assert blocks(["abc", "", "de"], bare, 1, 5).tolist() == [[97, 98, 99, 100, 101]]  # type: ignore[arg-type]


@pytest.mark.parametrize("begins", [(), (1,)])
def test_documents_begin_as_the_tokenizer_begins_them(begins: tuple[int, ...]) -> None:
    tokenizer = Tokenizer()
    tokenizer.bos_token_id, tokenizer.begins = 1, begins
    found = blocks(["ab", "c"], tokenizer, 1, 5 + 2 * len(begins))  # type: ignore[arg-type]
    assert found.tolist() == [[*begins, 97, 98, 0, *begins, 99, 0]]


def test_every_block_begins_as_texts_do() -> None:
    tokenizer = Tokenizer()
    tokenizer.bos_token_id, tokenizer.begins = 1, (1,)
    found = blocks(["abcdefgh"], tokenizer, 2, 4)  # type: ignore[arg-type]
    assert found.tolist() == [[1, 97, 98, 99], [1, 101, 102, 103]]


def test_too_little_text_is_said_with_its_size() -> None:
    with pytest.raises(ValueError, match="the text has only 6 tokens, but 2 blocks of 4"):
        blocks(["abc", "d"], Tokenizer(), 2, 4)  # type: ignore[arg-type]


def test_ids_are_not_held_as_python_integers() -> None:
    """A million ids in a list are 8 MB of pointers alone."""
    ids = list(range(1000))

    class Thousand(Tokenizer):
        eos_token_id = None

        def __call__(self, text: str | list[str], *_arguments: object, **_options: object) -> dict[str, list]:
            return {"input_ids": [ids] * len(text) if isinstance(text, list) else ids}

    tokenizer: Any = Thousand()
    tracemalloc.start()
    try:
        assert blocks(("" for _ in range(1000)), tokenizer, 1000, 1000).shape == (1000, 1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2e6


@pytest.mark.parametrize("begins", [False, True])
def test_blocks_are_those_of_the_documents_one_by_one(begins: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many a tokenizer is given at once, and with tokens that are several characters or part of one."""
    tokenizer = load_tokenizer("pocket")
    assert tokenizer is not None
    if begins:
        monkeypatch.setattr(data, "beginning", lambda _tokenizer: [tokenizer.eos_token_id])
    documents = list(islice(texts({"source": "pocket"}, "heldout", 3), 12))
    documents[3:3] = ["", "\N{SNOWMAN}\N{GRINNING FACE}" * 50, "a  b\r\n\tc"]
    first = [tokenizer.eos_token_id] * begins
    expected = []
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        expected += [*first, *ids, tokenizer.eos_token_id]
    length = 32
    made = torch.tensor(expected[: len(expected) // length * length]).view(-1, length)
    if begins:
        made[:, 0] = tokenizer.eos_token_id
    for at_once in (1, 700, 2**20):
        monkeypatch.setattr(data, "AT_ONCE", at_once)
        for count in (len(made), len(made) // 3, 1):
            assert torch.equal(blocks(documents, tokenizer, count, length), made[:count])
        with pytest.raises(ValueError, match=f"only {len(expected)} tokens"):
            blocks(documents, tokenizer, len(made) + 1, length)


@pytest.mark.parametrize("online", [True, False])
def test_a_network_lost_while_text_is_read_is_one_sentence(online: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clients' errors are no OSErrors; others, such as a bug's, stay what they are."""
    answers = [True, online]

    def documents(*_arguments: object):
        yield "first"
        raise RuntimeError("Server disconnected without sending a response.")

    monkeypatch.setattr(data, "_documents", documents)
    monkeypatch.setattr(data, "reachable", lambda: answers.pop(0))
    found = texts({"path": "some/corpus", "split": "train"}, "train", 0)
    assert next(found) == "first"
    with pytest.raises(RuntimeError if online else OSError, match="Server" if online else "the hub cannot be reached"):
        next(found)
