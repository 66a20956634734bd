"""GGUF files: the same logits and token ids as the same weights in safetensors, and one sentence for what cannot be."""

import json
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

gguf = pytest.importorskip("gguf")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("GGUF files need transformers 5.23", allow_module_level=True)

from cats.models import identity, load_config, load_model, load_tokenizer, sanity  # noqa: E402
from cats.models.__main__ import main  # noqa: E402
from cats.models.gguf_config import FAMILIES  # noqa: E402

from .conftest import tiny_model  # noqa: E402
from .gguf_files import (  # noqa: E402
    TEXTS,
    gemma_vocabulary,
    llama3_vocabulary,
    llama_vocabulary,
    qwen_vocabulary,
    write_gguf,
)

Q4, Q8 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0
pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity")  # these models have random weights


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


_GEMMA = {"query_pre_attn_scalar": 8, "sliding_window": 8, "rms_norm_eps": 1e-6}
_TWO_THETAS = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# architecture in GGUF, family in transformers, vocabulary, further settings
CASES = {
    "llama": ("llama", "Llama", llama_vocabulary, _rope(5e4)),
    "llama3": ("llama", "Llama", llama3_vocabulary, {**_rope(5e5), "tie_word_embeddings": True}),
    "mistral": ("llama", "Mistral", llama_vocabulary, {**_rope(1e6), "sliding_window": None, "rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", "Qwen2", qwen_vocabulary, {**_rope(1e6), "tie_word_embeddings": True}),
    "qwen3": ("qwen3", "Qwen3", qwen_vocabulary, _rope(1e6)),
    "gemma2": ("gemma2", "Gemma2", gemma_vocabulary, {**_GEMMA, "attn_logit_softcapping": 20.0, **_rope(1e4)}),
    "gemma3": (
        "gemma3", "Gemma3Text", gemma_vocabulary,
        {**_GEMMA, "num_hidden_layers": 7, "rope_parameters": _TWO_THETAS, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def make(case: str, seed: int = 0, **settings) -> tuple[torch.nn.Module, Any, str]:
    """A random model of a case, its vocabulary, and GGUF's name of its architecture."""
    architecture, family, vocabulary, extra = CASES[case]
    words = vocabulary()
    special = {"bos_token_id": words.ids.get("bos"), "eos_token_id": words.ids["eos"], "pad_token_id": None}
    overrides = {"intermediate_size": 96, "vocab_size": len(words.tokens), **special, **extra, **settings}
    return tiny_model(family, seed, **overrides), words, architecture


def test_every_supported_architecture_has_a_case() -> None:
    assert {architecture for architecture, *_ in CASES.values()} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_token_ids_are_those_of_the_same_weights_in_safetensors(case: str, tmp_path: Path) -> None:
    original, words, architecture = make(case)
    original.save_pretrained(tmp_path / "hf")
    words.original.save_pretrained(tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    wanted, wanted_tokenizer = load_model(str(tmp_path / "hf"), "float32")
    model, tokenizer = load_model(str(path), "float32")
    assert tokenizer is not None and wanted_tokenizer is not None
    ids = torch.randint(0, len(words.tokens), (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, reference = model(ids).logits, wanted(ids).logits
    # a norm of Gemma is stored as one more, which rounds it
    torch.testing.assert_close(found, reference, rtol=0, atol=2e-4 if "gemma" in case else 0)
    assert {"llama": "Llama"}.get(architecture, CASES[case][1].removesuffix("Text")) in type(model).__name__
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == words.original(text)["input_ids"], text
        assert tokenizer(text)["input_ids"] == wanted_tokenizer(text)["input_ids"], text
        plain = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(plain) == words.original.decode(plain)
    for role in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{role}_token") == getattr(words.original, f"{role}_token"), role
    assert tokenizer.model_max_length == original.config.max_position_embeddings


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_is_that_of_the_model(case: str, tmp_path: Path) -> None:
    original, words, architecture = make(case)
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    config, wanted = load_config(str(path)), original.config
    for key in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id",
    ):  # fmt: skip
        assert getattr(config, key) == getattr(wanted, key), key
    for key in ("head_dim", "layer_types", "sliding_window", "query_pre_attn_scalar"):
        if hasattr(wanted, key) and architecture != "llama" and hasattr(config, key):
            assert getattr(config, key) == getattr(wanted, key), key
    rope, other = config.rope_parameters, wanted.rope_parameters
    assert (rope if "rope_theta" in rope else rope["full_attention"])["rope_theta"] == (
        other if "rope_theta" in other else other["full_attention"]
    )["rope_theta"]
    assert load_config(str(path), layers=2).num_hidden_layers == 2
    assert load_model(str(path), "float32", layers=1)[0].config.num_hidden_layers == 1


def test_quantised_weights_are_dequantised_and_the_result_is_a_plain_model(tmp_path: Path) -> None:
    original, words, architecture = make("qwen2", tie_word_embeddings=False)
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, kinds=lambda _name: Q8)
    model, _ = load_model(str(path))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}  # "auto"
    model, tokenizer = load_model(str(path), "float32")
    gate = original.model.layers[1].mlp.gate_proj.weight.detach().numpy()
    expected = gguf.dequantize(gguf.quantize(gate, Q8), Q8)
    np.testing.assert_array_equal(model.model.layers[1].mlp.gate_proj.weight.detach().numpy(), expected)
    assert not np.array_equal(expected, gate)
    assert not model.config.tie_word_embeddings
    assert not hasattr(model, "hf_quantizer") and not hasattr(model.config, "quantization_config")
    settings = model.generation_config
    assert settings.eos_token_id == [words.tokens.index("<|im_end|>"), words.tokens.index("<|endoftext|>")]
    assert settings.pad_token_id == words.ids["padding"] and not settings.do_sample
    assert tokenizer is not None and tokenizer.bos_token is None and len(tokenizer) == words.tokens.index("[PAD0]")


@pytest.mark.parametrize("finer", ["output.weight", "token_embd.weight"])
def test_an_output_matrix_stored_twice_is_tied_on_the_finer_copy(finer: str, tmp_path: Path) -> None:
    original, words, architecture = make("qwen2")
    embedding = original.get_input_embeddings().weight.detach().numpy()

    def twice(tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    kinds = {"output.weight": Q4, "token_embd.weight": Q4} | {finer: Q8}
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, kinds, twice)
    assert load_config(str(path)).tie_word_embeddings
    model, _ = load_model(str(path), "float32")
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(embedding, Q8), Q8))
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path / "saved")
    again, _report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_llama_3_frequencies_become_transformers_rule(tmp_path: Path) -> None:
    rule = {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    original, words, architecture = make("llama3", rope_parameters=rule, hidden_size=128, head_dim=32)
    plain = transformers.LlamaConfig(head_dim=32, **_rope(5e5))
    frequencies = original.model.rotary_emb.inv_freq
    unscaled = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(plain).inv_freq
    divisors = (unscaled / frequencies).numpy()
    assert divisors.max() > 31 and divisors.min() == 1

    def add(tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = divisors

    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, change=add)
    model, _ = load_model(str(path), "float32")
    assert model.config.rope_parameters == rule
    ids = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    divisors = divisors**0.5
    write_gguf(path, original, words, architecture, change=add)
    with pytest.raises(ValueError, match="rotary frequencies by a rule that is not Llama 3's"):
        load_config(str(path))


def test_convert_writes_a_directory_that_loads_the_same(tmp_path: Path, capsys) -> None:
    original, words, architecture = make("qwen2")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, kinds=lambda _name: Q8)
    folder = tmp_path / "converted"
    assert main([str(path), str(folder)]) == 0 and f"wrote {folder}" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert str(tmp_path) not in "".join(p.read_text() for p in folder.glob("*.json"))
    (model, tokenizer), (direct, direct_tokenizer) = load_model(str(folder)), load_model(str(path))
    assert tokenizer is not None and direct_tokenizer is not None
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, direct(ids).logits)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.to_dict() == direct.generation_config.to_dict()
    assert all(tokenizer(text)["input_ids"] == direct_tokenizer(text)["input_ids"] for text in TEXTS)
    of_file, of_folder = identity(str(path)), identity(str(folder))
    assert of_file["kind"] == "GGUF Q8_0, dequantised" and of_file["weights"].keys() == {"model.gguf"}
    assert of_folder["kind"] == "GGUF Q8_0, dequantised, converted to a directory"
    assert of_folder["file_sha256"] == of_file["weights"]["model.gguf"]
    assert main([str(path), str(folder)]) == 2 and "not empty" in capsys.readouterr().err
    assert main([str(folder), str(tmp_path / "x")]) == 2 and "not a GGUF file" in capsys.readouterr().err


def _damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "cut in the data":
        path.write_bytes(content[:-100])
    elif kind == "cut in the head":
        path.write_bytes(content[:3000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a model")
    elif kind == "version":
        path.write_bytes(content[:4] + struct.pack("<I", 99) + content[8:])
    elif kind == "string of absurd length":
        path.write_bytes(content[:24] + struct.pack("<Q", 2**62) + content[32:])


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("cut in the data", OSError, "truncated or damaged.*its tensors need"),
        ("cut in the head", OSError, "truncated or damaged"),
        ("string of absurd length", OSError, "truncated or damaged"),
        ("empty", ValueError, "is not a GGUF file"),
        ("text", ValueError, "is not a GGUF file"),
        ("version", ValueError, "GGUF of version 99: versions 2 and 3"),
    ],
)
def test_a_damaged_file_is_one_sentence(kind: str, error: type[Exception], says: str, tmp_path: Path) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    _damage(path, kind)
    for load in (load_config, load_model, load_tokenizer, identity):
        with pytest.raises(error, match=says) as caught:
            load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def _drop(tensors: dict[str, np.ndarray]) -> None:
    del tensors["blk.1.ffn_up.weight"]


def _expert(tensors: dict[str, np.ndarray]) -> None:
    tensors["blk.0.ffn_gate_inp.weight"] = np.zeros((4, 32), dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"named": "phi3"}, ValueError, "is a phi3 model: GGUF files of llama, qwen2, .* can be loaded"),
        ({"endianess": gguf.GGUFEndian.BIG}, ValueError, "big-endian"),
        ({"change": _drop}, OSError, "incomplete: 1 tensors are missing, such as blk.1.ffn_up.weight"),
        ({"change": _expert}, ValueError, "does not have, such as blk.0.ffn_gate_inp.weight"),
        ({"metadata": lambda w: w.add_uint16("split.count", 3)}, ValueError, "one part of 3"),
        ({"metadata": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)}, ValueError, "positions by yarn"),
    ],
)
def test_a_file_that_is_not_supported_is_one_sentence(options, error, says: str, tmp_path: Path) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, **options)
    for load in (load_config, load_model):
        with pytest.raises(error, match=says) as caught:
            load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_tokenizer_that_is_not_known_is_one_sentence(tmp_path: Path) -> None:
    original, words, architecture = make("llama3")
    words.pre = "chatglm-bpe"
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    with pytest.raises(ValueError, match="gpt2 with the splitting rule chatglm-bpe: known are llama, and gpt2 with"):
        load_model(str(path))


