"""`python -m cats`: what each command prints and writes on a tiny local model, and what it says to bad input."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cats
import cats.__main__ as command_line
import cats.criteria
from cats.__main__ import Clock, main
from cats.command_inputs import sample_text, token_batches
from cats.structure import resolve_device

from .hub_content import save_model

TEXT = "The quick brown fox jumps over the lazy dog, said the printer to the typesetter. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("a model"), "Llama"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "some text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture(scope="module")
def thresholds(model: str, text: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("made") / "thresholds.json")
    words = ["calibrate", model, "--text", text, "--tokens", "600", "--sparsity", "0.6", "--output", path]
    assert main(words) == 0
    return path


def test_calibrate_finds_the_quantile_of_the_text(model: str, thresholds: str) -> None:
    made = cats.Thresholds.load(thresholds)
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :600]
    seen = []
    loaded.model.layers[0].mlp.gate_proj.register_forward_hook(lambda _m, _a, gate: seen.append(gate.flatten()))
    with torch.no_grad():
        for block in ids.split(128, dim=1):  # the model reads 128 positions at most
            loaded(block)
    values = torch.nn.functional.silu(torch.cat(seen).double()).abs()
    assert made.tokens == 600 and made.sparsity == 0.6
    expected = torch.quantile(values, 0.6).item()
    assert made.gate["model.layers.0.mlp"] == pytest.approx(expected, rel=2e-3)


def test_calibrate_layer_by_layer(model: str, thresholds: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / "sequential.json"
    words = ["calibrate", model, "--text", text, "--tokens", "600", "--sparsity", "0.6", "--sequential"]
    assert main([*words, "--output", str(path)]) == 0
    first = "model.layers.0.mlp"
    made, plain = cats.Thresholds.load(path), cats.Thresholds.load(thresholds)
    assert made.sequential and made.gate[first] == pytest.approx(plain.gate[first], rel=1e-3)  # nothing is before it


def test_sparsity_prints_every_layer_and_their_mean(model: str, thresholds: str, text: str, capsys) -> None:
    assert main(["sparsity", model, "--thresholds", thresholds, "--text", text, "--tokens", "600"]) == 0
    *layers, mean = capsys.readouterr().out.splitlines()
    values = [float(line.split()[1]) for line in layers]
    assert [line.split()[0] for line in layers] == [f"model.layers.{i}.mlp" for i in range(3)]
    assert all(abs(value - 0.6) < 0.002 for value in values)  # the text it was calibrated on
    assert float(mean.split()[4]) == pytest.approx(sum(values) / 3, abs=1e-4) and "target 0.6" in mean


def test_levels_of_layers_are_shown_beside_what_is_skipped(
    model: str, thresholds: str, text: str, tmp_path, capsys
) -> None:
    path = tmp_path / "own.json"
    levels = {f"model.layers.{i}.mlp": level for i, level in enumerate((0.4, 0.5, 0.6))}
    replace(cats.Thresholds.load(thresholds), levels=levels).save(path)
    assert main(["sparsity", model, "--thresholds", str(path), "--text", text, "--tokens", "600"]) == 0
    *layers, _mean = capsys.readouterr().out.splitlines()
    for line, (name, level) in zip(layers, levels.items(), strict=True):
        assert line.startswith(name) and line.endswith(f"(target {level:.4f})")


def test_generate_is_the_sparse_model(model: str, thresholds: str, capsys) -> None:
    assert main(["generate", model, "--thresholds", thresholds, "--new-tokens", "12", "The quick"]) == 0
    printed = capsys.readouterr().out
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    made = cats.Thresholds.load(thresholds)
    for name, mlp in cats.gated_mlps(loaded).items():
        inner = torch.nn.functional.silu

        def activation(x, inner=inner, t=made.gate[name]):
            return inner(x) * (inner(x).abs() >= t)

        mlp.act_fn.forward = activation
    ids = tokenizer("The quick", return_tensors="pt")["input_ids"]
    for _ in range(12):  # greedy, written out
        with torch.no_grad():
            ids = torch.cat([ids, loaded(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    assert printed == tokenizer.decode(ids[0], skip_special_tokens=True) + "\n"


def test_generate_takes_the_prompt_as_an_option_and_any_loop(model: str, thresholds: str, capsys) -> None:
    words = ["generate", model, "--thresholds", thresholds]
    assert main([*words, "--new-tokens", "9", "--", "- The quick"]) == 0
    expected = capsys.readouterr().out
    for loop in ("eager", "captured", "transformers"):
        assert main([*words, "--prompt", "- The quick", "--max-new-tokens", "9", "--loop", loop]) == 0
        assert capsys.readouterr().out == expected
    assert main([*words, "--prompt=- The quick", "--new-tokens", "9"]) == 0  # argparse would take all of it as text
    assert capsys.readouterr().out == expected
    drawing = ["--temperature", "1.5", "--top-k", "30", "--top-p", "0.95", "--new-tokens", "9"]
    drawn = []
    for loop in ("eager", "transformers"):
        assert main([*words, *drawing, "--loop", loop, "The quick"]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1]


def test_bench_prints_both_speeds_and_their_ratio(model: str, thresholds: str, capsys) -> None:
    words = ["bench", model, "--thresholds", thresholds, "--rounds", "2", "--new-tokens", "4", "--kernel", "reference"]
    assert main(words) == 0
    dense, sparse, ratio = capsys.readouterr().out.splitlines()
    assert dense.startswith("dense") and sparse.startswith("cats") and "in 2 rounds" in ratio
    assert float(dense.split()[1]) > 0 and float(sparse.split()[1]) > 0 and "skipping" in ratio


def test_bench_takes_a_shape_with_random_weights(capsys) -> None:
    words = ["bench", "shape:small", "--rounds", "1", "--new-tokens", "2", "--kernel", "reference"]
    assert main([*words, "--dtype", "float32"]) == 0
    assert "cats / dense" in capsys.readouterr().out


def test_bench_takes_the_first_layers_alone(model: str, thresholds: str, capsys) -> None:
    assert main(["bench", model, "--thresholds", thresholds, "--layers", "1"]) == 2
    assert "this one is {" in (error := capsys.readouterr().err) and "'num_hidden_layers': 1}" in error
    words = ["bench", "shape:small", "--layers", "1", "--rounds", "1", "--new-tokens", "2", "--kernel", "reference"]
    assert main(words) == 0
    *_, ratio, layers = capsys.readouterr().out.splitlines()
    assert ratio.startswith("cats / dense") and layers.startswith("layers  1 alone:")


def test_bench_says_what_is_skipped_in_what_it_has_generated(model: str, capsys, monkeypatch) -> None:
    """By construction it is the target on the text that the thresholds are from."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(cats, "measure_sparsity", lambda _model, batches: seen.extend(batches) or {})
    monkeypatch.setattr(command_line, "overall_sparsity", lambda *_arguments: 0.25)
    assert main(["bench", model, "--rounds", "1", "--new-tokens", "4", "--kernel", "reference"]) == 0
    assert [ids.shape for ids in seen] == [(1, 32 + 4)] and "skipping 25.0% of" in capsys.readouterr().out


