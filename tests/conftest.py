"""Shared by the tests: tiny random models of the supported families, and what a patched one must compute."""

import copy
import gc
from collections.abc import Iterator

import cats_kernels
import pytest
import torch
import transformers

import cats
from experiments.framework import timing
from tests.toy_experiments import toy as toy

TINY = {
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that began when the others have ended would leave the cores idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of Python's garbage collections: Trainer asks for a full one at the end of each
    run, which takes a second over the objects of torch and all the other packages, none of which can ever go."""
    gc.collect()
    gc.freeze()


calls_compiler = pytest.mark.skipif(
    " " in torch.__path__[0], reason="inductor does not quote torch's folder when it calls the C++ compiler"
)


def tiny_model(family: str = "Llama", seed: int = 0, **overrides) -> torch.nn.Module:
    """A random float32 causal language model of ``family`` with weights large enough to be far from linear."""
    torch.manual_seed(seed)
    extra = {"head_dim": 8} if family.startswith(("Gemma", "Qwen3")) else {}
    if family == "Phi3":
        extra = {"pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**{**TINY, **extra, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(
                    0, 1.5 * parameter.shape[1] ** -0.5, generator=torch.Generator().manual_seed(len(name))
                )
    return model


@pytest.fixture
def llama() -> torch.nn.Module:
    return tiny_model("Llama")


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(0, 64, (4, 48), generator=generator)} for _ in range(4)]


@pytest.fixture(scope="module")
def little_to_flush() -> Iterator[None]:
    """A megabyte to read before each timed call, not the gigabyte that takes most of the time of an experiment with
    small models: for tests of everything but the times."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(timing, "FLUSH_BYTES", 2**20)
        monkeypatch.setattr(timing, "last_level_cache_bytes", lambda: 2**10)
        yield


def masked_reference_logits(model: torch.nn.Module, ids: torch.Tensor, thresholds: cats.Thresholds) -> torch.Tensor:
    """Logits in float64 with each MLP replaced by equation 1 and 4 written out on plain weights."""
    reference = copy.deepcopy(model).double()
    for name, mlp in cats.gated_mlps(reference).items():
        original = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

        def forward(x, mlp=mlp, original=original, t=thresholds.gate[name]):
            if hasattr(mlp, "gate_up_proj"):
                gate_weight, up_weight = mlp.gate_up_proj.weight.chunk(2)
            else:
                gate_weight, up_weight = mlp.gate_proj.weight, mlp.up_proj.weight
            v = original(x @ gate_weight.T)
            v = v * (v.abs() >= t)
            return (v * (x @ up_weight.T)) @ mlp.down_proj.weight.T

        mlp.forward = forward
    with torch.no_grad():
        return reference(ids).logits


@pytest.fixture
def operator_calls(monkeypatch) -> list[str]:
    """The backend asked for in each call of the operator by a patched model; empty when the dense path ran."""
    calls: list[str] = []
    operator = cats_kernels.sparse_gated_mlp

    def counted(*args):
        calls.append(args[6])
        return operator(*args)

    monkeypatch.setattr(cats_kernels, "sparse_gated_mlp", counted)
    return calls


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits
