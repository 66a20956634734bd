"""LoRA on a patched model: the right gradient, the right parameters, resumable to the bit, and reversible."""

import dataclasses

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

import cats
from cats.finetuning import DivergedError, finetune, recalibrate
from cats.lora import PRESETS, add_lora, lora_config, preset, remove_lora
from tests.conftest import tiny_model
from tests.finetuning_cases import ALL, SETTINGS, adapters, data, patched


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_gradient_is_that_of_the_masked_function(sparsity):
    """Against autograd of equation 1, 4 and LoRA's W + scale B A, written out in float64."""
    model = patched(sparsity=sparsity, settings=ALL).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:  # B starts at zero, where A has no gradient
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
    mlp = cats.gated_mlps(model)["model.layers.1.mlp"]
    threshold = mlp.act_fn.threshold
    x = torch.randn(6, 32, generator=generator, dtype=torch.float64)
    weight = torch.randn(6, 32, generator=generator, dtype=torch.float64)

    factors, effective = [], []
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        a, b = (side["default"].weight.detach().clone().requires_grad_() for side in (linear.lora_A, linear.lora_B))
        factors += [a, b]
        effective.append(linear.base_layer.weight.detach() + 2.0 * b @ a)
    gate = x @ effective[0].T
    v = gate / (1 + torch.exp(-gate))
    kept = (v.detach().abs() >= threshold).double()
    expected = ((v * kept) * (x @ effective[1].T)) @ effective[2].T
    gradients = torch.autograd.grad((expected * weight).sum(), factors)
    assert 1 - kept.mean() == pytest.approx(sparsity, abs=0.25)

    model.train()
    actual = mlp(x)
    (actual * weight).sum().backward()
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    linears = (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    found = [side["default"].weight.grad for linear in linears for side in (linear.lora_A, linear.lora_B)]
    for gradient, reference in zip(found, gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-12)


def test_a_dropped_neuron_teaches_its_gate_nothing():
    model = patched(sparsity=0.5, settings=dataclasses.replace(ALL, projections=("gate",)))
    name, mlp = next(iter(cats.gated_mlps(model).items()))
    thresholds = cats.Thresholds(0.5, {n: 1e9 for n in cats.gated_mlps(model)})
    cats.apply(model, thresholds, kernel="reference")
    model.train()
    mlp(torch.randn(4, 32)).sum().backward()
    assert name == "model.layers.0.mlp"
    assert not mlp.gate_proj.lora_B["default"].weight.grad.any()


def test_sparse_kernel_gives_the_logits_of_the_path_that_was_trained(tmp_path):
    model = patched(settings=ALL)
    finetune(model, data(), SETTINGS, tmp_path)
    ids = data(1)[0]["input_ids"][None]
    with torch.no_grad():
        trained = model(ids).logits
    merged = model.merge_and_unload()
    thresholds = cats.Thresholds(0.5, {n: m.act_fn.threshold for n, m in cats.gated_mlps(merged).items()})
    cats.apply(merged, thresholds, kernel="cpu")
    cache, decoded = None, []
    with torch.no_grad():
        for position in range(ids.shape[1]):  # one token at a time: the kernel's case
            output = merged(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            decoded.append(output.logits)
    decoded = torch.cat(decoded, dim=1)
    assert (decoded - trained).norm() / trained.norm() < 1e-4


def test_training_lowers_the_loss_and_leaves_weights_and_thresholds_alone(tmp_path):
    model = patched()

    def frozen():
        return {k: v for k, v in model.state_dict().items() if "lora" not in k}

    before = {k: v.clone() for k, v in frozen().items()}
    thresholds = [m.act_fn.threshold for m in cats.gated_mlps(model).values()]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    records = finetune(model, data(8), dataclasses.replace(SETTINGS, steps=40), tmp_path, [20])
    assert torch.rand(1) == expected, "the global random state has changed"
    assert [record["step"] for record in records] == [20, 40]
    assert records[1]["train_loss"] < records[0]["train_loss"]
    assert [m.act_fn.threshold for m in cats.gated_mlps(model).values()] == thresholds
    assert set(frozen()) == set(before) and all(torch.equal(value, before[key]) for key, value in frozen().items())
    bare = remove_lora(model)
    cats.remove(bare)
    original = tiny_model().state_dict()
    assert all(torch.equal(original[key], value) for key, value in bare.state_dict().items())
    assert set(original) == set(bare.state_dict())


@pytest.mark.parametrize("settings", ["paper", "code"])
def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, settings):
    """The preset "code" has dropout, so that random states must come back too."""

    def train(workdir, die_at=None):
        model = patched(settings=PRESETS[settings])
        calls = []

        def measure():
            calls.append(1)
            if len(calls) == die_at:
                raise KeyboardInterrupt
            return {"sparsity": list(cats.measure_sparsity(model, [data(4)[0]["input_ids"]]).values())}

        try:
            return finetune(model, data(), SETTINGS, workdir, [4, 8], measure), adapters(model), len(calls)
        except KeyboardInterrupt:
            return None, None, len(calls)

    whole, trained, _ = train(tmp_path / "whole")
    assert train(tmp_path / "killed", die_at=2)[0] is None
    (tmp_path / "killed" / "checkpoint-8").mkdir()  # a checkpoint that was cut short
    resumed, trained_after, calls = train(tmp_path / "killed")
    assert calls == 2, "steps 8 and 12 only"
    assert resumed == whole
    assert all(torch.equal(trained[name], trained_after[name]) for name in trained)
    again, trained_again, calls = train(tmp_path / "killed")
    assert (again, calls) == (whole, 0)
    assert all(torch.equal(trained[name], trained_again[name]) for name in trained)


def test_the_state_at_a_step_does_not_depend_on_the_length_of_the_run(tmp_path):
    short = finetune(patched(), data(), dataclasses.replace(SETTINGS, steps=4), tmp_path / "short")
    long = finetune(patched(), data(), SETTINGS, tmp_path / "long", [4])
    assert short[0] == long[0]


def test_micro_batches_give_the_same_losses(tmp_path):
    whole = finetune(patched(), data(), SETTINGS, tmp_path / "whole", [4])
    pieces = dataclasses.replace(SETTINGS, micro_batch_size=2)
    for a, b in zip(whole, finetune(patched(), data(), pieces, tmp_path / "pieces", [4]), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-5)


def test_same_seed_same_adapters():
    first, same, other = (adapters(patched(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_presets_are_the_papers_text_and_the_authors_code():
    model = tiny_model(hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    paper = add_lora(model, preset("paper"))
    trainable, total = sum(p.numel() for p in adapters(paper).values()), sum(p.numel() for p in model.parameters())
    assert trainable / total == pytest.approx(0.01, rel=0.3)
    assert lora_config(remove_lora(paper), preset("paper")).target_modules == {
        "q_proj", "k_proj", "gate_proj", "down_proj"
    }  # fmt: skip
    code = lora_config(model, preset("code"))
    assert code.target_modules == {"q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    assert (code.r, code.lora_alpha, code.lora_dropout) == (64, 16, 0.1)


def test_fused_projections_are_found():
    assert lora_config(tiny_model("Phi3"), preset("paper")).target_modules == {"qkv_proj", "gate_up_proj", "down_proj"}


def test_recalibrate_moves_a_drifted_model_back_onto_its_target():
    model = patched(sparsity=0.7)
    batches = [row["input_ids"] for row in data(8)]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 1.0, generator=torch.Generator().manual_seed(len(name)))

    def error():
        return max(abs(s - 0.7) for s in cats.measure_sparsity(model, batches).values())

    drifted = error()
    for _ in range(2):  # later layers see other inputs once the earlier ones have moved
        thresholds = recalibrate(model, batches, 0.7)
    assert drifted > 0.02
    assert error() < 0.005
    assert [m.act_fn.threshold for m in cats.gated_mlps(model).values()] == list(thresholds.gate.values())


def test_recalibrate_keeps_the_sites_and_the_kernel():
    model, batches = tiny_model(), [row["input_ids"] for row in data(8)]
    sites = ("gate", "attention_input", "mlp_input")
    low, high = cats.calibrate(model, batches, [0.3, 0.7], sites).values()
    cats.apply(model, low, kernel="cpu")
    thresholds = recalibrate(model, batches, 0.7)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    assert (mlp.cats_state.sparse, mlp.cats_state.kernel) == (True, "cpu")
    first = "model.layers.0"
    assert mlp.act_fn.threshold == thresholds.gate[f"{first}.mlp"] > low.gate[f"{first}.mlp"]
    assert mlp.cats_input.threshold == thresholds.mlp_input[f"{first}.mlp"] > low.mlp_input[f"{first}.mlp"]
    # nothing lies before the first attention block, so that its input is that of the dense model
    assert attention.cats_input.threshold == high.attention_input[f"{first}.self_attn"]
    with pytest.raises(ValueError, match=r"has no threshold: call cats\.apply"):
        recalibrate(tiny_model(), batches, 0.7)


@pytest.mark.parametrize(
    ("settings", "steps", "items", "different"),
    [
        ({"learning_rate": 5.0}, [2], 40, "learning_rate"),
        ({"steps": 6}, [2], 40, "steps, measured steps"),
        ({}, [1, 3], 40, "measured steps"),
        ({}, [2], 39, "items"),
    ],
)
def test_a_workdir_of_another_run_is_refused(tmp_path, settings, steps, items, different):
    asked = dataclasses.replace(SETTINGS, steps=4)
    records = finetune(patched(), data(), asked, tmp_path, [2])
    with pytest.raises(ValueError, match=f"checkpoints of a run with other {different}:"):
        finetune(patched(), data(items), dataclasses.replace(asked, **settings), tmp_path, steps)
    assert finetune(patched(), data(), asked, tmp_path, [2]) == records


def test_an_adapter_can_be_saved_and_loaded_onto_a_patched_model(tmp_path):
    model = patched()
    finetune(model, data(), SETTINGS, tmp_path / "run")
    model.save_pretrained(tmp_path / "adapter")
    ids = data(1)[0]["input_ids"][None]
    expected = model(ids).logits
    bare = remove_lora(model)
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, expected)


def test_bad_input_is_one_sentence(tmp_path):
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(ValueError, match="no gated MLP"):
        add_lora(gpt2, preset("paper"))
    with pytest.raises(ValueError, match="unknown LoRA settings 'best': allowed are paper, code"):
        preset("best")
    with pytest.raises(ValueError, match="unknown projections \\['output'\\]"):
        lora_config(tiny_model(), dataclasses.replace(ALL, projections=("output",)))
    model = patched()
    with pytest.raises(ValueError, match="no training data"):
        finetune(model, [], SETTINGS, tmp_path)
    with pytest.raises(ValueError, match="must lie in 1 to 12"):
        finetune(model, data(), SETTINGS, tmp_path, [0, 4])
    with pytest.raises(ValueError, match="cannot be split evenly"):
        finetune(model, data(), dataclasses.replace(SETTINGS, micro_batch_size=3), tmp_path)
    with pytest.raises(ValueError, match="no tokens"):
        recalibrate(model, [], 0.5)
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
        recalibrate(model, [data(1)[0]["input_ids"]], 1.0)


def test_training_that_diverges_says_so_and_uses_no_cudnn_attention_meanwhile(tmp_path):
    """A rate of 1e30 makes every adapter infinite at the first step."""
    seen = []
    with pytest.raises(DivergedError, match=r"the rate 1e\+30 has diverged: NaN by step 4"):
        settings = dataclasses.replace(SETTINGS, learning_rate=1e30, steps=4)
        finetune(patched(), data(8), settings, tmp_path / "diverged")
    finetune(
        patched(), data(8), dataclasses.replace(SETTINGS, steps=2), tmp_path / "trained",
        measure=lambda: seen.append(torch.backends.cuda.cudnn_sdp_enabled()) or {},
    )  # fmt: skip
    assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled()
