"""CATS on a model, without writing Python.

cats calibrate MODEL --sparsity 0.5 --output thresholds.json      # thresholds from sample text
cats calibrate MODEL --criterion up-norm --output thresholds.json # another criterion than CATS
cats sparsity MODEL --thresholds thresholds.json                  # what each layer skips on other text
cats generate MODEL --thresholds thresholds.json "The weather"    # text from the sparse model
cats bench MODEL --thresholds thresholds.json                     # tokens per second, dense and sparse
cats bench shape:mistral-7b --layers 4                            # what CATS gains here: random weights, true shape
cats quantize MODEL --bits 4 --output DIRECTORY                   # a model of int4 weights, for the commands above

MODEL is a hub id (owner/name), a directory written by save_pretrained or by `cats quantize`, a GGUF file, `pocket`
(shipped with this package), or for bench also shape:mistral-7b and the like (random weights). With --bits 8 or --bits 4
every command works on quantised MLPs, with --linears all on quantised attention and output matrix too; give the same
options to `calibrate` as to what uses its thresholds.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TextIO

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import TextStreamer

import cats
from cats import criteria
from cats.checks import KERNELS, PREFILLS
from cats.command_inputs import check_tokens, load, model_options, sample_text, token_batches
from cats.files import check_output
from cats.generation import LOOPS as LOOP_NAMES
from cats.quantized_files import QUANTIZED
from cats.sparsity import overall_sparsity
from cats.text_config import text_config
from cats.thresholds import Thresholds, check_sparsity


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    root = argparse.ArgumentParser(
        prog="cats", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = root.add_subparsers(dest="command", required=True)
    on_model = model_options()
    on_text = argparse.ArgumentParser(add_help=False)
    on_text.add_argument(
        "--text", nargs="+", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own documentation)"
    )
    on_text.add_argument("--tokens", type=int, default=16384, help="how many tokens to read (default 16384)")
    patched = argparse.ArgumentParser(add_help=False)
    patched.add_argument("--thresholds", type=Path, metavar="FILE", help="JSON file that `cats calibrate` wrote")
    patched.add_argument(
        "--kernel",
        default="auto",
        choices=KERNELS,
        help="auto (default): the one for the device; reference: masks only",
    )
    patched.add_argument(
        "--prefill", default="sparse", choices=PREFILLS, help="dense leaves prompts unmasked (default sparse)"
    )
    by_criterion = argparse.ArgumentParser(add_help=False)
    by_criterion.add_argument("--criterion", default="cats", help=f"{', '.join(criteria.names())} (default cats)")
    by_criterion.add_argument("--sparsity", type=float, default=0.5, help="fraction to skip, in [0, 1) (default 0.5)")

    command = commands.add_parser(
        "calibrate", parents=[on_model, on_text, by_criterion], help="find thresholds and save them"
    )
    command.add_argument(
        "--sequential",
        action="store_true",
        help="layer by layer, each behind the thresholds of those before it: the sparse model skips its target "
        "(default: thresholds of the dense model, as in the paper)",
    )
    command.add_argument("--output", type=Path, default=Path("thresholds.json"), help="default thresholds.json")
    commands.add_parser("sparsity", parents=[on_model, on_text, patched], help="measure what each layer skips")
    command = commands.add_parser("generate", parents=[on_model, patched], help="continue a prompt")
    command.add_argument("prompt", help="text to continue; also as --prompt TEXT")
    command.add_argument("--new-tokens", "--max-new-tokens", type=int, default=64, metavar="N", help="default 64")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the likeliest token")
    command.add_argument("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    command.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest that add up to P")
    command.add_argument("--seed", type=int, default=0, help="of the draws, with --temperature (default 0)")
    command.add_argument(
        "--loop",
        default="auto",
        choices=["auto", "transformers", *LOOP_NAMES],
        help="auto (default): compiled and one CUDA graph on a GPU; transformers: model.generate",
    )
    command = commands.add_parser(
        "bench", parents=[on_model, patched, by_criterion], help="time generation, dense and sparse"
    )
    command.add_argument("--layers", type=int, metavar="N", help="the first N layers alone, where all are too much")
    command.add_argument("--new-tokens", type=int, default=64, metavar="N", help="per round (default 64)")
    command.add_argument("--rounds", type=int, default=5, metavar="N", help="besides one that warms up (default 5)")
    command = commands.add_parser("quantize", parents=[on_model], help="write a model with quantised weights")
    command.add_argument("--output", type=Path, required=True, metavar="DIRECTORY", help="of the new model")
    return root


@contextmanager
def forward_bar(model: nn.Module, label: str, total: int) -> Iterator[None]:
    """A progress bar that counts the model's forward passes, however often its batches are gone through."""
    with tqdm(total=total, desc=label, disable=not total) as bar:

        def count(*_: object) -> None:
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def calibrate(arguments: argparse.Namespace) -> None:
    """Write thresholds for a model."""
    check_sparsity(arguments.sparsity)
    criterion = criteria.get(arguments.criterion)
    check_output(arguments.output)  # said before the work, not after it
    check_tokens(arguments.tokens)
    text = sample_text(arguments.text, heldout=False)
    model, tokenizer = load(arguments)
    batches = token_batches(model, tokenizer, text, arguments.tokens)
    reads = bool(criterion.scored or criterion.rms_of or criterion.searches)
    passes = (2 if criterion.rms_of else reads) + (arguments.sequential and (criterion.scored or criterion.searches))
    with forward_bar(model, "calibrate", len(batches) * passes + criterion.searches):
        thresholds = cats.calibrate(
            model, batches, arguments.sparsity, criterion=criterion.name, sequential=arguments.sequential
        )
    thresholds.save(arguments.output)
    source = "the files given" if arguments.text else "Python's documentation (--text FILE reads your own)"
    count, label = sum(map(len, thresholds.sites.values())), criterion.label(thresholds.sparsity)
    origin = f"from {thresholds.tokens} tokens of {source}" if thresholds.tokens else "that no text decides"
    print(f"{label}: {count} thresholds {origin}: {arguments.output}")


