"""`cats.quantize(linears="all")`: attention projections and the output matrix, multiplied by torch's own kernels."""

import copy
import pickle
import warnings

import pytest
import torch
from cats_kernels import quantize
from safetensors import safe_open
from torch import nn

import cats
from cats.__main__ import parser
from cats.command_inputs import load
from cats.generation import decoder_of
from cats.models import load_model
from cats.models import pretrained as pretrained_module
from cats.other_linears import check_others
from cats.packed_linear import PackedLinear, check_dtype
from tests.conftest import calls_compiler, tiny_model
from tests.hub_content import tokenizer
from tests.packed_cases import PROMPT, packed_of, wide_model
from tests.test_quantization import close, dequantised, logits
from tests.test_streaming import same

FORMATS = [(8, None), (8, 128), (4, 32), (4, 128)]


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Gemma2", "Phi3"])
@pytest.mark.parametrize("form", [(8, 128), (4, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_model_computes_with_what_its_weights_dequantise_to(family, form, symmetric):
    model = wide_model(family)
    before = logits(model)
    cats.quantize(model, *form, symmetric=symmetric, linears="all")
    of_attention = 2 if family == "Phi3" else 4
    assert len(packed_of(model)) == 3 * of_attention + 1 and "lm_head" in packed_of(model)
    assert not any(type(module) is nn.Linear for module in model.modules())
    plain = dequantised(model)
    assert not packed_of(plain)
    for length in (1, 6, 50):
        ids = torch.arange(2 * length).reshape(2, length) % 64
        assert close(logits(model, ids), logits(plain, ids))
    error = (logits(model) - before).norm() / before.norm()
    assert 0 < error < (0.1 if form[0] == 8 else 1.0)


@pytest.mark.parametrize("form", [(8, 128), (4, 32)])
@pytest.mark.parametrize("loop", ["eager", "captured", "transformers"])
def test_generated_are_the_tokens_of_the_dequantised_model(form, loop, batches):
    model = wide_model("Qwen2", num_attention_heads=4, num_key_value_heads=2)  # biases; 64 rows of keys
    cats.quantize(model, *form, linears="all")
    plain = dequantised(model)
    thresholds = cats.calibrate(model, batches, 0.5)
    prompts = PROMPT, torch.arange(200)[None].expand(2, -1) % 64
    for apply in (False, True):
        if apply:
            cats.apply(model, thresholds)
            cats.apply(plain, thresholds)
        for ids in prompts:
            tokens = cats.generate(model, ids, 12, loop=loop)
            assert torch.equal(tokens, cats.generate(plain, ids, 12, loop=loop))
            assert len(set(tokens[0, ids.shape[1] :].tolist())) > 3
    if loop == "captured":
        joined = [block.joined for block in decoder_of(model).blocks.values()]
        assert len(joined) == 3 and all(one is not None and one.bits == form[0] for one in joined)
        attention = model.model.layers[0].self_attn
        places = {
            getattr(attention, name).packed.untyped_storage().data_ptr() for name in ("q_proj", "k_proj", "v_proj")
        }
        assert places == {joined[0].weight.untyped_storage().data_ptr()}
        cats.generation.release(model)
        assert len({attention.q_proj.packed.untyped_storage().data_ptr(), *places}) == 2
        assert torch.equal(cats.generate(model, ids, 12, loop=loop), tokens)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_joined_product_is_that_of_each(bits):
    model = wide_model("Qwen2")
    cats.quantize(model, bits, 64 if bits == 4 else 128, linears="all", symmetric=False)
    attention, x = model.model.layers[0].self_attn, torch.randn(2, 1, 128)
    with torch.no_grad():
        apart = torch.cat([getattr(attention, name)(x) for name in ("q_proj", "k_proj", "v_proj")], -1)
        joined = cats.generation.projections.join(attention)
        assert torch.equal(joined(x), apart)
        assert torch.equal(torch.cat([getattr(attention, n)(x) for n in ("q_proj", "k_proj", "v_proj")], -1), apart)
        again = cats.generation.projections.join(attention)
        assert again.weight.data_ptr() == joined.weight.data_ptr()


def test_rows_that_cannot_be_joined_are_multiplied_apart():
    """96 rows of queries and 48 of keys are no whole blocks of an order of nibbles."""
    model = wide_model("Qwen3", num_attention_heads=6, num_key_value_heads=3, head_dim=16)
    with pytest.warns(UserWarning, match="self_attn.o_proj: it has 96 inputs"):
        cats.quantize(model, 4, 32, linears="all")
    plain = dequantised(model)
    tokens = cats.generate(model, PROMPT, 12, loop="captured")
    assert torch.equal(tokens, cats.generate(plain, PROMPT, 12, loop="captured"))
    blocks = decoder_of(model).blocks
    assert len(blocks) == 3 and all(block.joined is None for block in blocks.values())


@calls_compiler
@pytest.mark.slow
@pytest.mark.parametrize("form", [(8, 128), (4, 128)])
def test_the_compiled_loop(form):
    model = wide_model("Llama", num_hidden_layers=1)
    cats.quantize(model, *form, linears="all")
    expected = cats.generate(dequantised(model), PROMPT, 12, loop="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as a loop that falls back
        assert torch.equal(cats.generate(model, PROMPT, 12, loop="graph"), expected)


@pytest.mark.parametrize("keep", [False, True])
def test_an_output_matrix_that_is_the_embedding(keep, tmp_path):
    model = wide_model("Llama", tie_word_embeddings=True)
    before, expected = {name: value.clone() for name, value in model.state_dict().items()}, logits(model)
    cats.quantize(model, 4, 32, linears="all", keep=keep)
    assert isinstance(model.lm_head, PackedLinear) and not model.config.tie_word_embeddings
    assert torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    model.tie_weights()  # as transformers does now and then
    assert not list(model.lm_head.parameters())
    cats.save_quantized(model, tmp_path / "model.safetensors")
    loaded = cats.load_quantized(tmp_path / "model.safetensors")
    assert torch.equal(logits(loaded), logits(model)) and same(loaded, model)
    cats.dequantize(model)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == keep == model.config.tie_word_embeddings
    after = model.state_dict()
    assert (all(torch.equal(after[name], value) for name, value in before.items())) == keep
    assert torch.equal(logits(model), expected) == keep


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_is_read(form, symmetric, tmp_path):
    model, path = wide_model("Qwen2"), tmp_path / "model.safetensors"
    cats.quantize(model, *form, symmetric, linears="all")
    cats.save_quantized(model, path)
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "cats-quantized-2"
        names = set(file.keys())
    assert not any(name.endswith(".packed") for name in names) and "lm_head.data" in names
    loaded = cats.load_quantized(path)
    assert torch.equal(logits(loaded), logits(model)) and same(loaded, model)
    assert packed_of(loaded).keys() == packed_of(model).keys()
    assert not any("cats_quantized" in layer.self_attn.__dict__ for layer in loaded.model.layers)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("form", [(8, 128), (4, 32)])
def test_quantised_while_they_are_read(form, tied, tmp_path, monkeypatch):
    wide_model("Qwen2", tie_word_embeddings=tied).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    wanted, _ = load_model(str(tmp_path))
    cats.quantize(wanted, *form, linears="all")
    words = ["bench", str(tmp_path), "--bits", str(form[0]), "--group-size", str(form[1]), "--linears", "all"]
    monkeypatch.setattr(pretrained_module, "AutoModelForCausalLM", None)  # it is not loaded whole
    model, _ = load(parser().parse_args([*words, "--device", "cpu"]))
    assert same(model, wanted) and torch.equal(logits(model), logits(wanted))
    assert model.config.tie_word_embeddings is False


def test_a_file_of_mlps_alone_has_the_older_format(tmp_path):
    model = wide_model()
    cats.quantize(model, 4, 32)
    cats.save_quantized(model, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "cats-quantized-1"


def test_layers_of_other_shapes_stay_as_they_are():
    model = wide_model(vocab_size=321)
    with pytest.warns(UserWarning, match=r"stay unquantised: lm_head: it has 321 outputs, and torch's int4 products"):
        cats.quantize(model, 4, 32, linears="all")
    assert type(model.lm_head) is nn.Linear and len(packed_of(model)) == 12
    small = tiny_model()
    with pytest.warns(UserWarning, match=r"\(and 12 more\): lm_head: it has 32 inputs, and"):
        cats.quantize(small, 4, 32, linears="all")
    assert not packed_of(small)
    with pytest.raises(ValueError, match="cannot be quantised: it has 40 inputs, and torch's int8 products take"):
        PackedLinear(quantize(torch.randn(4, 40), 8), torch.float32)
    with pytest.raises(ValueError, match="it has 128 inputs, and torch's int4 products take whole groups of 256"):
        PackedLinear(quantize(torch.randn(16, 128), 4, 256), torch.float32)


def test_what_cannot_be_is_said_before_anything_changes():
    model = wide_model()
    with pytest.raises(ValueError, match='linears is \'some\'; allowed: "mlp" or "all"'):
        cats.quantize(model, linears="some")
    with pytest.raises(ValueError, match='linears="all" says what is quantised: give bits too'):
        load_model("pocket", linears="all")
    handle = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj has a hook or a mask"):
        cats.quantize(model, linears="all")
    handle.remove()
    assert not packed_of(model) and all(type(m.mlp.up_proj) is nn.Linear for m in model.model.layers)
    with pytest.raises(ValueError, match=r"int4 product on a GPU takes torch.bfloat16 alone"):
        check_dtype(4, torch.float16, torch.device("cuda"))
    check_dtype(8, torch.float16, torch.device("cuda"))
    cats.quantize(model, 4, 32, linears="all")
    with pytest.raises(ValueError, match=r"q_proj is quantised already: call cats.dequantize"):
        check_others(model, 4, 32)


def test_masks_on_the_inputs_of_attention(batches):
    """TEAL masks them: calibrated and applied on quantised layers, and refused where the layers would be replaced."""
    model = wide_model()
    cats.quantize(model, 8, linears="all")
    thresholds = cats.calibrate(model, batches, 0.5, criterion="teal", sites=("mlp_linears", "attention_linears"))
    plain = dequantised(model)
    for each in (model, plain):
        cats.apply(each, thresholds, "reference")
    assert close(logits(model), logits(plain), 1e-4)
    with pytest.raises(ValueError, match="has a hook or a mask"):
        cats.dequantize(model)
    with pytest.raises(ValueError, match="has a hook or a mask"):
        cats.quantize(plain, 8, linears="all")
    cats.remove(model)
    cats.dequantize(model)
    assert not packed_of(model)


def test_casts_copies_and_pickles():
    model = wide_model()
    cats.quantize(model, 4, 32, linears="all")
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), expected)
    model.to(torch.bfloat16)
    assert packed_of(model)["lm_head"].compute_dtype == torch.bfloat16
    assert close(logits(model).float(), expected, 0.1) and "bits=4, group_size=32, symmetric" in repr(model.lm_head)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loop", ["captured", "graph", "graph-tuned"])
@pytest.mark.parametrize("form", [(8, 128), (4, 128)])
def test_generation_on_a_gpu(form, loop, batches):
    """Tokens of a model in bfloat16 are those of its float32 copy, but for near ties: rounding moves a few activations
    over their threshold (0.12 deviations at the worst in the eager loop of a CPU; a wrong token is some two away)."""
    model = wide_model("Qwen2", hidden_size=256, head_dim=64).to(torch.bfloat16).cuda()
    cats.quantize(model, *form, linears="all")
    cats.apply(model, cats.calibrate(model, batches, 0.5))
    plain = dequantised(model).float()
    tokens = cats.generate(model, PROMPT, 60, loop=loop)
    assert all(block.joined is not None for block in decoder_of(model).blocks.values()) and decoder_of(model).blocks
    scores = logits(plain, tokens)[:, PROMPT.shape[1] - 1 : -1]
    chosen = scores.gather(-1, tokens[:, PROMPT.shape[1] :, None])[..., 0]
    short = (scores.amax(-1) - chosen) / scores.std(-1)
    assert short.max() <= 0.3 and short.mean() <= 0.02
