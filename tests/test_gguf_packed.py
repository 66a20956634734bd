"""GGUF files whose MLPs stay packed: the file's own bits, the same model otherwise, a sentence for what cannot be."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

gguf = pytest.importorskip("gguf")
if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
    pytest.skip("GGUF files need transformers 5.23", allow_module_level=True)

from cats_kernels import dequantize  # noqa: E402
from cats_kernels.quantized import from_ggml_blocks  # noqa: E402

import cats  # noqa: E402
from cats.__main__ import main  # noqa: E402
from cats.models import load_model  # noqa: E402
from cats.models.gguf_config import FAMILIES, make_config  # noqa: E402
from cats.models.gguf_header import read_header  # noqa: E402
from cats.models.gguf_packed import load_packed  # noqa: E402
from cats.structure import parts_of  # noqa: E402

from .gguf_files import write_gguf  # noqa: E402
from .test_gguf import CASES, Q4, Q8, make  # noqa: E402

FAMILY_CASES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
pytestmark = pytest.mark.filterwarnings("ignore:.*perplexity")  # these models have random weights


def test_every_family_has_a_case() -> None:
    assert {CASES[case][0] for case in FAMILY_CASES} == FAMILIES.keys()


def only_mlps(kind):
    return lambda name: kind if "ffn" in name else None


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(40)[None] % model.config.vocab_size).logits


@pytest.mark.parametrize("case", FAMILY_CASES)
def test_every_family_is_the_model_with_rounded_mlps(case: str, tmp_path: Path) -> None:
    kind = Q4 if "gemma" in case else Q8
    original, words, architecture = make(case)
    header = read_header(write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(kind)))
    model = load_packed(header, make_config(header), torch.float32, torch.device("cpu"))
    cats.dequantize(model)
    state, expected = model.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        stored = (
            torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind)) if ".mlp." in name else value
        )
        if "down_proj" in name:
            error = (state[name] - stored).norm() / stored.norm()
            assert 0 < error < (0.01 if kind is Q8 else 0.12)
        else:  # a norm of Gemma is stored as one more, which rounds it
            torch.testing.assert_close(state[name], stored, rtol=0, atol=1e-6 if "norm" in name else 0)
        value.copy_(state[name])
    torch.testing.assert_close(logits(model.eval()), logits(original), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "bits"), [(Q8, 8), (Q4, 4)])
def test_gate_and_up_are_the_bits_of_the_file(kind, bits: int, tmp_path: Path) -> None:
    original, words, architecture = make("qwen3")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(kind))
    model, _ = load_model(str(path), packed=True)
    assert model.dtype == torch.bfloat16
    for name, mlp in cats.gated_mlps(model).items():
        was = original.get_submodule(name)
        for part in parts_of(mlp).linears:
            weight, made = getattr(was, part).weight.detach().numpy(), getattr(mlp, part)
            stored = gguf.quantize(weight, kind)
            assert (made.bits, made.group_size, made.scales.dtype) == (bits, 32, torch.float16)
            if part == "down_proj":
                assert made.transposed and made.quantized.shape == (96, 32)
                values = torch.from_numpy(gguf.dequantize(stored, kind)).T
                assert ((dequantize(made.quantized) - values).norm() / values.norm()) < (0.01 if bits == 8 else 0.12)
                continue
            expected = from_ggml_blocks(torch.from_numpy(stored), bits, 32)
            assert torch.equal(made.data, expected.data) and torch.equal(made.scales, expected.scales)
            assert np.array_equal(dequantize(made.quantized).numpy(), gguf.dequantize(stored, kind))


def test_the_packed_model_is_calibrated_applied_and_saved(tmp_path: Path, operator_calls) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(Q8))
    model, _ = load_model(str(path), "float32", packed=True)
    batches = [torch.randint(0, 64, (4, 48), generator=torch.Generator().manual_seed(7))]
    cats.apply(model, cats.calibrate(model, batches, 0.5))
    operator_calls.clear()
    with torch.no_grad():
        model(torch.arange(3)[None])
    assert len(operator_calls) == 3
    cats.remove(model)
    cats.save_quantized(model, tmp_path / "model.safetensors")
    assert torch.equal(logits(cats.load_quantized(tmp_path / "model.safetensors")), logits(model))


@pytest.mark.parametrize("finer", ["output.weight", "token_embd.weight"])
def test_an_output_matrix_stored_twice_is_the_finer_copy(finer: str, tmp_path: Path) -> None:
    original, words, architecture = make("qwen2")

    def twice(tensors) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"]

    kinds = {f"blk.{i}.ffn_{part}.weight": Q4 for i in range(3) for part in ("gate", "up", "down")}
    kinds |= {"output.weight": Q4, "token_embd.weight": Q4} | {finer: Q8}
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, kinds, twice)
    model, _ = load_model(str(path), "float32", packed=True)
    embedding = original.get_input_embeddings().weight.detach().numpy()
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(embedding, Q8), Q8))
    assert torch.equal(model.get_input_embeddings().weight, expected)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_other_types_are_rounded_while_they_are_read(tmp_path: Path) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(Q8))
    wanted, _ = load_model(str(path))
    cats.quantize(wanted, 4, 32)
    model, _ = load_model(str(path), bits=4, group_size=32)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.state_dict().items())


def test_what_cannot_be_kept_packed_is_one_sentence(tmp_path: Path) -> None:
    original, words, architecture = make("llama")
    kinds = only_mlps(Q8)
    other = {"blk.1.ffn_up.weight": gguf.GGMLQuantizationType.Q5_0}
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, lambda n: other.get(n) or kinds(n))
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight as Q5_0: Q8_0 and Q4_0 can be kept packed") as caught:
        load_model(str(path), packed=True)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(ValueError, match="has no quantised weights to keep packed"):
        load_model("pocket", packed=True)


@pytest.mark.parametrize("part", ["gate", "down"])
def test_scales_that_are_not_finite_are_refused(part: str, tmp_path: Path) -> None:
    original, words, architecture = make("llama")
    path = write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(Q8))
    start = read_header(path).tensors[f"blk.0.ffn_{part}.weight"].start
    content = bytearray(path.read_bytes())
    content[start : start + 2] = b"\xff\xff"
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=rf"blk\.0\.ffn_{part}\.weight.* finite"):
        load_model(str(path), packed=True)


@pytest.mark.parametrize("kind", [Q4, Q8], ids=["Q4_0", "Q8_0"])
def test_cats_quantize_keeps_the_bits_of_a_file(kind: object, tmp_path: Path) -> None:
    original, words, architecture = make("qwen2")
    file = write_gguf(tmp_path / "model.gguf", original, words, architecture, only_mlps(kind))
    assert main(["quantize", str(file), "--packed", "--output", str(tmp_path / "made")]) == 0
    made, tokenizer = load_model(str(tmp_path / "made"))
    packed, known = load_model(str(file), packed=True)
    assert torch.equal(logits(made), logits(packed))
    text = "".join(words.tokens[:40])
    assert tokenizer(text)["input_ids"] == known(text)["input_ids"]