def test_what_is_missing_on_this_machine_is_one_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    with pytest.raises(ValueError, match="does not exist: give the path of a GGUF file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ValueError, match="cannot be sharded: convert it"):
        load_model(str(path), device="sharded")
    with monkeypatch.context() as patch:
        patch.setattr(transformers, "__version__", "5.17.0")
        with pytest.raises(ValueError, match=r"needs transformers 5\.23 or newer, not 5\.17\.0"):
            load_model(str(path))
    monkeypatch.setattr("cats.models.from_gguf.find_spec", lambda _name: None)
    with pytest.raises(OSError, match=r"needs the package gguf: pip install 'cats-sparsity\[gguf\]'"):
        load_config(str(path))
    assert main([str(path), str(tmp_path / "x")]) == 2 and "package gguf" in capsys.readouterr().err


def test_an_absurd_perplexity_is_said_and_a_sane_one_is_not(tmp_path: Path, monkeypatch) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture)
    with pytest.warns(UserWarning, match=r"has a perplexity of .*loaded wrongly"):
        load_model(str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(path), layers=1)  # a part of a model says nothing
        monkeypatch.setattr(sanity, "TEXT", "    def __init__(self, name):\n        self.name = name\n" * 8)
        model, tokenizer = load_model("pocket")
        assert tokenizer is not None and sanity.absurdity("pocket", model, tokenizer) is None
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    assert "loaded wrongly" in (sanity.absurdity("pocket", model, tokenizer) or "")
