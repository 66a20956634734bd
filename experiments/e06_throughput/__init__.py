"""Figure 4: generation throughput, dense against CATS, in the loops of `decoding.py`, batch 1, greedy.

Tokens per second from the first to the last generated token; prefill, compile time and peak memory stand beside it.
Dense and CATS take turns on the same model in one process, prompt by prompt, in the order dense, CATS, CATS, dense.
The sparsity in effect is measured in an untimed pass over the very tokens that were generated. Also: what it costs to
grow (batch, context, sparsity, layers), where a token's time goes, what Amdahl's law allows from that, and whether
CATS generates the tokens it must. A model without a tokenizer (``shape:NAME``, random weights) gets random tokens for
prompts and calibration. Cost: four minutes on two cores (pocket); on an H200 two minutes a 7B model and dtype with two
prompts up to 512 tokens, hours with the paper's fifty up to 2048.

    nox -s experiment -- e06 --model shape:mistral-7b
"""

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import cats
from cats.models import DTYPES, load_config, load_model
from cats.observe import observe
from experiments.e06_throughput.amdahl import STEPS, AmdahlRow, ShareRow, shares_and_amdahl
from experiments.e06_throughput.cases import Case, cases_of, growth_of, options_of
from experiments.e06_throughput.decoding import Decoder, make_greedy
from experiments.framework.config import Config
from experiments.framework.results import Row, machine_name

MEMORY_SHARE = 0.85
"""Part of the free memory that a model's weights may take; the rest is for the cache, activations and one transpose."""


@dataclass(frozen=True)
class ThroughputRow(Row):
    """One prompt (or batch of prompts) generated to one length; ``decode_s`` holds ``generated_tokens - 1`` steps."""

    table: ClassVar[str] = "e06_throughput"
    machine: str
    model: str
    layers: int
    dtype: str
    variant: str
    sparsity_target: float | None
    sparsity_measured: float | None
    loop: str
    batch: int
    prompt: int
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_s: float
    tokens_per_second: float
    compile_s: float
    peak_memory_bytes: int | None
    cache_tokens: int


@dataclass(frozen=True)
class GreedyRow(Row):
    """How many of the first generated tokens two ways of computing the same function agree on (float32)."""

    table: ClassVar[str] = "e06_greedy"
    machine: str
    model: str
    layers: int
    dtype: str
    check: str
    tokens: int
    identical_tokens: int


ROWS = (ThroughputRow, ShareRow, AmdahlRow, GreedyRow)


def run(config: Config) -> Iterable[Row]:
    """Time every model in ``config.models`` in every dtype of the option ``dtypes``; see `options_of` for the rest."""
    options = options_of(config)
    if "graph" in {*options["lengths"], options["growth"].get("loop")} and not config.device.startswith("cuda"):
        raise ValueError(f'the loop "graph" is a CUDA graph, for which {config.device} is no device: use "eager"')
    for model in config.models:
        for dtype in options["dtypes"]:
            growing = bool(options["growth"]) and model == config.models[0] and dtype == options["dtypes"][0]
            key = f"{model}/{dtype}"
            yield from config.unit(key, partial(measure, config, options, model, dtype, growing), ROWS)


def measure(config: Config, options: dict[str, Any], name: str, dtype: str, growing: bool) -> list[Row]:
    """All rows of one model in one dtype."""
    cases = cases_of(options)
    grown, deeper = growth_of(options) if growing else ([], [])
    bench = Bench(config, options, name, dtype, options["layers"], [*cases, *grown])
    rows: list[Row] = []
    for case in config.progress([*cases, *grown], f"{name} {dtype}", len(cases) + len(grown)):
        rows += bench.time(case)
    if options["rounds"]:
        rows += bench.shares(cases[-1], rows)
    if options["check_tokens"] and bench.model.dtype == torch.float32:
        rows += bench.greedy_checks(options["check_tokens"])
    bench.close()
    for layers, case in deeper:
        bench = Bench(config, options, name, dtype, layers, [case])
        rows += bench.time(case)
        bench.close()
    return rows


