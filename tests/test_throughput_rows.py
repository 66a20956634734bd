"""e06: its options, the conditions that follow from them, and tables that say what was measured."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from experiments import e06_throughput as e06
from experiments.e06_throughput import bench, cases
from experiments.e06_throughput.decoding import Decoder
from experiments.framework.config import Config
from experiments.framework.options import parse

from .conftest import tiny_model


def config(tmp_path: Path, **options: object) -> Config:
    return Config("e06", "test", tmp_path, models=["shape:small"], options=parse(cases.Options, options, "e06"))


@pytest.mark.parametrize("loop", ["graph", "graph-tuned"])
def test_a_cuda_graph_is_refused_without_a_gpu(loop: str, tmp_path: Path) -> None:
    for options in ({"lengths": {loop: [2]}}, {"growth": {"loop": loop, "batches": [2]}}):
        with pytest.raises(ValueError, match=rf'"{loop}" is a CUDA graph, for which cpu is no device: use "eager"'):
            list(e06.run(config(tmp_path, **options)))


def test_the_attention_asked_for_is_the_one_timed(tmp_path: Path) -> None:
    settings = config(
        tmp_path, attention={"float32": "eager"}, lengths={"eager": [2]}, rounds=0, check_tokens=0, prompts=1
    )
    made = bench.Bench(settings, "shape:small", "float32", 1, cases.cases_of(settings.options))
    seen = []
    generate = made.model.generate
    made.model.generate = lambda *a, **k: seen.append(made.model.config._attn_implementation) or generate(*a, **k)
    rows = made.time(cases.cases_of(settings.options)[0])
    assert set(seen) == {row.attention for row in rows} == {"eager"}


def test_attention_by_loop_goes_before_attention_by_dtype() -> None:
    options = parse(cases.Options, {"attention": {"float32": "eager", "graph": "flash_attention_2"}}, "e06")
    assert options.attention_in("eager", "float32") == "eager"
    assert options.attention_in("eager", "bfloat16") == "sdpa"
    assert options.attention_in("graph", "float32") == "flash_attention_2"
    assert options.attention_in("graph-tuned", "bfloat16") == "cats"
    assert (
        parse(cases.Options, {"attention": {"graph-tuned": "sdpa"}}, "e06").attention_in("graph-tuned", "x") == "sdpa"
    )


def test_fitting_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shape "small": d=64, m=176, 4 heads of 16, 2 key-value heads, 256 tokens; 4 bytes a weight."""
    layer = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 176 + 2 * 64)
    fixed = 4 * (2 * 256 * 64 + 64)

    def free(available: float) -> None:
        memory = type("Memory", (), {"available": available / bench.MEMORY_SHARE})
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)

    for layers in (1, 3, 30):
        free(fixed + layers * layer + 100)
        assert bench.fitting_layers("shape:small", "float32", "cpu", 99) == layers
        assert bench.fitting_layers("shape:small", "bfloat16", "cpu", 99) >= 2 * layers
    assert bench.fitting_layers("shape:small", "float32", "cpu", 2) == 2
    free(fixed)
    with pytest.raises(ValueError, match="does not fit"):
        bench.fitting_layers("shape:small", "float32", "cpu", 1)


