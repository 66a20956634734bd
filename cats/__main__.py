"""CATS on a model, without writing Python.

cats calibrate MODEL --sparsity 0.5 --output thresholds.json      # thresholds from sample text
cats sparsity MODEL --thresholds thresholds.json                  # what each layer skips on other text
cats generate MODEL --thresholds thresholds.json "The weather"    # text from the sparse model
cats bench MODEL --thresholds thresholds.json                     # tokens per second, dense and sparse

MODEL is a hub id (owner/name), a directory written by save_pretrained, `pocket` (shipped with this package), or for
bench also shape:mistral-7b and the like (random weights).
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import cats
from cats.calibration import check_sparsity
from cats.models import DTYPES, load_model
from cats.patching import KERNELS
from cats.structure import resolve_device


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(
        prog="cats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    on_model = argparse.ArgumentParser(add_help=False)
    on_model.add_argument("model", metavar="MODEL", help="hub id, model directory, pocket, or shape:NAME (bench)")
    on_model.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    on_model.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="default: as stored")
    on_text = argparse.ArgumentParser(add_help=False)
    on_text.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own documentation)"
    )
    on_text.add_argument("--tokens", type=int, default=16384, help="how many tokens to read (default 16384)")
    patched = argparse.ArgumentParser(add_help=False)
    patched.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON file that `cats calibrate` wrote")
    patched.add_argument("--kernel", default="auto", choices=KERNELS)

    command = commands.add_parser("calibrate", parents=[on_model, on_text], help="find thresholds and save them")
    command.add_argument("--sparsity", type=float, default=0.5, help="fraction to skip, in [0, 1) (default 0.5)")
    command.add_argument("--output", type=Path, default=Path("thresholds.json"), help="default thresholds.json")
    commands.add_parser("sparsity", parents=[on_model, on_text, patched], help="measure what each layer skips")
    command = commands.add_parser("generate", parents=[on_model, patched], help="continue a prompt")
    command.add_argument("prompt")
    command.add_argument("--new-tokens", type=int, default=64)
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    command.add_argument("--seed", type=int, default=0)
    command = commands.add_parser("bench", parents=[on_model, patched], help="time generation, dense and sparse")
    command.add_argument("--sparsity", type=float, default=0.5, help="target when no --thresholds are given")
    command.add_argument("--new-tokens", type=int, default=64)
    command.add_argument("--rounds", type=int, default=5)
    return root


def sample_text(paths: Sequence[Path] | None, heldout: bool) -> str:
    """The files' text, or half of the paragraphs of Python's documentation: one half calibrates, the other measures.

    Raises:
        ValueError: a file is not UTF-8 text.
        OSError: a file cannot be read.
    """
    if not paths:
        from pydoc_data.topics import topics

        # sections recur among the topics: without repetitions no paragraph is in both halves
        paragraphs = list(dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")))
        middle = len(paragraphs) // 2
        return "\n\n".join(paragraphs[middle:] if heldout else paragraphs[:middle])
    try:
        return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)
    except UnicodeDecodeError as error:
        raise ValueError(f"--text {' '.join(map(str, paths))} is not UTF-8 text: {error}") from error


def token_batches(model: Any, tokenizer: Any, text: str, tokens: int, length: int = 512) -> list[Tensor]:
    """``text`` as int64 blocks (1, length), ``tokens`` ids in all or as many as there are.

    Raises:
        ValueError: ``tokens`` is not positive, or the text is empty.
    """
    if tokens < 1:
        raise ValueError(f"--tokens must be positive, not {tokens}")
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    # seven characters make more than a token in every tokenizer seen: no need to encode a whole book
    ids = tokenizer(text[: 7 * tokens + 1000], add_special_tokens=False, verbose=False, return_tensors="pt")
    blocks = ids["input_ids"].long()[:, :tokens].split(length, dim=1)
    if not blocks or not blocks[0].numel():
        raise ValueError("the text is empty: give --text files with something to read")
    return list(blocks)


def load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer on the device asked for.

    Raises:
        ValueError, OSError: as `load_model`; an unknown or absent device; a model without a tokenizer.
    """
    device = resolve_device(arguments.device)
    model, tokenizer = load_model(arguments.model, arguments.dtype, device)
    if tokenizer is None and arguments.command != "bench":
        raise ValueError(f"{arguments.model} has random weights and no tokenizer: only `cats bench` can use it")
    return model, tokenizer


