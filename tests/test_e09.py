"""e09 in a tiny world: formats are what the kernels compute with, differences are paired, an interrupted run goes on,
and the speed of a small shape."""

import math
import statistics

import pytest
import torch
from cats_kernels.quantized import dequantize, quantize
from transformers import LlamaConfig, LlamaForCausalLM

import cats
from cats.models import load_model
from experiments import e09_quantization
from experiments.e09_quantization import dense, speed
from experiments.e09_quantization import generation as generation_module
from experiments.e09_quantization.formats import PLAIN, QuantizedLinears, format_of
from experiments.e09_quantization.quality import cases
from experiments.framework.runner import run_experiment
from experiments.framework.samples import flags, numbers, paired
from experiments.framework.tables import QuantizationSpeedRow
from tests.accuracy_world import build_world, config_of, profile, samples, table

pytestmark = pytest.mark.usefixtures("little_to_flush")
KEY = QuantizationSpeedRow.key
E09 = """[e09]
include_path = "{world}/tasks"
tasks = ["tiny_words"]
limit = 20
formats = ["int8-row", "int4-32"]
levels = [0.5]
batch_size = 4
calibration_blocks = 8
heldout_blocks = 8
length = 32
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = build_world(tmp_path_factory.mktemp("world"))
    (root / "tiny.toml").write_text(profile(root) + E09.format(world=root))
    return root


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("e09")
    run_experiment(config_of(world, "e09", output))
    return output


def test_every_format_has_its_dense_and_every_level(run):
    rows = [row for row in table(run, "e09_quantization") if row["metric"] == "perplexity"]
    assert [(row["format"], row["variant"]) for row in rows] == [
        (form, variant) for form in ("none", "int8-row", "int4-32") for variant in ("dense", "cats-50")
    ]
    assert [row["bits"] for row in rows[::2]] == ["", "8", "4"]
    tasks = [row for row in table(run, "e09_quantization") if row["metric"] == "acc"]
    assert len(tasks) == len(rows)


def test_bytes_are_those_of_packed_rows_and_scales(run):
    """d = 32, float32: a row of 32 weights is 128 bytes, 36 in int8 with one scale, 20 in int4 with one."""
    for row in table(run, "e09_quantization"):
        whole = {"none": 1.0, "int8-row": 36 / 128, "int4-32": 20 / 128}[row["format"]]
        assert float(row["mlp_memory"]) == pytest.approx(whole, rel=1e-6)
        skipped = float(row["sparsity_measured"] or 0)
        assert float(row["mlp_bytes"]) == pytest.approx(whole * (1 - 2 * skipped / 3), rel=1e-6)


def test_differences_are_paired_with_both_dense_models(run):
    blocks = {(row["format"], row["variant"]): numbers(row["nats"]) for row in samples(run, "e09_blocks")}
    items = {(row["format"], row["variant"]): flags(row["correct"]) for row in samples(run, "e09_items")}
    for row in table(run, "e09_quantization"):
        stored = blocks if row["metric"] == "perplexity" else items
        own = stored[row["format"], row["variant"]]
        for column, base in (("difference", "none"), ("format_difference", row["format"])):
            difference, error = paired(own, stored[base, "dense"])
            assert float(row[column]) == pytest.approx(difference, abs=1e-6)
            assert float(row[f"{column}_stderr"]) == pytest.approx(error, abs=1e-6)


def test_weights_are_rounded_along_a_neurons_row_and_given_back(world):
    model = load_model(str(world / "model"), "float32")[0]
    mlp = model.model.layers[0].mlp
    before = {name: weight.clone() for name, weight in mlp.state_dict().items()}
    linears = QuantizedLinears(model)
    for name in ("int4-32", "int8-row"):
        form = format_of(name)
        linears.round_to(form)
        for part in ("gate_proj", "up_proj"):
            expected = dequantize(quantize(before[f"{part}.weight"], form.bits, form.group_size))
            assert torch.equal(mlp.get_submodule(part).weight, expected)
        down = dequantize(quantize(before["down_proj.weight"].T.contiguous(), form.bits, form.group_size)).T
        assert torch.equal(mlp.down_proj.weight, down)
    linears.round_to(format_of(PLAIN))
    assert all(torch.equal(weight, before[name]) for name, weight in mlp.state_dict().items())


@pytest.mark.parametrize("name", ["int8-128-all", "int4-32-all"])
def test_all_layers_are_rounded_as_cats_quantizes_them_and_given_back(name):
    """Twice: the second time from the originals, not from rounded weights. The output matrix is the embedding here."""
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model, ids = LlamaForCausalLM(config).eval(), torch.arange(8)[None]
    before, form = model(ids).logits, format_of(name)
    linears = QuantizedLinears(model)
    for _ in range(2):
        linears.round_to(form)
    rounded = model(ids).logits
    linears.round_to(format_of(PLAIN))
    assert torch.equal(model(ids).logits, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    cats.quantize(model, form.bits, form.group_size, linears="all")
    assert torch.allclose(rounded, model(ids).logits, atol=2e-5 * before.abs().max().item())
    assert (rounded - before).abs().max() > 1e-3 * before.abs().max()


def test_an_interrupted_run_goes_on(world, tmp_path, monkeypatch):
    options = {"tasks": [], "formats": ["int4-32"]}
    measured, real = [], e09_quantization.measure

    def until_third(subject, case, *others):
        measured.append(case.key)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return real(subject, case, *others)

    monkeypatch.setattr(e09_quantization, "measure", until_third)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(config_of(world, "e09", tmp_path, **options))
    run_experiment(config_of(world, "e09", tmp_path, **options))
    assert measured == ["none/dense", "none/cats-50", "int4-32/dense", "int4-32/dense", "int4-32/cats-50"]


def test_speed_rows_of_a_small_shape(world, tmp_path, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, "small", (64, 96))
    options = {"quality": False, "shapes": ["small"], "sparsities": [0.5], "warmups": 0, "rounds": 2, "compiled": False}
    run_experiment(config_of(world, "e09", tmp_path, **options))
    rows = table(tmp_path, "e09_speed")
    kept = {(row["format"], row["implementation"], row["sparsity_target"]) for row in rows}
    assert {
        ("none", "torch", "0"),
        ("none", "cats", "0.5"),
        ("int4-32", "cats", "0"),
        ("int8-row", "torch", "0"),
    } <= kept
    for row in rows:
        if row["error"] == "":
            assert 0 < float(row["fraction_of_bound"]) <= 1.0 + 1e-6
            assert int(row["bytes_moved"]) <= int(row["bytes_stored"])
    own = {row["format"]: int(row["bytes_stored"]) for row in rows if row["implementation"] == "cats"}
    # bfloat16 scales: per row of 64 weights 128 bytes, 64 and one scale, 32 and two scales
    assert own == {"none": 3 * 96 * 128, "int8-row": 3 * 96 * 66, "int4-32": 3 * 96 * 36}
    rounds = {tuple(each[key] for key in KEY): each["milliseconds"] for each in samples(tmp_path, "e09_rounds")}
    timed = [row for row in rows if row["error"] == ""]
    assert len(rounds) == len(timed)
    for row in timed:
        times = [float(number) for number in rounds[tuple(row[key] for key in KEY)].split(";")]
        of_bound = float(row["bound_ms"]) / statistics.geometric_mean(times)
        assert float(row["fraction_of_bound"]) == pytest.approx(of_bound, rel=1e-5)


def test_generation_in_every_format(world, tmp_path):
    generation = {"lengths": {"eager": [3, 4]}, "prompts": 1, "calibration_tokens": 64}
    generation["formats"] = ["int4-32", "int8-row-all"]
    options = {"quality": False, "generation": {**generation, "prompt_tokens": 8, "repeats": 1}}
    run_experiment(config_of(world, "e09", tmp_path, **options))
    rows = table(tmp_path, "e09_generation")
    keys = {(row["format"], row["variant"], row["generated_tokens"], row["repeat"]) for row in rows}
    assert len(keys) == len(rows) == 3 * 2 * 2
    for row in rows:
        assert float(row["tokens_per_second"]) > 0 and row["loop"] == "eager"
        assert row["path"] == ("dense" if row["variant"] == "dense" else "sparse kernel")
        if row["variant"] != "dense":
            assert abs(float(row["sparsity_measured"]) - 0.5) < 0.25
    size = {row["format"]: int(row["weight_bytes"]) for row in rows}
    model = load_model(str(world / "model"), "float32")[0]
    mlps = sum(weight.nbytes for name, weight in model.state_dict().items() if ".mlp." in name)
    # float32 rows of d = 32: 128 bytes, in int4 16 and a scale of 4
    assert size["none"] - size["int4-32"] == mlps * (128 - 20) // 128
    linears = [module.weight for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert size["none"] - size["int8-row-all"] == sum(w.numel() for w in linears) * (128 - 36) // 32
    with pytest.raises(ValueError, match='the loop "graph" is a CUDA graph'):
        generation_module.check_loops(config_of(world, "e09", tmp_path, generation={"lengths": {"graph": [4]}}))


def test_a_wrong_kernel_is_not_timed(world, tmp_path, monkeypatch):
    monkeypatch.setitem(speed.SHAPES, "small", (64, 96))
    monkeypatch.setattr(speed, "own_call", lambda x, *_: 1.1 * x)
    options = {"quality": False, "shapes": ["small"], "compiled": False}
    with pytest.raises(ValueError, match=r"is wrong by .* against the float64 reference"):
        run_experiment(config_of(world, "e09", tmp_path, **options))


@pytest.mark.parametrize("form", ["int8-row", "int4-32"])
def test_torchs_dense_kernels_compute_the_same_function(form: str):
    generator = torch.Generator().manual_seed(0)
    x, gate, up = (torch.randn(n, 64, generator=generator).bfloat16() for n in (1, 96, 96))
    down = torch.randn(64, 96, generator=generator).bfloat16()
    made = format_of(form)
    weights = dense.DenseWeights(gate, up, down, made.bits, made.group_size)
    expected = weights.expected(x)
    y = dense.torch_kernels_mlp(weights, x)()
    assert (y - expected).norm() < 0.02 * expected.norm()
    if made.bits == 8:
        assert (dense.int8_call(dense.int8_mlp, weights, x)() - expected).norm() < 0.02 * expected.norm()


def test_cases_and_options():
    assert [case.key for case in cases(["int4-64"], "up-norm", [0.5])] == [
        *("none/dense", "none/up-norm-50", "int4-64/dense", "int4-64/up-norm-50"),
    ]
    every = format_of("int4-128-all")
    assert (every.bits, every.group_size, every.linears) == (4, 128, "all") and format_of("int4-128").linears == "mlp"
    assert format_of("int8-row-all").group_size is None and format_of("int8-row-all").linears == "all"
    assert format_of("int8-row").group_size is None and format_of("int8-128").group_size == 128
    assert "teal" not in e09_quantization.neuron_criteria() and "cats" in e09_quantization.neuron_criteria()


def test_wrong_options_are_refused_and_the_cost_is_finite(world, tmp_path):
    with pytest.raises(ValueError, match=r"e09\.formats must be"):
        config_of(world, "e09", tmp_path, formats=["int3-32"])
    with pytest.raises(ValueError, match=r"e09\.criterion must be"):
        config_of(world, "e09", tmp_path, criterion="teal")
    cost = e09_quantization.cost(config_of(world, "e09", tmp_path, shapes=["Mistral-7B"]))
    assert cost.work.operations > 0 and all(map(math.isfinite, (cost.memory, cost.fixed_memory, cost.fixed_seconds)))