def sparsity(arguments: argparse.Namespace) -> None:
    """Print the fraction of neurons (or inputs) that each layer skips."""
    if arguments.thresholds is None:
        raise ValueError("--thresholds FILE is needed: `cats calibrate` makes one")
    thresholds = Thresholds.load(arguments.thresholds)
    label = criteria.label(thresholds.criterion, thresholds.sparsity)
    check_tokens(arguments.tokens)
    text = sample_text(arguments.text, heldout=True)
    model, tokenizer = load(arguments)
    cats.apply(model, thresholds, arguments.kernel, arguments.prefill)
    batches = token_batches(model, tokenizer, text, arguments.tokens)
    measured = cats.measure_sparsity(model, tqdm(batches, desc="sparsity"))
    for name, fraction in measured.items():
        own = f"  (target {thresholds.level_of(name):.4f})" if thresholds.levels else ""
        print(f"{name}  {fraction:.4f}{own}")
    whole = overall_sparsity(model, measured)
    print(f"mean of {len(measured)} layers  {whole:.4f}  (target {thresholds.sparsity:g}, {label})")


def generate(arguments: argparse.Namespace) -> None:
    """Print the prompt and its continuation; on a terminal, token by token."""
    if arguments.new_tokens < 1:
        raise ValueError(f"--new-tokens must be positive, not {arguments.new_tokens}")
    if not arguments.temperature >= 0:
        raise ValueError(f"--temperature must be 0 or more, not {arguments.temperature}")
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"--seed must be a whole number from 0 to 2^63, not {arguments.seed}")
    thresholds = Thresholds.load(arguments.thresholds) if arguments.thresholds else None
    model, tokenizer = load(arguments)
    if thresholds:
        cats.apply(model, thresholds, arguments.kernel, arguments.prefill)
    else:
        warnings.warn("no --thresholds: this is the dense model that speaks", stacklevel=1)
    ids = tokenizer(arguments.prompt, return_tensors="pt")["input_ids"].long().to(model.device)
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    positions = getattr(text_config(model), "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + arguments.new_tokens > positions:
        warnings.warn(
            f"the prompt's {ids.shape[1]} tokens and --new-tokens {arguments.new_tokens} go beyond the "
            f"{positions} positions of this model: what comes after them is not what it was trained for",
            stacklevel=1,
        )
    streamer = None
    if sys.stdout.isatty():
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    output = cats.generate(
        model, ids, arguments.new_tokens, temperature=arguments.temperature, top_k=arguments.top_k,
        top_p=arguments.top_p, seed=arguments.seed if arguments.temperature > 0 else None, streamer=streamer,
        loop=arguments.loop,
    )  # fmt: skip
    if streamer is None:
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
    if arguments.layers is not None and arguments.layers < 1:
        raise ValueError(f"--layers must be positive, not {arguments.layers}")
    check_sparsity(arguments.sparsity)
    criteria.get(arguments.criterion)  # said before the work, not after it
    thresholds = Thresholds.load(arguments.thresholds) if arguments.thresholds else None
    model, tokenizer = load(arguments, arguments.layers)
    if tokenizer is None:
        size, generator = text_config(model).vocab_size, torch.Generator().manual_seed(0)
        batches = [torch.randint(size, (1, 512), generator=generator)]
    else:
        batches = token_batches(model, tokenizer, sample_text(None, heldout=False), 2048)
    if thresholds is None:
        thresholds = cats.calibrate(model, batches, arguments.sparsity, criterion=arguments.criterion)
    kernel, prefill = arguments.kernel, arguments.prefill
    prompt = batches[0][:, :32].to(model.device)
    rates: dict[str, list[float]] = {"dense": [], "cats": []}
    for index in tqdm(range(arguments.rounds + 1), desc="bench"):  # the first round compiles and is left out
        for name, values in rates.items():
            if name == "cats":
                cats.apply(model, thresholds, kernel, prefill)
            clock = Clock()
            generated = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), streamer=clock, do_sample=False, temperature=None,
                top_p=None, top_k=None, min_new_tokens=arguments.new_tokens, max_new_tokens=arguments.new_tokens,
                pad_token_id=0, return_dict_in_generate=False,
            )  # fmt: skip
            if index:
                values.append(clock.tokens_per_second())
            cats.remove(model)
    cats.apply(model, thresholds, kernel, prefill)
    skipped = overall_sparsity(model, cats.measure_sparsity(model, [generated]))
    for name, values in rates.items():
        print(f"{name}  {median(values):.1f} tokens per second  ({min(values):.1f} to {max(values):.1f})")
    ratios = [sparse / dense for dense, sparse in zip(*rates.values(), strict=True)]
    spread = f"({min(ratios):.3f} to {max(ratios):.3f} in {len(ratios)} rounds)"
    label = criteria.label(thresholds.criterion, thresholds.sparsity)
    print(f"cats / dense  {median(ratios):.3f}  {spread}, {label} skipping {skipped:.1%} of the neurons")
    if arguments.layers is not None:
        count = text_config(model).num_hidden_layers
        print(f"layers  {count} alone: in the whole model the MLPs are another share of a token")


