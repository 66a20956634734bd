"""`cats.generate`: the tokens of transformers' `generate` in every loop, and nothing stale after the model changed."""

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
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code
from transformers import AutoModelForCausalLM, GenerationConfig

import cats
from cats.generation import Settings, attention, capacity_for, decoder, decoder_of, loops, release
from cats.generation.attention import DecodeBlock, decode_blocks
from cats.generation.loops import fingerprint

from .conftest import FAMILIES, tiny_model

NEW = 14
LOOPS = ("eager", "captured")
DRAW = {"temperature": 0.8, "top_k": 20, "top_p": 0.9}


def made(family: str = "Llama", **overrides: object) -> nn.Module:
    model = tiny_model(family, **overrides)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    return model


def prompts(batch: int = 2, length: int = 10) -> tuple[Tensor, Tensor]:
    """Sequences of different lengths, padded on the left."""
    ids = torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    for row in range(batch - 1):
        mask[row, : row + 3] = 0
    return ids, mask


def theirs(model: nn.Module, ids: Tensor, mask: Tensor | None = None, new: int = NEW, **options: object) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)


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


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Phi3"])
def test_the_tokens_of_transformers(family: str, loop: str) -> None:
    model = made(family)
    for batch in (1, 3):
        ids, mask = prompts(batch)
        expected = theirs(model, ids, mask)
        assert torch.equal(cats.generate(model, ids, NEW, attention_mask=mask, loop=loop), expected)
        torch.manual_seed(7)
        drawn = theirs(model, ids, mask, do_sample=True, **DRAW)
        assert torch.equal(cats.generate(model, ids, NEW, attention_mask=mask, loop=loop, seed=7, **DRAW), drawn)
        assert not torch.equal(drawn, expected)


@pytest.mark.parametrize("length", [1, 2, 9, 40])
@pytest.mark.parametrize("loop", LOOPS)
def test_prompts_of_any_length_and_one_new_token(length: int, loop: str) -> None:
    model = made()
    ids, _ = prompts(1, length)
    for new in (1, 2, NEW):
        assert torch.equal(cats.generate(model, ids[0], new, loop=loop), theirs(model, ids, new=new))


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


@pytest.mark.parametrize("loop", ["eager", "captured", "transformers"])
def test_sequences_end_at_stop_tokens(loop: str) -> None:
    model = made()
    ids, mask = prompts(3)
    free = theirs(model, ids, mask)[:, ids.shape[1] :]
    stop = [int(free[0, 3]), int(free[1, 6])]
    expected = theirs(model, ids, mask, eos_token_id=stop, pad_token_id=1)
    tokens = cats.generate(model, ids, NEW, attention_mask=mask, eos_token_id=stop, pad_token_id=1, loop=loop)
    assert torch.equal(tokens, expected)
    first = cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], eos_token_id=stop[0], loop=loop)
    assert first.shape[1] == ids.shape[1] + 1 + free[0].tolist().index(stop[0])
    model.generation_config.eos_token_id = stop[0]  # the model's own by default
    assert torch.equal(cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], loop=loop), first)
    whole = cats.generate(model, ids[:1], NEW, attention_mask=mask[:1], eos_token_id=None, loop=loop)
    assert torch.equal(whole[0, ids.shape[1] :], free[0])


@pytest.mark.parametrize("loop", ["eager", "captured", "transformers"])
def test_tokens_are_streamed(loop: str) -> None:
    model = made()
    ids, mask = prompts(2)
    seen: list[Tensor] = []
    tokens = cats.generate(model, ids, NEW, attention_mask=mask, streamer=seen.append, loop=loop)
    assert torch.equal(torch.stack(seen, 1), tokens[:, ids.shape[1] :])

    class Streamer:
        def __init__(self) -> None:
            self.values: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.values.append(value.reshape(-1))

        def end(self) -> None:
            self.values.append(torch.tensor([-1]))

    streamer = Streamer()
    tokens = cats.generate(model, ids[1:], NEW, streamer=streamer, loop=loop)
    assert torch.cat(streamer.values).tolist() == [*tokens[0].tolist(), -1]


OTHERS = {
    "an encoder": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, vocab_size=64)
    ),
    "a state": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=1, vocab_size=64)
    ),
    "inputs in a way of its own": lambda: made("Phi3"),
}


