"""Files of quantised models: what is written is what is read, and what is not such a file is refused in a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import cats
from tests.conftest import FAMILIES, tiny_model
from tests.test_quantization import logits


@pytest.fixture
def file(tmp_path) -> Path:
    model = tiny_model()
    cats.quantize(model, 4, 32)
    cats.save_quantized(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def content(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", [(8, None, True), (4, 32, False)])
def test_what_is_written_is_read(family, form, tmp_path, batches):
    model, path = tiny_model(family), tmp_path / "folder" / "model.safetensors"
    for parameter in model.parameters():  # and not the rotary embedding's buffer, which no checkpoint holds
        parameter.data = parameter.data.to(torch.bfloat16)
    cats.quantize(model, *form)
    expected = logits(model)
    cats.apply(model, cats.calibrate(model, batches, 0.5))
    cats.save_quantized(model, path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    loaded = cats.load_quantized(path)
    assert torch.equal(logits(loaded), expected) and not loaded.training
    assert loaded.config.to_dict() == model.config.to_dict() | {"dtype": "bfloat16"}
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    cats.apply(loaded, cats.calibrate(loaded, batches, 0.5))
    assert torch.equal(logits(loaded), logits(model))


def test_a_part_of_a_model_is_refused_and_a_model_with_a_quantised_part_is_saved(tmp_path):
    model = tiny_model()
    cats.quantize(model.model, 8, 32)
    with pytest.raises(ValueError, match="a LlamaModel alone could not be read back: save the LlamaForCausalLM that"):
        cats.save_quantized(model.model, tmp_path / "part")
    for other in (model.model.layers[0], torch.nn.Sequential(model)):
        with pytest.raises(ValueError, match=f"a {type(other).__name__} has no configuration to be read back by"):
            cats.save_quantized(other, tmp_path / "part")
    cats.save_quantized(model, tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    assert torch.equal(logits(cats.load_quantized(tmp_path / "whole")), logits(model))


def test_tied_matrices_are_written_once_and_stay_tied(tmp_path):
    model = tiny_model("Llama", tie_word_embeddings=True)
    cats.quantize(model, 8)
    cats.save_quantized(model, tmp_path / "model.safetensors")
    tensors, _ = content(tmp_path / "model.safetensors")
    assert not any(name.startswith("lm_head") for name in tensors)
    loaded = cats.load_quantized(tmp_path / "model.safetensors")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))


def test_only_quantised_models_are_written(tmp_path):
    with pytest.raises(ValueError, match=r"layers.0.mlp is not quantised: call cats.quantize"):
        cats.save_quantized(tiny_model(), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    model = tiny_model()
    cats.quantize(model)
    with pytest.raises(OSError, match="it is a folder"):
        cats.save_quantized(model, tmp_path)


def test_weights_of_several_dtypes_are_refused(tmp_path):
    model = tiny_model().to(torch.bfloat16)
    cats.quantize(model, 8)
    model.model.norm.float()
    with pytest.raises(
        ValueError, match=r"model.norm.weight is torch.float32 in a model of torch.bfloat16; only weights"
    ):
        cats.save_quantized(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    cats.save_quantized(model.to(torch.bfloat16), tmp_path / "model.safetensors")
    assert cats.load_quantized(tmp_path / "model.safetensors").model.norm.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_files(keep, file):
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(OSError, match="is truncated or damaged"):
        cats.load_quantized(file)


def test_a_missing_file(tmp_path):
    with pytest.raises(OSError, match="does not exist"):
        cats.load_quantized(tmp_path / "nothing.safetensors")


GATE = "model.layers.1.mlp.gate_proj"


def form(**changes):
    """A change of the metadata of one layer."""

    def change(tensors, metadata):
        layers = json.loads(metadata["layers"])
        layers[GATE] |= changes
        metadata["layers"] = json.dumps(layers)

    return change


def tensor(name, make):
    """A change of one tensor, which None removes."""

    def change(tensors, metadata):
        value = make(tensors.get(name))
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value.contiguous()

    return change


def meta(**changes):
    def change(tensors, metadata):
        for key, value in changes.items():
            metadata.pop(key)
            if value is not None:
                metadata[key] = value

    return change


def config(**changes):
    def change(tensors, metadata):
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)

    return change


LIES = {
    'no "format" of "cats-quantized-1"': meta(format="cats-quantized-9"),
    "metadata lack config": meta(config=None),
    "config must be a model's configuration": meta(config="[]"),
    "its dtype is 'int8', where float32": meta(dtype="int8"),
    "its layers must map": meta(layers="3"),
    "must have bits, group_size, symmetric": form(bits="4"),
    "must have bits, group_size": form(more=1),
    "gate_proj: data is torch.uint8; with 8 bits it must be torch.int8": form(bits=8),
    "gate_proj: bits is 7; allowed": form(bits=7),
    r"gate_proj: data is \(88, 16\); it must be \(m, 32\)": form(group_size=64),
    "gate_proj: group_size is -32": form(group_size=-32),
    "it lacks model.layers.1.mlp.gate_proj.zeros": form(symmetric=False),
    r"gate_proj: data is \(88, 16\)": form(transposed=True),
    "it lacks model.layers.1.mlp.gate_proj.data": tensor(f"{GATE}.data", lambda t: None),
    "gate_proj: data has 87 rows; the model's configuration gives 88": lambda tensors, metadata: tensors.update(
        {f"{GATE}.data": tensors[f"{GATE}.data"][:87].clone(), f"{GATE}.scales": tensors[f"{GATE}.scales"][:87].clone()}
    ),
    r"gate_proj: scales are \(88, 2\)": tensor(f"{GATE}.scales", lambda t: t.repeat(1, 2)),
    "gate_proj: scales and zeros must be finite": tensor(f"{GATE}.scales", lambda t: t / 0),
    "gate_proj: scales are torch.int32": tensor(f"{GATE}.scales", lambda t: t.int()),
    "it lacks model.norm.weight": tensor("model.norm.weight", lambda t: None),
    r"model.norm.weight is torch.float32 \(31,\), where": tensor("model.norm.weight", lambda t: t[:31]),
    "model.norm.weight is torch.float16": tensor("model.norm.weight", lambda t: t.half()),
    "it has tensors that the model has not, such as odd": tensor("odd", lambda _: torch.ones(1)),
    "too small for the .* of the model's configuration": config(intermediate_size=10**12),
    "embed_tokens.weight is .* too small": config(vocab_size=10**12),
    "layers, of which its .* tensors cannot be": config(num_hidden_layers=10**12),
    "has no model.layers.2.mlp.gate_proj": config(num_hidden_layers=2),
    "data has 88 rows; the model's configuration gives 64": config(intermediate_size=64),
}


@pytest.mark.parametrize("sentence", LIES)
def test_lies(sentence, file):
    tensors, metadata = content(file)
    LIES[sentence](tensors, metadata)
    save_file(tensors, file, metadata)
    with pytest.raises(ValueError, match=sentence) as caught:
        cats.load_quantized(file)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_any_other_safetensors_file(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a quantised model of CATS"):
        cats.load_quantized(tmp_path / "other.safetensors")


MEMORY = """
import gc, re, sys, torch, transformers
import cats
from cats.models import load_model
from cats.skeleton import empty_model, fill

