"""Text for calibration, perplexity and fine-tuning, as blocks of token ids.

The profile's ``[data]`` table says where it comes from: ``folder`` (``--data``) is a directory with data sets by the
hub's names and text (see `cats.task_data`) and is used instead of everything else; ``source = "pocket"`` is the
running Python's standard library; any other table is passed to `datasets.load_dataset` (``path``, ``name``,
``data_files``, ``column``, splits).
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cats.hub import reachable
from cats.task_data import TEXT, cache_of, check_folder, folder_hashes
from cats.texts import beginning
from experiments.framework.config import Config

PURPOSES = ("train", "heldout")
AT_ONCE = 2**20
"""Characters given to a tokenizer at once: what it makes of them needs some hundred bytes each until it is copied."""
SAMPLE, MARGIN = 64, 1.2
"""Documents that tell how many tokens a text has, and how many times those asked for that must be to be trusted."""


def on_hub(data: dict[str, Any]) -> bool:
    """Whether the table names a data set of the hub, not a directory or a kind of local file such as ``json``."""
    return "folder" not in data and "/" in data.get("path", "") and not Path(data["path"]).exists()


def texts(data: dict[str, Any], purpose: str, seed: int) -> Iterator[str]:
    """Documents for a purpose, shuffled by ``seed``: ``train`` (calibration too) or ``heldout`` (never trained on).

    A corpus with only a training split gives its first ``heldout_documents`` documents to ``heldout``.

    Raises:
        ValueError: an unknown purpose, a table with neither a known ``source`` nor a ``path``, an unknown column.
        OSError: the data set cannot be had, for example because the hub is out of reach: it is read as it is used.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"unknown purpose {purpose!r}: allowed are {', '.join(PURPOSES)}")
    if "folder" in data:
        yield from folder_text(data, purpose).shuffle(seed=seed)["text"]
        return
    if "path" not in data and data.get("source", "pocket") != "pocket":
        raise ValueError(f"[data] has source {data['source']!r}: give source = 'pocket', or the path of a data set")
    if "path" not in data:
        from experiments.pocket.corpus import load_corpus

        train, heldout, _report = load_corpus()
        yield from (train if purpose == "train" else heldout).shuffle(seed=seed)["text"]
        return
    remote = on_hub(data)
    out_of_reach = f"the text of {data['path']} is read from the hub as it is used, and the hub cannot be reached"
    if remote and not reachable():  # asked first: load_dataset tries for a minute
        raise OSError(out_of_reach)
    try:
        yield from _documents(data, purpose, seed)
    except Exception as error:
        if remote and not reachable():
            raise OSError(out_of_reach) from error
        raise


def folder_text(data: dict[str, Any], purpose: str) -> Dataset:
    """The documents for a purpose that the data folder has, in its order, in the column ``text``.

    Raises:
        OSError: the folder or its text is missing or cannot be read.
        ValueError: the text lacks the split or the column.
    """
    folder = Path(data["folder"])
    check_folder(folder, [TEXT])
    try:
        splits = load_dataset(str(folder / TEXT), cache_dir=cache_of(folder / TEXT))
    except Exception as error:
        raise OSError(f"the text in {folder / TEXT} cannot be read: {' '.join(str(error).split())}") from error
    if purpose not in splits:
        raise ValueError(f"the text in {folder / TEXT} has no split {purpose}: it has {', '.join(splits)}")
    documents = splits[purpose]
    if "text" not in documents.column_names:
        columns = ", ".join(documents.column_names)
        raise ValueError(f"the text in {folder / TEXT} has no column text in its split {purpose}: it has {columns}")
    return documents


def check_text(data: dict[str, Any]) -> None:
    """Refuse a data folder without text for every purpose, before any work. Raises as `folder_text`."""
    if "folder" in data:
        for purpose in PURPOSES:
            folder_text(data, purpose)


def check_length(
    data: dict[str, Any], tokenizer: PreTrainedTokenizerBase, purpose: str, seed: int, count: int, length: int
) -> None:
    """Refuse the text of a data folder when it has fewer than ``count`` blocks of ``length`` tokens.

    All of it is tokenised only where a sample says that it may be too short; the text of other sources is not read.

    Raises:
        ValueError: as `blocks`.
    """
    if "folder" not in data:
        return
    documents = list(texts(data, purpose, seed))
    sample = list(islice(documents, SAMPLE))  # they are shuffled
    found = sum(map(len, tokenizer(sample, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]))
    characters = max(1, sum(map(len, sample)))
    if found / characters * sum(map(len, documents)) < MARGIN * count * length:
        blocks(documents, tokenizer, count, length)


def text_identity(data: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of the files that the text of a data folder is in, by their path in the folder; else nothing."""
    return folder_hashes(Path(data["folder"]), Path(data["folder"]) / TEXT) if "folder" in data else {}


def _documents(data: dict[str, Any], purpose: str, seed: int) -> Iterator[str]:
    """`texts` of a data set of its own."""
    options = {key: data[key] for key in ("name", "data_files", "revision") if key in data}
    split = data.get("heldout_split", data["split"]) if purpose == "heldout" else data["split"]
    dataset = load_dataset(data["path"], split=split, streaming=True, **options)
    if "heldout_split" not in data:
        reserved = int(data.get("heldout_documents", 1000))
        dataset = dataset.take(reserved) if purpose == "heldout" else dataset.skip(reserved)
    column = data.get("column", "text")
    for row in dataset.shuffle(seed=seed, buffer_size=int(data.get("shuffle_buffer", 1000))):
        if column not in row:
            has = f"{data['path']} does not have: it has {', '.join(row)}"
            raise ValueError(f"[data] names the column {column!r}, which {has}")
        yield row[column]


def blocks(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:
    """The first ``count`` blocks of ``length`` token ids from documents joined end to end; int64 (count, length).

    A document begins with the token that the tokenizer puts before texts, if any, and ends with the end-of-text one.
    Such a token also takes the place of each block's first, see `cats.texts.beginning`.

    Raises:
        ValueError: the documents are too few.
    """
    ids = torch.empty(count * length, dtype=torch.int64)  # a list of the paper profile's 42 M ids would need 1.7 GB
    filled = 0
    begin = beginning(tokenizer)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    rest = iter(documents)
    while filled < len(ids) and (batch := _first(rest, min(len(ids) - filled, AT_ONCE), len(begin) + len(end))):
        for encoded in tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False)["input_ids"]:
            part = torch.tensor([*begin, *encoded, *end][: len(ids) - filled], dtype=torch.int64)
            ids[filled : filled + len(part)] = part
            filled += len(part)
    if filled < len(ids):
        raise ValueError(
            f"the text has only {filled} tokens, but {count} blocks of {length} were asked for: lower one of them"
        )
    made = ids.reshape(count, length)
    if begin:
        made[:, 0] = begin[0]
    return made


def _first(documents: Iterator[str], tokens: int, added: int) -> list[str]:
    """As many documents as have so many tokens at the very most, at one a character and ``added`` a document: all of
    them are needed, and a fast tokenizer spreads a list over the processor's cores."""
    batch: list[str] = []
    while tokens > 0 and (document := next(documents, None)) is not None:
        batch.append(document)
        tokens -= max(1, len(document) + added)
    return batch


def batches(
    config: Config, tokenizer: PreTrainedTokenizerBase, purpose: str, count: int, length: int, size: int = 8
) -> list[Tensor]:
    """``count`` blocks of ``length`` token ids for ``purpose``, as batches of at most ``size`` blocks."""
    ids = blocks(texts(config.data, purpose, config.seed), tokenizer, count, length)
    return list(ids.split(size))
