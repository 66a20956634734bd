"""A composite model, whose language part has a configuration of its own: Gemma 3 with its vision tower."""

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

import cats
from cats.finetuning import TrainSettings, finetune, recalibrate
from cats.lora import add_lora, preset, remove_lora
from cats.models import load_model
from cats.perplexity import perplexity, vocabulary_size
from cats.text_config import fingerprint, no_cache, text_config
from tests.conftest import FAMILIES, TINY, tiny_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 16, "patch_size": 8}
    text = {**TINY, "head_dim": 8, "pad_token_id": 0}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return Gemma3ForConditionalGeneration(config).eval()


def blocks():
    return list(torch.randint(0, 64, (4, 2, 24), generator=torch.Generator().manual_seed(3)))


def test_calibrate_apply_measure_and_generate(model):
    assert vocabulary_size(model) == text_config(model).vocab_size == 64
    cats.apply(model, cats.calibrate(model, blocks(), 0.5), kernel="cpu")
    skipped = cats.measure_sparsity(model, blocks())
    assert len(skipped) == TINY["num_hidden_layers"] and all(0.45 < s < 0.55 for s in skipped.values())
    ids = blocks()[0]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    torch.testing.assert_close(cats.generate(model, ids, max_new_tokens=4, eos_token_id=None), expected)
    assert perplexity(model, blocks()) > 1


@pytest.mark.parametrize("compiled", [False, True])
def test_finetune_switches_the_cache_off_and_leaves_the_configuration_as_it_was(model, tmp_path, monkeypatch, compiled):
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager"))
    cats.apply(model, cats.calibrate(model, blocks(), 0.5), kernel="reference")
    before, seen = model.config.to_json_string(use_diff=False), []
    adapted = add_lora(model, preset("paper"))
    data = [{"input_ids": row, "labels": row} for row in torch.cat(blocks())]
    settings = TrainSettings(steps=3, batch_size=4, learning_rate=1e-2, compiled=compiled)
    records = finetune(
        adapted, data, settings, tmp_path, measure=lambda: seen.append(text_config(model).use_cache) or {}
    )
    assert records[0]["train_loss"] > 0 and seen == [False]
    assert model.config.to_json_string(use_diff=False) == before
    recalibrate(adapted, blocks(), 0.5)
    cats.remove(remove_lora(adapted))


def test_the_cache_is_off_in_the_configuration_that_a_plain_model_reads(llama):
    assert text_config(llama) is llama.config and text_config(torch.nn.Linear(2, 2)) is None
    with pytest.raises(KeyError), no_cache(llama):
        assert llama.config.use_cache is False
        raise KeyError
    assert llama.config.use_cache is True
    with no_cache(torch.nn.Linear(2, 2)):
        pass


def test_thresholds_name_the_type_and_sizes_of_the_language_part(model):
    """The very values that files have had since version 0.1: another one and they would be refused."""
    sizes = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3}
    assert fingerprint(model) == {"model_type": "gemma3_text", **sizes}
    types = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3")
    for family, model_type in zip(FAMILIES, types, strict=True):
        assert fingerprint(tiny_model(family)) == {"model_type": model_type, **sizes}
    assert fingerprint(torch.nn.Linear(2, 2)) == {}


def test_quantised_files_and_the_first_layers_of_a_directory(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "tokenizer").mkdir()
    cats.quantize(model, 8)
    cats.save_quantized(model, tmp_path / "file")
    ids = blocks()[0]
    torch.testing.assert_close(cats.load_quantized(tmp_path / "file")(ids).logits, model(ids).logits)


def test_a_directory_loads_with_fewer_layers(model, tmp_path, monkeypatch):
    from cats.models import pretrained

    model.save_pretrained(tmp_path)
    monkeypatch.setattr(pretrained.AutoTokenizer, "from_pretrained", lambda *_args, **_options: None)
    for bits in (None, 8):
        loaded, _ = load_model(str(tmp_path), layers=1, bits=bits)
        assert len(cats.gated_mlps(loaded)) == 1
