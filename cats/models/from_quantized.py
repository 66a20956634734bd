"""A model with quantised weights: a file of `cats.save_quantized`, or the directory that `cats quantize` writes, in
which such a file lies beside the tokenizer."""

from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cats.models import pretrained
from cats.models.from_directory import tokenizer_files
from cats.models.loader import Loader, Origin, Request
from cats.quantized_files import QUANTIZED, has_format, load_quantized, read_config


class QuantizedLoader(Loader):
    """The model as it was saved: of one dtype, whole, and on one device."""

    order = 15
    example = "a directory of cats quantize"

    def claims(self, spec: str) -> bool:
        path = Path(spec).expanduser()
        if path.suffix != ".safetensors" or not path.is_file():
            return (path / QUANTIZED).is_file()
        try:
            return has_format(path)
        except OSError:  # damaged, as loading will say
            return True

    def resolve(self, spec: str) -> str:
        path = Path(spec).expanduser()
        return str(path / QUANTIZED if path.is_dir() else path)

    def config(self, spec: str, layers: int | None = None) -> PretrainedConfig:
        _refuse_layers(spec, layers)
        return read_config(self.resolve(spec))

    def load(self, spec: str, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
        _refuse_layers(spec, request.layers)
        if request.bits is not None:
            raise ValueError(f"{spec} is quantised already: leave bits out")
        if request.device == "sharded":
            raise ValueError(f"{spec} is quantised, which cannot be sharded: put it on one device")
        dtype = self.config(spec).dtype
        if request.dtype not in (None, dtype):
            raise ValueError(f"{spec} was quantised as {dtype}: leave dtype out, or quantise it as another one")
        tokenizer = self.tokenizer(spec)
        return load_quantized(self.resolve(spec), request.device), tokenizer

    def tokenizer(self, spec: str) -> PreTrainedTokenizerBase | None:
        folder = Path(spec).expanduser()
        return pretrained.load_tokenizer(spec, str(folder)) if (folder / "tokenizer_config.json").is_file() else None

    def origin(self, spec: str) -> Origin:
        file = Path(self.resolve(spec))
        beside = tokenizer_files(file.parent) if Path(spec).expanduser().is_dir() else []
        return Origin("quantised by cats", None, weights=(file,), tokenizer=tuple(beside))


def _refuse_layers(spec: str, layers: int | None) -> None:
    if layers is not None:
        raise ValueError(f"{spec} is quantised and is loaded whole: take the first layers of what it was made of")


LOADER = QuantizedLoader()
