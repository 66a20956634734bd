"""A quantised model refuses `save_pretrained`; everything else that saves, copies or trains it goes on as before."""

import copy
import pickle

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import cats
from cats.not_serializable import NotSerializable, refuse_save_pretrained
from tests.conftest import tiny_model

REFUSED = r"quantized with cats\.quantize, which cats\.save_quantized saves, and is not serializable"


def ids():
    return torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


def quantized(**options):
    model = tiny_model()
    cats.quantize(model, 8, 32, **options)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_quantised_model_and_its_copies_refuse(tmp_path, wrap):
    model = wrap(quantized(linears="all"))
    with pytest.raises(ValueError, match=REFUSED):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("linears", ["mlp", "all"])
def test_the_decoder_inside_of_a_quantised_model_refuses_too(tmp_path, linears):
    model = quantized(linears=linears)
    with pytest.raises(ValueError, match=REFUSED):
        model.model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    cats.dequantize(model)
    model.model.save_pretrained(tmp_path)


def test_a_model_that_holds_no_quantised_layer_is_saved(tmp_path):
    """As the vision tower of a composite model, whose language part alone is quantised."""
    model = torch.nn.ModuleDict({"tower": tiny_model(), "language": tiny_model()})
    cats.quantize(model["language"], 8, 32)
    refuse_save_pretrained(model)
    model["tower"].save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=REFUSED):
        model["language"].save_pretrained(tmp_path / "language")


def test_a_loaded_file_refuses_too(tmp_path):
    model = quantized()
    cats.save_quantized(model, tmp_path / "file")
    loaded = cats.load_quantized(tmp_path / "file")
    torch.testing.assert_close(loaded(ids()).logits, model(ids()).logits)
    with pytest.raises(ValueError, match=REFUSED):
        loaded.save_pretrained(tmp_path / "directory")


def test_a_dequantised_model_is_saved_and_read_back(tmp_path):
    model = quantized(linears="all")
    cats.dequantize(model)
    assert "hf_quantizer" not in vars(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids()).logits, model(ids()).logits)


def test_torch_save_casts_and_compiled_code_work(tmp_path):
    model = quantized()
    expected = model(ids()).logits
    torch.save(model, tmp_path / "whole")
    torch.save(model.state_dict(), tmp_path / "state")
    whole = torch.load(tmp_path / "whole", weights_only=False)
    torch.testing.assert_close(whole(ids()).logits, expected)
    other = quantized()
    other.load_state_dict(torch.load(tmp_path / "state"))
    compiled = torch.compile(other, backend="eager")
    torch.testing.assert_close(compiled(ids()).logits, expected)
    assert compiled.bfloat16()(ids()).logits.dtype == torch.bfloat16
    assert quantized().half().float()(ids()).logits.dtype == torch.float32


def config():
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)


def test_adapters_of_peft_are_trained_and_saved(tmp_path):
    model = peft.get_peft_model(quantized(), config())
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids()]).train()
    assert list((tmp_path / "run").glob("checkpoint-2/adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(quantized(), tmp_path / "adapter")
    torch.testing.assert_close(again(ids()).logits, model.eval()(ids()).logits)


def test_adapters_that_transformers_adds_are_saved(tmp_path):
    model = quantized()
    model.add_adapter(config())
    model.save_pretrained(tmp_path / "adapter")
    again = quantized()
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(again(ids()).logits, model.eval()(ids()).logits)


def test_a_model_that_could_not_be_quantised_is_saved(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        cats.quantize(model, 8, 32)
    model.save_pretrained(tmp_path / "saved")


def test_a_quantizer_of_another_library_stays():
    model = tiny_model()
    model.hf_quantizer = other = object()
    cats.quantize(model, 8, 32)
    cats.dequantize(model)
    assert model.hf_quantizer is other and not isinstance(other, NotSerializable)