def test_options() -> None:
    for table, message in (
        ({"length": [8]}, "e06 has no option length"),
        ({"lengths": {"fast": [8]}}, "a key of e06.lengths must be one of eager, compiled, graph, graph-tuned"),
        ({"growth": {"batchs": [2]}}, "e06.growth has no option batchs"),
        ({"attention": {"float": "eager"}}, "a key of e06.attention must be one of eager, .*, float32, float16"),
        ({"attention": "eager"}, "e06.attention must be a table"),
        ({"lengths": [8]}, "e06.lengths must be a table"),
        ({"kernel": "nope"}, "e06.kernel must be one of auto"),
        ({"attention": {"float32": "flash"}}, "e06.attention.float32 must be one of eager, sdpa"),
        ({"dtypes": ["int8"]}, "e06.dtypes must be a list"),
        ({"sparsities": 0.5}, "e06.sparsities must be a list of at least one"),
        ({"sparsities": [1.5]}, r"e06.sparsities must be .* in \[0, 1\)"),
        ({"lengths": {"eager": [1]}}, "e06.lengths.eager must be .* a whole number, 2 or more"),
        ({"lengths": {}}, "e06.lengths must be a table of at least one"),
        ({"growth": {"batches": 4}}, "e06.growth.batches must be a list"),
        ({"growth": {"batches": [1]}}, "e06.growth.batches must be .* 2 or more"),
        ({"growth": {"contexts": [16]}, "prompt_tokens": 16}, "e06.growth.contexts must differ from prompt_tokens"),
        ({"growth": {"loop": "fast"}}, "e06.growth.loop must be one of"),
        ({"prompts": 0}, "e06.prompts must be a whole number, 1 or more"),
        ({"repeats": 0}, "e06.repeats must be a whole number, 1 or more"),
        ({"calibration": "book"}, "e06.calibration must be one of text, generated"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(cases.Options, table, "e06")


def test_cases() -> None:
    table = {"lengths": {"eager": [8, 4], "compiled": [6]}, "separate_lengths": True}
    assert [(c.loop, c.lengths) for c in cases.cases_of(parse(cases.Options, table, "e06"))] == [
        ("eager", (4,)),
        ("eager", (8,)),
        ("compiled", (6,)),
    ]
    growth = {"batches": [4], "contexts": [64], "sparsities": [0.0, 0.9], "layers": [1], "loop": "compiled"}
    grown, deeper = cases.growth_of(parse(cases.Options, {**table, "growth": growth}, "e06"))
    base = cases.Case("compiled", (6,), (0.5,), 1, 32, condition="growth")
    assert grown == [replace(base, batch=4), replace(base, prompt_tokens=64), replace(base, sparsities=(0.0, 0.9))]
    assert deeper == [(1, base)]


def test_every_row_is_measured_and_comparable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole experiment on a small shape, on a machine without the datasets package."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "experiments.data", raising=False)
    growth = {"batches": [3], "contexts": [40], "sparsities": [0.0, 0.7], "layers": [1]}
    settings = config(tmp_path, lengths={"eager": [4, 12]}, prompt_tokens=16, rounds=2, check_tokens=8, growth=growth)
    rows = list(e06.run(settings))
    by_table: dict[str, list] = {}
    for row in rows:
        by_table.setdefault(row.table, []).append(row)
    for table in by_table.values():
        assert len({tuple(getattr(row, key) for key in row.key) for row in table}) == len(table)
    timed = by_table["e06_throughput"]
    assert all(r.decode_s > 0 and r.prefill_s > 0 and r.compile_s == 0 for r in timed)
    assert all(math.isclose(r.tokens_per_second, r.batch * (r.generated_tokens - 1) / r.decode_s) for r in timed)
    assert all((r.sparsity_measured is None) == (r.variant == "dense") for r in timed)
    assert all(abs(r.sparsity_measured - r.sparsity_target) < 0.1 for r in timed if r.variant != "dense")
    assert {(r.criterion, r.path) for r in timed} == {("dense", "dense"), ("cats", "sparse kernel")}
    assert {(r.weights, r.model_layers, r.attention) for r in timed} == {("random", 2, "sdpa")}
    figure = [r for r in timed if r.condition == "figure"]
    assert len(figure) == 2 * 2 * 2 * 2  # prompts, repeats, variants, lengths
    assert {(r.batch, r.prompt_tokens, r.layers) for r in timed if r.condition == "growth"} == {
        (3, 16, 2), (1, 40, 2), (1, 16, 2), (1, 16, 1)
    }  # fmt: skip
    assert [r.identical_tokens for r in by_table["e06_greedy"]] == [8, 8]
    assert len(by_table["e06_shares"]) == 4 and len(by_table["e06_amdahl"]) == 1
    assert list(e06.run(settings)) == rows  # stored


def test_every_prompt_is_taken_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense, CATS, CATS, dense: a machine that slows down steadily leaves their mean ratio alone."""
    settings = config(tmp_path, lengths={"eager": [4]}, prompts=2, sparsities=[0.5, 0.7], rounds=0, check_tokens=0)
    made = bench.Bench(settings, "shape:small", "float32", 1, cases.cases_of(settings.options))
    order: list[float | None] = []
    timed, now = Decoder.timed, []
    switch = bench.Bench.switch
    monkeypatch.setattr(bench.Bench, "switch", lambda self, s, kernel=None: now.append(s) or switch(self, s, kernel))
    monkeypatch.setattr(Decoder, "timed", lambda *arguments: order.append(now[-1]) or timed(*arguments))
    rows = made.time(cases.cases_of(settings.options)[0])
    assert order == [None, 0.5, 0.7, 0.7, 0.5, None] * 2
    assert {(r.prompt, r.repeat) for r in rows} == {(p, r) for p in (0, 1) for r in (0, 1)}


def test_kernel_by_name_decides_the_path(tmp_path: Path) -> None:
    settings = config(tmp_path, lengths={"eager": [4]}, prompts=1, rounds=0, check_tokens=0, kernel="reference")
    assert {(r.variant, r.path) for r in e06.run(settings)} == {("dense", "dense"), ("cats-50", "dense masked")}


def test_a_model_with_a_tokenizer_reads_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("Llama", num_hidden_layers=1)
    asked = []
    data = type("Data", (), {})
    data.texts = lambda _data, purpose, _seed: asked.append(purpose) or purpose
    data.blocks = lambda _documents, _tokenizer, count, length: torch.arange(count * length).view(count, length) % 64
    monkeypatch.setitem(sys.modules, "experiments.data", data)
    monkeypatch.setattr(bench, "load_model", lambda *_: (model, object()))
    monkeypatch.setattr(bench, "load_config", lambda *_: model.config)
    monkeypatch.setattr(bench, "fitting_layers", lambda *_: 1)
    settings = config(tmp_path, lengths={"eager": [4]}, prompts=1, rounds=0, check_tokens=0)
    rows = list(e06.run(settings))
    assert {(row.table, row.weights) for row in rows} == {("e06_throughput", "pretrained")}
    assert sorted(asked) == ["heldout", "train"]