@pytest.mark.parametrize("reason", OTHERS)
def test_other_models_fall_back_in_one_sentence(reason: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[reason]().eval()
    ids, _ = prompts(1)
    model.generation_config.update(eos_token_id=None, pad_token_id=0, decoder_start_token_id=0)
    with pytest.warns(UserWarning, match="transformers' generate is used, since") as caught:
        tokens = cats.generate(model, ids, 5)
    ours = [str(w.message) for w in caught if "transformers' generate is used" in str(w.message)]
    assert len(ours) == 1 and "\n" not in ours[0]
    assert torch.equal(tokens, theirs(model, ids, new=5, do_sample=False))


def test_a_model_in_training_mode_falls_back() -> None:
    model = made().train()
    with pytest.warns(UserWarning, match="LlamaForCausalLM is in training mode"):
        cats.generate(model, prompts(1)[0], 2)


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


def test_the_models_own_settings_do_not_count() -> None:
    model = made()
    ids, _ = prompts(1)
    expected = theirs(model, ids)
    model.generation_config = GenerationConfig(do_sample=True, temperature=3.0, repetition_penalty=9.0, pad_token_id=0)
    for loop in ("eager", "transformers"):
        assert torch.equal(cats.generate(model, ids, NEW, loop=loop), expected)
    assert model.generation_config.repetition_penalty == 9.0


def test_wrapped_models_are_served() -> None:
    model = made()
    ids, _ = prompts(1)
    expected = theirs(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(cats.generate(torch.compile(model, backend="eager"), ids, NEW), expected)


def test_draws() -> None:
    """Empirical frequencies against the probabilities that the settings ask for."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0]])
    many = logits.expand(20000, -1)
    for options, allowed in (({}, 5), ({"top_k": 2}, 2), ({"top_p": 0.75}, 2), ({"top_k": 9}, 5)):
        sampling = cats.generation.Sampling(temperature=1.5, **options)
        torch.manual_seed(0)
        drawn = torch.bincount(sampling(many)[:, 0], minlength=5) / 20000
        kept = torch.where(torch.arange(5) < allowed, logits[0] / 1.5, -torch.inf).softmax(0)
        assert torch.allclose(drawn, kept, atol=0.012)


BAD = [
    ({"input_ids": [1, 2]}, TypeError, "input_ids must be an int64 tensor"),
    ({"input_ids": torch.zeros(1, 3)}, TypeError, r"not torch.float32 \(1, 3\)"),
    ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "input_ids has no tokens"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be a whole number, 1 or more, not 0"),
    ({"max_new_tokens": 2.5}, ValueError, "max_new_tokens must be a whole number"),
    ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, not -1.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more"),
    ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k must be a whole number, 1 or more"),
    ({"temperature": 1.0, "top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\]"),
    ({"top_k": 4}, ValueError, "top_k and top_p need a temperature above 0"),
    ({"seed": -1}, ValueError, r"seed must be a whole number from 0 to 2\^63"),
    ({"loop": "fast"}, ValueError, "unknown loop 'fast': allowed are auto, transformers, eager"),
    ({"eos_token_id": "end"}, ValueError, 'eos_token_id must be a token, several, None or "model"'),
    ({"streamer": 3}, TypeError, "streamer must have put and end, or be a function"),
    ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask must be a tensor of the shape of input_ids"),
    ({"attention_mask": torch.tensor([[1, 1, 0, 0]])}, ValueError, "pad on the left"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD)
def test_bad_input(options: dict, kind: type, message: str) -> None:
    given = {"input_ids": torch.arange(4)[None], "max_new_tokens": 2, **options}
    with pytest.raises(kind, match=message):
        cats.generate(made(), **given)


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


@pytest.mark.parametrize(
    ("device", "batch", "expected"), [("cpu", 1, "eager"), ("cuda", 1, "graph-tuned"), ("cuda", 2, "graph")]
)
def test_the_loop_that_auto_takes(device: str, batch: int, expected: str) -> None:
    assert loops.default_loop(torch.device(device), batch) == expected


@pytest.mark.parametrize("loop", ["eager", "captured"])
def test_layers_that_leave_rotary_embedding_out(loop: str) -> None:
    """SmolLM3 does so in some layers: blocks of one class that compute different things."""
    model = tiny_model("SmolLM3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0], pad_token_id=0)
    ids = torch.randint(1, 50, (1, 9), generator=torch.Generator().manual_seed(5))
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(cats.generate(model, ids, 8, loop=loop, eos_token_id=[]), expected)


@pytest.mark.parametrize("loop", ["eager", "captured"])
def test_inference_mode_leaves_nothing_behind(loop: str) -> None:
    model, ids = tiny_model(), torch.randint(1, 50, (1, 4), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        first = cats.generate(model, ids.clone(), 4, loop=loop)
    assert torch.equal(cats.generate(model, ids, 4, loop=loop), first)
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
