"""The loops of e06 decode what they should and time what they should."""

import time

import psutil
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import CompileConfig, GenerationConfig

import cats
from experiments.e06_throughput import amdahl, bench, cases, decoding, memory
from experiments.e06_throughput.decoding import Decoder, make_greedy

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


@pytest.mark.parametrize("attention", ["cats", "sdpa"])
def test_the_loop_of_one_graph_follows_a_sliding_window(attention: str, ids: Tensor, dynamo_only: None) -> None:
    made = tiny_model("Mistral", sliding_window=4)
    make_greedy(made, PROMPT + NEW)
    expected = greedy(made, ids, NEW)
    decoder = Decoder(made, "graph", PROMPT + NEW, attention=attention)
    assert torch.equal(decoder.generate(ids, NEW).tokens, expected)
    assert decoder.attention_in_effect == attention
    made.config.sliding_window = None
    assert not torch.equal(greedy(made, ids, NEW), expected)  # the window matters here


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


@torch.library.custom_op("cats_tests::delayed", mutates_args=())  # a sleep that torch.compile need not look into
def delayed(ids: Tensor, seconds: float) -> Tensor:
    time.sleep(seconds)
    return ids.clone()


@delayed.register_fake
def _(ids: Tensor, seconds: float) -> Tensor:
    return torch.empty_like(ids)


@pytest.mark.parametrize("loop", ["eager", "graph"])
def test_decode_time_runs_from_the_first_token(loop: str, model: nn.Module, ids: Tensor, dynamo_only: None) -> None:
    """Prefill is made to take 0.8 s and a decode step 40 ms: the marks are n - 1 steps, without the prefill."""
    step, prefill = 0.04, 0.8

    def slow(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (delayed(args[0], step if args[0].shape[1] == 1 else prefill),)

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
    token_ms, ours = {None: 20.0, 0.5: 17.5}, loop == "graph"
    *shares, row = amdahl.shares_and_amdahl(model, switch, 0.5, ids, token_ms, common, 1, compiling, ours)
    assert {s.component: s.milliseconds for s in shares} == {"mlp": 9.0, "attention": 3.0, "head": 4.0, "other": 4.0}
    assert sum(s.share for s in shares) == pytest.approx(1)
    assert (row.kernel_speedup, row.mlp_share) == (1.5, 0.45)
    assert row.predicted_speedup == pytest.approx(20 / 17)  # 9 ms of MLP become 6
    assert row.measured_speedup == pytest.approx(20 / 17.5)
    assert (row.criterion, row.variant, row.sparsity_target) == ("cats", "cats-50", 0.5)
    assert row.fraction_of_predicted == pytest.approx(17 / 17.5)
    assert not hasattr(model.model.layers[0].mlp, "cats_state")
    assert len(compiled) == (0 if loop == "eager" else 4)
    assert not any("forward" in module.__dict__ for module in model.modules())


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
