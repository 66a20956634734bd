"""A local directory as `save_pretrained` writes it."""

import json
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from cats.models import pretrained
from cats.models.loader import Loader, Origin, Request

CONVERTED = "converted_from.json"  # what `python -m cats.models` leaves beside a model that it converted


class DirectoryLoader(Loader):
    """Weights from safetensors; no code of the directory runs."""

    order = 30
    example = "a model directory"

    def claims(self, spec: str) -> bool:
        return Path(spec).expanduser().is_dir()

    def resolve(self, spec: str) -> str:
        path = Path(spec).expanduser()
        if not (path / "config.json").is_file():
            raise ValueError(f"{spec} is a directory without config.json: give a directory written by save_pretrained")
        return str(path)

    def config(self, spec: str, layers: int | None = None) -> PretrainedConfig:
        return pretrained.load_config(spec, self.resolve(spec), layers)

    def load(self, spec: str, request: Request) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return pretrained.load(spec, self.resolve(spec), request)

    def tokenizer(self, spec: str) -> PreTrainedTokenizerBase:
        return pretrained.load_tokenizer(spec, self.resolve(spec))

    def origin(self, spec: str) -> Origin:
        return self.origin_of(Path(self.resolve(spec)), "directory")

    def origin_of(self, folder: Path, kind: str, revision: str | None = None) -> Origin:
        """What lies in ``folder``: the files that loading reads, in order of their names."""
        notes = {}
        if (folder / CONVERTED).is_file():
            notes = json.loads((folder / CONVERTED).read_text())
            kind = f"{notes.pop('kind')}, converted to a directory"
        config = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).is_file()]
        tokenizer = tokenizer_files(folder)
        weights = sorted(folder.glob("*.safetensors"))
        return Origin(kind, revision, tuple(weights), tuple(config), tuple(tokenizer), notes)


def tokenizer_files(folder: Path) -> list[Path]:
    """What a tokenizer is read from, in order of names."""
    known = ("token", "vocab", "merges", "special_tokens", "added_tokens", "chat_template")
    return [path for path in sorted(folder.iterdir()) if path.is_file() and path.name.startswith(known)]


LOADER = DirectoryLoader()
