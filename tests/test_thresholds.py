"""Thresholds files: formats 1 and 2, exact vectors, and one sentence about whatever else a file may hold."""

import copy
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch

import cats
from cats import thresholds as module

from .conftest import tiny_model

FORMAT_1 = """{
  "format": "cats-thresholds-1",
  "sparsity": 0.5,
  "gate": {"model.layers.0.mlp": 0.125, "model.layers.1.mlp": 0.25},
  "attention_input": {"model.layers.0.self_attn": 0.0625},
  "mlp_input": {},
  "model": {"model_type": "llama", "hidden_size": 32},
  "tokens": 768
}
"""


@pytest.fixture
def vectors() -> cats.Thresholds:
    generator = torch.Generator().manual_seed(0)
    layers = {f"model.layers.{i}.mlp": torch.rand(88, generator=generator) ** 9 for i in range(3)}
    layers["model.layers.1.mlp"][4] = math.inf
    return cats.Thresholds(0.3, up=layers, mlp_input={"x": 0.1}, model={"model_type": "llama"}, criterion="up-norm")


def test_format_1_is_read(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text(FORMAT_1)
    loaded = cats.Thresholds.load(tmp_path / "old.json")
    gate = {"model.layers.0.mlp": 0.125, "model.layers.1.mlp": 0.25}
    model = {"model_type": "llama", "hidden_size": 32}
    assert loaded == cats.Thresholds(0.5, gate, {"model.layers.0.self_attn": 0.0625}, {}, model, 768)
    assert (loaded.criterion, loaded.decider) == ("cats", "gate") and loaded.gate == gate
    loaded.save(tmp_path / "new.json")
    assert json.loads((tmp_path / "new.json").read_text())["format"] == "cats-thresholds-2"
    assert cats.Thresholds.load(tmp_path / "new.json") == loaded


def test_format_2_keeps_vectors_to_the_bit(tmp_path: Path, vectors: cats.Thresholds) -> None:
    vectors.save(tmp_path / "t.json")
    loaded = cats.Thresholds.load(tmp_path / "t.json")
    assert loaded == vectors and loaded.decider == "up" and list(loaded.sites) == ["up", "mlp_input"]
    for name, vector in vectors.up.items():
        assert loaded.up[name].dtype == torch.float32 and torch.equal(loaded.up[name], vector)
    data = json.loads((tmp_path / "t.json").read_text())
    assert set(data) == {"format", "criterion", "sparsity", "decider", "model", "tokens", "sites"}
    assert (tmp_path / "t.json").stat().st_size < 3 * 88 * 6 + 600


def test_equal_means_the_same_numbers(vectors: cats.Thresholds) -> None:
    for twin in (copy.deepcopy(vectors), pickle.loads(pickle.dumps(vectors))):
        assert twin == vectors
        twin.up["model.layers.2.mlp"][0] += 1
        assert twin != vectors
    assert vectors != cats.Thresholds(0.3, criterion="up-norm") and vectors != "thresholds"


def test_values_are_normalised() -> None:
    thresholds = cats.Thresholds(0.5, {"a": torch.tensor(0.25), "b": torch.ones(3, dtype=torch.bfloat16), "c": 1})
    assert thresholds.gate["a"] == 0.25 and isinstance(thresholds.gate["a"], float)
    assert thresholds.gate["b"].dtype == torch.float32 and thresholds.gate["c"] == 1.0
    with pytest.raises(ValueError, match="gate and up cannot both have thresholds"):
        cats.Thresholds(0.5, {"a": 1.0}, up={"a": 1.0})


NUMBER = r"gate\['a'\] must be a finite number of at least 0"
BAD_VALUES = {
    "text": ("0.5", NUMBER),
    "null": (None, NUMBER),
    "bool": (True, NUMBER),
    "negative": (-1, NUMBER),
    "too large": (1e39, NUMBER),
    "far too large": (10**400, NUMBER),
    "a list": ([0.5], NUMBER),
    "not base64": ({"float32": "!!"}, r"gate\['a'\]\.float32 is not base64"),
    "not text": ({"float32": 3}, r'must be a number or \{"float32": base64\}, not'),
    "another key": ({"float64": "AAAA"}, r'must be a number or \{"float32": base64\}, not'),
    "cut": ({"float32": "AAAA"}, "float32 has 3 bytes"),
    "empty": ({"float32": ""}, "float32 has 0 bytes"),
    "NaN in a vector": ({"float32": "AADAfw=="}, "it has NaN or a negative number"),
    "negative in a vector": ({"float32": "AACAvw=="}, "it has NaN or a negative number"),
}
BAD_FILES = {
    "another format": ({"format": "other"}, 'its "format" is neither "cats-thresholds-2" nor "cats-thresholds-1"'),
    "no format": ({"format": None}, 'its "format" is neither'),
    "sparsity": ({"sparsity": 1.5}, r"sparsity must be a number in \[0, 1\), not 1.5"),
    "sparsity as text": ({"sparsity": "half"}, r"sparsity must be a number in \[0, 1\), not 'half'"),
    "sparsity as bool": ({"sparsity": False}, r"sparsity must be a number in \[0, 1\), not False"),
    "criterion": ({"criterion": 3}, "criterion must be the name of a criterion, not 3"),
    "decider": ({"decider": "up"}, "decider is 'up', but its sites say 'gate'"),
    "tokens": ({"tokens": "many"}, "tokens must be a whole number from 0 to 2\\^63, not 'many'"),
    "absurd tokens": ({"tokens": 10**30}, "tokens must be a whole number"),
    "model": ({"model": "x"}, "model must be a mapping of what the thresholds were made for, not 'x'"),
    "unknown key": ({"extra": 1}, "unknown key 'extra': allowed are criterion, sparsity, decider"),
    "sites": ({"sites": [1]}, r"sites must map sites to thresholds, not be \[1\]"),
    "unknown site": ({"sites": {"down": {}}}, r"unknown key 'sites\.down': allowed are gate, up"),
    "site": ({"sites": {"gate": 3}}, "gate must map module paths to thresholds, not be a int"),
}


@pytest.mark.parametrize("case", [*BAD_VALUES, *BAD_FILES])
def test_bad_contents_are_one_sentence(tmp_path: Path, case: str) -> None:
    good = {"format": "cats-thresholds-2", "criterion": "cats", "sparsity": 0.5, "decider": "gate"}
    good["sites"] = {"gate": {"a": 0.5}}
    if case in BAD_VALUES:
        value, message = BAD_VALUES[case]
        good["sites"]["gate"]["a"] = value
    else:
        change, message = BAD_FILES[case]
        good |= change
    path = tmp_path / "t.json"
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=message) as error:
        cats.Thresholds.load(path)
    text = str(error.value)
    assert text.startswith(f"{path} is not a CATS thresholds file: ") and "\n" not in text and len(text) < 400


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "Expecting value"),
        ("[]", 'its "format"'),
        ('{"format": "cats-thresholds-2", "criterion": "cats", "sites": {}}', "the key 'sparsity' is missing"),
        ('{"format": "cats-thresholds-1", "sparsity": 0.5, "gate": {"a": NaN}}', "it holds NaN"),
        ('{"format": "cats-thresholds-1", "sparsity": 0.5, "gate": {"a": Infinity}}', "it holds Infinity"),
        ('{"format": "cats-thresholds-1", "sparsity": 0.5, "up": {}}', "unknown key 'up'"),
        ('{"format": "cats-thresholds-1", "sparsity": ' + "9" * 5000 + "}", "limit"),
        ("[" * 200_000, "nested too deeply"),
        ('{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_bad_text_is_one_sentence(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(ValueError, match=f"is not a CATS thresholds file: .*{message}") as error:
        cats.Thresholds.load(tmp_path / "t.json")
    assert "\n" not in str(error.value)


def test_what_is_no_file_of_a_sensible_size_is_not_read(tmp_path: Path, monkeypatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", tmp_path / "fifo", tmp_path):
        with pytest.raises(ValueError, match="it is not a regular file"):
            cats.Thresholds.load(path)
    monkeypatch.setattr(module, "LARGEST_FILE", 100)
    (tmp_path / "t.json").write_text(FORMAT_1)
    with pytest.raises(ValueError, match="bytes, where thresholds have at most 100"):
        cats.Thresholds.load(tmp_path / "t.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a CATS thresholds file"):
        cats.Thresholds.load(tmp_path / "binary")
    with pytest.raises(FileNotFoundError):
        cats.Thresholds.load(tmp_path / "none")


def test_a_key_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    # json keeps the last one without a word
    for line in ('"model.layers.0.mlp": 0.125', '"tokens": 768'):
        path = tmp_path / "t.json"
        path.write_text(FORMAT_1.replace(line, f"{line}, {line}"))
        key = line.split('"')[1]
        with pytest.raises(ValueError, match=rf"not a CATS thresholds file: the key '{key}' is there twice"):
            cats.Thresholds.load(path)


def test_levels_are_of_layers_that_the_model_has(tmp_path: Path) -> None:
    model = tiny_model()
    gate = dict.fromkeys(cats.gated_mlps(model), 0.1)
    cats.apply(model, cats.Thresholds(0.5, gate, levels={"model.layers.0.mlp": 0.4}))
    with pytest.raises(ValueError, match=r"it lacks model\.layer\.0\.mlp"):
        cats.apply(model, cats.Thresholds(0.5, gate, levels={"model.layer.0.mlp": 0.4}))


def test_levels_are_in_the_file_where_they_differ_alone(tmp_path: Path) -> None:
    levels = {"model.layers.0.mlp": 0.4, "model.layers.1.mlp": 0.6}
    own = cats.Thresholds(0.5, dict.fromkeys(levels, 1.0), levels=levels)
    own.save(tmp_path / "own.json")
    loaded = cats.Thresholds.load(tmp_path / "own.json")
    assert loaded == own and loaded.levels == levels and loaded != cats.Thresholds(0.5, dict.fromkeys(levels, 1.0))
    assert [loaded.level_of(path) for path in (*levels, "another")] == [0.4, 0.6, 0.5]
    data = json.loads((tmp_path / "own.json").read_text())
    data["levels"]["model.layers.0.mlp"] = 1.0
    (tmp_path / "own.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"levels\['model.layers.0.mlp'\]: sparsity must be a number in \[0, 1\)"):
        cats.Thresholds.load(tmp_path / "own.json")
    with pytest.raises(ValueError, match="levels must map module paths to sparsities, not be a list"):
        cats.Thresholds(0.5, {"a": 1.0}, levels=[0.5])  # type: ignore[arg-type]
    cats.Thresholds(0.5, {"a": 1.0}).save(tmp_path / "plain.json")
    assert "levels" not in json.loads((tmp_path / "plain.json").read_text())