def calibrate(arguments: argparse.Namespace) -> None:
    """Write thresholds for a model."""
    check_sparsity(arguments.sparsity)
    folder = arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.output.is_dir() or not os.access(folder, os.W_OK):  # said before the work, not after it
        raise ValueError(
            f"--output {arguments.output} cannot be written: give a file in a folder that can be written to"
        )
    model, tokenizer = load(arguments)
    batches = token_batches(model, tokenizer, sample_text(arguments.text, heldout=False), arguments.tokens)
    thresholds = cats.calibrate(model, tqdm(batches, desc="calibrate"), arguments.sparsity)
    thresholds.save(arguments.output)
    source = "the files given" if arguments.text else "Python's documentation (--text FILE reads your own)"
    print(f"{len(thresholds.gate)} thresholds from {thresholds.tokens} tokens of {source}: {arguments.output}")


def sparsity(arguments: argparse.Namespace) -> None:
    """Print the fraction of gate activations that each layer skips."""
    if arguments.thresholds is None:
        raise ValueError("--thresholds FILE is needed: `cats calibrate` makes one")
    thresholds = cats.Thresholds.load(arguments.thresholds)
    model, tokenizer = load(arguments)
    cats.apply(model, thresholds, arguments.kernel)
    batches = token_batches(model, tokenizer, sample_text(arguments.text, heldout=True), arguments.tokens)
    measured = cats.measure_sparsity(model, tqdm(batches, desc="sparsity"))
    for name, fraction in measured.items():
        print(f"{name}  {fraction:.4f}")
    print(f"mean of {len(measured)} layers  {fmean(measured.values()):.4f}  (target {thresholds.sparsity:g})")


def generate(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation."""
    if arguments.new_tokens < 1:
        raise ValueError(f"--new-tokens must be positive, not {arguments.new_tokens}")
    if not arguments.temperature >= 0:
        raise ValueError(f"--temperature must be 0 or more, not {arguments.temperature}")
    thresholds = cats.Thresholds.load(arguments.thresholds) if arguments.thresholds else None
    model, tokenizer = load(arguments)
    if thresholds:
        cats.apply(model, thresholds, arguments.kernel)
    ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    torch.manual_seed(arguments.seed)
    options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if arguments.temperature > 0:
        options = {"do_sample": True, "temperature": arguments.temperature}
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=arguments.new_tokens,
        pad_token_id=tokenizer.eos_token_id, **options,
    )  # fmt: skip
    print(tokenizer.decode(output[0], skip_special_tokens=True))


class Clock:
    """A streamer for `model.generate` that notes when each token comes (the paper counts from first to last token)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        """Called with the prompt, then with each new token, already on the CPU."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called after the last token."""

    def tokens_per_second(self) -> float:
        """Rate from the first new token to the last; there must be two."""
        first, *_, last = self.times[1:]
        return (len(self.times) - 2) / (last - first)


def bench(arguments: argparse.Namespace) -> None:
    """Time greedy generation with and without CATS, one round each in turn, so that a drift hits both alike."""
    if arguments.new_tokens < 2 or arguments.rounds < 1:
        raise ValueError("--new-tokens must be at least 2 and --rounds at least 1")
    check_sparsity(arguments.sparsity)
    thresholds = cats.Thresholds.load(arguments.thresholds) if arguments.thresholds else None
    model, tokenizer = load(arguments)
    if tokenizer is None:
        batches = [torch.randint(model.config.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))]
    else:
        batches = token_batches(model, tokenizer, sample_text(None, heldout=False), 2048)
    thresholds = thresholds or cats.calibrate(model, batches, arguments.sparsity)
    prompt = batches[0][:, :32].to(model.device)
    rates: dict[str, list[float]] = {"dense": [], "cats": []}
    for index in tqdm(range(arguments.rounds + 1), desc="bench"):  # the first round compiles and is left out
        for name, values in rates.items():
            if name == "cats":
                cats.apply(model, thresholds, arguments.kernel)
            clock = Clock()
            model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=clock, do_sample=False, temperature=None,
                top_p=None, top_k=None, min_new_tokens=arguments.new_tokens, max_new_tokens=arguments.new_tokens,
                pad_token_id=0,
            )  # fmt: skip
            if index:
                values.append(clock.tokens_per_second())
            cats.remove(model)
    cats.apply(model, thresholds, arguments.kernel)
    skipped = fmean(cats.measure_sparsity(model, batches).values())
    for name, values in rates.items():
        print(f"{name}  {median(values):.1f} tokens per second  ({min(values):.1f} to {max(values):.1f})")
    ratios = [sparse / dense for dense, sparse in zip(*rates.values(), strict=True)]
    spread = f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds)"
    print(f"cats / dense  {median(ratios):.3f}  {spread}, skipping {skipped:.1%} of the neurons")


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `cats` and ``python -m cats``; bad input is one sentence on stderr and status 2."""
    arguments = parser().parse_args(words)
    command = {"calibrate": calibrate, "sparsity": sparsity, "generate": generate, "bench": bench}[arguments.command]
    try:
        command(arguments)
    except torch.OutOfMemoryError as error:
        print(f"error: {arguments.model} does not fit into the GPU's memory: {error}", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
