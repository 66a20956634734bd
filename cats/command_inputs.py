"""What every command starts from: the options that say which model, that model, and text as tokens."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cats_kernels.quantized import BITS, GROUP_SIZES
from torch import Tensor

from cats.devices import resolve_device
from cats.models import DTYPES, load_model
from cats.quantization import GROUP_SIZE, LINEARS
from cats.text_config import text_config
from cats.texts import beginning


def model_options() -> argparse.ArgumentParser:
    """Options of every command: which model, where, in what format."""
    on_model = argparse.ArgumentParser(add_help=False)
    on_model.add_argument(
        "model", metavar="MODEL", help="hub id, model directory, GGUF file, pocket, or shape:NAME (bench)"
    )
    on_model.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    on_model.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: as stored")
    on_model.add_argument(
        "--bits", type=int, choices=BITS, help="quantise the MLPs' weights while they are loaded (default: do not)"
    )
    sizes = ["row", *map(str, GROUP_SIZES)]
    on_model.add_argument(
        "--group-size", choices=sizes, help=f"weights that share a scale, with --bits (default {GROUP_SIZE})"
    )
    on_model.add_argument(
        "--linears",
        choices=LINEARS,
        help="with --bits: all is attention and the output matrix too (default mlp)",
    )
    on_model.add_argument(
        "--packed", action="store_true", help="keep the MLPs' Q8_0 or Q4_0 weights of a GGUF file as they are"
    )
    return on_model


def sample_text(paths: Sequence[Path] | None, heldout: bool) -> str:
    """The files' text, or half of the paragraphs of Python's documentation: one half calibrates, the other measures.

    Raises:
        ValueError: a file cannot be read, or is not UTF-8 text.
    """
    if not paths:
        from pydoc_data.topics import topics

        # sections recur among the topics: without repetitions no paragraph is in both halves
        paragraphs = list(dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")))
        middle = len(paragraphs) // 2
        return "\n\n".join(paragraphs[middle:] if heldout else paragraphs[:middle])
    texts = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"--text {path} is not UTF-8 text: {error}") from error
        except OSError as error:
            raise ValueError(f"--text {path} cannot be read: {error.strerror}") from error
    return "\n\n".join(texts)


def check_tokens(tokens: int) -> None:
    """Raise ValueError unless ``tokens`` is positive."""
    if tokens < 1:
        raise ValueError(f"--tokens must be positive, not {tokens}")


def token_batches(model: Any, tokenizer: Any, text: str, tokens: int, length: int = 512) -> list[Tensor]:
    """``text`` as int64 blocks (1, length), ``tokens`` ids in all or as many as there are; each begins with the token
    that the tokenizer puts before texts, if any, in place of its first.

    Raises:
        ValueError: ``tokens`` is not positive, or the text is empty.
    """
    check_tokens(tokens)
    length = min(length, getattr(text_config(model), "max_position_embeddings", length))
    # seven characters make more than a token in every tokenizer seen: no need to encode a whole book
    ids = tokenizer(text[: 7 * tokens + 1000], add_special_tokens=False, verbose=False, return_tensors="pt")
    blocks = ids["input_ids"].long()[:, :tokens].split(length, dim=1)
    if not blocks or not blocks[0].numel():
        raise ValueError("the text is empty: give --text files with something to read")
    if begin := beginning(tokenizer):
        for block in blocks:
            block[:, 0] = begin[0]
    return list(blocks)


def load(arguments: argparse.Namespace, layers: int | None = None) -> tuple[Any, Any]:
    """The model, or the first ``layers`` of it, and its tokenizer on the device asked for.

    Raises:
        ValueError, OSError: as `load_model`; an unknown or absent device; a model without a tokenizer; a group size
            without bits.
    """
    bits, group_size = arguments.bits, arguments.group_size or str(GROUP_SIZE)
    if bits is None and arguments.group_size is not None:
        raise ValueError("--group-size is for quantised weights: give --bits 8 or --bits 4 too")
    if bits is None and arguments.linears is not None:
        raise ValueError("--linears is for quantised weights: give --bits 8 or --bits 4 too")
    if bits == 4 and group_size == "row":
        raise ValueError(f"--group-size row is for --bits 8: allowed are {', '.join(map(str, GROUP_SIZES))}")
    device, size = resolve_device(arguments.device), None if group_size == "row" else int(group_size)
    packed, linears = arguments.packed, arguments.linears or "mlp"
    model, tokenizer = load_model(arguments.model, arguments.dtype, device, layers, 0, packed, bits, size, linears)
    if tokenizer is None and arguments.command != "bench":
        kind = "has random weights and" if arguments.model.startswith("shape:") else "has"
        raise ValueError(f"{arguments.model} {kind} no tokenizer: only `cats bench` can use it")
    return model, tokenizer