def status(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def start():
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    return status("VmRSS")

def config(**sizes):
    return transformers.LlamaConfig(num_attention_heads=8, vocab_size=256, tie_word_embeddings=False, **sizes)

@torch.no_grad()
def run(model):
    for length in (1, 40):
        model(torch.zeros(1, length, dtype=torch.long))

def growth(name, make):
    before = start()
    model = make()
    run(model)
    peak = status("VmHWM") - before
    print(name, peak / sum(t.numel() * t.element_size() for t in model.state_dict().values()))

folder, torch_threads = sys.argv[1], torch.set_num_threads(1)
if sys.argv[2] == "make":
    sizes = config(hidden_size=1024, intermediate_size=8192, num_hidden_layers=14)
    model = empty_model(sizes, torch.bfloat16)
    value = lambda name, held: torch.full(held.shape, 0.01, dtype=held.dtype)
    fill(model, value, model.state_dict().keys(), torch.device("cpu"))
    model.eval().save_pretrained(folder)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    warm = empty_model(config(hidden_size=32, intermediate_size=64, num_hidden_layers=1), torch.bfloat16)
    fill(warm, value, warm.state_dict().keys(), torch.device("cpu"))
    cats.quantize(warm, 8)
    before = start()
    cats.quantize(model, 8)
    print("quantise", (status("VmHWM") - before) / size)
    cats.save_quantized(model, folder + "/quantised")
else:
    warm = transformers.AutoModelForCausalLM.from_config(
        config(hidden_size=32, intermediate_size=64, num_hidden_layers=1), dtype=torch.bfloat16
    ).eval()
    cats.quantize(warm, 8)
    run(warm)  # loads the kernels and what torch needs for products
    if sys.argv[2] == "load":
        growth("load", lambda: cats.load_quantized(folder + "/quantised"))
    else:
        from cats.models.pretrained import _load_quantized  # the tokenizer is not there
        from cats.models.loader import Request
        growth("stream", lambda: _load_quantized(folder, Request(bits=8)))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory(tmp_path):
    """Quantising takes at most 10 % of the weights more than they are; loading and running, from a file of the
    quantised model and from one of the unquantised model, 10 % more than the quantised weights."""

    def growth(what: str) -> dict[str, float]:
        command = [sys.executable, "-c", MEMORY, str(tmp_path), what]
        # a 7B model's matrices are always mapped one by one, and given back so; these are smaller
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**22)}
        made = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        lines = made.stdout.splitlines()
        return {line.split()[0]: float(line.split()[1]) for line in lines}

    assert growth("make")["quantise"] < 0.10
    # each in a process of its own: what the allocator keeps of the first would not be counted as growth of the second;
    # the least of two, since other things (pages of 2 MB, say) only add to a process's memory
    for what in ("load", "stream"):
        grown = growth(what)[what]
        if not grown < 1.10:
            grown = growth(what)[what]
        assert 0.9 < grown < 1.10, (what, grown)