class Bench:
    """A loaded model with thresholds for every sparsity that its cases need."""

    def __init__(
        self, config: Config, options: dict[str, Any], name: str, dtype: str, layers: int, cases: Sequence[Case]
    ) -> None:
        self.config, self.options = config, options
        self.name = name.removeprefix("shape:")
        full = load_config(name).num_hidden_layers
        kept = fitting_layers(name, dtype, config.device, min(layers or full, full))
        model, tokenizer = load_model(name, dtype, config.device, kept if kept < full else None, config.seed)
        self.model: PreTrainedModel = model
        make_greedy(model, max(case.context for case in cases))
        self.common: dict[str, Any] = {
            "machine": machine_name(config.device),
            "model": self.name,
            "layers": kept,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        model.set_attn_implementation(options["attention"].get(self.common["dtype"], "sdpa"))
        count = max(case.batch * (case.first_prompt + case.prompts) for case in cases)
        self.prompts = self._tokens(tokenizer, "heldout", count, max(case.prompt_tokens for case in cases), 1)
        sparsities = sorted({0.0, *(sparsity for case in cases for sparsity in case.sparsities)})
        length = min(options["calibration_tokens"], 64)
        text = self._tokens(tokenizer, "train", -(-options["calibration_tokens"] // length), length, 2)
        if options["calibration"] == "generated":
            text = Decoder(model, "eager", 2 * length).generate(text, length).tokens
        self.thresholds = cats.calibrate(model, text.split(4), sparsities)

    def _tokens(
        self, tokenizer: PreTrainedTokenizerBase | None, purpose: str, count: int, length: int, stream: int
    ) -> Tensor:
        """``count`` sequences of ``length`` tokens: text, or random tokens for a model without a tokenizer."""
        if tokenizer is None:
            generator = torch.Generator().manual_seed(self.config.seed * 10 + stream)
            return torch.randint(0, self.model.config.vocab_size, (count, length), generator=generator)
        # imported here, since it needs the datasets package, which a machine for timing shapes may lack
        from experiments.data import blocks, texts

        return blocks(texts(self.config.data, purpose, self.config.seed), tokenizer, count, length)

    def switch(self, sparsity: float | None, kernel: str | None = None) -> None:
        """Make the model dense (None) or CATS at ``sparsity``. What was compiled for either stays valid."""
        if sparsity is None:
            cats.remove(self.model)
        else:
            cats.apply(self.model, self.thresholds[sparsity], kernel or self.options["kernel"])

    def time(self, case: Case) -> list[Row]:
        """Rows of one case.

        One model is patched and unpatched in turn, rather than two models held: it fits any machine that holds the
        model once, peak memory is each variant's own, and compiled code survives the switch (both are kept, told apart
        by the class of the MLP). Only CUDA graphs are recorded again, as the down projection has moved: in the warm-up
        after each switch, or before each generation in the loop "graph".
        """
        decoder = Decoder(self.model, case.loop, case.context, self.options["dependent_launch"])
        variants: list[float | None] = [None, *case.sparsities]
        prompts = [self._prompt(case, number) for number in range(case.prompts)]
        compile_s = dict.fromkeys(variants, 0.0)
        for variant in variants:
            self.switch(variant)
            first = decoder.warm_up(prompts[0])
            if case.loop == "eager" and self.model.device.type == "cuda":
                # the growing cache asks for memory at every length: a first generation of 64 tokens ran at 15 tokens/s,
                # the second at 43 (dense, H200)
                decoder.generate(prompts[0], max(case.lengths))
            if case.loop != "eager":
                compile_s[variant] = first - decoder.warm_up(prompts[0])
        found = []
        for number, ids in enumerate(prompts):
            for variant in variants if number % 2 == 0 else variants[::-1]:
                self.switch(variant)
                decoder.warm_up(ids)
                found.append((number, variant, decoder.timed(ids, case.lengths)))
        rows: list[Row] = []
        for variant in variants:
            # the same function without the transposed down projection, with which torch takes 1139 ms instead of 40 for
            # one bfloat16 row on two AVX2 cores (d=4096, m=14336)
            self.switch(variant, "reference")
            for number, _, generation in (entry for entry in found if entry[1] == variant):
                sparsity = None if variant is None else decoded_sparsity(self.model, generation.tokens, case)
                for length in case.lengths:
                    rows.append(
                        ThroughputRow(
                            **self.common,
                            variant="dense" if variant is None else f"cats-{100 * variant:g}",
                            sparsity_target=variant,
                            sparsity_measured=None if sparsity is None else sparsity[length],
                            loop=case.loop,
                            batch=case.batch,
                            prompt=case.first_prompt + number,
                            prompt_tokens=case.prompt_tokens,
                            generated_tokens=length,
                            prefill_s=generation.prefill_s,
                            decode_s=generation.decode_s[length],
                            tokens_per_second=case.batch * (length - 1) / generation.decode_s[length],
                            compile_s=compile_s[variant],
                            peak_memory_bytes=generation.peak_memory_bytes,
                            cache_tokens=case.context,
                        )
                    )
        self.switch(None)
        return rows

    def _prompt(self, case: Case, number: int) -> Tensor:
        start = (case.first_prompt + number) * case.batch
        return self.prompts[start : start + case.batch, : case.prompt_tokens]

    def shares(self, case: Case, rows: Sequence[Row]) -> list[Row]:
        """Where a token's time goes at the case's longest length, and what Amdahl's law makes of it."""
        sparsity = case.sparsities[0]
        times: dict[float | None, list[float]] = {None: [], sparsity: []}
        for row in rows:
            if isinstance(row, ThroughputRow) and (row.loop, row.batch, row.prompt_tokens, row.generated_tokens) == (
                case.loop, 1, case.prompt_tokens, max(case.lengths)
            ) and row.sparsity_target in times:  # fmt: skip
                times[row.sparsity_target].append(math.log(row.decode_s / (row.generated_tokens - 1)))
        token_ms = {key: 1e3 * math.exp(sum(logs) / len(logs)) for key, logs in times.items()}
        common = {**self.common, "loop": case.loop}
        ids = self._prompt(case, 0).repeat(1, -(-case.context // case.prompt_tokens))[:, : case.context - STEPS]
        dependent = self.options["dependent_launch"] and case.loop == "graph"
        rounds = self.options["rounds"]
        return shares_and_amdahl(self.model, self.switch, sparsity, ids, token_ms, common, rounds, dependent)

    def greedy_checks(self, tokens: int) -> list[Row]:
        """CATS at sparsity 0 against dense, and the sparse kernel against the dense masked path at the first target."""
        sparsity = self.options["sparsities"][0]
        ids = self.prompts[:1, : self.options["prompt_tokens"]]
        decoder = Decoder(self.model, "eager", ids.shape[1] + tokens)

        def generated(target: float | None, kernel: str | None = None) -> Tensor:
            self.switch(target, kernel)
            return decoder.generate(ids, tokens).tokens[0, ids.shape[1] :]

        pairs = {
            "cats-0 against dense": (generated(0.0), generated(None)),
            f"cats-{100 * sparsity:g} against masked reference": (
                generated(sparsity),
                generated(sparsity, "reference"),
            ),
        }
        self.switch(None)
        return [
            GreedyRow(**self.common, check=check, tokens=tokens, identical_tokens=common_prefix(ours, other))
            for check, (ours, other) in pairs.items()
        ]

    def close(self) -> None:
        """Free the model."""
        del self.model
        torch._dynamo.reset()  # it holds on to what it compiled
        gc.collect()
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Number of leading elements in which two vectors of one length agree."""
    return int((a == b).long().cumprod(0).sum())


def decoded_sparsity(model: PreTrainedModel, tokens: Tensor, case: Case) -> dict[int, float]:
    """Mean over layers of the fraction of gate activations that were zero in the timed decode steps, for each length.

    One untimed forward over ``tokens`` (batch, prompt + generated) of the patched model. The steps between the first
    and the n-th generated token have the first n - 1 of them as input.
    """
    zeros: dict[str, Tensor] = {}

    def record(_site: str, layer: str, values: Tensor) -> None:
        zeros[layer] = (values == 0).float().mean(-1).view(tokens.shape).mean(0)

    observe(model, [tokens], record, after_threshold=True)
    by_position = torch.stack(list(zeros.values())).mean(0)
    first = case.prompt_tokens
    return {length: float(by_position[first : first + length - 1].mean()) for length in case.lengths}


def fitting_layers(name: str, dtype: str, device: str, wanted: int) -> int:
    """The number of decoder layers, at most ``wanted``, whose weights fit into `MEMORY_SHARE` of the free memory.

    Raises:
        ValueError: not even one fits.
    """
    sizes = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(load_config(name, layers), dtype=DTYPES.get(dtype, torch.bfloat16))
        sizes.append(sum(p.numel() * p.element_size() for p in model.parameters()))
    layer = sizes[1] - sizes[0]
    on_gpu = device.startswith("cuda")
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else psutil.virtual_memory().available
    fitting = int((MEMORY_SHARE * free - sizes[0]) // layer) + 1
    if fitting < 1:
        raise ValueError(f"{name} in {dtype} does not fit: one layer needs {sizes[0]:.3g} of {free:.3g} free bytes")
    return min(wanted, fitting)
