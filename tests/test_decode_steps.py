"""The step from a token to the next: what it is made of, and nothing stale in it after the model changed."""

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, GenerationConfig

import cats
from cats.generation import Settings, attention, capacity_for, decoder, decoder_of, loops, release
from cats.generation.attention import DecodeBlock, decode_blocks
from cats.generation.loops import fingerprint
from tests.conftest import calls_compiler

from .generation_cases import DRAW, NEW, made, prompts, theirs


@pytest.fixture
def dynamo_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are traced and guarded as ever, then run by Python: inductor's C++ takes a minute for a tiny model."""
    inner = loops.compile_function
    monkeypatch.setattr(decoder, "compile_function", lambda function, *_: inner(function, {}, "eager"))


def test_the_padding_of_an_earlier_call_is_not_kept() -> None:
    """A graph reads the mask that it was captured with: later calls must write to that very tensor."""
    model = made("Gemma2")  # keeps its own attention
    ids, mask = prompts(2)
    other = torch.ones_like(mask)
    other[1, :6] = 0
    masks = []
    for padding in (mask, other, mask):
        tokens = cats.generate(model, ids, NEW, attention_mask=padding, loop="captured")
        assert torch.equal(tokens, theirs(model, ids, padding))
        masks.append(decoder_of(model).mask)
        assert torch.equal(masks[-1][:, : ids.shape[1]], padding.bool())
    assert masks[0] is masks[1] is masks[2] and decoder_of(model).captures == 1


@pytest.mark.parametrize(("family", "ours"), [("Llama", 3), ("Qwen3", 3), ("Gemma", 3), ("Gemma2", 0)])
def test_a_block_that_computes_something_else_keeps_its_own_attention(family: str, ours: int) -> None:
    """Gemma2 caps its scores, which only running the block can tell."""
    assert len(decode_blocks(made(family))) == ours


def test_a_block_is_tried_before_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    assert decode_blocks(model)
    project = DecodeBlock.project
    monkeypatch.setattr(DecodeBlock, "project", lambda *a: tuple(1.01 * x for x in project(*a)))
    assert not decode_blocks(model)


def test_a_kernel_that_is_wrong_on_this_device_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(hidden_size=64)  # heads of 16, as the kernel needs them
    assert len(decode_blocks(model, kernel=True)) == 3
    right = attention.decode_attention
    monkeypatch.setattr(attention, "decode_attention", lambda *arguments: 1.03 * right(*arguments))
    assert not decode_blocks(model, kernel=True)
    assert len(decode_blocks(model, kernel=False)) == 3


@pytest.mark.parametrize("loop", ["eager", "captured", "graph"])
@pytest.mark.parametrize("window", [4, 12])
def test_sliding_windows(window: int, loop: str, dynamo_only: None) -> None:
    ids, mask = prompts(2, 10)
    for family in ("Mistral", "Gemma2", "Gemma3Text"):
        if family == "Gemma3Text":
            kinds = ["sliding_attention", "full_attention", "sliding_attention"]
            config = {"sliding_window": window, "layer_types": kinds, "head_dim": 8}
            settings = transformers.Gemma3TextConfig(
                hidden_size=32, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=64, max_position_embeddings=128, **config,
            )  # fmt: skip
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
            model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
        else:
            model = made(family, sliding_window=window)
        expected = theirs(model, ids, mask, 20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0")  # torch's, of Python alone
            assert torch.equal(cats.generate(model, ids, 20, attention_mask=mask, loop=loop), expected), family


@pytest.mark.parametrize("loop", ["eager", "captured", "graph"])
def test_a_full_cache_is_replaced_by_a_larger_one(
    loop: str, monkeypatch: pytest.MonkeyPatch, dynamo_only: None
) -> None:
    monkeypatch.setattr("cats.generation.cache.SMALLEST", 8)
    monkeypatch.setattr(decoder, "EAGER_ROOM", 1)
    model = made("Mistral")
    ids, mask = prompts(2, 5)
    tokens = cats.generate(model, ids, 60, attention_mask=mask, loop=loop)
    assert torch.equal(tokens, theirs(model, ids, mask, 60))
    assert decoder_of(model).cache.capacity == 128 and capacity_for(60) == 64
    before = counters["stats"]["unique_graphs"]
    release(model)
    assert torch.equal(cats.generate(model, ids, 60, attention_mask=mask, loop=loop), tokens)
    assert counters["stats"]["unique_graphs"] == before  # one compiled step for every size


@pytest.mark.parametrize("loop", ["eager", "captured", "graph"])
def test_the_model_may_change_between_calls(loop: str, dynamo_only: None) -> None:
    """Dense, patched, other thresholds, another kernel, other weights, a hook: always the tokens of the model as is."""
    model = made()
    ids, _ = prompts(1)
    thresholds = cats.calibrate(model, [torch.randint(0, 64, (4, 48))], [0.3, 0.7])

    def swap_weight() -> None:
        model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(torch.randn(32, 32) / 3)

    def load() -> None:
        state = {name: value + torch.randn_like(value) / 20 for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=True)

    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: cats.apply(model, thresholds[0.3]),
        lambda: cats.apply(model, thresholds[0.7]),
        lambda: cats.apply(model, thresholds[0.7], kernel="reference"),
        lambda: cats.remove(model),
        swap_weight,
        lambda: model.model.layers[0].self_attn.o_proj.weight.data.mul_(1.5),
        load,
        lambda: model.model.layers[2].mlp.register_forward_hook(lambda _m, _a, out: 2 * out),
        lambda: model.model.layers[2].self_attn.k_proj.register_forward_hook(lambda _m, _a, out: 0.5 * out),
    ]
    seen = []
    for change in changes:
        change()
        tokens = cats.generate(model, ids, NEW, loop=loop)
        assert torch.equal(tokens, theirs(model, ids))
        seen.append(tokens)
    assert len({tuple(tokens[0].tolist()) for tokens in seen}) == len(changes) - 2  # two go back to what was