def quantize(arguments: argparse.Namespace) -> None:
    """Write a model with quantised weights, and its tokenizer beside it."""
    if arguments.bits is None and not arguments.packed:
        raise ValueError("to how many bits? Give --bits 8 or --bits 4, or --packed to keep those of a GGUF file")
    path = check_output(arguments.output / QUANTIZED)
    if others := [file.name for file in (*path.parent.glob("config.json"), *path.parent.glob("*.safetensors"))]:
        raise ValueError(f"{arguments.output} holds a model already ({others[0]}): give another directory, or empty it")
    model, tokenizer = load(arguments)
    try:
        tokenizer.save_pretrained(arguments.output)
    except OSError as error:
        raise OSError(f"{arguments.output} cannot be written: {error.strerror or error}") from error
    cats.save_quantized(model, path)  # last: what it lies in is a model from then on
    print(f"{arguments.output}: {path.stat().st_size / 1e6:.0f} MB, for the place of MODEL")


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """`warnings.showwarning` for people: without the line of code that warned."""
    print(f"warning: {message}", file=file or sys.stderr)


def with_prompt_last(words: Sequence[str]) -> list[str]:
    """``words`` with ``--prompt TEXT`` as the positional argument that it names (argparse takes one or the other)."""
    words = list(words)
    joined = next((i for i, word in enumerate(words) if word.startswith("--prompt=")), None)
    if joined is not None and "--" not in words[:joined]:
        words[joined : joined + 1] = words[joined].split("=", 1)
    if words[:1] == ["generate"] and "--prompt" in words[:-1]:
        place = words.index("--prompt")
        return [*words[:place], *words[place + 2 :], "--", words[place + 1]]
    return words


def main(words: Sequence[str] | None = None) -> int:
    """Entry point of `cats` and ``python -m cats``; bad input is one sentence on stderr and status 2."""
    arguments = parser().parse_args(with_prompt_last(sys.argv[1:] if words is None else words))
    command = {f.__name__: f for f in (calibrate, sparsity, generate, bench, quantize)}[arguments.command]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _show_warning
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
