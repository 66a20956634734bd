"""A GGUF file, as llama.cpp uses them: its weights (Q4_K_M and others) are dequantised when it is loaded.

They become bfloat16 unless another dtype is asked for. Results are then those of the quantised weights, not of the
original ones, and have to say so: `identity` does. `cats.models.gguf_packed` keeps those of the MLPs packed.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cats.models.gguf_config import end_tokens, make_config
from cats.models.gguf_header import Header, read_header
from cats.models.gguf_packed import Tensors, load_packed
from cats.models.gguf_tokenizer import make_tokenizer
from cats.models.loader import Loader, Origin, Request
from cats.models.sanity import absurdity
from cats.models.streaming import quantized_model, rounded
from cats.skeleton import empty_model, fill

# transformers 5.17 builds another tokenizer of a Gemma-3 file, without a word: twice the tokens, no bos, and with the
# same weights a perplexity of 225 on news where 5.23's tokenizer gives 18; the versions between were not tried
OLDEST = "5.23"


class GGUFLoader(Loader):
    """Tensor by tensor into transformers' model, with a configuration and a tokenizer made of the file's metadata."""

    order = 20
    example = "a GGUF file"
    packs = True

    def claims(self, spec: str) -> bool:
        path = Path(spec).expanduser()
        return path.is_file() or (spec.endswith(".gguf") and not path.is_dir())

    def resolve(self, spec: str) -> str:
        path = Path(spec).expanduser()
        if not path.is_file():
            raise ValueError(f"{spec} does not exist: give the path of a GGUF file")
        if path.suffix == ".safetensors":
            raise ValueError(f"{spec} is a file of weights: give the directory that it lies in")
        with path.open("rb") as file:
            if not path.suffix == ".gguf" and file.read(4) != b"GGUF":
                raise ValueError(f"{spec} is a file: give the directory that save_pretrained wrote, or a GGUF file")
        return str(path)

    def header(self, spec: str) -> Header:
        """The file's head, once it is known that the file can be loaded here.

        Raises:
            ValueError: another transformers than is needed, or one part of a divided file; as `read_header`.
            OSError: the gguf package is missing; as `read_header`.
        """
        if find_spec("gguf") is None:
            raise OSError(f"{spec} needs the package gguf: pip install 'cats-sparsity[gguf]' brings it")
        if Version(transformers.__version__) < Version(OLDEST):
            advice = "install it, or convert the file where it is with python -m cats.models FILE.gguf DIRECTORY"
            raise ValueError(f"{spec} needs transformers {OLDEST} or newer, not {transformers.__version__}: {advice}")
        header = read_header(Path(self.resolve(spec)).resolve())
        if header.metadata.get("split.count", 1) > 1:
            raise ValueError(f"{spec} is one part of {header.metadata['split.count']}: join them with llama-gguf-split")
        return header

    def config(self, spec: str, layers: int | None = None) -> PretrainedConfig:
        return make_config(self.header(spec), layers)

    def load(self, spec: str, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if request.device == "sharded":
            raise ValueError(f"{spec} is a GGUF file, which cannot be sharded: convert it to a directory first")
        header = self.header(spec)
        tokenizer = make_tokenizer(header)  # before the long work: it may be refused
        model = _read(header, request)
        model.to(torch.device(request.device)).eval()  # type: ignore[arg-type]
        if request.layers is None and (sentence := absurdity(spec, model, tokenizer)):
            warnings.warn(sentence, stacklevel=3)
        return model, tokenizer

    def tokenizer(self, spec: str) -> PreTrainedTokenizerBase:
        return make_tokenizer(self.header(spec))

    def origin(self, spec: str) -> Origin:
        header = self.header(spec)
        return Origin(f"GGUF {quantisation(header)}, dequantised", None, weights=(header.path,))


def quantisation(header: Header) -> str:
    """What llama.cpp calls the mixture of types in the file, such as ``Q4_K_M``."""
    from gguf import LlamaFileType

    try:
        return LlamaFileType(header.metadata["general.file_type"]).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except (KeyError, ValueError):
        return "of unknown type"


def _read(header: Header, request: Request) -> PreTrainedModel:
    """The model of the file, its weights dequantised, or quantised as is asked for.

    transformers' own reading makes the same tensors, but first a Python object of every entry of the vocabulary.
    """
    config, dtype = make_config(header, request.layers), request.dtype or torch.bfloat16
    device = torch.device(request.device)
    tensors = Tensors(header, config, device)
    names = tensors.names.keys()
    if request.plain:
        model = empty_model(config, dtype)
        fill(model, lambda name, held: tensors.plain(name, held.dtype), names, device)
    elif request.bits is None:
        model = load_packed(header, config, dtype, device)
    else:
        packed = rounded(tensors.plain, dtype, request.bits, request.group_size)
        model = quantized_model(config, dtype, device, names, tensors.plain, packed, request.others)
    model.generation_config = _generation_config(header)
    return model


def _generation_config(header: Header) -> GenerationConfig:
    meta = header.metadata
    return GenerationConfig(
        do_sample=False,
        bos_token_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=end_tokens(header) or None,
        pad_token_id=meta.get("tokenizer.ggml.padding_token_id"),
    )


LOADER = GGUFLoader()