def test_what_a_graph_depends_on_is_in_the_fingerprint() -> None:
    model = made()
    thresholds = cats.calibrate(model, [torch.randint(0, 64, (4, 48))], [0.3, 0.7])
    mlp = model.model.layers[1].mlp
    changes: list[Callable[[], object]] = [
        lambda: cats.apply(model, thresholds[0.3]),
        lambda: cats.apply(model, thresholds[0.3], kernel="reference"),
        lambda: cats.remove(model),
        lambda: setattr(mlp.up_proj, "weight", nn.Parameter(mlp.up_proj.weight.detach().clone())),
        lambda: mlp.register_forward_hook(lambda *_: None),
        lambda: setattr(model.model.layers[0].self_attn, "scaling", 0.5),
        lambda: model.set_attn_implementation("eager"),
        lambda: model.double(),
    ]
    marks = [fingerprint(model)]
    for change in changes:
        change()
        marks.append(fingerprint(model))
        assert marks[-1] != marks[-2]
    assert marks[-1] == fingerprint(model)
    cats.apply(model, thresholds[0.3], kernel="reference")
    before = fingerprint(model)
    cats.apply(model, thresholds[0.7], kernel="reference")
    assert fingerprint(model) == before  # thresholds are swapped in place: the graph reads them


def test_nothing_of_a_model_outlives_it() -> None:
    model = made()
    cats.generate(model, prompts(1)[0], 3, loop="captured")
    references = weakref.ref(model), weakref.ref(model.model.layers[0].self_attn), weakref.ref(decoder_of(model))
    del model
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_joined_weights_are_the_same_weights(tmp_path: Path) -> None:
    model = made("Qwen2")  # with biases
    original = copy.deepcopy(model.state_dict())
    ids, _ = prompts(1)
    tokens = cats.generate(model, ids, NEW, loop="captured")
    attention = model.model.layers[0].self_attn
    joined = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(joined) == 1  # views of one tensor: no more memory
    assert "forward" not in attention.__dict__ and not hasattr(attention, "cats_decode")
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    model.save_pretrained(tmp_path)
    assert torch.equal(theirs(AutoModelForCausalLM.from_pretrained(tmp_path), ids), tokens)
    twin = copy.deepcopy(model)
    assert torch.equal(cats.generate(twin, ids, NEW, loop="captured"), tokens)
    release(model)
    joined = {getattr(attention, name).weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")}
    assert len(joined) == 3 and decoder_of(model).cache is None
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert torch.equal(theirs(model, ids), tokens)


def test_a_step_that_cannot_be_compiled_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise torch._dynamo.exc.TorchDynamoException("a graph break")

    monkeypatch.setattr(decoder, "compile_function", lambda *_: refuse)
    model = made()
    ids, _ = prompts(1)
    with pytest.warns(UserWarning, match='the loop "graph" cannot serve this model, so "eager" does: a graph break'):
        tokens = cats.generate(model, ids, NEW, loop="graph")
    assert torch.equal(tokens, theirs(model, ids))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert torch.equal(cats.generate(model, ids, NEW, loop="graph"), tokens)


def test_compiling_is_shown(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from cats.generation import progress

    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.05)
    with progress.progress("compiling", "compiled"):
        progress.time.sleep(0.2)
    assert capsys.readouterr().err.splitlines() == ["compiling", "compiled in 0 s"]
    with progress.progress("compiling", "compiled"):
        pass
    assert capsys.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["graph", "graph-tuned"])
