"""Compiled patched models: one graph for all layers, before and after every change, with the numbers of eager."""

import copy
import io

import pytest
import torch
from torch import nn

import cats

from .conftest import tiny_model

LAYERS = 12


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("Llama", num_hidden_layers=LAYERS)


class Graphs:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list) -> object:
        self.texts.append(graph.code)
        return graph.forward

    @property
    def frame_count(self) -> int:
        return len(self.texts)


def by_layer(model: nn.Module) -> Graphs:
    counter = Graphs()
    for layer in model.model.layers:
        layer.compile(backend=counter, fullgraph=True)
    return counter


def agrees(model: nn.Module, ids: torch.Tensor) -> None:
    """Compiled and eager logits are the same, and dynamo has not fallen back."""
    with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = model(ids, use_cache=False).logits
        with torch.compiler.set_stance("force_eager"):
            eager = model(ids, use_cache=False).logits
    assert torch.allclose(compiled, eager, atol=1e-5)


@pytest.mark.parametrize(
    ("criterion", "kernel"), [("cats", "auto"), ("chess", "auto"), ("up-norm", "auto"), ("up-norm", "reference")]
)
def test_all_layers_share_one_graph(criterion: str, kernel: str, model: nn.Module, batches: list) -> None:
    ids = batches[0]["input_ids"][:1, :4]
    made = cats.calibrate(model, batches, [0.5, 0.8], criterion=criterion)
    counter = by_layer(model)
    agrees(model, ids)
    assert counter.frame_count == 1  # dense
    cats.apply(model, made[0.5], kernel)
    agrees(model, ids)
    assert counter.frame_count == 2
    assert ("cats.sparse_gated_mlp" in counter.texts[1]) == (kernel == "auto")
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    cats.apply(model, made[0.8], kernel)
    agrees(model, ids)
    assert counter.frame_count == 2  # other thresholds, the same code
    with torch.no_grad():
        assert not torch.allclose(model(ids, use_cache=False).logits, before, atol=1e-2)
    cats.remove(model)
    agrees(model, ids)
    assert counter.frame_count <= 3
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    assert torch.equal(dense, tiny_model("Llama", num_hidden_layers=LAYERS)(ids, use_cache=False).logits)


def test_a_number_and_a_vector_are_two_graphs(model: nn.Module, batches: list) -> None:
    made = cats.calibrate(model, batches, 0.6, criterion=("cats", "chess", "up", "teal"))
    counter, ids = by_layer(model), batches[0]["input_ids"][:1, :4]
    for count, name in enumerate(("cats", "chess", "up", "teal"), 1):
        cats.apply(model, made[name], "reference")
        agrees(model, ids)
        assert counter.frame_count == count


@pytest.mark.parametrize("criterion", ["cats", "up-norm"])
def test_a_whole_compiled_model_follows_apply_swap_and_remove(criterion: str, llama, batches: list) -> None:
    made = cats.calibrate(llama, batches, [0.5, 0.8], criterion=criterion)
    counter, ids = Graphs(), batches[0]["input_ids"][:1, :4]
    llama.compile(backend=counter, fullgraph=True)
    agrees(llama, ids)
    for count, change in (
        (2, lambda: cats.apply(llama, made[0.5])),
        (2, lambda: cats.apply(llama, made[0.8])),
        (3, lambda: cats.remove(llama)),
    ):
        change()
        agrees(llama, ids)
        assert counter.frame_count <= count


def test_dense_prefill_compiles(model: nn.Module, batches: list) -> None:
    cats.apply(model, cats.calibrate(model, batches, 0.7), prefill="dense")
    by_layer(model)
    for length in (1, 8, 9, 40, 4):
        agrees(model, batches[0]["input_ids"][:1, :length])


@pytest.mark.parametrize("criterion", ["cats", "chess", "up"])
def test_export_holds_the_thresholds_as_buffers(criterion: str, llama, batches: list) -> None:
    cats.apply(llama, cats.calibrate(llama, batches, 0.6, criterion=criterion))
    mlp, x = llama.model.layers[0].mlp.eval(), torch.randn(1, 2, 32)
    with torch.no_grad():
        program = torch.export.export(mlp, (x,))
        assert torch.allclose(program.module()(x), mlp(x), atol=1e-5)
    assert "cats.sparse_gated_mlp" in str(program.graph)
    assert not any("threshold" in name for name in program.state_dict)


# ---------------------------------------------------------------------------------------------------------------------
# thresholds as tensors of a module


def thresholds_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if name.endswith(".threshold")}


@pytest.mark.parametrize("criterion", ["cats", "chess", "up-norm", "wina"])
def test_no_cast_changes_a_threshold(criterion: str, llama, batches: list) -> None:
    made = cats.calibrate(llama, batches, 0.6, criterion=criterion)
    given = {site: values for site, values in made.sites.items()}
    cats.apply(llama, made, "reference")
    before = thresholds_of(llama)
    assert len(before) == (3 if criterion in ("cats", "chess") else 6 if criterion == "up-norm" else 12)
    for change in ("bfloat16", "half", "double", "float"):
        getattr(llama, change)()
        after = thresholds_of(llama)
        assert all(value.dtype == torch.float32 and torch.equal(value, before[name]) for name, value in after.items())
    llama.to(torch.bfloat16)
    file = io.BytesIO()
    torch.save(llama, file)
    file.seek(0)
    for other in (copy.deepcopy(llama), torch.load(file, weights_only=False)):
        assert all(torch.equal(value, before[name]) for name, value in thresholds_of(other).items())
    moved = copy.deepcopy(llama).to("meta")
    assert all(value.is_meta and value.dtype == torch.float32 for value in thresholds_of(moved).values())
    assert not any("threshold" in name for name in llama.state_dict()) and given == made.sites


def test_thresholds_are_swapped_in_place(llama: nn.Module, batches: list) -> None:
    for name in ("cats", "chess", "up-norm"):
        made = cats.calibrate(llama, batches, [0.5, 0.9], criterion=name)
        cats.apply(llama, made[0.5])
        addresses = {n: b.data_ptr() for n, b in llama.named_buffers() if n.endswith(".threshold")}
        with torch.inference_mode():
            cats.apply(llama, made[0.9])
        assert {n: b.data_ptr() for n, b in llama.named_buffers() if n.endswith(".threshold")} == addresses
        assert all(abs(f - 0.9) < 0.03 for f in cats.measure_sparsity(llama, batches).values())
        assert not any(b.is_inference() for b in llama.buffers())
        cats.remove(llama)
