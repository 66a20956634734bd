"""e06: the timed loops decode what they should, time what they should, and its tables say what was measured."""

import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig

import cats
from experiments import e06_throughput as e06
from experiments.e06_throughput import amdahl, bench, cases, decoding, memory
from experiments.e06_throughput.decoding import Decoder, make_greedy
from experiments.framework.config import Config
from experiments.framework.options import parse

from .conftest import tiny_model

PROMPT, NEW, LAYERS = 10, 12, 3


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 64, (1, PROMPT), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def model() -> nn.Module:
    made = tiny_model("Mistral", num_hidden_layers=LAYERS)
    make_greedy(made, PROMPT + NEW)
    return made


@pytest.fixture
def dynamo_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loop without inductor: graphs are captured and guarded as ever, then run by Python."""
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    monkeypatch.setattr(decoding, "_compile_config", lambda device: config)


def greedy(model: nn.Module, ids: Tensor, new: int) -> Tensor:
    """Greedy decoding in its plainest form: no cache, no generate."""
    with torch.no_grad():
        for _ in range(new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


@pytest.mark.parametrize(
    ("loop", "batch"), [("eager", 1), ("eager", 3), ("compiled", 1), ("graph", 1), ("graph", 3), ("graph-tuned", 1)]
)
def test_every_loop_decodes_greedily(loop: str, batch: int, model: nn.Module, dynamo_only: None) -> None:
    ids = torch.randint(0, 64, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    thresholds = cats.calibrate(model, [torch.arange(64)[None]], [0.0, 0.5])
    dense = greedy(model, ids, NEW)
    decoder = Decoder(model, loop, PROMPT + NEW)
    for _ in range(2):
        assert torch.equal(decoder.generate(ids, NEW).tokens, dense)
        cats.apply(model, thresholds[0.0])
        assert torch.equal(decoder.generate(ids, NEW).tokens, dense)  # nothing is dropped at sparsity 0
        cats.apply(model, thresholds[0.5], kernel="reference")
        masked = greedy(model, ids, NEW)
        cats.apply(model, thresholds[0.5], kernel="auto")
        assert torch.equal(decoder.generate(ids, NEW).tokens, masked)
        assert not torch.equal(masked, dense)
        cats.remove(model)


@pytest.mark.parametrize("loop", ["compiled", "graph"])
def test_what_was_compiled_outlives_switching(loop: str, model: nn.Module, ids: Tensor, dynamo_only: None) -> None:
    """One graph each for dense and CATS although every layer has a threshold of its own; no other after that."""
    thresholds = cats.Thresholds(0.5, {name: 0.2 + 0.01 * i for i, name in enumerate(cats.gated_mlps(model))})
    decoder = Decoder(model, loop, PROMPT + NEW)
    start = decoding.compilations()
    decoder.warm_up(ids)
    assert decoding.compilations() == start + 1
    cats.apply(model, thresholds)
    decoder.warm_up(ids)
    assert decoding.compilations() == start + 2
    for _ in range(3):
        cats.remove(model)
        decoder.timed(ids, [NEW])
        cats.apply(model, thresholds)
        decoder.timed(ids, [NEW])
    assert decoding.compilations() == start + 2


def test_a_generation_that_compiles_is_not_a_measurement(
    model: nn.Module, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([0, 1, 1, 1])  # the first attempt compiles, the second does not
    monkeypatch.setattr(decoding, "compilations", lambda: next(counts))
    assert Decoder(model, "eager", PROMPT + NEW).timed(ids, [NEW]).decode_s[NEW] > 0
    monkeypatch.setattr(decoding, "compilations", iter(range(100)).__next__)
    with pytest.raises(RuntimeError, match="compiled again"):
        Decoder(model, "eager", PROMPT + NEW).timed(ids, [NEW])


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_decode_time_runs_from_the_first_token(loop: str, model: nn.Module, ids: Tensor, dynamo_only: None) -> None:
    """Prefill is made to take 0.8 s and a decode step 40 ms: the marks are n - 1 steps, without the prefill."""
    step, prefill = 0.04, 0.8

    def slow(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        time.sleep(step if args[0].shape[1] == 1 else prefill)

    model.model.embed_tokens.register_forward_pre_hook(slow)
    decoder = Decoder(model, loop, PROMPT + NEW)
    decoder.warm_up(ids)
    found = decoder.timed(ids, [5, NEW])
    assert found.prefill_s >= prefill
    assert found.decode_s[5] >= 4 * step
    assert found.decode_s[NEW] >= (NEW - 1) * step
    assert found.decode_s[5] < found.decode_s[NEW]
    ratio = found.decode_s[NEW] / found.decode_s[5]
    assert 0.5 * (NEW - 1) / 4 < ratio < 2 * (NEW - 1) / 4
    assert set(found.decode_s) == {5, NEW}


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
    assert options.attention_in("graph-tuned", "bfloat16") == "eager"
    assert (
        parse(cases.Options, {"attention": {"graph-tuned": "sdpa"}}, "e06").attention_in("graph-tuned", "x") == "sdpa"
    )


@pytest.mark.parametrize(("loop", "tuned"), [("compiled", False), ("graph", False), ("graph-tuned", True)])
def test_only_the_tuned_loop_compiles_with_tuning(loop: str, tuned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches torch.compile on a GPU, without one."""
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda module, options: asked.update(options) or module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    module = nn.Linear(2, 2)
    monkeypatch.setattr(module, "parameters", lambda: iter([type("P", (), {"device": torch.device("cuda")})]))
    decoding.compile_step(module, loop)
    assert asked == {"triton.enable_pdl": loop != "compiled", "coordinate_descent_tuning": tuned}
    assert decoding.compile_step(module, "eager") is module