def test_rate_counts_from_first_to_last_token() -> None:
    clock = Clock()
    clock.times = [0.0, 5.0, 5.5, 6.0, 7.0]  # the prompt, then four tokens
    assert clock.tokens_per_second() == 1.5


def test_default_text_is_prose_and_its_halves_differ(model: str) -> None:
    calibration, heldout = sample_text(None, heldout=False), sample_text(None, heldout=True)
    assert min(len(calibration), len(heldout)) > 100_000
    assert not set(calibration.split("\n\n")) & set(heldout.split("\n\n"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    blocks = token_batches(loaded, tokenizer, calibration, 300)
    assert [block.shape for block in blocks] == [(1, 128), (1, 128), (1, 44)]


BAD = {
    "no such model": (["calibrate", "./nowhere"], "./nowhere does not exist"),
    "no tokenizer": (["calibrate", "shape:small"], "random weights and no tokenizer"),
    "unknown shape": (["bench", "shape:tiny"], "unknown shape 'shape:tiny'"),
    "a file instead of a model": (["calibrate", "TEXT"], "is a file: give the directory"),
    "a device without numbers": (["bench", "MODEL", "--device", "meta"], "unknown device 'meta'"),
    "output is a folder": (["calibrate", "MODEL", "--text", "TEXT", "--output", "FOLDER"], "cannot be written"),
    "output below a file": (["calibrate", "MODEL", "--output", "EMPTY/X.JSON"], "empty is a file and not a folder"),
    "output is a device": (
        ["calibrate", "MODEL", "--output", "/dev/null"],
        "cannot be written: it is a device",
    ),
    "unknown criterion": (
        ["calibrate", "MODEL", "--criterion", "best"],
        "unknown criterion 'best': allowed are auto, cats",
    ),
    "unknown criterion of bench": (["bench", "MODEL", "--criterion", "best"], "unknown criterion 'best'"),
    "text is a folder": (["calibrate", "MODEL", "--text", "FOLDER"], "cannot be read: Is a directory"),
    "thresholds are a folder": (["sparsity", "MODEL", "--thresholds", "FOLDER"], "it is not a regular file"),
    "seed too large": (["generate", "MODEL", "x", "--seed", "9" * 30], "--seed must be a whole number from 0 to 2^63"),
    "negative temperature": (["generate", "MODEL", "x", "--temperature", "-1"], "--temperature must be 0 or more"),
    "unknown device": (["bench", "MODEL", "--device", "tpu9"], "unknown device 'tpu9'"),
    "sparsity of 1": (["calibrate", "MODEL", "--text", "TEXT", "--sparsity", "1"], "[0, 1)"),
    "no thresholds": (["sparsity", "MODEL"], "--thresholds FILE is needed"),
    "thresholds are not JSON": (["sparsity", "MODEL", "--thresholds", "TEXT"], "not a CATS thresholds file"),
    "missing file": (["sparsity", "MODEL", "--thresholds", "none.json"], "none.json"),
    "thresholds that are not there": (
        ["generate", "MODEL", "x", "--thresholds", "no.json"],
        "no.json does not exist: give",
    ),
    "a file of weights": (["generate", "WEIGHTS", "x"], "is a file of weights: give the directory"),
    "empty text": (["calibrate", "MODEL", "--text", "EMPTY"], "the text is empty"),
    "binary text": (["calibrate", "MODEL", "--text", "BINARY"], "not UTF-8"),
    "no tokens": (["calibrate", "MODEL", "--text", "TEXT", "--tokens", "0"], "--tokens must be positive"),
    "no new tokens": (["generate", "MODEL", "--new-tokens", "0", "x"], "--new-tokens must be positive"),
    "no layers": (["bench", "MODEL", "--layers", "0"], "--layers must be positive, not 0"),
    "empty prompt": (["generate", "MODEL", ""], "the prompt has no tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_status_2(case: str, model: str, text: str, tmp_path: Path, capsys) -> None:
    words, expected = BAD[case]
    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    places = {name.upper(): str(tmp_path / name) for name in ("empty", "empty/x.json", "binary")}
    places |= {"MODEL": model, "WEIGHTS": f"{model}/model.safetensors", "TEXT": text, "FOLDER": str(tmp_path)}
    assert main([places.get(word, word) for word in words]) == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert not printed.out and len(errors) == 1 and expected in errors[0]


def test_thresholds_of_another_model_are_refused(model: str, thresholds: str, tmp_path: Path, capsys) -> None:
    other = save_model(tmp_path, "Mistral")
    assert main(["generate", str(other), "--thresholds", thresholds, "x"]) == 2
    assert "made for another model" in capsys.readouterr().err


def test_weights_that_do_not_fit_their_config_are_named(tmp_path: Path, capsys) -> None:
    folder = save_model(tmp_path, "Llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * config["intermediate_size"]}))
    assert main(["bench", str(folder)]) == 2
    assert "has weights of other shapes than its config.json gives" in capsys.readouterr().err


@pytest.mark.parametrize("count, seen", [(0, "no CUDA device"), (1, "only cuda:0"), (4, "only cuda:0 to cuda:3")])
def test_devices(count: int, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert resolve_device("auto") == ("cuda" if count else "cpu") and resolve_device("cpu") == "cpu"
    assert resolve_device("sharded", "sharded") == "sharded"
    for name in ("cuda", *(f"cuda:{index}" for index in range(count))) if count else ():
        assert resolve_device(name) == name
    for name in (f"cuda:{count}", "cuda:17"):
        with pytest.raises(ValueError, match=f"device '{name}' was asked for, but torch .* sees {seen} here"):
            resolve_device(name)
    with pytest.raises(ValueError, match=r"unknown device 'sharded': allowed are auto, cpu, cuda, cuda:N$"):
        resolve_device("sharded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_gpu_is_named(model: str, capsys) -> None:
    assert main(["bench", model, "--device", "cuda"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_memory_that_runs_out_is_named(model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("cats.command_inputs.load_model", full)
    assert main(["bench", model]) == 2
    assert "does not fit into the GPU's memory" in capsys.readouterr().err


def test_module_runs_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "cats", "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("calibrate", "sparsity", "generate", "bench"))


@pytest.mark.parametrize("criterion", ["chess", "up-norm", "teal"])
def test_every_criterion_goes_through_the_commands(criterion: str, model: str, text: str, tmp_path, capsys) -> None:
    path = str(tmp_path / "made" / "t.json")
    words = ["--text", text, "--tokens", "600"]
    assert main(["calibrate", model, *words, "--criterion", criterion, "--output", path]) == 0
    label = cats.criteria.label(criterion, 0.5)
    count = 9 if criterion == "teal" else 3
    assert capsys.readouterr().out.startswith(f"{label}: {count} thresholds from 600 tokens")
    assert main(["sparsity", model, *words, "--thresholds", path, "--kernel", "reference"]) == 0
    *layers, mean = capsys.readouterr().out.splitlines()
    assert len(layers) == count and f"(target 0.5, {label})" in mean and abs(float(mean.split()[4]) - 0.5) < 0.01
    options = ["--thresholds", path, "--kernel", "reference", "--prefill", "dense", "--new-tokens", "3"]
    assert main(["generate", model, *options, "The quick"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


def test_a_link_is_written_through_and_a_fifo_is_not_replaced(model: str, text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "fifo")
    words = ["calibrate", model, "--text", text, "--tokens", "600", "--output"]
    assert main([*words, str(tmp_path / "link.json")]) == 0
    assert (tmp_path / "link.json").is_symlink() and cats.Thresholds.load(tmp_path / "real.json").tokens == 600
    assert main([*words, str(tmp_path / "fifo")]) == 2
    assert "fifo cannot be written: it is a device, a FIFO or a socket" in capsys.readouterr().err
    assert stat.S_ISFIFO((tmp_path / "fifo").stat().st_mode)


def test_a_handful_of_tokens_a_dense_model_and_too_many_positions_are_said(model, text, tmp_path, capsys) -> None:
    path = str(tmp_path / "t.json")
    assert main(["calibrate", model, "--text", text, "--tokens", "20", "--output", path]) == 0
    assert "warning: these thresholds come from 20 tokens only" in capsys.readouterr().err
    assert main(["generate", model, "--thresholds", path, "--new-tokens", "3", "The quick"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main(["generate", model, "--new-tokens", "200", "The quick"]) == 0
    shown = capsys.readouterr().err
    assert "warning: no --thresholds: this is the dense model" in shown
    assert "go beyond the 128 positions of this model" in shown


@pytest.mark.parametrize(("words", "form"), [(["--bits", "4", "--group-size", "32"], (4, 32)), (["--bits", "8"], (8,))])
def test_thresholds_are_those_of_the_quantised_model(words, form, model: str, text: str, tmp_path, capsys) -> None:
    path, common = str(tmp_path / "t.json"), [*words, "--dtype", "float32"]
    assert main(["calibrate", model, *common, "--text", text, "--tokens", "600", "--output", path]) == 0
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        AutoTokenizer.from_pretrained(model),
    )
    cats.quantize(loaded, *form)
    batches = token_batches(loaded, tokenizer, TEXT, 600)
    assert cats.Thresholds.load(path).gate == cats.calibrate(loaded, batches, 0.5).gate
    capsys.readouterr()
    assert main(["sparsity", model, *common, "--thresholds", path, "--text", text, "--tokens", "600"]) == 0
    assert abs(float(capsys.readouterr().out.splitlines()[-1].split()[4]) - 0.5) < 0.01
    assert main(["generate", model, *common, "--thresholds", path, "--new-tokens", "3", "The quick"]) == 0
    assert capsys.readouterr().out.startswith("The quick")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--group-size", "32"], "--group-size is for quantised weights: give --bits 8 or --bits 4 too"),
        (["--bits", "4", "--group-size", "row"], "--group-size row is for --bits 8"),
        (["--packed"], "has no quantised weights to keep packed"),
        (["--packed", "--bits", "8"], "give one of them"),
    ],
)
def test_wrong_formats_are_said(words, says: str, model: str, capsys) -> None:
    assert main(["bench", model, *words]) == 2
    shown = capsys.readouterr().err
    assert says in shown and shown.count("\n") == 1


@pytest.mark.parametrize("command", [["calibrate"], ["sparsity", "--thresholds", "THRESHOLDS"]])
@pytest.mark.parametrize("wrong", [["--text", "none.txt"], ["--tokens", "0"]])
def test_wrong_text_is_said_before_the_model_is_loaded(command, wrong, model, thresholds, monkeypatch, capsys) -> None:
    monkeypatch.setattr("cats.command_inputs.load_model", lambda *_: pytest.fail("loaded"))
    name, *rest = (thresholds if word == "THRESHOLDS" else word for word in command)
    assert main([name, model, *rest, *wrong]) == 2
    assert f"error: {wrong[0]}" in capsys.readouterr().err


@pytest.mark.parametrize(("criterion", "passes"), [("cats", 5), ("up-norm", 10), ("auto", 6)])
def test_the_bar_counts_forward_passes(criterion: str, passes: int, model: str, text: str, tmp_path, capsys) -> None:
    words = ["--text", text, "--tokens", "600", "--output", str(tmp_path / "t.json")]
    assert main(["calibrate", model, *words, "--criterion", criterion]) == 0
    assert f" {passes}/{passes} " in capsys.readouterr().err
    assert main(["calibrate", model, *words, "--criterion", criterion, "--sequential"]) == 0
    assert f" {passes + 5}/{passes + 5} " in capsys.readouterr().err


def test_thresholds_that_need_no_text_name_none(model: str, tmp_path: Path, capsys) -> None:
    assert main(["calibrate", model, "--criterion", "relufication", "--output", str(tmp_path / "t.json")]) == 0
    said = capsys.readouterr().out
    assert "thresholds that no text decides: " in said and "0 tokens" not in said