def test_steps_compiled_for_a_cpu(loop: str) -> None:
    """Inductor itself, one layer: the tokens of the dense and of the sparse model."""
    model = made("Mistral", num_hidden_layers=1)
    ids, _ = prompts(1)
    thresholds = cats.calibrate(model, [torch.randint(0, 64, (4, 48))], 0.5)
    for change in (lambda: None, lambda: cats.apply(model, thresholds), lambda: cats.remove(model)):
        change()
        assert torch.equal(cats.generate(model, ids, NEW, loop=loop), theirs(model, ids))


@calls_compiler
@pytest.mark.slow
def test_a_compiled_step_is_as_few_operations_as_it_should_be() -> None:
    """What inductor makes of the step as on a GPU: one product for queries, keys and values, one operator each for
    attention and the sparse MLP, the cache written in place and never copied, the choice of the token in one kernel."""
    model = made("Mistral", hidden_size=64, num_hidden_layers=2)
    cats.apply(model, cats.calibrate(model, [torch.randint(0, 64, (4, 48))], 0.5))
    ids, _ = prompts(1)
    settings = Settings("graph", kernel=True)
    tokens, codes = run_and_get_code(lambda: decoder_of(model).run(model, ids, None, NEW, settings))
    assert torch.equal(tokens, theirs(model, ids))
    (code,) = codes
    call = code[code.index("def call(") :]
    assert call.count("torch.ops.cats.decode_attention.default(") == 2
    assert call.count("torch.ops.cats.sparse_gated_mlp.default(") == 2
    assert call.count("extern_kernels.mm(") == 2 * 2 + 1  # projections, output; and the head
    assert (
        len(re.findall(r"^ +cpp_fused\w*\(", call, re.M)) == 2 * 2 + 3
    )  # norms; embedding's angles, last norm, choice
    assert not re.search(r"empty_strided_cpu\(\(1, 2, \w+, 16\)", call)  # the cache's shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loop", ["captured", "graph", "graph-tuned"])
def test_graphs_on_a_gpu(loop: str) -> None:
    """Grown caches, padding, draws, switched and moved weights: the tokens of transformers, in float32."""
    torch.manual_seed(0)
    settings = transformers.LlamaConfig(
        hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    thresholds = cats.calibrate(model, [torch.randint(0, 512, (4, 64))], [0.3, 0.7])
    ids, mask = torch.randint(0, 512, (2, 70)).cuda(), torch.ones(2, 70, dtype=torch.int64).cuda()
    mask[0, :7] = 0
    changes: list[Callable[[], object]] = [
        lambda: None,
        lambda: cats.apply(model, thresholds[0.3]),
        lambda: cats.apply(model, thresholds[0.7]),
        lambda: cats.remove(model),
        lambda: setattr(model.model.layers[1].mlp.up_proj, "weight", nn.Parameter(torch.randn(704, 256).cuda() / 16)),
    ]
    for change in changes:
        change()
        torch.cuda.empty_cache()  # what a stale graph would read is gone
        for rows in (slice(1, 2), slice(0, 2)):
            expected = theirs(model, ids[rows], mask[rows], 200)
            tokens = cats.generate(model, ids[rows], 200, attention_mask=mask[rows], loop=loop, cache_tokens=128)
            assert torch.equal(tokens, expected)
    captures = decoder_of(model).captures
    cats.generate(model, ids, 200, attention_mask=mask, loop=loop)
    assert decoder_of(model).captures == captures  # nothing changed: the same graph
    stop = [int(expected[0, 80])]
    tokens = cats.generate(model, ids, 200, attention_mask=mask, loop=loop, eos_token_id=stop)
    assert torch.equal(tokens, theirs(model, ids, mask, 200, eos_token_id=stop))
    drawn = cats.generate(model, ids, 20, attention_mask=mask, loop=loop, seed=3, **DRAW)
    torch.manual_seed(3)
    assert torch.equal(drawn, theirs(model, ids, mask, 20, do_sample=True, **DRAW))


def test_settings_of_a_step_are_all_in_its_key() -> None:
    """A setting that is forgotten there would leave a stale graph."""
    outside = {"generator", "stop", "pad", "room"}
    fields = set(Settings.__dataclass_fields__) - outside
    other = {
        "loop": "graph", "sampling": cats.generation.Sampling(1.0), "own_attention": True, "fused": False,
        "kernel": True, "dependent_launch": False, "options": {"a": 1}, "backend": "eager",
    }  # fmt: skip
    assert set(other) == fields
    base = Settings("captured")
    for name, value in other.items():
        changed = Settings(**{"loop": "captured", name: value})
        assert changed.of_step != base.of_step
