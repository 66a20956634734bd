"""The table of loaders, names that none of them takes, and what identifies a model."""

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cats.models
from cats.models import identity, load_config, load_model, load_tokenizer, loaders, pocket_path, resolve
from cats.models.identity import file_hash

from .conftest import tiny_model

MADE_UP = """
from transformers import LlamaConfig
from cats.models.loader import Loader, Origin

class DreamLoader(Loader):
    order = 5
    example = "dream:NAME"
    def claims(self, spec):
        return spec.startswith("dream:")
    def config(self, spec, layers=None):
        return LlamaConfig(num_hidden_layers=layers or 7)
    def load(self, spec, request):
        return ("model", request.device, request.layers), "tokenizer"
    def tokenizer(self, spec):
        return "tokenizer"
    def origin(self, spec):
        return Origin("a dream", notes={"seen": spec})

LOADER = DreamLoader()
"""


def test_a_loader_is_one_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "from_dreams.py").write_text(MADE_UP)
    with pytest.raises(ValueError, match="does not exist"):
        load_config("./dream:a")
    monkeypatch.setattr(cats.models, "__path__", [*cats.models.__path__, str(tmp_path)])
    assert load_config("dream:a", layers=3).num_hidden_layers == 3 and resolve("dream:a") == "dream:a"
    assert load_model("dream:a", device="cuda:1", layers=2) == (("model", "cuda:1", 2), "tokenizer")
    assert load_tokenizer("dream:a") == "tokenizer"
    assert identity("dream:a")["kind"] == "a dream" and identity("dream:a")["seen"] == "dream:a"
    with pytest.raises(ValueError, match=r"does not exist: give pocket, dream:NAME, "):
        resolve("/nowhere/at/all")


def test_every_loader_has_a_place_and_a_file() -> None:
    orders = [loader.order for loader in loaders()]
    assert orders == sorted(set(orders)) and len(orders) == len(list(Path(cats.models.__path__[0]).glob("from_*.py")))


@pytest.mark.parametrize("spec", ["./absent", "/absent", "~/absent", "a/b/c", "../absent"])
def test_a_path_that_does_not_exist_is_one_sentence(spec: str) -> None:
    examples = [loader.example for loader in loaders()]
    assert {"pocket", "shape:NAME", "a GGUF file", "a model directory", "a hub id (owner/name)"} <= set(examples)
    with pytest.raises(ValueError, match=re.escape(f"{spec} does not exist: give {', '.join(examples)}")):
        load_model(spec)


@pytest.mark.parametrize("spec", [None, Path("/somewhere")])
def test_a_name_that_is_no_string_is_one_sentence(spec: object) -> None:
    with pytest.raises(TypeError, match=rf"named by a string, not a {type(spec).__name__}: of a path give str\(path\)"):
        load_model(spec)  # type: ignore[arg-type]


def test_a_file_or_a_directory_without_a_model_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="is a file: give the directory that save_pretrained wrote, or a GGUF file"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(ValueError, match=r"is a directory without config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(ValueError, match="unknown shape 'shape:huge': allowed are shape:mistral-7b"):
        load_config("shape:huge")
    with pytest.raises(ValueError, match="unknown dtype 'int3'"):
        load_model("pocket", dtype="int3")
    with pytest.raises(ValueError, match="unknown dtype 'float64'"):
        load_model("pocket", dtype=torch.float64)
    assert load_model("pocket", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_identity_has_the_hashes_of_every_file(tmp_path: Path) -> None:
    model = tiny_model("Llama", vocab_size=2000)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    known = identity(str(tmp_path))
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and known["kind"] == "directory" and known["revision"] is None
    assert known["weights"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shards}
    assert "config.json" in known["config"] and known["tokenizer"] == {}
    pocket = identity("pocket")
    assert pocket["kind"] == "shipped with the package" and "tokenizer.json" in pocket["tokenizer"]
    assert pocket["config"]["config.json"] == file_hash(pocket_path() / "config.json")
    random = identity("shape:small")
    assert random["kind"] == "random weights" and not random["weights"]


def test_a_file_is_hashed_again_only_when_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    calls = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: calls.append(1) or original(*args))
    first = file_hash(path)
    assert file_hash(path) == first and len(calls) == 1
    path.write_bytes(b"b" * 1001)
    assert file_hash(path) != first and len(calls) == 2


@pytest.mark.parametrize("spec, there", [("shape:small", 2), ("pocket", 5)])
@pytest.mark.parametrize("layers", [0, 6])
def test_layers_that_a_model_does_not_have_are_refused(spec: str, there: int, layers: int) -> None:
    """A shape would be made of as many as are asked for, and weights be called incomplete."""
    with pytest.raises(ValueError, match=f"{spec} has {there} decoder layers: its first {layers} cannot be taken"):
        load_model(spec, layers=layers)


def test_a_shape_keeps_its_seed_and_layers() -> None:
    (a, none), (b, _) = load_model("shape:small", layers=1, seed=3), load_model("shape:small", layers=1, seed=4)
    assert none is None and len(a.model.layers) == 1 and a.dtype == torch.bfloat16
    assert not torch.equal(a.lm_head.weight, b.lm_head.weight)


def test_random_weights_leave_the_generator_as_it_was() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, _ = load_model("shape:small", layers=1, seed=3)
    assert torch.equal(torch.rand(3), expected)
    again, _ = load_model("shape:small", layers=1, seed=3)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)


def test_the_example_says_in_one_sentence_what_does_not_exist(tmp_path: Path) -> None:
    example = Path(__file__).parents[1] / "examples/own_model.py"
    words = [sys.executable, str(example), str(tmp_path / "nowhere/model")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "does not exist: give" in last and "Traceback" not in done.stderr
