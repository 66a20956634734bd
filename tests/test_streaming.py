"""Models quantised while they are read are those that `cats.quantize` makes, from every kind of source."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import cats
from cats.models import load_model, pretrained
from cats.models.streaming import Checkpoint
from cats.quantized_linear import QuantizedLinear
from tests.hub_content import save_model


def same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    equal = all(torch.equal(first[name], value) and first[name].dtype == value.dtype for name, value in second.items())
    return first.keys() == second.keys() and equal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "Llama")


@pytest.mark.parametrize(("bits", "group_size"), [(8, None), (4, 32)])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_directory(bits: int, group_size: int | None, dtype: str, folder: Path, monkeypatch) -> None:
    wanted, _ = load_model(str(folder), dtype)
    cats.quantize(wanted, bits, group_size)
    monkeypatch.setattr(pretrained, "AutoModelForCausalLM", None)  # it is not loaded whole
    model, tokenizer = load_model(str(folder), dtype, bits=bits, group_size=group_size)
    assert tokenizer is not None and not model.training and same(model, wanted) and model.dtype == wanted.dtype
    ids = torch.arange(40)[None] % 64
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert len(load_model(str(folder), layers=1, bits=8)[0].model.layers) == 1


def test_a_checkpoint_in_parts(folder: Path) -> None:
    wanted, _ = load_model(str(folder))
    wanted.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(set(Checkpoint(str(folder), torch.device("cpu")).files.values())) > 1
    cats.quantize(wanted, 8)
    assert same(load_model(str(folder), bits=8)[0], wanted)


def test_an_index_left_behind_is_not_followed(folder: Path) -> None:
    """transformers takes the whole file first."""
    wanted, _ = load_model(str(folder))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "gone"}}))
    cats.quantize(wanted, 8)
    assert same(load_model(str(folder), bits=8)[0], wanted)


def test_weights_of_other_shapes_than_the_configuration_gives_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    for options in ({}, {"bits": 8}):
        with pytest.raises(OSError, match=r"has weights of other shapes than its config\.json gives"):
            load_model(str(folder), **options)


def test_what_transformers_must_convert_is_loaded_whole(folder: Path) -> None:
    """A checkpoint of the model without its head has other names."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        tensors = {name.removeprefix("model."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    wanted, _ = load_model(str(folder))
    cats.quantize(wanted, 8)
    model, _ = load_model(str(folder), bits=8)
    assert same(model, wanted) and any(isinstance(module, QuantizedLinear) for module in model.modules())


@pytest.mark.parametrize("spec", ["pocket", "shape:small"])
def test_other_sources(spec: str) -> None:
    wanted, _ = load_model(spec, layers=1)
    cats.quantize(wanted, 4)
    assert same(load_model(spec, layers=1, bits=4)[0], wanted)


def test_tied_matrices_stay_tied(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load_model(str(folder), bits=8)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_is_wrong_is_one_sentence(folder: Path) -> None:
    with pytest.raises(ValueError, match="bits is 3; allowed: 8 or 4"):
        load_model(str(folder), bits=3)
    with pytest.raises(ValueError, match="give one of them"):
        load_model(str(folder), bits=8, packed=True)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(OSError, match="has a damaged file") as caught:
        load_model(str(folder), bits=8)
    assert "\n" not in str(caught.value)
