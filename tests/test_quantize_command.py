"""`cats quantize`, and what it writes as a model by name."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import cats
from cats.__main__ import main
from cats.models import identity, load_config, load_model, load_tokenizer
from tests.conftest import tiny_model
from tests.test_quantization import logits


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pocket model in int8."""
    folder = tmp_path_factory.mktemp("pocket") / "int8"
    assert main(["quantize", "pocket", "--bits", "8", "--group-size", "row", "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model without a tokenizer."""
    model = tiny_model()
    cats.quantize(model, 4, 32)
    cats.save_quantized(model, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def said(words: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def test_every_command_takes_the_directory(pocket: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made, directly = tmp_path / "made.json", tmp_path / "directly.json"
    quantised = ["--bits", "8", "--group-size", "row"]
    said(["calibrate", str(pocket), "--tokens", "1024", "--output", str(made)], capsys)
    said(["calibrate", "pocket", *quantised, "--tokens", "1024", "--output", str(directly)], capsys)
    assert made.read_text() == directly.read_text()
    generate = ["--thresholds", str(made), "--new-tokens", "8", "def read(self):"]
    assert said(["generate", str(pocket), *generate], capsys) == said(
        ["generate", "pocket", *quantised, *generate], capsys
    )
    assert "cats / dense" in said(["bench", str(pocket), "--new-tokens", "4", "--rounds", "1"], capsys)


def test_a_model_by_the_name_of_its_directory_or_file(pocket: Path, file: Path) -> None:
    model, tokenizer = load_model(str(pocket))
    expected, known = load_model("pocket", bits=8, group_size=None)
    assert torch.equal(logits(model), logits(expected))
    text = "def read(self, size=-1):\n    return None"
    assert tokenizer(text)["input_ids"] == known(text)["input_ids"]
    assert load_config(str(pocket)).num_hidden_layers == expected.config.num_hidden_layers
    origin = identity(str(pocket))
    assert origin["kind"] == "quantised by cats" and list(origin["weights"]) == ["quantized.safetensors"]
    assert "tokenizer.json" in origin["tokenizer"]
    alone, none = load_model(str(file), dtype="float32")
    assert none is None and load_tokenizer(str(file)) is None
    assert torch.equal(logits(alone), logits(cats.load_quantized(file)))


REFUSED = {
    "bits again": ({"bits": 8}, "is quantised already: leave bits out"),
    "packed": ({"packed": True}, "only GGUF files have"),
    "layers": ({"layers": 1}, "is quantised and is loaded whole"),
    "another dtype": ({"dtype": "float16"}, "was quantised as torch.float32: leave dtype out"),
    "sharded": ({"device": "sharded"}, "cannot be sharded"),
}


@pytest.mark.parametrize(("options", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_a_quantised_model_cannot_be_is_one_sentence(options: dict, sentence: str, file: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_model(str(file), **options)


def test_bad_input_is_one_sentence(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "in the way").write_text("")
    cases = {
        "to how many bits?": ["quantize", "pocket", *output],
        "is quantised already": ["quantize", str(file), "--bits", "4", *output],
        "has random weights and no tokenizer": ["quantize", "shape:small", "--bits", "4", *output],
        "model.safetensors has no tokenizer": ["generate", str(file), "def"],
        "is a file and not a folder": ["quantize", "pocket", "--bits", "8", "--output", str(tmp_path / "in the way")],
        "holds a model already (model.safetensors)": ["quantize", "pocket", "--bits", "8", "--output", str(tmp_path)],
    }
    for sentence, words in cases.items():
        assert main(words) == 2 and not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert sentence in error and len(error.strip().splitlines()) == 1


def test_a_damaged_file_is_one_sentence(pocket: Path, tmp_path: Path) -> None:
    whole = (pocket / "quantized.safetensors").read_bytes()
    (tmp_path / "quantized.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="is truncated or damaged"):
        load_model(str(tmp_path))
    with pytest.raises(OSError, match="is truncated or damaged"):
        load_config(str(tmp_path))
    (tmp_path / "alone.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="is truncated or damaged"):
        load_model(str(tmp_path / "alone.safetensors"))


def test_where_the_disk_is_full_there_is_no_half_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert main(["quantize", "pocket", "--bits", "8", "--output", str(tmp_path / "out")]) == 2
    assert f"{tmp_path / 'out'} cannot be written: No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "out" / "quantized.safetensors").exists()