def test_make_greedy_overrides_the_models_own_settings(ids: Tensor) -> None:
    model = tiny_model("Mistral", sliding_window=PROMPT + NEW)
    model.config.eos_token_id = 5
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.1, eos_token_id=list(range(64)), max_length=3, repetition_penalty=2.0
    )
    expected = greedy(model, ids, NEW)
    make_greedy(model, PROMPT + NEW + 1)
    assert model.config.sliding_window == PROMPT + NEW  # a token could fall out of it: kept
    make_greedy(model, PROMPT + NEW)
    assert model.config.sliding_window is None
    assert torch.equal(Decoder(model, "eager", PROMPT + NEW).generate(ids, NEW).tokens, expected)


def test_bad_loops(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="allowed are eager, compiled, graph, graph-tuned"):
        Decoder(model, "fast", 8)
    with pytest.raises(ValueError, match="cannot follow a sliding window"):
        Decoder(tiny_model("Mistral", sliding_window=4), "graph", 8)
    monkeypatch.setattr(decoding.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"C\+\+ compiler"):
        Decoder(model, "compiled", 8)


def test_peak_memory_sees_what_has_been_freed() -> None:
    device = torch.device("cpu")
    if not memory.reset_peak_memory(device):
        pytest.skip("the kernel does not let a process reset its peak")
    before = memory.peak_memory(device)
    assert before is not None and abs(before / psutil.Process().memory_info().rss - 1) < 0.1
    block = torch.ones(2**26)  # 256 MiB
    del block
    peak = memory.peak_memory(device)
    assert peak is not None and 0.9 * 2**28 < peak - before < 1.5 * 2**28
    memory.reset_peak_memory(device)
    assert memory.peak_memory(device) < peak - 2**27


@pytest.mark.parametrize("batch", [1, 3])
def test_sparsity_is_that_of_the_timed_steps(batch: int, model: nn.Module) -> None:
    """Against zeros counted while the tokens are being decoded, in the steps between the first and the n-th token."""
    ids = torch.randint(0, 64, (batch, PROMPT), generator=torch.Generator().manual_seed(5))
    thresholds = cats.calibrate(model, [torch.arange(64)[None]], 0.6)
    cats.apply(model, thresholds, kernel="reference")
    zeros: list[float] = []
    for mlp in cats.gated_mlps(model).values():
        mlp.act_fn.register_forward_hook(
            lambda _m, _a, out: zeros.append(float((out == 0).double().mean())) if out.shape[1] == 1 else None
        )
    tokens = Decoder(model, "eager", PROMPT + NEW).generate(ids, NEW).tokens
    case = cases.Case("eager", (4, NEW), (0.6,), 1, PROMPT, batch)
    steps = torch.tensor(zeros).view(NEW - 1, LAYERS)
    for mlp in cats.gated_mlps(model).values():
        mlp.act_fn._forward_hooks.clear()
    measured = bench.decoded_sparsity(model, tokens, case)
    assert measured == pytest.approx({4: float(steps[:3].mean()), NEW: float(steps.mean())}, abs=2e-3)


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_amdahl_by_hand(loop: str, model: nn.Module, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert amdahl.amdahl(0.7, 1.5) == pytest.approx(1 / (0.3 + 0.7 / 1.5))
    assert amdahl.amdahl(0.0, 9.0) == 1 and amdahl.amdahl(1.0, 9.0) == pytest.approx(9)

    def timings(calls: dict, **_: object) -> dict:
        for call in calls.values():
            for _ in range(2 * amdahl.STEPS):  # a static cache would be full
                call()
        ms = {"mlp": 3.0, "cats": 2.0, "attention": 1.0, "head": 4.0}
        return {name: amdahl.Timing(ms[name], 0, 0, 0, 1) for name in calls}

    monkeypatch.setattr(amdahl, "measure_calls", timings)
    compiled = []
    compiling = None if loop == "eager" else lambda module: compiled.append(module) or module
    thresholds = cats.calibrate(model, [torch.arange(64)[None]], 0.5)

    def switch(sparsity: float | None) -> None:
        cats.remove(model) if sparsity is None else cats.apply(model, thresholds)

    common = {"machine": "m", "model": "n", "layers": LAYERS, "dtype": "float32", "loop": loop}
    *shares, row = amdahl.shares_and_amdahl(model, switch, 0.5, ids, {None: 20.0, 0.5: 17.5}, common, 1, compiling)
    assert {s.component: s.milliseconds for s in shares} == {"mlp": 9.0, "attention": 3.0, "head": 4.0, "other": 4.0}
    assert sum(s.share for s in shares) == pytest.approx(1)
    assert (row.kernel_speedup, row.mlp_share) == (1.5, 0.45)
    assert row.predicted_speedup == pytest.approx(20 / 17)  # 9 ms of MLP become 6
    assert row.measured_speedup == pytest.approx(20 / 17.5)
    assert (row.criterion, row.variant, row.sparsity_target) == ("cats", "cats-50", 0.5)
    assert row.fraction_of_predicted == pytest.approx(17 / 17.5)
    assert not hasattr(model.model.layers[0].mlp, "cats_state")
    assert len(compiled) == (0 if loop == "eager" else 4)


def test_components_are_fed_what_they_get_while_decoding(model: nn.Module, ids: Tensor) -> None:
    mlp = model.model.layers[1].mlp
    inputs = amdahl.decode_inputs(model, ids, {"mlp": mlp, "attention": model.model.layers[1].self_attn})
    assert len(inputs["mlp"]) == len(inputs["attention"]) == amdahl.STEPS
    tokens = greedy(model, ids, amdahl.STEPS)
    seen = []
    handle = mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    handle.remove()
    for step, (args, _) in enumerate(inputs["mlp"]):
        assert torch.allclose(args[0][0, 0], seen[0][0, PROMPT + step], atol=1e-4)
    assert not mlp._forward_pre_hooks
    args, kwargs = inputs["attention"][-1]
    with torch.no_grad():
        model.model.layers[1].self_attn(*args, **kwargs)  # can be called again, alone


def config(tmp_path: Path, **options: object) -> Config:
    return Config("e06", "test", tmp_path, models=["shape:small"], options=parse(cases.Options, options, "e06"))


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loop", ["compiled", "graph", "graph-tuned"])
def test_compiled_loops_on_a_gpu(loop: str) -> None:
    """CUDA graphs with CATS inside: the tokens of the eager loop, and nothing compiled or recorded while timing."""
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4, vocab_size=512
    )
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    make_greedy(model, PROMPT + 32)
    prompts = torch.randint(0, 512, (2, 1, PROMPT))
    thresholds = cats.calibrate(model, [torch.randint(0, 512, (4, 64))], 0.5)
    decoder = Decoder(model, loop, PROMPT + 32)
    for _ in range(2):
        for sparse in (False, True):
            cats.apply(model, thresholds) if sparse else cats.remove(model)
            decoder.warm_up(prompts[0])
            for ids in prompts:
                before = decoding.compilations()
                tokens = decoder.timed(ids, [16, 32]).tokens
                assert decoding.compilations() == before
                assert torch.equal(tokens, Decoder(model, "eager", PROMPT + 32).generate(ids, 32).tokens)
