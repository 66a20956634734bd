"""A loaded model under test: dense and CATS take turns on it, and rows come of what was timed."""

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import torch
from cats_kernels import path_of
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import cats
from cats.models import DTYPES, load_config, load_model
from cats.observe import observe
from cats.text_config import text_config
from experiments.e06_throughput.amdahl import STEPS, shares_and_amdahl
from experiments.e06_throughput.cases import Case, Options
from experiments.e06_throughput.decoding import ATTENTION, LOOPS, Decoder, Generation, compile_step, make_greedy
from experiments.framework.config import Config
from experiments.framework.provenance import machine_name
from experiments.framework.tables import Row, ThroughputRow

MEMORY_SHARE = 0.85
"""Part of the free memory that a model's weights may take; the rest is for the cache, activations and one transpose."""


@dataclass(frozen=True)
class Turn:
    """One timed generation from one prompt; ``sparsity`` is the target, None for the dense model."""

    prompt: int
    repeat: int
    sparsity: float | None
    generation: Generation


class Bench:
    """A model with thresholds for every sparsity that its cases need; dense except while something is timed."""

    def __init__(
        self,
        config: Config[Options],
        name: str,
        dtype: str,
        layers: int,
        cases: Sequence[Case],
        prepare: Callable[[PreTrainedModel], None] = lambda _model: None,
    ) -> None:
        """``prepare`` changes the loaded model before its thresholds are calibrated."""
        self.config, self.options = config, config.options
        full = load_config(name).get_text_config(decoder=True).num_hidden_layers
        kept = fitting_layers(name, dtype, config.device, min(layers or full, full))
        model, tokenizer = load_model(name, dtype, config.device, kept if kept < full else None, config.seed)
        self.model: PreTrainedModel = model
        config.identify(name)
        prepare(model)
        make_greedy(model, max(case.context for case in cases))
        self.common: dict[str, Any] = {
            "machine": machine_name(config.device),
            "model": name.removeprefix("shape:"),
            "layers": kept,
            "dtype": str(model.dtype).removeprefix("torch."),
        }
        self.of_throughput = {"weights": "random" if tokenizer is None else "pretrained", "model_layers": full}
        count = max(case.batch * case.prompts for case in cases)
        self.prompts = self._tokens(tokenizer, "heldout", count, max(case.prompt_tokens for case in cases), 1)
        sparsities = sorted({0.0, *(sparsity for case in cases for sparsity in case.sparsities)})
        length = min(self.options.calibration_tokens, 64)
        text = self._tokens(tokenizer, "train", -(-self.options.calibration_tokens // length), length, 2)
        if self.options.calibration == "generated":
            text = Decoder(model, "eager", 2 * length).generate(text, length).tokens
        self.thresholds = cats.calibrate(model, text.split(4), sparsities)

    def _tokens(
        self, tokenizer: PreTrainedTokenizerBase | None, purpose: str, count: int, length: int, stream: int
    ) -> Tensor:
        """``count`` sequences of ``length`` tokens: text, or random tokens for a model without a tokenizer."""
        if tokenizer is None:
            generator = torch.Generator().manual_seed(self.config.seed * 10 + stream)
            return torch.randint(0, text_config(self.model).vocab_size, (count, length), generator=generator)
        # imported here, since it needs the datasets package, which a machine for timing shapes may lack
        from experiments.data import blocks, texts

        return blocks(texts(self.config.data, purpose, self.config.seed), tokenizer, count, length)

    def switch(self, sparsity: float | None, kernel: str | None = None) -> None:
        """Make the model dense (None) or CATS at ``sparsity``. What was compiled for either stays valid."""
        if sparsity is None:
            cats.remove(self.model)
        else:
            cats.apply(self.model, self.thresholds[sparsity], kernel or self.options.kernel)

    def prompt(self, case: Case, number: int) -> Tensor:
        """Token ids (batch, prompt_tokens)."""
        start = number * case.batch
        return self.prompts[start : start + case.batch, : case.prompt_tokens]

    def prepare(self, loop: str) -> str:
        """Give the model the loop's implementation of attention, and return its name."""
        attention = self.options.attention_in(loop, self.common["dtype"])
        self.model.set_attn_implementation("sdpa" if attention == ATTENTION else attention)
        return attention

    def time(self, case: Case) -> list[Row]:
        """Rows of one case.

        One model is patched and unpatched in turn, rather than two models held: it fits any machine that holds the
        model once, peak memory is each variant's own, and compiled code survives the switch (both are kept; the class
        of the MLP distinguishes them). Only CUDA graphs are recorded again, as the down projection has moved: in the
        warm-up after each switch, or before each generation in the loops of one graph.
        """
        attention = self.prepare(case.loop)
        decoder = Decoder(self.model, case.loop, case.context, self.options.dependent_launch, attention)
        variants: list[float | None] = [None, *case.sparsities]
        compile_s = self._compile(decoder, case, variants)
        turns: list[Turn] = []
        for number in range(case.prompts):
            ids = self.prompt(case, number)
            for repeat in range(self.options.repeats):
                for sparsity in variants if repeat % 2 == 0 else variants[::-1]:
                    self.switch(sparsity)
                    decoder.warm_up(ids)
                    turns.append(Turn(number, repeat, sparsity, decoder.timed(ids, case.lengths)))
        shared = {
            "attention": decoder.attention_in_effect,
            "condition": case.condition,
            "loop": case.loop,
            "batch": case.batch,
        }
        rows: list[Row] = []
        for sparsity in variants:
            own = [turn for turn in turns if turn.sparsity == sparsity]
            rows += self._rows(case, sparsity, own, compile_s[sparsity], shared)
        self.switch(None)
        return rows

    def _compile(self, decoder: Decoder, case: Case, variants: Iterable[float | None]) -> dict[float | None, float]:
        """Warm every variant up; seconds that each took to compile."""
        ids, compile_s = self.prompt(case, 0), {}
        for sparsity in variants:
            self.switch(sparsity)
            first = decoder.warm_up(ids)
            if case.loop == "eager" and self.model.device.type == "cuda":
                # the growing cache asks for memory at every length: a first generation of 64 tokens ran at 15 tokens/s,
                # the second at 43 (dense, H200)
                decoder.generate(ids, max(case.lengths))
            compile_s[sparsity] = first - decoder.warm_up(ids) if LOOPS[case.loop].compiled else 0.0
        return compile_s

    def _rows(
        self, case: Case, sparsity: float | None, turns: Sequence[Turn], compile_s: float, shared: dict[str, Any]
    ) -> list[Row]:
        """Rows of one variant, with the sparsity measured over the very tokens that it generated."""
        self.switch(sparsity)
        path = self._path(sparsity, case.batch)
        # the same function without the transposed down projection, with which torch takes 1139 ms instead of 40 for one
        # bfloat16 row on two AVX2 cores (d=4096, m=14336)
        self.switch(sparsity, "reference")
        measured: dict[bytes, dict[int, float]] = {}
        rows: list[Row] = []
        for turn in turns:
            tokens = turn.generation.tokens
            key = tokens.numpy().tobytes()
            if sparsity is not None and key not in measured:  # every repeat of a prompt gives the same tokens
                measured[key] = decoded_sparsity(self.model, tokens, case)
            for length in case.lengths:
                seconds = turn.generation.decode_s[length]
                row = ThroughputRow(
                    **self.common,
                    **self.of_throughput,
                    **shared,
                    criterion="dense" if sparsity is None else "cats",
                    variant="dense" if sparsity is None else f"cats-{100 * sparsity:g}",
                    path=path,
                    sparsity_target=sparsity,
                    sparsity_measured=measured[key][length] if key in measured else None,
                    prompt=turn.prompt,
                    repeat=turn.repeat,
                    prompt_tokens=case.prompt_tokens,
                    generated_tokens=length,
                    prefill_s=turn.generation.prefill_s,
                    decode_s=seconds,
                    tokens_per_second=case.batch * (length - 1) / seconds,
                    compile_s=compile_s,
                    peak_memory_bytes=turn.generation.peak_memory_bytes,
                    cache_tokens=case.context,
                )
                rows.append(row)
        return rows

    def _path(self, sparsity: float | None, batch: int) -> str:
        """What decodes ``batch`` rows in the model as it is."""
        if sparsity is None:
            return "dense"
        served = all(mlp.cats_state.sparse for mlp in cats.gated_mlps(self.model).values())
        return path_of(batch, self.model.dtype, self.config.device, self.options.kernel) if served else "dense masked"

    def shares(self, case: Case, rows: Sequence[Row]) -> list[Row]:
        """Where a token's time goes at the case's longest length, and what Amdahl's law makes of it."""
        sparsity, longest = case.sparsities[0], max(case.lengths)
        times: dict[float | None, list[float]] = {None: [], sparsity: []}
        for row in rows:
            assert isinstance(row, ThroughputRow)
            same = (row.loop, row.condition, row.generated_tokens) == (case.loop, case.condition, longest)
            if same and row.sparsity_target in times:
                times[row.sparsity_target].append(math.log(row.decode_s / (row.generated_tokens - 1)))
        token_ms = {key: 1e3 * math.exp(sum(logs) / len(logs)) for key, logs in times.items()}
        ours = self.prepare(case.loop) == ATTENTION
        common = {**self.common, "loop": case.loop}
        ids = self.prompt(case, 0).repeat(1, -(-case.context // case.prompt_tokens))[:, : case.context - STEPS]
        compiling = partial(compile_step, loop=case.loop, dependent_launch=self.options.dependent_launch)
        compile_module = compiling if LOOPS[case.loop].compiled else None
        rounds = self.options.rounds
        return shares_and_amdahl(self.model, self.switch, sparsity, ids, token_ms, common, rounds, compile_module, ours)

    def close(self) -> None:
        """Free the model."""
        del self.model
        torch._dynamo.reset()  # it holds on to what it compiled
        gc.collect()
        if self.config.device.startswith("cuda"):
            torch.cuda.empty_cache()


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
