"""The pocket world: its corpus and split, its tokenizer, its pretraining and the shipped model."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cats.models import load_model, pocket_path
from experiments.pocket import corpus, pretrain


@pytest.fixture(scope="module")
def modules() -> list[corpus.Module]:
    return corpus.read_modules()


# --- corpus ---------------------------------------------------------------------------------------------------------


def test_split_is_by_family_and_the_same_for_every_python() -> None:
    # worked out once under Python 3.11, 3.12 and 3.13: names alone decide
    heldout = {"logging/__init__.py", "logging/config.py", "subprocess.py", "enum.py", "json/decoder.py", "ssl.py"}
    train = {"datetime.py", "_pydatetime.py", "typing.py", "argparse.py", "pathlib.py", "pathlib/_local.py", "ast.py"}
    assert {name for name in heldout | train if corpus.is_heldout(name)} == heldout
    for twins in (("datetime.py", "_pydatetime.py"), ("zipfile.py", "zipfile/_path/glob.py"), ("_pyio.py", "io.py")):
        assert len({corpus.family(name) for name in twins}) == 1
    assert corpus.family("sre_parse.py") == corpus.family("re/_parser.py") == "re"
    assert corpus.family("__future__.py") == "__future__"


def test_sides_are_disjoint_and_of_the_stated_size(modules: list[corpus.Module]) -> None:
    report = corpus.describe(modules)
    assert not {m.family for m in modules if m.heldout} & {m.family for m in modules if not m.heldout}
    assert 0.10 < report.bytes_heldout / (report.bytes_heldout + report.bytes_train) < 0.15
    assert report.modules_train + report.modules_heldout == len(modules) >= corpus.MINIMUM_MODULES
    assert f"{report.modules_heldout} held out" in str(report)
    train, heldout, same = corpus.load_corpus()
    assert same == report
    assert train.num_rows == report.modules_train
    assert sum(len(text.encode()) for text in heldout["text"]) == report.bytes_heldout


def test_tests_vendored_and_generated_files_are_left_out(modules: list[corpus.Module]) -> None:
    names = {module.name for module in modules}
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "_bundled", "pgen2", "topics.py", "cp1252.py"}
    assert not {"keyword.py", "token.py", "stringprep.py"} & names
    assert {"argparse.py", "json/decoder.py", "email/message.py"} <= names


def test_stripped_installation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 0 usable source modules .* stripped of its sources"):
        corpus.read_modules(tmp_path / "missing")
    (tmp_path / "os.py").write_text("import sys\n" * 100)
    (tmp_path / "os.pyc").write_bytes(b"\0" * 1000)
    with pytest.raises(ValueError, match="has 1 usable source modules and at least 300"):
        corpus.read_modules(tmp_path)


def test_unreadable_small_and_generated_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MINIMUM_MODULES", 1)
    code = "def double(x):\n    return 2 * x\n" * 20
    (tmp_path / "good.py").write_text(code)
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n" + code.encode())
    (tmp_path / "small.py").write_text("x = 1\n")
    (tmp_path / "table.py").write_text('"""Python codec generated from \'X.TXT\' with gencodec.py."""\n' + code)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_good.py").write_text(code)
    assert [module.name for module in corpus.read_modules(tmp_path)] == ["good.py"]


# --- model ----------------------------------------------------------------------------------------------------------


def test_shipped_model_is_small_and_predicts_heldout_code() -> None:
    files = {path.name: path.stat().st_size for path in pocket_path().iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"} <= set(files)
    assert sum(files.values()) <= 16e6
    model, tokenizer = load_model("pocket")
    assert isinstance(model, LlamaForCausalLM) and model.config.hidden_act == "silu"
    assert 1e6 <= model.num_parameters() <= 6e6
    _, heldout, _ = corpus.load_corpus()
    ids = torch.tensor(tokenizer(heldout[0]["text"])["input_ids"][:2049])
    loss = pretrain.evaluate(model, ids, 256)
    assert loss < 3.5  # nats; a uniform guess has log(2048) = 7.6


def test_tokenizer_restores_text_and_keeps_indentation_in_one_piece() -> None:
    tokenizer = AutoTokenizer.from_pretrained(pocket_path())
    text = "def f(x):\n        return 'é' + x\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("\n        ")["input_ids"]) == 1
    assert len(tokenizer) == 2048


def test_pretraining_runs_is_seeded_and_writes_what_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = [
        corpus.Module("a.py", "a", False, "x = 1\ny = x + 1\n" * 300),
        corpus.Module("b.py", "b", True, "y = 2\n" * 200),
    ]
    monkeypatch.setattr(corpus, "read_modules", lambda library=None: tiny)
    options = "--device cpu --hidden 16 --intermediate 32 --layers 1 --heads 2 --context 16 --batch 4 --warmup 2"
    states = []
    for name in ("one", "two"):
        out = tmp_path / name
        pretrain.main([*options.split(), "--steps", "12", "--evaluate-every", "4", "--out", str(out)])
        run = json.loads((out / "run.json").read_text())
        assert run["history"][-1]["heldout_loss"] < run["history"][0]["heldout_loss"]
        assert run["tokens_processed"] == 12 * 4 * 16
        assert not (out / "corpus.npz").exists()
        card = (out / "README.md").read_text()
        assert f"{run['heldout_perplexity']:.3f}" in card and "--hidden 16" in card
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        assert tokenizer.decode(tokenizer("x = 1\n")["input_ids"]) == "x = 1\n"
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_learning_rate_warms_up_and_decays_to_zero() -> None:
    recipe = pretrain.Recipe(warmup=10, steps=110, learning_rate=1.0)
    assert pretrain.rate_at(0, recipe) == pytest.approx(0.1)
    assert pretrain.rate_at(9, recipe) == pytest.approx(1.0)
    assert pretrain.rate_at(60, recipe) == pytest.approx(0.5)
    assert pretrain.rate_at(110, recipe) == pytest.approx(0.0)


def test_loss_is_transformers_own() -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 32, (3, 9))
    expected = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(pretrain.next_token_loss(model, ids), expected)
    assert pretrain.evaluate(model, ids.flatten(), 8) > 0
    assert asdict(pretrain.Recipe())["dropout"] > 0


def test_model_card_says_what_the_recipe_gives() -> None:
    recipe = pretrain.Recipe()
    card = (pocket_path() / "README.md").read_text()
    assert f"{recipe.steps * recipe.batch * recipe.context:,} tokens" in card
    assert "**Again**: `nox -s pretrain`\n" in card  # the defaults are the shipped model's
    config = LlamaConfig.from_pretrained(pocket_path())
    assert (config.hidden_size, config.intermediate_size) == (recipe.hidden, recipe.intermediate)
    assert (config.num_hidden_layers, config.num_attention_heads) == (recipe.layers, recipe.heads)
